"""The command line as people use it: torchrun, kill and resume, signals, shards, bad input. What all scripts share runs on gpt1."""
import base64
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from unittest import mock

import deepseek_v3
import gpt1
import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS
from ranks import Process, free_port, run_main, together

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = tempfile.TemporaryDirectory()  # removed at the end
TEXT = pathlib.Path(FOLDER.name, "text.txt")
TEXT.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
EVERY = pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "omni"])  # whose runs are in test_omni.py


def small(name, **more):
    """Flags of a run of seconds."""
    flags = dict(preset="demo", data=TEXT, val_batches=1, log_every=1, timeout=30, val_every=1000) | SCRIPTS[name].small | more
    return [f"--{flag}={value}" for flag, value in flags.items()]


def main(name, *flags):
    """(exit status, stdout, stderr) of a script in this process, whose signals it leaves alone."""
    with mock.patch(f"{name}.catch_signals", list):
        return run_main(name, flags)


def refused(phrase, name, *flags):
    """The script ends before training with status 2 and one line on stderr, which has the phrase."""
    status, out, err = main(name, *flags)
    assert status == 2 and phrase in err and len(err.splitlines()) == 1 and "step 1/" not in out, (flags, status, err)


def wait_for(arrived, process, seconds=60):
    """Until arrived() is true; fails if the process ends or the time is up first."""
    deadline = time.monotonic() + seconds
    while not arrived():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.001)


def logged(out):
    """Lines of the log; the last of a step counts."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {(row["step"], "loss" in row): row for row in rows}


def losses(out):
    return [row["loss"] for (_, training), row in logged(out).items() if training]


def newest(out):
    """(name, {file: bytes}) of the newest checkpoint: weights, moments and state."""
    folder = sorted(out.glob("step_*[0-9]"))[-1]
    return folder.name, {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def state_of(checkpoint):
    state = {"step": 0, "sequences": 0, "tokens": 0}
    torch.distributed.checkpoint.load({"state": state}, checkpoint_id=checkpoint)
    return tuple(state.values())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("chinchilla", "omni")])  # chinchilla's loop is gpt1's
def test_killed_and_stopped_runs_end_the_same_bit_for_bit(name, tmp_path):
    """SIGKILL in the middle of a save; then a signal, upon which the run saves and ends; and the rest."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = small(name, dim=192, steps=40, save_every=5)  # wide, so that a save takes a while
    flags += ["--dropout=0.1"] if name in ("gpt1", "gpt3", "bert", "t5") else []  # so that its seeds count
    uninterrupted = Process(name, [*flags, "--out", whole])
    process = Process(name, [*flags, "--out", broken])
    wait_for(lambda: list(broken.glob("step_*[0-9]")) and list(broken.glob("step_*.tmp")), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = (broken / "metrics.jsonl").read_text()
    process = Process(name, [*flags, "--out", broken, "--resume"])
    wait_for(lambda: (broken / "metrics.jsonl").read_text() != before, process)
    os.kill(process.pid, signal.SIGINT if name == "gpt1" else signal.SIGTERM)
    output, errors = process.communicate()
    assert process.wait() == 0, errors
    step = int(re.search(r"stopped after step (\d+)", output)[1])
    assert 5 < step < 40 and (broken / f"step_{step:09}").exists()
    assert Process(name, [*flags, "--out", broken, "--resume"]).wait() == uninterrupted.wait() == 0
    assert newest(whole) == newest(broken)
    assert logged(whole) == logged(broken), "the resumed log is that of the whole run"
    assert len(list(broken.glob("step_*"))) == 2, "two checkpoints stay, and nothing partial"


@EVERY
def test_checkpoints_that_fit_and_that_do_not(ranks, name, tmp_path):
    """Other data, seeds and shapes are refused. The second half of a run once more on two ranks, of the same data at another path."""
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text(TEXT.read_text())
    other.write_text(TEXT.read_text() + "and more")
    flags = small(name, out=tmp_path, steps=12, save_every=6)
    together(ranks, 1, name, *flags)
    expected = losses(tmp_path)
    special = [("--resume --sentinels 99", "sentinel 360"), ("--resume --seq_len 8", "seq_len 16")] if name == "t5" else []
    for more, phrase in (*special, ("", "--resume"), ("--resume --seed 1", "seed 0"), ("--resume --dim 24", "dim 48"),
                         ("--resume --n_layers 5", "n_layers"), (f"--resume --data {other}", "fingerprint")):  # fmt: skip
        refused(phrase, name, *flags, *more.split())
    assert main(name, *flags, "--resume")[0] == 0, "a run that has ended is not refused"
    shutil.rmtree(tmp_path / "step_000000012")
    more = ["--ep=1"] if hasattr(importlib.import_module(name).Config, "ep") else []  # as in the checkpoint
    out = together(ranks, 2, name, *flags, "--resume", "--micro_batch=1", f"--data={moved}", *more)
    line = r"^step (\d+)/12 \| loss \d+\.\d{4} \| bpb (?:\d+\.\d+|n/a) \| lr \S+ \| grad \S+ \| (?:\w+ \S+ \| )*tokens 0\.0M"
    assert re.findall(line, out, re.M) == ["7", "8", "9", "10", "11", "12"] and re.search(r"2 ranks x 2 x 1 sequences of \d+", out)
    assert re.search(r"^val 12 \| loss \d+\.\d+ \| bpb (\d+\.\d+|n/a.*)\n[^|]{9}", out, re.M), "a sample ends the run"
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4) and len(expected) == 12


def test_two_agents_restart_together(ranks, tmp_path):
    """Two torchrun agents of one worker each: one worker dies before it joins, one in training, and the run ends the same bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (tmp_path / "dies.py").write_text(
        "import os, sys\nif os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10':\n    os.kill(os.getpid(), 9)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport gpt1\ngpt1.main(sys.argv[1:])\n"
    )
    flags = small("gpt1", steps=300, save_every=10)
    options = f"--nnodes=2 --nproc_per_node=1 --max-restarts=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()} --rdzv-id=test"
    line = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(tmp_path / "dies.py"), *flags, f"--out={broken}"]
    agents = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    wait_for(lambda: list(broken.glob("step_*[0-9]")), agents[0])
    children = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    together(ranks, 2, "gpt1", *flags, f"--out={whole}")
    output = "".join(agent.communicate(timeout=180)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], output
    assert output.count("starting a run") == 1 and "continuing from" in output and newest(whole) == newest(broken)


def test_locks_and_second_signals(tmp_path):
    """A directory takes one run at a time. That run, in an update of 1,024 micro-batches, ends at once at its second signal."""
    flags = small("gpt1", out=tmp_path, steps=2)
    process = Process("gpt1", [*flags, "--batch_size=1024", "--micro_batch=1", "--seq_len=4", "--n_layers=8"])
    wait_for((tmp_path / "config.json").exists, process)
    refused("another run is writing", "gpt1", *flags)
    wait_for((tmp_path / "metrics.jsonl").exists, process)  # the first validation
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert main("gpt1", *flags)[0] == 0, "a dead process gives the lock back"


def test_a_bad_token_ends_the_run_after_a_save(ranks, tmp_path):
    """Position 1,700 of a shard, on one of two ranks: the line names it, and the updates before are kept."""
    ids = np.resize(np.arange(97, 123, dtype=np.uint16), 8000)
    ids[1700] = 999
    np.save(tmp_path / "ids.npy", ids)
    answers = ranks.run(2, run_main, "gpt1", small("gpt1", data=tmp_path / "ids.npy", tokenizer="bytes", steps=200, out=tmp_path))
    assert [status for status, *_ in answers] == [0, 2], "the rank with the bad token fails, and torchrun with it"
    assert [err.count("ids.npy, position 1700: token id 999") for *_, err in answers] == [0, 1]
    steps = len(losses(tmp_path))
    assert (tmp_path / f"step_{steps:09}").exists() and 0 < steps < 200


MISTAKES = {  # flags -> what the line on stderr must say; without an arrow, the flags themselves. DIR and TEXT are what make_files makes
    "every script": ["--export none --hidden_dim 192 -> pip install safetensors", "--eval -> --eval needs --out or --init", "--lr nan",
                     "--micro_batch 3 -> micro-batches of 3", "--resume -> --resume needs --out"],
    "gpt1": [  # and what all scripts share
        "--data DIR/a.json -> either text (.txt .md .py .jsonl) or token shards (.npy .bin), not 0 and 0", "--out TEXT/below -> TEXT",
        "--data DIR/ids.npy --tokenizer bytes --vocab_size 255 -> --vocab_size 255", "--data DIR/floats.npy --tokenizer bytes -> float64",
        "--data DIR/odd.bin --tokenizer bytes -> odd.bin is not a token shard", "--data DIR/garbage.npy --tokenizer bytes -> garbage.npy",
        "--data DIR/ids.npy --write_tokens DIR/w -> token shards", "--data DIR/no_text.jsonl -> no_text.jsonl, line 2",
        "--data DIR/magic.bin --tokenizer bytes -> header", "--data DIR/latin.txt -> latin.txt is not UTF-8", "--n_heads 5 -> 5 heads",
        "--tokenizer DIR/ranks.txt -> 256 single bytes", "--data DIR/empty.txt -> 0 tokens are too few", "--data DIR/both -> not 1 and 1",
        "--data DIR/ones.jsonl -> no token to predict", "--init DIR/no_weights -> FileNotFoundError", "--tokenizer no_such -> no_such",
        "--data DIR/bad.jsonl -> bad.jsonl, line 2", "--tokenizer DIR/twice.txt -> a rank twice", "--data DIR/missing.txt -> missing.txt",
        "--export DIR/hf -> hidden_dim of 4 dim", "--dry_run --world_size 3 -> 3 ranks", "--data DIR/ids.npy -> --vocab_size",
        "--no_such_flag -> no_such_flag", "--preset huge -> huge"],
    "gpt3": ["--dry_run --world_size 4 --tp 4 --n_heads 6 -> --tp 4 does not divide 6 heads", "--data 0:TEXT -> the weight of TEXT is 0",
             "--dry_run --world_size 2 --tp 2 --export DIR/new -> without --tp", "--dry_run --world_size 8 --pp 8 -> fewer than --pp 8",
             "--data TEXT,DIR/latin.txt --write_tokens DIR/w -> one corpus", "--data DIR/short.txt -> short.txt: ValueError: 10 tokens",
             "--tokenizer bpe:300 --data DIR/ids.npy -> learned from text", "--vocab_size 256 -> no place for <|endoftext|>",
             "--tokenizer bpe:999999 -> no more than", "--train_tokenizer 300 -> needs --out", "--tp 2 -> are not 1 ranks",
             "--init DIR --tokenizer bpe:300 -> learns one", "--data half:TEXT -> is not WEIGHT:PATH", "--pp 0 -> pp 0", "--decay 0"],
    "llama3": ["--dry_run --world_size 2 --cp 2 --seq_len 18 --long_tokens 0 --anneal_tokens 0 -> --cp 2 needs a multiple of 4",
               "--dry_run --world_size 2 --pp 2 --micro_batch 4 -> 1 micro-batches are fewer than --pp 2", "--dry_run --pp 0 -> pp 0",
               "--dry_run --world_size 8 --pp 8 --micro_batch 1 -> fewer than 8 pipeline stages", "--data TEXT;9;TEXT;8;TEXT -> in order",
               "--data 1:TEXT,1e-9:DIR/latin.txt -> common denominator above 1,000,000", "--anneal_data DIR/none.txt -> none.txt",
               "--tokens 0 --long_tokens 0 --anneal_tokens 0 -> not a single update", "--n_kv_heads 3 -> 3 key-value heads",
               "--ramp 64*24:1e5 -> is not LENGTHxSEQUENCES:TOKENS"],
    "deepseek_v3": ["--dry_run --world_size 3 --ep 3 -> --ep 3 does not divide 16 experts", "--first_batch 9", "--pp 0 -> pp 0",
                    "--dry_run --world_size 8 --pp 8 -> more than 3 layers", "--top_k 9 -> --top_k 9 is more than 2 groups of 4",
                    "--long 32:4 -> is not LENGTHxSEQUENCES:STEPS"],
    "kimi_muon": ["--long_tokens 64 --long_seq_len 48 -> --long_seq_len 48", "--tokens 9 --long_tokens 99 -> more than --tokens 9",
                  "--kv_rank 0 --export DIR/hf -> need --kv_rank", "--ep 2 -> are not 1 ranks", "--tau 0 -> not above 0", "--top_k 17"],
    "gemma": ["--no-qk_norm --rope_theta 10000 --long_tokens 64 --long_seq_len 32 --export DIR/hf -> --export needs",
              "--teacher DIR/no_weights -> holds no Gemma2ForCausalLM or Gemma3ForCausalLM", "--window 16 -> not less than 16 tokens",
              "--long_tokens 1000 --long_seq_len 100 -> --batch_size 0 of length 100", "--dp 2 -> not 1 ranks",
              "--attention_cap 5 --export DIR/hf -> --export needs"],
    "chinchilla": ["--sweep 1e3 --sizes 12x2 --head_dim 12 -> 1000 FLOPs are not one update of 12x2", "--dim 47 -> is odd",
                   "--batch_size 6 --second_batch 9 --micro_batch 2 -> --second_batch 9", "--sweep 1e9 --export DIR/hf -> single run",
                   "--sweep 1e9 --sizes 9m -> is not FLOPS,... and", "--budget 1e9 --flops appF -> FLOPs as 6 N D"],
    "bert": ["--tokenizer DIR/vocab.txt -> vocab.txt must begin with [PAD] and have [UNK], [CLS], [SEP], [MASK]",
             "--data DIR/one.txt -> 1 documents of text are too few", "--objective rtd -> needs --no-nsp",
             "--prompt none -> no [MASK]", "--seq_len 17 -> 17 tokens",
             "--long_share 1.5", "--max_predictions 1 -> max_predictions 1 is too few for 16 tokens"],
    "t5": ["--data DIR/ids.npy --vocab_size 400 --sentinel 99 -> 100 sentinels from --sentinel 99", "--rate 1 -> --rate 1.0",
           "--denoiser iid --inputs 2048 --seq_len 0 -> --sentinels is too small", "--inputs 3 -> --inputs 3 cannot hold",
           "--data DIR/ids.npy --vocab_size 2000 --sentinel 1050 -> token id 1000, which is a sentinel's", "--ramp_down 2 -> --ramp_down 2.0"],
}  # fmt: skip


def make_files(folder):
    """What the flags above name."""
    (folder / "no_weights").mkdir()
    (folder / "both").mkdir()
    for name, content in {
        "no_weights/config.json": json.dumps(dict(vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=2)), "empty.txt": "",
        "bad.jsonl": '{"text": "good"}\n{"text": "bad\n', "no_text.jsonl": '{"text": "good"}\n{"txt": "bad"}\n', "short.txt": "too short",
        "ones.jsonl": '{"text": "a"}\n' * 3000, "both/a.txt": "text", "one.txt": "line 0 says\n" * 2000, "garbage.npy": "garbage",
        "a.json": '{"text": "good"}\n' * 1000, "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nline\nsays", "ranks.txt": "IQ== 0\n",
        "twice.txt": "".join(f"{base64.b64encode(bytes([i])).decode()} {min(i, 254)}\n" for i in range(256)),
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    for name, ids in (("both/b", np.zeros(5000, np.uint16)), ("ids", np.full(5000, 1000, np.uint16)), ("floats", np.zeros(5000))):
        np.save(folder / f"{name}.npy", ids)
    for name, magic, n in (("magic", 1, 16), ("odd", 20240520, 15)):
        (folder / f"{name}.bin").write_bytes(np.array([magic, 1, 8, *[0] * 253], np.int32).tobytes() + bytes(n))


@EVERY
def test_mistakes_end_in_one_line_and_status_2(name, tmp_path, monkeypatch):
    """Before training, and with the name of what is wrong."""
    make_files(tmp_path)
    for mistake in MISTAKES[name] + MISTAKES["every script"]:
        flags, _, phrase = mistake.replace("DIR", str(tmp_path)).replace("TEXT", str(TEXT)).partition(" -> ")
        if phrase == "pip install safetensors":
            monkeypatch.setitem(sys.modules, "safetensors", None)
        elif re.search("--(init|teacher|export) ", flags) and not importlib.util.find_spec("safetensors"):
            continue
        refused(phrase or flags, name, *small(name), *flags.split())


def test_checkpoints_are_evaluated_and_named_when_damaged(tmp_path):
    """--eval reads the newest one and writes nothing; a save that fails leaves it; a damaged one is refused."""
    flags = small("gpt1", out=tmp_path)
    trained = main("gpt1", *flags, "--steps=2")[1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    evaluated = main("gpt1", *flags, "--steps=8", "--eval")[1]
    assert "step 1/" not in evaluated and evaluated.split("val 2")[1] == trained.split("val 2")[1]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "step_000000004.tmp").touch()  # where the next save makes a directory
    refused("File exists", "gpt1", *flags, "--steps=4", "--resume")
    (tmp_path / "step_000000004.tmp").unlink()
    assert main("gpt1", *flags, "--steps=4", "--resume")[0] == 0, "the checkpoint before is still there"
    (shard,) = (tmp_path / "step_000000004").glob("*.distcp")
    for damage in (lambda: os.truncate(shard, shard.stat().st_size // 2), (tmp_path / "step_000000004" / ".metadata").unlink):
        damage()
        refused("damaged", "gpt1", *flags, "--resume")


@EVERY
def test_steps_that_are_not_finite(name, tmp_path, monkeypatch):
    """A skipped step leaves weights and moments alone, and three in a row end the run."""
    module, bad = importlib.import_module(name), (3, 4, 7, 8, 9)
    inner, weights, models = module.objective, [None], []
    if name == "deepseek_v3":  # whose objective has the sums of a pipeline, and not the model
        parallelize = module.parallelize
        monkeypatch.setattr(module, "parallelize", lambda *args: models.append(parallelize(*args)) or models[0])

    def objective(model, batch, cfg):
        loss, metrics = inner(model, batch, cfg)
        if not torch.is_grad_enabled():
            return loss, metrics
        factor = float("nan") if len(weights) in bad else 1.0
        weights.append([p.detach().clone() for p in (*models, model)[0].parameters()])
        return loss * factor, {name: value * (factor if name == "main" else 1.0) for name, value in metrics.items()}

    monkeypatch.setattr(module, "objective", objective)
    status, out, err = main(name, *small(name, out=tmp_path, steps=12, save_every=2))
    assert all(map(torch.equal, weights[3], weights[5])), "steps 3 and 4 changed nothing"
    assert not all(map(torch.equal, weights[2], weights[3]))
    assert [loss is None for loss in losses(tmp_path)] == [step in bad for step in range(1, 10)]
    assert out.count("skipped") == len(bad) and newest(tmp_path)[0] == "step_000000006", "nothing is saved behind a skipped step"
    assert state_of(tmp_path / "step_000000006") == (6, 24, 4 * 64), "skipped sequences do not come again"
    assert (status, err.count("3 steps to 9"), len(err.splitlines())) == (2, 1, 1)


@pytest.mark.parametrize("name", [name for name in CAUSAL.args[1] if name != "kimi_muon"])  # whose step has tests of its own
def test_training_is_what_it_says(name, tmp_path):
    """Three updates against a plain loop with torch's AdamW in float64: data, rate, clipping, decay, and the val line."""
    module, experts = importlib.import_module(name), name == "deepseek_v3"
    flags = small(name, out=tmp_path, steps=3, micro_batch=2, clip=0.1, weight_decay=0.3, prompt="line 7 says")
    if experts:  # next-token loss alone, and experts that the biases do not move
        pytest.importorskip("safetensors")
        flags += ["--no-mtp", "--balance_loss=0", "--gamma=0", f"--export={tmp_path}/hf"]
    _, out, _ = main(name, *flags)
    assert "line 7 says" in out.split("val 3")[1], "the sample continues the prompt"
    cfg, _ = module.parse(flags)
    load = {"gpt3": "load_mix", "llama3": "load_mixes", "gemma": "load_languages", "deepseek_v3": "load_documents"}.get(name, "load_data")
    _, corpus, heldout = getattr(module, load)(cfg)
    if name == "llama3":
        corpus, cfg = corpus[0], module.phases(cfg)[0].cfg
    model = getattr(module, SCRIPTS[name].model)(cfg)
    module.init_weights(model, cfg)
    if not experts:  # whose grouped products are fp32 at most
        model.double()
    tied = model.token_embedding.weight if name == "gemma" else None  # which does not decay
    groups = [dict(params=[p], weight_decay=0.3 * (p.ndim > 1 and p is not tied)) for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999 if name == "gpt1" else 0.95), eps=1e-8)

    def nats(batch):
        logits = model(batch["tokens"], **{key: batch[key] for key in ("documents",) if key in batch})
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    rates = [row["lr"] for row in logged(tmp_path).values() if "lr" in row]  # test_shapes.py has the schedule
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        nats(module.get_batch(corpus, 4 * step, 4, cfg)).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1, "there is something to clip"
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    expected = nats(module.get_batch(heldout, 0, 4, cfg)).item()
    assert float(re.search(r"val 3 \| loss ([\d.]+)", out)[1]) == pytest.approx(expected, abs=2e-4)
    prefix = "tp0." if hasattr(cfg, "tp") else ""  # whose part of a matrix it is
    found = {prefix + key: torch.empty(p.shape) for key, p in model.named_parameters()}
    if experts:  # whose checkpoints have pieces of flat tensors
        found = dict(module.from_hf(tmp_path / "hf")[0].named_parameters())
    else:
        torch.distributed.checkpoint.load({"model": found}, checkpoint_id=tmp_path / "step_000000003")
    for key, p in model.named_parameters():
        if ".qkv.bias" not in key:  # the keys' bias has no gradient but noise, which Adam enlarges
            torch.testing.assert_close(found[prefix + key].data.type_as(p), p.data, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("bert", "omni")])  # which write no shards
def test_write_tokens_then_train_on_them(name, tmp_path):
    """The text's ids and the markers of its script; bits per byte where the tokenizer is known."""
    assert main(name, *small(name, write_tokens=tmp_path / "shards"))[0] == 0
    (shard,) = (tmp_path / "shards").iterdir()
    ids = np.load(shard)
    assert ids.dtype == np.uint16 and bytes(ids[ids < 256].astype(np.uint8)).decode() == TEXT.read_text()
    markers = {"t5": [], "llama3": [0, len(ids) - 1], "gemma": [0, len(ids) - 1]}.get(name, [len(ids) - 1])
    assert np.flatnonzero(ids >= 256).tolist() == markers
    (tmp_path / "a.bin").write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], np.int32).tobytes() + ids.tobytes())
    assert np.array_equal(gpt1.open_shard(tmp_path / "a.bin"), ids)
    ids_of = dict(sentinel=299, sentinels=20) if name == "t5" else {}
    for path, bpb, more in (("shards", r"\d+\.\d+", dict(tokenizer="bytes")), ("a.bin", "n/a", dict(vocab_size=300, **ids_of))):
        status, out, err = main(name, *small(name, data=tmp_path / path, steps=2, **more))
        assert status == 0 and len(re.findall(rf"loss \S+ \| bpb {bpb}", out)) == 4, err


def test_help_has_every_field_with_its_meaning(monkeypatch):
    """Of chinchilla.py, in which a meaning has a per cent sign; with the values of the preset."""
    module = importlib.import_module("chinchilla")
    monkeypatch.setenv("COLUMNS", "10000")
    out = " ".join(main("chinchilla", "--preset", "70b", "--help")[1].split())
    assert " ".join(module.__doc__.split("\n\n")[0].split()) in out
    for field in dataclasses.fields(module.Config):
        value = module.PRESETS["70b"].get(field.name, field.default)
        assert re.search(rf"--{field.name}\b.* \(70b: {re.escape(repr(value))}\)", out), field.name


@EVERY
def test_dry_run_prints_every_preset(name):
    """Parameters, and bytes of weights, gradients and moments: copies of the model in some scripts, shards of it in others."""
    module, counts = importlib.import_module(name), SCRIPTS[name].counts
    shards = 4 if name in ("chinchilla", "llama3", "gemma", "t5") else 1
    for preset in ("44m", "70b") if name == "chinchilla" else counts:
        flags = {"671b": "--world_size 2048 --pp 16 --ep 64"}.get(preset, "--world_size 4")
        flags += " --tokenizer=" * (name == "gpt3")
        flags += " --vocab_size 261" * (name == "bert" and "vocab_size" not in module.PRESETS[preset])
        status, out, err = main(name, "--preset", preset, "--dry_run", *flags.split())
        assert status == 0 and f"parameters {counts[preset]:,} | activated " in out, err
        assert preset != "671b" or out.count("fits 80 GB") == 2, "the docstring's layout, but for the extensions"
        if hasattr(module.Config, "n_experts"):  # which are cut in another way
            continue
        sizes = {kind: float(size) for kind, size in re.findall(r"(\w+) +([\d.]+) GiB", out)}
        weights = pytest.approx(4 * counts[preset] / shards / 2**30, rel=1e-3, abs=1e-3)
        assert sizes["parameters"] == sizes["gradients"] == weights and sizes["activations"] > 0
        assert name == "t5" or sizes["optimizer"] / 2 == weights  # t5's has sums of rows and columns


def test_directories_are_read_through_links_and_by_known_endings(tmp_path, capsys):
    """Each file once, in the order of their names; a line of .jsonl is a document; the byte order mark is none of the text."""
    folder = tmp_path / "mix"
    for name in ("disk2/deep", "mix/e.md"):
        (tmp_path / name).mkdir(parents=True)
    for name, content in (("disk2/deep/b.md", "second é"), ("mix/WEB.TXT", "\ufeffupper case"), ("mix/picture.png", "x"),
                          ("mix/c.jsonl", '{"text": "third"}\n\n{"text": "cut \\ud83d, whole \\ud83d\\ude00", "more": 1}\n')):  # fmt: skip
        (tmp_path / name).write_text(content, "utf-8")
    for name, target in (("web", "../disk2"), ("up", ".."), ("again", "web")):
        (folder / name).symlink_to(target)
    documents = list(gpt1.read_documents(str(folder), gpt1.find_files(str(folder))[0]))
    assert documents[:2] == [("WEB.TXT", "upper case"), ("again/deep/b.md", "second é")]
    assert [text for _, text in documents[2:]] == ["third", "cut \ufffd, whole \U0001f600"]
    assert capsys.readouterr().out == f"{folder}: 3 of 4 files are read\n"
    documents = dict(gpt1.read_documents("", gpt1.find_files("")[0]))  # the standard library
    assert len(documents) > 400 and sum(map(len, documents.values())) > 5e6 and "argparse.py" in documents
    assert not any(re.search(r"(^|/)(tests?|site-packages)/", name) for name in documents)


def test_written_tokens_are_whole_and_hold_documents_out_by_name(tmp_path):
    """A killed process leaves nothing that looks whole, and nothing is written over. The same twentieth is held out of text and shards."""
    text, shards = tmp_path / "text", tmp_path / "shards"
    names = [f"{i:03}.txt" for i in range(400)]
    held = {name for name in names if gpt1.is_held_out(name)}
    text.mkdir()
    for name in names:
        (text / name).write_text(name * 500)
    process = Process("gpt1", ["--data", text, "--write_tokens", shards])
    wait_for((tmp_path / "shards.tmp").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not shards.exists()
    assert main("gpt1", "--data", text, "--write_tokens", shards)[0] == 0 and not (tmp_path / "shards.tmp").exists()
    refused("is not empty", "gpt1", "--data", text, "--write_tokens", shards)
    (shards / "val_00000.npy").rename(shards / "0_val.npy")  # before train_00000.npy
    tokenizer = gpt1.load_tokenizer("bytes", ["<|endoftext|>"])
    for folder in (text, shards):
        files, parts = gpt1.find_files(str(folder))
        documents = gpt1.tokenize(gpt1.read_documents(str(folder), files), tokenizer, 256)
        corpora = gpt1.load_corpora(parts, documents, tokenizer, 256, 257, 1, 7)
        train, heldout = (tokenizer.decode(corpus.read(0, corpus.size)).split("<|endoftext|>")[:-1] for corpus in corpora)
        assert {document[:7] for document in heldout} == held and {document[:7] for document in train} == {*names} - held
    assert 5 < len(held) < 45


def test_large_and_many_shards_open_at_once(tmp_path, request):
    """1,100 files with few descriptors, and a gigabyte without being read."""
    shards = [tmp_path / f"{i:04}.npy" for i in range(1100)]
    for i, shard in enumerate(shards):
        np.save(shard, np.ones(40 + i % 7, np.uint16))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 20, limits[1]))
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (2**29,))  # zeros, sparse
    tracemalloc.start()
    train, _ = gpt1.load_corpora([*shards, tmp_path / "large.npy"], iter(()), None, 256, 257, 64, 512)
    assert train.read(0, 50_000).sum() == sum(40 + i % 7 for i in range(1100)) and train.n_windows(512) > 990_000
    gpt1.get_batch(train, 10**6, 64, gpt1.Config())
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_tokenizers(tmp_path):
    """Special tokens in the text are text; what the tokenizer cannot take is named, and that it is not there, in one line."""
    tokenizer = gpt1.load_tokenizer("bytes", ["<|endoftext|>"])
    assert tokenizer.encode("aé<|endoftext|>", allowed_special="all") == [97, 195, 169, 256]
    assert [ids.tolist().count(256) for _, ids in gpt1.tokenize([("a", "a <|endoftext|> b")], tokenizer, 256)] == [1]
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    (tmp_path / "ranks").write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)) + "\n")
    tokenizer = gpt1.load_tokenizer(str(tmp_path / "ranks"), ("<|one|>", "<|two|>"))
    assert tokenizer.encode_ordinary("the the") == [257, 258] and tokenizer.encode_single_token("<|two|>") == 260 == tokenizer.n_vocab - 1
    with pytest.raises(ValueError, match="cannot take document 'spaces'"):
        list(gpt1.tokenize([("spaces", "x" + " " * 1_000_000)], tokenizer, 260))
    assert "warning: a vocabulary of 40,478 entries over bytes" in main("gpt1", *small("gpt1", steps=1, vocab_size=40478, dim=24))[1]
    with mock.patch("tiktoken.get_encoding", side_effect=ConnectionError("a long story\nin several lines")):  # as without a network
        refused("gpt2", "gpt1", "--tokenizer", "gpt2")


@pytest.mark.parametrize("batch_size", [8, 2])
def test_resume_with_another_batch_size_goes_on_in_the_data(tmp_path, batch_size):
    """10 of 20 updates of 4 sequences, then batches of 8 or 2: from sequence 40 to 80."""
    flags = small("gpt1", out=tmp_path, save_every=10)
    assert main("gpt1", *flags, "--steps=20")[0] == 0
    shutil.rmtree(tmp_path / "step_000000020")
    with mock.patch("gpt1.get_batch", wraps=gpt1.get_batch) as get_batch:
        assert main("gpt1", *flags, "--resume", f"--batch_size={batch_size}")[0] == 0
    firsts = [call.args[1] for call in get_batch.call_args_list if not call.args[0].in_order]  # held-out text is in order
    n = 40 // batch_size
    assert firsts[:n] == list(range(40, 80, batch_size))
    assert state_of(tmp_path / f"step_{10 + n:09}") == (10 + n, 80, 80 * 16)


def test_lengths_of_warm_ups_and_runs(tmp_path):
    """Without a warm-up the first update has the full rate, and a long one is cut; steps follow from epochs."""
    flags = small("gpt1", seed="99999999999999999999")
    _, out, _ = main("gpt1", *flags, "--steps=4", "--warmup_steps=0", "--lr=1e-3", "--out", tmp_path / "a")
    assert logged(tmp_path / "a")[1, True]["lr"] == 1e-3 and "warm-up" not in out
    assert "the warm-up is cut to 2 updates" in main("gpt1", *flags, "--steps=20", "--warmup_steps=5")[1]
    _, out, _ = main("gpt1", *flags, "--steps=0", "--epochs=0.013")
    windows = int(re.search(r"([\d,]+) windows", out)[1].replace(",", ""))
    assert f"step 1/{math.ceil(0.013 * windows / 4)} " in out and windows > 1000


def test_surroundings(monkeypatch, capsys, tmp_path):
    """Output in another encoding, a reader that ends early, as head does, and torchrun, which shows the error of a worker."""
    flags = small("gpt1", steps=2, prompt="ü€")
    monkeypatch.setattr(gpt1, "catch_signals", list)
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with contextlib.redirect_stdout(latin):
        gpt1.main(flags)
    assert "ü?".encode("latin-1") in latin.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed), pytest.raises(SystemExit) as end:
        gpt1.main(flags)
    assert end.value.code == 1 and capsys.readouterr().err == ""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setattr(gpt1, "train", None)
    with pytest.raises(TypeError):
        gpt1.main(flags)
    assert "object is not callable" in (tmp_path / "error").read_text()


def test_time_left_and_mfu(monkeypatch):
    """None before the pace is known; MFU where the device's peak is."""
    for pace, left, expected in ((None, 9, "tokens 0.0M"), (0.5, 90, "eta 0:00:45"), (2.0, 5400, "eta 3:00:00")):
        assert gpt1.progress(64, left, pace, gpt1.Config(batch_size=4, seq_len=16), torch.device("cpu"))[-1] == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")  # 989e12 FLOPs a second in bf16
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(gpt1.dist, "get_world_size", lambda: 2)
    for precision, expected in (("bf16", ["mfu 25.0%", "mem 3.0G"]), ("fp32", ["mem 3.0G"])):
        cfg = gpt1.Config(batch_size=4, seq_len=16, vocab_size=257, precision=precision)
        pace = 64 * gpt1.flops_per_token(cfg) / (2 * 989e12 * 0.25)
        assert gpt1.progress(64, 9, pace, cfg, torch.device("cuda"))[2:-1] == expected


def test_one_graph_is_compiled_for_all_blocks():
    """Under dropout, validation and a sample of other lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert main("gpt1", *small("gpt1", steps=3, val_every=1, n_layers=3, dropout=0.1), "--compile")[0] == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def v3_flags(**more):
    """A ramp of batches, seven updates of pre-training and seven of extension."""
    sizes = dict(batch_size=16, first_batch=8, batch_multiple=8, ramp_tokens=512, tokens=2048, long="32x8:4", rope_original=16, pack=16)
    return small("deepseek_v3", **{"warmup_steps": 0, "save_every": 7, **sizes, **more})


def test_deepseek_v3_resumes_in_every_phase_on_other_ranks(ranks, tmp_path):
    """On one rank; on two, which cannot share the batch of the extension and stop before it; on one. Experts on other ranks are refused."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = together(ranks, 1, "deepseek_v3", *v3_flags(out=whole, long="32x1:4"))
    assert "YaRN factor 1" in out and "YaRN factor 2" in out
    flags = v3_flags(out=parts, long="32x1:4", ep=1)
    together(ranks, 1, "deepseek_v3", *flags, "--steps=5")
    assert "this run stops after 0.0M tokens: 1 sequences of 32" in together(ranks, 2, "deepseek_v3", *flags, "--resume")
    done = together(ranks, 1, "deepseek_v3", *flags, "--resume")
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4) and "step 9/" not in done
    answers = ranks.run(2, run_main, "deepseek_v3", [*flags, "--ep=2", "--resume"])
    assert "has --pp 1 --ep 1: --resume --pp 1 --ep 1 --export DIR" in answers[0][2]


def test_deepseek_v3_resumes_with_another_batch(ranks, tmp_path):
    """The data goes on where it was, and the run ends at the tokens that its first start planned: 128 sequences of 16 and 32 of 32."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(12000)))
    flags = v3_flags(data=tmp_path / "text.txt", out=tmp_path / "run", first_batch=0)
    together(ranks, 1, "deepseek_v3", *flags)
    shutil.rmtree(tmp_path / "run" / "step_000000012")
    flags = [flag for flag in flags if not flag.startswith(("--tokens", "--long="))]
    out = together(ranks, 2, "deepseek_v3", *flags, "--ep=1", "--batch_size=8", "--resume")
    assert "step 9/13 |" in out and "step 10/13 |" in out and out.index("step 9/13") < out.index("factor 2") < out.index("step 10/13")
    assert state_of(tmp_path / "run" / "step_000000013") == (13, 160, 3072)


@pytest.mark.parametrize("precision, moments", [("bf16", torch.float32), ("fp8", torch.bfloat16)])
def test_deepseek_v3_low_precision_resumes_bit_for_bit(ranks, precision, moments, tmp_path):
    """fp32 masters of bf16 weights, and under fp8 bf16 moments."""
    flags = v3_flags(precision=precision, recompute="paper", lr=0.003, n_layers=2)
    for name, steps, more in (("whole", 6, []), ("parts", 3, []), ("parts", 6, ["--resume"])):
        together(ranks, 1, "deepseek_v3", *flags, f"--steps={steps}", "--out", tmp_path / name, *more)
    assert newest(tmp_path / "whole") == newest(tmp_path / "parts")
    tensors = torch.distributed.checkpoint.FileSystemReader(tmp_path / "parts" / "step_000000006").read_metadata().state_dict_metadata
    kinds = {(key[:5], "exp_avg" in key): tensor.properties.dtype for key, tensor in tensors.items() if hasattr(tensor, "properties")}
    assert kinds["model", False] == torch.float32 and kinds["optim", True] == moments


def test_deepseek_v3_export_and_init_under_a_layout(ranks, tmp_path):
    """From a pipeline with experts on two ranks to a plain directory, and from there to one rank."""
    pytest.importorskip("safetensors")
    first = together(ranks, 4, "deepseek_v3", *v3_flags(pp=2, micro_batch=1, long="", steps=3, export=tmp_path / "hf"))
    done = together(ranks, 1, "deepseek_v3", *v3_flags(steps=1, init=tmp_path / "hf"))
    loss, again = (float(re.search(rf"val {step} \| loss (\S+)", out)[1]) for step, out in ((3, first), (0, done)))
    assert again == pytest.approx(loss, rel=2e-5)


def test_deepseek_v3_fp8_trains_where_experts_of_a_rank_get_no_token(ranks):
    flags = "--n_experts 2 --n_groups 2 --groups_kept 1 --top_k 1 --seq_len 4 --batch_size 2 --first_batch 2 --dim 32 --hidden_dim 32"
    flags += " --n_layers 2 --precision fp8 --ep 2 --long= --steps 4 --val_batches 1 --log_every 1 --prompt a"
    out = together(ranks, 2, "deepseek_v3", *flags.split())
    assert "step 4/4 | loss 5." in out and "max_load 2.0" in out


def test_deepseek_v3_documents_on_shards_have_borders_that_flags_name(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.resize(np.arange(10, 40, dtype=np.uint16), 3000))
    for flags, borders, rearranged in (("", 0, 0), ("--eos_id=10", 1, 0), ("--eos_id=10 --fim_ids=7,8,9", 1, 1)):
        cfg, _ = deepseek_v3.parse([*small("deepseek_v3", data=tmp_path, vocab_size=40, fim=0.5), *flags.split()])
        _, corpus, _ = deepseek_v3.load_documents(cfg)
        out = capsys.readouterr().out
        assert ("no borders" not in out, "no document is rearranged" not in out) == (borders, rearranged)
        assert (deepseek_v3.get_batch(corpus, 0, 100, cfg)["tokens"] == 7).any() == rearranged
