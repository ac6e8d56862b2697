"""Llama 3 and Qwen2.5: the worked examples of the specification, layouts, stages and resumes, in the order of llama3.py."""
import base64
import json
import math
import re
import types
from unittest import mock

import llama3
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from ranks import make_model, run_main

ROW = SCRIPTS["llama3"]


def test_rotary_frequencies():
    cases = {  # kind, head width, base, factor: {i: frequency} of the specification's tables; YaRN blends between the pairs 23 and 40
        ("none", 128, 5e5, 1): {0: 1.0, 28: 3.211446e-03, 29: 2.616099e-03, 32: 1.414214e-03, 34: 9.384738e-04, 35: 7.644970e-04, 63: 2.455141e-06},
        ("llama3", 128, 5e5, 8): {0: 1.0, 28: 3.211446e-03, 29: 2.166571e-03, 32: 5.248461e-04, 34: 1.785078e-04, 35: 9.556212e-05, 63: 3.068926e-07},
        ("llama3", 128, 5e5, 32): {0: 1.0, 28: 3.211446e-03, 29: 2.118407e-03, 32: 4.295567e-04, 34: 9.708286e-05, 35: 2.389053e-05, 63: 7.672315e-08},
        ("llama3", 64, 5e5, 32): {15: 1.290548e-03, 16: 4.295567e-04, 17: 9.708286e-05},
        ("llama3", 16, 5e5, 8): {4: 5.248461e-04, 5: 3.428102e-05, 7: 1.289173e-06},
        ("llama3", 8, 5e5, 8): {0: 1.0, 1: 3.7606e-02, 2: 5.2485e-04, 3: 6.6479e-06},
        ("yarn", 128, 1e6, 4): {23: 1e6 ** (-23 / 64), 24: 1e6 ** (-24 / 64) * (1 - 3 / 4 / 17), 40: 1e6 ** (-40 / 64) / 4, 63: 1e6 ** (-63 / 64) / 4},
        ("pi", 128, 1e6, 4): {0: 1 / 4, 23: 1e6 ** (-23 / 64) / 4, 63: 1e6 ** (-63 / 64) / 4}, ("ntk", 128, 1e6, 4): {0: 1.0, 63: 1e6 ** (-63 / 64) / 4},
    }  # fmt: skip
    for (kind, width, base, factor), values in cases.items():
        found, scale = llama3.rope_frequencies(width, base, kind, factor, 8192 if base == 5e5 else 32768)
        assert scale == (pytest.approx(1.1386, abs=1e-4) if kind == "yarn" else 1) and len(found) == width // 2
        assert found[list(values)].tolist() == pytest.approx(list(values.values()), rel=2e-5 if width == 8 else 1e-6), (kind, width)


def test_document_mask(monkeypatch):
    """The specification's example, as the model sees it; and what only GPUs train with, the kernel that skips blocks, forward, uncompiled."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    mask = llama3.attention_mask(documents, torch.arange(6), torch.arange(6))[0, 0]
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == ["100000", "110000", "111000", "000100", "000110", "000001"]
    model, tokens = make_model(llama3, ROW, llama3.Config(**ROW.tiny)), torch.arange(5, 11)[None]
    alone = torch.cat([model(tokens[:, part]) for part in (slice(0, 3), slice(3, 5), slice(5, 6))], 1)  # whose positions start at 0
    torch.testing.assert_close(model(tokens, documents=documents), alone, atol=1e-6, rtol=0)
    monkeypatch.setattr(llama3, "compiled", lambda function: function)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(3, (2, 256), generator=generator).cumsum(1) // 40
    rows, columns = llama3.context_positions(256, 2, 1), torch.cat([llama3.context_positions(256, 2, i) for i in range(2)])
    q, k, v = (torch.randn(2, *size, 16, generator=generator) for size in ((4, 128), (2, 256), (2, 256)))
    dense = llama3.attend(q, k, v, llama3.attention_mask(documents, rows, columns))
    blocks = llama3.attention_mask(documents.as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True})), rows, columns)
    assert not torch.is_tensor(blocks)
    torch.testing.assert_close(llama3.attend(q, k, v, blocks), dense, atol=1e-5, rtol=1e-5)


def test_each_length_of_the_plan_has_a_compiled_graph(monkeypatch):
    """The eight lengths of 405B, trained and validated in one process, are more graphs than dynamo's own limit of eight."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compile(self, backend="eager", **more))
    cfg = llama3.Config(**ROW.tiny, compile=True)
    model = llama3.parallelize(make_model(llama3, ROW, cfg), cfg, types.SimpleNamespace(device_type="cpu"), mock.Mock(size=lambda: 1))
    for i in range(16):
        with torch.set_grad_enabled(i % 2 == 0):
            model(*[torch.zeros(2, 8 + i // 2, dtype=torch.long)] * 3)


def test_initialisation_and_precision():
    """N(0, 0.02), and 0.02 / sqrt(2 L) before a sum. Angles at position 100,000 would be off in bf16; the norm casts before its gain."""
    cfg = llama3.Config(**{**ROW.tiny, "dim": 192, "hidden_dim": 640, "qkv_bias": True})
    model = llama3.Llama3(cfg)
    llama3.init_weights(model, cfg)
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(6 if name.endswith(("out.weight", "down.weight")) else 1)
        assert p.std().item() == pytest.approx(std, rel=0.05) if p.ndim > 1 else p.unique().tolist() == [float("norm" in name)], name
    model = make_model(llama3, ROW, llama3.Config(**ROW.tiny))
    model.positions = lambda x: 2 * (99_990 + torch.arange(12),)
    model.dtype = torch.bfloat16
    with mock.patch.object(llama3, "rotate", wraps=llama3.rotate) as rotate:
        assert model(torch.arange(12)[None]).dtype == torch.float32
    torch.testing.assert_close(rotate.call_args.args[1][-1].double(), (100_001 * model.rope[0].double()).cos(), atol=0.02, rtol=0)
    norm, x = llama3.RMSNorm(64, 1e-5), (100 * torch.randn(3, 64)).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert torch.equal(norm(x), (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16() * norm.weight.bfloat16())


def test_mixes_and_averages():
    """Mixes change by tokens and by stage; of a block each corpus has its exact share, and is read in its own order."""
    cfg = llama3.Config(data="0.9:a,0.1:b;1e6;b,c", anneal_data="c", tokens=2e6, anneal_tokens=1e6, ramp="64x8:5e5", seq_len=100, batch_size=100)
    plan = llama3.phases(cfg)
    assert [(p.stage, llama3.updates_before(plan, p.end), p.cfg.data) for p in plan] == [
        ("initial", 977, "0.9:a,0.1:b"), ("initial", 1027, "0.9:a,0.1:b"), ("initial", 1127, "b,c"), ("annealing", 1227, "c")]  # fmt: skip
    for weights in ("0.5:a,0.25:b,0.17:c,0.08:d", "0.9975:a,0.0025:b", "1:a,2:b"):
        mix = llama3.read_mix(weights)
        own = dict(separator=0, token_bytes=0, n_windows=lambda length: 1000)
        data = llama3.DataMix(mix, [types.SimpleNamespace(window=lambda i, length, seed, name=name: (name, i), **own) for name in mix])
        draws = [data.window(i, 8, 1) for i in range(1200)]
        for name, share in mix.items():
            assert [index for corpus, index in draws if corpus == name] == list(range(int(1200 * share)))
        assert data.n_windows(8) == 1000 // max(mix.values()) and draws != [data.window(i, 8, 2) for i in range(1200)]
    for first, expected in ((1, (9 + 25 + 49) / 3), (4, (25 + 49) / 2)):  # of 7 updates the 3rd, 5th and 7th; or averaging begins with the 4th
        pipeline = types.SimpleNamespace(model=torch.nn.Linear(2, 1), average=torch.nn.Linear(2, 1).requires_grad_(False))
        phase, state = llama3.Phase("annealing", 100, 100 + 7 * 8, 8, llama3.Config()), {"n_averaged": 0}
        for done in range(first, 8):
            torch.nn.init.constant_(pipeline.model.weight, float(done**2))
            state["position"] = 100 + 8 * done
            llama3.update_average(pipeline, state, phase, 3)
        assert pipeline.average.weight.tolist() == [[pytest.approx(expected)] * 2]


def test_tokenizer_file_and_packing(run, tmp_path):
    """A rank file in which only the specification's reference tokens are merged: its pieces and special ids; how documents are packed."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in "Hello| world|123|45|'LL| go|go|\n\n| now| =|14".split("|"):
        for end in range(2, len(word) + 1):  # merge order: every prefix is a token
            ranks.setdefault(word[:end].encode(), len(ranks))
    n, path = len(ranks), tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    llama, end = llama3.load_specials(llama3.Config(tokenizer=str(path)))
    qwen, qwen_end = llama3.load_specials(llama3.Config(tokenizer=str(path), bos=False, qkv_bias=True))
    for tokenizer, pieces in ((llama, "Hello| world| |123|45|!"), (llama, "I|'LL| go|\n\n| | now"), (llama, " | |x| =| |3|.|14|\n"), (qwen, "a| |1|2|3")):
        assert [tokenizer.decode([i]) for i in tokenizer.encode_ordinary(pieces.replace("|", ""))] == pieces.split("|")
    names = "begin_of_text end_of_text reserved_special_token_0 finetune_right_pad_id start_header_id eot_id python_tag reserved_special_token_245"
    assert [llama.encode_single_token(f"<|{name}|>") - n for name in names.split()] == [0, 1, 2, 4, 6, 9, 10, 255] and llama.n_vocab == n + 256
    documents = [("", "Hello"), ("", "Hello<|end_of_text|>"), ("", " " * 1_000_000)]  # tiktoken alone fails on the last
    hello, special, spaces = (ids.tolist() for _, ids in llama3.tokenize_pieces(documents, llama, end))
    assert hello == [n, ranks[b"Hello"], n + 1] and llama.decode(spaces[1:-1]) == documents[2][1]
    assert sum(i >= n for i in special) == 2, "text is never a special token"
    flags = f"--tp 3 --n_heads 3 --n_kv_heads 3 --hidden_dim 66 --steps 1 --tokenizer {path}".split()
    assert f"--tp 3 does not divide --vocab_size {8 * math.ceil((n + 256) / 8)}" in run(3, *flags, status=2)
    assert [len(piece) for piece in llama3.cut_text("word " * 90_000 + "a" * 50_001 + " " * 25_001)] == [400_000, 75_000, 25_000, 25_001, 1]
    assert [ids.tolist() for _, ids in llama3.tokenize_pieces(documents[:1], qwen, qwen_end)] == [[ranks[b"Hello"], n]]
    B, E = 256, 257  # documents of 5, 4 and 6 tokens, in windows of 8
    stream = [B, 1, 2, 3, E, B, 4, 5, E, B, 6, 7, 8, 9, E] + [0] * 20
    corpus = llama3.Corpus([("", np.array(stream, np.uint16))], 0, len(stream), E, (np.arange(264) < 256).astype(int), in_order=True)
    batch = llama3.get_batch(corpus, 0, 2, llama3.Config(seq_len=8))
    assert batch["tokens"].tolist() == [[B, 1, 2, 3, E, B, 4, 5], [E, B, 6, 7, 8, 9, E, 0]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 2]]
    assert batch["targets"].tolist() == [[1, 2, 3, E, -100, 4, 5, E], [-100, 6, 7, 8, 9, E, -100, 0]]
    assert (batch["n_targets"], batch["n_bytes"]) == (13, 10), "markers have no bytes"


def test_plans_of_published_sizes(capsys):
    """The specification's updates, chunks and stages; the documented layouts, and twice the ranks."""
    cfg = llama3.Config(**llama3.PRESETS["405b"], pp=16, dp=128)
    assert [list(llama3.stage_layers(cfg, i)) for i in range(128)] == [[], *([i] for i in range(126)), []]
    cfg.pp = 1
    plan = llama3.phases(cfg)
    sizes = [(p.stage, p.cfg.seq_len, p.cfg.batch_size, (p.end - p.begin) // p.size) for p in plan]
    assert sizes[:3] == [("initial", 4096, 1024, 60), ("initial", 8192, 1024, 342_101), ("initial", 8192, 2048, 711_083)]
    assert [size[1:3] for size in sizes[3:9]] == [(16384, 1024), (32768, 512), (49152, 256), (65536, 256), (98304, 128), (131072, 128)]
    assert sizes[9:] == [("annealing", 131072, 128, 2384)] and [p.begin for p in plan] == [0, *(p.end for p in plan[:-1])]
    assert [p.cfg.rope_scaling for p in plan] == 3 * ["none"] + 7 * ["llama3"]
    assert llama3.learning_rate(1_053_244, cfg) == pytest.approx(3.7254e-6, rel=1e-4), "the cosine is cut before its floor"
    configs = [llama3.Config(**llama3.PRESETS[name]) for name in ("1b", "70b", "405b", "qwen2_5_7b", "qwen2_5_14b")]
    assert [c.lr for c in configs] == [3e-4, 1.5e-4, 8e-5, 3e-4, 3e-4]
    assert [(c.norm_eps, c.rope_factor) for c in configs] == [(1e-5, 32), (1e-5, 8), (1e-5, 8), (1e-6, 8), (1e-5, 8)]
    qwen = llama3.phases(llama3.Config(**llama3.PRESETS["qwen2_5_7b"]))
    assert [(p.cfg.seq_len, p.cfg.rope_theta) for p in qwen] == [(4096, 1e4), (32768, 1e6)]
    with mock.patch.object(llama3, "init_device_mesh") as mesh:  # the last dimension is the innermost
        llama3.make_mesh(llama3.Config(dp=2, pp=3, cp=5, tp=7), "cpu")
    mesh.assert_called_once_with("cpu", (2, 3, 5, 7), mesh_dim_names=("dp", "pp", "cp", "tp"))
    owned = [llama3.context_positions(16, 2, i).tolist() for i in range(2)]
    assert owned == [[0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12))] and [sum(p + 1 for p in ps) for ps in owned] == [68, 68]
    assert [{p // 2 for p in llama3.context_positions(16, 4, i).tolist()} for i in range(4)] == [{0, 7}, {1, 6}, {2, 5}, {3, 4}]
    first, second = re.findall(r"--dry_run --preset 405b (--tp 8 .*)", llama3.__doc__.replace("\\\n", ""))
    phases = "128 ranks x 16 x 1 sequences of 8,192 | bubble 93.8%", "16 x 1 sequences of 131,072", "98,304: 10 micro-batches"
    for flags, phase, end in zip((first, second, second.replace("16384", "32768")), phases, 2 * ["sum 59.305 GiB"] + ["another layout is needed"]):
        llama3.main(["--dry_run", "--preset", "405b", *flags.split()])
        assert re.search(rf"{re.escape(phase)}.* {end}$", capsys.readouterr().out, re.M)
    totals = [round(llama3.phases(llama3.Config(**llama3.PRESETS[n]))[-1].end / 1e12, 2) for n in ("1b", "8b", "405b", "qwen2_5_7b")]
    assert totals == [9.0, 15.64, 15.64, 18.0]


@pytest.fixture
def run(ranks, tmp_path, monkeypatch):
    """run(n, *flags): stdout, or stderr of another status, of a small run on n ranks; of one rank's, the batches' first sequences: run.firsts."""
    text, batches = tmp_path / "text.txt", mock.Mock(wraps=llama3.get_batch)
    text.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
    monkeypatch.setattr(llama3, "get_batch", batches)

    def call(n, *flags, status=0):
        own = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, "data": text, **ROW.small}
        flags = [*(f"--{flag}={value}" for flag, value in own.items()), *map(str, flags)]
        batches.reset_mock()
        found = ranks.run(n, run_main, "llama3", flags, timeout=120) if n > 1 else [run_main("llama3", flags)]
        assert [code for code, _, _ in found] == [status] * n, found
        call.firsts = [args[1] for args, _ in batches.call_args_list if not args[0].corpora[0].in_order]  # held-out text is in order
        return found[0][2 if status else 1]

    rows = lambda folder: map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())  # noqa: E731
    call.column = lambda name, folder="out": [row[name] for row in rows(folder) if "loss" in row]
    return call


def test_stages_mixes_layouts_and_resumes(run, tmp_path):
    """One rank; and 4 up to a phase that they cannot share, 4 of two kinds into annealing, 1 to its end. Data of phases to come may change."""
    text, ids, web = (tmp_path / name for name in ("text.txt", "ids.npy", "web.jsonl"))
    web.write_text("".join(json.dumps({"text": f"document {i} " * 30}) + "\n" for i in range(180)))
    np.save(ids, np.resize(np.arange(65, 91, dtype=np.uint16), 20_000))
    flags = "--ramp=8x4:320 --tokens=1216 --long_lengths=8,32 --long_tokens=384 --anneal_tokens=640 --average=4".split()
    flags += ["--data", f"0.5:{web},0.3:{text},0.2:{ids};800;{text}", "--anneal_data", ids]
    whole = run(1, *flags, "--out", tmp_path / "whole")
    assert re.findall(r"^step \d+/\d+ .* \| stage (\S+)", whole, re.M) == 24 * ["initial"] + 6 * ["long-context"] + 10 * ["annealing"]
    assert re.findall(r"\| data (\S+)", whole) == 2 * [f"0.5:{web},0.3:{text},0.2:{ids}"] + 3 * [str(text)] + [str(ids)]
    assert re.search(r"^needle 32 \| loss \d\.\d{4}$", whole, re.M) and "needle 8 | loss nan" in whole and "rope llama3" in whole
    parts = [*flags, "--out", tmp_path / "parts"]
    assert "the run ends before it, after 1,408 tokens" in run(4, *parts, "--anneal_tokens", 0, "--anneal_data", text)
    run(4, *parts, "--cp", 2, "--steps", 35, "--resume")
    last = run(1, *parts, "--steps", 0, "--resume")
    assert run.column("loss", "parts") == pytest.approx(run.column("loss", "whole"), rel=1e-4)
    first, second = (float(re.search(r"val 40 \| loss (\S+)", output)[1]) for output in (whole, last))
    assert first == pytest.approx(second, rel=1e-4)
    assert "another data_fingerprint than" in run(1, *parts, "--anneal_data", text, "--resume", status=2)


@pytest.mark.parametrize("batch, tokens, steps, more", [(8, 640, 0, ""), (2, 640, 0, ""), (8, 6400, 10, ""), (4, 640, 10, "--anneal_tokens 0 --steps 0")])
def test_resumes_with_another_batch_to_the_same_budget(run, tmp_path, batch, tokens, steps, more):
    """From the fifth of 10 updates of 4 sequences the data go on, to 40 sequences; without annealing, and without an average of zeros."""
    first = ["--long_tokens", 0, "--anneal_tokens", 640 * bool(more), "--lr", 0.01, "--out", tmp_path / "out"]
    run(1, *first, "--tokens", tokens, "--steps", steps, "--save_every", 5)
    (tmp_path / "out" / "step_000000010").rename(tmp_path / "lost")
    last = run(1, "--lr", 0.01, "--out", tmp_path / "out", "--resume", "--batch_size", batch, *more.split())
    assert run.firsts == list(range(20, 40 + batch, batch)), "one batch is read ahead"
    assert run.column("tokens")[-1] == pytest.approx(640, abs=16 * batch - 16)
    assert float(re.findall(r"val \d+ \| loss (\S+)", last)[-1]) < 0.9 * math.log(264)


@pytest.mark.parametrize("layout", [["--pp", 2, "--tp", 2], ["--tp", 2, "--dp", 2, "--tied"]])
def test_export_and_init_under_layouts(run, layout, tmp_path, monkeypatch):
    """From one layout to a plain directory, from there to one rank, which writes small files, and back: the same loss."""
    pytest.importorskip("safetensors")
    hf, files, flags = tmp_path / "hf", tmp_path / "files", ["--no-bos", "--batch_size", 8]
    out = run(4, *layout, *flags, "--steps", 3, "--export", hf)
    assert "warning" not in out and llama3.FILE_BYTES == 5e9
    monkeypatch.setattr(llama3, "FILE_BYTES", 1e5)
    for more, n in ((["--init", hf, "--export", files], 1), ([*layout, "--init", files], 4)):
        done = run(n, *flags, "--eval", *more)
        loss, sample = re.search(r"val 0 \| loss (\S+).*?\n(.*)", done, re.S).groups()
        assert float(loss) == pytest.approx(float(re.search(r"val 3 \| loss (\S+)", out)[1]), rel=2e-5)
        assert (len(sample) > 15) == (n == 1), "a model that is whole ends with a sample"
    sizes = [file.stat().st_size for file in files.glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 1.1e5


def test_goes_back_and_past_the_data(run, tmp_path, monkeypatch):
    """A spike in update 46: back to update 40, and no sequence comes again; another in update 67 is skipped alone."""
    objective, calls = llama3.objective, []

    def disturbed(model, batch, cfg):
        loss, metrics = objective(model, batch, cfg)
        calls.extend([1] * torch.is_grad_enabled())
        return loss * (10.0 if torch.is_grad_enabled() and len(calls) in (46, 67) else 1.0), metrics

    monkeypatch.setattr(llama3, "objective", disturbed)
    out = run(1, "--steps", 69, "--save_every", 40, "--out", tmp_path / "out")
    assert re.findall(r"step \d+ skipped|back to .*", out) == [
        "step 46 skipped", "back to the weights of step_000000040, and past 24 sequences", "step 67 skipped"]  # fmt: skip
    assert [*dict.fromkeys(run.firsts)] == [4 * i for i in range(76)], "one batch is read ahead"
    assert run.column("step") == list(range(1, 76)) and run.column("tokens")[-1] == 68 * 64
