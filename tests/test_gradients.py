"""Every layout of every script gives the gradients of one plain backward pass over the batch."""
import importlib
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS
from ranks import gradients, make_corpora, make_model

CASES = [(name, n, overrides) for name, row in SCRIPTS.items() for n, overrides in row.layouts]


def reference(name, overrides):
    """Loss and gradients without any of the script's training code: one batch, one mean."""
    module, row = importlib.import_module(name), SCRIPTS[name]
    cfg = module.Config(**{**row.tiny, **overrides})
    batch = module.get_batch(make_corpora(module, cfg)[0], 3, cfg.batch_size, cfg)
    if getattr(cfg, "document_mask", name == "gpt1"):  # the others fill every row
        assert 0 < batch["n_targets"] < batch["targets"].numel(), "some targets must not count"
    model = make_model(module, row, cfg)
    if name == "deepseek_v3":  # its terms are tested one by one in test_loss.py
        loss, metrics = module.objective(model, batch, cfg)
        loss.backward()
        found = {key: p.grad.numpy() for key, p in model.named_parameters()}
        for key, router in ((key, m) for key, m in model.named_modules() if isinstance(m, module.Router)):
            positions = batch["tokens"].shape[0] * (batch["tokens"].shape[1] - key.startswith("mtp"))
            assert router.load.sum() == cfg.top_k * positions
            found[key + ".bias"] = (router.bias + 0.01 * torch.sign(router.load.mean() - router.load)).numpy()
        return (metrics["main"] + cfg.mtp_weight * metrics["mtp"]).item(), found
    if name == "omni":
        loss, _ = module.objective(model, batch, cfg)
        loss.backward()
        trained = module.re.compile(module.STAGES[cfg.stage].trained)
        return loss.item(), {key: p.grad.numpy() for key, p in model.named_parameters() if trained.match(key)}
    if name == "kimi_muon":
        loss, _ = module.objective(model, batch, cfg)
        loss.backward()
        found = {key: p.grad.numpy() for key, p in model.named_parameters()}
        for key, router in ((key, m) for key, m in model.named_modules() if isinstance(m, module.SigmoidRouter)):
            assert router.load.sum() == cfg.top_k * batch["tokens"].numel()
            signs = torch.sign(router.load.mean() - router.load)
            found[key + ".bias"] = (router.bias + 0.01 * (signs - signs.mean())).numpy()
        return loss.item(), found
    documents = {key: batch[key] for key in ("documents",) if key in batch}
    loss = F.cross_entropy(model(batch["tokens"], **documents).flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name, n, overrides", CASES)
def test_layout_gives_one_ranks_gradients(ranks, name, n, overrides):
    expected_loss, expected = reference(name, overrides)
    largest, seen = max(np.abs(g).max() for g in expected.values()), set()
    whole = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for key, g in expected.items() if "router.bias" not in key))
    for loss, found, norm in ranks.run(n, gradients, name, SCRIPTS[name], overrides):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm is None or norm == pytest.approx(whole, rel=1e-5)
        seen |= found.keys()
        for key, g in found.items():
            if key not in expected:  # a copy of the tied embedding, on a stage without it
                assert key == "head.weight" and overrides.get("tied", name == "gpt3")
                key = "token_embedding.weight"
                seen.remove("head.weight")
            if key.endswith("router.bias"):
                assert np.array_equal(g, expected[key]), key
                continue
            limit = 1e-5 * max(np.abs(expected[key]).max(), 1e-3 * largest)
            scale = min(1, 1 / (whole + 1e-6)) if norm is not None else 1  # these are clipped to 1
            assert np.abs(g - scale * expected[key]).max() <= limit * scale, key
    assert seen == expected.keys()


def join(name):
    """One sum over the group that the script's start makes."""
    module = importlib.import_module(name)
    module.init_distributed(30)
    return module.sum_over_ranks(1)


def test_each_start_has_a_store_of_its_own(ranks):
    """Workers that torchrun restarts share the agents' store with the dead ones, whose addresses are there: another rank 0,
    on a port of its own, is found behind the address of the first, which refuses."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.set("rank 0", f"127.0.0.1 {free.getsockname()[1]}")  # of a start that has ended
    for _ in range(2):
        environment = {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": 2}
        assert ranks.run(2, join, "gpt1", **environment) == [[2.0], [2.0]]
    assert set(server.list_keys()) <= {"rank 0", "init/"}, "nothing of a start is in the agents' store"


@CAUSAL
def test_gradient_of_the_logits_is_p_minus_y(script):
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    batch = module.get_batch(make_corpora(module, cfg)[0], 0, 4, cfg)
    logits = torch.randn(*batch["tokens"].shape, cfg.vocab_size, requires_grad=True)
    model = lambda *inputs: logits  # noqa: E731
    if hasattr(module, "chunked_loss"):
        model = lambda _, targets, documents=None: module.chunked_loss(lambda x: x, logits.flatten(0, 1), targets, cfg.vocab_size)  # noqa: E731
        if module.__name__ == "deepseek_v3":  # whose model returns two more sums
            nats = model
            model = lambda *inputs: F.pad(nats(*inputs)[None], (0, 2))  # noqa: E731
    else:
        model.tp, model.modules = None, list
    loss, _ = module.objective(model, batch, cfg)
    loss.backward()
    counted = (batch["targets"] >= 0)[..., None]
    y = F.one_hot(batch["targets"].clamp(min=0), cfg.vocab_size)
    expected = (logits.detach().double().softmax(-1) - y) * counted / counted.sum()
    torch.testing.assert_close(logits.grad.double(), expected, atol=1e-8, rtol=1e-5)


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
    pipeline.enter(phase.cfg)
    place = pipeline.data_rank, cfg.dp
    batches = module.read_batch(make_corpora(module, cfg)[0], 0, phase.cfg, device, *place)
    module.sum_counts(batches, cfg.dp)
    module.clip_gradients(pipeline.model, pipeline.run(batches), cfg, pipeline.mesh)
    optimizer.step()
    local = lambda tensor: 4 * (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()  # noqa: E731
    parameters = list(pipeline.model.parameters())
    held = dict(
        parameters=sum(map(local, parameters)), gradients=sum(local(p.grad) for p in parameters),
        optimizer=sum(local(optimizer.state[p][key]) for p in parameters for key in ("exp_avg", "exp_avg_sq")),
        average=sum(map(local, pipeline.average.parameters())),
    )  # fmt: skip
    return held, module.memory_per_rank(phase.cfg)


@pytest.mark.parametrize("overrides", [dict(tp=2, pp=2), dict(dp=4), dict(pp=2, dp=2), dict(tp=2, cp=2, tied=True)])
def test_llama3_planned_bytes_are_those_of_a_real_layout(ranks, overrides):
    found = ranks.run(4, held_bytes, "llama3", SCRIPTS["llama3"], {"anneal_tokens": 96.0, **overrides})
    for kind in ("parameters", "gradients", "optimizer", "average"):
        assert max(held[kind] for held, _ in found) == pytest.approx(found[0][1][kind], rel=0.02), kind


def in_place_of_each_other(name):
    """Megatron's f and g, and the gather of keys and values, against what they are made of."""
    module = importlib.import_module(name)
    module.init_distributed(30)
    rank, group = module.dist.get_rank(), module.dist.group.WORLD
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    y = module.SumGradient.apply(x, group)
    (y * (rank + 1)).sum().backward()
    z = module.SumOutput.apply(x.detach() * (rank + 1), group)
    kv = torch.full((2, 1, 1, 2, 1), float(rank), requires_grad=True)
    every = module.GatherSequence.apply(kv, group)
    (every * torch.arange(4.0).view(1, 1, 1, 4, 1) * (rank + 1)).sum().backward()
    return (y.tolist(), x.grad.unique().tolist(), z.tolist(), every[0].flatten().tolist(), kv.grad[0].flatten().tolist())


def test_llama3_collectives_and_their_gradients(ranks):
    x = torch.arange(6.0).view(2, 3)
    for rank, (y, gradient, z, every, own) in enumerate(ranks.run(2, in_place_of_each_other, "llama3")):
        assert y == x.tolist() and gradient == [3.0] and z == (3 * x).tolist()
        assert every == [0.0, 0.0, 1.0, 1.0] and own == [[0.0, 3.0], [6.0, 9.0]][rank]


def exchanged_in_fp8(name):
    """Rows to the other rank and back, in their precision and in E4M3 either way: what arrives, and what the gradient is."""
    v3 = importlib.import_module(name)
    v3.init_distributed(30)
    rank, group, found = v3.dist.get_rank(), v3.dist.group.WORLD, []
    send, receive = ([1, 3], [1, 2]) if rank == 0 else ([2, 1], [3, 1])
    for there, back in ((v3.all_to_all, v3.all_to_all), (v3.all_to_all_fp8, v3.all_to_all), (v3.all_to_all, v3.all_to_all_fp8)):
        x = torch.randn(sum(send), 200, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = v3.Exchange.apply(x, send, receive, group, there, back)
        gradient = torch.randn(sum(receive), 200, generator=torch.Generator().manual_seed(9 + rank))
        y.backward(gradient)
        found.append((x.detach(), y.detach(), gradient, x.grad))
    return found


def test_deepseek_v3_rows_travel_in_e4m3_where_they_should(ranks):
    import deepseek_v3 as v3

    first, second = ranks.run(2, exchanged_in_fp8, "deepseek_v3")
    coded = lambda x: v3.dequantize(*v3.quantize(x, 1, 128, powers=True))[: len(x), :200]  # noqa: E731
    for (x0, y0, g0, d0), (x1, y1, g1, d1), out, back in zip(first, second, (False, True, False), (False, False, True)):
        code, code_back = (coded if on else lambda x: x for on in (out, back))
        assert torch.equal(y0, torch.cat((code(x0)[:1], code(x1)[:2]))) and torch.equal(y1, torch.cat((code(x0)[1:], code(x1)[2:])))
        assert torch.equal(d0, torch.cat((code_back(g0)[:1], code_back(g1)[:3])))
        assert torch.equal(d1, torch.cat((code_back(g0)[1:], code_back(g1)[3:])))
