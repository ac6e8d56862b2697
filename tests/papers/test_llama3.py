"""Llama 3 and Qwen2.5: the worked examples of the specification, layouts, stages and resumes."""
import base64
import collections
import json
import math
import os
import re
import signal
import types

import llama3
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from ranks import make_model, run_main

ROW = SCRIPTS["llama3"]


def build(**overrides):
    cfg = llama3.Config(**{**ROW.tiny, **overrides})
    return make_model(llama3, ROW, cfg).eval(), cfg


def test_plan_of_the_405b():
    """The updates that the specification derives from the paper's tokens."""
    plan = llama3.phases(llama3.Config(**llama3.PRESETS["405b"], dp=128))
    updates = lambda p: (p.end - p.begin) // (p.cfg.seq_len * p.cfg.batch_size)  # noqa: E731
    sizes = [(p.stage, p.cfg.seq_len, p.cfg.batch_size, updates(p)) for p in plan]
    assert sizes[:3] == [("initial", 4096, 1024, 60), ("initial", 8192, 1024, 342_101), ("initial", 8192, 2048, 711_083)]
    assert [s[1:3] for s in sizes[3:9]] == [(16384, 1024), (32768, 512), (49152, 256), (65536, 256), (98304, 128), (131072, 128)]
    assert sizes[-1] == ("annealing", 131072, 128, 2384)
    assert all(p.cfg.rope_scaling == ("none" if p.stage == "initial" else "llama3") for p in plan)
    for stage, tokens in (("long-context", 8e11), ("annealing", 4e10)):
        assert sum(s[1] * s[2] * s[3] for s in sizes if s[0] == stage) == pytest.approx(tokens, rel=1e-3)
    assert all(a.end == b.begin for a, b in zip(plan, plan[1:])) and plan[0].begin == 0
    assert llama3.updates_before(plan, plan[3].begin) == 60 + 342_101 + 711_083
    assert llama3.tokens_of_updates(plan, 60) == plan[0].end and llama3.phase_index(plan, plan[0].end) == 1
    qwen = llama3.phases(llama3.Config(**llama3.PRESETS["qwen2_5_7b"]))
    assert [(p.cfg.seq_len, p.cfg.rope_theta) for p in qwen] == [(4096, 1e4), (32768, 1e6)]


ROPE = {  # head width, factor: {i: frequency} of the specification's tables
    (128, 1): {0: 1.0, 28: 3.211446e-03, 29: 2.616099e-03, 32: 1.414214e-03, 34: 9.384738e-04, 35: 7.644970e-04, 63: 2.455141e-06},
    (128, 8): {0: 1.0, 28: 3.211446e-03, 29: 2.166571e-03, 32: 5.248461e-04, 34: 1.785078e-04, 35: 9.556212e-05, 63: 3.068926e-07},
    (128, 32): {0: 1.0, 28: 3.211446e-03, 29: 2.118407e-03, 32: 4.295567e-04, 34: 9.708286e-05, 35: 2.389053e-05, 63: 7.672315e-08},
    (64, 32): {15: 1.290548e-03, 16: 4.295567e-04, 17: 9.708286e-05},
    (16, 8): {4: 5.248461e-04, 5: 3.428102e-05, 7: 1.289173e-06},
    (8, 8): {0: 1.0, 1: 3.7606e-02, 2: 5.2485e-04, 3: 6.6479e-06},
}  # fmt: skip


@pytest.mark.parametrize("width, factor", ROPE)
def test_rotary_frequencies(width, factor):
    found, scale = llama3.rope_frequencies(width, 500_000.0, "llama3" if factor > 1 else "none", factor, 8192)
    assert scale == 1 and len(found) == width // 2
    for i, value in ROPE[width, factor].items():
        assert found[i].item() == pytest.approx(value, rel=2e-5 if width == 8 else 1e-6), i
    ratio = llama3.rope_frequencies(width, 500_000.0, "none", 1.0, 8192)[0] / found
    if (width, factor) == (128, 8):
        assert [(ratio == 1).sum(), ((ratio > 1) & (ratio < 7.99)).sum(), (ratio > 7.99).sum()] == [29, 6, 29]


def test_context_extensions():
    """Position Interpolation, NTK-aware and YaRN against their formulas; YaRN of Qwen2.5: s = 4 from 32,768, base 1e6, E = 128."""
    for width, theta, original, s in ((128, 1e6, 32768, 4.0), (24, 1e4, 512, 16.0)):
        plain, pi, ntk, yarn = (llama3.rope_frequencies(width, theta, kind, s, original) for kind in ("none", "pi", "ntk", "yarn"))
        exact = [theta ** (-2 * i / width) for i in range(width // 2)]
        assert plain[0].tolist() == pytest.approx(exact, rel=1e-5) and pi[0].tolist() == pytest.approx([f / s for f in exact], rel=1e-5)
        base = theta * s ** (width / (width - 2))
        assert ntk[0].tolist() == pytest.approx([base ** (-2 * i / width) for i in range(width // 2)], rel=1e-5)
        assert ntk[0][-1].item() == pytest.approx(exact[-1] / s, rel=1e-5) and ntk[0][0] == 1
        low, high = (f(width * math.log(original / (2 * math.pi * r)) / (2 * math.log(theta))) for f, r in ((math.floor, 32), (math.ceil, 1)))
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
        assert yarn[0].tolist() == pytest.approx([f * (1 - r) + f / s * r for f, r in zip(exact, ramp)], rel=1e-5)
        assert yarn[1] == pytest.approx(0.1 * math.log(s) + 1) and (width != 128 or (low, high) == (23, 40))
    assert llama3.rope_frequencies(128, 1e6, "yarn", 4.0, 32768)[1] == pytest.approx(1.1386, abs=1e-4)


def test_document_mask():
    """The specification's example, documents of 3, 2 and 1 tokens; and perturbation through the model."""
    mask = llama3.attention_mask(torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.arange(6), torch.arange(6))
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0],
                                         [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]  # fmt: skip
    model, _ = build()
    documents, tokens = torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.tensor([[5, 6, 7, 8, 9, 10]])
    for j in range(6):
        moved = (model(tokens + (torch.arange(6) == j), documents=documents) != model(tokens, documents=documents)).any(-1)
        assert moved[0].tolist() == mask[0, 0, :, j].tolist()


def test_block_mask_is_the_dense_one(monkeypatch):
    """The mask of the kernel that skips blocks, which trains on GPUs only: built and run forward here, uncompiled."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    monkeypatch.setattr(llama3, "flex_kernels", lambda: (flex_attention, create_block_mask))
    T, generator = 256, torch.Generator().manual_seed(0)
    documents = torch.randint(3, (2, T), generator=generator).cumsum(1) // 40
    rows, columns = llama3.context_positions(T, 2, 1), torch.cat([llama3.context_positions(T, 2, i) for i in range(2)])
    q = torch.randn(2, 4, T // 2, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, T, 16, generator=generator)
    dense = llama3.attend(q, k, v, llama3.attention_mask(documents, rows, columns))
    OnGPU = type("OnGPU", (torch.Tensor,), {"is_cuda": True})  # documents that say they are on a GPU
    mask = llama3.attention_mask(documents.as_subclass(OnGPU), rows, columns)
    assert isinstance(mask, BlockMask)
    torch.testing.assert_close(llama3.attend(q, k, v, mask), dense, atol=1e-5, rtol=1e-5)


def test_loss_of_chunks_is_that_of_all_logits(monkeypatch):
    """And its gradients; unscored targets count nothing."""
    monkeypatch.setattr(llama3, "slices", lambda n, vocab_size: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])
    model, cfg = build()
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.where(tokens % 5 == 0, -100, tokens.roll(-1))
    losses = model(tokens, targets), torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_initialisation():
    cfg = llama3.Config(**{**ROW.tiny, "dim": 192, "hidden_dim": 640, "qkv_bias": True})
    model = llama3.Llama3(cfg)
    llama3.init_weights(model, cfg)
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 0.02
        assert p.unique().tolist() == [float("norm" in name)] if p.ndim == 1 else p.std().item() == pytest.approx(std, rel=0.05), name


def test_bfloat16_keeps_the_norms_rope_and_loss_in_float32():
    """Rotation at position 100,000 would be off by radians in bf16; the norm casts before its gain, as released."""
    model, _ = build()
    tokens = torch.randint(256, (2, 12))
    exact = model(tokens)
    model.dtype = torch.bfloat16
    assert model(tokens).dtype == torch.float32 and 1e-5 < (model(tokens) - exact).abs().max() / exact.abs().max() < 0.03
    x, angles = torch.randn(1, 1, 1, 8), 1e5 * llama3.rope_frequencies(8, 1e4, "none", 1.0, 1)[0]
    assert (llama3.rotate(x.bfloat16(), angles.cos(), angles.sin()) - llama3.rotate(x, angles.cos(), angles.sin())).abs().max() < 0.05
    norm, x = llama3.RMSNorm(64, 1e-5), (100 * torch.randn(3, 64)).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    y = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(norm(x), y * norm.weight.bfloat16())


def test_mixes():
    """They change by tokens and by stage; shares are exact, the paper's 50/25/17/8 as a weight of 0.0025, and without gaps."""
    cfg = llama3.Config(data="0.9:a,0.1:b;1e6;b,c", anneal_data="c", tokens=2e6, anneal_tokens=1e6, ramp="64x8:5e5", seq_len=100, batch_size=100)
    plan = llama3.phases(cfg)
    assert [(p.stage, llama3.updates_before(plan, p.end), p.cfg.data) for p in plan] == [
        ("initial", 977, "0.9:a,0.1:b"), ("initial", 1027, "0.9:a,0.1:b"), ("initial", 1127, "b,c"), ("annealing", 1227, "c")]  # fmt: skip
    assert llama3.read_mix("3:x/web,1:y") == {"x/web": 0.75, "y": 0.25}
    for weights in ("0.5:a,0.25:b,0.17:c,0.08:d", "0.9975:a,0.0025:b", "1:a,2:b"):
        mix = llama3.read_mix(weights)
        corpora = [types.SimpleNamespace(window=lambda index, *_, i=i: (i, index), separator=0, token_bytes=0, n_windows=lambda _: 1000) for i in range(len(mix))]
        data = llama3.DataMix(mix, corpora)
        draws = [data.window(i, 8, 1) for i in range(1200)]
        for i, share in enumerate(mix.values()):
            assert sorted(index for corpus, index in draws if corpus == i) == list(range(int(1200 * share)))
        assert data.n_windows(8) == 1000 // max(mix.values()) and draws != [data.window(i, 8, 2) for i in range(1200)]


def test_packing():
    """Documents of 5, 4 and 6 tokens, markers included, in windows of 8: the specification's example."""
    B, E = 256, 257
    stream = [B, 1, 2, 3, E, B, 4, 5, E, B, 6, 7, 8, 9, E] + [0] * 20
    corpus = llama3.Corpus([("", np.array(stream, np.uint16))], 0, len(stream), E, (np.arange(264) < 256).astype(int), in_order=True)
    batch = llama3.get_batch(corpus, 0, 2, llama3.Config(seq_len=8))
    assert batch["tokens"].tolist() == [[B, 1, 2, 3, E, B, 4, 5], [E, B, 6, 7, 8, 9, E, 0]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 2]]
    assert batch["targets"].tolist() == [[1, 2, 3, E, -100, 4, 5, E], [-100, 6, 7, 8, 9, E, -100, 0]]
    assert (batch["n_targets"], batch["n_bytes"]) == (13, 10), "markers have no bytes"
    plain = llama3.get_batch(corpus, 0, 1, llama3.Config(seq_len=8, document_mask=False))
    assert "documents" not in plain and plain["targets"].tolist() == [stream[1:9]]


def test_tokenizer_file(tmp_path):
    """A rank file in which only the specification's reference tokens are merged: its pieces and special ids."""
    words = ["Hello", " world", " ", "123", "45", "!", "I", "'LL", " go", "go", "\n\n", " now", "x", " =", "3", ".", "14", "\n"]
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        for end in range(2, len(word.encode()) + 1):  # merge order: every prefix is a token
            ranks.setdefault(word.encode()[:end], len(ranks))
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    tokenizer, separator = llama3.load_specials(llama3.Config(tokenizer=str(path)))
    assert tokenizer.n_vocab == len(ranks) + 256 and separator == len(ranks) + 1
    pieces = lambda text: [tokenizer.decode([i]) for i in tokenizer.encode_ordinary(text)]  # noqa: E731
    assert pieces("Hello world 12345!") == ["Hello", " world", " ", "123", "45", "!"]
    assert pieces("I'LL go\n\n  now") == ["I", "'LL", " go", "\n\n", " ", " now"]
    assert pieces("  x = 3.14\n") == [" ", " ", "x", " =", " ", "3", ".", "14", "\n"]
    names = "begin_of_text end_of_text reserved_special_token_0 finetune_right_pad_id start_header_id eot_id python_tag reserved_special_token_2 reserved_special_token_245"
    assert [tokenizer.encode_single_token(f"<|{name}|>") - len(ranks) for name in names.split()] == [0, 1, 2, 4, 6, 9, 10, 12, 255]
    qwen, end = llama3.load_specials(llama3.Config(tokenizer=str(path), bos=False, qkv_bias=True))
    assert [qwen.decode([i]) for i in qwen.encode_ordinary("a 2024")] == ["a", " ", "2", "0", "2", "4"]
    for encoding, stop, text, expected in ((tokenizer, separator, "Hello", [len(ranks), ranks[b"Hello"], separator]), (qwen, end, "Hello", [ranks[b"Hello"], len(ranks)])):
        assert next(llama3.tokenize_pieces([("", text)], encoding, stop))[1].tolist() == expected
    (_, ids), = llama3.tokenize_pieces([("", "Hello<|end_of_text|>")], tokenizer, separator)
    assert (ids >= len(ranks)).sum() == 2, "text is never a special token"
    for text in (" " * 1_000_000, "x" * 60_000):  # tiktoken alone fails on the first
        (_, ids), = llama3.tokenize_pieces([("", text)], tokenizer, separator)
        assert tokenizer.decode(ids[1:-1].tolist()) == text
    sizes = lambda text: [len(piece) for piece in llama3.cut_text(text)]  # noqa: E731
    assert sizes("word " * 90_000) == [400_000, 50_000] and sizes("") == [] and sizes("a" * 25_000) == [25_000]
    assert sizes("b " + "a" * 50_001 + " c") == [25_002, 25_000, 3] and sizes(" " * 1_000_000) == 40 * [25_000], "as released"


def test_average_is_the_mean_of_checkpoints():
    """Seven updates of annealing and three checkpoints of them: after the third, the fifth and the seventh."""
    pipeline = types.SimpleNamespace(model=torch.nn.Linear(2, 1), average=torch.nn.Linear(2, 1).requires_grad_(False))
    phase = llama3.Phase("annealing", 100, 100 + 7 * 8, llama3.Config(seq_len=4, batch_size=2))
    for done in range(1, 8):
        torch.nn.init.constant_(pipeline.model.weight, float(done**2))
        llama3.update_average(pipeline, 100 + 8 * done, phase, 3)
    assert pipeline.average.weight.tolist() == [[pytest.approx((9 + 25 + 49) / 3)] * 2]


def test_chunks_of_a_context_and_stages_of_a_pipeline():
    """The specification's chunks; 405B: 126 layers, embedding and head on 16 ranks x 8 stages, one each; every layer on one stage."""
    owned = [llama3.context_positions(16, 2, i).tolist() for i in range(2)]
    assert owned == [[0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12))] and [sum(p + 1 for p in ps) for ps in owned] == [68, 68]
    assert [{p // 2 for p in llama3.context_positions(16, 4, i).tolist()} for i in range(4)] == [{0, 7}, {1, 6}, {2, 5}, {3, 4}]
    cfg = llama3.Config(**llama3.PRESETS["405b"], pp=16, dp=128)
    stages = [list(llama3.stage_layers(cfg, i)) for i in range(128)]
    assert stages == [[], *([i] for i in range(126)), []] and llama3.pipeline_bubble(cfg) == 15 / (8 * 16)
    for layers, pp, chunks in ((7, 3, 1), (4, 2, 3), (13, 4, 2), (5, 2, 1), (30, 4, 2)):
        cfg = llama3.Config(n_layers=layers, pp=pp, pp_chunks=chunks)
        assert sum((list(llama3.stage_layers(cfg, i)) for i in range(pp * chunks)), []) == list(range(layers))
    assert [len(llama3.stage_layers(cfg, i)) for i in range(8)] == [3, 4, 4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(recompute="block")])
def test_planned_activations_are_those_of_the_peak(overrides, monkeypatch):
    """The plan's activations against the bytes that are live at the peak of a forward and backward pass, with a loss of
    many chunks."""
    from torch.distributed._tools.mem_tracker import MemTracker

    monkeypatch.setattr(llama3, "slices", lambda n, vocab_size: [slice(i, i + 128) for i in range(0, n, 128)])
    cfg = llama3.Config(**{**ROW.tiny, "vocab_size": 1000, "dim": 96, "hidden_dim": 320, "seq_len": 64, "dp": 1, "batch_size": 32, **overrides})
    model = make_model(llama3, ROW, cfg)
    monkeypatch.setattr(model, "to_empty", lambda device: model)
    model = llama3.parallelize(model, cfg, types.SimpleNamespace(device_type="cpu"), types.SimpleNamespace(size=lambda: 1))
    tokens = torch.randint(99, (32, 64), generator=torch.Generator().manual_seed(0))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        llama3.objective(model, {"tokens": tokens, "targets": tokens, "n_targets": 2048}, cfg)[0].backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    live = sum(size for kind, size in peak.items() if "ACT" in str(kind) or "TEMP" in str(kind))
    planned = llama3.memory_per_rank(cfg)
    assert live == pytest.approx(planned["activations"] + planned["gathered"], rel=0.1)


STAGES = ["--ramp=8x4:320", "--tokens=1216", "--long_lengths=32", "--long_tokens=384", "--anneal_tokens=640", "--average=4", "--batch_size=8"]


@pytest.fixture
def run(ranks, tmp_path):
    """run(n, *flags): stdout, or stderr of another status, of a small run on n ranks; runs in one process are in this one."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))

    def call(n, *flags, status=0):
        own = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, "val_every": 1000, "data": text, **ROW.small}
        flags = [*(f"--{flag}={value}" for flag, value in own.items()), *map(str, flags)]
        found = ranks.run(n, run_main, "llama3", flags, timeout=120) if n > 1 else [run_main("llama3", flags)]
        assert [code for code, _, _ in found] == [status] * n, found
        return found[0][2 if status else 1]

    return call


def column(folder, name):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if "loss" in row]


def test_stages_layouts_and_resumes(run, tmp_path):
    """All three stages on one rank; then 2 data-parallel ranks into the initial stage, 4 of two kinds through the
    long-context stage into annealing, and 1 to the end."""
    whole = run(1, *STAGES, "--out", tmp_path / "whole")
    stages = re.findall(r"^step \d+/25 .* \| stage (\S+)", whole, re.M)
    assert stages == 17 * ["initial"] + 3 * ["long-context"] + 5 * ["annealing"]
    assert re.search(r"^needle 32 \| loss \d\.\d{4}$", whole, re.M) and "rope llama3" in whole
    parts = [*STAGES, "--save_every", 7, "--out", tmp_path / "parts"]
    run(2, *parts, "--steps", 5)
    run(4, *parts, "--cp", 2, "--steps", 22, "--resume")
    done = run(1, *parts, "--steps", 0, "--resume")
    assert column(tmp_path / "parts", "loss") == pytest.approx(column(tmp_path / "whole", "loss"), rel=1e-4)
    final = [float(re.search(r"val 25 \| loss (\S+)", output)[1]) for output in (whole, done)]
    assert final[0] == pytest.approx(final[1], rel=1e-4)


@pytest.mark.parametrize("batch, tokens, steps", [(8, 640, 0), (2, 640, 0), (8, 6400, 10)])
def test_resumes_with_another_batch_to_the_same_budget(run, tmp_path, batch, tokens, steps, monkeypatch):
    """10 updates of 4 sequences, stopped after 5: the data go on where they were, and end at 40 sequences."""
    budget, out = ["--tokens", tokens, "--long_tokens", 0, "--anneal_tokens", 0, "--steps", steps], ["--out", tmp_path / "out"]
    kill = lambda *args: (args[0] >= 4 and os.kill(os.getpid(), signal.SIGTERM)) or rate(*args)  # noqa: E731
    rate = llama3.learning_rate
    monkeypatch.setattr(llama3, "learning_rate", kill)
    assert "stopped after step 5" in run(1, *budget, *out)
    monkeypatch.undo()
    firsts, get_batch = [], llama3.get_batch
    monkeypatch.setattr(llama3, "get_batch", lambda corpus, first, n, cfg: firsts.append((corpus.corpora[0].in_order, first)) or get_batch(corpus, first, n, cfg))
    run(1, *out, "--resume", "--batch_size", batch)
    read = [first for held, first in firsts if not held]
    assert read == list(range(20, 40 + batch, batch)), "one batch is read ahead"
    assert column(tmp_path / "out", "tokens")[-1] == pytest.approx(640, abs=16 * batch - 16)


def test_annealing_and_layouts_that_come_later(run, tmp_path):
    """A run without annealing goes on into it, and is averaged; a phase that the ranks cannot share ends the run before it."""
    flags = [*STAGES, "--out", tmp_path / "out", "--batch_size", 4, "--long_lengths", 64]
    out = run(2, *flags, "--anneal_tokens", 0, "--steps", 0)
    assert "the run ends before it, after 1,216 tokens" in out and column(tmp_path / "out", "tokens")[-1] == 1216
    out = run(2, *flags, "--cp", 2, "--resume")
    assert column(tmp_path / "out", "tokens")[-1] == 1216 + 384 + 640 and "annealing" in out
    last = [float(re.findall(r"^val \d+ \| loss (\S+)", text, re.M)[-1]) for text in (out, run(1, *flags, "--resume", "--eval"))]
    assert last[0] == pytest.approx(last[1], rel=1e-4), "the average is in the checkpoint"


@pytest.mark.parametrize("layout", [["--pp", 2, "--tp", 2], ["--tp", 2, "--dp", 2, "--tied"]])
def test_export_and_init_under_layouts(run, layout, tmp_path):
    """From one layout to a plain directory, from there to one rank and back: the same held-out loss."""
    pytest.importorskip("safetensors")
    first = run(4, *layout, "--batch_size", 8, "--steps", 3, "--export", tmp_path / "hf")
    loss = float(re.search(r"val 3 \| loss (\S+)", first)[1])
    for flags, n in (([], 1), (layout, 4)):
        done = run(n, *flags, "--batch_size", 8, "--steps", 1, "--init", tmp_path / "hf")
        assert float(re.search(r"val 0 \| loss (\S+)", done)[1]) == pytest.approx(loss, rel=2e-5)
        sampled = len(re.search(r"^val 1 .*?\n(.*)", done, re.M | re.S)[1]) > 15
        assert sampled == (n == 1), "a layout of data-parallel ranks alone ends with a sample"


def test_files_of_a_published_size():
    """At most 5 GB each, in fp32."""
    cfg, sizes = llama3.Config(**llama3.PRESETS["8b"]), collections.Counter()
    files = llama3.hf_files(cfg)
    with torch.device("meta"):
        for name, p in llama3.Llama3(cfg).named_parameters():
            sizes[files[name]] += 4 * p.numel()
    assert sum(sizes.values()) == 4 * 8_030_261_248 and max(sizes.values()) <= 5e9
    assert sorted(sizes) == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]


@pytest.mark.parametrize("kind, last", [("spike", 146), ("nan", 46)])
def test_goes_back_and_past_the_data(run, tmp_path, monkeypatch, capsys, kind, last):
    """A window of noise among easy text, or losses of nan: back to the checkpoint six updates before, and no sequence since
    then comes again. Steps go on counting, and the plan is carried out nevertheless."""
    drawn, inner, objective, calls = [], llama3.get_batch, llama3.objective, []

    def get_batch(corpus, first, n, cfg):
        batch = inner(corpus, first, n, cfg)
        if not corpus.corpora[0].in_order:
            drawn.append(first)
            if kind == "spike" and first == (last - 1) * 4:
                batch["tokens"] = torch.randint(256, batch["tokens"].shape)
                batch["targets"] = torch.randint(256, batch["targets"].shape)
        return batch

    def losses(model, batch, cfg):
        loss, metrics = objective(model, batch, cfg)
        calls.extend([1] * torch.is_grad_enabled())
        bad = kind == "nan" and last - 3 < len(calls) <= last and torch.is_grad_enabled()
        return loss * (math.nan if bad else 1), metrics

    monkeypatch.setattr(llama3, "get_batch", get_batch)
    monkeypatch.setattr(llama3, "objective", losses)
    out = run(1, "--lr", 6e-3, "--steps", last + 14, "--save_every", 20, "--out", tmp_path / "out")
    assert out.count(f"back to the weights of step_{last - 6:09}, and past 24 sequences") == 1 and f"step {last} skipped" in out
    assert drawn == [4 * i for i in range(last + 21)], "one batch is read ahead"
    assert column(tmp_path / "out", "step") == list(range(1, last + 21)) and column(tmp_path / "out", "tokens")[-1] == (last + 14) * 64


def test_mixes_of_directories_and_shards(run, tmp_path):
    """A mix of a directory, a file and shards, another for annealing. It resumes with other data for stages to come, not with
    other data for one that has begun."""
    (tmp_path / "web").mkdir()
    for i in range(3):
        (tmp_path / "web" / f"part{i}.jsonl").write_text("".join(json.dumps({"text": f"document {j} " * 30}) + "\n" for j in range(60)))
    (tmp_path / "a.py").write_text("print('hello')\n" * 2000)
    np.save(tmp_path / "ids.npy", np.resize(np.arange(65, 91, dtype=np.uint16), 20_000))
    text, ids = tmp_path / "text.txt", tmp_path / "ids.npy"
    mix = f"0.5:{tmp_path}/web,0.3:{tmp_path}/a.py,0.2:{ids}"
    out = run(1, *STAGES, "--data", f"{mix};800;{text},{tmp_path}/a.py", "--anneal_data", ids)
    for line in (r"  50.00% .*web", r"  30.00% .*a.py", r"  20.00% .*ids.npy", r"  50.00% .*text.txt", "annealing to 2,240 tokens"):
        assert re.search(f"^{line}", out, re.M), (line, out)
    flags = [*STAGES, "--data", f"{mix};800;{text}", "--out", tmp_path / "out"]
    run(1, *flags, "--steps", 8, "--anneal_data", text)
    run(1, *flags, "--steps", 9, "--anneal_data", ids, "--resume")
    np.save(ids, np.resize(np.arange(66, 92, dtype=np.uint16), 20_000))
    err = run(1, *flags, "--steps", 10, "--anneal_data", text, "--resume", status=2)
    assert "another data_fingerprint than" in err and len(err.splitlines()) == 1


def test_plans_of_the_docstring_fit(capsys):
    """The documented multi-node layouts pass the check of the run; 405B takes 53 GiB of 80 GB, with and without CP."""
    lines = llama3.__doc__.replace("\\\n", "")
    plans = re.findall(r"--dry_run --preset 405b (--tp 8 .*)", lines)
    assert len(plans) == 2 and "--nnodes=16 --nproc_per_node=8" in lines and re.search("--preset 8b --tp 8 --recompute block", lines)
    for flags, phase in zip(plans, ("2,048 sequences of 8,192 | 711,083 updates | 16 micro-batches | bubble 11.7%", "128 sequences of 131,072 | 7,947 updates | 16")):
        llama3.main(["--dry_run", "--preset", "405b", *flags.split()])
        line = next(line for line in capsys.readouterr().out.splitlines() if phase in line)
        assert line.endswith("sum 53.305 GiB")
    llama3.main("--dry_run --preset 8b --tp 8 --recompute block --world_size 128".split())
    assert "another layout" not in capsys.readouterr().out
