"""GPT-2 and GPT-3: the worked examples of the specification, and runs of gpt3.py in every layout."""
import importlib.util
import itertools
import json
import math
import re
import shutil
import signal

import gpt3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import make_corpora, make_model, run_main, with_short_sample

ROW = SCRIPTS["gpt3"]
RAMP = dict(batch_size=8, first_batch=4, batch_multiple=4, ramp=0.4, tokens=4000, micro_batch=1)


def flags_of(**more):
    """Flags of a run of seconds."""
    flags = {"preset": "demo", "val_batches": 1, "log_every": 1, "timeout": 30, "val_every": 1000, **ROW.small, **more}
    return [f"--{flag}={value}" for flag, value in flags.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} says {i * i}\n" + "\n" * (i % 20 == 19) for i in range(2000)))
    return str(path)


@pytest.fixture
def main(monkeypatch, capsys):
    """main(*flags): what it prints, with a short sample."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*flags):
        with_short_sample("gpt3").main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return call


def logged(out, name):
    rows = map(json.loads, (out / "metrics.jsonl").open())
    return [row[name] for row in rows if "loss" in row]


@pytest.mark.parametrize("T, band", [(8, 3), (9, 3), (7, 8), (40, 16), (1, 1), (5, 1)])
def test_band(T, band):
    """Blocks of one band against the specification's rule, (j <= i) & (i - j < band), in float64, with gradients."""
    q, k, v = (torch.randn(2, 3, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    visible = (j <= i) & (i - j < band)
    if (T, band) == (8, 3):  # the specification's picture
        rows = ["1.......", "11......", "111.....", ".111....", "..111...", "...111..", "....111.", ".....111"]
        assert ["".join(".1"[int(seen)] for seen in row) for row in visible] == rows
    exact = (q @ k.mT / math.sqrt(6)).masked_fill(~visible, -math.inf).softmax(-1) @ v
    found = gpt3.banded_attention(q, k, v, band, 0.0)
    torch.testing.assert_close(found, exact, atol=1e-14, rtol=0)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, exact))):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("banded, first", [("odd", 1), ("even", 0)])
def test_banded_layers_reach_back_only_so_far(banded, first):
    """Through two banded layers a position depends on those less than 2 (band - 1) before it, and all of them; one dense
    layer among them, and it depends on all."""
    cfg = gpt3.Config(**{**ROW.tiny, "seq_len": 12, "banded": banded})
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    for layers, reach in (((first, first + 2), 2 * (cfg.band - 1)), ((first, 1 - first), 12)):
        torch.manual_seed(0)
        model = gpt3.GPT3(cfg, layers)
        for j in range(12):
            changed = tokens.clone()
            changed[0, j] = (changed[0, j] + 1) % 256
            moved = (model(changed) - model(tokens)).abs().gt(1e-6).any(-1)[0]
            assert moved.tolist() == [0 <= i - j <= reach for i in range(12)]


def test_dropout_is_on_embeddings_branches_and_probabilities(monkeypatch):
    """One mask for the embedding, two for each block; and each attention call, banded or dense, gets the rate in training alone."""
    rates, sdpa, dropout = [], F.scaled_dot_product_attention, F.dropout
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: rates.append(more["dropout_p"]) or sdpa(*args, **more))
    monkeypatch.setattr(F, "dropout", lambda x, p, training: rates.append((p, training)) or dropout(x, p, training))
    model = gpt3.GPT3(gpt3.Config(**{**ROW.tiny, "dropout": 0.1, "n_layers": 2}))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert rates.count(0.1) == 2 and rates.count((0.1, True)) == 5
    rates.clear()
    model.eval()(torch.zeros(1, 7, dtype=torch.long))
    assert rates.count(0.0) == 3 and rates.count((0.1, False)) == 5


def test_initialisation_and_optimizer():
    cfg = gpt3.Config(**{**ROW.tiny, "dim": 192, "hidden_dim": 640, "seq_len": 64})
    model = gpt3.GPT3(cfg)
    gpt3.init_weights(model, cfg)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.unique().tolist() == [float("norm" in name and "weight" in name)], name
        else:
            std = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.01 if "position" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    model.blocks.add_module("stranger", torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="stranger"):
        gpt3.init_weights(model, cfg)
    decayed, others = gpt3.build_optimizer(gpt3.GPT3(cfg), cfg).param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"], decayed["eps"]) == (0.1, 0.0, (0.9, 0.95), 1e-8)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])
    names = ["token_embedding.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.up.bias", "blocks.0.mlp.down.weight", "blocks.0.norm1.bias", "v.weight"]
    assert [gpt3.split_dimension(name) for name in names] == [0, 0, 0, 1, None, None]


def test_bpe_merges_the_most_frequent_pair():
    """Each merge is of a pair that no other pair within words exceeds, counted anew; a word's length costs no more than a text's."""
    text = "the cat's hat, the hatter; aaaa aaa banana bananas 1234 12345 été naïve\n\n  def f(x):\n    return x_1\n" * 3 + "thaththat aaaaa"
    text += "".join(itertools.islice((text for _, text in gpt3.read_documents("", gpt3.find_files("")[0])), 1))[:6000]
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(pattern, text)]
    learned = list(gpt3.train_bpe([text[:500], text[500:]] if text[499:501] == "  " else [text], 600))
    assert len(learned) == 600 and learned[:256] == [bytes([i]) for i in range(256)]
    for token in learned[256:]:
        counts = {}
        for pair in itertools.chain(*(zip(word, word[1:]) for word in words)):
            counts[pair] = counts.get(pair, 0) + 1
        most = [pair for pair in counts if counts[pair] == max(counts.values())]
        again = [pair for pair in most if pair[0] + pair[1] in learned[: learned.index(token)]]
        pair = next(pair for pair in most if pair[0] + pair[1] == token or pair in again)
        for word in words:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == pair:
                    word[j : j + 2] = [pair[0] + pair[1]]
                j += 1
    assert list(gpt3.train_bpe(["aaab aab ab ab", "ab"], 258).items())[256:] == [(b"ab", 256), (b" ab", 257)]
    assert list(gpt3.train_bpe(["a" * 1000], 265))[256:] == [b"a" * 2**n for n in range(1, 10)]
    with pytest.raises(ValueError, match="no more than"):
        gpt3.train_bpe(["ab ab"], 400)


def test_learned_tokenizer_and_a_run_with_it(main, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"the number {i} is not {i * i}, is it? naïve 🙂\n" for i in range(3000)))
    data = ["--data", tmp_path / "text.txt"]
    assert "400 entries" in main(*data, "--train_tokenizer", 400, "--out", tmp_path / "out")
    ranks = tmp_path / "out" / "ranks.tiktoken"
    tokenizer = gpt3.load_tokenizer(str(ranks), ["<|endoftext|>"])
    for sample in ("the number 7's\n\n  not", "naïve 🙂 \x00\t текст 你好\r\n", " <|endoftext|>"):
        ids = tokenizer.encode_ordinary(sample)
        assert tokenizer.decode(ids) == sample and max(ids) < 400
    flags = [*flags_of(), *data, "--steps", 2]
    first = main(*flags, "--tokenizer", ranks)
    second = main(*flags, "--tokenizer", "bpe:400", "--out", tmp_path / "run")
    clean = lambda out: re.sub(r"[\d.]+k tok/s.*", "", out)  # noqa: E731
    assert clean(first) == clean(second) and "val 2" in first
    learned = (tmp_path / "run" / "ranks.tiktoken").read_text()
    assert learned == ranks.read_text()
    monkeypatch.setattr(gpt3, "train_bpe", None)
    main(*flags, "--tokenizer", "bpe:400", "--out", tmp_path / "run", "--resume", "--steps", 3)
    assert (tmp_path / "run" / "ranks.tiktoken").read_text() == learned, "a run keeps its tokenizer"
    for more in (["--tokenizer", "bpe:300"], ["--train_tokenizer", 300]):
        with pytest.raises(SystemExit):
            main(*flags, *more, "--out", tmp_path / "run")


def test_mix_of_the_paper(tmp_path):
    """Table 2.2: its weights normalised, their epochs in 300B tokens, and no window twice within an epoch."""
    sizes = {"cc": 410, "webtext2": 19, "books1": 12, "books2": 55, "wikipedia": 3}
    weights = gpt3.parse_weights("60:cc,22:webtext2,8:books1,8:books2,3:wikipedia")
    assert [round(w, 4) for w in weights.values()] == [0.5941, 0.2178, 0.0792, 0.0792, 0.0297]
    start, mix = 0, []
    for name, size in sizes.items():  # a five-millionth of each; ids tell where a window comes from
        np.save(tmp_path / f"{name}.npy", np.arange(start, start + 200 * size, dtype=np.uint32))
        start += 200 * size
        mix.append(f"{weights[name]}:{tmp_path / name}.npy")
    cfg = gpt3.Config(data=",".join(mix), vocab_size=100_000, seq_len=10, batch_size=20, val_batches=1)
    _, mixture, heldout = gpt3.load_mix(cfg)
    windows = [c.n_windows(10) for c in mixture.corpora]
    drawn = [mixture.draw(i, 0) for i in range(6000)]  # 60,000 tokens
    epochs = [sum(c == corpus for c, _ in drawn) / n for corpus, n in enumerate(windows)]
    assert epochs == pytest.approx([0.44, 3.47, 2.00, 0.44, 3.00], rel=0.15)
    firsts = [mixture.window(i, 10, 0)[0].item() for i in range(6000)]
    for corpus, n in enumerate(windows):
        own = [first for (c, _), first in zip(drawn, firsts) if c == corpus]
        assert len(set(own[:n])) == min(n, len(own))
        positions = sorted(p for c, p in drawn if c == corpus)
        assert positions == list(range(len(positions))), "without replacement until an epoch is over"
    held = np.concatenate([heldout.window(i, 10, 0) for i in range(heldout.n_windows(10))])
    assert heldout.n_windows(10) >= 20 and not set(firsts) & set(held.tolist())
    places = [heldout.draw(i, 0) for i in range(1000)]
    assert [sum(c == corpus for c, _ in places) for corpus in range(5)] == mixture.shares == [594, 218, 79, 79, 30]


def test_packing_counts_every_target():
    """Documents back to back, a separator after each; nothing is masked, and the first token of the next is predicted, too."""
    tokenizer = gpt3.load_tokenizer("bytes", ["<|endoftext|>"])
    documents = gpt3.tokenize((("a", "abc"), ("b", "de"), ("c", "f" * 20)), tokenizer, 256)
    stream = np.concatenate([ids for _, ids in documents])
    corpus = gpt3.Corpus([("", stream)], 0, len(stream), 256, (np.arange(257) < 256).astype(int), in_order=True)
    batch = gpt3.get_batch(corpus, 0, 1, gpt3.Config(seq_len=8))
    assert batch["tokens"].tolist() == [[97, 98, 99, 256, 100, 101, 256, 102]]
    assert batch["targets"].tolist() == [[98, 99, 256, 100, 101, 256, 102, 102]]
    assert batch["n_targets"] == 8 and batch["n_bytes"] == 6, "the separator has no bytes"


def test_ramp_and_steps():
    """The specification's vectors: whole sequences, linear in tokens; on more ranks, what these can share."""
    for preset, tokens, ramp, steps, flat in (("175b", 40_960, 17_718, 109_271, 95_368), ("125m", 36_864, 22_806, 587_382, 572_205)):
        cfg = gpt3.Config(**{**gpt3.PRESETS[preset], "batch_multiple": 1, "dp": 1})
        seen = 0
        for step in range(1000):
            seen += gpt3.batch_at(seen, cfg) * 2048
        assert gpt3.batch_at(seen, cfg) * 2048 == tokens
        assert gpt3.count_steps(cfg) == (ramp, steps)
        cfg.first_batch = 0
        assert gpt3.count_steps(cfg) == (0, flat)
    cfg = gpt3.Config(dp=64, first_batch=16, batch_size=1536, ramp=12 / 300, batch_multiple=16, micro_batch=1)
    assert [gpt3.batch_at(tokens, cfg) for tokens in (0, 6e9, 12e9 - 1, 12e9, 1e12)] == [64, 768, 1472, 1536, 1536]
    cfg.dp, cfg.pp = 16, 12
    assert [gpt3.batch_at(tokens, cfg) for tokens in (0, 3e9, 12e9)] == [192, 384, 1536], "twelve micro-batches for each pipeline"
    cfg = gpt3.Config(**gpt3.PRESETS["175b"] | dict(tokens=10e9, dp=1))  # a thirtieth of the run: so are the ramp and the warm-up
    assert [gpt3.learning_rate(t / 30, cfg) for t in (187.5e6, 10e9, 200e9)] == pytest.approx([3e-5, 5.981708e-5, 1.280897e-5])
    assert gpt3.batch_at(0.4e9, cfg) == 1536 > gpt3.batch_at(0.39e9, cfg)


def test_presets_are_the_papers_tables(capsys):
    table = {  # layers, width, heads, batch in tokens, rate, ramp: Table 2.1, misprints settled by Table D.1; PF-days; envelope
        "125m": (12, 768, 12, 0.5, 6e-4, 4, 2.60, 2.50), "350m": (24, 1024, 16, 0.5, 3e-4, 4, 7.42, 2.35), "760m": (24, 1536, 16, 0.5, 2.5e-4, 4, 15.8, 2.26),
        "1.3b": (24, 2048, 16, 1, 2e-4, 6, 27.5, 2.20), "2.7b": (32, 2560, 32, 1, 1.6e-4, 6, 55.2, 2.13), "6.7b": (32, 4096, 32, 2, 1.2e-4, 8, 139, 2.03),
        "13b": (40, 5120, 40, 2, 1e-4, 8, 268, 1.97), "175b": (96, 12288, 96, 3, 0.6e-4, 12, 3640, 1.73),
    }  # fmt: skip
    for name, (layers, dim, heads, batch, lr, ramp, days, loss) in table.items():
        cfg = gpt3.Config(**gpt3.PRESETS[name])
        assert (cfg.n_layers, cfg.dim, cfg.n_heads, cfg.hidden_dim, cfg.lr) == (layers, dim, heads, 4 * dim, lr)
        assert cfg.batch_size * 2048 == batch * 2**20 and cfg.ramp * cfg.tokens == pytest.approx(ramp * 1e9) and cfg.first_batch * 2048 == 2**15
        assert (cfg.warmup * cfg.tokens, cfg.decay * cfg.tokens) == pytest.approx((375e6, 260e9))
        assert (cfg.tokens, cfg.floor, cfg.weight_decay, cfg.clip) == (3e11, 0.1, 0.1, 1.0)
        assert (cfg.vocab_size, cfg.tokenizer, cfg.seq_len, cfg.band, cfg.banded, cfg.dropout) == (50257, "gpt2", 2048, 128, "odd", 0.0)
        gpt3.dry_run(cfg)
        found = re.search(r"PF-days (\S+) .* (\S+) nats", capsys.readouterr().out).groups()
        assert [float(x) for x in found] == [pytest.approx(days, rel=5e-3), pytest.approx(loss, abs=6e-3)], name
    for name, shape in dict(gpt2=(12, 768, 12), gpt2_medium=(24, 1024, 16), gpt2_large=(36, 1280, 20), gpt2_xl=(48, 1600, 25)).items():
        cfg = gpt3.Config(**gpt3.PRESETS[name], dp=1)
        assert (cfg.n_layers, cfg.dim, cfg.n_heads) == shape and (cfg.seq_len, cfg.batch_size, cfg.band) == (1024, 512, 0)
        assert gpt3.count_steps(cfg) == (0, 300_000) and cfg.warmup * cfg.tokens == pytest.approx(2000 * 512 * 1024)


def test_loss_by_position():
    cfg = gpt3.Config(**ROW.tiny)
    _, heldout = make_corpora(gpt3, cfg)
    model = make_model(gpt3, ROW, cfg)
    nats = gpt3.loss_by_position(model, heldout, 8, cfg)
    batch = gpt3.get_batch(heldout, 0, 8, cfg)
    exact = -model(batch["tokens"]).double().log_softmax(-1).gather(2, batch["targets"][..., None])[..., 0].mean(0)
    assert nats == pytest.approx(exact.tolist(), rel=1e-5)


def together(ranks, n, *flags):
    (status, out, err), *others = ranks.run(n, run_main, "gpt3", [str(flag) for flag in flags], timeout=120)
    assert status == 0 and not any(other[0] for other in others), (err, *(other[2] for other in others))
    return out


def test_ramp_and_layouts_give_the_same_run(ranks, text, tmp_path):
    """Batches of 4 and 8, on one rank and cut in every way: the same losses; and through --export the same held-out loss elsewhere."""
    flags = [*flags_of(**RAMP), "--data", text, "--lr", 0.01, "--seq_len", 40]
    export = ["--export", tmp_path / "hf"] if importlib.util.find_spec("safetensors") else []
    whole = together(ranks, 1, *flags, "--out", tmp_path / "whole", *export)
    assert re.findall(r"\| batch (\d+)", whole) == ["4"] * 10 + ["8"] * 8, "the ramp ends at 1,600 tokens, the run at 4,000"
    assert re.search(r"^loss by position \| 0-3 \S+ \| 4-7 \S+ \| 8-15 \S+ \| 16-31 \S+ \| 32-39 \S+$", whole, re.M)
    held = lambda out, step: float(re.search(rf"val {step} \| loss (\S+)", out)[1])  # noqa: E731
    for n, layout in ((2, ["--dp", 2]), (4, ["--tp", 2, "--pp", 2])):
        done = together(ranks, n, *flags, *layout, "--out", tmp_path / f"on{n}")
        assert logged(tmp_path / f"on{n}", "loss") == pytest.approx(logged(tmp_path / "whole", "loss"), rel=1e-4)
        assert held(done, 18) == pytest.approx(held(whole, 18), rel=1e-4)
    for n, layout in ((1, ["--precision", "bf16"]), (2, ["--tp", 2]), (2, ["--pp", 2, "--band", 1])) if export else ():
        done = together(ranks, n, *flags, *layout, "--steps", 1, "--init", tmp_path / "hf")
        near = 1e-2 if "bf16" in layout else 1e-4
        assert (held(done, 0) == pytest.approx(held(whole, 18), rel=near)) == ("--band" not in layout), "another band is another model"


def test_noise_scale(ranks, text, tmp_path):
    """The specification's vector; and runs on one rank, on two and in a pipeline, whose small batches are the first micro-batches
    or, on two data-parallel ranks, each rank's own, against plain gradients of these."""
    assert gpt3.noise_scale(16.5, 5.5625, 8, 64) == pytest.approx((4.0, 100.0))
    flags = [*flags_of(batch_size=8, seq_len=64), "--data", text, "--steps", 2, "--noise_scale"]
    parts = lambda n: [list(range(i, i + n)) for i in range(0, 8, n)]  # noqa: E731
    for n, layout, small in ((1, ["--micro_batch", 2], parts(2)[:1]), (2, ["--micro_batch", 1], parts(4)),
                             (2, ["--pp", 2, "--micro_batch", 2], parts(4)[:1]), (1, [], None)):  # fmt: skip
        out = tmp_path / f"{n}{len(layout)}{small}"
        together(ranks, n, *flags, *layout, "--out", out)
        fields = {field: value for field, value in json.loads((out / "config.json").read_text()).items() if field in gpt3.Config.__dataclass_fields__}
        cfg, averages = gpt3.Config(**fields), [0, 0]
        _, corpus, _ = gpt3.load_mix(cfg)
        model = gpt3.GPT3(cfg)
        gpt3.init_weights(model, cfg)
        noises = logged(out, "noise")
        assert small or noises == [None, None], "one rank and one micro-batch: n/a"
        for step in range(2 if small else 0):  # the first update's rate is 0: the second has the same weights
            batch, squares = gpt3.get_batch(corpus, 8 * step, 8, cfg), []
            for rows in (*small, list(range(8))):
                loss = F.cross_entropy(model(batch["tokens"][rows]).flatten(0, 1), batch["targets"][rows].flatten())
                squares.append(sum(g.double().square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))).item())
            few, least = len(small[0]), np.mean(squares[:-1])
            square, trace = (8 * squares[-1] - few * least) / (8 - few), (least - squares[-1]) / (1 / few - 1 / 8)
            averages = [0.99 * averages[0] + 0.01 * square, 0.99 * averages[1] + 0.01 * trace]
            assert noises[step] == pytest.approx(averages[1] / averages[0], rel=1e-3)


def test_loss_scale(main, text, tmp_path, monkeypatch):
    """A gradient that overflows halves the scale and is tried again on the same data; 1,000 clean steps double it."""
    inner, calls = gpt3.objective, []

    def objective(model, batch, cfg):
        loss, metrics = inner(model, batch, cfg)
        calls.extend([1] * torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(calls) in (3, 4):  # only the gradient overflows
            loss = loss.clone()
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * (math.nan if torch.is_grad_enabled() and len(calls) == 7 else 1.0), metrics

    monkeypatch.setattr(gpt3, "objective", objective)
    flags = [*flags_of(), "--data", text, "--precision", "fp16", "--n_layers", 2, "--prompt", "x"]
    out = main(*flags, "--steps", 6, "--out", tmp_path / "run")
    assert re.findall(r"step (\d+) overflows: loss scale (\d+)", out) == [("3", "32768"), ("3", "16384")] and len(calls) == 8
    assert out.count("skipped") == 1 and "step 5 skipped" in out, "a loss that is not finite is no overflow"
    scales = lambda out: [int(scale) for scale in re.findall(r"\| scale (\d+)", out)]  # noqa: E731
    assert scales(out) == [65536, 65536, 16384, 16384, 16384, 16384] and logged(tmp_path / "run", "tokens")[-1] == 5 * 64
    assert all(0.1 < norm < 10 for norm in logged(tmp_path / "run", "grad")[:4]), "the norm is that of the gradient, unscaled"
    for steps, precision, scale in ((7, "bf16", []), (8, "fp16", [65536])):  # it begins and ends with the precision
        assert scales(main(*flags, "--precision", precision, "--steps", steps, "--out", tmp_path / "run", "--resume")) == scale
    shutil.copytree(tmp_path / "run", tmp_path / "more")
    monkeypatch.setattr(gpt3, "load_checkpoint", lambda *args: args[-1].update(clean=997, step=0, sequences=0, scale=65536.0))
    assert scales(main(*flags, "--steps", 5, "--out", tmp_path / "more", "--resume")) == [65536, 65536, 131072, 131072, 131072]


def test_fp16_follows_fp32(main, text, tmp_path):
    flags = [*flags_of(), "--data", text, "--steps", 4, "--n_layers", 2, "--lr", 0.003, "--prompt", "x"]
    fp16, fp32 = (main(*flags, "--precision", name, "--out", tmp_path / name) and logged(tmp_path / name, "loss") for name in ("fp16", "fp32"))
    assert fp16 == pytest.approx(fp32, rel=2e-3) and fp16 != fp32
