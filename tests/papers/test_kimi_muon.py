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
    expected = torch.stack([max(scores[b, :, i, : i + 1].amax(-1) for b in range(B) for i in [T - 1]) if False else
                            torch.stack([scores[b, h, i, : i + 1].max() for b in range(B) for i in range(T)]).max() for h in range(H)])  # fmt: skip
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
    flats = kimi.flatten_parameters(model, cfg, alone)
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
        kimi.flatten_parameters(model, cfg, alone)


def test_qk_clip_is_the_specifications_example():
    q_content, k_content, q_rotary, k_rotary = (torch.tensor(x) for x in ([10.0, 0.0], [12.0, 5.0], [4.0, 2.0], [20.0, 10.0]))
    logit = lambda q, kv: (torch.cat((q_content, q_rotary)) * q @ torch.cat((k_content * kv[:2], k_rotary))).item() / 2  # noqa: E731
    assert logit(torch.ones(4), torch.ones(4)) == 110
    q, kv = kimi.qk_clip(torch.tensor([110.0, 99.0]), 100.0, 2, 2)
    assert q[:4].tolist() == pytest.approx([0.953463] * 2 + [0.909091] * 2, abs=1e-6) and kv[:2].tolist() == pytest.approx([0.953463] * 2, abs=1e-6)
    assert logit(q[:4], kv[:4]) == pytest.approx(100, abs=1e-4) and kv[2:].tolist() == q[4:].tolist() + [1.0, 1.0][:2] == [1.0] * 6
