"""GPT-2 and GPT-3: the worked examples of the specification, and runs of gpt3.py in every layout."""
import importlib.util
import json
import math
import re
from types import SimpleNamespace

import gpt3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from pytest import approx
from ranks import run_main, together

ROW = SCRIPTS["gpt3"]
SMALL = {"preset": "demo", "data": gpt3.__file__, "val_batches": 1, "log_every": 1, "timeout": 60, "val_every": 1000, **ROW.small}
flags_of = lambda **more: [f"--{flag}={value}" for flag, value in (SMALL | more).items()]  # noqa: E731
logged = lambda out, name: [row[name] for row in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in row]  # noqa: E731
main = lambda *flags: "".join(run_main("gpt3", flags)[1:])  # noqa: E731 -> what it prints, errors included


@pytest.mark.parametrize("T, band", [(8, 3), (9, 3), (7, 8), (40, 16), (1, 1), (5, 1)])
def test_band(T, band):
    """Blocks of one band against the specification's rule, in float64."""
    qkv = torch.randn(3, 2, 3, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    exact = (qkv[0] @ qkv[1].mT / math.sqrt(6)).masked_fill((j > i) | (i - j >= band), -math.inf).softmax(-1) @ qkv[2]
    torch.testing.assert_close(gpt3.banded_attention(*qkv, band, 0.0), exact, atol=1e-14, rtol=0)


def test_dropout_and_initialisation(monkeypatch):
    """One mask for the embedding, two for each block, and the rate for each attention call, banded or dense; N(0, 0.02) and its exceptions."""
    cfg, calls, sdpa = gpt3.Config(**ROW.tiny | dict(dim=192, hidden_dim=640, dropout=0.1, seq_len=64)), [], F.scaled_dot_product_attention
    model = gpt3.GPT3(cfg)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, dropout_p, **more: calls.append(dropout_p) or sdpa(*args, **more))
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append(("x", p * training)) or x)
    for p in (0.1, 0.0):
        model.train(p > 0)(torch.zeros(1, 3, dtype=torch.long))
    assert calls == [("x", 0.1)] + 4 * [0.1, ("x", 0.1), ("x", 0.1)] + [("x", 0)] + 4 * [0, ("x", 0), ("x", 0)]
    gpt3.init_weights(model, cfg)
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.01 if "position" in name else 0.02
        assert p.std().item() == approx(std, rel=0.05) if p.ndim == 2 else p.unique().tolist() == ["norm" in name and "weight" in name], name
    cfg = gpt3.Config(vocab_size=50257, n_layers=1, seq_len=64)  # at D 768: not ln V, since logits vary
    gpt3.init_weights(model := gpt3.GPT3(cfg), cfg)
    tokens = torch.randint(50257, (16, 65), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": 1024}
    assert gpt3.objective(model, batch, cfg)[0].item() == approx(10.98, abs=0.05)


def test_bpe_and_runs_with_it(tmp_path, monkeypatch):
    """Each merge is of a pair that no other pair within words exceeds, counted anew; a run keeps the tokenizer that it has learned."""
    text = "the cat's hat, the hatter; aaaa aaa banana bananas 1234 12345 été naïve\n\n  def f(x):\n    return x_1\n" * 3 + "thaththat aaaaa"
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(pattern, text)]
    learned = list(gpt3.train_bpe([text], 300))
    for token in learned[256:]:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        a, b = next(pair for pair in pairs if pair[0] + pair[1] == token and pairs.count(pair) == max(map(pairs.count, set(pairs))))
        for word in words:
            for j in range(len(word)):
                if word[j : j + 2] == [a, b]:
                    word[j : j + 2] = [token]
    monkeypatch.setattr(gpt3, "catch_signals", list)
    (tmp_path / "text.txt").write_text("".join(f"the number {i} is not {i * i}, is it? naïve 🙂\n" for i in range(3000)))
    flags, run, learned = flags_of(data=tmp_path / "text.txt", steps=2), ["--tokenizer", "bpe:400", "--out", tmp_path / "run"], tmp_path / "ranks.tiktoken"
    assert "400 entries" in main(*flags, "--train_tokenizer", 400, "--out", tmp_path)
    assert main(*flags, "--tokenizer", learned).split("\nval 2 ")[1] == main(*flags, *run).split("\nval 2 ")[1]
    monkeypatch.setattr(gpt3, "train_bpe", None)
    assert "val 3" in main(*flags, *run, "--resume", "--steps", 3) and (tmp_path / "run" / "ranks.tiktoken").read_text() == learned.read_text()
    assert "has 400 entries, and not 300" in main(*flags, *run, "--tokenizer", "bpe:300") and "already" in main(*flags, *run, "--train_tokenizer", 300)


def test_mix_of_the_paper(tmp_path):
    """Table 2.2: its weights normalised, their epochs in 300B tokens, no window twice within an epoch; and packing, which masks nothing."""
    weights = gpt3.parse_weights("60:cc,22:webtext2,8:books1,8:books2,3:wikipedia")
    assert [round(weight, 4) for weight in weights.values()] == [0.5941, 0.2178, 0.0792, 0.0792, 0.0297]
    ids = np.arange(200 * 499, dtype=np.uint32)  # a five-millionth of each; ids tell where a window comes from
    for name, part in zip(weights, np.split(ids, 200 * np.cumsum([410, 19, 12, 55]))):
        np.save(tmp_path / f"{name}.npy", part)
    mix = ",".join(f"{weight}:{tmp_path / name}.npy" for name, weight in weights.items())
    _, mixture, heldout = gpt3.load_mix(gpt3.Config(data=mix, vocab_size=100_000, seq_len=10, batch_size=20, val_batches=1))
    thirds = gpt3.TrainingMix(dict.fromkeys("abc", 1 / 3), 3 * [SimpleNamespace(n_windows=lambda length: 72, token_bytes=None)])
    assert thirds.n_windows(10) == 216, "not by the rounded shares"
    drawn = [(*mixture.draw(i, 0), mixture.window(i, 10, 0)[0].item()) for i in range(6000)]  # 60,000 tokens
    for corpus, epochs in enumerate((0.44, 3.47, 2.00, 0.44, 3.00)):
        n, own = mixture.corpora[corpus].n_windows(10), [draw for draw in drawn if draw[0] == corpus]
        assert len(own) / n == approx(epochs, rel=0.15) and len({first for *_, first in own[:n]}) == min(n, len(own))
        assert [position for _, position, _ in own] == list(range(len(own))), "in order, without replacement"
    assert heldout.n_windows(10) >= 20 and np.bincount([heldout.draw(i, 0)[0] for i in range(1000)]).tolist() == [594, 218, 79, 79, 30]
    ids = np.array([*b"abc", 256, *b"de", 256, *b"f" * 20, 256])
    batch = gpt3.get_batch(gpt3.Corpus([("", ids)], 0, len(ids), 256, (np.arange(257) < 256).astype(int), in_order=True), 0, 1, gpt3.Config(seq_len=8))
    assert batch["tokens"].tolist() == [ids[:8].tolist()] and batch["targets"].tolist() == [ids[1:9].tolist()]
    assert batch["n_targets"] == 8 and batch["n_bytes"] == 6, "every target counts, the separator, which has no bytes, too"


def test_presets_ramp_and_steps(capsys):
    """The specification's vectors: whole sequences, linear in tokens; on more ranks, what these can share. Then the papers' tables."""
    for preset, tokens, ramp, steps, flat in (("175b", 40_960, 17_718, 109_271, 95_368), ("125m", 36_864, 22_806, 587_382, 572_205)):
        cfg, constant = (gpt3.Config(**gpt3.PRESETS[preset] | dict(dp=1) | more) for more in (dict(batch_multiple=1), dict(first_batch=0)))
        seen = 0
        for _ in range(1000):
            seen += gpt3.batch_at(seen, cfg) * 2048
        assert (gpt3.batch_at(seen, cfg) * 2048, gpt3.count_steps(cfg), gpt3.count_steps(constant)) == (tokens, (ramp, steps), (0, flat))
    for dp, pp, sizes in ((64, 1, {0: 64, 6e9: 768, 12e9 - 1: 1472, 12e9: 1536, 1e12: 1536}), (16, 12, {0: 192, 3e9: 384, 12e9: 1536})):
        cfg = gpt3.Config(dp=dp, pp=pp, first_batch=16, batch_size=1536, ramp=12 / 300, batch_multiple=16, micro_batch=1)
        assert {tokens: gpt3.batch_at(tokens, cfg) for tokens in sizes} == sizes
    cfg = gpt3.Config(**gpt3.PRESETS["175b"] | dict(tokens=10e9, dp=1))  # a thirtieth of the run: so is the warm-up
    assert [gpt3.learning_rate(t / 30, cfg) for t in (187.5e6, 10e9, 200e9)] == approx([3e-5, 5.981708e-5, 1.280897e-5])
    table = {  # heads, batch in 2^20 tokens, rate, ramp: Table 2.1, misprints settled by Table D.1; PF-days; envelope. test_shapes.py: parameters
        "125m": (12, 0.5, 6e-4, 4, 2.60, 2.50), "350m": (16, 0.5, 3e-4, 4, 7.42, 2.35), "760m": (16, 0.5, 2.5e-4, 4, 15.8, 2.26),
        "1.3b": (16, 1, 2e-4, 6, 27.5, 2.20), "2.7b": (32, 1, 1.6e-4, 6, 55.2, 2.13), "6.7b": (32, 2, 1.2e-4, 8, 139, 2.03),
        "13b": (40, 2, 1e-4, 8, 268, 1.97), "175b": (96, 3, 0.6e-4, 12, 3640, 1.73),
    }  # fmt: skip
    same = dict(vocab_size=50257, tokenizer="gpt2", seq_len=2048, band=128, banded="odd", dropout=0.0, first_batch=16, floor=0.1, weight_decay=0.1,
                clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8)  # fmt: skip
    for name, (heads, batch, lr, ramp, days, loss) in table.items():
        cfg = gpt3.Config(**gpt3.PRESETS[name])
        assert same.items() <= vars(cfg).items() and (cfg.n_heads, cfg.lr, cfg.batch_size * 2048) == (heads, lr, batch * 2**20)
        assert [cfg.tokens * part for part in (1, cfg.warmup, cfg.decay, cfg.ramp)] == approx([3e11, 375e6, 260e9, ramp * 1e9])
        gpt3.dry_run(cfg)
        found = map(float, re.search(r"PF-days (\S+) .* (\S+) nats", capsys.readouterr().out).groups())
        assert [*found] == [approx(days, rel=5e-3), approx(loss, abs=6e-3)], name
    for band, pairs in ((0, 2_098_176), (128, 254_016), (256, 491_648)):  # of a head at 2,048; the other layer is dense
        flops = gpt3.flops_per_token(gpt3.Config(dim=1, hidden_dim=0, n_layers=2, band=band))  # 6 (8 weights + 2 keys)
        assert 2048 * (flops / 6 - 8) / 2 == approx(2_098_176 + pairs)
    cfg = gpt3.lay_out(gpt3.Config(**gpt3.PRESETS["175b"], tp=8, pp=12), 1536)
    memory = gpt3.memory_per_rank(cfg)
    assert sum(memory.values()) < 80 * 2**30 and memory["received"] == 2 * 96 * 2048 * 12288 * 4  # of 96 micro-batches, from either side
    for name, heads in dict(gpt2=(12, 6e-4), gpt2_medium=(16, 3e-4), gpt2_large=(20, 2.5e-4), gpt2_xl=(25, 2e-4)).items():
        cfg = gpt3.Config(**gpt3.PRESETS[name], dp=1)
        sizes = (cfg.n_heads, cfg.lr), cfg.seq_len, cfg.batch_size, cfg.band, gpt3.count_steps(cfg), cfg.warmup * cfg.tokens
        assert sizes == (heads, 1024, 512, 0, (0, 300_000), approx(2000 * 512 * 1024))


def test_ramp_and_layouts_give_the_same_run(ranks, tmp_path):
    """Batches of 4 and 8, on one rank, cut in every way and resumed: the same losses; and through --export the same held-out loss elsewhere."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(350)))  # of which 8 windows are held out
    flags = flags_of(data=tmp_path / "text.txt", batch_size=8, first_batch=4, batch_multiple=4, ramp=0.4, tokens=4000, micro_batch=1, lr=0.01, seq_len=40)
    export = ["--export", tmp_path / "hf"] if importlib.util.find_spec("safetensors") else []
    whole = together(ranks, 1, "gpt3", *flags, "--out", tmp_path / "whole", *export)
    assert re.findall(r"\| batch (\d+)", whole) == ["4"] * 10 + ["8"] * 8, "the ramp ends at 1,600 tokens, the run at 4,000"
    held = lambda out: float(re.findall(r"^val \d+ \| loss (\S+)", out, re.M)[-1])  # noqa: E731
    positions = re.search(r"^loss by position \| 0-3 (\S+) \| 4-7 (\S+) \| 8-15 (\S+) \| 16-31 (\S+) \| 32-39 (\S+)$", whole, re.M).groups()
    assert np.dot([0.1, 0.1, 0.2, 0.4, 0.2], [*map(float, positions)]) == approx(held(whole), abs=1e-3), "of the same windows"
    losses = logged(tmp_path / "whole", "loss")
    cut = [*flags, "--tp", 2, "--pp", 2, "--save_every", 12, "--out", tmp_path / "cut"]
    first = held(together(ranks, 4, "gpt3", *cut))
    (tmp_path / "cut" / "step_000000018").rename(tmp_path / "end")
    again = held(together(ranks, 4, "gpt3", *cut, "--resume"))
    assert [first, again, *logged(tmp_path / "cut", "loss")] == approx(2 * [held(whole)] + losses + losses[12:], rel=1e-4)
    for n, layout, rel in ((1, ["--precision", "bf16", "--band", 1], 1e-2), (2, ["--tp", 2], 1e-4), (2, ["--pp", 2], 1e-4)) if export else ():
        done = together(ranks, n, "gpt3", *flags, *layout, "--eval", "--init", tmp_path / "hf")
        assert (held(done) == approx(held(whole), rel=rel)) == ("--band" not in layout), "another band is another model"


def test_noise_scale_and_dropout_of_ranks(ranks, tmp_path):
    """The specification's vector; and runs, whose small batches are the first micro-batches or each rank's own, against plain gradients."""
    assert gpt3.noise_scale(16.5, 5.5625, 8, 64) == approx((4.0, 100.0))
    cfg = gpt3.Config(**gpt3.PRESETS["demo"] | ROW.small | dict(data=gpt3.__file__, batch_size=8, seq_len=64))
    _, corpus, _ = gpt3.load_mix(cfg)
    model = gpt3.GPT3(cfg)
    gpt3.init_weights(model, cfg)
    gradients = []  # of each sequence; the first update's rate is 0, the second has the same weights
    for i in range(16):
        found = torch.autograd.grad(gpt3.objective(model, gpt3.get_batch(corpus, i, 1, cfg), cfg)[0], list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]).double())
    norm = lambda first, n: torch.stack(gradients[first : first + n]).mean(0).square().sum().item()  # noqa: E731
    flags = [*flags_of(batch_size=8, seq_len=64, steps=2), "--noise_scale"]
    for n, layout, size, few, starts in (
        (1, "--micro_batch 2", 8, 2, [0]), (2, "--micro_batch 1", 8, 4, [0, 4]), (2, "--pp 2 --micro_batch 2", 8, 4, [0]), (1, "", 8, 1, []),
        (2, "--pp 2 --micro_batch 2 --precision fp16", 8, 4, [0]), (2, "--pp 2 --micro_batch 2 --batch_size 6", 6, 1, []),
    ):  # fmt: skip
        out, averages, rel = tmp_path / re.sub(r"\W", "", f"{n}{layout}"), np.zeros(2), 0.05 if "fp16" in layout else 1e-3
        assert together(ranks, n, "gpt3", *flags, "--out", out, *layout.split()).count("scale 65536") == 2 * ("fp16" in layout)
        assert logged(out, "grad") == approx([math.sqrt(norm(first, size)) for first in (0, size)], rel=rel) and max(logged(out, "loss")) < 6, "unscaled"
        for first, noise in zip((0, size), logged(out, "noise"), strict=True):
            small = [norm(first + start, few) for start in starts] or [math.nan]
            averages = 0.99 * averages + 0.01 * np.array(gpt3.noise_scale(np.mean(small), norm(first, size), few, size))
            assert noise == (approx(averages[1] / averages[0], rel=rel) if starts else None), (layout, first)
    (tmp_path / "text.txt").write_text("a" * 5000)  # all windows are the same, and dropout masks are not
    for cut in ("dp", "tp"):
        together(ranks, 2, "gpt3", *flags_of(data=tmp_path / "text.txt", batch_size=2, dropout=0.5, steps=3, out=tmp_path / cut), f"--{cut}=2", "--noise_scale")
    copies = {f"tp{rank}.final_norm.weight": torch.empty(SMALL["dim"]) for rank in (0, 1)}  # whose masks are the same
    torch.distributed.checkpoint.load({"model": copies}, checkpoint_id=tmp_path / "tp" / "step_000000003")
    assert min(map(abs, logged(tmp_path / "dp", "noise"))) > 0.01 and torch.equal(*copies.values()) and copies.popitem()[1].ne(1).any()


@pytest.mark.parametrize("precision, scale, clean, tries, after, norm", [
    ("fp16", 65536, 7, [math.inf, math.inf, 4], (16384, 1), 2), ("fp16", 8192, 998, [4], (8192, 999), 2), ("fp16", 8192, 999, [4], (16384, 0), 2),
    ("fp16", 4, 7, [math.inf] * 3, (1, 0), math.inf), ("fp16", 4, 7, [math.nan], (4, 0), math.nan), ("bf16", 1, 0, [4], (1, 0), 2),
])  # fmt: skip
def test_loss_scale(precision, scale, clean, tries, after, norm):
    """Halved by an overflow, down to 1, and doubled by 1,000 clean steps; the optimizer's gradient is unscaled. tries: |gradient|² of each try."""
    seen, state, last_scale = [], {"step": 0, "scale": float(scale), "clean": clean}, scale / 2 ** (len(tries) - 1)
    gradients = lambda batches, scale: (min(tries[0], 0), tries.pop(0) * scale**2, math.nan, 1)  # noqa: E731
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[2.0 * last_scale]])
    parallel = SimpleNamespace(cfg=gpt3.Config(precision=precision), gradients=gradients, model=model)
    optimizer = SimpleNamespace(param_groups=[], step=lambda: seen.append(model.weight.grad.item()))
    assert gpt3.take_step(parallel, optimizer, [], 0.1, state)[1] == approx(norm, nan_ok=True) and not tries
    assert (state["scale"], state["clean"]) == after and seen == ([approx(1, abs=1e-5)] if norm == 2 else [])
