"""T5: relative positions, span corruption, UL2, Adafactor, z-loss, shards, Hugging Face; in the order of the script."""
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import t5
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import run_main

TINY = SCRIPTS["t5"].tiny
WAYS = [dict(), dict(denoiser="iid"), dict(denoiser="ul2", gated=True, tied=False)]
UL2 = dict(vocab_size=32256, denoiser="ul2", sentinels=128, sentinel=32127, mode=32128)


def tiny(**more):
    return t5.Config(**{**TINY, **more})


def make(cfg):
    """The model with distinct gains."""
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.ndim == 1):
            p += 0.1 * torch.sin(torch.arange(p.numel()) + i)
    return model.eval()


def stream(cfg, ids):
    """ids as a Corpus whose windows come in order; a byte an ordinary token."""
    token_bytes = (np.arange(cfg.vocab_size) < 256).astype(np.int64)
    return t5.Corpus([("", np.asarray(ids, np.uint16))], 0, len(ids), -1, token_bytes, in_order=True)


def forward(model, batch):
    return model(*(batch[name] for name in ("source", "target_in", "source_mask") if name in batch))


def table(text):
    """{distance: bucket} of "0-7:0 8-11:8": a range of distances with one bucket each, or the first of counted ones."""
    found = {}
    for part in text.split():
        span, bucket = part.split(":")
        first, last = (int(n) for n in (span.split("-") if "-" in span else (span, span)))
        found |= {d: int(bucket.rstrip("+")) + (d - first) * bucket.endswith("+") for d in range(first, last + 1)}
    return [found[d] for d in sorted(found)]


BEHIND = table("0-7:0+ 8-11:8 12-15:9 16-22:10 23-31:11 32-45:12 46-63:13 64-90:14 91-300:15")
AHEAD = table("0-7:16+ 8-11:24 12-15:25 16-22:26 23-31:27 32-45:28 46-63:29 64-90:30 91-300:31")
DECODER = table("0-15:0+ 16-18:16 19-20:17 21-23:18 24-26:19 27-30:20 31-34:21 35-39:22 40-45:23 46-51:24 52-58:25 59-66:26 67-76:27 77-86:28"
                " 87-98:29 99-112:30 113-300:31")  # fmt: skip


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_the_table_at_the_bucket_of_key_minus_query(bidirectional):
    """The specification's tables of buckets; 16 is never used."""
    distances, behind = torch.arange(301), BEHIND if bidirectional else DECODER
    ahead = AHEAD if bidirectional else [0] * 301
    assert t5.relative_position_bucket(-distances, bidirectional).tolist() == behind
    assert t5.relative_position_bucket(distances[1:], bidirectional).tolist() == ahead[1:]
    bias, length = t5.RelativePositionBias(3, bidirectional), 130
    found = bias(length)
    for h, i, j in itertools.product(range(3), (0, 1, 15, 64, 129), range(length)):
        assert found[h, i, j] == bias.table.weight[behind[i - j] if j <= i else ahead[j - i], h]


@pytest.mark.parametrize("gated", [False, True])
def test_attention_and_feed_forward_are_the_formulas(gated):
    """softmax(q kᵀ + bias) v W_o in a plain loop in float64: no scaling, heads of a width of their own."""
    attention = t5.RelativeBiasAttention(10, 3, 4, 0.0).double()
    x, memory, bias = (torch.randn(shape).double() for shape in ((2, 5, 10), (2, 7, 10), (1, 3, 5, 7)))
    found = attention(x, memory, bias)
    for b in range(2):
        heads = []
        for rows in (slice(4 * h, 4 * h + 4) for h in range(3)):
            q, k, v = x[b] @ attention.q.weight[rows].T, memory[b] @ attention.k.weight[rows].T, memory[b] @ attention.v.weight[rows].T
            heads.append((q @ k.T + bias[0, rows.start // 4]).softmax(-1) @ v)
        torch.testing.assert_close(found[b], torch.cat(heads, 1) @ attention.out.weight.T)
    layer, x = t5.FeedForward(5, 7, gated, 0.0).double(), torch.randn(3, 5).double()
    hidden = x @ layer.up.weight.T
    if gated:
        g = x @ layer.gate.weight.T
        hidden = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * hidden
    torch.testing.assert_close(layer(x), (hidden if gated else hidden.clamp(min=0)) @ layer.down.weight.T)


def test_who_sees_whom():
    """Every output sees every input that is no padding, and no later target."""
    model = make(tiny())
    source, target, mask = torch.randint(250, (2, 9)), torch.randint(250, (2, 6)), torch.arange(9).expand(2, 9) < 7
    for more, n in ((), 9), ((mask,), 7):
        logits = model(source, target, *more)
        assert logits.shape == (2, 6, 384) and logits.dtype == torch.float32
        for j in range(9):
            changed = source.clone()
            changed[0, j] = (changed[0, j] + 1) % 250
            moved = ((model(changed, target, *more) - logits).abs() > 1e-6).any(-1)
            assert moved[0].tolist() == [j < n] * 6 and not moved[1].any()
        for j in range(6):
            changed = target.clone()
            changed[0, j] = (changed[0, j] + 1) % 250
            moved = ((model(source, changed, *more) - logits).abs() > 1e-6).any(-1)
            assert moved[0].tolist() == [i >= j for i in range(6)] and not moved[1].any()
    torch.testing.assert_close(logits, model(source[:, :7], target), rtol=1e-5, atol=1e-5)


def test_initialisation_and_dropout(monkeypatch):
    cfg = t5.Config(vocab_size=1000, dim=200, n_layers=2, n_heads=6, head_dim=25, hidden_dim=300, gated=True, tied=False)
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    expected = {"token_embedding": 1.0, "q": (200 * 25) ** -0.5, "k": 200**-0.5, "v": 200**-0.5, "out": 150**-0.5, "gate": 200**-0.5,
                "up": 200**-0.5, "down": 300**-0.5, "head": 200**-0.5, "table": math.sqrt(2 / 38)}  # fmt: skip
    for name, p in ((name, p.detach()) for name, p in model.named_parameters()):
        kind = name.split(".")[-2]
        cut = kind in ("gate", "up", "down", "head")  # at two sigma, which takes an eighth off
        assert (p == 1).all() if p.ndim == 1 else p.std().item() == pytest.approx(expected[kind] * (0.8796 if cut else 1), rel=0.15 if kind == "table" else 0.02), name
        assert kind not in ("table", *expected) or (p.abs().max() <= {"table": math.sqrt(6 / 38)}.get(kind, 2 * expected[kind] * 1.0001)) == (cut or kind == "table"), name
    seen, attended, dropout, attend = [], [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p, training, tuple(x.shape))) or dropout(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: attended.append(args[4]) or attend(*args, **more))
    cfg = tiny(dropout=0.25)
    make(cfg).train()(torch.randint(250, (2, 9)), torch.randint(250, (2, 5)))
    shapes = [shape for *kind, shape in seen if kind == [0.25, True]]
    assert attended == [0.25] * 3 * cfg.n_layers and len(shapes) == len(seen) == 4 + 7 * cfg.n_layers
    assert shapes.count((2, 9, cfg.dim)) == 2 + 2 * cfg.n_layers and shapes.count((2, 5, cfg.dim)) == 2 + 3 * cfg.n_layers


def test_presets_are_the_papers():
    """Parameters with the softmax tied the other way, too; batches of 2¹⁶ and 2²⁰ inputs."""
    counts = {"t5_large": 770_567_168, "v1_1_small": 60_511_616, "v1_1_base": 222_903_552, "v1_1_large": 750_251_008, "v1_1_xl": 2_783_959_040, "v1_1_xxl": 11_003_736_064}
    with torch.device("meta"):
        for preset, count in counts.items():
            cfg = t5.Config(**t5.PRESETS[preset])
            assert t5.count_parameters(t5.T5(dataclasses.replace(cfg, tied=not cfg.tied)))[0] == count
    for name, batch, steps in (("baseline", 2**16, 2**19), ("2x", 2**16, 2**19), ("t5_11b", 2**20, 10**6), ("v1_1_xl", 2**20, 10**6)):
        cfg = t5.Config(**t5.PRESETS[name])
        assert cfg.denoiser == ("iid" if steps == 2**19 else "t5") and cfg.batch_size * cfg.inputs == batch and cfg.steps == steps
        assert (cfg.lr, cfg.z_loss, cfg.rate, cfg.span, cfg.dropout) == (0.01, 1e-4, 0.15, 3.0, 0.0 if "v1" in name else 0.1)
    rates = {0: 0.01, 9999: 0.01, 39_999: 0.005, 524_287: 2**-9.5, 2**19 - 2**19 // 20: 0.5 * (2**19 * 0.95) ** -0.5}
    for step, rate in rates.items():  # GLU Variants' ramp for the last one
        assert t5.learning_rate(step, t5.Config(ramp_down=0.1 * (step == 498_074))) == pytest.approx(rate, rel=1e-4), step


@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_of_the_matrix_products(gated, monkeypatch):
    """The counter sees the full square of the decoder's attention, flops_per_token half of it and the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = tiny(gated=gated, tied=not gated, inputs=64, seq_len=0)
    length, T, U = t5.row_lengths(cfg)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        t5.T5(cfg)(torch.zeros(2, T, dtype=torch.long), torch.zeros(2, U, dtype=torch.long)).sum().backward()
    unseen = 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * U * (U - (U + 1) / 2) / length
    assert counter.get_total_flops() / (2 * length) == pytest.approx(t5.flops_per_token(cfg) + unseen)


def test_lengths():
    """(inputs, rate, mean span): tokens, targets. UL2's, too; against all lengths, one by one."""
    for inputs, rate, span, length, targets in (
        (512, 0.15, 3.0, 568, 114), (32, 0.15, 3.0, 34, 8), (128, 0.15, 3.0, 141, 29), (256, 0.15, 3.0, 284, 58), (64, 0.2, 2.0, 70, 22), (64, 0.2, 1.0, 63, 27),
        (512, 0.15, 8.0, 588, 100), (512, 0.5, 3.0, 766, 512), (512, 0.5, 8.0, 908, 512), (512, 0.15, 64.0, 600, 92), (512, 0.5, 64.0, 1006, 512),
    ):  # fmt: skip
        assert t5.row_lengths(t5.Config(inputs=inputs, rate=rate, span=span))[::2] == (length, targets)
    for rate, span, inputs in itertools.product((0.15, 0.5, 0.97), (1.0, 3.0, math.inf), range(4, 60)):
        length = max(n for n in range(2, 40 * inputs + 99) if t5.encoded_lengths(n, rate, span)[0] <= inputs)
        assert t5.fitting_length(inputs, rate, span) == length - (rate == 0.5 and t5.encoded_lengths(length, rate, span)[1] > inputs)
    assert t5.row_lengths(t5.Config(denoiser="iid")) == (511, 512, 192) and t5.row_lengths(t5.Config(seq_len=34)) == (34, 32, 8)
    assert [t5.count_noise(*kind) for kind in ((568, 0.15, 3.0), (766, 0.5, 3.0), (600, 0.15, 64.0))] == [(85, 28), (383, 128), (90, 1)]


def runs(mask):
    return sum(bool(mask[i]) and (i == 0 or not mask[i - 1]) for i in range(len(mask)))


def test_worked_examples_and_span_masks(monkeypatch):
    counts, rng = {}, np.random.default_rng(0)
    for _ in range(5000):
        parts = tuple(t5.random_parts(6, 3, rng).tolist())
        counts[parts] = counts.get(parts, 0) + 1
    assert set(counts) == {p for p in itertools.product(range(1, 5), repeat=3) if sum(p) == 6} and len(counts) == 10
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 27.9  # chi squared of 9 degrees: p 0.001
    for length, rate, span in ((568, 0.15, 3.0), (34, 0.15, 3.0), (70, 0.2, 2.0), (63, 0.2, 1.0), (2, 0.15, 3.0), (40, 0.9, 3.0), (766, 0.5, 3.0)):
        noise = min(max(round(length * rate), 1), length - 1)
        for seed in range(20):
            mask = t5.span_mask(length, rate, span, np.random.default_rng(seed))
            assert len(mask) == length and not mask[0] and mask[-1] and mask.sum() == noise and runs(mask) == min(max(round(noise / span), 1), length - noise)
    parts = iter([np.array([10, 19]), np.array([2, 3])])
    monkeypatch.setattr(t5, "random_parts", lambda n, parts_, rng: next(parts))
    mask, ids = t5.span_mask(34, 0.15, 3.0, None), np.arange(100, 134)
    assert t5.replace_spans(ids, mask, 32099).tolist() == [*range(100, 110), 32099, *range(112, 131), 32098]
    assert t5.replace_spans(ids, ~mask, 32099).tolist() == [32099, 110, 111, 32098, 131, 132, 133]
    mask = np.array([1, 1, 0, 0, 1, 0], bool)  # the code's unit case
    assert t5.replace_spans(np.arange(10, 16), mask, 999).tolist() == [999, 12, 13, 998, 15]
    assert t5.replace_spans(np.arange(10, 16), ~mask, 999).tolist() == [10, 11, 999, 14, 998]


def restore(inputs, targets, sentinels):
    """The text, from inputs and targets without EOS."""
    spans, span = {}, []
    for i in targets:
        if i in sentinels:
            span = spans.setdefault(i, [])
        else:
            span.append(i)
    return [j for i in inputs for j in (spans[i] if i in sentinels else [i])]


@pytest.mark.parametrize("way", WAYS)
def test_batches(way):
    """Rows restore the text, end in EOS, and are a function of seed and index; sentinels count down; a byte an ordinary token."""
    cfg = tiny(**way, inputs=64, seq_len=0)
    corpus, (length, T, U) = stream(cfg, np.arange(4000) % 250), t5.row_lengths(cfg)
    batch = t5.get_batch(corpus, 3, 8, cfg)
    scored, full = batch["targets"] >= 0, "source_mask" not in batch
    mask = batch.get("source_mask", torch.ones_like(batch["source"], dtype=torch.bool))
    assert batch["source"].shape == (8, T) and batch["target_in"].shape == batch["targets"].shape == (8, U) and T <= 64 and full == (way == {})
    assert torch.equal(mask, batch["source"] != cfg.pad) and (scored.all() or not full)
    assert batch["n_targets"] == scored.sum() and batch["n_bytes"] == (scored & (batch["targets"] < 256)).sum()
    for row in range(8):
        window = corpus.window(3 + row, length, 0)[:-1].tolist()
        source, target = batch["source"][row][mask[row]].tolist(), batch["targets"][row][scored[row]].tolist()
        assert source[-1] == target[-1] == cfg.eos and batch["target_in"][row, : len(target)].tolist() == [cfg.pad, *target[:-1]]
        marks = [i for i in source if 341 < i <= 360]
        assert marks == list(range(360, 360 - len(marks), -1))
        if cfg.denoiser != "iid":
            found = restore(source[cfg.denoiser == "ul2" : -1], target[:-1], range(342, 361))
            assert found == window[: len(found)] and (len(found) == length or cfg.denoiser == "ul2")
    rows = [t5.get_batch(stream(cfg, np.zeros(4000)), i, 1, c)["source"].tolist() for i, c in ((0, cfg), (1, cfg), (0, dataclasses.replace(cfg, seed=1)), (0, cfg))]
    assert rows[0] == rows[3] not in rows[1:3]
    with pytest.raises(ValueError, match="token id 342, and 19 ids from 360 down are the sentinels"):
        t5.get_batch(stream(cfg, np.full(400, 342)), 0, 1, cfg)


def test_single_tokens():
    """The baseline: misaligned numbers where the first token is hidden, and never more than the sentinels."""
    cfg, text, share, first = t5.Config(vocab_size=32128, denoiser="iid"), np.arange(1000, 1511), [], 0
    for seed in range(300):
        mask = np.random.default_rng(seed).random(511) < 0.15
        inputs, targets = t5.corrupt(text, np.random.default_rng(seed), cfg)
        assert [i for i in inputs if i < 32000] == text[~mask].tolist() and [i for i in targets if i < 32000] == text[mask].tolist()
        assert sum(i >= 32000 for i in inputs) == runs(mask) and sum(i >= 32000 for i in targets) == runs(~mask)
        first += mask[0] and targets[0] == 1000
        share.append(mask.mean())
    assert np.mean(share) == pytest.approx(0.15, abs=0.003) and first > 20
    inputs, targets = t5.corrupt(text, np.random.default_rng(0), dataclasses.replace(cfg, sentinels=20))
    assert min(i for i in [*inputs, *targets] if i >= 32000) == 32080


def test_ul2_is_seven_denoisers():
    cfg, text, found = t5.Config(**UL2), np.arange(1000, 2006), {}
    for seed in range(700):
        inputs, targets = t5.corrupt(text, np.random.default_rng(seed), cfg)
        hidden, spans = sum(i < 32000 for i in targets), sum(32000 <= i < 32128 for i in inputs)
        share = round(hidden / (len(inputs) - 1 - spans + hidden), 2)
        found.setdefault((inputs[0], share, max(spans, 1) if spans > 2 else 1), []).append((inputs, targets))
    n = {(r, m): t5.count_noise(t5.fitting_length(511, r, m), r, m)[1] for r, m in ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.5, 64.0))}
    assert found.keys() == {(32128, 0.15, n[0.15, 3.0]), (32128, 0.15, n[0.15, 8.0]), (32129, 0.25, 1), (32130, 0.5, n[0.5, 3.0]), (32130, 0.5, n[0.5, 8.0]),
                            (32130, 0.15, 1), (32130, 0.5, n[0.5, 64.0])} and all(60 < len(rows) < 145 for rows in found.values())  # fmt: skip
    for inputs, targets in found[32129, 0.25, 1]:  # a prefix, and the suffix to be written
        assert inputs[-1] == 32127 and [*inputs[1:-1], *targets[1:]] == text[: len(inputs) + len(targets) - 3].tolist()
    moved = [inputs for inputs, _ in found[32130, 0.15, 1]]
    assert len({inputs.index(32127) for inputs in moved}) > 30 and any(32126 in inputs and inputs[1] == 32127 for inputs in moved), "anywhere, also over the end"


def test_vocabulary(capsys):
    """Special tokens count down from the tokenizer's last id, in V padded to 128; those of shards are given, each an id of its own."""
    for vocab_size, warned in ((0, False), (384, False), (32128, True)):
        cfg = t5.Config(vocab_size=vocab_size)
        tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
        t5.fit_vocabulary(cfg, tokenizer)
        assert (cfg.eos, cfg.pad, cfg.mode, cfg.sentinel, cfg.vocab_size) == (256, 257, 258, 360, vocab_size or 384)
        assert ("warning: a vocabulary of 32,128 entries" in capsys.readouterr().out) == warned
    assert tokenizer.decode([360, 359, 261, 258]) == "<extra_id_0><extra_id_1><extra_id_99>[R]"
    for legal, ids in ((1, {}), (1, dict(sentinel=99, pad=100, eos=101)), (1, UL2), (0, dict(UL2, mode=32127)), (0, dict(pad=1)), (0, dict(eos=32000)), (0, dict(sentinel=32128))):
        cfg = t5.Config(**{"vocab_size": 32128, **ids})
        with contextlib.nullcontext() if legal else pytest.raises(ValueError, match=f"{cfg.sentinels} sentinels from --sentinel {cfg.sentinel} down"):
            t5.fit_vocabulary(cfg, None)


def corpora_for(cfg):
    """Made-up documents, joined as main joins them."""
    texts = ("".join(chr(97 + (i * k) % 26) for k in range(3 + 37 * i % 40)) for i in range(400))
    documents = t5.tokenize(((str(i), text) for i, text in enumerate(texts)), t5.load_tokenizer("bytes", t5.SPECIALS), cfg.eos)
    cfg.seq_len = t5.row_lengths(cfg)[0]
    return t5.load_corpora([], ((name, ids[:-1]) for name, ids in documents), None, -1, cfg.vocab_size, cfg.batch_size, cfg.seq_len)


def on_ranks(overrides, updates):
    """(loss, complete gradients, norm, complete parameters after `updates` updates) as the script computes them on this rank."""
    device, cfg = t5.init_distributed(30), tiny(**overrides)
    corpus, _ = corpora_for(cfg)
    with torch.device("meta"):
        model = t5.T5(cfg)
    t5.parallelize(model, cfg, t5.init_device_mesh("cpu", (t5.dist.get_world_size(),), mesh_dim_names=("dp",)))
    model.to_empty(device="cpu")
    for (name, p), value in zip(model.named_parameters(), make(tiny(**overrides)).parameters()):
        t5.fill_parameter(p, value.detach())
    complete = lambda x: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()  # noqa: E731
    optimizer, gradients, found = t5.build_optimizer(model, cfg), [], []
    optimizer.zero_grad = lambda: gradients.append([complete(p.grad) for p in model.parameters()]) or model.zero_grad()
    for step in range(updates):
        batches = t5.read_batch(corpus, 3 + 8 * step, cfg, device, t5.dist.get_rank(), t5.dist.get_world_size())
        t5.sum_counts(batches, t5.dist.get_world_size())
        found.append(t5.fsdp_step(model, optimizer, batches, cfg.lr, cfg))
    return *found[0], gradients[0], [complete(p) for p in model.parameters()]


def adafactor(p, g, state, t, lr):
    """The specification's update of one matrix, or of a vector with a moment for each entry."""
    b = 1 - t**-0.8
    if p.ndim == 1:
        state["v"] = v = b * state.get("v", 0) + (1 - b) * (g**2 + 1e-30)
    else:
        state["r"], state["c"] = (b * state.get(k, 0) + (1 - b) * (g**2 + 1e-30).mean(dim) for k, dim in (("r", 1), ("c", 0)))
        v = state["r"][:, None] * state["c"] / state["r"].mean()
    u = g / v.sqrt()
    return p - lr * max(1e-3, p.square().mean().sqrt()) * u / max(1, u.square().mean().sqrt())


@functools.cache
def reference(overrides, updates):
    """The same by one model, a plain loss and the plain update."""
    cfg = tiny(**dict(overrides))
    corpus, _ = corpora_for(cfg)
    model, states = make(cfg), [{} for _ in make(cfg).parameters()]
    for step in range(updates):
        batch = t5.get_batch(corpus, 3 + 8 * step, 8, cfg)
        logits = forward(model, batch).flatten(0, 1)
        targets = batch["targets"].flatten()
        loss = F.cross_entropy(logits, targets) + cfg.z_loss * logits.logsumexp(1)[targets >= 0].square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        first = (loss.item(), gradients) if step == 0 else first
        with torch.no_grad():
            for p, g, state in zip(model.parameters(), gradients, states):
                p.copy_(adafactor(p, g, state, step + 1, cfg.lr))
    return *first, list(model.parameters())


@pytest.mark.parametrize("n, overrides", [(1, dict(micro_batch=2)), (2, {}), (2, dict(micro_batch=1, recompute="block")), (4, WAYS[1]), (4, WAYS[2] | dict(micro_batch=1))])
def test_layout_gives_one_ranks_gradients_and_updates(ranks, n, overrides):
    overrides = overrides | dict(z_loss=0.01)
    loss, gradients, after = reference(tuple((k, v) for k, v in overrides.items() if k not in ("micro_batch", "recompute")), 2)
    largest, whole = max(g.abs().max() for g in gradients), math.sqrt(sum(g.square().sum() for g in gradients))
    names = [name for name, _ in make(tiny(**overrides)).named_parameters()]
    for found_loss, norm, found, parameters in ranks.run(n, on_ranks, overrides, 2):
        assert found_loss == pytest.approx(loss, rel=1e-5) and norm == pytest.approx(whole, rel=1e-5)
        for name, g, expected, p, q in zip(names, found, gradients, parameters, after):
            assert (g - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3 * largest), name
            assert (p - q).abs().max() <= 3e-4 * q.abs().max(), name


def test_adafactor_of_the_specification():
    p = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    rows = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = t5.Adafactor([p, rows], lr=0.01)
    after = ([[0.97878680, 2.03], [2.97153950, 3.97316718]], [[0.96450354, 2.01042023], [2.99419044, 3.94987946]])
    for g, expected in zip(([[0.1, -0.2], [0.3, 0.4]], [[0.05, 0.1], [-0.2, 0.3]]), after):
        p.grad, rows.grad = torch.tensor(g), torch.tensor([[0.0, 0.0], [1e-8, 1e-7]])
        optimizer.step()
        torch.testing.assert_close(p.data, torch.tensor(expected), rtol=0, atol=1e-6)
    assert (rows[0] == 1).all() and (rows[1] < 1).all(), "a row without gradient, as of a token that does not occur, stays"


def test_validation_is_without_z():
    cfg = tiny(z_loss=0.5, denoiser="iid")
    model, batch = make(cfg), t5.get_batch(stream(cfg, np.arange(4000) % 250), 0, 4, cfg)
    logits, targets = forward(model, batch).detach().flatten(0, 1).double(), batch["targets"].flatten()
    nats = F.cross_entropy(logits, targets).item()
    z = (logits[targets >= 0].logsumexp(1) ** 2).mean().item()
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(nats + 0.5 * z, rel=1e-6)
    with torch.no_grad():
        assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(nats, rel=1e-6)


def hf_order(gated):
    names = ["shared.weight"]
    for stack, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for i in range(2):
            for layer, kind in enumerate(kinds):
                here = f"{stack}.block.{i}.layer.{layer}"
                names += [f"{here}.{kind}.{w}.weight" for w in "qkvo"]
                names += [f"{here}.{kind}.relative_attention_bias.weight"] * (i == layer == 0)
                names.append(f"{here}.layer_norm.weight")
            here = f"{stack}.block.{i}.layer.{len(kinds)}"
            names += [f"{here}.DenseReluDense.{w}.weight" for w in (["wi_0", "wi_1", "wo"] if gated else ["wi", "wo"])] + [f"{here}.layer_norm.weight"]
        names.append(f"{stack}.final_layer_norm.weight")
    return names + ["lm_head.weight"] * gated


@pytest.mark.parametrize("gated, loss, logits, z", [
    (False, 4.8243751, [0.0917766, -0.0080138, -0.0936643], 0.0023563), (True, 4.5082590, [0.7332990, 0.6078949, -0.5901020], 0.0025440)])  # fmt: skip
def test_golden_values(gated, loss, logits, z):
    cfg = t5.Config(vocab_size=128, dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=128, dropout=0.0, gated=gated, tied=not gated)
    model = t5.T5(cfg).double().eval()
    assert t5.count_parameters(model)[0] == (214_016 if gated else 173_056)
    found = {t5.t5_name(name, gated): p for name, p in model.named_parameters()}
    assert set(hf_order(gated)) == set(found)
    for k, name in enumerate(hf_order(gated)):
        found[name].data = 0.1 * torch.sin(0.37 * torch.arange(found[name].numel(), dtype=torch.float64) + k).view_as(found[name]) + (found[name].ndim == 1)
    source, labels = ((torch.arange(24) * 7 + 3) % 120 + 2).view(2, 12), ((torch.arange(12) * 5 + 1) % 120 + 2).view(2, 6)
    labels[1, 5] = -100
    target_in, mask = torch.cat((torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]), 1), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    batch = dict(source=source, target_in=target_in, targets=labels, n_targets=11, source_mask=mask)
    assert model(source, target_in, mask)[0, 0, :3].tolist() == pytest.approx(logits, rel=1e-5, abs=1e-7)
    with torch.no_grad():
        assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(loss, rel=1e-5)
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(loss + z, rel=1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["v1.0", "v1.1"])
def test_hugging_face_reads_and_writes_the_same_model(gated, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    cfg = tiny(gated=gated, tied=not gated)
    ours = make(cfg)
    t5.to_hf(ours, cfg, tmp_path / "ours")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    if gated:  # transformers 5 ties all T5 models
        theirs.lm_head.weight = torch.nn.Parameter(ours.head.weight.detach().clone())
    draw = torch.Generator().manual_seed(0)
    source, labels = torch.randint(250, (3, 140), generator=draw), torch.randint(250, (3, 130), generator=draw)  # beyond the last bucket
    target_in, mask = torch.cat((torch.full((3, 1), cfg.pad), labels[:, :-1]), 1), torch.arange(140).expand(3, 140) < torch.tensor([[140], [99], [7]])
    expected = theirs(input_ids=source, attention_mask=mask, labels=labels)
    close = lambda found, wanted: (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # noqa: E731
    assert close(ours(source, target_in, mask), expected.logits)
    loss, _ = t5.objective(ours, dict(source=source, target_in=target_in, targets=labels, source_mask=mask, n_targets=labels.numel()), dataclasses.replace(cfg, z_loss=0.0))
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert close(p.grad, gradients[t5.t5_name(name, gated)]), name
    if gated:  # what it writes is tied all the same
        theirs.lm_head.weight = theirs.shared.weight
    theirs.save_pretrained(tmp_path / "theirs")
    read, found = t5.from_hf(tmp_path / "theirs")
    assert ("holds no lm_head.weight: the softmax begins as the embedding" in capsys.readouterr().out) == gated
    assert {k: getattr(found, k) for k in t5.SHAPE} == {k: getattr(cfg, k) for k in t5.SHAPE}
    assert close(read.eval()(source, target_in), theirs(input_ids=source, decoder_input_ids=target_in).logits)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for change in (dict(decoder_start_token_id=None), dict(feed_forward_proj="gelu"), dict(model_type="mt5"), dict(num_decoder_layers=9), dict(decoder_start_token_id=0), dict(num_heads=5)):
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | change))
        (key, value), = change.items()
        with contextlib.nullcontext() if value is None else pytest.raises(ValueError, match=f"holds no T5For.*{'shape' if key == 'num_heads' else key}"):
            t5.from_hf(tmp_path / "ours")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    return path


def run(ranks, n, text, **more):
    flags = {"preset": "demo", "data": text, "val_batches": 1, "log_every": 1, "timeout": 30, "dim": 48, "hidden_dim": 64, "batch_size": 4, "inputs": 64, "lr": 0.01, "ramp_down": 0, **more}
    (status, out, err), *others = ranks.run(n, run_main, "t5", [f"--{flag}={value}" if value != "" else f"--{flag}" for flag, value in flags.items()], timeout=120)
    return out if status == 0 and not any(other[0] for other in others) else err


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("denoiser, precision", [("t5", "bf16"), ("iid", "fp32"), ("ul2", "fp32")])
def test_thirty_steps_of_each_denoiser(ranks, text, tmp_path, denoiser, precision):
    out = run(ranks, 1, text, denoiser=denoiser, precision=precision, steps=30, lr=0.03, recompute="block", out=tmp_path)
    found = losses(tmp_path)
    assert len(found) == 30 and found[0] - sum(found[-5:]) / 5 > 1.5 and "⟦" in out, out


def test_ranks_resume_export_and_eval(ranks, text, tmp_path):
    """One rank's losses on two; a run stopped half-way goes on bit for bit, on another number of ranks nearly; the export is the same model."""
    pytest.importorskip("safetensors")
    whole = run(ranks, 1, text, steps=6, out=tmp_path / "one", export=tmp_path / "hf")
    sharded = run(ranks, 2, text, steps=6, out=tmp_path / "two", micro_batch=1, export=tmp_path / "hf2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    run(ranks, 2, text, steps=3, out=tmp_path / "half", micro_batch=1)
    again = run(ranks, 2, text, steps=6, out=tmp_path / "half", micro_batch=1, resume="")
    assert losses(tmp_path / "half") == losses(tmp_path / "two") and again.split("val 6")[1] == sharded.split("val 6")[1], again
    assert "val 9" in run(ranks, 1, text, steps=9, out=tmp_path / "half", resume="")
    val = lambda out: float(re.search(r"val \d \| loss ([\d.]+)", out.split("tok/s")[-1])[1])  # noqa: E731
    for source in (dict(out=tmp_path / "one"), dict(init=tmp_path / "hf", dim=8, tokenizer="bytes"), dict(init=tmp_path / "hf2", tokenizer="bytes")):
        found = run(ranks, 2, text, eval="", prompt="line <extra_id_0> says", **source)
        assert val(found) == pytest.approx(val(whole), abs=2e-3) and "\nline ⟦" in found, found


def test_fills_in_the_prompt(monkeypatch, capsys):
    """Sentinels of the user's own, or spans that are hidden; what the model says stands in its place; greedy ids are the argmax."""
    cfg = t5.Config(inputs=64)
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
    t5.fit_vocabulary(cfg, tokenizer)
    heldout = stream(cfg, np.frombuffer(b"the held-out text " * 99, np.uint8))
    answers, seen = [*b"lost", cfg.sentinel, *b"old", cfg.sentinel - 1, 380, *b"son", cfg.pad, cfg.eos], []
    with monkeypatch.context() as patch:
        patch.setattr(t5, "sample", lambda model, source, n, cfg: seen.append(source) or answers)
        t5.fill_spans(None, "an <extra_id_0> man and his <extra_id_1>.", heldout, tokenizer, cfg)
        assert capsys.readouterr().out == "an <extra_id_0> man and his <extra_id_1>.\n---\nan ⟦old⟧ man and his ⟦son⟧.\n"
        for denoiser, prompt in itertools.product(("t5", "iid", "ul2"), ("", "x", "to be or not to be, that is a question of some age", "y" * 999, "<extra_id_0>" + "b" * 99)):
            cfg.denoiser = denoiser
            t5.fill_spans(None, prompt, heldout, tokenizer, cfg)
            corrupted, filled = capsys.readouterr().out.split("\n---\n")
            expected = re.sub(r"\[[RSX]\]", "", corrupted).replace("<extra_id_0>", "⟦old⟧").replace("<extra_id_1>", "⟦son⟧")
            assert filled == re.sub(r"<extra_id_\d+>", "⟦⟧", expected) + "\n" and len(seen[-1]) <= 64 and seen[-1][-1] == cfg.eos
    model, source, cfg = make(tiny()), [5, 6, 7, 256], tiny()
    ids = t5.sample(model, source, 4, cfg)
    logits = model(torch.tensor([source]), torch.tensor([[cfg.pad, *ids[:-1]]]))[0]
    assert ids == logits.argmax(-1).tolist() and (len(ids) == 4 or ids[-1] == cfg.eos)
