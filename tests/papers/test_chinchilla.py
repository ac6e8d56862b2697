"""chinchilla.py: Gopher's model, the counts and FLOPs of the paper, the laws and their fits, the sweep."""
import math
import re
from unittest.mock import MagicMock, patch

import chinchilla as c
import numpy as np
import torch
from conftest import SCRIPTS
from pytest import approx, importorskip
from ranks import gradients, run_main

BUDGETS = [6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21]
TRUTH = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
SWEEP = ["--preset", "demo", "--sweep", "1e9,3e9", "--sizes", "16x1,32x1,48x1", "--data", c.__file__, "--val_batches", 2, "--bootstrap", 2, "--log_every", 1]
main = lambda flags: run_main("chinchilla", flags)  # noqa: E731 -> (exit status, stdout, stderr)
kaplan_loss = lambda N, D: ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103  # noqa: E731


def synthetic(law=TRUTH, noise=0.0, outliers=0.0, span=4):
    """The specification's 63 runs: nine budgets times N = N_opt span^(k/3), k = -3 ... 3, ordered by budget, then k."""
    rows = []
    for i, C in enumerate(np.repeat(BUDGETS, 7)):
        N = c.frontier(TRUTH, C)[0] * span ** (i % 7 / 3 - 1)
        error = noise * ((7 * i % 11) - 5) / 5 + outliers * (i in (5, 20, 40))
        rows.append(dict(N=N, D=C / 6 / N, C=C, loss=c.parametric_loss(law, N, C / 6 / N) * math.exp(error)))
    return rows


def test_attention_is_the_formula():
    """score_ij = ((q_i + u) k_j + (q_i + w) W_R r_{i-j}) / sqrt(E), no weight or bias near 0: T 7, D 20, H 3, E 6."""
    layer, x, i = c.RelativeAttention(20, 3, 6).double(), torch.randn(2, 7, 20).double(), torch.arange(7)
    [p.data.normal_(0, 0.4) for p in layer.parameters()]
    angles = torch.arange(7, -7, -1)[:, None] / 10000 ** (torch.arange(0, 20, 2) / 20).double()
    every = torch.cat((angles.sin(), angles.cos()), 1)  # of distances 7 ... -6
    r, mask = c.distances(7, 20, torch.device("cpu"))
    torch.testing.assert_close(r.double(), every[1:8], atol=1e-6, rtol=0)
    q, k, v = layer.qkv(x).view(2, 7, 3, 3, 6).unbind(2)  # [B, T, H, E]
    scores = torch.einsum("bihe,bjhe->bhij", q + layer.u.view(3, 6), k)
    scores += torch.einsum("bihe,ijhe->bhij", q + layer.w.view(3, 6), layer.distance(every).view(14, 3, 6)[7 - i[:, None] + i])
    p = (scores / math.sqrt(6)).masked_fill(i > i[:, None], -math.inf).softmax(-1)
    expected = layer.out(torch.einsum("bhij,bjhe->bihe", p, v).flatten(2))
    torch.testing.assert_close(layer(x, every[1:8], mask.double()), expected, atol=1e-10, rtol=0)


def test_tables_and_laws_at_the_specifications_points():
    """All 50 models to 0.6 million, and to rounding but for four; sizes by name in a sweep; half of the tokens of 70B and 280B in either batch."""
    counts = {row[0]: SCRIPTS["chinchilla"].counts[f"{row[0]}m"] / 1e6 for row in c.TABLE_A9}  # test_shapes.py sees to these
    assert len(counts) == 50 and all(count == approx(printed, abs=0.61) for printed, count in counts.items())
    assert [printed for printed, count in counts.items() if round(count) != printed] == [489, 1731, 2980, 6796]
    shapes = {512: (64, 8, 8, approx(2e-4)), 1280: (128, 10, 18, c.PRESETS["425m"]["lr"]), 8192: (128, 64, 80, 1e-4)}
    for flops in ("6nd", "appF"):
        for row, run in c.plan_sweep(c.Config(**c.PRESETS["demo"] | dict(vocab_size=257, sweep="1e18", sizes="44m,425m,70b", flops=flops)), 0):
            assert (run.head_dim, run.n_heads, run.n_layers, run.lr) == shapes[run.dim]
            assert 1e18 == approx(run.steps * 768 * {"6nd": 6 * row["N"], "appF": 3 * c.appendix_f(run)["total"] / 32}[flops], rel=1e-3)
    big = [c.Config(**c.PRESETS[name], world_size=64) for name in ("70b", "280b")]
    assert sum(c.memory_per_rank(big[0]).values()) < 60 * 2**30
    points = np.array([(7e10, 2.8e11, 1e9, 1e8), (1.4e12, 3e11, 2e10, 2e9)])
    terms = {name: c.appendix_f(c.Config(**c.PRESETS[name])) for name in ("74m", "306m", "552m", "1143m", "1593m", "6796m", "280b")}
    shapes = [(*row[1:], terms[f"{row[0]}m"]["body"]) for row in c.TABLE_A9 if f"{row[0]}m" in terms]  # of Table A4, whose N has five matrices
    for found, expected, rel in (
        ([terms[name][key] for name in ("74m", "6796m") for key in ("body", "total")], [3.099591e11, 4.777312e11, 2.767368e13, 2.861321e13], 1e-6),
        ([round(body / 4096 / (32000 * D + L * (5 * D * E * H + 8 * D * D)), 2) for D, E, H, L, body in shapes], [1.03, 1.10, 1.08, 1.04, 1.03, 0.99], 1e-9),
        ([(cfg.lr, cfg.tokens, c.updates_left(0, cfg)) for cfg in big], [(1e-4, 1.4e12, 1.4e12 / 2**21), (4e-5, 3e11, 3e11 / 2**22)], 2e-5),
        (4 * terms["280b"]["body"] / 2048 * 3e11, 6.31e23, 2e-3),  # Gopher's 6.3e23 counts a forward pass more
        ([kaplan_loss(1e8, 1e9), kaplan_loss(1e9, 2.2e10)], [2.9567, 2.3693], 2e-5),
        ([c.critical_batch(3), c.kaplan_optimum(3.1e8 * 8.64e19)[2], *c.kaplan_optimum(3640 * 8.64e19)[:2]], [1.069e6, 1, 5.171e11, 1.83e11], 1e-3),
        (c.parametric_loss(c.BESIROGLU, *points), [1.973882, 1.999608, 2.530050, 3.438537], 4e-7),
        (c.parametric_loss(c.HOFFMANN_ROUNDED, *points), [1.936645, 1.993258, 2.580048, 3.485874], 4e-7),
        ([c.frontier(c.BESIROGLU, C) for C in (1e18, 1e21, 3.8e25)], [(8.053e7, 2.070e9), (2.778e9, 5.999e10), (6.187e11, 1.024e13)], 3e-4),
        ([np.divide(*c.frontier(law, 5.76e23)) for law in (c.BESIROGLU, c.HOFFMANN_ROUNDED, c.HOFFMANN)], [1 / 18.4, 1 / 92.7, 1 / 58.9], 3e-3),
        ([c.parametric_loss(c.BESIROGLU, *c.frontier(c.BESIROGLU, C)) for C in (1e18, 1e21)], [3.4905, 2.3055], 2e-5),
        (c.columns(synthetic()[:6], "loss"), [[3.183351, 3.099219, 3.049437, 3.032932, 3.049529, 3.099959]], 4e-7),
        ([synthetic()[-1][key] for key in ("N", "D", "loss")], [1.95183e10, 2.56170e10, 2.269174], 3e-6),
        ([law[1:3] for law in c.all_laws({})[1:3]], [(0.0992, 0.4981), (0.1449, 0.4899)], 1e-3),  # Tables 3 and A3
        ([A * 3.8e25**alpha for A, alpha in c.LLAMA3.values()], [10.5e12, 16.3e12], 0.01),
        ([c.overtrain(c.HOFFMANN_ROUNDED, 7e9, 4.677e11, 10**i) for i in (11, 12, 13)], [(6.34e9, 5.18e11), (4.26e9, 8.42e11), (2.32e9, 2.51e12)], 2e-3),
    ):  # fmt: skip
        assert np.array(found) == approx(np.array(expected), rel=rel)


def test_fits(monkeypatch):
    """Approach 3: the specification's table, and the same from the minimum itself, where resamples start; the minimum of a mean. Kaplan's own law.
    Approach 1: curves of the law, of Table A9's sizes. Approach 2: the parabola's bias, common to all budgets. 10 to 90 % of resamples' 2 ... 102."""
    for runs, delta, expected in (
        (dict(), 1e-3, TRUTH | dict(a=0.512612)), (dict(law=c.HOFFMANN_ROUNDED), 1e-3, c.HOFFMANN_ROUNDED | dict(a=0.28 / 0.62)),
        (dict(noise=0.002), 1e-3, dict(A=471.92, B=2166.78, E=1.8182, alpha=0.3466, beta=0.3677, a=0.5148)),
        (dict(outliers=0.2), 1e-3, dict(A=482.47, B=2114.86, E=1.8177, alpha=0.3479, beta=0.3664, a=0.5130)),
        (dict(outliers=0.2), 1.0, dict(A=576.87, B=12456, E=1.8803, alpha=0.3613, beta=0.4433, a=0.5510)),  # squared errors
        *((dict(noise=0.002, outliers=0.2), delta, dict(a=a)) for delta, a in ((1e-3, 0.5160), (1e-2, 0.5189), (1e-4, 0.5162))),
    ):
        found, x = c.fit_parametric(synthetic(**runs), delta=delta)
        assert {key: found[key] for key in expected} == approx(expected, rel=1e-4 if not runs or "law" in runs else 1e-3)
        assert c.fit_parametric(synthetic(**runs), x, delta)[0] == approx(found, rel=1e-3)
    logs = [torch.tensor([run[key] for run in synthetic()]).double().log() for key in ("N", "D", "loss")]
    for scale, right in ((1e-3, True), (1e-8 / 63, False)):  # a mean is to a library's 1e-7 as a sum 1e8 x 63 times less than ours to our 1e-9
        _, x = c.minimize(lambda x: scale * c.huber_sum(lambda x: c.parametric_residuals(x, *logs), 1e-3, x), [5.0, 5.0, 0.5, 0.5, 0.5])
        assert (x[4] / (x[3] + x[4]) == approx(0.5126, abs=1e-4), math.exp(x[2]) == approx(1.8172, abs=1e-3)) == (right, right)
    rows = [dict(N_non_embedding=N, N=2 * N, D=D, loss=kaplan_loss(N, D)) for N in (1e7, 1e8, 1e9, 1e10) for D in (1e9, 1e10, 1e11)]
    (found, x), N = c.fit_kaplan(rows), np.geomspace(1e7, 1e13, 200_001)
    assert [*found.values()][3:] == approx([6.4e13, 1.8e13, 0.076, 0.103], rel=1e-3) and c.fit_kaplan(rows, x)[0] == approx(found, rel=1e-3)
    assert all(found["k"] * C ** found["a"] == approx(N[kaplan_loss(N, C / (6 * N)).argmin()], rel=2e-3) for C in (1e19, 1e22))
    rows = []
    for N, end in ((1e6 * row[0], end) for row in c.TABLE_A9 if 70 <= row[0] <= 10_000 for end in (6e18, 3e21)):
        D = np.geomspace(1e17, end * (1.02 if N == 74e6 else 1), 1000) / (6 * N)  # the last run to end is not the best
        rows.append(dict(N=N, D=D[-1], C=6 * N * D[-1], curve=np.c_[D, c.parametric_loss(TRUTH, N, D)].tolist()))
    found, _ = c.fit_envelope(rows)
    assert (found["a"], found["b"], found["sizes"]) == approx((0.5122, 0.4878, 33), abs=0.002)
    smooth, kernel = c.smoothed([2.0] * 20 + [3.0] + [2.0] * 10), np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
    assert smooth == approx(2 + np.r_[np.zeros(15), kernel / kernel.sum(), np.zeros(5)])
    for span, bias in ((2, 0.999), (4, 0.996), (8, 0.990)):
        for fit, per in ((c.fit_isoflop, 1), (c.fit_isoflop, 1.5), (c.fit_llama, 1.5)):  # 6 N D, or a count that is half as much again
            found, _ = fit([run | {"C": per * run["C"]} for run in synthetic(span=span)])
            assert (found["a"], found["b"], found.get("budgets", 9)) == approx((0.5126, 0.4874, 9), abs=0.001)
            assert [found["k"] * (per * C) ** found["a"] / c.frontier(TRUTH, C)[0] for C in BUDGETS] == approx([bias] * 9, abs=0.001)
    assert c.fit_isoflop(synthetic(noise=0.002))[0]["a"] == approx(0.5144, abs=0.001)
    chain = [dict(N=N, C=C) for C in (*1e18 * 1.08 ** np.arange(4), 1.45e18, 1.55e18) for N in (1e7, 2e7, 3e7)]
    assert [[len(group) for group in c.budgets_of(runs)] for runs in (chain, chain[:2])] == [[12, 6], []]
    rows, seen = [run | {"loss": 9.0} for run in synthetic()[:2]] + synthetic(), []
    monkeypatch.setattr(c, "fit_parametric", lambda rows, x=0: (seen.append([run["loss"] for run in rows]) or {"a": len(seen), "k": 1.0}, None))
    monkeypatch.setattr(c, "FITS", {"approach 3": c.fit_parametric})
    assert c.fit_and_report(rows, c.Config(bootstrap=101, drop_highest=2))["approach 3"]["a"] == (1, 12, 92, 101)
    assert [len(losses) for losses in seen] == [63] + [50] * 101 and max(seen[0]) < 9


def test_fits_of_tables(tmp_path):
    """nll and accuracy lie on known lines, for Llama 3's two steps; the budget is that of Sardana's 7B; tables that are none."""
    rows = synthetic()
    for i, run in enumerate(rows):
        run["nll"] = 3.0 - 0.05 * math.log(run["C"]) + 0.1 * (run["loss"] - rows[i // 7 * 7 + 3]["loss"])
        run["accuracy"] = 0.25 + 0.75 / (1 + math.exp(6 * (run["nll"] - 0.7)))
    np.savetxt(tmp_path / "a.csv", [[*run.values()] for run in rows], delimiter=",", header=",".join(rows[0]), comments="", encoding="utf-8-sig")
    status, out, _ = main(["--fit", tmp_path / "a.csv", "--bootstrap", 3, "--budget", "1.9643e22", "--inference_tokens", "1e12"])
    assert status == 0 and len(re.findall(r"^C \S+ \| 7 runs .* lowest point \S+, loss", out, re.M)) == 9
    for pattern in (
        "approach 1 +. n/a: needs training curves", r"approach 3 +\| a 0\.5126 \[0\.5126, 0\.5126\]", r"own fit, approach 3 +\| N +12\.8B",
        r"Llama 3 .* b 0\.4874 .* nll_intercept 3 .* nll_slope -0\.05 .* sigmoid_m 0\.7 .* sigmoid_k 6 ", r"Kaplan, Table 6 \* +\| N +68\.3B \| D +86\.6B",
        r"same, as printed +\| N +7\.00B \| D +468B .* loss 2\.0944 \| used for 1\.00T tokens: N 4\.26B, D 842B, 0\.892 of the cost",
    ):  # fmt: skip
        assert re.search(rf"^{pattern}", out, re.M), (pattern, out)
    for name, text, phrase in (
        *(("a.csv", f"N,D,loss,C\n1e6,2e7,3,9\n{row}\n", "run 2, is not num") for row in ("1e6,x,3,9", "1e6,9,-3,9", "1e6,2e7,3,0", "1e6,9,nan,9")),
        ("a.csv", "N,D\n1,2\n", "KeyError: 'loss'"), ("a.csv", "N,D,loss\n", "no runs"), ("a.csv", "N,D,loss\nI\xffI", "a.csv is not a table"),
        ("a.jsonl", '{"key": 1, "sweep": 1}\n{"key": 2, "sweep": 2}', "several sweeps"), ("a.jsonl", '{"key": 1, "flops": "appF"}', "another --flops"),
    ):
        (tmp_path / name).write_text(text, "latin-1")
        status, out, err = main(["--fit", tmp_path / name])
        assert (status, out, len(err.splitlines())) == (2, "", 1) and phrase in err, phrase
    assert [c.read_runs("", [dict(N=1e6, D=2e7, loss=3, C_appF=1e15)], flops)[0]["C"] for flops in ("6nd", "appF")] == [1.2e14, 1e15]


def test_sweep(ranks, tmp_path, monkeypatch):
    """Stopped and finished by two ranks it is the sweep that nobody stopped; of other data one run diverges; no run is trained twice."""
    changes = dict(seed=0, out="x", data="x", timeout=9, batch_size=48, warmup_steps=3, precision="bf16", log_every=5)  # four change no number
    keys = [c.plan_sweep(c.Config(**c.PRESETS["demo"] | {"vocab_size": 257, name: value}), 1)[0][0]["key"] for name, value in changes.items()]
    assert len(set(keys[:4])) == 1 and len(set(keys)) == 5
    broken, inner, stop = tmp_path / "broken", c.update_shards, []
    monkeypatch.setattr(c, "catch_signals", lambda: stop.clear() or stop)
    _, out, err = main([*SWEEP, "--out", tmp_path])
    assert re.findall(r"\nrun ./6: \S+_(\S+)_", out) == ["3e+09"] * 3 + ["1e+09"] * 3 and "fits to 6 runs" in out, err
    for r in (rows := c.finished(tmp_path / "runs.jsonl")).values():
        d, N, D = int(r["name"].split("x")[0]), r["N"], r["D"]
        assert r["N_non_embedding"] == N - 257 * d == 13 * d * d + 10 * d and r["lr"] == approx(0.36 / d) and D == r["steps"] * 768
        assert abs(D - r["budget"] / 6 / N) <= 384 and r["C"] == 6 * N * D and r["curve"][-1] == approx([D, r["train_loss"]], abs=1e-4)
        assert f'"val_loss": {r["loss"]}, ' in (tmp_path / r["name"] / "metrics.jsonl").read_text().splitlines()[-1]
    monkeypatch.setattr(c, "update_shards", lambda *args: stop.extend([15] * (args[4].dim == 48)) or inner(*args))
    assert "stopped by a signal" in main([*SWEEP, "--out", broken])[1] and len(c.finished(broken / "runs.jsonl")) == 2
    next(broken.glob("48x1*/metrics.jsonl")).open("a").write('{"step": 2, "loss": 9.0, "tokens": 1536}\n')  # of updates that a kill undid
    (broken / "runs.jsonl").write_text((broken / "runs.jsonl").read_text() + '{"name": "what a full disk left')
    (status, out, err), (other, silent, more) = ranks.run(2, run_main, "chinchilla", [*SWEEP, "--out", broken], timeout=120)
    assert status == other == 0 and not silent and all(part in out for part in ("over 2 ranks", "2 are done", "fits to 6 runs")), (err, more)
    assert c.finished(broken / "runs.jsonl") == rows
    assert all(path.read_text().count('{"step": 1, "loss"') == 1 for path in broken.glob("*/metrics.jsonl")), "none began anew"
    monkeypatch.setattr(c, "update_shards", lambda *args: (inner(*args)[0], math.nan) if args[4].dim == 32 else inner(*args))
    other = [*SWEEP, "--data", c.Path(c.__file__).with_name("gpt1.py"), "--sweep", "1e9", "--no-keep_models", "--out", tmp_path]
    assert re.search(r"run 32x1_1e\+09\S+ diverged: it is left out\nfits to 2 runs", main(other)[1])
    monkeypatch.setattr(c, "update_shards", None)
    assert "6 are done" in main([*SWEEP, "--data", c.Path(c.__file__).parent / "tests/../chinchilla.py", "--out", tmp_path])[1]
    assert "3 are done" in main(other)[1] and main(["--fit", tmp_path / "runs.jsonl"])[2].count("has several sweeps") == 1
    assert len(list(tmp_path.glob("*x1_*/config.json"))) == 6 and len(c.finished(tmp_path / "runs.jsonl")) == 9
    gone = MagicMock(**{"add.side_effect": torch.distributed.DistNetworkError("the store of rank 0 is gone")})
    assert c.sweep(c.Config(out=tmp_path), [], None, None, None, (gone, 1, 2), [15]), "a stopped rank ends all the same"


def residual_types():
    with patch.object(c.Block, "forward", autospec=True, side_effect=c.Block.forward) as forward:
        gradients("chinchilla", SCRIPTS["chinchilla"], dict(precision="bf16"))
    return {call.args[1].dtype for call in forward.call_args_list}


def test_single_run_doubles_its_batch_and_exports(ranks, tmp_path, monkeypatch):
    """Resumed, it ends at the tokens of its first start; it is evaluated on other text; on two ranks, with an fp32 residual stream."""
    flags = ["--preset", "demo", "--sweep=", "--batch_size", 4, "--second_batch", 8, "--val_batches", 1, "--log_every", 1, "--data", c.__file__]
    assert "warning: no effect in this mode: --sizes\n" in main([*flags, "--sizes", "8x1", "--tokens", 2048, "--out", tmp_path])[1]
    monkeypatch.setattr(c, "update_shards", None)  # from here on, none is due
    assert main([*flags, "--out", tmp_path, "--resume"])[0] == 0
    rows = c.read_table(tmp_path / "metrics.jsonl")
    assert [r["tokens"] for r in rows if "lr" in r] == [*range(128, 1025, 128), *range(1280, 2049, 256)]
    assert [r["lr"] for r in rows[1:3]] == approx([1e-7, 0.36 / 48])
    out = main([*flags, "--eval", "--out", tmp_path, "--data", c.Path(c.__file__).with_name("gpt1.py"), "--seq_len", 16])[1]
    assert out.count("val 12 | ") == 1 and c.read_table(tmp_path / "metrics.jsonl") == rows
    assert ranks.run(2, residual_types) == [{torch.float32}] * 2
    importorskip("safetensors")
    (_, out, _), _ = ranks.run(2, run_main, "chinchilla", [*flags, "--tokens", 2048, "--export", tmp_path / "hf"])
    assert re.search(r"val 12 (\| loss \S+)", out)[1] in main([*flags, "--eval", "--init", tmp_path / "hf"])[1]
