"""BERT and ELECTRA: the specification's golden values and worked examples, the released builder, layouts, Hugging Face."""
import collections
import dataclasses
import itertools
import json
import math
import random
import re
import time

import bert
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import global_batch, make_corpora, make_model, run_main

ROW = dataclasses.replace(SCRIPTS["bert"], model="build_model")
TINY = ROW.tiny
WAYS = [dict(), dict(nsp=False), dict(objective="rtd", nsp=False)]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"{c}{i}" for c, n in (("a", 10), ("b", 7), ("c", 8)) for i in range(1, n + 1)]
TOY = bert.WordPiece(WORDS, "toy")


def small(**more):
    flags = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, **ROW.small, **more}
    return [f"--{flag}={value}" for flag, value in flags.items()]


@pytest.fixture
def text(tmp_path):
    """A hundred documents of twenty lines."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
    return tmp_path / "text.txt"


def hf_order(n_layers):
    """Names of BertForPreTraining's parameters, in their order."""
    both = lambda *names: [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]  # noqa: E731
    order = [f"bert.embeddings.{key}_embeddings.weight" for key in ("word", "position", "token_type")] + both("bert.embeddings.LayerNorm")
    kinds = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense",
             "output.dense", "output.LayerNorm")  # fmt: skip
    order += both(*(f"bert.encoder.layer.{i}.{kind}" for i in range(n_layers) for kind in kinds), "bert.pooler.dense") + ["cls.predictions.bias"]
    return order + both("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.seq_relationship")


def test_golden_value():
    """The specification's, of Hugging Face's BertForPreTraining in float64; the tanh form of GELU differs by 8e-6."""
    cfg = bert.Config(vocab_size=96, context=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0, precision="fp32")
    tokens = ((torch.arange(32) * 7 + 3) % 96).view(2, 16)
    segments, mask = torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.bool)
    segments[:, 8:], mask[1, 12:] = 1, False
    batch = dict(tokens=tokens, segments=segments, attention_mask=mask, positions=torch.tensor([[3, 9], [5, 0]]), n_targets=3, n_sequences=2,
                 labels=torch.tensor([[11, 22], [33, -100]]), is_random=torch.tensor([0, 1]))  # fmt: skip
    for gelu, total in (("tanh", 5.3420574), ("none", 5.3420651)):
        model = bert.BERT(dataclasses.replace(cfg, gelu=gelu)).double().eval()
        tensors = dict(bert.bert_tensors(model))
        assert bert.count_parameters(model)[0] == 117_090 and sorted(hf_order(2)) == sorted(tensors)
        for k, name in enumerate(hf_order(2)):
            values = 0.1 * torch.sin(0.37 * torch.arange(tensors[name].numel(), dtype=torch.float64) + k)
            tensors[name].copy_((values + (tensors[name].ndim == 1 and name.endswith("weight"))).view_as(tensors[name]))
        logits, next_logits = model(tokens, segments, mask)
        nats = F.cross_entropy(logits[[0, 0, 1], [3, 9, 5]], torch.tensor([11, 22, 33])).item()
        nsp = F.cross_entropy(next_logits, torch.tensor([0, 1])).item()
        assert nats + nsp == pytest.approx(total, abs=6e-8)
        loss, metrics = bert.objective(model, batch, cfg)  # in fp32, and with 1e-5 in the denominator
        assert loss.item() == pytest.approx(nats * 3 / 3.00001 + nsp, abs=2e-6) and metrics["nsp"].item() == pytest.approx(nsp, abs=1e-6)
    assert [*logits[0, 0, :3].tolist(), nats, nsp] == pytest.approx([0.1407120, 0.2865326, 0.0888782, 4.6667141, 0.6753510], abs=6e-8)
    assert next_logits.flatten().tolist() == pytest.approx([0.1661157, 0.1692225, 0.0815836, 0.1573107], abs=6e-8)


def test_presets_are_the_papers():
    """Table 6 and A.2, ELECTRA's Table 6; parameters of BertModel, without heads, and of ELECTRA's discriminator."""
    large = (24, 1024, 16, 4096)
    rows = {"base": (109_482_240, 12, 768, 12, 3072), "large": (335_141_888, *large), "base_cased": (108_310_272, 12, 768, 12, 3072),
            "large_cased": (333_579_264, *large), "l3_h768_a12": (45_691_392, 3, 768, 12, 3072), "l6_h768_a3": (66_955_008, 6, 768, 3, 3072),
            "l6_h768_a12": (66_955_008, 6, 768, 12, 3072), "l12_h1024_a16": (183_987_200, 12, *large[1:]), "electra_small": (13_549_057, 12, 256, 4, 1024)}  # fmt: skip
    for preset, (count, *sizes) in rows.items():
        c = bert.Config(**bert.PRESETS[preset])
        with torch.device("meta"):
            model = bert.build_model(c)
        parts = ("embeddings", "project", "discriminator", "dense", "score") if preset == "electra_small" else ("embeddings", "encoder", "pooler")
        assert sum(p.numel() for part in parts for p in getattr(model, part).parameters()) == count, preset
        assert [c.n_layers, c.dim, c.n_heads, c.hidden_dim] == sizes and c.vocab_size == (28_996 if "_cased" in preset else 30_522)
        assert (c.warmup_steps, c.steps, c.weight_decay, c.clip, c.dropout, c.masked_lm_prob) == (10_000, 10**6, 0.01, 1.0, 0.1, 0.15)
        lengths = (c.lr, c.batch_size, c.seq_len, c.long_seq_len, c.long_share, c.max_predictions, c.long_max_predictions, c.short_seq_prob, c.dupe_factor)
        assert preset == "electra_small" or lengths == (1e-4, 256, 128, 512, 0.1, 20, 77, 0.1, 10)
    assert (c.lr, c.batch_size, c.seq_len, c.long_share) == (5e-4, 128, 128, 0.0)
    for step, *expected in ((0, 128, 20), (899_999, 128, 20), (900_000, 512, 77), (10**6, 512, 77)):
        phase = bert.phase_at(step, bert.Config())
        assert [phase.seq_len, phase.max_predictions] == expected


def test_every_token_is_seen_and_padding_is_not():
    cfg = bert.Config(**TINY)
    model = make_model(bert, ROW, cfg).eval()
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(9) > 4).long().expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    logits, next_logits = model(tokens, segments, mask)
    for found, alone in zip((logits[:1, :6], next_logits[:1]), model(tokens[:1, :6], segments[:1, :6], mask[1:, :6])):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    for j in range(9):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % 256
        moved, next_moved = (a != b for a, b in zip(model(changed, segments, mask), (logits, next_logits)))
        assert moved.any(-1)[0, :6].tolist() == [j < 6] * 6 and next_moved[0].all() == (j < 6) and not moved[1].any()
    assert not torch.equal(model(tokens, 1 - segments, mask)[0], logits), "segments count"
    positions = torch.tensor([[5, 0, 2], [8, 8, 1]])
    torch.testing.assert_close(model(tokens, segments, mask, positions)[0], logits[torch.arange(2)[:, None], positions], atol=1e-6, rtol=1e-6)


def test_initialisation_and_dropout(monkeypatch):
    """N(0, 0.02) cut at 2 σ has a deviation of 0.0176; ELECTRA's projections are Glorot-uniform. Heads have no dropout."""
    for way in WAYS:
        cfg = bert.Config(**TINY | dict(dim=192, hidden_dim=402, vocab_size=500) | way)
        model = bert.build_model(cfg)
        for p in model.parameters():
            p.data.fill_(7)
        bert.init_weights(model, cfg)
        for name, p in model.named_parameters():
            if re.search("project.weight|score.weight", name):
                limit = math.sqrt(6 / sum(p.shape))
                assert 0.95 * limit < p.abs().max() <= limit, name
            elif p.ndim > 1:
                assert p.abs().max() <= 0.04 and (p.numel() < 5000 or p.std().item() == pytest.approx(0.0176, rel=0.03)), name
            else:
                assert p.unique().tolist() == [float("norm" in name and name.endswith("weight"))], name
    cfg, seen = bert.Config(**TINY | dict(dropout=0.3)), []
    model, inner, attend = make_model(bert, ROW, cfg), F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p, training)) or inner(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **k: seen.append(dropout_p) or attend(*a, dropout_p=dropout_p, **k))
    model.train()(torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool))
    assert seen == [(0.3, True)] + [0.3, (0.3, True), (0.3, True)] * cfg.n_layers


def test_sentences_of_python_text_and_lines():
    code = '"""Summary of it.\n\nLonger e.g. this one. Second Sentence! 3 more\nlines."""\nimport os  # not this\nx = """not\n"""\ny = "# nor this"\n'
    code += "# A comment of\n# two lines. And more.\ndef f():\n    r\'\'\'It's \"quoted\".\'\'\'\n    #: Kept.\n    return '\"\"\"'\n"
    cfg = bert.Config(uncased=False)
    assert list(bert.split_sentences([("m.py", code)], cfg)) == [("m.py", ["Summary of it.", "Longer e.g. this one.", "Second Sentence!", "3 more lines.",
                                                                          "A comment of two lines.", "And more.", 'It\'s "quoted".', "Kept."])]  # fmt: skip
    assert dict(bert.split_sentences([("t.txt", "Ça va.  Bien\u0301!\n\n---\n\nEnd")], bert.Config()))["t.txt"] == ["ca va.", "bien!", "end"]
    lines = dict(bert.split_sentences([("t.txt", "One sentence. Still one\nanother\n\n\nThird\n")], bert.Config(sentences="lines")))
    assert list(lines.values()) == [["one sentence. still one", "another"], ["third"]]
    assert len(list(bert.split_sentences([(whole := "a line\n\n" * 99, whole)], bert.Config(sentences="lines")))) == 99


def test_word_piece(tmp_path):
    """Greedy, longest first: the specification's section 7; what Unicode has not assigned is [UNK]."""
    entries = [*bert.SPECIALS, "un", "##aff", "##able", "##a", "runn", "##ing", ",", "the", "!", "的", "5", "##€", "_", "\u2028", "\x85", "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    tokenizer = bert.load_wordpiece(tmp_path / "vocab.txt")
    spell = lambda text: " ".join(entries[i] for i in tokenizer.encode(bert.clean_text(text, True)))  # noqa: E731
    assert spell("UNaffable, the  running!") == "un ##aff ##able , the runn ##ing !" and spell("unaffablex the") == "[UNK] the"
    assert spell("thé的the") == "the 的 the" and spell("5€ _the") == "5 ##€ _ the"
    assert spell("un" + "a" * 198) == "un" + " ##a" * 198 and spell("un" + "a" * 199) == "[UNK]"
    assert spell("the\u200b \x00the\ufffd last") == "the the last" and spell("the \U0001fffe") == "the [UNK]"
    assert tokenizer.decode([2, 5, 6, 7, 11]) == "[CLS] unaffable ," and spell("the [MASK]") == "the [UNK] [UNK] [UNK]"
    documents = [(f"{i}", ["the cat (the)", "and the tar"]) for i in range(200)]
    learned = bert.learn_wordpiece(documents, 25).entries
    assert learned[:5] == list(bert.SPECIALS) and sorted(learned[5:15]) == sorted([*"thea", *"crnd()"]) and learned[23:] == ["the", "cat"]
    assert learned[15:23] == [f"##{c}" for c in learned[5:15] if c not in "()"]
    strange = [(name, ["zebra"] * 5000 if bert.is_held_out(name) else sentences) for name, sentences in documents]
    assert strange != documents and bert.learn_wordpiece(strange, 25).entries == learned, "not learned from held out"


def with_masks(documents, cfg, rng):
    """(as seen, length of segment A, is random, positions and labels) of each pair, in words, drawn in the released order."""
    ids = [[[WORDS.index(word) for word in sentence] for sentence in document] for document in documents]
    for index in range(len(ids)):
        for a, b, is_random in bert.create_pairs(ids, index, cfg.seq_len, cfg.short_seq_prob, rng):
            seen, positions, labels = bert.create_masked_lm_predictions([2, *a, 3, *b, 3], cfg, TOY, rng)
            yield [WORDS[i] for i in seen], len(a) + 2, is_random, [(p, WORDS[i]) for p, i in zip(positions, labels)]


DOCUMENTS = [[s.split() for s in d.split("|")] for d in ("a1 a2 a3|a4 a5|a6 a7 a8 a9|a10", "b1 b2|b3 b4 b5|b6 b7", "c1 c2 c3 c4 c5 c6|c7 c8")]
EXPECTED = """CLS M a2 a3 SEP a4 a5 a6 a7 a8 a9 a10 SEP | 5 | False | 1 a1 8 a7
CLS b1 b2 SEP c1 c2 M c4 c5 M c7 c8 SEP | 4 | True | 6 c3 9 c6
CLS b3 b4 b5 SEP c1 c2 c3 M c5 M c7 c8 SEP | 5 | True | 8 c4 10 c6
CLS b6 b7 SEP c7 c8 SEP | 4 | True | 2 b7
CLS c1 c2 c3 c4 M M SEP b6 b7 SEP | 8 | True | 5 c5 6 c6
CLS c7 M SEP c4 b4 b5 b6 b7 SEP | 4 | True | 2 c8 4 b3"""


def test_worked_example_token_for_token():
    found = []
    for seen, n_a, is_random, masked in with_masks(DOCUMENTS, bert.Config(seq_len=16, max_predictions=3), random.Random(12345)):
        words = " ".join(word.strip("[]").replace("MASK", "M") for word in seen)
        found.append(f"{words} | {n_a} | {is_random} | " + " ".join(f"{p} {word}" for p, word in masked))
    assert "\n".join(found) == EXPECTED


def released(documents, length, most_predictions, vocab, rng):
    """The specification's pseudo-code once more, with lists of words and none of the script's code."""
    for d, document in enumerate(documents):
        max_num = target = length - 3
        if rng.random() < 0.1:
            target = rng.randint(2, max_num)
        chunk, size, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            size += len(document[i])
            if i == len(document) - 1 or size >= target:
                a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                a, b, random_next = sum(chunk[:a_end], []), sum(chunk[a_end:], []), len(chunk) == 1 or rng.random() < 0.5
                if random_next:
                    others = (rng.randint(0, len(documents) - 1) for _ in range(10))
                    other = next((o for o in others if (last := o) != d), None)
                    other, b = last if other is None else other, []
                    for j in range(rng.randint(0, len(documents[other]) - 1), len(documents[other])):
                        b.extend(documents[other][j])
                        if len(b) >= target - len(a):
                            break
                    i -= len(chunk) - a_end
                while len(a) + len(b) > max_num:
                    (a if len(a) > len(b) else b).pop(0 if rng.random() < 0.5 else -1)
                output = ["[CLS]"] + a + ["[SEP]"] + b + ["[SEP]"]
                cand = [k for k, token in enumerate(output) if token not in ("[CLS]", "[SEP]")]
                rng.shuffle(cand)
                masked = [(k, output[k]) for k in cand[: min(most_predictions, max(1, int(round(len(output) * 0.15))))]]
                for k, _ in masked:
                    if rng.random() < 0.8:
                        output[k] = "[MASK]"
                    elif rng.random() >= 0.5:
                        output[k] = vocab[rng.randint(0, len(vocab) - 1)]
                yield output, len(a) + 2, random_next, sorted(masked)
                chunk, size = [], 0
            i += 1


def test_builder_is_the_released_one():
    rng = random.Random(0)
    for seed in range(200):
        documents = [[rng.choices(WORDS[5:], k=rng.randint(1, 12)) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(2, 6))]
        cfg = bert.Config(seq_len=rng.choice([5, 6, 16, 33, 64]), max_predictions=rng.choice([2, 20]))
        assert list(with_masks(documents, cfg, random.Random(seed))) == list(released(documents, cfg.seq_len, cfg.max_predictions, WORDS, random.Random(seed)))
    started = time.perf_counter()
    a, b = bert.truncate_pair(range(300_000), [1] * 9, 125, random.Random(0))
    assert (len(a), len(b)) == (116, 9) and list(a) == list(range(a[0], a[0] + 116)) and time.perf_counter() - started < 2, "no quadratic time"


def test_full_sentences():
    """RoBERTa's: what fits, across documents, with a separator between them; a sentence that is too long is cut."""
    documents = [[[10, 11, 12], [13, 14]], [[15] * 9], [[16]]]
    assert [a for a, b, is_random in bert.full_sentences(documents, 8, 3)] == [[10, 11, 12, 13, 14, 3], [15] * 6, [16, 3]]


@pytest.mark.parametrize("way", WAYS)
def test_batches(way, tmp_path):
    """Whole instances, padded; every instance once in an epoch; only predicted positions differ from the text."""
    cfg = bert.Config(**{**TINY, **way, "static_masks": True})
    corpus, heldout = make_corpora(bert, cfg)
    (rows,), ids = corpus.rows.values(), corpus.tokenizer.ids
    n = len(rows)
    batch, found, kinds = bert.get_batch(corpus, 0, n, cfg), [], collections.Counter()
    for row in range(n):
        tokens, segments, mask, positions, labels = (batch[k][row] for k in ("tokens", "segments", "attention_mask", "positions", "labels"))
        length, real, original = int(mask.sum()), labels >= 0, tokens.clone()
        assert mask[:length].all() and (tokens[length:] == ids["[PAD]"]).all() and not segments[length:].any()
        assert real.sum() == min(cfg.max_predictions, max(1, round(0.15 * length))) and (positions[real].diff() > 0).all()
        original[positions[real]] = labels[real]
        kinds.update(n=int(real.sum()), masked=int((tokens[positions[real]] == ids["[MASK]"]).sum()), tokens=length)
        ends = [j for j in range(length) if segments[j] != segments[min(j + 1, length - 1)]] + [length - 1]
        assert original[0] == ids["[CLS]"] and all(original[j] == ids["[SEP]"] for j in ends) and len(ends) == 1 + cfg.nsp
        parts = [original[1 : ends[0]], original[ends[0] + 1 : length - 1]]
        lengths = [len(part) for part in parts[: len(ends)]] + [0] * (2 - len(ends))
        found.append((*lengths, int(batch["is_random"][row]), *torch.cat(parts[: len(ends)]).tolist()))
    assert sorted(found) == sorted((*r[:3], *r[3 : 3 + r[0] + r[1]]) for r in rows.tolist()), "an epoch has every instance once"
    assert kinds["masked"] / kinds["n"] == pytest.approx(0.85 if cfg.objective == "rtd" else 0.8, abs=0.05)
    assert (batch["n_targets"], batch["n_tokens"], batch["n_random"]) == (kinds["n"], kinds["tokens"], int(batch["is_random"].sum()))
    again = bert.get_batch(corpus, n, n, cfg)["tokens"].tolist()
    assert again != batch["tokens"].tolist() and sorted(again) == sorted(batch["tokens"].tolist()), "another order, the same masks"
    anew = bert.get_batch(corpus, n, n, dataclasses.replace(cfg, static_masks=False))["tokens"].tolist()
    assert sorted(anew) != sorted(again) and heldout.in_order and not corpus.in_order


def plain_objective(model, batch, cfg):
    """Both losses slot by slot, from logits at every position."""
    inputs = [batch[name] for name in ("tokens", "segments", "attention_mask")]
    logits, next_logits, *_ = model(*inputs)
    nats, right, filled, original = [], 0, batch["tokens"].clone(), batch["tokens"].clone()
    for b, k in (batch["labels"] >= 0).nonzero().tolist():
        t, label = batch["positions"][b, k], batch["labels"][b, k]
        p = logits[b, t].double().softmax(-1)
        nats.append(-p[label].log())
        right += int(p.argmax() == label)
        original[b, t] = label
        if cfg.objective == "rtd":
            filled[b, t] = int((p.detach().cumsum(0) < batch["uniform"][b, k]).sum())
    mlm = sum(nats) / (len(nats) + 1e-5)
    wanted = dict(mlm=mlm, mlm_acc=right / len(nats))
    if cfg.nsp:
        wanted |= dict(nsp=F.cross_entropy(next_logits.double(), batch["is_random"]), nsp_acc=(next_logits.argmax(-1) == batch["is_random"]).double().mean())
    if cfg.objective == "mlm":
        return mlm + wanted.get("nsp", 0), wanted
    x = model.discriminator(model.project(model.embeddings(filled, inputs[1])), inputs[2])
    scores, replaced = model.score(model.gelu(model.dense(x)))[..., 0][inputs[2]].double(), (filled != original)[inputs[2]]
    rtd = -torch.where(replaced, scores.sigmoid(), 1 - scores.sigmoid()).log().mean()
    return mlm + 50 * rtd, wanted | dict(rtd=rtd, rtd_acc=((scores > 0) == replaced).double().mean())


def layout_gradients(overrides):
    """Loss, metrics and gradients of one global batch, as the script computes them on this rank."""
    device, cfg = bert.init_distributed(30), bert.Config(**{**TINY, **overrides})
    corpus, _ = make_corpora(bert, cfg)
    model = make_model(bert, ROW, cfg)
    rank, ranks = bert.dist.get_rank(), bert.dist.get_world_size()
    replicas = bert.parallelize(model, cfg, bert.init_device_mesh(device.type, (ranks,), mesh_dim_names=("dp",)))
    batches = global_batch(bert, corpus, cfg, device, rank, ranks)
    means = {name: value.item() for name, value in bert.run_batches(replicas, batches, cfg, backward=True).items()}
    return means, {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", [*WAYS, dict(recompute="block")], ids=["pairs", "sentences", "rtd", "recompute"])
def test_layouts_give_one_ranks_gradients(ranks, way):
    cfg = bert.Config(**{**TINY, **way, "recompute": "none"})
    batch = bert.get_batch(make_corpora(bert, cfg)[0], 3, 8, cfg)
    model = make_model(bert, ROW, cfg)
    loss, wanted = plain_objective(model, batch, cfg)
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(np.abs(g).max() for g in expected.values())
    for n, micro in [(2, 2)] if "recompute" in way else [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)]:
        for means, found in ranks.run(n, layout_gradients, {**way, "micro_batch": micro}):
            assert means.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
            assert means == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5, abs=1e-7)
            for name, g in found.items():
                limit = 1e-5 * max(np.abs(expected[name]).max(), 1e-3 * largest)
                assert np.abs(g - expected[name]).max() <= limit, (n, micro, name)


def test_generator_learns_from_its_own_loss_only():
    """No gradient flows through sampling, and a token that is drawn again counts as original."""
    cfg = bert.Config(**TINY | WAYS[2])
    batch, model = bert.get_batch(make_corpora(bert, cfg)[0], 3, 8, cfg), make_model(bert, ROW, cfg)
    _, metrics = bert.objective(model, batch, cfg)
    metrics["rtd"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None or not p.grad.any()) == name.startswith(("generator", "narrow", "mlm")), name
    with torch.no_grad():
        model.mlm.bias.fill_(-1e4)[20] = 1e4
    tokens, slots = torch.arange(5, 13)[None], torch.tensor([[2, 5, 0]])
    for label, wanted in ((20, []), (21, [2, 5])):
        _, _, replaced = model(tokens, tokens * 0, tokens > 0, slots, torch.tensor([[label, label, -100]]), torch.full((1, 3), 0.5))
        assert replaced[0].nonzero().flatten().tolist() == wanted


def test_adam_of_the_released_code():
    """The specification's scalar: p = 1, rate 1e-4, gradients 0.5 and then -0.25; all but norms and biases decay. ELECTRA's rate."""
    layer = torch.nn.Linear(1, 1).double()
    optimizer = bert.build_optimizer(layer, bert.Config())
    for p in layer.parameters():
        p.data.fill_(1)
    for step, grad, value in ((1, 0.5, 0.9996827922), (2, -0.25, 0.9995686166)):
        for p in layer.parameters():
            p.grad = torch.full_like(p, grad)
        optimizer.step()
        assert layer.weight.item() == pytest.approx(value, abs=1e-10) and layer.bias.item() - value == pytest.approx(step * 1e-6, abs=1e-9)
    model = bert.BERT(bert.Config(**TINY))
    groups = {id(p): group["weight_decay"] for group in bert.build_optimizer(model, bert.Config()).param_groups for p in group["params"]}
    assert all(groups[id(p)] == (0.0 if re.search("norm|bias", name) else 0.01) for name, p in model.named_parameters())
    cfg = bert.Config(objective="rtd", lr=5e-4)
    for step, rate in ((0, 0), (5000, 5e-4 * 0.5 * 0.995), (10_000, 5e-4 * 0.99), (500_000, 2.5e-4)):
        assert bert.learning_rate(step, cfg) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("gelu, nsp", [("none", True), ("tanh", True), ("none", False)])
def test_hugging_face_reads_and_writes_the_same_model(gelu, nsp, tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = bert.Config(**TINY | dict(gelu=gelu, nsp=nsp))
    model = make_model(bert, ROW, cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # so that errors show
    bert.to_hf(model, cfg, tmp_path / "ours")
    kind = transformers.BertForPreTraining if nsp else transformers.BertForMaskedLM
    theirs = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    batch = bert.get_batch(make_corpora(bert, cfg)[0], 3, 8, cfg)
    targets, real = torch.full_like(batch["tokens"], -100), batch["attention_mask"]
    for b, k in (batch["labels"] >= 0).nonzero().tolist():
        targets[b, batch["positions"][b, k]] = batch["labels"][b, k]
    more = dict(next_sentence_label=batch["is_random"]) if nsp else {}
    output = theirs(batch["tokens"], real, batch["segments"], labels=targets, **more)
    logits, _ = model(batch["tokens"], batch["segments"], real)
    expected = output.prediction_logits if nsp else output.logits
    assert (logits - expected)[real].abs().max() <= 1e-5 * expected.abs().max()
    loss, _ = bert.objective(model, batch, cfg)
    assert loss.item() == pytest.approx(output.loss.item(), rel=3e-6)
    loss.backward()
    output.loss.backward()
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    read, fields = bert.from_hf(tmp_path / "gradients")
    assert {name: getattr(fields, name) for name in bert.SHAPE} == {name: getattr(cfg, name) for name in bert.SHAPE}
    largest = max(p.grad.abs().max() for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), read.parameters()):
        rows = slice(1, None) if name == "embeddings.token.weight" else slice(None)  # theirs has [PAD]'s row 0 learn nothing
        assert (p.grad[rows] - q[rows]).abs().max() <= 1e-5 * max(q[rows].abs().max(), 1e-2 * largest), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key, value in dict(model_type="roberta", layer_norm_eps=1e-5, hidden_act="relu", type_vocab_size=1, hidden_size=27, vocab_size=260).items():
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match="holds no BertForPreTraining or BertForMaskedLM"):
            bert.from_hf(tmp_path / "ours")


def main(ranks, *flags):
    (status, out, err), *_ = ranks.run(1, run_main, "bert", [str(flag) for flag in flags], timeout=120)
    return status, out, err


def test_cased_export_then_init(ranks, text, tmp_path):
    """Hugging Face's tokenizer and ours agree on what is exported; --init goes on with vocabulary and case."""
    transformers = pytest.importorskip("transformers")
    text.write_text(text.read_text().replace("line", "Line é"))
    flags = [*small(lr=0.01), "--data", text, "--steps", 20, "--no-uncased"]
    val = main(ranks, *flags, "--export", tmp_path / "hf")[1].split("val 20 | ")[1].split("\n")[0]
    status, out, err = main(ranks, *small(dim=8), "--data", text, "--init", tmp_path / "hf", "--eval")
    assert not status and out.split("val 0 | ")[1].split("\n")[0] == val, err
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), bert.load_wordpiece(tmp_path / "hf" / "vocab.txt")
    for sentence in ("Line é 7 says 49, line.", "na\u0308ive $5\t(\u00adsoft)\u3000的"):
        assert theirs(sentence)["input_ids"][1:-1] == ours.encode(bert.clean_text(sentence, False)) and theirs.pad_token_id == 0


@pytest.mark.parametrize("way", WAYS[::2], ids=["mlm", "rtd"])
def test_two_phases_on_two_ranks_resumed_and_from_instances(ranks, way, text, tmp_path, monkeypatch):
    """Ten updates, of 16 tokens and then of 32: whole, on two ranks with accumulation from instances, and stopped in either phase."""
    more = dict(long_share=0.3, long_seq_len=32, context=32, long_max_predictions=5, lr=1e-3, objective=way.get("objective", "mlm"))
    flags = [*small(**more), *["--no-nsp"] * (way != {}), "--steps", 10, "--val_every", 4]

    def logged(name, key="loss"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if key in row]

    assert main(ranks, *flags, "--data", text, "--write_instances", tmp_path / "made")[0] == 0
    status, whole, err = main(ranks, *flags, "--data", text, "--out", tmp_path / "whole")
    assert not status and [row["tokens"] for row in logged("whole")] == [*range(64, 449, 64), 448 + 128, 448 + 256, 448 + 384], err
    assert re.findall(r"^val (\d+) .* length (\d+)$", whole, re.M) == [("0", "16"), ("4", "16"), ("8", "32"), ("10", "32")]
    assert "masked: [CLS]" in whole and "filled: " in whole and (tmp_path / "whole" / "vocab.txt").read_text() == (tmp_path / "made" / "vocab.txt").read_text()
    ranks.run(2, run_main, "bert", [str(f) for f in (*flags, "--data", tmp_path / "made", "--out", tmp_path / "two", "--micro_batch", 1)], timeout=120)
    for rows in (logged("two"), logged("whole")), (logged("two", "val_loss"), logged("whole", "val_loss")):
        for key in {"loss", "grad", "lr", "mlm", "mlm_acc", "nsp", "rtd_acc", "val_loss", "val_mlm"} & rows[0][0].keys():
            assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=2e-4, abs=1e-4), key
    inner = bert.update_model
    for stop in (3, 8):
        received, steps = [], itertools.count(1)
        with monkeypatch.context() as patch:
            patch.setattr(bert, "catch_signals", lambda: received)
            patch.setattr(bert, "update_model", lambda *args: received.extend([15] * (next(steps) == stop)) or inner(*args))
            assert f"stopped after step {stop}" in run_main("bert", [*map(str, flags), f"--data={text}", f"--out={tmp_path}/{stop}"])[1]
        main(ranks, *flags, "--data", text, "--out", tmp_path / f"{stop}", "--resume")
        assert logged(f"{stop}") == logged("whole") and logged(f"{stop}", "val_loss") == logged("whole", "val_loss")
