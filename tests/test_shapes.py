"""Shapes, masks, parameter counts and schedules of every script, and the numbers of GPT-1's specification."""
import collections
import dataclasses
import importlib
import math
import re
from unittest.mock import MagicMock

import deepseek_v3 as v3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS, SHARED
from ranks import live_activations, make_corpora, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@CAUSAL
def test_logits_shape_and_who_sees_whom(script):
    """One row of logits a position, which moves with its own token and every earlier one, and with no other."""
    module, row = script
    cfg = module.Config(**row.tiny)
    model = make_model(module, row, cfg).eval()
    noise = 1e-5 if hasattr(module, "Experts") else 0  # of products whose rows are grouped by expert
    for T in (cfg.seq_len, cfg.seq_len if hasattr(model, "position_embedding") else 2 * cfg.seq_len):
        tokens = torch.randint(256, (2, T), generator=torch.Generator().manual_seed(0))
        logits = model(tokens)
        assert logits.shape == (2, T, cfg.vocab_size) and logits.dtype == torch.float32
        for j in range(T):
            changed = tokens.clone()
            changed[0, j] = (changed[0, j] + 1) % 256
            moved = ((model(changed) - logits).abs() > noise).any(-1)
            assert moved[0].tolist() == [i >= j for i in range(T)] and not moved[1].any()


def test_parameter_counts(script):
    """Every preset has exactly the parameters that its paper or specification says."""
    module, row = script
    assert row.counts.keys() == module.PRESETS.keys()
    for preset, count in row.counts.items():
        cfg = module.Config(**{"vocab_size": row.tiny["vocab_size"], **module.PRESETS[preset]})
        with torch.device("meta"):
            model = getattr(module, "build_model", getattr(module, row.model))(cfg)
        assert module.count_parameters(model)[0] == count, preset


def test_schedule(script):
    """The learning rate at named steps."""
    module, row = script
    overrides, rates = row.schedule
    cfg = module.Config(**overrides)
    for step, rate in rates.items():
        assert module.learning_rate(step, cfg) == pytest.approx(rate, rel=1e-5, abs=1e-9), step


@CAUSAL
def test_flops_are_those_of_the_matrix_products(script, monkeypatch):
    """PyTorch's counter sees what flops_per_token says, and the masked scores, which the kernel computes too."""
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    with torch.device("meta"):
        model = getattr(module, row.model)(cfg)
        tokens = torch.zeros(2, cfg.seq_len, dtype=torch.long)
    if hasattr(cfg, "n_experts"):  # whose grouped products have no fp32 on the meta device
        monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: x @ w[0])
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(module.flops_per_token(cfg) + row.masked_flops)


@pytest.mark.parametrize("name", ["gpt1", "gpt3", "chinchilla"])  # tests/papers has those of others
@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(recompute="block")])
def test_planned_activations_are_those_that_are_live(name, overrides, capsys):
    """What --dry_run says of them, for gpt1.py at the peak, for the others where the backward pass begins."""
    module, row = importlib.import_module(name), SCRIPTS[name]
    sizes = row.tiny | dict(vocab_size=1000, dim=48, n_layers=6, hidden_dim=160, seq_len=64, batch_size=64)
    sizes |= {key: value for key, value in (("head_dim", 16), ("dp", 1)) if hasattr(module.Config, key)}
    cfg = module.Config(**sizes | overrides)
    model = module.parallelize(make_model(module, row, cfg), cfg, MagicMock(size=lambda: 1, device_type="cpu"))
    tokens = torch.randint(99, (64, 64))
    batch = {"tokens": tokens, "targets": tokens, "n_targets": 4096, "n_sequences": 64}
    live, peak = live_activations(model, lambda: module.objective(model, batch, cfg)[0])
    if name == "gpt1":
        module.dry_run(cfg)
        planned = float(re.search(r"activations +([\d.]+) GiB", capsys.readouterr().out)[1]) * 2**30
        assert peak == pytest.approx(planned, rel=0.03)
        return
    if cfg.recompute == "block":  # the block that backward will recompute is not there yet
        one, two = (module.memory_per_rank(dataclasses.replace(cfg, recompute="none", n_layers=n)) for n in (1, 2))
        live += two["activations"] - one["activations"]
    assert live == pytest.approx(module.memory_per_rank(cfg)["activations"], rel=0.03)


@pytest.mark.parametrize("precision, recompute", [("fp32", "none"), ("bf16", "none"), ("fp8", "none"), ("bf16", "paper"), ("bf16", "block")])
def test_deepseek_v3_planned_activations_are_those_of_the_peak(precision, recompute):
    """Of one rank's pipeline, with an eighth for what its closed form leaves out."""
    sizes = dict(vocab_size=300, dim=128, hidden_dim=256, expert_dim=64, n_heads=4, q_rank=64, kv_rank=64, head_dim=32, rope_dim=16)
    sizes |= dict(precision=precision, recompute=recompute, seq_len=128, batch_size=8)
    cfg = v3.fit_layout(v3.Config(**SCRIPTS["deepseek_v3"].tiny | sizes), 1)
    v3.init_distributed(30)
    pipe = v3.Pipeline1F1B(cfg, torch.device("cpu"))
    v3.init_weights(pipe.model, cfg)
    pipe.share()
    pipe.start_phase(cfg)
    tokens = torch.randint(300, (8, 128))
    _, peak = live_activations(pipe.model, lambda: pipe.model(tokens, tokens).sum())
    torch.distributed.destroy_process_group()
    assert v3.memory_per_rank(cfg)["activations"] == pytest.approx(peak, rel=0.12)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    n = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n[function.name().split(".")[0]] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("how, attention, norms, products", [("none", 0, 0, 4), ("paper", 0, 6, 4), ("block", 2, 8, 6)])
def test_deepseek_v3_recomputes_what_it_should_and_counts_tokens_once(how, attention, norms, products):
    """Operators that run again in the backward pass; the experts' last product is not among the paper's."""
    row = SCRIPTS["deepseek_v3"]
    cfg = v3.Config(**{**row.tiny, "n_layers": 2, "mtp": False})
    model, tokens = make_model(v3, row, cfg), torch.arange(22).view(2, 11)
    v3.recompute_activations(model, how)
    loss = model(tokens, tokens).sum()
    Count.n.clear()
    with Count():
        loss.backward()
    names = "_scaled_dot_product_flash_attention_for_cpu", "rsqrt", "_grouped_mm"
    assert [Count.n[f"aten::{name}"] for name in names] == [attention, norms, products]
    assert sum(router.load.sum() for router in v3.routers(model).values()) == cfg.top_k * 22


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "omni"], indirect=True)  # which deals items: test_gradients.py
def test_ranks_and_micro_batches_share_out_the_same_sequences(script, monkeypatch):
    """However a global batch is cut, its parts are the sequences of the whole, in order, and their counts add up."""
    module, row = script
    cfg = module.Config(**row.tiny)
    corpus, _ = make_corpora(module, cfg)
    whole = module.get_batch(corpus, 16, 8, cfg)
    for ranks, cfg.micro_batch in [(1, 0), (1, 1), (2, 0), (2, 2), (4, 1), (8, 0)]:
        monkeypatch.setattr(module.dist, "get_world_size", lambda: ranks)
        parts = [part for rank in range(ranks) for part in module.read_batch(corpus, 16, cfg, torch.device("cpu"), rank, ranks)]
        for name, value in whole.items():
            if name.startswith("n_"):
                assert sum(part[name] for part in parts) == value
            else:
                assert torch.equal(torch.cat([part[name] for part in parts]), value)


@SHARED
def test_an_epoch_has_every_window_once(script):
    """In an order and at an offset of its own, across the borders of documents, and never beyond the corpus."""
    module, _ = script
    ids = np.arange(1000, dtype=np.uint16)  # every id says where it stands
    parts = [("a", ids[:300]), ("b", ids[300:305]), ("c", ids[305:])]
    corpus = module.Corpus(parts, 5, 990, -1, np.ones(1000, np.int64), in_order=False)
    n = corpus.n_windows(7)
    assert n == (985 - 1) // 7 - 1 and [corpus.read(294, k).tolist() for k in (2, 7)] == [[299, 300], [*range(299, 306)]]
    epochs = [[corpus.window(epoch * n + i, 7, seed=4).tolist() for i in range(n)] for epoch in range(4)]
    orders = [[window[0] for window in windows] for windows in epochs]
    offsets = [min(order) - 5 for order in orders]
    for windows, order, offset in zip(epochs, orders, offsets):
        assert all(window == list(range(window[0], window[0] + 8)) for window in windows)
        assert 0 <= offset < 7 and max(order) + 7 < 990
        assert sorted(order) == list(range(5 + offset, 5 + offset + 7 * n, 7)) != order
    assert len(set(offsets)) > 1
    assert len({tuple(start - min(order) for start in order) for order in orders}) == 4


# GPT-1


@SHARED
def test_gpt1_golden_value(script):
    """The specification's loss and logits, computed there with the reference implementation."""
    module, _ = script
    cfg = module.Config(vocab_size=96, seq_len=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0)
    model = module.GPT1(cfg)
    assert module.count_parameters(model)[0] == 108_160 and len(list(model.parameters())) == 26
    kinds = [f"{part}.{kind}" for part in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2") for kind in ("weight", "bias")]
    order = ["tokens_embed.weight", "positions_embed.weight", *(f"h.{i}.{kind}" for i in range(2) for kind in kinds)]
    for name, p in module.hf_tensors(model):  # in the reference's order and layout
        values = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + order.index(name))
        p.copy_(values.view(p.shape) + (".ln_" in name and name.endswith("weight")))
    tokens = (torch.arange(32) * 7 + 3).view(2, 16) % 96
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": 30}
    assert module.objective(model, batch, cfg)[0].item() == pytest.approx(9.240197, abs=2e-5)
    logits = model(tokens)
    assert logits[0, 0, :3].tolist() == pytest.approx([3.2696603, -3.0907639, -3.9977272], abs=2e-5)
    assert logits[1, 15, 95].item() == pytest.approx(-2.0817057, abs=2e-5)

    mlp, x = module.MLP(1, 1, 0.0).double(), torch.tensor([[-2.7], [-0.5], [0.3], [2.2]], dtype=torch.float64)
    for p, value in zip(mlp.parameters(), (1.0, 0.0, 1.0, 0.0)):  # GELU's tanh form, which erf's misses by up to 5e-4
        torch.nn.init.constant_(p, value)
    torch.testing.assert_close(mlp(x), 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), rtol=0, atol=1e-12)


@SHARED
def test_gpt1_preset_is_the_papers_table(script):
    """The paper's numbers, the parameters with the three tokens of fine-tuning, and ln V of a model that knows nothing."""
    module, row = script
    cfg = module.Config(**module.PRESETS["gpt1"])
    table = dict(vocab_size=40478, seq_len=512, dim=768, n_layers=12, n_heads=12, hidden_dim=3072, dropout=0.1,
                 batch_size=64, epochs=100, steps=0, lr=2.5e-4, warmup_steps=2000, weight_decay=0.01, clip=1.0)  # fmt: skip
    assert {name: getattr(cfg, name) for name in table} == table
    with torch.device("meta"):
        assert module.count_parameters(module.GPT1(module.Config(vocab_size=40481)))[0] == 116_537_088
    model = module.GPT1(module.Config(**{**row.tiny, "vocab_size": 40478}))
    torch.nn.init.zeros_(model.token_embedding.weight)  # of which the logits are multiples
    ones = torch.ones(1, 4, dtype=torch.long)
    assert module.objective(model, {"tokens": ones, "targets": ones, "n_targets": 4}, cfg)[0].item() == pytest.approx(10.6085, abs=1e-4)


@SHARED
def test_gpt1_every_token_is_a_target_once_an_epoch(script):
    """From its own document, be it of 160 tokens or of 2,000, at T = 512; separators are neither read nor predicted."""
    module, _ = script
    corpus = module.Corpus([("", np.array([5, 9, 2, 7, 4, 3, 1], np.uint16))], 0, 7, 0, np.ones(10, np.int64), True)
    batch = module.get_batch(corpus, 0, 1, module.Config(seq_len=3))
    assert (batch["tokens"].tolist(), batch["targets"].tolist()) == ([[5, 9, 2]], [[9, 2, 7]])
    cfg, ids = module.Config(seq_len=512), []
    for i in range(16):
        ids += [*range(3000 * i + 1, 3000 * i + (161 if i % 2 else 2001)), 0]
    corpus = module.Corpus([("", np.array(ids, np.uint16))], 0, len(ids), 0, np.ones(65_536, np.int64), False)
    seen = collections.Counter()
    for i in range(corpus.n_windows(512)):
        batch = module.get_batch(corpus, i, 1, cfg)
        tokens, targets = batch["tokens"][0], batch["targets"][0]
        scored = targets >= 0
        assert (targets[scored] == tokens[scored] + 1).all() and batch["n_targets"] == batch["n_bytes"] == scored.sum()
        assert tokens[:-10].all(), "separators are removed"
        seen.update(targets[scored].tolist())
    assert max(seen.values()) == 1 and len(seen) > 0.93 * (len(ids) - 32)
    assert len(seen.keys() & set(range(3001, 3161))) >= 159, "a short document is learned like a long one"


@SHARED
def test_gpt1_initialisation(script):
    """N(0, 0.02) for matrices, 1 and 0 for gains and biases; a parameter without a rule is an error."""
    module, row = script
    cfg = module.Config(**{**row.tiny, "dim": 96, "hidden_dim": 384})
    model = module.GPT1(cfg)
    module.init_weights(model, cfg)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=3 / p.numel() ** 0.5) and abs(p.mean().item()) < 0.1 / p.numel() ** 0.5, name
        else:
            assert p.unique().tolist() == [float("norm" in name and "weight" in name)], name
    model.blocks.add_module("stranger", torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="stranger"):
        module.init_weights(model, cfg)


@SHARED
def test_gpt1_adam(script):
    """p = 1, lr 1e-3, decay 0.01, gradients 0.5 and -0.25, as torch's AdamW has it; biases and gains do not decay."""
    module, row = script
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(model.weight)
    optimizer = module.build_optimizer(model, module.Config(lr=1e-3))
    for gradient, value in zip((0.5, -0.25), (0.99899, 0.9987136731)):
        model.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        assert model.weight.item() == pytest.approx(value, abs=1e-10)
    model = module.GPT1(module.Config(**row.tiny))
    decayed, others = module.build_optimizer(model, module.Config()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert set(others["params"]) == {p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@SHARED
def test_gpt1_dropout_falls_where_the_paper_has_it(script, monkeypatch):
    """On the embedding, on both branches and on the probabilities; nowhere in eval mode."""
    module, row = script
    cfg = module.Config(**{**row.tiny, "dropout": 0.5})
    model, calls, dropout, sdpa = make_model(module, row, cfg), [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append(("x", p * training)) or dropout(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **k: calls.append(("p", dropout_p)) or sdpa(*a, dropout_p=dropout_p, **k))
    for training, rate in ((True, 0.5), (False, 0.0)):
        calls.clear()
        model.train(training)(torch.zeros(2, 7, dtype=torch.long))
        assert calls == [("x", rate)] + 2 * [("p", rate), ("x", rate), ("x", rate)]
