"""BERT and ELECTRA: the specification's worked examples and golden values, the builder of pairs and masks against a plain
re-implementation, layouts, parity with Hugging Face, and what users can get wrong."""
import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import random
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import global_batch, make_model, run_main

ROW = dataclasses.replace(SCRIPTS["bert"], model="build_model")
TINY = ROW.tiny
RTD = dict(objective="rtd", embedding_dim=20, generator_divisor=3, hidden_dim=90)


@pytest.fixture(scope="module")
def bert():
    return importlib.import_module("bert")


@pytest.fixture
def main(bert, monkeypatch, capsys):
    """main(*flags) -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(bert, "signal", lambda *_: None)

    def call(*flags):
        status = 0
        try:
            bert.main([str(flag) for flag in flags])
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())

    return call


def small(**more):
    flags = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, **ROW.small, **more}
    return [f"--{flag}={value}" for flag, value in flags.items()]


def made_up_corpora(module, cfg, n=80):
    """Documents of one to nine sentences of one to twenty letters."""
    rng = random.Random(5)
    documents = [(f"{i}", ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 20))) + "." for _ in range(rng.randint(1, 9))]) for i in range(n)]
    tokenizer = module.load_tokenizer("bytes", module.SPECIALS)
    sizes = tokenizer.n_vocab, cfg.batch_size, cfg.seq_len
    separator = tokenizer.encode_single_token("[SEP]")
    corpora = module.load_corpora([], module.tokenize_sentences(documents, tokenizer), tokenizer, separator, *sizes)
    return [module.SentenceCorpus(corpus, tokenizer) for corpus in corpora]


@pytest.fixture
def text(tmp_path):
    """A hundred documents of twenty lines."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
    return path


# The model


def test_golden_value(bert):
    """The specification's, of Hugging Face's BertForPreTraining in float64."""
    cfg = bert.Config(vocab_size=96, context=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0, precision="fp32")
    model = bert.BERT(cfg).double().eval()
    assert bert.count_parameters(model) == (117_090, 117_090)
    both = lambda *names: [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]  # noqa: E731
    order = ["bert.embeddings." + key for key in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
                                                  "LayerNorm.weight", "LayerNorm.bias")]  # fmt: skip
    for i in range(2):
        order += [f"bert.encoder.layer.{i}.{key}" for key in both(
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm",
            "intermediate.dense", "output.dense", "output.LayerNorm")]  # fmt: skip
    order += both("bert.pooler.dense") + ["cls.predictions.bias"]
    order += both("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.seq_relationship")
    tensors = dict(bert.bert_tensors(model))
    assert sorted(order) == sorted(tensors) and len(order) == 46
    for k, name in enumerate(order):
        p = tensors[name]
        values = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + k)
        p.copy_((values + (p.ndim == 1 and name.endswith("weight"))).view_as(p))
    tokens = ((torch.arange(32) * 7 + 3) % 96).view(2, 16)
    segments, mask = torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.bool)
    segments[:, 8:], mask[1, 12:] = 1, False

    def losses(model):
        logits, next_logits = model(tokens, segments, mask)
        nats = F.cross_entropy(logits[[0, 0, 1], [3, 9, 5]], torch.tensor([11, 22, 33]))
        return logits, next_logits, nats.item(), F.cross_entropy(next_logits, torch.tensor([0, 1])).item()

    logits, next_logits, nats, nsp = losses(model)
    close = lambda found, expected: torch.testing.assert_close(found, torch.tensor(expected).double(), atol=6e-8, rtol=0)  # noqa: E731
    close(logits[0, 0, :3], [0.1407120, 0.2865326, 0.0888782])
    close(next_logits, [[0.1661157, 0.1692225], [0.0815836, 0.1573107]])
    assert (nats, nsp, nats + nsp) == pytest.approx((4.6667141, 0.6753510, 5.3420651), abs=6e-8)
    batch = dict(tokens=tokens, segments=segments, attention_mask=mask, positions=torch.tensor([[3, 9], [5, 0]]),
                 labels=torch.tensor([[11, 22], [33, -100]]), is_random=torch.tensor([0, 1]), n_targets=3, n_sequences=2)  # fmt: skip
    loss, metrics = bert.objective(model, batch, cfg)  # in fp32, and with 1e-5 in the denominator
    assert loss.item() == pytest.approx(4.6667141 * 3 / 3.00001 + 0.6753510, abs=2e-6)
    assert metrics["nsp"].item() == pytest.approx(0.6753510, abs=1e-6)
    other = bert.BERT(dataclasses.replace(cfg, gelu="tanh")).double().eval()
    other.load_state_dict(model.state_dict())
    assert sum(losses(other)[2:]) == pytest.approx(5.3420574, abs=6e-8)


def test_counts_of_the_tables(bert):
    """BertModel: without the heads. Of ELECTRA, the discriminator, which is what is kept."""
    encoders = {"base": 109_482_240, "large": 335_141_888, "base_cased": 108_310_272, "large_cased": 333_579_264, "l3_h768_a12": 45_691_392,
                "l6_h768_a3": 66_955_008, "l6_h768_a12": 66_955_008, "l12_h1024_a16": 183_987_200}  # fmt: skip
    discriminators = {"electra_small": 13_549_057, "electra_base": 109_483_009, "electra_large": 335_142_913}
    with torch.device("meta"):
        for preset, count in (encoders | discriminators).items():
            model = bert.build_model(bert.Config(**bert.PRESETS[preset]))
            parts = (("embeddings", "encoder", "pooler"), ("embeddings", "discriminator", "dense", "score"))[preset in discriminators]
            assert sum(p.numel() for part in parts for p in getattr(model, part).parameters()) == count, preset
        for preset, count in (("base", 109_705_010), ("large", 335_691_058)):
            model = bert.BERT(bert.Config(**bert.PRESETS[preset] | dict(vocab_size=30_000)))
            assert bert.count_parameters(model)[0] == count


def test_presets_are_the_papers(bert):
    """Table 6 and A.2, and ELECTRA's Table 6."""
    shape = lambda c: (c.n_layers, c.dim, c.n_heads, c.hidden_dim)  # noqa: E731
    wanted = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096), "l3_h768_a12": (3, 768, 12, 3072), "l6_h768_a3": (6, 768, 3, 3072),
              "l6_h768_a12": (6, 768, 12, 3072), "l12_h1024_a16": (12, 1024, 16, 4096)}  # fmt: skip
    for preset, sizes in wanted.items():
        c = bert.Config(**bert.PRESETS[preset])
        assert shape(c) == sizes and c.dropout == 0.1 and (c.vocab_size, c.uncased, c.gelu) == (30_522, True, "erf")
        assert (c.lr, c.warmup_steps, c.steps, c.batch_size, c.weight_decay, c.clip) == (1e-4, 10_000, 10**6, 256, 0.01, 1.0)
        assert (c.seq_len, c.long_seq_len, c.long_share, c.max_predictions, c.long_max_predictions) == (128, 512, 0.1, 20, 77)
        assert (c.masked_lm_prob, c.short_seq_prob, c.dupe_factor, c.context) == (0.15, 0.1, 10, 512)
    electra = {"electra_small": ((12, 256, 4, 1024), 5e-4, 128, 10**6, 128, 0.15, 4), "electra_base": ((12, 768, 12, 3072), 2e-4, 256, 766_000, 512, 0.15, 3),
               "electra_large": ((24, 1024, 16, 4096), 2e-4, 2048, 400_000, 512, 0.25, 4)}  # fmt: skip
    for preset, (sizes, *rest) in electra.items():
        c = bert.Config(**bert.PRESETS[preset])
        assert shape(c) == sizes and [c.lr, c.batch_size, c.steps, c.seq_len, c.masked_lm_prob, c.generator_divisor] == rest
        assert (c.rtd_weight, c.warmup_steps, c.weight_decay, c.long_share) == (50.0, 10_000, 0.01, 0.0)
        assert c.max_predictions >= round(c.masked_lm_prob * c.seq_len)


def test_every_token_is_seen_and_padding_is_not(bert):
    cfg = bert.Config(**TINY)
    model = make_model(bert, ROW, cfg).eval()
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(9) > 4).long().expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    logits, next_logits = model(tokens, segments, mask)
    assert logits.shape == (2, 9, cfg.vocab_size) and next_logits.shape == (2, 2)
    alone = model(tokens[:1, :6], segments[:1, :6])
    torch.testing.assert_close(logits[:1, :6], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next_logits[:1], alone[1], atol=1e-5, rtol=1e-5)
    for j in range(9):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % 256
        moved, next_moved = (a != b for a, b in zip(model(changed, segments, mask), (logits, next_logits)))
        seen = moved.any(-1)[0]
        assert seen[:6].all() == seen[:6].any() == (j < 6) and next_moved[0].all() == (j < 6) and seen[j]
        assert not moved[1].any() and not next_moved[1].any()
    assert not torch.equal(model(tokens, 1 - segments, mask)[0], logits), "segments count"
    positions = torch.tensor([[5, 0, 2], [8, 8, 1]])
    some, same = model(tokens, segments, mask, positions)
    torch.testing.assert_close(some, logits[torch.arange(2)[:, None], positions], atol=1e-6, rtol=1e-6)
    assert torch.equal(same, next_logits)


def test_initialisation(bert):
    """N(0, 0.02) cut at 2 σ has a deviation of 0.0176."""
    cfg = bert.Config(**TINY | dict(dim=192, hidden_dim=402, vocab_size=500, generator_divisor=3))
    for objective in ("mlm", "rtd"):
        c = dataclasses.replace(cfg, objective=objective)
        model = bert.build_model(c)
        for p in model.parameters():
            p.data.fill_(7)
        bert.init_weights(model, c)
        for name, p in model.named_parameters():
            if p.ndim > 1:
                assert p.abs().max() <= 0.04 and (p.numel() < 5000 or p.std().item() == pytest.approx(0.0176, rel=0.03)), name
            else:
                assert p.unique().tolist() == [float("norm" in name and name.endswith("weight"))], name
    model.register_parameter("strange", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="strange"):
        bert.init_weights(model, c)


def test_dropout_falls_where_the_paper_has_it(bert, monkeypatch):
    """On the embeddings, both branches of a block and the attention's probabilities; none in the heads."""
    cfg, seen = bert.Config(**TINY | dict(dropout=0.3)), []
    model, inner, attend = make_model(bert, ROW, cfg), F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p, training)) or inner(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **k: seen.append(dropout_p) or attend(*a, dropout_p=dropout_p, **k))
    model.train()(torch.ones(2, 5, dtype=torch.long))
    assert seen == [(0.3, True)] + [0.3, (0.3, True), (0.3, True)] * cfg.n_layers
    seen.clear()
    model.eval()(torch.ones(2, 5, dtype=torch.long))
    assert set(seen) == {(0.3, False), 0.0}


@pytest.mark.parametrize("overrides", [dict(), RTD])
def test_flops_are_those_of_the_matrix_products(bert, overrides):
    from torch.utils.flop_counter import FlopCounterMode

    cfg = bert.Config(**{**TINY, **overrides, "seq_len": 11, "max_predictions": 4})
    with torch.device("meta"):
        model, tokens = bert.build_model(cfg), torch.zeros(2, 11, dtype=torch.long)
        slots = torch.zeros(2, 4, dtype=torch.long)
        more = (slots, torch.zeros(2, 4)) if overrides else ()
    with FlopCounterMode(display=False) as counter:
        logits, other, *_ = model(tokens, tokens, None, slots, *more)
        (logits.sum() + other.sum()).backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(bert.flops_per_token(cfg))


ELECTRA = dict(objective="rtd", generator_divisor=3, dim=192, embedding_dim=128, hidden_dim=780)


@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(recompute="block"), ELECTRA])
def test_activation_bytes(bert, overrides):
    sizes = {**TINY, "dim": 96, "hidden_dim": 320, "seq_len": 64, "context": 64, "max_predictions": 9, **overrides}
    cfg = bert.Config(**sizes)
    model, kept = make_model(bert, ROW, cfg), {}
    bert.parallelize(model, cfg, types.SimpleNamespace(size=lambda: 1))
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() not in {p.numel() for p in model.parameters()}:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    slots = torch.randint(257, (8, 9))
    batch = dict(tokens=torch.randint(257, (8, 64)), segments=torch.ones(8, 64, dtype=torch.long), attention_mask=torch.ones(8, 64, dtype=torch.bool),
                 positions=slots % 64, labels=slots, uniform=torch.rand(8, 9), is_random=torch.zeros(8, dtype=torch.long),
                 n_targets=72, n_sequences=8, n_tokens=512)  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bert.objective(model, batch, cfg)
    expected = bert.memory_per_rank(dataclasses.replace(cfg, batch_size=8))["activations"]
    if cfg.recompute == "block":  # the block that backward will recompute is not there yet
        one, two = (bert.memory_per_rank(bert.Config(**{**sizes, "recompute": "none", "n_layers": n}))["activations"] for n in (1, 2))
        expected += one - two
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.05)


# Pairs and masks

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"{c}{i}" for c, n in (("a", 10), ("b", 7), ("c", 8)) for i in range(1, n + 1)]
DOCUMENTS = [["a1 a2 a3", "a4 a5", "a6 a7 a8 a9", "a10"], ["b1 b2", "b3 b4 b5", "b6 b7"], ["c1 c2 c3 c4 c5 c6", "c7 c8"]]
SPECIALS = {word: i for i, word in enumerate(WORDS[:5])}
IDS = [[[WORDS.index(word) for word in sentence.split()] for sentence in document] for document in DOCUMENTS]
EXPECTED = """CLS M a2 a3 SEP a4 a5 a6 a7 a8 a9 a10 SEP | 5 | False | 1 a1 8 a7
CLS b1 b2 SEP c1 c2 M c4 c5 M c7 c8 SEP | 4 | True | 6 c3 9 c6
CLS b3 b4 b5 SEP c1 c2 c3 M c5 M c7 c8 SEP | 5 | True | 8 c4 10 c6
CLS b6 b7 SEP c7 c8 SEP | 4 | True | 2 b7
CLS c1 c2 c3 c4 M M SEP b6 b7 SEP | 8 | True | 5 c5 6 c6
CLS c7 M SEP c4 b4 b5 b6 b7 SEP | 4 | True | 2 c8 4 b3"""


def with_masks(bert, documents, cfg, n_vocab, rng):
    """(ids, as seen, positions, labels, length of segment A, is random) of each instance, drawn in the released order."""
    for index in range(len(documents)):
        for a, b, is_random in bert.create_instances(documents, index, cfg.seq_len, cfg.short_seq_prob, rng):
            ids = [2, *a, 3, *b, 3]
            yield ids, *bert.create_masked_lm_predictions(ids, cfg, SPECIALS, n_vocab, rng), len(a) + 2, is_random


def test_worked_example_token_for_token(bert):
    cfg, found = bert.Config(seq_len=16, max_predictions=3), []
    for _, seen, positions, labels, n_a, is_random in with_masks(bert, IDS, cfg, len(WORDS), random.Random(12345)):
        words = " ".join(WORDS[i].strip("[]").replace("MASK", "M") for i in seen)
        found.append(f"{words} | {n_a} | {is_random} | " + " ".join(f"{p} {WORDS[i]}" for p, i in zip(positions, labels)))
    assert "\n".join(found) == EXPECTED


def released(documents, length, most_predictions, vocab, rng):
    """The specification's pseudo-code once more, with lists of words and none of the script's code."""
    found = []
    for d, document in enumerate(documents):
        max_num = length - 3
        target = max_num
        if rng.random() < 0.1:
            target = rng.randint(2, max_num)
        chunk, size, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            size += len(document[i])
            if i == len(document) - 1 or size >= target:
                a_end = 1
                if len(chunk) >= 2:
                    a_end = rng.randint(1, len(chunk) - 1)
                a, b, random_next = sum(chunk[:a_end], []), [], False
                if len(chunk) == 1 or rng.random() < 0.5:
                    random_next = True
                    need = target - len(a)
                    for _ in range(10):
                        other = rng.randint(0, len(documents) - 1)
                        if other != d:
                            break
                    for j in range(rng.randint(0, len(documents[other]) - 1), len(documents[other])):
                        b.extend(documents[other][j])
                        if len(b) >= need:
                            break
                    i -= len(chunk) - a_end
                else:
                    for j in range(a_end, len(chunk)):
                        b.extend(chunk[j])
                while len(a) + len(b) > max_num:
                    trunc = a if len(a) > len(b) else b
                    if rng.random() < 0.5:
                        del trunc[0]
                    else:
                        trunc.pop()
                tokens = ["[CLS]"] + a + ["[SEP]"] + b + ["[SEP]"]
                cand = [k for k, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]
                rng.shuffle(cand)
                output, masked = list(tokens), []
                for k in cand[: min(most_predictions, max(1, int(round(len(tokens) * 0.15))))]:
                    if rng.random() < 0.8:
                        output[k] = "[MASK]"
                    elif rng.random() < 0.5:
                        pass
                    else:
                        output[k] = vocab[rng.randint(0, len(vocab) - 1)]
                    masked.append((k, tokens[k]))
                found.append((output, len(a) + 2, random_next, sorted(masked)))
                chunk, size = [], 0
            i += 1
    return found


def test_builder_is_the_released_one(bert):
    rng = random.Random(0)
    for seed in range(200):
        length = rng.choice([5, 6, 16, 33, 64])
        documents = [[rng.choices(WORDS[5:], k=rng.randint(1, 12)) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(2, 6))]
        ids = [[[WORDS.index(word) for word in sentence] for sentence in document] for document in documents]
        cfg = bert.Config(seq_len=length, max_predictions=rng.choice([2, 20]))
        expected = released(documents, length, cfg.max_predictions, WORDS, random.Random(seed))
        found = [([WORDS[i] for i in seen], n_a, is_random, [(p, WORDS[i]) for p, i in zip(positions, labels)])
                 for _, seen, positions, labels, n_a, is_random in with_masks(bert, ids, cfg, len(WORDS), random.Random(seed))]  # fmt: skip
        assert found == expected


def test_statistics_of_ten_thousand_instances(bert):
    """The toy corpus: 64 % random, since one sentence alone has no next one; 80/10/10; 15 % of the tokens."""
    cfg, rng = bert.Config(seq_len=16, max_predictions=20), random.Random(3)
    found = itertools.islice((x for _ in itertools.count() for x in with_masks(bert, IDS, cfg, len(WORDS), rng)), 10_000)
    share, kinds, n = 0, collections.Counter(), 0
    for ids, seen, positions, labels, n_a, is_random in found:
        share += is_random / 10_000
        assert len(ids) <= 16 and len(positions) == max(1, round(0.15 * len(ids))) and positions == sorted(set(positions))
        assert all(seen[i] == ids[i] for i in range(len(ids)) if i not in positions)
        assert [ids[i] for i in positions] == labels and not {2, 3} & set(labels)
        for i in positions:
            kinds["mask" if seen[i] == 4 else "kept" if seen[i] == ids[i] else "random"] += 1
            n += 1
    assert share == pytest.approx(0.64, abs=0.015)
    drawn_again = 1 / len(WORDS)  # a random token may be the same, or [MASK]
    assert kinds["mask"] / n == pytest.approx(0.8 + 0.1 * drawn_again, abs=0.01)
    assert kinds["kept"] / n == pytest.approx(0.1 + 0.1 * drawn_again, abs=0.01)
    assert kinds["random"] / n == pytest.approx(0.1 - 0.2 * drawn_again, abs=0.01)


def test_statistics_on_long_documents(bert):
    """Where chunks have many sentences, half the pairs are random; one document in ten is cut short."""
    rng = random.Random(1)
    documents = [[[5] * rng.randint(3, 12) for _ in range(60)] for _ in range(400)]
    lengths, n_random, full = [], 0, []
    for index in range(400):
        these = list(bert.create_instances(documents, index, 128, 0.1, rng))
        lengths += [len(a) + len(b) + 3 for a, b, _ in these]
        n_random += sum(is_random for *_, is_random in these)
        full.append(any(len(a) + len(b) + 3 == 128 for a, b, _ in these))
    assert n_random / len(lengths) == pytest.approx(0.52, abs=0.03) and max(lengths) == 128
    assert np.mean(full) == pytest.approx(0.9 + 0.1 * 10 / 124, abs=0.04)
    cfg, moved, total = bert.Config(), 0, 0  # a random token in the place of 15 % x 10 % of them
    for _ in range(3000):
        tokens = [2, *[5] * 98, 3]
        seen, *_ = bert.create_masked_lm_predictions(tokens, cfg, SPECIALS, 1000, rng)
        moved, total = moved + sum(i not in (t, 4) for i, t in zip(seen, tokens)), total + len(tokens)
    assert moved / total == pytest.approx(0.015, abs=0.001)


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_batches(bert, objective):
    """What get_batch gives is whole instances, padded; only predicted positions differ from the text."""
    cfg = bert.Config(**TINY | dict(objective=objective))
    corpus, _ = made_up_corpora(bert, cfg)
    specials = corpus.special_ids
    known = [b"".join(map(bytes, document)) for document in bert.read_block(corpus.ids, 0, 1)]
    batch, masked, kept, n_random, n_tokens = bert.get_batch(corpus, 0, 400, cfg), 0, 0, 0, 0
    for row in range(400):
        names = "tokens", "segments", "attention_mask", "positions", "labels", "uniform", "is_random"
        tokens, segments, mask, positions, labels, uniform, is_random = (batch[name][row] for name in names)
        length = int(mask.sum())
        assert mask[:length].all() and (tokens[length:] == specials["[PAD]"]).all() and not segments[length:].any()
        original, real = tokens.clone(), labels >= 0
        n = min(cfg.max_predictions, max(1, round(0.15 * length)))
        assert real.sum() == n and real[:n].all() and not positions[n:].any() and (positions[:n].diff() > 0).all()
        original[positions[real]] = labels[real]
        assert set((tokens != original).nonzero().flatten().tolist()) <= set(positions[real].tolist())
        masked += (tokens[positions[real]] == specials["[MASK]"]).sum().item()
        kept += (tokens[positions[real]] == labels[real]).sum().item()
        first, second = (original[:length] == specials["[SEP]"]).nonzero().flatten().tolist()
        assert original[0] == specials["[CLS]"] and second == length - 1
        assert segments[:length].tolist() == [0] * (first + 1) + [1] * (length - first - 1)
        a, b = bytes(original[1:first].tolist()), bytes(original[first + 1 : second].tolist())
        homes = [[i for i, text in enumerate(known) if part in text] for part in (a, b)]
        assert a and b and all(homes)
        assert is_random or any(re.search(re.escape(a) + b".*" + re.escape(b), text) for text in known), "the next sentences"
        assert (uniform.unique().numel() > 1 and 0 <= uniform.min() and uniform.max() < 1) == (objective == "rtd")
        n_random, n_tokens = n_random + int(is_random), n_tokens + length
    n = batch["n_targets"]
    assert (batch["n_sequences"], batch["n_tokens"], batch["n_random"]) == (400, n_tokens, n_random)
    assert n == (batch["labels"] >= 0).sum() and masked / n == pytest.approx(0.85 if objective == "rtd" else 0.8, abs=0.04)
    assert kept / n == pytest.approx(0.15 if objective == "rtd" else 0.1, abs=0.04)


def test_batches_depend_on_nothing_but_seed_and_place(bert):
    cfg = bert.Config(**TINY | RTD)
    corpus, _ = made_up_corpora(bert, cfg)
    whole = bert.get_batch(corpus, 5, 8, cfg)
    bert.block_instances.cache_clear()
    last, first, second = (bert.get_batch(corpus, 5 + i, n, cfg) for i, n in ((4, 4), (0, 3), (3, 1)))
    for name in whole:
        if name.startswith("n_"):
            assert whole[name] == first[name] + second[name] + last[name]
        else:
            assert torch.equal(whole[name], torch.cat((first[name], second[name], last[name]))), name
    assert not torch.equal(whole["tokens"], bert.get_batch(corpus, 5, 8, dataclasses.replace(cfg, seed=1))["tokens"])


def test_masks_are_static_and_come_again_after_dupe_factor_passes(bert):
    """Pass three is pass one in another order; with 0 none comes again."""
    cfg = bert.Config(**TINY | dict(dupe_factor=2))
    corpus, _ = made_up_corpora(bert, cfg)
    n = corpus.ids.size // cfg.seq_len
    rows = lambda epoch, c: [tuple(row) for row in bert.get_batch(corpus, epoch * n, n, c)["tokens"].tolist()]  # noqa: E731
    first, second, third = (rows(epoch, cfg) for epoch in range(3))
    assert sorted(first) == sorted(third) and first != third and sorted(first) != sorted(second)
    assert len(set(first)) > 0.9 * n
    dynamic = [sorted(rows(epoch, dataclasses.replace(cfg, dupe_factor=0))) for epoch in (0, 2)]
    assert dynamic[0] == sorted(first) and dynamic[0] != dynamic[1]


def test_a_large_corpus_is_read_block_by_block(bert, monkeypatch):
    """Each block gives its share, batches mix several, and nothing else is read."""
    cfg = bert.Config(**TINY)
    corpus, _ = made_up_corpora(bert, cfg, n=1000)
    ids = corpus.ids.read(0, corpus.ids.size)
    parts = np.array_split(ids, 7)  # as several shards, whose borders are no block's
    corpus.ids = bert.Corpus([("", part) for part in parts], 0, len(ids), corpus.ids.separator, corpus.ids.token_bytes, in_order=False)
    monkeypatch.setattr(bert, "BLOCK", 5000)
    monkeypatch.setattr(bert, "LANES", 3)
    n_blocks = len(ids) // 5000
    assert n_blocks > 6
    together = [document for block in range(n_blocks) for document in bert.read_block(corpus.ids, block, n_blocks)]
    flat = [i for document in together for sentence in document for i in sentence]
    assert flat == ids[ids != corpus.special_ids["[SEP]"]].tolist()
    inner, read = bert.read_block, []
    monkeypatch.setattr(bert, "read_block", lambda c, block, n: read.append(block) or inner(c, block, n))
    bert.block_instances.cache_clear()
    quota = len(ids) // (n_blocks * cfg.seq_len)
    for group in range(2):
        read.clear()
        for i in range(3):
            bert.get_batch(corpus, (3 * group + i) * quota, quota, cfg)
            assert len(read) == 3 and len(set(read)) == 3, "three blocks are mixed"
    keys = [bert.find_instance(corpus.ids, i, cfg)[-1][-2:] for i in range(n_blocks * quota)]
    assert sorted(keys) == [(block, slot) for block in range(n_blocks) for slot in range(quota)]


def test_sentences_of_python_text_and_lines(bert):
    code = '''"""Summary of it.

Longer e.g. this one. Second Sentence! 3 more
lines."""
import os  # not this
x = """not
"""
y = "# nor this"
# A comment of
# two lines. And more.
def f():
    r\'\'\'It's "quoted".\'\'\'
    #: Kept.
    return '"""'
'''
    cfg = bert.Config(uncased=False)
    ((name, found),) = bert.split_sentences([("m.py", code)], cfg)
    assert found == ["Summary of it.", "Longer e.g. this one.", "Second Sentence!", "3 more lines.", "A comment of two lines.", "And more.",
                     'It\'s "quoted".', "Kept."]  # fmt: skip
    assert dict(bert.split_sentences([("t.txt", "Ça va.  Bien\u0301!\n\n---\n\nEnd")], bert.Config()))["t.txt"] == ["ca va.", "bien!", "end"]
    lines = "One sentence. Still one\nanother\n\n\nThird\n"
    assert list(bert.split_sentences([("t.txt", lines)], bert.Config(sentences="lines"))) == [
        ("t.txt 0", ["one sentence. still one", "another"]), ("t.txt 1", ["third"])]  # fmt: skip
    assert list(bert.split_sentences([("a line.py", "a line.py")], cfg)) == [("a line.py", ["a line.py"])], "a document of .jsonl"


def test_stream_of_sentences(bert):
    tokenizer = bert.load_tokenizer("bytes", bert.SPECIALS)
    documents = bert.tokenize_sentences([("a", ["ab", "", "c"]), ("b", []), ("c", ["d"])], tokenizer)
    assert [(name, ids.tolist()) for name, ids in documents] == [("a", [97, 98, 259, 99, 259, 259]), ("c", [100, 259, 259])]


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "runn", "##ing", ",", "the", "!", "的", "e", "5", "##€", "_", "\u2028", "\x85", "last"]


def test_word_piece(bert, tmp_path):
    """Greedy, longest first: the specification's section 7."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    tokenizer = bert.choose_tokenizer(str(path), [])
    spell = lambda text: " ".join(VOCABULARY[i] for i in tokenizer.encode_ordinary(bert.clean_text(text, True)))  # noqa: E731
    assert spell("UNaffable, the  running!") == "un ##aff ##able , the runn ##ing !"
    assert spell("thé的the") == "the 的 the" and spell("5€ _the") == "5 ##€ _ the"
    assert spell("unaffablex the") == "[UNK] the", "no part of a word alone"
    assert spell("un" + "a" * 198) == "un" + " ##a" * 198 and spell("un" + "a" * 199) == "[UNK]"
    assert spell("the\u200b \x00the\ufffd last") == "the the last", "lines end with a line feed alone"
    assert tokenizer.decode([2, 5, 6, 7, 11]) == "[CLS] unaffable ,"
    assert tokenizer.n_vocab == len(VOCABULARY) and {token: tokenizer.encode_single_token(token) for token in SPECIALS} == SPECIALS
    assert [tokenizer.encode_single_token(entry) for entry in tokenizer.token_byte_values()] == list(range(5, len(VOCABULARY)))
    assert tokenizer.encode_to_numpy("the [MASK]", disallowed_special=()).tolist() == [12, 1, 1, 1], "a special token in a text is plain text"


def test_word_piece_is_hugging_faces(bert, tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    entries = [*VOCABULARY[:5], *letters, *("##" + c for c in letters), "the", "##ing", "é", *"!,.-_$'“", "值"]
    ours = bert.WordPiece(entries, "these")
    for uncased in (True, False):
        theirs = transformers.BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, do_lower_case=uncased)
        for text in ("The king's 3.14-thing, É “quoted”_x $5\t值值a\n¿qué?", "na\u0308ive Zoë", "x\u00a0y\u3000z \u00ad soft"):
            mine = [ours.entries[i] for i in ours.encode_ordinary(bert.clean_text(text, uncased))]
            assert mine == theirs.tokenize(text), text


def test_learned_vocabulary(bert):
    documents = [(f"{i}", ["the cat (the)", "and the tar"]) for i in range(200)]
    tokenizer = bert.learn_wordpiece(documents, 25)
    letters = [*"thea", *"crnd()"]  # three the, so h and e as often as each other; ties as they come
    assert tokenizer.entries[:5] == list(bert.SPECIALS) and sorted(tokenizer.entries[5:15]) == sorted(letters)
    assert tokenizer.entries[15:23] == [f"##{c}" for c in tokenizer.entries[5:15] if c not in "()"], "nothing stands inside a word that is one of its own"
    assert tokenizer.entries[23:] == ["the", "cat"], "the most frequent words"
    assert tokenizer.decode(tokenizer.encode_ordinary("(chat the)")) == "( chat the )" and tokenizer.encode_ordinary("zebra") == [1]
    held = {name for name, _ in documents if bert.is_held_out(name)}
    strange = [(name, ["zebra"] * 5000 if name in held else sentences) for name, sentences in documents]
    assert held and bert.learn_wordpiece(strange, 25).entries == tokenizer.entries, "not learned from held out"
    with pytest.raises(ValueError, match="wordpiece:99: the text to train on has 27 entries"):
        bert.learn_wordpiece(documents, 99)
    assert bert.learn_wordpiece([(next(iter(held)), ["a b a"])], 8).entries[5:] == ["a", "b", "##a"], "all there is"


# Objectives


@pytest.mark.parametrize("objective, wanted", [("mlm", math.log(257) + math.log(2)), ("rtd", math.log(257) + 50 * math.log(2))])
def test_first_loss(bert, objective, wanted):
    """ln V for random tokens and ln 2 for each of the yes-no questions."""
    cfg = bert.Config(**TINY | dict(objective=objective, vocab_size=257, generator_divisor=3, hidden_dim=90))
    model = bert.build_model(cfg)
    bert.init_weights(model, cfg)
    generator = torch.Generator().manual_seed(0)
    tokens, slots = (torch.randint(257, (64, n), generator=generator) for n in (12, 3))
    batch = dict(tokens=tokens, segments=tokens % 2, attention_mask=torch.ones(64, 12, dtype=torch.bool), positions=slots % 12, labels=slots,
                 uniform=torch.rand(64, 3), is_random=slots[:, 0] % 2, n_targets=192, n_sequences=64, n_tokens=64 * 12)  # fmt: skip
    loss, _ = bert.objective(model, batch, cfg)
    assert loss.item() == pytest.approx(wanted, abs=0.1 if objective == "mlm" else 0.5)


def plain_objective(bert, model, batch, cfg):
    """Both losses slot by slot, from logits at every position."""
    mask = batch["attention_mask"]
    logits, next_logits, *_ = model(batch["tokens"], batch["segments"], mask)
    nats, right, filled, original = [], 0, batch["tokens"].clone(), batch["tokens"].clone()
    for b, row in enumerate(batch["labels"].tolist()):
        for k, label in enumerate(row):
            if label >= 0:
                t = batch["positions"][b, k]
                p = logits[b, t].double().softmax(-1)
                nats.append(-p[label].log())
                right += int(p.argmax() == label)
                original[b, t] = label
                filled[b, t] = int((p.detach().cumsum(0) < batch["uniform"][b, k]).sum())
    mlm = sum(nats) / (len(nats) + 1e-5)
    if cfg.objective == "mlm":
        nsp = F.cross_entropy(next_logits.double(), batch["is_random"])
        hits = (next_logits.argmax(-1) == batch["is_random"]).double().mean()
        return mlm + nsp, dict(mlm=mlm, nsp=nsp, mlm_acc=right / len(nats), nsp_acc=hits)
    x = model.discriminator(model.embeddings(filled, batch["segments"]), mask)
    hidden = F.gelu(model.dense(x), approximate={"erf": "none", "tanh": "tanh"}[cfg.gelu])
    scores = model.score(hidden)[..., 0][mask].double()
    replaced = (filled != original)[mask]
    rtd = -torch.where(replaced, scores.sigmoid(), 1 - scores.sigmoid()).log().mean()
    hits = ((scores > 0) == replaced).double().mean()
    return mlm + 50 * rtd, dict(mlm=mlm, rtd=rtd, mlm_acc=right / len(nats), rtd_acc=hits, replaced=replaced.double().mean())


@pytest.mark.parametrize("overrides", [dict(), RTD])
def test_losses_count_predictions_and_tokens_not_batches(bert, overrides):
    cfg = bert.Config(**TINY | overrides | dict(short_seq_prob=0.5, gelu="tanh"))
    batch = bert.get_batch(made_up_corpora(bert, cfg)[0], 3, 8, cfg)
    assert 0 < batch["n_targets"] < batch["labels"].numel() and batch["n_tokens"] < batch["tokens"].numel()
    model = make_model(bert, ROW, cfg)
    loss, metrics = bert.objective(model, batch, cfg)
    expected, wanted = plain_objective(bert, model, batch, cfg)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.keys() == wanted.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(wanted[name]), rel=1e-5, abs=1e-7), name
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = {name: value if name.startswith("n_") else value[rows] for name, value in batch.items()}
        parts.append(bert.objective(model, part, cfg)[0].item())
    assert sum(parts) == pytest.approx(loss.item(), rel=1e-5)


def test_generator_learns_from_its_own_loss_only(bert):
    """No gradient flows through sampling: with the masked LM's loss alone, its weights' gradients are the same."""
    cfg = bert.Config(**TINY | RTD)
    batch, found = bert.get_batch(made_up_corpora(bert, cfg)[0], 3, 8, cfg), []
    for weight in (50.0, 0.0):
        model = make_model(bert, ROW, cfg)
        bert.objective(model, batch, dataclasses.replace(cfg, rtd_weight=weight))[0].backward()
        found.append(dict(model.named_parameters()))
    for name, p in found[0].items():
        other = found[1][name].grad
        if name.startswith(("generator", "mlm")):
            torch.testing.assert_close(p.grad, other, rtol=1e-5, atol=1e-8)
            assert p.grad.any(), name
        elif name.startswith("embeddings"):  # both see them
            assert other.any() and not torch.equal(p.grad, other), name
        else:
            assert p.grad.any() and not other.any(), name


@pytest.mark.parametrize("right, wanted", [(True, []), (False, [2, 5])])
def test_a_token_drawn_again_counts_as_original(bert, right, wanted):
    """A generator that always draws the label replaces nothing, one that never does all of it, and empty slots nothing."""
    cfg = bert.Config(**TINY | RTD | dict(vocab_size=30))
    model = bert.ELECTRA(cfg)
    bert.init_weights(model, cfg)
    with torch.no_grad():
        model.mlm.bias.fill_(-1e4)[20 if right else 21] = 1e4
    tokens, positions, labels = torch.arange(5, 13)[None], torch.tensor([[2, 5, 0]]), torch.tensor([[20, 20, -100]])
    _, _, replaced = model(tokens, None, None, positions, labels, torch.full((1, 3), 0.5))
    assert replaced[0].nonzero().flatten().tolist() == wanted


# Optimizer and schedule


def test_adam_of_the_released_code(bert):
    """The specification's scalar: p = 1, rate 1e-4, gradients 0.5 and then -0.25."""
    p = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = bert.build_optimizer(torch.nn.ParameterList([p]), bert.Config())
    for grad, value in ((0.5, 0.9996827922), (-0.25, 0.9995686166)):
        p.grad = torch.full_like(p, grad)
        optimizer.step()
        assert p.item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("overrides", [dict(), RTD])
def test_what_is_decayed(bert, overrides):
    """All but norms and biases, the embeddings and the weights of next sentence prediction included."""
    cfg = bert.Config(**TINY | overrides)
    model = bert.build_model(cfg)
    groups = {id(p): group["weight_decay"] for group in bert.build_optimizer(model, cfg).param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert groups[id(p)] == (0.0 if re.search("norm|bias", name) else 0.01), name


def test_schedule_of_the_code(bert):
    cfg = bert.Config()
    rates = {0: 0.0, 1: 1e-8, 5000: 5e-5, 9999: 9.999e-5, 10_000: 9.9e-5, 500_000: 5e-5, 1_000_000: 0.0}
    for step, rate in rates.items():
        assert bert.learning_rate(step, cfg) == pytest.approx(rate, rel=1e-12), step
    assert max(bert.learning_rate(step, cfg) for step in range(9000, 12_000)) < 1e-4, "which is never reached"


def test_two_phases(bert):
    """90 % of the updates at 128, the rest at 512, under one schedule."""
    cfg = bert.Config(micro_batch=64, long_micro_batch=16)
    for step, length, most, micro in ((0, 128, 20, 64), (899_999, 128, 20, 64), (900_000, 512, 77, 16), (10**6, 512, 77, 16)):
        phase = bert.phase_at(step, cfg)
        assert (phase.seq_len, phase.max_predictions, phase.micro_batch, phase.batch_size, phase.steps) == (length, most, micro, 256, 10**6)
    assert all(bert.phase_at(step, dataclasses.replace(cfg, long_share=0.0)).seq_len == 128 for step in (0, 10**6 - 1, 10**6))


# Layouts


def layout_gradients(overrides):
    """Loss, metrics and gradients of one global batch, as the script computes them on this rank."""
    module = importlib.import_module("bert")
    device, cfg = module.init_distributed(30), module.Config(**{**TINY, **overrides})
    corpus, _ = made_up_corpora(module, cfg)
    model = make_model(module, ROW, cfg)
    rank, ranks = module.dist.get_rank(), module.dist.get_world_size()
    mesh = module.init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",))
    replicas = module.parallelize(model, cfg, mesh)
    batches = global_batch(module, corpus, cfg, device, rank, ranks)
    means = {name: value.item() for name, value in module.run_batches(replicas, batches, cfg, backward=True).items()}
    return means, {name: p.grad.numpy() for name, p in model.named_parameters()}


LAYOUTS = [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)]


@pytest.mark.parametrize("more", [dict(), RTD, dict(recompute="block")], ids=["mlm", "rtd", "recompute"])
def test_layouts_give_one_ranks_gradients(bert, ranks, more):
    cfg = bert.Config(**{**TINY, **more, "recompute": "none"})
    batch = bert.get_batch(made_up_corpora(bert, cfg)[0], 3, 8, cfg)
    model = make_model(bert, ROW, cfg)
    loss, wanted = plain_objective(bert, model, batch, cfg)
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(np.abs(g).max() for g in expected.values())
    for n, micro in LAYOUTS if "recompute" not in more else LAYOUTS[4:5]:
        for means, found in ranks.run(n, layout_gradients, {**more, "micro_batch": micro}):
            assert means.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
            assert means == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5, abs=1e-7)
            assert found.keys() == expected.keys()
            for name, g in found.items():
                limit = 1e-5 * max(np.abs(expected[name]).max(), 1e-3 * largest)
                assert np.abs(g - expected[name]).max() <= limit, (n, micro, name)


# Parity with Hugging Face


def hf_model(cfg):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        intermediate_size=cfg.hidden_dim, max_position_embeddings=cfg.context, hidden_act={"erf": "gelu", "tanh": "gelu_new"}[cfg.gelu],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertForPreTraining(config).eval()


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_hugging_face_logits_loss_and_gradients(bert, gelu, tmp_path):
    cfg = bert.Config(**TINY | dict(gelu=gelu))
    peer = hf_model(cfg)
    model = make_model(bert, ROW, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # so that errors show
    bert.to_hf(model, cfg, tmp_path)
    theirs = type(peer).from_pretrained(tmp_path).eval()
    batch = bert.get_batch(made_up_corpora(bert, cfg)[0], 3, 8, cfg)
    targets = torch.full_like(batch["tokens"], -100)
    for b, k in (batch["labels"] >= 0).nonzero().tolist():
        targets[b, batch["positions"][b, k]] = batch["labels"][b, k]
    output = theirs(batch["tokens"], batch["attention_mask"], batch["segments"], labels=targets, next_sentence_label=batch["is_random"])
    logits, next_logits = model.eval()(batch["tokens"], batch["segments"], batch["attention_mask"])
    close = lambda a, b: (a - b).abs().max() <= 1e-5 * b.abs().max()  # noqa: E731
    real = batch["attention_mask"]
    assert close(logits[real], output.prediction_logits[real]) and close(next_logits, output.seq_relationship_logits)
    loss, _ = bert.objective(model, batch, cfg)
    assert loss.item() == pytest.approx(output.loss.item(), rel=3e-6)
    loss.backward()
    output.loss.backward()
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = dict(bert.from_hf(tmp_path / "gradients")[0].named_parameters())
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        rows = slice(1, None) if name == "embeddings.token.weight" else slice(None)  # theirs has [PAD]'s row 0 learn nothing
        apart, most = (p.grad[rows] - expected[name][rows]).abs().max(), expected[name][rows].abs().max()
        assert apart <= 1e-5 * max(most, 1e-2 * largest), name


def test_reads_what_hugging_face_writes(bert, tmp_path):
    cfg = bert.Config(**TINY)
    theirs = hf_model(cfg)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours, read = bert.from_hf(tmp_path)
    assert {name: getattr(read, name) for name in bert.HF_CONFIG} == {name: getattr(cfg, name) for name in bert.HF_CONFIG}
    tokens = torch.randint(cfg.vocab_size, (2, cfg.seq_len))
    found, expected = ours.eval()(tokens), theirs(tokens)
    torch.testing.assert_close(found[0], expected.prediction_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected.seq_relationship_logits, rtol=1e-4, atol=1e-5)
    from safetensors.torch import load_file, save_file  # the first conversions call gains and biases of norms otherwise

    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(bert.from_hf(tmp_path)[0].eval()(tokens)[0], found[0])


def test_directories_that_hold_no_bert(bert, tmp_path):
    pytest.importorskip("safetensors")
    cfg = bert.Config(**TINY)
    with pytest.raises(ValueError, match="holds no BertForPreTraining"):
        bert.from_hf(tmp_path)
    bert.to_hf(bert.BERT(cfg), cfg, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    bert.from_hf(tmp_path)
    refused = dict(model_type="roberta", layer_norm_eps=1e-5, hidden_act="relu", type_vocab_size=1, is_decoder=True,
                   position_embedding_type="relative_key", tie_word_embeddings=False)  # fmt: skip
    for key, value in refused.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"holds no BertForPreTraining.*config.json has {key} "):
            bert.from_hf(tmp_path)
    for wrong in (dict(hidden_size=27), dict(vocab_size=260)):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match="holds no BertForPreTraining"):
            bert.from_hf(tmp_path)


def test_keys_that_are_missing_have_bert_configs_defaults(bert, tmp_path):
    transformers = pytest.importorskip("transformers")
    defaults = transformers.BertConfig()
    assert all(getattr(defaults, key) == value for key, value in bert.HF_CONFIG.values())
    assert all(getattr(defaults, key, value) == value for key, value in bert.HF_FIXED.items())
    (tmp_path / "config.json").write_text("{}")
    fields = bert.read_hf_config(tmp_path, bert.HF_CONFIG, bert.HF_FIXED)
    assert fields == {"vocab_size": 30522, "context": 512, "dim": 768, "n_layers": 12, "n_heads": 12, "hidden_dim": 3072, "gelu": "gelu"}


def test_reads_the_files_that_the_index_names(bert, tmp_path):
    """model.safetensors first; else those of the index, and none that lie beside them."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    cfg = bert.Config(**TINY)
    bert.to_hf(make_model(bert, ROW, cfg), cfg, tmp_path)
    expected = bert.from_hf(tmp_path)[0].state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tmp_path / file)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "model.safetensors").rename(tmp_path / "aside")
    found = bert.from_hf(tmp_path)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_export_then_init(main, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    flags = [*small(lr=0.01), "--data", text]
    trained = main(*flags, "--steps", 20, "--export", tmp_path / "hf")[1].split("val 20 | loss ")[1].split()[0]
    out = main(*flags, "--dim", 8, "--steps", 1, "--init", tmp_path / "hf")[1]
    assert out.split("val 0 | loss ")[1].split()[0] == trained
    assert transformers.BertForPreTraining.from_pretrained(tmp_path / "hf").config.vocab_size == 261


# Runs


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_two_phases_on_two_ranks_and_resumed(bert, ranks, objective, text, tmp_path, monkeypatch):
    """Ten updates, of 16 tokens and then of 32: whole, on two ranks with accumulation, and stopped in either phase."""
    more = dict(objective=objective, generator_divisor=2, long_share=0.3, long_seq_len=32, context=32, long_max_predictions=5, lr=1e-3)
    flags = [*small(**more), "--data", text, "--steps", 10, "--val_every", 4]

    def together(n, *more):
        (status, out, err), *_ = ranks.run(n, run_main, "bert", [str(flag) for flag in (*flags, *more)], timeout=120)
        assert status == 0, err
        return out

    def logged(name, key):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if key in row]

    rows = lambda name: logged(name, "loss")  # noqa: E731
    whole = together(1, "--out", tmp_path / "whole")
    assert [row["tokens"] for row in rows("whole")] == [*range(64, 449, 64), 448 + 128, 448 + 256, 448 + 384]
    assert re.findall(r"^val (\d+) .* length (\d+)$", whole, re.M) == [("0", "16"), ("4", "16"), ("8", "32"), ("10", "32")]
    spread = together(2, "--out", tmp_path / "ranks", "--micro_batch", 1)
    assert {"mlm", "mlm_acc", *(("nsp", "nsp_acc") if objective == "mlm" else ("rtd", "rtd_acc"))} <= rows("whole")[0].keys()
    for key in ("loss", "grad", "lr", "mlm", "mlm_acc"):
        assert [row[key] for row in rows("ranks")] == pytest.approx([row[key] for row in rows("whole")], rel=2e-4, abs=1e-4), key
    last = [re.search(r"val 10 \| loss (\S+) .* mlm_acc (\S+)", out).groups() for out in (whole, spread)]
    assert [float(x) for x in last[0]] == pytest.approx([float(x) for x in last[1]], rel=1e-3)
    inner = bert.update_model
    for stop in (3, 8):
        received, steps = [], itertools.count(1)

        def signalled(*args):
            received.extend([signal.SIGTERM] * (next(steps) == stop))
            return inner(*args)

        with monkeypatch.context() as patch:
            patch.setattr(bert, "catch_signals", lambda: received)
            patch.setattr(bert, "update_model", signalled)
            assert f"stopped after step {stop}" in run_main("bert", [*map(str, flags), "--out", str(tmp_path / f"{stop}")])[1]
        together(1, "--out", tmp_path / f"{stop}", "--resume")
        assert rows(f"{stop}") == rows("whole") and logged(f"{stop}", "val_loss") == logged("whole", "val_loss")


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_training_raises_accuracy_and_fills_in(main, tmp_path, objective):
    """A text whose every document is the same tells what is hidden in it."""
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat.\nthe dog ran to the door.\n\n" * 300)
    flags = [*small(lr=0.003, seq_len=64, context=64, max_predictions=12, n_layers=2, objective=objective, generator_divisor=2,
                    batch_size=16, warmup_steps=20), "--data", path, "--steps", 200, "--log_every", 50]  # fmt: skip
    _, out, err = main(*flags, "--prompt", "The cat [MASK]at on the mat.")
    first, last = (float(re.search(rf"val {step} \| loss \S+ .*?mlm_acc (\S+)", out)[1]) for step in (0, 200))
    assert first < 0.2 < 0.6 < last, (out, err)
    masked, filled = re.search(r"^masked: (.*)\nfilled: (.*)", out, re.M).groups()
    assert masked == "[CLS]the cat [MASK]at on the mat.[SEP]"
    assert re.fullmatch(r"\[CLS\]the cat .at on the mat\.\[SEP\]", filled)


def test_released_vocabulary_on_the_command_line(main, text, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCABULARY[:5], "line", "says", *"0123456789", *(f"##{i}" for i in range(10))]) + "\n")
    flags = [*small(tokenizer=path), "--steps", 2, "--prompt", "line [MASK] says 4"]
    status, first, err = main(*flags, "--data", text)
    assert status == 0 and "masked: [CLS] line [MASK] says 4 [SEP]" in first and "[UNK]" not in first.split("filled")[1], err
    assert main(*flags, "--data", text, "--write_tokens", tmp_path / "shards")[0] == 0
    status, again, err = main(*flags, "--data", tmp_path / "shards")
    assert status == 0 and again.count("step ") >= 2, err


def test_learned_vocabulary_goes_with_what_was_made_of_it(main, bert, text, tmp_path, monkeypatch):
    """Into --out, --export and --write_tokens, but into none that is refused; a resumed run learns the same."""
    monkeypatch.setattr(bert, "to_hf", lambda model, cfg, path: pathlib.Path(path).mkdir())  # which needs safetensors
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    flags, out, shards = small(tokenizer="wordpiece:100"), tmp_path / "out", tmp_path / "shards"
    more = pathlib.Path(text).read_text() + "".join(chr(97 + i % 26) * (1 + i // 26) + " " for i in range(500))
    pathlib.Path(text).write_text(more)
    assert main(*flags, "--data", text, "--steps", 1, "--out", out, "--export", tmp_path / "hf")[0] == 0
    first = (out / "vocab.txt").read_text()
    assert len(first.splitlines()) == 100 and (tmp_path / "hf" / "vocab.txt").read_text() == first
    assert main(*flags, "--data", text, "--write_tokens", shards)[0] == 0 and (shards / "vocab.wordpiece").read_text() == first
    other = tmp_path / "other.txt"
    other.write_text(more.replace("says", "tells"))
    assert main(*flags, "--data", other, "--steps", 1, "--out", out)[0] == 2 == main(*flags, "--data", other, "--write_tokens", shards)[0]
    status, _, err = main(*flags, "--data", other, "--steps", 2, "--out", out, "--resume")
    assert status == 2 and "data_fingerprint" in err
    assert (out / "vocab.txt").read_text() == first == (shards / "vocab.wordpiece").read_text(), "what was refused changed nothing"
    status, _, err = main(*flags, "--data", text, "--steps", 2, "--out", out, "--resume")
    assert status == 0 and (out / "vocab.txt").read_text() == first, err
    status, printed, err = main(*small(tokenizer=shards / "vocab.wordpiece"), "--data", shards, "--steps", 1)
    assert status == 0 and "step 1/1" in printed, err


def test_mistakes(main, text, tmp_path):
    one, single = tmp_path / "one.txt", tmp_path / "single.txt"
    one.write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    single.write_text("\n\n".join(f"line {i} says {i * i}" for i in range(2000)))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(entry for entry in VOCABULARY if entry != "[MASK]"))
    np.save(tmp_path / "wide.npy", np.resize(np.array([65, 66, 259, 67, 68, 259, 259, 261, 259], np.uint16), 5000))
    np.save(tmp_path / "ids.npy", np.resize(np.arange(65, 91, dtype=np.uint16), 5000))
    cases = [
        (["--data", one], "one.txt has 1 document to train on, and random sentences need 2"),
        (["--data", single], "has 2 sentences"),
        (["--tokenizer", vocabulary], "vocab.txt: none of its 21 entries is [MASK]"),
        (["--seq_len", 4], "--seq_len 4 does not hold [CLS] a [SEP] b [SEP], 5 tokens"),
        (["--long_seq_len", 3, "--long_share", 0.5], "--long_seq_len 3 does not hold"),
        (["--seq_len", 17], "--seq_len 17 exceeds --context 16"),
        (["--long_seq_len", 32, "--long_share", 0.5], "--long_seq_len 32 exceeds"),
        (["--long_micro_batch", 3, "--long_share", 0.5, "--long_seq_len", 8], "micro-batches of 3"),
        (["--n_heads", 5], "5 heads"), (["--dropout", 1.0], "--dropout 1.0"), (["--masked_lm_prob", 1.5], "--masked_lm_prob 1.5"),
        (["--short_seq_prob", -0.1], "--short_seq_prob -0.1"), (["--max_predictions", 0], "--max_predictions 0"),
        (["--objective", "rtd", "--generator_divisor", 5], "--generator_divisor 5"),
        (["--objective", "rtd", "--export", tmp_path / "hf"], "rtd trains ELECTRA"),
        (["--tokenizer", "wordpiece:many"], "wordpiece:many is not wordpiece:N"), (["--tokenizer", "wordpiece:99"], "N from 100"),
        (["--tokenizer", "wordpiece:9999"], "wordpiece:9999: the text to train on has"), (["--tokenizer", "wordpiece:200", "--init", tmp_path], "needs the --tokenizer of its vocabulary"),
        (["--vocab_size", 100], "--vocab_size 100"), (["--vocab_size", 260], "--vocab_size 260 is less than the 261 entries of the tokenizer, [MASK] among them"),
        (["--tokenizer=", "--data", tmp_path / "ids.npy"], "token shards need --tokenizer"),
        (["--tokenizer", "wordpiece:300", "--data", tmp_path / "ids.npy"], "token shards need --tokenizer"),
        (["--data", tmp_path / "ids.npy", "--write_tokens", tmp_path / "shards"], "--write_tokens reads text"),
        (["--data", tmp_path / "wide.npy", "--vocab_size", 300], "token id 261 is not in the vocabulary"),
        (["--init_std", 0], "--init_std 0.0"), (["--embedding_dim", 8], "--embedding_dim is of --objective rtd"), (["--prompt", "none"], "--prompt has no [MASK]"),
        (["--data", tmp_path / "ids.npy"], "1 document to train on"),
        (["--init", tmp_path], "holds no BertForPreTraining"), (["--long_share", 1.0, "--long_seq_len", 4], "--long_seq_len 4 does not hold"),
    ]  # fmt: skip
    for flags, phrase in cases:
        if "--init" in flags and "wordpiece:200" not in flags and not importlib.util.find_spec("safetensors"):
            phrase = "pip install safetensors"
        status, out, err = main(*small(), "--data", text, *flags)
        assert status == 2 and phrase in err and len(err.splitlines()) == 1, (flags, status, err)
        assert "step 1/" not in out


def test_documents_are_counted_within_a_block(main, bert, text, tmp_path, monkeypatch):
    """Where random sentences come from; a long document is no more than one, however many blocks it fills."""
    monkeypatch.setattr(bert, "BLOCK", 2**12)
    one = tmp_path / "one.txt"
    one.write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    status, _, err = main(*small(), "--data", one)
    assert status == 2 and "one.txt has 1 document to train on, and random sentences need 2" in err
    status, _, err = main(*small(), "--data", text, "--steps", 1)
    assert status == 0, err


def test_held_out_single_document_is_said(main, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {k} of {i} says {k * k}.\n" for k in range(500)))
    status, out, err = main(*small(sentences="prose"), "--data", tmp_path, "--steps", 1)
    assert status == 0 and "held out is one document" in out, err


def test_demo_corpus(bert):
    """Modules with docstrings and comments: prose, in documents of many sentences."""
    found = dict(bert.split_sentences(bert.read_documents("", bert.find_files("")[0]), bert.Config()))
    assert len(found) > 400 and sum(len(sentences) > 1 for sentences in found.values()) > 350
    assert sum(len(s) for sentences in found.values() for s in sentences) > 1.5e6
    assert any("command-line parsing library" in sentence for sentence in found["argparse.py"])
    assert not any("import sys" in sentence for sentence in found["argparse.py"])
