"""Muon, MuonClip and the Kimi models: the specification's worked tests, in the order of the script."""
import dataclasses
import json
import math
import shutil
import types

import kimi_muon as kimi
import pytest
import torch
import torch.distributed as dist
from conftest import SCRIPTS
from ranks import make_corpora, make_model, run_main
from torch.utils._python_dispatch import TorchDispatchMode

ROW = SCRIPTS["kimi_muon"]


def config(**overrides):
    return kimi.Config(**{**ROW.tiny, **overrides})


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def alone():
    kimi.init_distributed(30)
    yield kimi.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    dist.destroy_process_group()


# Config, Data


def test_k2s_schedule_and_the_batches_of_both(monkeypatch):
    cfg = kimi.Config(**kimi.PRESETS["kimi_k2"])
    for step, rate in ((0, 0.0), (250, 1e-4), (500, 2e-4), (149_011, 2e-4)):
        assert kimi.learning_rate(step * 2**26, cfg) == pytest.approx(rate)
    for tokens, rate in ((12.75e12, 1.1e-4), (15.5e12, 2e-5), (15.96e12, 7e-6)):
        assert kimi.learning_rate(tokens, cfg) == pytest.approx(rate)
    (_, pre, now), (start, long, later) = kimi.phases_left(0, cfg)
    assert [now.batch_size * now.seq_len, later.batch_size * later.seq_len, later.seq_len] == [2**26, 2**26, 32768]
    assert pre == math.ceil(149_011.6 + 81_956.4 + 5_960.5) and long == pytest.approx(894.1, abs=1) and start == pre * 16384
    (_, ramp, first), (start, _, now) = kimi.phases_left(0, kimi.Config(**kimi.PRESETS["moonlight_16b_a3b"]))
    assert (ramp, first.batch_size, now.batch_size, start) == (math.ceil(200e9 / 2**24), 2048, 4096, 2048 * ramp)
    monkeypatch.setitem(kimi.SCHEDULES, "k2", ((5 / 80, "linear", 1.0), (50 / 80, "linear", 1.0), (1.0, "cosine", 0.1)))
    toy = [kimi.learning_rate(step, config(lr=1.0, tokens=80.0)) for step in (0, 1, 4, 5, 50, 51, 65, 79, 80)]
    assert toy == pytest.approx([0, 0.2, 0.8, 1, 1, 0.997535, 0.55, 0.102465, 0.1], abs=1e-6)


def test_phases_go_on_from_any_sequence():
    cfg = config(batch_size=4, seq_len=8, tokens=8.0 * 4 * 10, long_tokens=8.0 * 4 * 4, long_seq_len=16, ramp_tokens=32.0, first_batch=2)
    plan = lambda sequences: [(start, n, p.batch_size, p.seq_len) for start, n, p in kimi.phases_left(sequences, cfg)]  # noqa: E731
    assert plan(0) == [(0, 2, 2, 8), (4, 5, 4, 8), (24, 4, 2, 16)]
    assert plan(2) == [(0, 1, 2, 8), *plan(4)] and plan(12) == [(4, 3, 4, 8), (24, 4, 2, 16)]
    assert plan(30) == [(24, 1, 2, 16)] and plan(32) == []


# Model


def test_yarn_is_k2s():
    """Indices 0-19 of 32 stay, 20-31 are divided by 32; the scores are multiplied by 1.813260."""
    plain = 50000.0 ** (-torch.arange(32) / 32)
    factors = plain / kimi.yarn_beta_frequencies(64, 50000.0, 32.0, 4096, 1.0)
    assert factors.tolist() == pytest.approx([1.0] * 20 + [32.0] * 12)
    factors = plain / kimi.yarn_beta_frequencies(64, 50000.0, 64.0, 4096, 32.0)  # K2.5: a ramp from 8 to 20
    assert factors[[0, 8, 20, 31]].tolist() == pytest.approx([1.0, 1.0, 64.0, 64.0]) and 1 < factors[9] < factors[19] < 64
    for factor, square in ((32.0, 1.813260), (64.0, 2.004740)):
        attn = kimi.Block(config(rope_factor=factor, head_dim=128, rope_dim=64), dense=True).attn
        assert attn.scale * 192**0.5 == pytest.approx(square, rel=1e-6)


def test_largest_logits_by_blocks_are_those_of_the_square():
    B, H, T, E = 2, 3, 600, 4
    q, k = normal(B, H, T, E), normal(B, H, T, E, seed=1)
    k[:, 1, -1] = 100.0  # visible to the last query alone
    scores = 0.3 * q.double() @ k.double().mT
    expected = torch.stack([torch.stack([scores[b, h, i, : i + 1].max() for b in range(B) for i in range(T)]).max() for h in range(H)])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            x = function(*args, **(kwargs or {}))
            sizes.append(x.numel())
            return x

    with Sizes():
        found = kimi.largest_logits(q, k, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert max(sizes) <= B * H * 256 * T < B * H * T * T


def test_router_is_the_specifications_example():
    router = kimi.SigmoidRouter(4, 4, 2, 2.827)
    router.weight.data, router.bias = torch.eye(4), torch.tensor([0.0, 0.0, -0.5, 0.0])
    experts, gates, counts = router(torch.tensor([[0.0, 1.0, 2.0, -1.0]]))
    found = dict(zip(experts[0].tolist(), gates[0].tolist()))
    assert found == pytest.approx({1: 1.678801, 0: 1.148199}, abs=1e-6)
    assert counts.tolist() == [1, 1, 0, 0] == router.load.tolist()


@pytest.mark.parametrize("n, k, factor", [(64, 6, 2.446), (384, 8, 2.828)])
def test_gate_factor_keeps_the_norm(n, k, factor):
    """M Figure 6: the mean of 1 / |gates| over sigmoids of normal logits, before the factor."""
    router = kimi.SigmoidRouter(n, n, k, 1.0)
    router.weight.data = torch.eye(n)
    _, gates, _ = router(normal(20_000, n))
    assert (1 / gates.norm(dim=1)).mean().item() == pytest.approx(factor, abs=1e-2)
    assert kimi.PRESETS["moonlight_16b_a3b"]["route_scale"] == 2.446 and kimi.Config().route_scale == 2.827


# Optimizer


def test_newton_schulz_is_the_specifications():
    g = torch.zeros(3, 5)
    g[range(3), range(3)] = torch.tensor([3.0, 1.0, 0.1])
    expected = [1.134031, 1.133615, 0.752978]
    for x in (g, g.T, torch.stack((g, 7 * g))):
        o = kimi.newton_schulz(x, torch.float32)
        assert torch.linalg.svdvals(o)[..., :].flatten()[:3].tolist() == pytest.approx(expected, abs=2e-6) and o.shape == x.shape
    low = kimi.newton_schulz(g, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.diag().tolist() == pytest.approx([0.765625, 1.140625, 1.140625], abs=0.02)
    f = lambda s: 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5  # noqa: E731
    s = torch.linspace(0.01, 1.0, 200, dtype=torch.float64)
    for _ in range(5):
        s = f(s)
    assert 0.6818 <= s.min() and s.max() <= 1.1344
    w = normal(40, 24, dtype=torch.float64)  # the same map on every singular value
    u, sigma, v = torch.linalg.svd(w, full_matrices=False)
    sigma = sigma / (sigma.norm() + 1e-7)
    for _ in range(5):
        sigma = f(sigma)
    torch.testing.assert_close(kimi.newton_schulz(w, torch.float64), u * sigma @ v, atol=1e-9, rtol=0)


def plain_muon(parameters, lr=0.1, weight_decay=0.1):
    orthogonalize = lambda matrices: kimi.orthogonalize(matrices, torch.float32)  # noqa: E731
    return kimi.Muon(parameters, lr=lr, weight_decay=weight_decay, orthogonalize=orthogonalize)


def test_one_step_of_muon_and_the_size_of_its_updates():
    w = torch.nn.Parameter(torch.eye(2))
    w.grad = torch.diag(torch.tensor([3.0, 4.0]))
    plain_muon([w]).step()
    torch.testing.assert_close(w.data, torch.diag(torch.tensor([0.969554, 0.958344])), atol=1e-6, rtol=0)
    g = normal(64, 256)
    assert kimi.newton_schulz(g, torch.float32).square().mean().sqrt().item() == pytest.approx(0.0536, abs=2e-3)
    for shape in ((64, 256), (256, 64), (3, 48, 96)):
        (update,) = kimi.orthogonalize([normal(*shape)], torch.float32)
        assert 0.16 < update.square().mean().sqrt() < 0.21


def test_muon_is_torchs_where_the_definitions_coincide(monkeypatch):
    """torch's momentum is a mean, lerp(buffer, gradient, 0.05), which the norm makes up for; its Newton-Schulz is bf16."""
    ours = [torch.nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([(24, 40), (40, 24), (24, 40)])]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    batched = lambda matrices: kimi.orthogonalize(matrices, torch.bfloat16)  # noqa: E731
    mine = kimi.Muon(ours, lr=0.02, weight_decay=0.1, orthogonalize=batched)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    calls, inner = [], kimi.newton_schulz
    monkeypatch.setattr(kimi, "newton_schulz", lambda g, dtype: calls.append(tuple(g.shape)) or inner(g, dtype))
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = normal(*p.shape, seed=10 * step + i)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        mine.step()
        peer.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() < 0.05 * (p - old).norm()
            q.data.copy_(p.data)
    assert calls == [(2, 24, 40), (1, 40, 24)] * 4, "equal shapes in one call"


@pytest.mark.parametrize("split", [True, False])
def test_fused_matrices_are_split_by_function(split):
    """Against rows picked one by one: per head E content and R rotary rows of q, E of k and E of v."""
    cfg = config(split_fused=split)
    H, E, R, C = cfg.n_heads, cfg.head_dim, cfg.rope_dim, cfg.kv_rank
    rows = {
        "attn.q_up.weight": (H * (E + R), lambda i: i % (E + R) < E), "attn.kv_down.weight": (C + R, lambda i: i < C),
        "attn.kv_up.weight": (2 * H * E, lambda i: i % (2 * E) < E), "mlp.gate_up.weight": (30, lambda i: i < 15),
        "attn.out.weight": (17, lambda i: True),
    }  # fmt: skip
    for name, (n, is_first) in rows.items():
        g = normal(n, 12)
        views = kimi.split_by_function(f"blocks.0.{name}", g, cfg)
        found = [view.flatten(1, 2) for view in views]
        parts = {True: [i for i in range(n) if is_first(i) or not split], False: [i for i in range(n) if split and not is_first(i)]}
        expected = [g[part] for part in parts.values() if part]
        assert [x.tolist() for x in found] == [[x.tolist()] for x in expected], name
    experts = kimi.split_by_function("blocks.1.mlp.experts.gate_up", normal(5, 8, 12), cfg)
    assert [tuple(v.flatten(1, 2).shape) for v in experts] == ([(5, 4, 12)] * 2 if split else [(5, 8, 12)])


def test_every_parameter_has_one_optimizer(alone):
    cfg = config()
    model = make_model(kimi, ROW, cfg)
    flats = kimi.shard_parameters(model, cfg, alone)
    names = [name for flat in flats for name in flat.spans]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for flat in flats:
        for name in flat.spans:
            assert flat.optimizer == ("adamw" if "norm" in name or name.startswith(("token_embedding", "head")) else "muon"), name
    adamw, muon = kimi.build_optimizer(flats, cfg)
    assert sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(flats)
    assert {g["weight_decay"] for o in (adamw, muon) for g in o.param_groups} == {0.1}, "norms decay, too"
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no optimizer updates extra.weight"):
        kimi.shard_parameters(model, cfg, alone)


def test_qk_clip_is_the_specifications_example():
    q_content, k_content, q_rotary, k_rotary = (torch.tensor(x) for x in ([10.0, 0.0], [12.0, 5.0], [4.0, 2.0], [20.0, 10.0]))
    logit = lambda q, kv: (torch.cat((q_content, q_rotary)) * q @ torch.cat((k_content * kv[:2], k_rotary))).item() / 2  # noqa: E731
    assert logit(torch.ones(4), torch.ones(4)) == 110
    q, kv = kimi.qk_clip(torch.tensor([110.0, 99.0]), 100.0, 2, 2)
    assert q[:4].tolist() == pytest.approx([0.953463] * 2 + [0.909091] * 2, abs=1e-6) and kv[:2].tolist() == pytest.approx([0.953463] * 2, abs=1e-6)
    assert logit(q[:4], kv[:4]) == pytest.approx(100, abs=1e-4) and kv[2:].tolist() == [1.0] * 6 == q[4:].tolist() + [1.0, 1.0]


@pytest.mark.parametrize("overrides", [dict(), dict(q_rank=0, rope_factor=4.0), dict(kv_rank=0, n_dense=4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_the_clip_no_head_is_above_tau(alone, overrides, precision):
    """A step with learning rate 0: on the inputs that a layer had in it, its largest logits come out at tau, or stay as they were."""
    cfg = config(precision=precision, **overrides)
    model, tokens = kimi.Kimi(cfg), torch.randint(250, (8, 11), generator=torch.Generator().manual_seed(0))
    kimi.parallelize(model.to("meta"), cfg, alone)
    kimi.init_weights(model, cfg)
    for block in model.blocks:
        for p in block.attn.parameters():
            p.data *= 6.0 if p.ndim > 1 else 1.0
    flats = kimi.shard_parameters(model, cfg, alone)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = []
    handles = [block.attn.register_forward_pre_hook(lambda m, args: inputs.append((m, args))) for block in model.blocks]
    batches = [{"tokens": tokens[i : i + 4], "targets": tokens[i : i + 4], "n_targets": 88} for i in (0, 4)]
    for head in range(cfg.n_heads):
        model.blocks[1].attn.largest[head] = 0.0
    model.eval()
    largest = torch.zeros(len(model.blocks), cfg.n_heads)
    model.train()
    for batch in batches:
        with torch.no_grad():
            model(batch["tokens"])
    largest = torch.stack([block.attn.largest.clone() for block in model.blocks])
    tau = largest.median().item()
    inputs.clear()
    for block in model.blocks:
        block.attn.largest.zero_()
    _, _, found, _ = kimi.muon_clip_step(model, flats, kimi.build_optimizer(flats, cfg), batches, 0.0, 0.0, dataclasses.replace(cfg, tau=tau))
    torch.testing.assert_close(found, largest)
    [handle.remove() for handle in handles]
    with torch.no_grad():
        for module, args in inputs:
            module(*args)
    for block, before in zip(model.blocks, found):
        close = 1e-4 if precision == "fp32" else 2e-2
        torch.testing.assert_close(block.attn.largest, before.clamp(max=tau), rtol=close, atol=0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    assert {name.split(".")[3] for name in changed} == ({"q", "k"} if "kv_rank" in overrides else {"q_up", "kv_up"})
    for flat in flats:
        assert torch.equal(flat.weights[flat.own], flat.master.full_tensor().to(flat.weights.dtype)), "the copy is the master's"
        if cfg.kv_rank and "blocks.0.attn.kv_up.weight" in flat.spans:
            start, stop, shape = flat.spans["blocks.0.attn.kv_up.weight"]
            ratio = (flat.master.full_tensor()[start:stop].view(3, 20, 28) / kept["blocks.0.attn.kv_up.weight"].float().view(3, 20, 28)).mean((1, 2))
            assert torch.equal(model.blocks[0].attn.kv_up.weight.view(3, 20, 28)[:, 10:], kept["blocks.0.attn.kv_up.weight"].view(3, 20, 28)[:, 10:])
            assert (ratio < 0.999).any() == (found[0] > tau).any(), "values stay, keys do not"


def test_biases_move_by_centred_signs(alone):
    router = kimi.SigmoidRouter(8, 4, 1, 1.0)
    router.load += torch.tensor([4.0, 1.0, 1.0, 2.0])
    loads = kimi.update_centred_biases([router], 1e-3)
    assert router.bias.tolist() == pytest.approx([-1.25e-3, 7.5e-4, 7.5e-4, -2.5e-4], abs=1e-9) and not router.load.any()
    assert loads.tolist() == [[2.0, 0.5, 0.5, 1.0]]


def test_svd_entropy():
    assert kimi.svd_entropy(7 * torch.eye(5)).item() == pytest.approx(1.0)
    assert kimi.svd_entropy(torch.ones(4, 6)).item() == pytest.approx(0.0, abs=1e-5)
    p = torch.tensor([16.0, 9.0, 1.0]) / 26
    assert kimi.svd_entropy(torch.diag(torch.tensor([4.0, 3.0, 1.0]))).item() == pytest.approx(-(p * p.log()).sum().item() / math.log(3))


# Parallelism


def three_steps(layout, precision):
    """Parameters after three updates with made-up gradients, in full, and the bytes of masters and momenta of this rank."""
    kimi.init_distributed(30)
    cfg = config(precision=precision, **layout)
    mesh = kimi.init_device_mesh("cpu", (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    with torch.device("meta"):
        model = kimi.Kimi(cfg)
    kimi.parallelize(model, cfg, mesh)
    kimi.init_weights(model, cfg)
    flats = kimi.shard_parameters(model, cfg, mesh)
    optimizers = kimi.build_optimizer(flats, cfg)
    for step in range(3):
        for i, (name, p) in enumerate(model.named_parameters()):
            if kimi.is_expert(name):
                p.grad += normal(12, *p.shape[1:], seed=100 * step + i)[model.first_expert :][: len(p)] / cfg.dp
            else:
                p.grad += normal(*p.shape, seed=100 * step + i) / dist.get_world_size()
        for flat in flats:
            flat.reduce()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
        for flat in flats:
            flat.gather()
            flat.gradients.zero_()
    found = {name: (p.detach().float().numpy(), model.first_expert) for name, p in model.named_parameters()}
    states = [t for o in optimizers for state in o.state.values() for t in state.values()] + [flat.master for flat in flats]
    return found, sum(getattr(t, "to_local", lambda: t)().numel() * 4 for t in states)


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-6), ("bf16", 1e-2)])
def test_distributed_muon_is_one_ranks(ranks, precision, limit):
    ((expected, most),) = ranks.run(1, three_steps, dict(), precision)
    for n, layout in ((2, dict(dp=2)), (2, dict(ep=2)), (4, dict(dp=4)), (4, dict(ep=2, dp=2))):
        for found, n_bytes in ranks.run(n, three_steps, layout, precision):
            assert n_bytes < 1.02 * most / n, (n_bytes, most)
            for name, (p, first) in found.items():
                whole = expected[name][0]
                part = whole[first : first + len(p)] if kimi.is_expert(name) else whole
                assert abs(p - part).max() <= limit * max(1, abs(whole).max()), name


# Training


def rows(out, key="loss"):
    return [row[key] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if key in row]


def test_runs_clip_log_and_go_on(ranks, tmp_path):
    """Two phases with a small tau: what the log has, the layouts' losses, and a resume bit for bit, then with other ranks."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    sizes = "--dim=24 --hidden_dim=40 --n_layers=3 --expert_dim=16 --seq_len=16 --long_seq_len=32 --batch_size=8 --val_batches=1 --n_experts=8"
    flags = [*sizes.split(), "--tokens=768", "--long_tokens=256", "--tau=0.02", "--log_every=1", "--timeout=30", "--save_every=2", "--lr=0.01",
             "--bias_tokens=1e9", "--data", tmp_path / "text.txt"]  # fmt: skip
    status, out, err = run_main("kimi_muon", [*flags, "--out", tmp_path / "one"])
    assert status == 0 and "x 8 sequences of 16" in out and "x 4 sequences of 32" in out, err
    one = rows(tmp_path / "one")
    assert len(one) == 6 and max(rows(tmp_path / "one", "clipped")) > 0 and min(rows(tmp_path / "one", "max_logit")) > 0
    rms = rows(tmp_path / "one", "update_rms")[-1]
    assert {"blocks.0.attn.q_up.weight", "blocks.1.mlp.experts.down", "blocks.2.mlp.router.weight"} <= rms.keys() and "head.weight" not in rms
    assert all(0.1 < value < 0.25 for value in rms.values())
    assert len(rows(tmp_path / "one", "router_entropy")[-1]) == 2 and all(0 < x <= 1 for x in rows(tmp_path / "one", "router_entropy")[-1])
    for n, more in ((2, ["--ep=2"]), (2, ["--dp=2", "--micro_batch=1"]), (4, ["--ep=2"])):
        out = tmp_path / f"{n}{more[0]}"
        results = ranks.run(n, run_main, "kimi_muon", [*flags, *more, "--out", out], timeout=120)
        assert results[0][0] == 0 and rows(out) == pytest.approx(one, rel=1e-4), results[0]
        assert rows(out, "clipped") == rows(tmp_path / "one", "clipped")
    shutil.rmtree(tmp_path / "one" / "step_000000006")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    status, out, err = run_main("kimi_muon", [*flags, "--out", tmp_path / "one", "--resume"])
    assert status == 0 and "step 4/6" not in out and rows(tmp_path / "one")[-2:] == one[-2:], err
    results = ranks.run(2, run_main, "kimi_muon", [*flags, "--ep=1", "--out", tmp_path / "two", "--resume"], timeout=120)
    assert results[0][0] == 0 and rows(tmp_path / "two")[-2:] == pytest.approx(one[-2:], rel=1e-5), results[0]
    results = ranks.run(2, run_main, "kimi_muon", [*flags, "--ep=2", "--out", tmp_path / "two", "--resume"], timeout=120)
    assert results[0][0] == 2 and "ep 1" in results[0][2]
    for wrong, phrase in ((["--tau=0"], "--tau 0"), (["--tau=-1"], "--tau -1"), (["--top_k=9"], "--top_k 9"), (["--ep=3"], "ep 3")):
        status, _, err = run_main("kimi_muon", [*flags, *wrong])
        assert status == 2 and phrase in err
