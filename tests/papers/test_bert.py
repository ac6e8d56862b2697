"""BERT and ELECTRA: the specification's golden values and worked examples, layouts, Hugging Face, runs; in the order of the script."""
import dataclasses
import hashlib
import json
import math
import random
import re
import sysconfig

import bert
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import gradients, make_corpora, make_model, run_main

ROW = dataclasses.replace(SCRIPTS["bert"], model="build_model")
WAYS = [dict(), dict(nsp=False), dict(objective="rtd", nsp=False)]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"{c}{i}" for c, n in (("a", 10), ("b", 7), ("c", 8)) for i in range(1, n + 1)]
EXPECTED = """CLS MASK a2 a3 SEP a4 a5 a6 a7 a8 a9 a10 SEP | 5 | False | 1 a1 8 a7
CLS b1 b2 SEP c1 c2 MASK c4 c5 MASK c7 c8 SEP | 4 | True | 6 c3 9 c6
CLS b3 b4 b5 SEP c1 c2 c3 MASK c5 MASK c7 c8 SEP | 5 | True | 8 c4 10 c6
CLS b6 b7 SEP c7 c8 SEP | 4 | True | 2 b7
CLS c1 c2 c3 c4 MASK MASK SEP b6 b7 SEP | 8 | True | 5 c5 6 c6
CLS c7 MASK SEP c4 b4 b5 b6 b7 SEP | 4 | True | 2 c8 4 b3"""


def test_initialisation_and_dropout(monkeypatch):
    """N(0, 0.02) cut at 2 σ has a deviation of 0.0176; ELECTRA's projections are Glorot-uniform. Heads have no dropout."""
    for way in WAYS:
        cfg = bert.Config(**ROW.tiny | way | dict(dim=192, hidden_dim=402, vocab_size=500))
        model = bert.build_model(cfg)
        bert.init_weights(model, cfg)
        for name, p in model.named_parameters():
            if re.search("project.weight|score.weight", name):
                assert 0.95 < p.abs().max() / math.sqrt(6 / sum(p.shape)) <= 1, name
            elif p.ndim > 1:
                assert p.abs().max() <= 0.04 and (p.numel() < 5000 or p.std().item() == pytest.approx(0.0176, rel=0.03)), name
            else:
                assert p.unique().tolist() == [float("norm" in name and name.endswith("weight"))], name
    seen = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p, training)) or x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, dropout_p: seen.append(dropout_p) or q)
    bert.BERT(bert.Config(**ROW.tiny | dict(dropout=0.3)))(*torch.ones(2, 2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool))
    assert seen == [(0.3, True)] + 2 * [0.3, (0.3, True), (0.3, True)]


def test_presets_are_the_papers():
    """Table 6 and A.2; ELECTRA's Table 6, and the parameters of its discriminator. test_shapes.py has the other counts."""
    cfgs = {name: bert.Config(**preset) for name, preset in bert.PRESETS.items()}
    assert [cfgs[name].n_heads for name in "base large l3_h768_a12 l6_h768_a3 l6_h768_a12 l12_h1024_a16 electra_small".split()] == [12, 16, 12, 3, 12, 16, 4]
    for c, *expected in (cfgs["large"], 256, 1e-4, 128, 20, 512, 77), (cfgs["electra_small"], 128, 5e-4, 128, 19, 128, 19):
        assert [c.batch_size, c.lr, *(n for step in (899_999, 900_000) for p in [bert.phase_at(step, c)] for n in (p.seq_len, p.max_predictions))] == expected
        assert (c.warmup_steps, c.steps, c.weight_decay, c.clip, c.dropout, c.masked_lm_prob, c.dupe_factor) == (10_000, 10**6, 0.01, 1, 0.1, 0.15, 10)
    assert sum(p.numel() for name, p in bert.build_model(c).named_parameters() if re.match("embeddings|project|discriminator|dense|score", name)) == 13_549_057


def test_golden_value():
    """The specification's, of Hugging Face in float64 and in the order of its parameters; tanh GELU differs by 8e-6. Tokens, not padding, are seen."""
    parts = "bert cls embeddings encoder pooler predictions seq_relationship word_embeddings position_embeddings token_type_embeddings layer attention".split()
    parts += "intermediate self output query key value dense LayerNorm weight bias transform".split()
    place = lambda name: [int(part) if part.isdigit() else parts.index(part) for part in name.split(".")]  # noqa: E731
    inputs = ((torch.arange(32) * 7 + 3) % 96).view(2, 16), torch.arange(16).ge(8).long().expand(2, 16), torch.arange(16) < torch.tensor([[16], [12]])
    batch = dict(zip(("tokens", "segments", "attention_mask"), inputs), positions=torch.tensor([[3, 9], [5, 0]]), n_targets=3, n_sequences=2,
                 labels=torch.tensor([[11, 22], [33, -100]]), is_random=torch.tensor([0, 1]))  # fmt: skip
    for gelu, total in ("tanh", 5.3420574), ("none", 5.3420651):
        cfg = bert.Config(vocab_size=96, context=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0, precision="fp32", gelu=gelu)
        model = bert.BERT(cfg).double()
        for k, (name, p) in enumerate(sorted(bert.bert_tensors(model), key=lambda item: place(item[0]))):
            p.copy_(0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + k).view_as(p) + (p.ndim == 1 and name.endswith("weight")))
        logits, next_logits = model(*inputs)
        nats = F.cross_entropy(logits[[0, 0, 1], [3, 9, 5]], torch.tensor([11, 22, 33])).item()
        nsp = F.cross_entropy(next_logits, torch.tensor([0, 1])).item()
        assert nats + nsp == pytest.approx(total, abs=6e-8)
        loss, metrics = bert.objective(model, batch, cfg)  # in fp32, and with 1e-5 in the denominator
        assert loss.item() == pytest.approx(nats * 3 / 3.00001 + nsp, abs=2e-6) and metrics["nsp"].item() == pytest.approx(nsp, abs=1e-6)
    assert bert.count_parameters(model)[0] == 117_090 and metrics["nsp_acc"] == 0.5
    assert [*logits[0, 0, :3].tolist(), nats, nsp] == pytest.approx([0.1407120, 0.2865326, 0.0888782, 4.6667141, 0.6753510], abs=6e-8)
    assert next_logits.flatten().tolist() == pytest.approx([0.1661157, 0.1692225, 0.0815836, 0.1573107], abs=6e-8)
    for output, length in (logits[0, 0, 0], 16), (logits[1, 11, 0], 12), (next_logits[1, 0], 12):
        (seen,) = torch.autograd.grad(output, model.embeddings.position.weight, retain_graph=True)
        assert seen.any(1).nonzero().flatten().tolist() == list(range(length))


def test_sentences_of_python():
    code = '"""Summary of it.\n\nLonger e.g. this one. Second Sentence! 3 more\nlines."""\nimport os  # not """this\nx = """not\n"""\ny = "# nor this"\n'
    code += "# A comment of\n# two lines. And more.\ndef f():\n    r\'\'\'It's \"quoted\".\'\'\'\n    #: Kept.\n    return '\"\"\"'\n"
    ((_, found),) = bert.split_sentences([("m.py", code)], bert.Config(uncased=False))
    assert "|".join(found) == 'Summary of it.|Longer e.g. this one.|Second Sentence!|3 more lines.|A comment of two lines.|And more.|It\'s "quoted".|Kept.'


def test_word_piece(tmp_path):
    """Greedy, longest first: the specification's section 7; what Unicode has not assigned is [UNK]. It is not learned from what is held out."""
    entries = [*bert.SPECIALS, "un", "##aff", "##able", "##a", "runn", "##ing", ",", "the", "!", "的", "5", "##€", "_", "\u2028", "\x85", "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    tokenizer = bert.load_wordpiece(tmp_path / "vocab.txt")
    for text, pieces in (
        ("UNaffable, the  running!", "un ##aff ##able , the runn ##ing !"), ("unaffablex the", "[UNK] the"), ("thé的the", "the 的 the"),
        ("un" + "a" * 198, "un" + " ##a" * 198), ("un" + "a" * 199, "[UNK]"), ("the\u200b \x00the\ufffd last", "the the last"),
        ("5€ _the [MASK] \U0001fffe", "5 ##€ _ the [UNK] [UNK] [UNK] [UNK]"),
    ):  # fmt: skip
        assert " ".join(entries[i] for i in tokenizer.encode(bert.clean_text(text, True))) == pieces
    documents = [(f"{i}", ["zebra"] * 5000 if bert.is_held_out(f"{i}") else ["the cat (the)", "and the tar"]) for i in range(200)]
    learned = bert.learn_wordpiece(documents, 25).entries
    assert sorted(learned[5:15]) == sorted("theacrnd()") and learned[15:] == [*(f"##{c}" for c in learned[5:15] if c not in "()"), "the", "cat"]


def instances(documents, seq_len, max_predictions, rng):
    cfg, toy, lines = bert.Config(seq_len=seq_len, max_predictions=max_predictions), bert.WordPiece(WORDS, "toy"), []
    for index in range(len(documents)):
        for a, b, is_random in bert.create_pairs(documents, index, seq_len, cfg.short_seq_prob, rng):
            seen, positions, labels = bert.create_masked_lm_predictions([2, *a, 3, *b, 3], cfg, toy, rng)
            masked = " ".join(f"{p} {WORDS[i]}" for p, i in zip(positions, labels))
            lines.append(f"{' '.join(WORDS[i].strip('[]') for i in seen)} | {len(a) + 2} | {is_random} | {masked}")
    return "\n".join(lines)


def test_worked_example_token_for_token():
    """The specification's; the digest of what its pseudo-code, written once more without the script, makes of 200 corpora; RoBERTa's full sentences."""
    documents = [[[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]], [[15, 16], [17, 18, 19], [20, 21]], [[22, 23, 24, 25, 26, 27], [28, 29]]]
    assert instances(documents, 16, 3, random.Random(12345)) == EXPECTED
    rng, digest = random.Random(0), hashlib.sha256()
    for seed in range(200):
        documents = [[rng.choices(range(5, 30), k=rng.randint(1, 12)) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(2, 6))]
        digest.update(instances(documents, rng.choice([5, 6, 16, 33, 64]), rng.choice([2, 20]), random.Random(seed)).encode())
    assert digest.hexdigest()[:16] == "949c19791dcb801b"
    assert [a for a, *_ in bert.full_sentences([[[10, 11, 12], [13, 14]], [[15] * 9], [[16]]], 8, 3)] == [[10, 11, 12, 13, 14, 3], [15] * 6, [16, 3]]


@pytest.mark.parametrize("way", WAYS)
def test_batches(way):
    """An epoch has every instance once, whole and padded, in an order of its own; only predicted positions differ from the text."""
    cfg = bert.Config(**ROW.tiny | way | dict(static_masks=True))
    corpus, _ = make_corpora(bert, cfg)
    (rows,) = corpus.rows.values()
    batch, again, anew = (bert.get_batch(corpus, i * len(rows), len(rows), dataclasses.replace(cfg, static_masks=i < 2)) for i in range(3))
    mask, real = batch["attention_mask"], batch["labels"] >= 0
    slots = torch.arange(len(rows))[:, None].expand_as(real)[real], batch["positions"][real]
    text = batch["tokens"].index_put(slots, batch["labels"][real])
    expected = [[is_random, 2, *row[:n_a], 3, *row[n_a : n_a + n_b], *[3] * cfg.nsp] for n_a, n_b, is_random, *row in rows.tolist()]
    assert sorted([int(r), *row[m].tolist()] for r, row, m in zip(batch["is_random"], text, mask)) == sorted(expected) and not text[~mask].any()
    assert torch.equal(batch["segments"], (((text == 3).cumsum(1) - (text == 3).long() == 1) & mask).long() * cfg.nsp)
    assert real.sum(1).tolist() == [min(cfg.max_predictions, max(1, round(0.15 * n))) for n in mask.sum(1).tolist()]
    assert (batch["n_targets"], batch["n_tokens"], batch["n_random"], batch["n_sequences"]) == (real.sum(), mask.sum(), batch["is_random"].sum(), len(rows))
    assert (batch["tokens"][slots] == 4).double().mean() == pytest.approx(0.85 if cfg.objective == "rtd" else 0.8, abs=0.024), "[MASK]"
    first, second, third = (part["tokens"].tolist() for part in (batch, again, anew))
    assert first != second and sorted(first) == sorted(second) != sorted(third), "static masks are the same in each epoch"


def test_replaced_token_detection():
    """The generator's loss and its samples, of which one that is the original counts as original; no gradient flows through them."""
    cfg = bert.Config(**ROW.tiny | WAYS[2])
    batch, model = bert.get_batch(make_corpora(bert, cfg)[0], 3, 8, cfg), make_model(bert, ROW, cfg)
    model.mlm.bias.data[[33, 39]] += 10  # what it draws is the original at times
    tokens, segments, mask, real = batch["tokens"], batch["segments"], batch["attention_mask"], batch["labels"] >= 0
    slots, labels = (torch.arange(8)[:, None].expand_as(real)[real], batch["positions"][real]), batch["labels"][real]
    p = model(tokens, segments, mask)[0][slots].double().softmax(-1)
    filled = tokens.index_put(slots, (p.cumsum(1) < batch["uniform"][real][:, None]).sum(1))
    x = model.discriminator(model.project(model.embeddings(filled, segments)), mask)
    scores, replaced = model.score(model.gelu(model.dense(x)))[mask][:, 0], (filled != tokens.index_put(slots, labels))[mask]
    mlm, rtd = F.nll_loss(p.log(), labels), F.binary_cross_entropy_with_logits(scores, replaced.float())
    expected = mlm + 50 * rtd, mlm, (p.argmax(1) == labels).double().mean(), rtd, ((scores > 0) == replaced).double().mean()
    loss, metrics = bert.objective(model, batch, cfg)
    assert [x.item() for x in (loss, *metrics.values())] == pytest.approx([x.item() for x in expected], rel=1e-5) and 0 < replaced.sum() < len(labels)
    metrics["rtd"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None or not p.grad.any()) == name.startswith(("generator", "narrow", "mlm")), name


def test_adam_of_the_released_code():
    """The specification's scalar: p = 1, rate 1e-4, gradients 0.5 and then -0.25; norms and biases do not decay. ELECTRA's rate."""
    model = torch.nn.ModuleDict(dict(linear=torch.nn.Linear(1, 1), norm=torch.nn.LayerNorm(1, bias=False))).double()
    optimizer = bert.build_optimizer(model, bert.Config())
    torch.nn.utils.vector_to_parameters(torch.ones(3).double(), model.parameters())
    for grad, value, decay in (0.5, 0.9996827922, 1e-6), (-0.25, 0.9995686166, 1e-6 * 1.9996837922):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad)
        optimizer.step()
        assert [p.item() for p in model.parameters()] == pytest.approx([value, value + decay, value + decay], abs=1e-10)
    rates = [bert.learning_rate(step, bert.Config(objective="rtd", lr=5e-4)) for step in (0, 5000, 10_000, 500_000)]
    assert rates == pytest.approx([0, 5e-4 * 0.5 * 0.995, 5e-4 * 0.99, 2.5e-4], rel=1e-12)


def on_ranks(overrides):
    bert.update_shards = lambda *args: [(found := bert.update_model(*args)), found["grad"]]  # the name that gradients calls
    return gradients("bert", ROW, overrides | dict(clip=0.0))


@pytest.mark.parametrize("way", WAYS, ids=["pairs", "sentences", "rtd"])
def test_layouts_give_one_ranks_loss_metrics_and_gradients(ranks, way):
    cfg = bert.Config(**ROW.tiny | way)
    model, batch = make_model(bert, ROW, cfg), bert.get_batch(make_corpora(bert, cfg)[0], 3, 8, cfg)
    loss, metrics = bert.objective(model, batch, cfg)
    loss.backward()
    largest, norm = max(p.grad.abs().max() for p in model.parameters()), math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    expected = {name: value.item() for name, value in metrics.items()} | dict(loss=loss.item(), grad=norm)
    for n, more in (1, dict(micro_batch=1)), (2, dict(recompute="block")), (2, dict(micro_batch=1)), (4, dict(micro_batch=2)), (4, dict(micro_batch=1)):
        for means, found, _ in ranks.run(n, on_ranks, way | more):
            assert means == pytest.approx(expected, rel=1e-5, abs=1e-7)
            for name, p in model.named_parameters():
                assert (torch.from_numpy(found[name]) - p.grad).abs().max() <= 1e-5 * max(p.grad.abs().max(), 1e-3 * largest), (n, more, name)


def run(ranks, n, flags):
    small = "--preset demo --val_batches 1 --log_every 1 --batch_size 4 --context 32 --seq_len 16 --max_predictions 3 --tokenizer wordpiece:300 --lr 1e-3"
    results = ranks.run(n, run_main, "bert", f"{small} --data {sysconfig.get_paths()['stdlib']}/asyncio {flags}".split(), timeout=120)
    assert not any(status for status, *_ in results), results
    return results[0][1]


@pytest.mark.parametrize("gelu, nsp", [("none", "nsp"), ("tanh", "nsp"), ("none", "no-nsp")])
def test_hugging_face_and_init_read_the_exported_model_with_vocabulary_and_case(ranks, gelu, nsp, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = run(ranks, 1, f"--steps 20 --long_share 0 --no-uncased --gelu {gelu} --{nsp} --export {tmp_path}/ours")
    again = run(ranks, 1, f"--dim 8 --long_share 0 --{nsp} --init {tmp_path}/ours --eval")
    assert again.split("val 0")[1].split("\n")[0] == out.split("val 20")[1].split("\n")[0]
    kind = transformers.BertForPreTraining if nsp == "nsp" else transformers.BertForMaskedLM
    theirs = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, segments, mask = torch.arange(40).view(2, 20), torch.arange(40).view(2, 20) % 2, torch.arange(20) < torch.tensor([[20], [13]])
    for model, cfg in map(bert.from_hf, (tmp_path / "ours", tmp_path / "theirs")):
        assert (cfg.gelu, cfg.nsp, cfg.context, cfg.dim) == (gelu, nsp == "nsp", 32, 64)
        for found, expected in zip(model.eval()(tokens, segments, mask), theirs(tokens, mask, segments).to_tuple()):
            assert (found - expected)[..., :13, :].abs().max() <= 1e-5 * expected.abs().max()
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"), bert.load_wordpiece(tmp_path / "ours" / "vocab.txt")
    for sentence in ("Return the event loop, 49 é.", "na\u0308ive $5\t(\u00adsoft)\u3000的"):
        assert tokenizer(sentence)["input_ids"][1:-1] == ours.encode(bert.clean_text(sentence, False)) and tokenizer.pad_token_id == 0
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key, value in dict(model_type="roberta", layer_norm_eps=1e-5, hidden_act="relu", type_vocab_size=1, hidden_size=27, vocab_size=260).items():
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match="holds no BertForPreTraining or BertForMaskedLM"):
            bert.from_hf(tmp_path / "ours")


def test_two_phases_on_two_ranks_from_instances_and_resumed(ranks, tmp_path):
    """Ten updates, of 16 tokens and from the eighth of 32: resumed in either phase, and on two ranks with accumulation and what was written of the text."""
    flags = "--steps 10 --val_every 4 --long_share 0.3 --long_seq_len 32 --long_max_predictions 5"
    rows = lambda name: [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().replace("null", "0").splitlines()]  # noqa: E731
    run(ranks, 1, f"{flags} --write_instances {tmp_path}/made")
    for n, name, more in (1, "one", "--save_every 5"), (2, "two", f"--save_every 8 --micro_batch 1 --data {tmp_path}/made"):
        out = run(ranks, n, f"{flags} {more} --out {tmp_path}/{name}")
        assert re.findall(r"^val (\d+) .* length (\d+)$", out, re.M) == [("0", "16"), ("4", "16"), ("8", "32"), ("10", "32")] and "filled: [CLS]" in out
        whole = rows(name)
        (tmp_path / name / "step_000000010").rename(tmp_path / f"last_of_{name}")
        run(ranks, n, f"{flags} {more} --out {tmp_path}/{name} --resume")
        again = rows(name)[len(whole) :]
        assert again == whole[-len(again) :]
    assert [row["tokens"] for row in whole if "tokens" in row] == [*range(64, 449, 64), 448 + 128, 448 + 256, 448 + 384]
    for one, two in zip(rows("one"), whole):
        assert two == pytest.approx(one, rel=2e-4, abs=1e-4)
