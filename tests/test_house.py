"""The laws of the house that a machine can check, over every script at the top level."""
import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
SECTIONS = "Config Model Data Objective Optimizer Precision Parallelism Checkpoint Training Plumbing".split()
# what may differ from script to script; every other name at the top level has one text
OWN = set("""Config PRESETS Block init_weights get_batch objective build_optimizer learning_rate parallelize
count_parameters flops_per_token memory_per_rank dry_run train sample check from_hf to_hf main""".split())
PUBLIC = OWN - {"Block", "memory_per_rank", "train"}


def definitions(path):
    tree, lines = ast.parse(path.read_text("utf-8")), path.read_text("utf-8").splitlines()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            yield node, "\n".join(lines[first - 1 : node.end_lineno])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_keeps_the_laws(path):
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    allowed = {"torch", "numpy", "tiktoken"} | set(sys.stdlib_module_names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            extra = {"safetensors", "matplotlib"} if node.col_offset else set()  # inside a function only
            for module in modules:
                assert module.split(".")[0] in allowed | extra, f"line {node.lineno} imports {module}"
    assert [m for m in re.findall(r"^# -+ (\w+) -+$", source, re.M) if m in SECTIONS] == SECTIONS  # others may stand between
    assert all(len(line) <= 100 for line in source.splitlines())
    docstring = ast.get_docstring(tree)
    assert all(word in docstring for word in ("Map:", "Legend:", "Run:", "Expect:"))
    for node, _ in definitions(path):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, f"{node.name} is longer than a screen"
    names = {node.name for node, _ in definitions(path)} | set(re.findall(r"^([A-Z]+) = ", source, re.M))
    assert PUBLIC <= names, PUBLIC - names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_field_of_config_has_a_meaning(path):
    config = next(text for node, text in definitions(path) if node.name == "Config")
    fields = re.findall(r"^    (\w+): .*$", config, re.M)
    assert fields == re.findall(r"^    (\w+): .*?  # .+$", config, re.M)


def test_one_name_has_one_meaning():
    texts = collections.defaultdict(set)
    for path in SCRIPTS:
        for node, text in definitions(path):
            texts[node.name].add(text)
    assert [name for name, versions in texts.items() if len(versions) > 1 and name not in OWN] == []


def test_import_has_no_side_effects(tmp_path):
    """In one process for all scripts, since torch takes seconds."""
    code = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); before = torch.random.get_rng_state()\n"
    code += "".join(f"import {path.stem}\n" for path in SCRIPTS) + "assert torch.equal(before, torch.random.get_rng_state())"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


def test_scripts_and_readme_know_each_other():
    readme = (ROOT / "README.md").read_text("utf-8")
    from conftest import SCRIPTS as rows

    assert {path.stem for path in SCRIPTS} == set(rows)
    for path in SCRIPTS:
        row = re.search(rf"^\| `{path.name}` \|.*\| (\d+) \|$", readme, re.M)
        assert row and int(row[1]) == len(path.read_text("utf-8").splitlines()), path.name
