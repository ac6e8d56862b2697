"""Muon, MuonClip and the Kimi models: the specification's worked tests, in the order of the script."""
import json
import math

import kimi_muon as kimi
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SCRIPTS
from ranks import live_activations, run_main


def config(**overrides):
    return kimi.Config(**SCRIPTS["kimi_muon"].tiny | overrides)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(cfg, mesh):
    with torch.device("meta"):
        model = kimi.Kimi(cfg)
    kimi.parallelize(model, cfg, mesh)
    kimi.init_weights(model, cfg)
    return model


@pytest.fixture
def alone():
    kimi.init_distributed(30)
    yield kimi.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    dist.destroy_process_group()


def test_yarn_router_biases_and_entropy_are_the_specifications(alone):
    """K2's YaRN keeps indices 0-19 of 32, divides 20-31 by 32 and multiplies the scores by 1.813260; balancing biases move by centred signs."""
    factors = 50000.0 ** (-torch.arange(32) / 32) / kimi.yarn_beta_frequencies(64, 50000.0, 32.0, 4096, 1.0)
    assert factors.tolist() == pytest.approx([1.0] * 20 + [32.0] * 12)
    for factor, square in ((32.0, 1.813260), (64.0, 2.004740)):
        block = kimi.Block(config(rope_factor=factor, head_dim=128, rope_dim=64), dense=True)
        assert block.attn.scale * 192**0.5 == pytest.approx(square, rel=1e-6)
    router = kimi.SigmoidRouter(4, 4, 2, 2.827)
    router.weight.data, router.bias = torch.eye(4), torch.tensor([0.0, 0.0, -0.5, 0.0])
    experts, gates, counts = router(torch.tensor([[0.0, 1.0, 2.0, -1.0]]))
    assert dict(zip(experts[0].tolist(), gates[0].tolist())) == pytest.approx({1: 1.678801, 0: 1.148199}, abs=1e-6) and counts.tolist() == [1, 1, 0, 0]
    for n, k, factor in ((64, 6, 2.446), (384, 8, 2.828)):  # M Figure 6: the mean of 1 / |gates| of normal logits
        router = kimi.SigmoidRouter(n, n, k, 1.0)
        router.weight.data = torch.eye(n)
        assert (1 / router(normal(20_000, n))[1].norm(dim=1)).mean().item() == pytest.approx(factor, abs=1e-2)
    router = kimi.SigmoidRouter(8, 4, 1, 1.0)
    router.load += torch.tensor([4.0, 1.0, 1.0, 2.0])
    assert kimi.update_centred_biases([router], 1e-3).tolist() == [[2.0, 0.5, 0.5, 1.0]] and not router.load.any()
    assert router.bias.tolist() == pytest.approx([-1.25e-3, 7.5e-4, 7.5e-4, -2.5e-4], abs=1e-9)
    for w, entropy in ((7 * torch.eye(5), 1.0), (torch.ones(4, 6), 0.0), (torch.diag(torch.tensor([4.0, 3.0, 1.0])), 0.720282)):  # of 16, 9, 1 in 26
        assert kimi.svd_entropy(w).item() == pytest.approx(entropy, abs=1e-5)


def test_largest_logits_by_blocks_and_the_example_of_their_clip():
    """The largest logits are those of the square, which is never in memory."""
    q, k = normal(2, 3, 600, 4), normal(2, 3, 600, 4, seed=1)
    k[:, 1, -1] = 100.0  # visible to the last query alone
    scores = 0.3 * q.double() @ k.double().mT
    expected = torch.stack([torch.stack([scores[b, h, i, : i + 1].max() for b in range(2) for i in range(600)]).max() for h in range(3)])
    torch.testing.assert_close(kimi.largest_logits(q, k, 0.3).double(), expected, rtol=1e-5, atol=0)
    _, peak = live_activations(linear := torch.nn.Linear(1, 1), lambda: linear.weight.sum() + kimi.largest_logits(q, k, 0.3).sum())
    assert 4 * 6 * 128 * 600 < peak < 2 * 4 * 6 * 128 * 600 < 4 * 6 * 600**2
    logit = lambda q, kv: torch.tensor([10.0, 0, 4, 2]) * q @ (torch.tensor([12.0, 5, 20, 10]) * torch.cat((kv, torch.ones(2)))) / 2  # noqa: E731
    assert logit(torch.ones(4), torch.ones(2)) == 110
    q, kv = kimi.qk_clip(torch.tensor([110.0, 99.0]), 100.0, 2, 2)
    assert q[:4].tolist() == pytest.approx([0.953463] * 2 + [0.909091] * 2, abs=1e-6) and kv[:2].tolist() == pytest.approx([0.953463] * 2, abs=1e-6)
    assert logit(q[:4], kv[:2]).item() == pytest.approx(100, abs=1e-4) and kv[2:].tolist() == [1.0] * 6 == q[4:].tolist() + [1.0, 1.0]


def test_activated_parameters_schedules_and_batches_are_the_papers():
    for preset, activated in (("moonlight_16b_a3b", 2_914_774_528), ("kimi_k2", 32_861_477_888)):
        with torch.device("meta"):
            assert kimi.count_parameters(kimi.Kimi(kimi.Config(**kimi.PRESETS[preset])))[1] == activated
    cfg, B = kimi.Config(**kimi.PRESETS["kimi_k2"]), 2**26
    for tokens, rate in ((0, 0), (250 * B, 1e-4), (500 * B, 2e-4), (149_011 * B, 2e-4), (12.75e12, 1.1e-4), (15.5e12, 2e-5), (15.96e12, 7e-6)):
        assert kimi.learning_rate(tokens, cfg) == pytest.approx(rate)
    (_, pre, now), (start, long, later) = kimi.phases_left(0, cfg)
    assert [now.batch_size * now.seq_len, later.batch_size * later.seq_len, later.seq_len] == [B, B, 32768]
    assert pre == math.ceil(149_011.6 + 81_956.4 + 5_960.5) and long == pytest.approx(894.1, abs=1) and start == pre * 16384
    (_, ramp, first), (start, _, now) = kimi.phases_left(0, kimi.Config(**kimi.PRESETS["moonlight_16b_a3b"]))
    assert (ramp, first.batch_size, now.batch_size, start) == (math.ceil(200e9 / 2**24), 2048, 4096, 0), "the data goes on"
    cfg = config(batch_size=4, seq_len=8, tokens=8.0 * 4 * 10, long_tokens=8.0 * 4 * 4, long_seq_len=16, ramp_tokens=32.0, first_batch=2)
    plan = lambda sequences: [(start, n, p.batch_size, p.seq_len) for start, n, p in kimi.phases_left(sequences, cfg)]  # noqa: E731
    assert plan(0) == [(0, 2, 2, 8), (0, 5, 4, 8), (24, 4, 2, 16)] and plan(2) == [(0, 1, 2, 8), *plan(4)] and plan(12) == [(0, 3, 4, 8), *plan(24)]
    assert plan(30) == [(24, 1, 2, 16)] and plan(32) == [(24, 0, 2, 16)], "at its end a run is in its last phase"
    layouts = [kimi.choose_layout(kimi.Config(**kimi.PRESETS[preset]), 8) for preset in ("399m", "kimi_k2")]
    assert [(cfg.ep, cfg.dp) for cfg in layouts] == [(1, 8), (8, 1)], "no parts of experts where there are none"


def test_newton_schulz_and_muon_are_the_specifications_and_torchs(monkeypatch):
    """torch's momentum is a mean, lerp(buffer, gradient, 0.05), which the norm makes up for; its Newton-Schulz is bf16."""
    g = torch.zeros(3, 5)
    g[range(3), range(3)] = torch.tensor([3.0, 1.0, 0.1])
    for x in (g, g.T, torch.stack((g, 7 * g))):
        sigma = torch.linalg.svdvals(kimi.newton_schulz(x, torch.float32)).flatten()
        assert sigma.tolist() == pytest.approx([1.134031, 1.133615, 0.752978] * (len(sigma) // 3), abs=2e-6)
    sigma = torch.linalg.svdvals(kimi.newton_schulz(g, torch.bfloat16).float())
    assert sigma.tolist() == pytest.approx([1.140625, 1.140625, 0.765625], abs=2**-6), "bf16, with other roundings"
    w = torch.nn.Parameter(torch.eye(2))
    w.grad = torch.diag(torch.tensor([3.0, 4.0]))
    kimi.Muon([w], lr=0.1, weight_decay=0.1, orthogonalize=lambda matrices: kimi.orthogonalize(matrices, torch.float32)).step()
    torch.testing.assert_close(w.data, torch.diag(torch.tensor([0.969554, 0.958344])), atol=1e-6, rtol=0)
    assert kimi.newton_schulz(normal(64, 256), torch.float32).square().mean().sqrt().item() == pytest.approx(0.0536, abs=2e-3)
    updates = kimi.orthogonalize([normal(64, 256), normal(256, 64), normal(3, 48, 96)], torch.float32)
    assert all(0.16 < update.square().mean().sqrt() < 0.21 for update in updates)
    ours = [torch.nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([(24, 40), (40, 24), (24, 40)])]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = kimi.Muon(ours, lr=0.02, weight_decay=0.1, orthogonalize=lambda matrices: kimi.orthogonalize(matrices, torch.bfloat16))
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    calls, inner = [], kimi.newton_schulz
    monkeypatch.setattr(kimi, "newton_schulz", lambda g, dtype: calls.append(tuple(g.shape)) or inner(g, dtype))
    for step in range(4):
        before = [p.detach().clone() for p in ours]
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = normal(*p.shape, seed=10 * step + i)
        mine.step(), peer.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() < 0.05 * (p - old).norm()
            q.data.copy_(p.data)
    assert calls == [(2, 24, 40), (1, 40, 24)] * 4, "equal shapes in one call"


def test_every_parameter_has_one_optimizer_and_fused_matrices_are_split(alone):
    """Against rows picked one by one: per head E content and R rotary rows of q, E of k and E of v."""
    cfg, whole = config(), config(split_fused=False)
    H, E, R, C = cfg.n_heads, cfg.head_dim, cfg.rope_dim, cfg.kv_rank
    for name, n, is_first in (
        ("attn.q_up.weight", H * (E + R), lambda i: i % (E + R) < E), ("attn.kv_down.weight", C + R, lambda i: i < C),
        ("attn.kv_up.weight", 2 * H * E, lambda i: i % (2 * E) < E), ("mlp.gate_up.weight", 30, lambda i: i < 15),
    ):  # fmt: skip
        g = normal(n, 12)
        first, second = (view.flatten(1, 2)[0] for view in kimi.split_by_function(f"blocks.0.{name}", g, cfg))
        assert torch.equal(first, g[[i for i in range(n) if is_first(i)]]) and torch.equal(second, g[[i for i in range(n) if not is_first(i)]])
    for cut, shapes in ((cfg, [(5, 4, 12)] * 2), (whole, [(5, 8, 12)])):
        assert [tuple(v.flatten(1, 2).shape) for v in kimi.split_by_function("blocks.1.mlp.experts.gate_up", normal(5, 8, 12), cut)] == shapes
    model = build(cfg, alone)
    shards = kimi.shard_parameters(model, cfg, alone)
    expected = {name: "adamw" if p.ndim == 1 or name in ("token_embedding.weight", "head.weight") else "muon" for name, p in model.named_parameters()}
    assert {name: shard.optimizer for shard in shards for name in shard.spans} == expected
    groups = [group for optimizer in kimi.build_optimizer(shards, cfg) for group in optimizer.param_groups]
    assert [len(group["params"]) for group in groups] == [1, 2] and {group["weight_decay"] for group in groups} == {0.1}, "norms decay, too"
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no optimizer updates extra.weight"):
        kimi.shard_parameters(model, cfg, alone)


@pytest.mark.parametrize("overrides", [dict(), dict(q_rank=0, rope_factor=4.0), dict(kv_rank=0, n_dense=4)])
@pytest.mark.parametrize("precision, close", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_after_the_clip_no_head_is_above_tau(alone, overrides, precision, close):
    """A step with learning rate 0: on the inputs that a layer had in it, its largest logits come out at tau, or stay as they were."""
    cfg = config(precision=precision, **overrides)
    model = build(cfg, alone)
    [p.data.mul_(6.0) for block in model.blocks for p in block.attn.parameters() if p.ndim > 1]
    shards = kimi.shard_parameters(model, cfg, alone)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(250, (8, 11), generator=torch.Generator().manual_seed(0))
    batches = [{"tokens": tokens[i : i + 4], "targets": tokens[i : i + 4], "n_targets": 88} for i in (0, 4)]
    [model(batch["tokens"]) for batch in batches]
    largest = torch.stack([block.attn.largest.clone() for block in model.blocks])  # of both micro-batches
    inputs = []
    [block.attn.register_forward_pre_hook(lambda module, args: inputs.append((module, args))) for block in model.blocks]
    cfg.tau = largest.median().item()
    _, _, found, _ = kimi.muon_clip_step(model, shards, kimi.build_optimizer(shards, cfg), batches, 0.0, 0.0, cfg)
    torch.testing.assert_close(found, largest)
    [module(*args) for module, args in list(inputs)]
    for block, before in zip(model.blocks, found):
        torch.testing.assert_close(block.attn.largest, before.clamp(max=cfg.tau), rtol=close, atol=0)
    changed = {name.split(".")[3] for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    assert changed == ({"q", "k"} if "kv_rank" in overrides else {"q_up", "kv_up"})
    if cfg.kv_rank:  # values stay
        assert torch.equal(model.blocks[0].attn.kv_up.weight.view(3, 20, 28)[:, 10:], kept["blocks.0.attn.kv_up.weight"].view(3, 20, 28)[:, 10:])


def three_steps(layout, precision):
    """Parameters after three updates with made-up gradients and logits, and the bytes of momenta and moments of this rank, and of its plan."""
    kimi.init_distributed(30)
    cfg = config(precision=precision, hidden_dim=16, **layout)  # so that parts of ranks begin inside the queries' matrices
    mesh = kimi.init_device_mesh("cpu", (cfg.dp, cfg.ep), mesh_dim_names=("dp", "ep"))
    model = build(cfg, mesh)
    shards = kimi.shard_parameters(model, cfg, mesh)
    optimizers = kimi.build_optimizer(shards, cfg)
    [group.update(lr=0.1) for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(3):
        for i, (name, p) in enumerate(model.named_parameters()):
            n, first, ranks = (12, model.first_expert, cfg.dp) if kimi.is_expert(name) else (len(p), 0, dist.get_world_size())
            p.grad += normal(n, *p.shape[1:], seed=100 * step + i)[first : first + len(p)] / ranks
        [shard.reduce() for shard in shards]
        [optimizer.step() for optimizer in optimizers]
        kimi.clip_heads(model, shards, torch.linspace(0.5, 2.0, 12).view(4, 3), 1.0)
        [(shard.gather(), shard.gradients.zero_()) for shard in shards]
    found = {name: (p.detach().float().numpy(), model.first_expert) for name, p in model.named_parameters()}
    states = [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    return found, sum(getattr(t, "to_local", lambda: t)().numel() * 4 for t in states), kimi.memory_per_rank(cfg)["optimizer"]


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-6), ("bf16", 1e-2)])
def test_distributed_muon_is_one_ranks(ranks, precision, limit):
    ((expected, most, _),) = ranks.run(1, three_steps, dict(), precision)
    for n, layout in ((2, dict(dp=2)), (2, dict(ep=2)), (4, dict(dp=4)), (4, dict(ep=2, dp=2)), (2, dict(dp=2, optimizer="adamw"))):
        for found, n_bytes, planned in ranks.run(n, three_steps, layout, precision):
            assert n_bytes == pytest.approx(planned, rel=0.02)
            for name, (p, first) in found.items() if "optimizer" not in layout else ():
                part = expected[name][0][first : first + len(p)] if kimi.is_expert(name) else expected[name][0]
                assert np.linalg.norm(p - part) <= limit * np.linalg.norm(part) and n_bytes < 1.02 * most / n, name


def test_planned_activations_are_those_of_the_peak(alone):
    sizes = dict(vocab_size=300, dim=128, hidden_dim=256, expert_dim=64, n_heads=4, head_dim=32, rope_dim=32, seq_len=128, batch_size=8)
    for overrides in (dict(kv_rank=64), dict(kv_rank=64, precision="bf16"), dict(kv_rank=64, q_rank=0), dict(kv_rank=0, q_rank=0, n_dense=4)):
        cfg = config(**sizes | dict(q_rank=64) | overrides)
        model, tokens = build(cfg, alone), torch.randint(300, (8, 128))
        _, peak = live_activations(model, lambda: model(tokens, tokens))  # noqa: B023
        assert kimi.memory_per_rank(cfg)["activations"] == pytest.approx(peak, rel=0.12)


def test_runs_clip_log_and_go_on(ranks, tmp_path):
    """Two phases with a small tau: what the log has, the losses and the export of a layout, and a resume on other ranks."""
    pytest.importorskip("safetensors")
    rows = lambda out, key="loss": [row[key] for row in map(json.loads, (out / "metrics.jsonl").open()) if key in row]  # noqa: E731
    one, four, hf = (tmp_path / name for name in ("one", "four", "hf"))
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    sizes = "--dim=24 --hidden_dim=40 --n_layers=3 --expert_dim=16 --n_experts=8 --seq_len=16 --long_seq_len=32 --batch_size=8 --val_batches=1"
    more = "--tokens=768 --long_tokens=256 --tau=0.02 --log_every=1 --timeout=30 --save_every=2 --lr=0.01 --bias_tokens=1e9 --data"
    flags = [*f"{sizes} {more}".split(), tmp_path / "text.txt"]
    status, out, err = run_main("kimi_muon", [*flags, "--out", one])
    assert status == 0 and "x 8 sequences of 16" in out and "x 4 sequences of 32" in out, err
    losses, clipped, val = rows(one), rows(one, "clipped"), rows(one, "val_loss")[-1]
    assert len(losses) == 6 and max(clipped) > 0 and min(rows(one, "max_logit")) > 0
    rms, entropies = dict(rows(one, "update_rms")[-1]), rows(one, "router_entropy")[-1]
    assert {"blocks.0.attn.q_up.weight", "blocks.1.mlp.experts.down", "blocks.2.mlp.router.weight"} <= rms.keys() and "head.weight" not in rms
    assert all(0.1 < value < 0.25 for value in rms.values()) and len(entropies) == 2 and all(0 < x <= 1 for x in entropies)
    flags_of_four = [*flags, "--ep=2", "--micro_batch=1", "--out", four, "--export", hf]
    results = ranks.run(4, run_main, "kimi_muon", flags_of_four, timeout=120)
    assert results[0][0] == 0 and rows(four) == pytest.approx(losses, rel=1e-4) and rows(four, "clipped") == clipped, results[0]
    for start in (["--out", one], ["--init", hf, "--long_tokens=0", "--seq_len=32", "--batch_size=4"]):
        _, out, err = run_main("kimi_muon", [*flags, *start, "--eval"])
        assert float(out.split(" | loss ")[1].split()[0]) == pytest.approx(val, rel=1e-4), err
    (one / "step_000000006").rename(tmp_path / "gone")
    results = ranks.run(2, run_main, "kimi_muon", [*flags, "--ep=1", "--out", one, "--resume"], timeout=120)
    assert "step 4/6" not in results[0][1] and rows(one)[-2:] == pytest.approx(losses[-2:], rel=1e-5), results[0]
    (status, _, err), _ = ranks.run(2, run_main, "kimi_muon", [*flags, "--ep=2", "--out", one, "--resume"])
    assert status == 2 and "has --ep 1: --export DIR, then --init DIR" in err
    config = json.loads((hf / "config.json").read_text())
    for key, value in (("n_group", 8), ("rope_type", "linear"), ("v_head_dim", 9)):
        (hf / "config.json").write_text(json.dumps(config | {"rope_parameters": {}, key: value}))
        with pytest.raises(ValueError, match=f"config.json has {key} "):
            kimi.from_hf(hf)
