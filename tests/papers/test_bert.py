"""BERT and ELECTRA: the specification's golden values and worked examples, Hugging Face, runs; in the order of the script."""
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
from ranks import make_corpora, make_model, run_main
from torch.utils.flop_counter import FlopCounterMode

ROW = SCRIPTS["bert"]
WAYS = [dict(), dict(nsp=False), dict(objective="rtd", nsp=False)]


def test_numbers_of_both_papers():
    """A.2 and both Tables 6; the specification's updates of p = 1 at a rate of 1e-4 by gradients 0.5 and -0.25, decayed and not; ELECTRA's rate."""
    cfgs = {name: bert.Config(**preset) for name, preset in bert.PRESETS.items()}
    assert [cfgs[name].n_heads for name in "base large l3_h768_a12 l6_h768_a3 l6_h768_a12 l12_h1024_a16 electra_small".split()] == [12, 16, 12, 3, 12, 16, 4]
    for c, *expected in (cfgs["large"], 256, 1e-4, 128, 20, 512, 77), (cfgs["electra_small"], 128, 5e-4, 128, 19, 128, 19):
        assert [c.batch_size, c.lr, *(n for step in (899_999, 900_000) for p in [bert.phase_at(step, c)] for n in (p.seq_len, p.max_predictions))] == expected
        assert (c.warmup_steps, c.steps, c.weight_decay, c.clip, c.dropout, c.masked_lm_prob, c.dupe_factor) == (10_000, 10**6, 0.01, 1, 0.1, 0.15, 10)
    assert sum(p.numel() for name, p in bert.build_model(c).named_parameters() if re.match("embeddings|project|discriminator|dense|score", name)) == 13_549_057
    model = torch.nn.ModuleDict(dict(linear=torch.nn.Linear(1, 1), norm=torch.nn.LayerNorm(1, bias=False))).double()
    optimizer = bert.build_optimizer(model, cfgs["base"])
    torch.nn.utils.vector_to_parameters(torch.ones(3).double(), model.parameters())
    for grad, value, decay in (0.5, 0.9996827922, 1e-6), (-0.25, 0.9995686166, 1e-6 * 1.9996837922):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad)
        optimizer.step()
        assert [p.item() for p in model.parameters()] == pytest.approx([value, value + decay, value + decay], abs=1e-10)
    assert [bert.learning_rate(step, cfgs["electra_small"]) for step in (0, 5000, 10_000, 500_000)] == pytest.approx([0, 2.4875e-4, 4.95e-4, 2.5e-4])


def test_initialisation_flops_and_dropout(monkeypatch):
    """N(0, 0.06) cut at 2 σ has a deviation of 0.0528; ELECTRA has Glorot-uniform layers; heads have no dropout."""
    for cfg in (bert.Config(**ROW.tiny | way | dict(dim=192, vocab_size=500, init_std=0.06)) for way in WAYS):
        model = bert.build_model(cfg)
        bert.init_weights(model, cfg)
        for name, p in model.named_parameters():
            if p.ndim == 1:
                assert p.unique().tolist() == [float("norm" in name and name.endswith("weight"))], name
            else:
                bound, std = (math.sqrt(6 / sum(p.shape)), math.sqrt(2 / sum(p.shape))) if re.search("project|score", name) else (0.12, 0.0528)
                assert p.abs().max() <= bound and p.std().item() == pytest.approx(std, rel=0.03 if p.numel() > 5000 else 0.15), name
        ids, slots = (torch.zeros(2, n, dtype=torch.long, device="meta") for n in (cfg.seq_len, cfg.max_predictions))
        with FlopCounterMode(display=False) as counter:
            outputs = model.to("meta")(ids, ids, ids == 0, slots, *[slots, slots][: 2 * (cfg.objective == "rtd")])
            sum(x.sum() for x in outputs[:2] if x is not None).backward()
        assert counter.get_total_flops() / ids.numel() == pytest.approx(bert.flops_per_token(cfg))
    seen = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append(p * training) or x)
    bert.BERT(bert.Config(**ROW.tiny | dict(dropout=0.3)))(*torch.ones(3, 2, 5, dtype=torch.long)[:2], torch.ones(2, 5).bool())
    assert seen == 5 * [0.3]


def test_golden_value():
    """The specification's, of Hugging Face in float64 and in the order of its parameters."""
    parts = "bert cls embeddings encoder pooler predictions seq_relationship word position token_type layer attention intermediate self output query key value"
    parts = f"{parts} dense LayerNorm weight bias transform".split()
    order = lambda item: [int(x) if x.isdigit() else parts.index(x) for x in item[0].replace("_embeddings", "").split(".")]  # noqa: E731
    inputs = ((torch.arange(32) * 7 + 3) % 96).view(2, 16), torch.arange(16).ge(8).long().expand(2, 16), torch.arange(16) < torch.tensor([[16], [12]])
    cfg = bert.Config(vocab_size=96, context=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0, precision="fp32")
    model = bert.BERT(cfg).double()
    for k, (name, p) in enumerate(sorted(bert.bert_tensors(model), key=order)):
        p.copy_(0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + k).view_as(p) + (p.ndim == 1 and name.endswith("weight")))
    (logits, next_logits), labels, is_random = model(*inputs), torch.tensor([[11, 22], [33, -100]]), torch.tensor([0, 1])
    nats, nsp = F.cross_entropy(logits[[0, 0, 1], [3, 9, 5]], labels.flatten()[:3]).item(), F.cross_entropy(next_logits, is_random).item()
    expected = [0.1407120, 0.2865326, 0.0888782, 0.1661157, 0.1692225, 0.0815836, 0.1573107, 4.6667141, 0.6753510, 5.3420651]
    assert [*logits[0, 0, :3].tolist(), *next_logits.flatten().tolist(), nats, nsp, nats + nsp] == pytest.approx(expected, abs=6e-8)
    batch = dict(positions=torch.tensor([[3, 9], [5, 0]]), labels=labels, is_random=is_random, n_targets=3, n_sequences=2)
    loss, metrics = bert.objective(model, batch | dict(zip(("tokens", "segments", "attention_mask"), inputs)), cfg)  # in fp32
    assert [loss.item(), metrics["nsp"].item(), metrics["nsp_acc"]] == pytest.approx([nats * 3 / 3.00001 + nsp, nsp, 0.5], abs=2e-6)


def test_sentences_of_python_and_word_piece():
    """Greedy, longest first: the specification's section 7; what Unicode has not assigned is [UNK]. It is not learned from what is held out."""
    code = '"""Summary of it.\n\nLonger e.g. this one. Second Sentence! 3 more\nlines."""\nimport os  # not """this\nx = """not\n"""\ny = "# nor this"\n'
    code += "# A comment of\n# two lines. And more.\ndef f():\n    r\'\'\'It's \"quoted\".\'\'\'\n    #: Kept.\n    return '\"\"\"'\n"
    found = "|".join(*dict(bert.split_sentences([("m.py", code)], bert.Config(uncased=False))).values())
    assert found == 'Summary of it.|Longer e.g. this one.|Second Sentence!|3 more lines.|A comment of two lines.|And more.|It\'s "quoted".|Kept.'
    entries = [*bert.SPECIALS, "un", "##aff", "##able", "##a", "runn", "##ing", ",", "the", "!", "的", "5", "##€", "_", "\u2028", "\x85", "last"]
    tokenizer = bert.WordPiece(entries)
    for text, pieces in (
        ("UNaffable, the  running!", "un ##aff ##able , the runn ##ing !"), ("unaffablex the", "[UNK] the"), ("thé的the", "the 的 the"),
        ("un" + "a" * 198, "un" + " ##a" * 198), ("un" + "a" * 199, "[UNK]"), ("the\u200b \x00the\ufffd last", "the the last"),
        ("5€ _the [MASK] \U0001fffe", "5 ##€ _ the [UNK] [UNK] [UNK] [UNK]"),
    ):  # fmt: skip
        assert " ".join(entries[i] for i in tokenizer.encode(bert.clean_text(text, True))) == pieces
    documents = [(f"{i}", ["zebra"] * 5000 if bert.is_held_out(f"{i}") else ["the cat (the)", "and the tar"]) for i in range(200)]
    learned = bert.learn_wordpiece(documents, 25).entries
    assert sorted(learned[5:15]) == sorted("theacrnd()") and learned[15:] == [*(f"##{c}" for c in learned[5:15] if c not in "()"), "the", "cat"]


def test_pairs_masks_and_full_sentences():
    """A row of the specification's example; the digest of what its pseudo-code, written once more without the script, makes of it and of 200 corpora."""
    toy, rng, rows = bert.WordPiece([*bert.SPECIALS, *"abcdefghijklmnopqrstuvwxy"]), random.Random(0), []
    documents = [[[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]], [[15, 16], [17, 18, 19], [20, 21]], [[22, 23, 24, 25, 26, 27], [28, 29]]]
    corpora = [(documents, 16, 3, random.Random(12345))]
    for seed in range(200):
        documents = [[rng.choices(range(5, 30), k=rng.randint(1, 12)) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(2, 6))]
        corpora.append((documents, rng.choice([5, 6, 16, 33, 64]), rng.choice([2, 20]), random.Random(seed)))
    for documents, length, max_predictions, rng in corpora:
        cfg = bert.Config(seq_len=length, max_predictions=max_predictions)
        for a, b, is_random in (pair for i in range(len(documents)) for pair in bert.create_pairs(documents, i, length, 0.1, rng)):
            rows.append((*bert.create_masked_lm_predictions([2, *a, 3, *b, 3], cfg, toy, rng), len(a) + 2, is_random))
    assert rows[1] == ([2, 15, 16, 3, 22, 23, 4, 25, 26, 4, 28, 29, 3], [6, 9], [24, 27], 4, True)
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "fdace433f2e03467"
    assert [a for a, *_ in bert.full_sentences([[[10, 11, 12], [13, 14]], [[15] * 9], [[16]]], 8, 3)] == [[10, 11, 12, 13, 14, 3], [15] * 6, [16, 3]]


@pytest.mark.parametrize("way", WAYS, ids=["pairs", "sentences", "rtd"])
def test_batches_and_replaced_token_detection(way):
    """An epoch has every instance once, whole and padded, in an order of its own; only predicted positions differ from the text.
    ELECTRA's loss and metrics of an epoch, in which some samples of the generator are the original and count as original."""
    cfg = bert.Config(**ROW.tiny | way | dict(static_masks=True))
    corpus = make_corpora(bert, cfg)[0]
    rows = corpus.rows[cfg.seq_len]
    batch, *others = (bert.get_batch(corpus, i * len(rows), len(rows), dataclasses.replace(cfg, static_masks=i < 2)) for i in range(3))
    tokens, segments, mask, real = batch["tokens"], batch["segments"], batch["attention_mask"], batch["labels"] >= 0
    slots, labels = (real.nonzero()[:, 0], batch["positions"][real]), batch["labels"][real]
    text = tokens.index_put(slots, labels)
    expected = [[is_random, 2, *row[:n_a], 3, *row[n_a : n_a + n_b], *[3] * cfg.nsp] for n_a, n_b, is_random, *row in rows.tolist()]
    assert sorted([int(r), *row[m].tolist()] for r, row, m in zip(batch["is_random"], text, mask)) == sorted(expected) and not text[~mask].any()
    assert torch.equal(segments, (((text == 3).cumsum(1) - (text == 3).long() == 1) & mask).long() * cfg.nsp)
    assert (tokens[slots] == 4).double().mean() == pytest.approx(0.85 if cfg.objective == "rtd" else 0.8, abs=0.024), "[MASK]"
    first, second, third = (part["tokens"].tolist() for part in (batch, *others))
    assert first != second and sorted(first) == sorted(second) != sorted(third), "static masks are the same in each epoch"
    if cfg.objective == "rtd":
        model = make_model(bert, ROW, cfg)
        p = model(tokens, segments, mask)[0][slots].double().softmax(-1)
        filled = tokens.index_put(slots, (p.cumsum(1) < batch["uniform"][real][:, None]).sum(1))
        x = model.discriminator(model.project(model.embeddings(filled, segments)), mask)
        scores, replaced = model.score(F.gelu(model.dense(x)))[mask][:, 0], (filled != text)[mask]
        mlm, rtd = F.nll_loss(p.log(), labels), F.binary_cross_entropy_with_logits(scores, replaced.float())
        expected = mlm + 50 * rtd, mlm, (p.argmax(1) == labels).double().mean(), rtd, ((scores > 0) == replaced).double().mean()
        loss, metrics = bert.objective(model, batch, cfg)
        assert [loss.item(), *map(float, metrics.values())] == pytest.approx([x.item() for x in expected], rel=1e-5)
        assert 0 < replaced.sum() < len(labels)


def run(ranks, n, flags, error=""):
    small = "--preset demo --val_batches 1 --log_every 1 --batch_size 4 --context 32 --seq_len 16 --max_predictions 3 --tokenizer wordpiece:300 --lr 1e-3"
    results = ranks.run(n, run_main, "bert", f"{small} --data {sysconfig.get_paths()['stdlib']}/asyncio {flags}".split(), timeout=120)
    assert all(status == 2 * bool(error) and error in err for status, _, err in results), results
    return results[0][1]


@pytest.mark.parametrize("nsp", ["nsp", "no-nsp"])
def test_hugging_face_and_init_read_the_exported_model_with_vocabulary_and_case(ranks, nsp, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = run(ranks, 1, f"--steps 20 --long_share 0 --no-uncased --{nsp} --export {tmp_path}/ours")
    again = run(ranks, 1, f"--dim 8 --long_share 0 --{nsp} --init {tmp_path}/ours --eval")
    assert again.split("val 0")[1].split("\n")[0] == out.split("val 20")[1].split("\n")[0]
    kind = transformers.BertForPreTraining if nsp == "nsp" else transformers.BertForMaskedLM
    theirs = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, segments, mask = torch.arange(40).view(2, 20), torch.arange(40).view(2, 20) % 2, torch.arange(20) < torch.tensor([[20], [13]])
    for model, cfg in map(bert.from_hf, (tmp_path / "ours", tmp_path / "theirs")):
        assert (cfg.nsp, cfg.context, cfg.dim) == (nsp == "nsp", 32, 64)
        for found, expected in zip(model.eval()(tokens, segments, mask), theirs(tokens, mask, segments).to_tuple()):
            assert (found - expected)[..., :13, :].abs().max() <= 1e-5 * expected.abs().max()
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"), bert.load_wordpiece(tmp_path / "ours" / "vocab.txt")
    for sentence in ("Return the event loop, 49 é.", "na\u0308ive $5\t(\u00adsoft)\u3000的"):
        assert tokenizer(sentence)["input_ids"][1:-1] == ours.encode(bert.clean_text(sentence, False)) and tokenizer.pad_token_id == 0
    (tmp_path / "ours" / "config.json").write_text('{"hidden_act": "gelu_new"}')
    run(ranks, 1, f"--long_share 0 --init {tmp_path}/ours", "hidden_act 'gelu_new', not 'gelu'")


def test_two_phases_on_two_ranks_from_instances_and_resumed(ranks, tmp_path):
    """Ten updates, of 16 tokens and from the eighth of 32: on one rank, and on two from written instances, resumed."""
    flags = "--val_every 4 --save_every 8 --long_seq_len 32 --long_max_predictions 5 --long_share 0.3 --steps 10"
    rows = lambda name: [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().replace("null", "0").splitlines()]  # noqa: E731
    run(ranks, 1, f"{flags} --no-uncased --write_instances {tmp_path}/made")
    run(ranks, 1, f"{flags} --data {tmp_path}/made --no-nsp", "train_16.sentences")
    out = run(ranks, 1, f"{flags} --tokenizer {tmp_path}/made/vocab.txt --write_instances {tmp_path}/lower")
    assert "warning: the text is uncased, and the vocabulary is not" in out
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "vocab.txt").write_text("\n".join(bert.SPECIALS))
    run(ranks, 1, f"{flags} --data {tmp_path}/made --out {tmp_path}/two --resume", "different vocabularies")
    run(ranks, 1, f"{flags} --no-uncased --out {tmp_path}/one")
    flags += f" --micro_batch 1 --data {tmp_path}/made --out {tmp_path}/two"
    out = run(ranks, 2, flags)
    assert re.findall(r"^val (\d+) .* length (\d+)$", out, re.M) == [("0", "16"), ("4", "16"), ("8", "32"), ("10", "32")] and "filled: [CLS]" in out
    assert run(ranks, 1, f"{flags} --resume --eval").split("val 10")[1] == out.split("val 10")[1], "in the last phase, and with the same sample"
    metrics = rows("two")
    for one, two in zip(rows("one"), metrics):
        assert two == pytest.approx(one, rel=2e-4, abs=1e-4)  # with the tokens so far
    (tmp_path / "two" / "step_000000010").rename(tmp_path / "last")
    run(ranks, 2, f"{flags} --resume")
    again = rows("two")[len(metrics) :]
    assert again == metrics[-len(again) :] and '"uncased": false' in (tmp_path / "two" / "config.json").read_text()
