"""T5: relative positions, span corruption, UL2's mix, packing, Adafactor, z-loss, layouts, parity with Hugging Face."""
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import run_main

t5 = importlib.import_module("t5")
ROW = SCRIPTS["t5"]
TINY = ROW.tiny


def tiny(**more):
    return t5.Config(**{**TINY, **more})


def make(cfg, scale=1.0):
    """The model with distinct gains."""
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p *= scale
            if p.ndim == 1:
                p += 0.1 * torch.sin(torch.arange(p.numel()) + i)
    return model.eval()


def stream(cfg, ids):
    """ids as a Corpus whose windows come in order; a byte an ordinary token."""
    token_bytes = (np.arange(cfg.vocab_size) < 256).astype(np.int64)
    return t5.Corpus([("", np.asarray(ids, np.uint16))], 0, len(ids), -1, token_bytes, in_order=True)


def corpus_of(cfg, length=4000):
    """A stream in which every id says where it stands, modulo the ordinary ids."""
    return stream(cfg, np.arange(length) % 250)


# Relative positions: the tables of the specification


def table(text):
    """{distance: bucket} of "0-7:0 8-11:8": a bucket for each distance, or one for a range."""
    found = {}
    for part in text.split():
        span, bucket = part.split(":")
        first, last = (int(n) for n in (span.split("-") if "-" in span else (span, span)))
        found |= {d: int(bucket) for d in range(first, last + 1)}
    return found


BEHIND = " ".join(f"{d}:{d}" for d in range(8)) + " 8-11:8 12-15:9 16-22:10 23-31:11 32-45:12 46-63:13 64-90:14 91-300:15"
AHEAD = " ".join(f"{d}:{d + 16}" for d in range(1, 8)) + " 8-11:24 12-15:25 16-22:26 23-31:27 32-45:28 46-63:29 64-90:30 91-300:31"
DECODER = " ".join(f"{d}:{d}" for d in range(16)) + (
    " 16-18:16 19-20:17 21-23:18 24-26:19 27-30:20 31-34:21 35-39:22 40-45:23 46-51:24 52-58:25 59-66:26 67-76:27 77-86:28"
    " 87-98:29 99-112:30 113-300:31"
)


def test_relative_position_buckets():
    behind, ahead, decoder = table(BEHIND), table(AHEAD), table(DECODER)
    distances = torch.arange(301)
    assert t5.relative_position_bucket(-distances, True).tolist() == [behind[d] for d in range(301)]
    assert t5.relative_position_bucket(distances[1:], True).tolist() == [ahead[d] for d in range(1, 301)]
    assert t5.relative_position_bucket(-distances, False).tolist() == [decoder[d] for d in range(301)]
    assert not t5.relative_position_bucket(distances, False).any(), "keys after the query are hidden anyway"
    every = t5.relative_position_bucket(torch.arange(-300, 301), True)
    assert set(range(32)) - set(every.tolist()) == {16}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_the_table_at_the_bucket_of_key_minus_query(bidirectional):
    bias, length = t5.RelativePositionBias(3, bidirectional), 130
    found = bias(length)
    behind, ahead = table(BEHIND if bidirectional else DECODER), table(AHEAD)
    for h, i, j in itertools.product(range(3), (0, 1, 15, 64, 129), range(length)):
        bucket = behind[i - j] if j <= i else ahead[j - i] if bidirectional else 0
        assert found[h, i, j] == bias.per_head.weight[h, bucket]
    found.sum().backward()
    counts = torch.zeros(32)
    for i, j in itertools.product(range(length), repeat=2):
        counts[behind[i - j] if j <= i else ahead[j - i] if bidirectional else 0] += 1
    torch.testing.assert_close(bias.per_head.weight.grad, counts.expand(3, 32))


def test_attention_is_the_formula():
    """softmax(q kᵀ + bias) v W_o in a plain loop in float64: no scaling, heads of a width of their own."""
    attention = t5.RelativeSoftmaxAttention(10, 3, 4, 0.0).double()
    x, memory, bias = torch.randn(2, 5, 10).double(), torch.randn(2, 7, 10).double(), torch.randn(1, 3, 5, 5).double()
    for keys, added in ((x, bias), (memory, torch.zeros(1, 3, 5, 7))):
        found = attention(x, bias=bias) if keys is x else attention(x, memory)
        for b in range(2):
            heads = []
            for h in range(3):
                rows = slice(4 * h, 4 * h + 4)
                q, k, v = x[b] @ attention.q.weight[rows].T, keys[b] @ attention.k.weight[rows].T, keys[b] @ attention.v.weight[rows].T
                heads.append((q @ k.T + added[0, h]).softmax(-1) @ v)
            torch.testing.assert_close(found[b], torch.cat(heads, 1) @ attention.out.weight.T, rtol=1e-5, atol=1e-6)


def test_scores_are_fp32_under_bf16():
    """Scores of a hundred and more, whose rounding to bf16 would be a factor of e^0.25 in the softmax."""
    torch.manual_seed(0)
    attention = t5.RelativeSoftmaxAttention(16, 2, 8, 0.0)
    for layer in (attention.q, attention.k):
        torch.nn.init.normal_(layer.weight, 0, 2.5)
    x, bias = torch.randn(2, 40, 16), torch.randn(1, 2, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x, bias=bias)
    q, k, v = (F.linear(x.bfloat16(), w.weight.bfloat16()).double().unflatten(-1, (2, 8)).transpose(1, 2) for w in (attention.q, attention.k, attention.v))
    scores = q @ k.mT + bias
    assert scores.abs().max() > 100
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ attention.out.weight.double().T
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_is_the_formula(gated):
    layer, x = t5.FeedForward(5, 7, gated, 0.0).double(), torch.randn(3, 5).double()
    hidden = x @ layer.up.weight.T
    if gated:
        g = x @ layer.gate.weight.T
        hidden = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * hidden
    else:
        hidden = hidden.clamp(min=0)
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T)


# Who sees whom


def test_who_sees_whom():
    cfg = tiny()
    model = make(cfg)
    source, target = torch.randint(250, (2, 9)), torch.randint(250, (2, 6))
    logits = model(source, target)
    assert logits.shape == (2, 6, cfg.vocab_size) and logits.dtype == torch.float32
    for j in range(9):  # every output sees every input
        changed = source.clone()
        changed[0, j] = (changed[0, j] + 1) % 250
        moved = ((model(changed, target) - logits).abs() > 1e-6).any(-1)
        assert moved[0].all() and not moved[1].any()
    for j in range(6):
        changed = target.clone()
        changed[0, j] = (changed[0, j] + 1) % 250
        moved = ((model(source, changed) - logits).abs() > 1e-6).any(-1)
        assert moved[0].tolist() == [i >= j for i in range(6)] and not moved[1].any()


def test_packed_examples_are_alone_in_all_three_attentions():
    """Each of a row's examples gives the logits that it has by itself, and moves no other's; padding moves none."""
    cfg = tiny()
    model = make(cfg)
    source, target = torch.randint(250, (1, 14)), torch.randint(250, (1, 9))
    source_segments = torch.tensor([[1] * 5 + [2] * 6 + [0] * 3])
    target_segments = torch.tensor([[1] * 4 + [2] * 3 + [0] * 2])
    packed = model(source, target, source_segments, target_segments)
    torch.testing.assert_close(packed[:, :4], model(source[:, :5], target[:, :4]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 4:7], model(source[:, 5:11], target[:, 4:7]), rtol=1e-5, atol=1e-5)
    assert packed.isfinite().all()
    full = model(source[:, :11], target, source_segments[:, :11], target_segments)  # a source without padding
    assert full.isfinite().all()
    for where, tokens, j, expected in [
        (0, source, 2, range(4)), (0, source, 8, range(4, 7)), (0, source, 12, []),
        (1, target, 1, range(1, 4)), (1, target, 5, range(5, 7)), (1, target, 8, []),
    ]:  # fmt: skip
        changed = tokens.clone()
        changed[0, j] += 1
        inputs = [source, target]
        inputs[where] = changed
        moved = (model(*inputs, source_segments, target_segments) - packed).abs().amax(-1)[0] > 1e-6
        assert [i for i in range(7) if moved[i]] == list(expected)


# Span corruption


LENGTHS = [  # inputs, rate, mean span: tokens, targets
    (512, 0.15, 3.0, 568, 114), (32, 0.15, 3.0, 34, 8), (128, 0.15, 3.0, 141, 29), (256, 0.15, 3.0, 284, 58), (64, 0.2, 2.0, 70, 22),
    (64, 0.2, 1.0, 63, 27), (512, 0.15, 8.0, 588, 100), (512, 0.5, 3.0, 766, 512), (512, 0.5, 8.0, 908, 512), (512, 0.15, 64.0, 600, 92),
    (512, 0.5, 64.0, 1006, 512),
]  # fmt: skip


@pytest.mark.parametrize("inputs, rate, span, length, targets", LENGTHS)
def test_lengths(inputs, rate, span, length, targets):
    assert t5.fitting_length(inputs, rate, span) == length
    assert t5.encoded_lengths(length, rate, span) == (pytest.approx(inputs, abs=1), targets)
    assert t5.row_lengths(t5.Config(inputs=inputs, rate=rate, span=span))[::2] == (length, targets)


@pytest.mark.parametrize("rate, span", [(0.15, 3.0), (0.5, 3.0), (0.25, math.inf), (0.97, 1.0), (0.01, 64.0)])
def test_no_longer_text_fits(rate, span):
    """Against all lengths, one by one; and of inputs that nobody could count up to."""
    for inputs in range(4, 120):
        fits = [n for n in range(2, 40 * inputs + 99) if t5.encoded_lengths(n, rate, span)[0] <= inputs]
        length = max(fits)
        assert t5.fitting_length(inputs, rate, span) == length - (rate == 0.5 and t5.encoded_lengths(length, rate, span)[1] > inputs)
    huge = t5.fitting_length(10**10, 0.15, 3.0)
    assert t5.encoded_lengths(huge, 0.15, 3.0)[0] <= 10**10 < t5.encoded_lengths(huge + 1, 0.15, 3.0)[0]


def test_lengths_of_the_paper():
    assert t5.row_lengths(t5.Config()) == (568, 512, 114) and t5.count_noise(568, 0.15, 3.0) == (85, 28)
    assert t5.row_lengths(t5.Config(denoiser="iid")) == (511, 512, 192) and t5.row_lengths(t5.Config(denoiser="iid", rate=0.5)) == (511, 512, 640)
    assert t5.count_noise(766, 0.5, 3.0) == (383, 128) and t5.count_noise(600, 0.15, 64.0) == (90, 1)  # UL2's
    assert t5.most_spans(t5.Config(denoiser="ul2", seq_len=4)) == 2, "a single span that moves has two sentinels"
    length, inputs, targets = t5.row_lengths(t5.Config(denoiser="ul2"))
    assert inputs == 512 and 510 <= targets <= 512 and 1003 <= length <= 1006, "511 inputs and a mode"
    assert t5.row_lengths(t5.Config(pack=4, inputs=512)) == (141, 128, 29)
    assert t5.row_lengths(t5.Config(seq_len=34, inputs=512)) == (34, 32, 8)


def test_worked_examples(monkeypatch):
    ids = np.arange(100, 134)
    parts = iter([np.array([10, 19]), np.array([2, 3])])
    monkeypatch.setattr(t5, "random_parts", lambda n, parts_, rng: next(parts))
    mask = t5.span_mask(34, 0.15, 3.0, None)
    inputs, targets = t5.replace_spans(ids, mask, 32099), t5.replace_spans(ids, ~mask, 32099)
    assert [*inputs, 1] == [*range(100, 110), 32099, *range(112, 131), 32098, 1] and len(inputs) + 1 == 32
    assert [*targets, 1] == [32099, 110, 111, 32098, 131, 132, 133, 1]
    mask = np.array([1, 1, 0, 0, 1, 0], bool)  # the code's unit case
    assert t5.replace_spans(np.arange(10, 16), mask, 999).tolist() == [999, 12, 13, 998, 15]
    assert t5.replace_spans(np.arange(10, 16), ~mask, 999).tolist() == [10, 11, 999, 14, 998]


def runs(mask):
    return sum(bool(mask[i]) and (i == 0 or not mask[i - 1]) for i in range(len(mask)))


@pytest.mark.parametrize("length, rate, span", [(568, 0.15, 3.0), (34, 0.15, 3.0), (70, 0.2, 2.0), (63, 0.2, 1.0), (2, 0.15, 3.0), (40, 0.9, 3.0), (766, 0.5, 3.0)])
def test_span_masks(length, rate, span):
    noise = min(max(round(length * rate), 1), length - 1)
    for seed in range(50):
        mask = t5.span_mask(length, rate, span, np.random.default_rng(seed))
        assert len(mask) == length and not mask[0] and mask[-1] and mask.sum() == noise
        assert runs(mask) == min(max(round(noise / span), 1), length - noise)


def test_parts_are_uniform_among_all():
    """Four of 3 parts of 6, in 10 equally likely ways."""
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(5000):
        parts = tuple(t5.random_parts(6, 3, rng).tolist())
        counts[parts] = counts.get(parts, 0) + 1
    assert set(counts) == {p for p in itertools.product(range(1, 5), repeat=3) if sum(p) == 6} and len(counts) == 10
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 27.9  # chi squared of 9 degrees: p 0.001


def restore(inputs, targets, sentinels):
    """The text, from inputs and targets without EOS."""
    spans, span = {}, []
    for i in targets:
        if i in sentinels:
            span = spans.setdefault(i, [])
        else:
            span.append(i)
    return [j for i in inputs for j in (spans[i] if i in sentinels else [i])]


@pytest.mark.parametrize("denoiser", ["t5", "ul2"])
def test_corruption_hides_and_tells(denoiser):
    cfg = t5.Config(vocab_size=32256, denoiser=denoiser, sentinels=128, sentinel=32127, mode=32128)
    text, sentinels = np.arange(1000, 2006), range(32000, 32128)
    kinds = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        inputs, targets = t5.corrupt(text[:568] if denoiser == "t5" else text, rng, cfg)
        inputs, targets = [int(i) for i in inputs], targets.tolist()
        if denoiser == "ul2":
            kinds.add((inputs[0], len(inputs), len(targets)))
            inputs = inputs[1:]
        found = restore(inputs, targets, sentinels)
        assert found == text[: len(found)].tolist() and (denoiser == "ul2" or len(found) == 568)
        assert targets[0] == 32127
        for ids in (inputs, targets):
            marks = [i for i in ids if i in sentinels]
            assert marks == list(range(32127, 32127 - len(marks), -1))
        if denoiser == "t5":
            assert (len(inputs) + 1, len(targets) + 1) == (512, 114) and targets[-1] == text[567]
    if denoiser == "ul2":
        assert {mode for mode, *_ in kinds} == {32128, 32129, 32130} and all(n + 1 <= 512 and m + 1 <= 512 for _, n, m in kinds)


@pytest.mark.parametrize("kind, source, target", [
    (("[R]", 12, 0.25, 3.0), [32128, *range(100, 109), 32127], [32127, 109, 110, 111]),
    (("[S]", 12, 0.25, math.inf), [32129, *range(100, 109), 32127], [32127, 109, 110, 111]),
    (("[X]", 12, 0.15, 64.0), [32130, *range(100, 106), 32127, *range(108, 112)], [32127, 106, 107, 32126]),
])  # fmt: skip
def test_worked_examples_of_ul2(monkeypatch, kind, source, target):
    """Twelve tokens: a span or a suffix of three, and a span of two that moved from the end to the seventh token."""
    monkeypatch.setattr(t5, "denoisers", lambda cfg: [kind])
    cfg = t5.Config(denoiser="ul2", mode=32128, sentinel=32127)
    found = t5.corrupt(np.arange(100, 112), np.random.default_rng(1), cfg)
    assert [[int(i) for i in part] for part in found] == [source, target]


def test_ul2_is_seven_denoisers():
    cfg = t5.Config(vocab_size=32256, denoiser="ul2", sentinels=128, sentinel=32127, mode=32128)
    text, found = np.arange(1000, 2006), {}
    for seed in range(700):
        inputs, targets = t5.corrupt(text, np.random.default_rng(seed), cfg)
        hidden = [i for i in targets if i < 32000]
        spans = sum(32000 <= i < 32128 for i in inputs)
        kind = inputs[0], round(len(hidden) / (len(inputs) - 1 - spans + len(hidden)), 2), spans
        found.setdefault(kind, []).append((inputs, targets))
    sizes = {(511, r, m): t5.count_noise(t5.fitting_length(511, r, m), r, m)[1] for r, m in ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.5, 64.0))}
    n = {key[1:]: value for key, value in sizes.items()}
    expected = {(32128, 0.15, n[0.15, 3.0]), (32128, 0.15, n[0.15, 8.0]), (32129, 0.25, 1), (32130, 0.5, n[0.5, 3.0]),
                (32130, 0.5, n[0.5, 8.0]), (32130, 0.15, 1), (32130, 0.5, n[0.5, 64.0])}  # fmt: skip
    assert found.keys() == expected and all(60 < len(examples) < 145 for examples in found.values())
    for inputs, targets in found[32129, 0.25, 1]:  # a prefix, and the suffix to be written
        assert inputs[-1] == 32127 and [*inputs[1:-1], *targets[1:]] == text[: len(inputs) + len(targets) - 3].tolist()
    places = {inputs.index(32127) for inputs, _ in found[32130, 0.15, 1]}
    assert len(places) > 30, "the only span of an X-denoiser may be anywhere"


def test_single_tokens():
    """The baseline: alternating runs, misaligned numbers where the first token is hidden, and never more than the sentinels."""
    cfg = t5.Config(vocab_size=32128, denoiser="iid")
    text, share, first, last = np.arange(1000, 1511), [], 0, 0
    for seed in range(300):
        mask = np.random.default_rng(seed).random(511) < 0.15
        inputs, targets = t5.corrupt(text, np.random.default_rng(seed), cfg)
        assert [i for i in inputs if i < 32000] == text[~mask].tolist() and [i for i in targets if i < 32000] == text[mask].tolist()
        assert sum(i >= 32000 for i in inputs) == runs(mask) and sum(i >= 32000 for i in targets) == runs(~mask)
        first += mask[0] and targets[0] == 1000
        last += not mask[-1] and targets[-1] >= 32000
        share.append(mask.mean())
    assert np.mean(share) == pytest.approx(0.15, abs=0.003) and first > 20 and last > 200
    few = dataclasses.replace(cfg, sentinels=20)
    inputs, targets = t5.corrupt(text, np.random.default_rng(0), few)
    assert min(i for i in [*inputs, *targets] if i >= 32000) == 32080


@pytest.mark.parametrize("denoiser, pack", [("t5", 1), ("t5", 3), ("iid", 2), ("ul2", 2)])
def test_batches(denoiser, pack):
    cfg = tiny(denoiser=denoiser, pack=pack, inputs=32 * pack, seq_len=0)
    corpus, (length, T, U) = corpus_of(cfg), t5.row_lengths(cfg)
    batch = t5.get_batch(corpus, 3, 4, cfg)
    assert batch["source"].shape == (4, pack * T) and batch["target_in"].shape == batch["targets"].shape == (4, pack * U)
    scored = batch["targets"] >= 0
    assert batch["n_targets"] == scored.sum()
    plain = (batch["targets"] >= 0) & (batch["targets"] < 256)
    assert batch["n_bytes"] == plain.sum(), "a byte an ordinary token"
    assert ("source_segments" in batch) == (denoiser != "t5" or pack > 1)
    if denoiser == "t5" and pack == 1:
        assert scored.all() and (batch["source"] != cfg.pad).all() and (length, T, U) == (34, 32, 8)
        batch |= {"source_segments": torch.ones_like(batch["source"]), "target_segments": torch.ones_like(batch["targets"])}
    assert torch.equal(batch["target_segments"] > 0, scored)
    assert ((batch["source"] == cfg.pad) == (batch["source_segments"] == 0)).all()
    for row in range(4):
        window = corpus.window(3 + row, pack * length, 0)[:-1]
        for segment in range(1, pack + 1):
            source = batch["source"][row][batch["source_segments"][row] == segment].tolist()
            here = batch["target_segments"][row] == segment
            target, shifted = batch["targets"][row][here].tolist(), batch["target_in"][row][here].tolist()
            assert source[-1] == target[-1] == cfg.eos and shifted == [cfg.pad, *target[:-1]]
            ids = window[(segment - 1) * length : segment * length].tolist()
            if denoiser != "iid":
                source = source[1:] if denoiser == "ul2" else source
                found = restore(source[:-1], target[:-1], range(cfg.sentinel - cfg.sentinels + 1, cfg.sentinel + 1))
                assert found == ids[: len(found)] and (denoiser == "ul2" or len(found) == length)


def test_targets_too_long_are_cut_and_end():
    cfg = tiny(denoiser="t5", inputs=64, seq_len=0, targets=5, pack=1)
    batch = t5.get_batch(corpus_of(cfg), 0, 2, cfg)
    assert batch["targets"].shape == (2, 5) and (batch["targets"][:, -1] == cfg.eos).all() and (batch["targets"][:, 0] == cfg.sentinel).all()


def test_corruption_is_of_the_sequence_alone():
    """Another seed, another sequence: another mask; the same: the same."""
    cfg = tiny(inputs=64, seq_len=0, pack=1)
    corpus = stream(cfg, np.zeros(4000))
    rows = [t5.get_batch(corpus, i, 1, c)["source"].tolist() for i, c in ((0, cfg), (1, cfg), (0, dataclasses.replace(cfg, seed=1)), (0, cfg))]
    assert rows[0] != rows[1] and rows[0] != rows[2] and rows[0] == rows[3]


def test_special_tokens_count_down_from_the_last_id():
    cfg = t5.Config(sentinels=100)
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
    t5.fit_vocabulary(cfg, tokenizer)
    assert (cfg.eos, cfg.pad, cfg.mode, cfg.sentinel, tokenizer.n_vocab, cfg.vocab_size) == (256, 257, 258, 360, 361, 384)
    assert tokenizer.decode([360, 359, 261]) == "<extra_id_0><extra_id_1><extra_id_99>" and tokenizer.decode([258, 259, 260]) == "[R][S][X]"


def test_vocabulary_that_belongs_to_another_tokenizer(capsys):
    """Bytes under a published vocabulary: a warning, and no start from its weights; under their own, padded, neither."""
    for vocab_size, warned in ((384, False), (32128, True)):
        cfg = t5.Config(vocab_size=vocab_size)
        tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
        t5.fit_vocabulary(cfg, tokenizer)
        assert ("warning: a vocabulary of 32,128 entries" in capsys.readouterr().out) == warned and cfg.vocab_size == vocab_size
        cfg.init = "some/directory"
        with pytest.raises(ValueError, match="needs the --tokenizer of its 32,128") if warned else contextlib.nullcontext():
            t5.fit_vocabulary(cfg, tokenizer)
    with pytest.raises(ValueError, match="need --tokenizer or --vocab_size"):
        t5.fit_vocabulary(t5.Config(), None)


@pytest.mark.parametrize("legal, ids", [
    (True, dict()), (True, dict(pad=32127, eos=0)), (True, dict(sentinel=99, pad=100, eos=101)), (True, dict(denoiser="ul2", mode=2)),
    (True, dict(mode=32050)), (False, dict(denoiser="ul2", mode=32050)), (False, dict(denoiser="ul2", sentinels=128, sentinel=32127)),
    (False, dict(pad=1)), (False, dict(eos=32000)), (False, dict(sentinel=98, pad=100, eos=101)), (False, dict(sentinel=32128)),
    (False, dict(denoiser="ul2", mode=32126)), (False, dict(pad=-1)), (False, dict(denoiser="ul2", mode=-1)), (False, dict(denoiser="ul2", mode=0)),
])  # fmt: skip
def test_every_special_id_is_one_of_its_own(legal, ids):
    cfg = t5.Config(**{"vocab_size": 32128, **ids})
    if legal:
        t5.fit_vocabulary(cfg, None)
        assert cfg == t5.Config(**{"vocab_size": 32128, **ids})
    else:
        with pytest.raises(ValueError, match=f"{cfg.sentinels} sentinels from --sentinel {cfg.sentinel} down"):
            t5.fit_vocabulary(cfg, None)


@pytest.mark.parametrize("denoiser", ["t5", "iid", "ul2"])
def test_text_may_not_hold_sentinels(denoiser):
    cfg = tiny(denoiser=denoiser, inputs=32, seq_len=0, pack=1)
    for token, legal in ((cfg.sentinel, False), (cfg.sentinel - 18, False), (cfg.sentinel - 19, True), (cfg.sentinel + 1, True)):
        corpus = stream(cfg, np.full(400, token))
        if legal:
            t5.get_batch(corpus, 0, 1, cfg)
        else:
            with pytest.raises(ValueError, match=f"token id {token}, and 19 ids from 360 down are the sentinels: see --sentinel, --tokenizer"):
                t5.get_batch(corpus, 0, 1, cfg)


# Objective


def test_cross_entropy_and_z_loss():
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 10, 5, -100, 5])
    nats, square = t5.CrossEntropyWithZ.apply(logits, targets, None)
    (nats + 0.3 * square).backward()
    mine, logits.grad = logits.grad, None
    log_z = logits.exp().sum(1).log()
    expected = sum(log_z[i] - logits[i, t] for i, t in enumerate(targets) if t >= 0), sum(log_z[i] ** 2 for i, t in enumerate(targets) if t >= 0)
    assert nats.item() == pytest.approx(expected[0].item()) and square.item() == pytest.approx(expected[1].item())
    (expected[0] + 0.3 * expected[1]).backward()
    torch.testing.assert_close(mine, logits.grad)


def test_first_loss_on_random_tokens():
    """Logits of a softmax of its own are N(0, 0.88²) and know nothing of random targets: ln V and half their variance. A tied
    one also finds the token that goes in likely."""
    cfg = tiny(tied=False, dim=200, vocab_size=2000, z_loss=0.0)
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    source, target = torch.randint(2000, (2, 96, 20), generator=torch.Generator().manual_seed(0))
    batch = dict(source=source, target_in=target, targets=target.roll(-1, 1), n_targets=target.numel())
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(math.log(2000) + 0.8796**2 / 2, abs=0.06)


def test_validation_is_without_z():
    cfg = tiny(z_loss=0.5)
    model, batch = make(cfg), t5.get_batch(corpus_of(tiny()), 0, 4, cfg)
    names = [name for name in ("source", "target_in", "source_segments", "target_segments") if name in batch]
    logits = model(*(batch[name] for name in names)).detach()
    nats = F.cross_entropy(logits.flatten(0, 1).double(), batch["targets"].flatten()).item()
    counted = (batch["targets"] >= 0).flatten()
    z = (logits.flatten(0, 1)[counted].double().logsumexp(1) ** 2).mean().item()
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(nats + 0.5 * z, rel=1e-6)
    with torch.no_grad():
        assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(nats, rel=1e-6)


# Optimizer


def test_adafactor_of_the_specification():
    p = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    model = torch.nn.Module()
    model.up, model.tp = torch.nn.Linear(2, 2, bias=False), None
    model.up.weight = p
    optimizer = t5.build_optimizer(model, t5.Config())
    after = ([[0.97878680, 2.03], [2.97153950, 3.97316718]], [[0.96450354, 2.01042023], [2.99419044, 3.94987946]])
    for g, expected in zip(([[0.1, -0.2], [0.3, 0.4]], [[0.05, 0.1], [-0.2, 0.3]]), after):
        p.grad = torch.tensor(g)
        optimizer.step()
        torch.testing.assert_close(p.data, torch.tensor(expected), rtol=0, atol=1e-6)


def test_adafactor_leaves_a_row_without_gradient_alone():
    """As of a token that does not occur: torch's own bound of 1e-30 would make it not a number."""
    model = torch.nn.Module()
    model.token_embedding, model.tp = torch.nn.Embedding(4, 3), None
    optimizer = t5.build_optimizer(model, t5.Config())
    before = model.token_embedding.weight.detach().clone()
    model.token_embedding.weight.grad = torch.tensor([[1.0, 2, 3], [0, 0, 0], [1e-6, 1e-7, 1e-8], [1, 1, 1]])
    optimizer.step()
    assert torch.equal(model.token_embedding.weight[1], before[1]) and model.token_embedding.weight.isfinite().all()
    assert not torch.equal(model.token_embedding.weight[2], before[2])


def adafactor_on_two_ranks(steps):
    """Three updates of matrices that are cut along either side, of one that is not, and of a gain, as whole tensors."""
    t5.init_distributed(30)
    rank, size, group = t5.dist.get_rank(), t5.dist.get_world_size(), t5.dist.group.WORLD
    draw = torch.Generator().manual_seed(0)
    names = {"up.weight": (6, 4), "down.weight": (4, 6), "other.weight": (3, 5), "norm.weight": (5,), "gate.weight": (6, 4)}
    scales = {"gate.weight": 1e-4}  # less than eps2, which bounds the size of an update from below
    cut = {name: t5.tensor_dimension(name) for name in names}
    part = lambda name, x: x.chunk(size, cut[name])[rank].clone() if size > 1 and cut[name] is not None else x  # noqa: E731
    parameters = {name: torch.nn.Parameter(part(name, scales.get(name, 1) * torch.randn(shape, generator=draw))) for name, shape in names.items()}
    settings = dict(lr=0.9, eps=(2e-19, 1e-3))  # more than the bound t^-1/2 of the second update on
    optimizer = torch.optim.Adafactor(parameters.values(), **settings) if size == 1 else t5.ShardedAdafactor(parameters.items(), group, **settings)
    for step in range(steps):
        for name, p in parameters.items():
            gradient = torch.randn(names[name], generator=draw) * 10.0 ** torch.randint(-3, 1, names[name], generator=draw)
            gradient[0] *= step > 0  # a row without gradient at first
            p.grad = part(name, gradient)
        optimizer.step()
    return {name: t5.whole_tensor(name, p.data, group if size > 1 else None) for name, p in parameters.items()}


def test_adafactor_of_parts_is_that_of_the_whole(ranks):
    (expected,) = ranks.run(1, adafactor_on_two_ranks, 3)
    for found in ranks.run(2, adafactor_on_two_ranks, 3):
        for name, whole in expected.items():
            torch.testing.assert_close(found[name], whole, rtol=2e-6, atol=2e-6)
    small = expected["gate.weight"].square().mean().sqrt()
    assert 1e-3 < small < 3e-3, "a bound of 1e-3 times rates of 0.9, 0.71 and 0.58"


def test_learning_rate():
    paper = t5.Config(**t5.PRESETS["baseline"])
    rates = [t5.learning_rate(n, paper) for n in (0, 5000, 9999, 39_999, 524_287)]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.005, 1 / math.sqrt(2**19)])
    glu = dataclasses.replace(paper, ramp_down=0.1)
    ramp = [t5.learning_rate(n, glu) * math.sqrt(n + 1) for n in (400_000, 2**19 - 2**19 // 20, 2**19 - 1)]
    assert ramp == pytest.approx([1, 0.5, 10 / 2**19], rel=1e-4)


# Weights


def test_initialisation():
    cfg = t5.Config(vocab_size=1000, dim=200, n_layers=2, n_heads=6, head_dim=25, hidden_dim=300, gated=True, tied=False)
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    expected = {"token_embedding": 1.0, "q": (200 * 25) ** -0.5, "k": 200**-0.5, "v": 200**-0.5, "out": 150**-0.5, "gate": 200**-0.5,
                "up": 200**-0.5, "down": 300**-0.5, "head": 200**-0.5}  # fmt: skip
    for name, p in ((name, p.detach()) for name, p in model.named_parameters()):
        kind = name.split(".")[-2]
        if kind == "per_head":
            limit = math.sqrt(6 / (6 + 32))
            assert 0.9 * limit < p.abs().max() <= limit and p.std() == pytest.approx(limit / math.sqrt(3), rel=0.15)
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            cut = kind in ("gate", "up", "down", "head")  # at two sigma, which takes an eighth off
            assert p.std().item() == pytest.approx(expected[kind] * (0.8796 if cut else 1), rel=0.02), name
            assert (p.abs().max() <= 2 * expected[kind] * 1.0001) == cut, name
    again = t5.T5(cfg)
    t5.init_weights(again, cfg)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_dropout_falls_where_the_code_has_it(monkeypatch):
    seen, shapes = [], []
    dropout, attend = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(t5.F, "dropout", lambda x, p, training: (seen.append((p, training)), shapes.append(tuple(x.shape)), dropout(x, p, training))[2])
    crossed = []
    monkeypatch.setattr(t5.F, "scaled_dot_product_attention", lambda *args, **more: (crossed.append(args[4]), attend(*args, **more))[1])
    cfg = tiny(dropout=0.25)
    model = make(cfg).train()
    model(torch.randint(250, (2, 9)), torch.randint(250, (2, 5)))
    assert set(seen) == {(0.25, True)} and crossed == [0.25] * cfg.n_layers
    D, H, hidden = cfg.dim, cfg.n_heads, cfg.hidden_dim
    assert shapes.count((2, 9, D)) == 2 + 2 * cfg.n_layers and shapes.count((2, 5, D)) == 2 + 3 * cfg.n_layers
    assert shapes.count((2, H, 9, 9)) == shapes.count((2, H, 5, 5)) == cfg.n_layers
    assert shapes.count((2, 9, hidden)) == shapes.count((2, 5, hidden)) == cfg.n_layers


@pytest.mark.parametrize("preset, tied, count", [
    ("t5_large", False, 770_567_168), ("v1_1_small", True, 60_511_616), ("v1_1_base", True, 222_903_552), ("v1_1_large", True, 750_251_008),
    ("v1_1_xl", True, 2_783_959_040), ("v1_1_xxl", True, 11_003_736_064),
])  # fmt: skip
def test_counts_with_the_softmax_tied_the_other_way(preset, tied, count):
    with torch.device("meta"):
        assert t5.count_parameters(t5.T5(t5.Config(**t5.PRESETS[preset] | dict(tied=tied))))[0] == count


def test_presets_are_the_papers_tables():
    for name, batch, steps in (("baseline", 2**16, 2**19), ("2x", 2**16, 2**19), ("t5_11b", 2**20, 10**6), ("v1_1_xl", 2**20, 10**6)):
        cfg = t5.Config(**t5.PRESETS[name])
        assert cfg.denoiser == ("iid" if steps == 2**19 else "t5")
        assert cfg.batch_size * cfg.inputs == batch and cfg.steps == steps and cfg.lr == 0.01 and cfg.z_loss == 1e-4
        assert cfg.micro_batch * cfg.inputs == 2048 and cfg.dropout == (0.0 if "v1" in name else 0.1)


def test_flops_are_those_of_the_matrix_products(monkeypatch):
    """The counter sees the full square of the decoder's attention, flops_per_token half of it and the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know the device meta
    for gated in (False, True):
        cfg = tiny(gated=gated, tied=not gated, inputs=64, seq_len=0, pack=1)
        length, T, U = t5.row_lengths(cfg)
        with torch.device("meta"):
            model = t5.T5(cfg)
            inputs = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, U, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(*inputs).sum().backward()
        unseen = 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * U * (U - (U + 1) / 2) / length
        assert counter.get_total_flops() / (2 * length) == pytest.approx(t5.flops_per_token(cfg) + unseen)


@pytest.mark.parametrize("overrides", [dict(), dict(gated=True, tied=False), dict(precision="bf16"), dict(recompute="block")])
def test_activation_bytes(overrides):
    """memory_per_rank against what autograd keeps, at a size where statistics and weights are small."""
    cfg = tiny(**{"dim": 96, "head_dim": 40, "hidden_dim": 320, "inputs": 64, "seq_len": 0, "pack": 1, "batch_size": 8, "dp": 1, **overrides})
    model, kept = t5.parallelize(make(cfg).train(), cfg, None), {}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}  # theirs, or casts of them

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = t5.get_batch(corpus_of(cfg), 0, 8, cfg)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        t5.objective(model, batch, cfg)
    expected = t5.memory_per_rank(cfg)["activations"]
    if cfg.recompute == "block":  # the block that backward will recompute is not there yet
        one, two = (t5.memory_per_rank(dataclasses.replace(cfg, recompute="none", n_layers=n))["activations"] for n in (1, 2))
        expected += one - two
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.03)


# Layouts


def corpora_for(cfg):
    """Made-up documents, joined as main joins them."""
    texts = ("".join(chr(97 + (i * k) % 26) for k in range(3 + 37 * i % 40)) for i in range(400))
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS)
    documents = t5.tokenize(((str(i), text) for i, text in enumerate(texts)), tokenizer, cfg.eos)
    cfg.seq_len = cfg.pack * t5.row_lengths(cfg)[0]
    documents = ((name, ids[:-1]) for name, ids in documents)
    return t5.load_corpora([], documents, tokenizer, -1, cfg.vocab_size, cfg.batch_size, cfg.seq_len)


def on_ranks(overrides, updates):
    """(loss, whole gradients, norm, whole parameters after `updates` updates) as the script computes them on this rank."""
    device = t5.init_distributed(30)
    cfg = t5.mesh_shape(tiny(**overrides), t5.dist.get_world_size())
    corpus, _ = corpora_for(cfg)
    mesh = t5.init_device_mesh("cpu", (cfg.dp, cfg.tp), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"].get_group() if cfg.tp > 1 else None
    values, model = dict(make(cfg).named_parameters()), t5.T5(cfg, tp)
    for name, p in model.named_parameters():
        t5.fill(name, p, values[name].detach(), tp)
    replicas, optimizer = t5.parallelize(model, cfg, mesh), t5.build_optimizer(model, cfg)
    gradients, clear = [], optimizer.zero_grad

    def zero_grad():
        gradients.append({name: t5.whole_tensor(name, p.grad, tp).clone() for name, p in model.named_parameters()})
        clear()

    optimizer.zero_grad, found = zero_grad, []
    for step in range(updates):
        batches = t5.read_batch(corpus, 3 + 8 * step, cfg, device, mesh["dp"].get_local_rank(), cfg.dp)
        t5.sum_counts(batches, cfg.dp)
        found.append(t5.mesh_step(model, replicas, optimizer, batches, cfg.lr, cfg))
    loss, norm = found[0]
    return loss, gradients[0], norm, {name: t5.whole_tensor(name, p.data, tp) for name, p in model.named_parameters()}


@functools.cache
def reference(overrides, updates):
    """The same by one model, a plain loss and torch's optimizer over one batch."""
    cfg = tiny(**dict(overrides))
    corpus, _ = corpora_for(cfg)
    model = make(cfg)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=cfg.lr, eps=(2e-19, 1e-3))
    for step in range(updates):
        batch = t5.get_batch(corpus, 3 + 8 * step, 8, cfg)
        names = [name for name in ("source", "target_in", "source_segments", "target_segments") if name in batch]
        logits = model(*(batch[name] for name in names)).flatten(0, 1)
        targets = batch["targets"].flatten()
        log_z = logits.logsumexp(1)[targets >= 0]
        loss = F.cross_entropy(logits, targets) + cfg.z_loss * log_z.square().mean()
        model.zero_grad()
        loss.backward()
        if step == 0:
            first = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return *first, {name: p.data for name, p in model.named_parameters()}


UNTIED = dict(gated=True, tied=False, denoiser="ul2", inputs=34, seq_len=0, pack=1)
LAYOUTS = [
    (1, dict(micro_batch=2)), (2, dict(tp=2)), (2, dict(dp=2)), (2, dict(dp=2, micro_batch=1)), (4, dict(tp=2, dp=2)), (4, dict(tp=4)),
    (2, dict(tp=2, **UNTIED)), (4, dict(tp=2, dp=2, micro_batch=2, **UNTIED)), (2, dict(tp=2, recompute="block")), (4, dict(dp=4, denoiser="iid")),
]  # fmt: skip


@pytest.mark.parametrize("n, overrides", LAYOUTS)
def test_layout_gives_one_ranks_gradients_and_updates(ranks, n, overrides):
    model = tuple((k, v) for k, v in overrides.items() if k not in ("tp", "dp", "micro_batch", "recompute"))
    expected_loss, gradients, after = reference(model, 2)
    largest = max(g.abs().max() for g in gradients.values())
    whole = math.sqrt(sum(g.double().square().sum() for g in gradients.values()))
    for loss, found, norm, parameters in ranks.run(n, on_ranks, overrides, 2):
        assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(whole, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, g in gradients.items():
            assert (found[name] - g).abs().max() <= 1e-5 * max(g.abs().max(), 1e-3 * largest), name
            assert (parameters[name] - after[name]).abs().max() <= 3e-4 * after[name].abs().max(), name


def sample_on_ranks(cfg):
    """What sample gives for one source on this rank."""
    t5.init_distributed(30)
    size, group = t5.dist.get_world_size(), t5.dist.group.WORLD
    values, model = dict(make(cfg, 3.0).named_parameters()), t5.T5(cfg, group if size > 1 else None)
    for name, p in model.named_parameters():
        t5.fill(name, p, values[name].detach(), model.tp)
    return t5.sample(model, [5, 6, 7, 200, cfg.eos], 6, cfg)


def test_sample_is_the_same_on_two_ranks(ranks):
    cfg = tiny(tied=False)
    (expected,) = ranks.run(1, sample_on_ranks, cfg)
    assert len(expected) >= 1 and ranks.run(2, sample_on_ranks, cfg) == [expected, expected]


def copied_after(flags):
    """The parameters that all ranks of tp have in full, after a run of the script."""
    models, describe = [], t5.describe_run
    t5.describe_run = lambda model, *rest: models.append(model)
    try:
        status, _, err = run_main("t5", flags)
    finally:
        t5.describe_run = describe
    assert not status, err
    return {name: p.detach().clone() for name, p in models[0].named_parameters() if t5.tensor_dimension(name) is None}


def test_ranks_of_tp_drop_the_same(ranks, text):
    """What each of them has in full stays equal, bit for bit; without the same masks its gradients would differ."""
    one, two = ranks.run(2, copied_after, flags_of(text, tp=2, dropout=0.1, steps=2), timeout=120)
    assert len(one) == 2 * 2 + 2 * 3 + 2 and all((p != 1).any() for p in one.values())  # gains, of two blocks a stack
    assert all(torch.equal(p, two[name]) for name, p in one.items())


# Hugging Face


def golden(model, names):
    """tensor k flat j = 0.1 sin(0.37 j + k), + 1 for gains, in the order of Hugging Face's parameters."""
    found = {t5.t5_name(name, model.gated): p for name, p in model.named_parameters()}
    assert set(names) == set(found)
    for k, name in enumerate(names):
        p = found[name]
        shape = p.shape[::-1] if "relative" in name else p.shape  # [buckets, H] there
        values = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + k).view(shape) + (p.ndim == 1)
        p.data = values.T.contiguous() if "relative" in name else values


def hf_order(gated):
    ff = ["wi_0", "wi_1", "wo"] if gated else ["wi", "wo"]
    names = ["shared.weight"]
    for stack, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for i in range(2):
            for layer, kind in enumerate(kinds):
                here = f"{stack}.block.{i}.layer.{layer}"
                names += [f"{here}.{kind}.{w}.weight" for w in "qkvo"]
                names += [f"{here}.{kind}.relative_attention_bias.weight"] * (i == layer == 0)
                names.append(f"{here}.layer_norm.weight")
            here = f"{stack}.block.{i}.layer.{len(kinds)}"
            names += [f"{here}.DenseReluDense.{w}.weight" for w in ff] + [f"{here}.layer_norm.weight"]
        names.append(f"{stack}.final_layer_norm.weight")
    return names + ["lm_head.weight"] * gated


@pytest.mark.parametrize("gated, loss, logits, z", [
    (False, 4.8243751, [0.0917766, -0.0080138, -0.0936643], 0.0023563), (True, 4.5082590, [0.7332990, 0.6078949, -0.5901020], 0.0025440)])  # fmt: skip
def test_golden_values(gated, loss, logits, z):
    cfg = t5.Config(vocab_size=128, dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=128, dropout=0.0, gated=gated, tied=not gated)
    assert t5.count_parameters(t5.T5(cfg))[0] == (214_016 if gated else 173_056)
    model = t5.T5(cfg).double().eval()
    model.gated = gated
    golden(model, hf_order(gated))
    source = ((torch.arange(24) * 7 + 3) % 120 + 2).view(2, 12)
    labels = ((torch.arange(12) * 5 + 1) % 120 + 2).view(2, 6)
    labels[1, 5] = -100
    target_in = torch.cat((torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]), 1)
    segments = torch.ones(2, 12, dtype=torch.long)
    segments[1, 9:] = 0
    batch = dict(source=source, target_in=target_in, targets=labels, n_targets=11, source_segments=segments, target_segments=torch.ones(2, 6, dtype=torch.long))
    found = model(source, target_in, segments, batch["target_segments"])
    assert found[0, 0, :3].tolist() == pytest.approx(logits, rel=1e-5, abs=1e-7)
    with torch.no_grad():
        assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(loss, rel=1e-5)
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(loss + z, rel=1e-5)
    assert t5.objective(model, batch, cfg)[0].item() - t5.objective(model, batch, dataclasses.replace(cfg, z_loss=0.0))[0].item() == pytest.approx(z, rel=1e-3)


@pytest.fixture(params=[False, True], ids=["v1.0", "v1.1"])
def peer(request, tmp_path):
    """(our model, Hugging Face's as it reads what we write, Config)."""
    transformers = pytest.importorskip("transformers")
    cfg = tiny(gated=request.param, tied=not request.param, seq_len=0, inputs=32)
    ours = make(cfg)
    t5.to_hf(ours, cfg, tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    if request.param:  # transformers 5 ties all T5 models
        theirs.lm_head.weight = torch.nn.Parameter(ours.head.weight.detach().clone())
    return ours, theirs, cfg


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_loss_and_gradients_are_hugging_faces(peer, tmp_path):
    ours, theirs, cfg = peer
    draw = torch.Generator().manual_seed(0)
    source, labels = torch.randint(250, (3, 140), generator=draw), torch.randint(250, (3, 130), generator=draw)  # beyond the last bucket
    target_in = torch.cat((torch.full((3, 1), cfg.pad), labels[:, :-1]), 1)
    expected = theirs(input_ids=source, labels=labels)
    close(ours(source, target_in), expected.logits)
    batch = dict(source=source, target_in=target_in, targets=labels, n_targets=labels.numel())
    loss, _ = t5.objective(ours, batch, dataclasses.replace(cfg, z_loss=0.0))
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    found = {t5.t5_name(name, cfg.gated): p.grad for name, p in ours.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, g in found.items():
        close(g.T if "relative" in name else g, gradients[name])


def test_reads_what_hugging_face_writes(peer, tmp_path, capsys):
    ours, theirs, cfg = peer
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.1)
    if cfg.gated:  # what it writes is tied all the same
        theirs.lm_head.weight = theirs.shared.weight
    theirs.save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    read, found = t5.from_hf(tmp_path / "theirs")
    assert ("holds no lm_head.weight: the softmax begins as the embedding" in capsys.readouterr().out) == cfg.gated
    assert {k: getattr(found, k) for k in t5.HF_CONFIG} == {k: getattr(cfg, k) for k in t5.HF_CONFIG}
    source, target = torch.randint(250, (2, 20)), torch.randint(250, (2, 10))
    close(read.eval()(source, target), theirs(input_ids=source, decoder_input_ids=target).logits)


def test_writes_and_reads_its_own(tmp_path):
    pytest.importorskip("safetensors")
    cfg = tiny(gated=True, tied=False)
    ours = make(cfg)
    t5.to_hf(ours, cfg, tmp_path)
    read, _ = t5.from_hf(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), read.parameters()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["decoder_start_token_id"], config["eos_token_id"]) == (cfg.pad, cfg.eos)
    for wrong in (dict(feed_forward_proj="gelu"), dict(model_type="mt5"), dict(num_decoder_layers=9)):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=f"holds no T5For.*{next(iter(wrong))}"):
            t5.from_hf(tmp_path)


# The command line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    return str(path)


def flags_of(text, **more):
    flags = {"preset": "demo", "data": text, "val_batches": 1, "log_every": 1, "timeout": 30, "dim": 48, "hidden_dim": 64, "batch_size": 4,
             "inputs": 64, "lr": 0.03, "steps": 3, **more}  # fmt: skip
    return [f"--{flag}={value}" for flag, value in flags.items()]


@pytest.fixture
def main(capsys):
    """main(*flags): stdout of the script in this process."""

    def call(*flags):
        t5.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return call


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return list({row["step"]: row["loss"] for row in rows if "loss" in row}.values())  # the last of a step counts


@pytest.fixture
def together(ranks):
    """together(n, *flags): stdout of the script on n ranks."""

    def call(n, *flags):
        (status, out, err), *others = ranks.run(n, run_main, "t5", [str(flag) for flag in flags], timeout=120)
        assert status == 0 and not any(other[0] for other in others), (err, *(other[2] for other in others))
        return out

    return call


@pytest.mark.parametrize("denoiser", ["t5", "iid", "ul2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_thirty_steps_of_each_denoiser(main, text, tmp_path, denoiser, precision):
    main(*flags_of(text, denoiser=denoiser, precision=precision, steps=30, recompute="block" if precision == "bf16" else "none", out=tmp_path))
    found = losses(tmp_path)
    assert found[0] - sum(found[-5:]) / 5 > 1.5 and len(found) == 30


def test_training_is_the_plain_loop(main, text, tmp_path):
    """Three updates against torch's optimizer on a plain loss over plain batches: data, rate, clipping, z-loss and the val line."""
    out = main(*flags_of(text, clip=0.1, micro_batch=2, z_loss=0.1, ramp_down=0.7, out=tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    fingerprint, cfg = config.pop("data_fingerprint"), t5.Config(**config)
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
    documents = [(name, tokenizer.encode_to_numpy(words).astype(np.uint16)) for name, words in t5.read_documents(text, t5.find_files(text)[0])]
    corpus, heldout = t5.load_corpora([], documents, tokenizer, -1, cfg.vocab_size, 4, cfg.seq_len)
    assert corpus.fingerprint() == fingerprint
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    optimizer = torch.optim.Adafactor(model.parameters(), eps=(2e-19, 1e-3))

    def loss_of(batch, z):
        logits = model(*(batch[name] for name in ("source", "target_in", "source_segments", "target_segments") if name in batch)).flatten(0, 1)
        targets = batch["targets"].flatten()
        return F.cross_entropy(logits, targets) + z * logits.logsumexp(1)[targets >= 0].square().mean()

    for step in range(3):
        loss = loss_of(t5.get_batch(corpus, 4 * step, 4, cfg), 0.1)
        assert loss.item() == pytest.approx(losses(tmp_path)[step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.param_groups[0]["lr"] = 0.03 * min(1, (3 - step) / 2.1)
        optimizer.step()
    expected = loss_of(t5.get_batch(heldout, 0, 4, cfg), 0.0).item()
    assert float(re.search(r"val 3 \| loss ([\d.]+)", out)[1]) == pytest.approx(expected, abs=5e-4)


def test_layouts_give_the_same_run_and_resume_from_it(together, text, tmp_path):
    """tp, dp and both, against one rank; a run stopped half-way and resumed, bit for bit; the export and its init."""
    pytest.importorskip("safetensors")
    flags = dict(steps=6, ramp_down=0)
    for n, layout in ((1, {}), (2, dict(tp=2)), (4, dict(tp=2, dp=2, micro_batch=1))):
        folder = tmp_path / "".join(f"{k}{v}" for k, v in layout.items())
        exported = flags | dict(export=tmp_path / "hf") if not layout else flags | dict(export=folder / "hf")
        out = together(n, *flags_of(text, out=folder / "a", **exported, **layout))
        assert f"tp {layout.get('tp', 1)} x dp {n // layout.get('tp', 1)}" in out and "⟦" in out
        if not layout:
            first, val = losses(folder / "a"), float(re.search(r"val 6 \| loss ([\d.]+)", out)[1])
            continue
        assert losses(folder / "a") == pytest.approx(first, rel=2e-3)
        together(n, *flags_of(text, out=folder / "b", **{**flags, "steps": 3}, **layout))
        again = together(n, *flags_of(text, out=folder / "b", **flags, **layout), "--resume")
        assert losses(folder / "b") == losses(folder / "a") and again.split("val 6")[1] == out.split("val 6")[1]
    folders = [tmp_path / "hf", tmp_path / "tp2" / "hf"]
    (one, _), (two, _) = map(t5.from_hf, folders)
    assert all((a - b).abs().max() < 0.02 * b.abs().max() for a, b in zip(two.parameters(), one.parameters()))
    out = together(1, *flags_of(text, steps=1, init=tmp_path / "hf", tokenizer="bytes"), "--dim=8")
    assert float(re.search(r"val 0 \| loss ([\d.]+)", out)[1]) == pytest.approx(val, abs=5e-3)
    together(1, *flags_of(text, steps=1, init=tmp_path / "hf", tokenizer="bytes", dropout=0.25, out=tmp_path / "dropped"))
    assert json.loads((tmp_path / "dropped" / "config.json").read_text())["dropout"] == 0.25, "not the directory's"
    sharded = together(2, *flags_of(text, steps=1, init=tmp_path / "hf", tokenizer="bytes", tp=2))
    assert re.search(r"val 0 \| loss ([\d.]+)", sharded)[1] == re.search(r"val 0 \| loss ([\d.]+)", out)[1]


def test_fills_in_the_prompt(monkeypatch, capsys):
    """Sentinels of the user's own, or spans that are hidden; what the model says stands in its place."""
    cfg = t5.Config(inputs=64, sentinels=100)
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
    t5.fit_vocabulary(cfg, tokenizer)
    heldout = stream(cfg, np.frombuffer(b"the held-out text " * 99, np.uint8))
    answers = [*b"lost", cfg.sentinel, *b"old", cfg.sentinel - 1, 380, *b"son", cfg.pad, cfg.eos]
    seen = []
    monkeypatch.setattr(t5, "sample", lambda model, source, n, cfg: (seen.append(source), answers)[1])
    t5.fill_spans(None, "an <extra_id_0> man and his <extra_id_1>.", heldout, tokenizer, cfg)
    assert capsys.readouterr().out == "an <extra_id_0> man and his <extra_id_1>.\n---\nan ⟦old⟧ man and his ⟦son⟧.\n"
    assert seen[0] == [*b"an ", cfg.sentinel, *b" man and his ", cfg.sentinel - 1, *b".", cfg.eos]
    for prompt in ("", "to be or not to be, that is a question of some age"):
        t5.fill_spans(None, prompt, heldout, tokenizer, cfg)
        corrupted, filled = capsys.readouterr().out.split("\n---\n")
        spans = corrupted.count("<extra_id_")
        expected = corrupted.replace("<extra_id_0>", "⟦old⟧").replace("<extra_id_1>", "⟦son⟧")
        assert spans >= 2 and filled == re.sub(r"<extra_id_\d+>", "⟦⟧", expected) + "\n"


def test_prompts_of_any_length_and_denoiser(monkeypatch, capsys):
    """UL2's own mode before sentinels that are given; a line about what does not fit; a single token, of which nothing is hidden."""
    cfg = t5.Config(inputs=64, sentinels=100, denoiser="ul2")
    tokenizer = t5.load_tokenizer("bytes", t5.SPECIALS + t5.sentinel_names(cfg))
    t5.fit_vocabulary(cfg, tokenizer)
    heldout, seen = stream(cfg, np.zeros(9999)), []
    monkeypatch.setattr(t5, "sample", lambda model, source, n, cfg: (seen.append(source), [cfg.eos])[1])
    for denoiser in ("t5", "iid", "ul2"):
        cfg.denoiser = denoiser
        mode = [cfg.mode] * (denoiser == "ul2")
        t5.fill_spans(None, "a <extra_id_0>", heldout, tokenizer, cfg)
        assert seen[-1] == [*mode, *b"a ", cfg.sentinel, cfg.eos] and "--prompt" not in capsys.readouterr().out
        t5.fill_spans(None, "<extra_id_0>" + "b" * 99, heldout, tokenizer, cfg)
        assert seen[-1] == [*mode, cfg.sentinel, *b"b" * (62 - len(mode)), cfg.eos]
        assert f"--prompt has 100 tokens, and a row takes the first {63 - len(mode)}\n" in capsys.readouterr().out
        t5.fill_spans(None, "x", heldout, tokenizer, cfg)
        assert seen[-1] == [*b"x", cfg.eos] and capsys.readouterr().out == "x\n---\nx\n"
        length = t5.row_lengths(cfg)[0]
        for n in (2, length, length + 1):
            t5.fill_spans(None, "y" * n, heldout, tokenizer, cfg)
            assert len(seen[-1]) <= 64
            assert ("--prompt has" in capsys.readouterr().out) == (n > length)


def test_worlds_of_no_ranks_and_prompts_of_no_tokenizer(text, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.ones(9999, np.uint16))
    for flags, message in (
        (["--dry_run", "--world_size=0"], "not 0 ranks"), (["--dry_run", "--world_size=-2"], "not -2 ranks"), (["--world_size=0"], "--world_size 0"),
        ([f"--data={tmp_path}/ids.npy", "--vocab_size=32128", "--prompt=some text"], "--prompt needs --tokenizer"),
    ):  # fmt: skip
        status, _, err = run_main("t5", ["--preset=demo", *flags])
        assert status == 2 and message in err and err.count("\n") == 1


def test_greedy_sample_is_the_argmax_of_the_model():
    cfg = tiny()
    model, source = make(cfg), [5, 6, 7, cfg.eos]
    ids = t5.sample(model, source, 4, cfg)
    logits = model(torch.tensor([source]), torch.tensor([[cfg.pad, *ids[:-1]]]))[0]
    assert ids == logits.argmax(-1).tolist() and (len(ids) == 4 or ids[-1] == cfg.eos)


@pytest.mark.parametrize("legal, change", [
    (True, dict()), (True, dict(decoder_start_token_id="left out")), (True, dict(decoder_start_token_id=None)), (True, dict(num_decoder_layers="left out")),
    (True, dict(model_type="left out")), (True, dict(feed_forward_proj="left out")), (True, dict(relative_attention_num_buckets="left out")),
    (False, dict(decoder_start_token_id=0)), (False, dict(model_type="bart")), (False, dict(layer_norm_epsilon=1e-5)), (False, dict(num_decoder_layers=3)),
    (False, dict(feed_forward_proj="gelu")), (False, dict(d_model="left out")), (False, dict(num_heads=5)),
])  # fmt: skip
def test_configs_of_other_models(tmp_path, legal, change):
    """What this script does not do is refused by name; what is left out has the default of Hugging Face's class."""
    pytest.importorskip("safetensors")
    cfg = t5.Config(vocab_size=128, dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=128, pad=5)
    t5.to_hf(t5.T5(cfg), cfg, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))
    if legal:
        read, tensors = t5.read_t5(tmp_path)
        assert {k: getattr(read, k) for k in t5.SHAPE} == {k: getattr(cfg, k) for k in t5.SHAPE} and len(tensors) > 40
    else:
        (name,) = change
        named = "shape of" if name in ("d_model", "num_heads") else name
        with pytest.raises(ValueError, match=f"holds no T5ForConditionalGeneration: ValueError: .*{named}"):
            t5.read_t5(tmp_path)


def test_reads_the_files_that_the_index_names(tmp_path):
    """Hugging Face's order: model.safetensors, else those of the index; a file beside them counts nothing."""
    from_file = pytest.importorskip("safetensors.torch")
    cfg = tiny()
    t5.to_hf(make(cfg), cfg, tmp_path)
    tensors = from_file.load_file(tmp_path / "model.safetensors")
    half = len(tensors) // 2
    parts = {"a.safetensors": dict(list(tensors.items())[:half]), "b.safetensors": dict(list(tensors.items())[half:])}
    for name, part in parts.items():
        from_file.save_file(part, tmp_path / name)
    from_file.save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, tmp_path / "c.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read, _ = t5.from_hf(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), make(cfg).parameters()))


def test_another_batch_goes_on_in_the_data_and_another_tp_is_refused(main, text, tmp_path, monkeypatch):
    """A resumed run ends at the sequences of its first start, unless --steps is given anew."""
    flags = flags_of(text, out=tmp_path, ramp_down=0)
    main(*flags)
    firsts, get_batch = [], t5.get_batch

    def recorded(corpus, first, n, cfg):
        firsts.extend([first] * (not corpus.in_order))
        return get_batch(corpus, first, n, cfg)

    monkeypatch.setattr(t5, "get_batch", recorded)
    flags = [flag for flag in flags if "steps" not in flag and "batch_size" not in flag]
    out = main(*flags, "--resume", "--batch_size=6", "--steps=4")
    assert firsts[:2] == [12, 18] and "val 5" in out and len(losses(tmp_path)) == 5, "12 of 24 sequences, then 6 an update"
    out = main(*flags, "--resume", "--batch_size=8")
    assert "val 5" in out and len(losses(tmp_path)) == 5, "as planned"
    status, _, err = run_main("t5", [*flags, "--resume", "--batch_size=8", "--seed=1"])
    assert status == 2 and "has seed 0, and this run 1" in err and err.count("\n") == 1
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"tp": 1', '"tp": 2'))
    status, _, err = run_main("t5", [*flags, "--resume", "--batch_size=8"])
    assert status == 2 and "has tp 2, and this run 1" in err and err.count("\n") == 1


def test_eval_validates_and_fills_in_without_training(main, text, tmp_path):
    pytest.importorskip("safetensors")
    out = main(*flags_of(text, out=tmp_path / "run", export=tmp_path / "hf"))
    before = sorted((path, path.stat().st_mtime) for path in (tmp_path / "run").rglob("*"))
    for source in (["--out", tmp_path / "run"], ["--init", tmp_path / "hf"]):
        found = main(*flags_of(text), "--eval", *source, "--prompt", "line <extra_id_0> says")
        assert re.search(r"val \d \| (.*)", found)[1] == re.search(r"val 3 \| (.*)", out)[1] and "line ⟦" in found and "step 1/" not in found
    assert sorted((path, path.stat().st_mtime) for path in (tmp_path / "run").rglob("*")) == before
    status, _, err = run_main("t5", flags_of(text, export=tmp_path / "hf"))
    assert status == 2 and "hf is not empty" in err


def test_dry_run_plans_what_adafactor_holds():
    """Sums of rows and columns instead of a second moment for each weight, against a real optimizer."""
    cfg = t5.mesh_shape(tiny(), 1)
    model = make(cfg).train()
    optimizer = t5.build_optimizer(model, cfg)
    t5.objective(model, t5.get_batch(corpus_of(cfg), 0, 8, cfg), cfg)[0].backward()
    optimizer.step()
    held = sum(4 * value.numel() for state in optimizer.state.values() for key, value in state.items() if key != "step")
    planned = t5.memory_per_rank(cfg)
    assert planned["optimizer"] == held and planned["parameters"] == 4 * t5.count_parameters(model)[0]
    assert t5.memory_per_rank(dataclasses.replace(cfg, tp=2))["parameters"] < 0.52 * planned["parameters"]
