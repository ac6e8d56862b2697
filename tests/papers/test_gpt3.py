"""GPT-2 and GPT-3: the worked examples of the specification, and runs of gpt3.py in every layout."""
import importlib.util
import json
import math
import re

import gpt3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from pytest import approx
from ranks import run_main

ROW = SCRIPTS["gpt3"]
SMALL = {"preset": "demo", "data": gpt3.__file__, "val_batches": 1, "log_every": 1, "timeout": 60, "val_every": 1000, **ROW.small}
flags_of = lambda **more: [f"--{flag}={value}" for flag, value in (SMALL | more).items()]  # noqa: E731
logged = lambda out, name: [row[name] for row in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in row]  # noqa: E731
main = lambda *flags: "".join(run_main("gpt3", flags)[1:])  # noqa: E731 -> what it prints, errors included


def together(ranks, n, *flags):
    (status, out, err), *others = ranks.run(n, run_main, "gpt3", flags, timeout=120)
    assert status == 0 and not any(other[0] for other in others), (err, *(other[2] for other in others))
    return out


@pytest.mark.parametrize("T, band", [(8, 3), (9, 3), (7, 8), (40, 16), (1, 1), (5, 1)])
def test_band(T, band):
    """Blocks of one band against the specification's rule, in float64, with gradients; and against its picture."""
    qkv = torch.randn(3, 2, 3, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    i, j = torch.arange(T)[:, None], torch.arange(T)
    visible = (j <= i) & (i - j < band)
    picture = "1....... 11...... 111..... .111.... ..111... ...111.. ....111. .....111".split()
    assert (T, band) != (8, 3) or ["".join(".1"[seen] for seen in row) for row in visible.int()] == picture
    exact = (qkv[0] @ qkv[1].mT / math.sqrt(6)).masked_fill(~visible, -math.inf).softmax(-1) @ qkv[2]
    found = gpt3.banded_attention(*qkv, band, 0.0)
    torch.testing.assert_close(found, exact, atol=1e-14, rtol=0)
    ours, theirs = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (found, exact))
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("banded, first", [("odd", 1), ("even", 0)])
def test_banded_layers_reach_back_only_so_far(banded, first):
    """Two banded layers see the last 2 (band - 1) positions and all of them; one dense layer among them, and a position depends on all."""
    cfg = gpt3.Config(**ROW.tiny | {"seq_len": 12, "banded": banded})
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = (tokens.expand(12, 12) + torch.eye(12, dtype=torch.long)) % 256  # row j: position j
    i, j = torch.arange(12), torch.arange(12)[:, None]
    for layers, reach in (((first, first + 2), 2 * (cfg.band - 1)), ((first, 1 - first), 12)):
        torch.manual_seed(0)
        model = gpt3.GPT3(cfg, layers)
        moved = (model(changed) - model(tokens)).abs().gt(1e-6).any(-1)
        assert torch.equal(moved, (0 <= i - j) & (i - j <= reach))


def test_dropout_is_on_embeddings_branches_and_probabilities(monkeypatch):
    """One mask for the embedding, two for each block; and each attention call, banded or dense, gets the rate in training alone."""
    rates, sdpa, dropout = [], F.scaled_dot_product_attention, F.dropout
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: rates.append(more["dropout_p"]) or sdpa(*args, **more))
    monkeypatch.setattr(F, "dropout", lambda x, p, training: rates.append((p, training)) or dropout(x, p, training))
    model = gpt3.GPT3(gpt3.Config(**ROW.tiny | {"dropout": 0.1, "n_layers": 2}))
    model(torch.zeros(1, 3, dtype=torch.long))
    model.eval()(torch.zeros(1, 7, dtype=torch.long))
    assert rates.count(0.1) == 2 and rates.count((0.1, True)) == 5 and rates.count(0.0) == 3 and rates.count((0.1, False)) == 5


def test_initialisation():
    cfg = gpt3.Config(**ROW.tiny | {"dim": 192, "hidden_dim": 640, "seq_len": 64})
    model = gpt3.GPT3(cfg)
    gpt3.init_weights(model, cfg)
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.01 if "position" in name else 0.02
        assert p.std().item() == approx(std, rel=0.05) if p.ndim == 2 else p.unique().tolist() == ["norm" in name and "weight" in name], name


def test_bpe_merges_the_most_frequent_pair():
    """Each merge is of a pair that no other pair within words exceeds, counted anew; a word's length costs no more than a text's."""
    text = "the cat's hat, the hatter; aaaa aaa banana bananas 1234 12345 été naïve\n\n  def f(x):\n    return x_1\n" * 3 + "thaththat aaaaa"
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(pattern, text)]
    learned = list(gpt3.train_bpe([text], 300))
    assert len(learned) == 300 and learned[:256] == [bytes([i]) for i in range(256)]
    for token in learned[256:]:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        a, b = next(pair for pair in pairs if pair[0] + pair[1] == token and pairs.count(pair) == max(map(pairs.count, set(pairs))))
        for word in words:
            for j in range(len(word)):
                if word[j : j + 2] == [a, b]:
                    word[j : j + 2] = [token]
    assert list(gpt3.train_bpe(["aaab aab ab ab", "ab"], 258).items())[256:] == [(b"ab", 256), (b" ab", 257)]
    assert list(gpt3.train_bpe(["a" * 1000], 265))[256:] == [b"a" * 2**n for n in range(1, 10)]


def test_learned_tokenizer_and_a_run_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt3, "catch_signals", list)
    (tmp_path / "text.txt").write_text("".join(f"the number {i} is not {i * i}, is it? naïve 🙂\n" for i in range(3000)))
    flags, run, learned = flags_of(data=tmp_path / "text.txt", steps=2), ["--tokenizer", "bpe:400", "--out", tmp_path / "run"], tmp_path / "ranks.tiktoken"
    assert "400 entries" in main(*flags, "--train_tokenizer", 400, "--out", tmp_path)
    tokenizer = gpt3.load_tokenizer(str(learned), ["<|endoftext|>"])
    for sample in ("the number 7's\n\n  not", "naïve 🙂 \x00\t текст 你好\r\n", " <|endoftext|>"):
        ids = tokenizer.encode_ordinary(sample)
        assert tokenizer.decode(ids) == sample and max(ids) < 400
    first, second = (re.sub(r"[\d.]+k tok/s.*", "", main(*flags, *more)) for more in (["--tokenizer", learned], run))
    assert first == second and "val 2" in first
    monkeypatch.setattr(gpt3, "train_bpe", None)  # a run keeps its tokenizer
    assert "val 3" in main(*flags, *run, "--resume", "--steps", 3) and (tmp_path / "run" / "ranks.tiktoken").read_text() == learned.read_text()
    assert "has 400 entries, and not 300" in main(*flags, *run, "--tokenizer", "bpe:300") and "already" in main(*flags, *run, "--train_tokenizer", 300)


def test_mix_of_the_paper(tmp_path):
    """Table 2.2: its weights normalised, their epochs in 300B tokens, and no window twice within an epoch."""
    sizes = {"cc": 410, "webtext2": 19, "books1": 12, "books2": 55, "wikipedia": 3}
    weights = gpt3.parse_weights("60:cc,22:webtext2,8:books1,8:books2,3:wikipedia")
    assert [round(w, 4) for w in weights.values()] == [0.5941, 0.2178, 0.0792, 0.0792, 0.0297]
    ids = np.arange(200 * 499, dtype=np.uint32)  # a five-millionth of each; ids tell where a window comes from
    for name, part in zip(sizes, np.split(ids, 200 * np.cumsum([*sizes.values()]))):
        np.save(tmp_path / f"{name}.npy", part)
    mix = ",".join(f"{weights[name]}:{tmp_path / name}.npy" for name in sizes)
    _, mixture, heldout = gpt3.load_mix(gpt3.Config(data=mix, vocab_size=100_000, seq_len=10, batch_size=20, val_batches=1))
    drawn = [(*mixture.draw(i, 0), mixture.window(i, 10, 0)[0].item()) for i in range(6000)]  # 60,000 tokens
    for corpus, epochs in enumerate((0.44, 3.47, 2.00, 0.44, 3.00)):
        n, own = mixture.corpora[corpus].n_windows(10), [draw for draw in drawn if draw[0] == corpus]
        assert len(own) / n == approx(epochs, rel=0.15) and len({first for *_, first in own[:n]}) == min(n, len(own))
        assert sorted(position for _, position, _ in own) == list(range(len(own))), "without replacement until an epoch is over"
    held = np.concatenate([heldout.window(i, 10, 0) for i in range(heldout.n_windows(10))])
    assert heldout.n_windows(10) >= 20 and not {first for *_, first in drawn} & set(held.tolist())
    places = [heldout.draw(i, 0)[0] for i in range(1000)]
    assert [places.count(corpus) for corpus in range(5)] == mixture.shares == [594, 218, 79, 79, 30]


def test_packing_counts_every_target():
    """Documents back to back, a separator after each; nothing is masked, and the first token of the next is predicted, too."""
    tokenizer = gpt3.load_tokenizer("bytes", ["<|endoftext|>"])
    stream = np.concatenate([ids for _, ids in gpt3.tokenize((("a", "abc"), ("b", "de"), ("c", "f" * 20)), tokenizer, 256)])
    corpus = gpt3.Corpus([("", stream)], 0, len(stream), 256, (np.arange(257) < 256).astype(int), in_order=True)
    batch = gpt3.get_batch(corpus, 0, 1, gpt3.Config(seq_len=8))
    assert (batch["tokens"].tolist(), batch["targets"].tolist()) == ([[97, 98, 99, 256, 100, 101, 256, 102]], [[98, 99, 256, 100, 101, 256, 102, 102]])
    assert batch["n_targets"] == 8 and batch["n_bytes"] == 6, "the separator has no bytes"


def test_ramp_and_steps():
    """The specification's vectors: whole sequences, linear in tokens; on more ranks, what these can share."""
    for preset, tokens, ramp, steps, flat in (("175b", 40_960, 17_718, 109_271, 95_368), ("125m", 36_864, 22_806, 587_382, 572_205)):
        cfg = gpt3.Config(**gpt3.PRESETS[preset] | dict(batch_multiple=1, dp=1))
        seen = 0
        for _ in range(1000):
            seen += gpt3.batch_at(seen, cfg) * 2048
        constant = gpt3.Config(**gpt3.PRESETS[preset] | dict(first_batch=0, dp=1))
        assert (gpt3.batch_at(seen, cfg) * 2048, gpt3.count_steps(cfg), gpt3.count_steps(constant)) == (tokens, (ramp, steps), (0, flat))
    for dp, pp, sizes in ((64, 1, {0: 64, 6e9: 768, 12e9 - 1: 1472, 12e9: 1536, 1e12: 1536}), (16, 12, {0: 192, 3e9: 384, 12e9: 1536})):
        cfg = gpt3.Config(dp=dp, pp=pp, first_batch=16, batch_size=1536, ramp=12 / 300, batch_multiple=16, micro_batch=1)
        assert {tokens: gpt3.batch_at(tokens, cfg) for tokens in sizes} == sizes
    cfg = gpt3.Config(**gpt3.PRESETS["175b"] | dict(tokens=10e9, dp=1))  # a thirtieth of the run: so are the ramp and the warm-up
    assert [gpt3.learning_rate(t / 30, cfg) for t in (187.5e6, 10e9, 200e9)] == approx([3e-5, 5.981708e-5, 1.280897e-5])
    assert gpt3.batch_at(0.4e9, cfg) == 1536 > gpt3.batch_at(0.39e9, cfg)


def test_presets_are_the_papers_tables(capsys):
    table = {  # layers, width, heads, batch in tokens, rate, ramp: Table 2.1, misprints settled by Table D.1; PF-days; envelope
        "125m": (12, 768, 12, 0.5, 6e-4, 4, 2.60, 2.50), "350m": (24, 1024, 16, 0.5, 3e-4, 4, 7.42, 2.35), "760m": (24, 1536, 16, 0.5, 2.5e-4, 4, 15.8, 2.26),
        "1.3b": (24, 2048, 16, 1, 2e-4, 6, 27.5, 2.20), "2.7b": (32, 2560, 32, 1, 1.6e-4, 6, 55.2, 2.13), "6.7b": (32, 4096, 32, 2, 1.2e-4, 8, 139, 2.03),
        "13b": (40, 5120, 40, 2, 1e-4, 8, 268, 1.97), "175b": (96, 12288, 96, 3, 0.6e-4, 12, 3640, 1.73),
    }  # fmt: skip
    for name, (layers, dim, heads, batch, lr, ramp, days, loss) in table.items():
        cfg = gpt3.Config(**gpt3.PRESETS[name])
        sizes = cfg.n_layers, cfg.dim, cfg.n_heads, cfg.hidden_dim, cfg.lr, cfg.batch_size * 2048, cfg.first_batch * 2048
        assert sizes == (layers, dim, heads, 4 * dim, lr, batch * 2**20, 2**15)
        assert [cfg.tokens * part for part in (1, cfg.warmup, cfg.decay, cfg.ramp)] == approx([3e11, 375e6, 260e9, ramp * 1e9])
        assert (cfg.floor, cfg.weight_decay, cfg.clip, cfg.beta1, cfg.beta2, cfg.eps) == (0.1, 0.1, 1.0, 0.9, 0.95, 1e-8)
        assert (cfg.vocab_size, cfg.tokenizer, cfg.seq_len, cfg.band, cfg.banded, cfg.dropout) == (50257, "gpt2", 2048, 128, "odd", 0.0)
        gpt3.dry_run(cfg)
        found = re.search(r"PF-days (\S+) .* (\S+) nats", capsys.readouterr().out)
        assert (float(found[1]), float(found[2])) == (approx(days, rel=5e-3), approx(loss, abs=6e-3)), name
    for name, shape in dict(gpt2=(12, 768, 12), gpt2_medium=(24, 1024, 16), gpt2_large=(36, 1280, 20), gpt2_xl=(48, 1600, 25)).items():
        cfg = gpt3.Config(**gpt3.PRESETS[name], dp=1)
        assert (cfg.n_layers, cfg.dim, cfg.n_heads, cfg.seq_len, cfg.batch_size, cfg.band) == (*shape, 1024, 512, 0)
        assert gpt3.count_steps(cfg) == (0, 300_000) and cfg.warmup * cfg.tokens == approx(2000 * 512 * 1024)


def test_ramp_and_layouts_give_the_same_run(ranks, tmp_path):
    """Batches of 4 and 8, on one rank and cut in every way: the same losses; and through --export the same held-out loss elsewhere."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(350)))  # of which 8 windows are held out
    flags = flags_of(data=tmp_path / "text.txt", batch_size=8, first_batch=4, batch_multiple=4, ramp=0.4, tokens=4000, micro_batch=1, lr=0.01, seq_len=40)
    export = ["--export", tmp_path / "hf"] if importlib.util.find_spec("safetensors") else []
    whole = together(ranks, 1, *flags, "--out", tmp_path / "whole", *export)
    assert re.findall(r"\| batch (\d+)", whole) == ["4"] * 10 + ["8"] * 8, "the ramp ends at 1,600 tokens, the run at 4,000"
    held = lambda out, step: float(re.search(rf"val {step} \| loss (\S+)", out)[1])  # noqa: E731
    positions = re.search(r"^loss by position \| 0-3 (\S+) \| 4-7 (\S+) \| 8-15 (\S+) \| 16-31 (\S+) \| 32-39 (\S+)$", whole, re.M).groups()
    assert np.dot([0.1, 0.1, 0.2, 0.4, 0.2], [float(nats) for nats in positions]) == approx(held(whole, 18), abs=1e-3), "of the same windows"
    for n, layout in ((2, ["--dp", 2]), (4, ["--tp", 2, "--pp", 2])):
        done = together(ranks, n, *flags, *layout, "--out", tmp_path / f"on{n}")
        assert logged(tmp_path / f"on{n}", "loss") == approx(logged(tmp_path / "whole", "loss"), rel=1e-4)
        assert held(done, 18) == approx(held(whole, 18), rel=1e-4)
    for n, layout, rel in ((1, ["--precision", "bf16"], 1e-2), (2, ["--tp", 2], 1e-4), (2, ["--pp", 2, "--band", 1], 1e-4)) if export else ():
        done = together(ranks, n, *flags, *layout, "--steps", 1, "--init", tmp_path / "hf")
        assert (held(done, 0) == approx(held(whole, 18), rel=rel)) == ("--band" not in layout), "another band is another model"


def test_noise_scale(ranks, tmp_path):
    """The specification's vector; and runs, whose small batches are the first micro-batches or each rank's own, against plain gradients."""
    assert gpt3.noise_scale(16.5, 5.5625, 8, 64) == approx((4.0, 100.0))
    cfg = gpt3.Config(**gpt3.PRESETS["demo"] | ROW.small | dict(data=gpt3.__file__, batch_size=8, seq_len=64))
    _, corpus, _ = gpt3.load_mix(cfg)
    model = gpt3.GPT3(cfg)
    gpt3.init_weights(model, cfg)
    gradients = []  # of each sequence; the first update's rate is 0, the second has the same weights
    for i in range(16):
        batch = gpt3.get_batch(corpus, i, 1, cfg)
        loss = F.cross_entropy(model(batch["tokens"])[0], batch["targets"][0])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    norm = lambda first, n: torch.stack(gradients[first : first + n]).mean(0).square().sum().item()  # noqa: E731
    for n, layout, few, starts in ((1, "--micro_batch 2", 2, [0]), (2, "--micro_batch 1", 4, [0, 4]), (2, "--pp 2 --micro_batch 2", 4, [0]), (1, "", 1, [])):
        out, averages = tmp_path / f"{n}{few}{len(starts)}", np.zeros(2)
        together(ranks, n, *flags_of(batch_size=8, seq_len=64, steps=2, out=out), "--noise_scale", *layout.split())
        for first, noise in zip((0, 8), logged(out, "noise"), strict=True):
            small = [norm(first + start, few) for start in starts] or [math.nan]  # one rank and one micro-batch: n/a
            averages = 0.99 * averages + 0.01 * np.array(gpt3.noise_scale(np.mean(small), norm(first, 8), few, 8))
            assert noise == (approx(averages[1] / averages[0], rel=1e-3) if starts else None), (layout, first)


def test_loss_scale(tmp_path, monkeypatch):
    """A gradient that overflows halves the scale and is tried again on the same data; 1,000 clean steps double it; fp16 follows fp32."""
    monkeypatch.setattr(gpt3, "catch_signals", list)
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    flags = flags_of(data=tmp_path / "text.txt", n_layers=2, prompt="x", lr=0.003, steps=4)
    fp16, fp32 = (main(*flags, "--precision", name, "--out", tmp_path / name) and logged(tmp_path / name, "loss") for name in ("fp16", "fp32"))
    assert fp16 == approx(fp32, rel=2e-3) and fp16 != fp32
    inner, calls = gpt3.objective, []

    def objective(model, batch, cfg):
        loss, metrics = inner(model, batch, cfg)
        if torch.is_grad_enabled():
            calls.append(loss)
            loss = {3: loss + (0 * loss).sqrt(), 4: loss + (0 * loss).sqrt(), 7: loss * math.nan}.get(len(calls), loss)  # a gradient alone, or a loss
        return loss, metrics

    monkeypatch.setattr(gpt3, "objective", objective)
    scales = lambda out: [int(scale) for scale in re.findall(r"\| scale (\d+)", out)]  # noqa: E731
    flags += ["--precision", "fp16", "--out", tmp_path / "run"]
    out = main(*flags, "--steps", 6)
    events = re.findall(r"step (\d overflows: loss scale \d+|\d skipped)", out)  # a loss that is not finite is no overflow
    assert events == ["3 overflows: loss scale 32768", "3 overflows: loss scale 16384", "5 skipped"] and len(calls) == 8
    assert scales(out) == [65536, 65536, 16384, 16384, 16384, 16384] and logged(tmp_path / "run", "tokens")[-1] == 5 * 64
    assert all(0.1 < norm < 10 for norm in logged(tmp_path / "run", "grad")[:4]), "the norm is that of the gradient, unscaled"
    for steps, precision, scale in ((7, "bf16", []), (8, "fp16", [65536])):  # it begins and ends with the precision
        assert scales(main(*flags, "--precision", precision, "--steps", steps, "--resume")) == scale
    monkeypatch.setattr(gpt3, "load_checkpoint", lambda *args: args[-1].update(clean=997, step=0, sequences=0, scale=8192.0))
    assert scales(main(*flags, "--steps", 5, "--resume")) == [8192, 8192, 16384, 16384, 16384]
