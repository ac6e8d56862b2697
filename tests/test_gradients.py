"""Every layout of every script gives the gradients of one plain backward pass over the batch."""
import importlib
import re
import socket

import deepseek_v3 as v3
import gpt1
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import gradients, make_corpora, make_model


def reference(name, overrides):
    """Loss and gradients without any of the script's training code: one batch, one mean. With them go balancing biases after an update."""
    module, row = importlib.import_module(name), SCRIPTS[name]
    cfg = module.Config(**{**row.tiny, **overrides})
    batch = module.get_batch(make_corpora(module, cfg)[0], 3, cfg.batch_size, cfg)
    if getattr(cfg, "document_mask", name == "gpt1"):  # the others fill every row
        assert 0 < batch["n_targets"] < batch["targets"].numel(), "some targets must not count"
    model = make_model(module, row, cfg)
    if hasattr(cfg, "n_experts") or name == "bert":  # their objective has more terms than this, each with a test of its own
        loss, metrics = module.objective(model, batch, cfg)
    else:
        inputs = [batch[key] for key in ("tokens", "source", "target_in", "source_mask") if key in batch]
        documents = {key: batch[key] for key in ("documents",) if key in batch}
        loss = F.cross_entropy(model(*inputs, **documents).flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    found = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    if name == "omni":
        return loss.item(), {key: g for key, g in found.items() if re.match(module.STAGES[cfg.stage].trained, key)}
    for key, router in [(key, part) for key, part in model.named_modules() if hasattr(part, "load")]:
        assert router.load.sum() == cfg.top_k * cfg.batch_size * (cfg.seq_len - key.startswith("mtp"))
        signs = torch.sign(router.load.mean() - router.load)
        if name == "kimi_muon":  # whose signs are centred
            signs -= signs.mean()
        found[f"{key}.bias"] = (router.bias + 0.01 * signs).numpy()
    if name == "deepseek_v3":  # without the term of balance, as it is logged
        loss = metrics["main"] + cfg.mtp_weight * metrics["mtp"]
    return loss.item(), found


@pytest.mark.parametrize("name, n, overrides", [(name, n, overrides) for name, row in SCRIPTS.items() for n, overrides in row.layouts])
def test_layout_gives_one_ranks_gradients(ranks, name, n, overrides):
    """|g - g0| <= 1e-5 max(max |g0| of the tensor, 1e-3 max |g0| of the model) for every parameter; loss and norm alike."""
    expected_loss, expected = reference(name, overrides)
    weights = {key: g for key, g in expected.items() if not key.endswith("router.bias")}
    largest = max(np.abs(g).max() for g in weights.values())
    whole = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in weights.values()))
    seen = set()
    for loss, found, norm in ranks.run(n, gradients, name, SCRIPTS[name], overrides):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm is None or norm == pytest.approx(whole, rel=1e-5)
        clip = 1 if norm is None else min(1, (overrides.get("clip", 1.0) or np.inf) / (whole + 1e-6))  # those with a norm are clipped
        for key, g in found.items():
            if key not in expected:  # a copy of the tied embedding, on a stage without it
                assert key == "head.weight" and overrides.get("tied", name == "gpt3")
                key = "token_embedding.weight"
            seen.add(key)
            if key not in weights:
                assert np.array_equal(g, expected[key]), key
                continue
            limit = 1e-5 * max(np.abs(expected[key]).max(), 1e-3 * largest)
            assert np.abs(g - clip * expected[key]).max() <= limit * clip, key
    assert seen == expected.keys()


def join():
    """One sum over the group that the script's start makes."""
    gpt1.init_distributed(30)
    return gpt1.sum_over_ranks(1)


def test_each_start_has_a_store_of_its_own(ranks):
    """The agents' store has the address of an earlier start, which refuses; the workers of this start find each other all the same."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.set("rank 0", f"127.0.0.1 {free.getsockname()[1]}")  # of a start that has ended
    assert ranks.run(2, join, MASTER_PORT=server.port, TORCHELASTIC_USE_AGENT_STORE=True, LOCAL_WORLD_SIZE=2) == [[2.0], [2.0]]
    assert set(server.list_keys()) <= {"rank 0", "init/"}, "nothing of a start is in the agents' store"


def held_bytes(name, row, overrides):
    """Bytes of parameters, gradients, optimizer and average that this rank holds after one update, and what was planned."""
    module = importlib.import_module(name)
    device = module.init_distributed(30)
    cfg = module.fit_ranks(module.Config(**{**row.tiny, **overrides}), module.dist.get_world_size())
    phase = module.phases(cfg)[0]
    pipeline = module.Pipeline(cfg, module.make_mesh(cfg, device.type))
    pipeline.add_average(cfg)
    module.init_weights(pipeline.model, cfg, pipeline.tp)
    optimizer = module.build_optimizer(pipeline.model, cfg)
    pipeline.start_phase(phase.cfg)
    batches = module.read_batch(make_corpora(module, cfg)[0], 0, phase.cfg, device, pipeline.data_rank, cfg.dp)
    module.sum_counts(batches, cfg.dp)
    module.clip_gradients(pipeline.model, pipeline.run(batches), cfg, pipeline.mesh)
    optimizer.step()
    parameters = list(pipeline.model.parameters())
    tensors = dict(
        parameters=parameters, gradients=[p.grad for p in parameters], average=pipeline.average.parameters(),
        optimizer=[optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")],
    )  # fmt: skip
    local = lambda tensor: 4 * (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()  # noqa: E731
    return {kind: sum(map(local, values)) for kind, values in tensors.items()}, module.memory_per_rank(phase.cfg)


@pytest.mark.parametrize("overrides", [dict(tp=2, pp=2), dict(dp=4), dict(pp=2, dp=2), dict(tp=2, cp=2, tied=True)])
def test_llama3_planned_bytes_are_those_of_a_real_layout(ranks, overrides):
    """Of parameters, gradients, optimizer and average, on the rank that holds most."""
    found = ranks.run(4, held_bytes, "llama3", SCRIPTS["llama3"], {"anneal_tokens": 96.0, **overrides})
    for kind in ("parameters", "gradients", "optimizer", "average"):
        assert max(held[kind] for held, _ in found) == pytest.approx(found[0][1][kind], rel=0.02), kind


def exchanged_in_fp8():
    """Rows to the other rank and back, in their precision and in E4M3 either way: what was sent and what arrives, then of the gradient."""
    v3.init_distributed(30)
    rank, found = v3.dist.get_rank(), []
    send, receive = ([1, 3], [1, 2]) if rank == 0 else ([2, 1], [3, 1])
    for there, back in ((v3.all_to_all, v3.all_to_all), (v3.all_to_all_fp8, v3.all_to_all), (v3.all_to_all, v3.all_to_all_fp8)):
        x = torch.randn(sum(send), 200, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = v3.Exchange.apply(x, send, receive, v3.dist.group.WORLD, there, back)
        gradient = torch.randn(sum(receive), 200, generator=torch.Generator().manual_seed(9 + rank))
        y.backward(gradient)
        found.append((x.detach(), y.detach(), gradient, x.grad))
    return found


def test_deepseek_v3_rows_travel_in_e4m3_where_they_should(ranks):
    """Rank 0 keeps one row and sends three, rank 1 sends two and keeps one; gradients go the other way."""
    exact = lambda x: x  # noqa: E731
    coded = lambda x: v3.dequantize(*v3.quantize(x, 1, 128, powers=True))[: len(x), :200]  # noqa: E731
    ways = (exact, exact), (coded, exact), (exact, coded)
    for (x0, y0, g0, d0), (x1, y1, g1, d1), (there, back) in zip(*ranks.run(2, exchanged_in_fp8), ways):
        assert torch.equal(y0, torch.cat((there(x0)[:1], there(x1)[:2]))) and torch.equal(y1, torch.cat((there(x0)[1:], there(x1)[2:])))
        assert torch.equal(d0, torch.cat((back(g0)[:1], back(g1)[:3]))) and torch.equal(d1, torch.cat((back(g0)[1:], back(g1)[3:])))
