"""Shapes, masks, counts, schedules, and the worked examples of the papers' specifications."""
import collections
import math
import re
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS, SHARED
from ranks import make_corpora, make_model
from torch.utils._python_dispatch import TorchDispatchMode


WINDOWS = pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "omni"], indirect=True)  # tests/papers/test_omni.py has items


def build(module, row, **overrides):
    cfg = module.Config(**{**row.tiny, **overrides})
    return make_model(module, row, cfg).eval(), cfg


@CAUSAL
def test_logits_shape_and_who_sees_whom(script):
    module, row = script
    model, cfg = build(module, row)
    noise = 1e-5 if hasattr(module, "Experts") else 0  # of products whose rows are grouped by expert
    most = cfg.seq_len if hasattr(module, "ModelParallel") or module.__name__ == "gpt1" else getattr(cfg, "context", 2 * cfg.seq_len)
    for T in (cfg.seq_len, most):
        tokens = torch.randint(256, (2, T), generator=torch.Generator().manual_seed(0))
        logits = model(tokens)
        assert logits.shape == (2, T, cfg.vocab_size) and logits.dtype == torch.float32
        for j in range(T):
            changed = tokens.clone()
            changed[0, j] = (changed[0, j] + 1) % 256
            moved = ((model(changed) - logits).abs() > noise).any(-1)
            assert moved[0].tolist() == [i >= j for i in range(T)]
            assert not moved[1].any()


def test_parameter_counts(script):
    module, row = script
    assert row.counts.keys() == module.PRESETS.keys(), "every preset has its count"
    for preset, count in row.counts.items():
        cfg = module.Config(**{"vocab_size": row.tiny["vocab_size"], **module.PRESETS[preset]})
        with torch.device("meta"):
            model = getattr(module, "build_model", getattr(module, row.model))(cfg)
        assert module.count_parameters(model)[0] == count, preset


def test_schedule(script):
    module, row = script
    overrides, rates = row.schedule
    cfg = module.Config(**overrides)
    for step, rate in rates.items():
        assert module.learning_rate(step, cfg) == pytest.approx(rate, rel=1e-5, abs=1e-9), step


@CAUSAL
def test_flops_are_those_of_the_matrix_products(script, monkeypatch):
    """The counter sees the full square of attention, flops_per_token half of it and the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    with torch.device("meta"):
        model = getattr(module, row.model)(cfg)
        tokens = torch.zeros(2, cfg.seq_len, dtype=torch.long)
    if hasattr(cfg, "n_experts"):  # whose grouped products have no fp32 on the meta device
        monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: x @ w[0])
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    unseen = 12 * cfg.n_layers * cfg.dim * (cfg.seq_len - (cfg.seq_len + 1) / 2)
    if hasattr(cfg, "band"):  # two dense layers, and two of 3 positions: 3 x 3, then two blocks of 3 x 6 pairs, of which 18 count
        unseen = 12 * cfg.dim * (2 * (7 - 4) + 2 * (9 + 36 - 18) / 7)
    if hasattr(cfg, "n_experts"):  # queries, keys and padded values are as wide as each other
        wide, seen = 2 * (cfg.head_dim + cfg.rope_dim), (2 * cfg.head_dim + cfg.rope_dim)
        unseen = 6 * cfg.n_layers * cfg.n_heads * (wide * cfg.seq_len - seen * (cfg.seq_len + 1) / 2)
        if module.__name__ == "kimi_muon":  # and the largest logits of a forward pass
            unseen += 2 * cfg.n_layers * cfg.n_heads * (cfg.head_dim + cfg.rope_dim) * cfg.seq_len
    if hasattr(module, "local_attention"):  # three windows of 3, of which the last two see two each, and one global layer
        unseen = 12 * cfg.n_heads * cfg.head_dim * (3 * (9 + 2 * 18 - 18) / 7 + 7 - 4)
    if module.__name__ == "chinchilla":  # three products of T x T, and that of distances, once for the two sequences
        width = cfg.n_heads * cfg.head_dim
        unseen = 18 * cfg.n_layers * width * (cfg.seq_len - (cfg.seq_len + 1) / 2) + 4 * cfg.n_layers * cfg.dim * width / 2
    # nothing needs the gradient of the first product's input but the embedding below it
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(module.flops_per_token(cfg) + unseen)


@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(recompute="block")])
def test_gpt1_planned_activations_are_those_of_the_peak(overrides, capsys):
    """What --dry_run prints against the bytes that are live at the peak of a forward and backward pass."""
    import types

    import gpt1
    from torch.distributed._tools.mem_tracker import MemTracker

    sizes = dict(vocab_size=1000, seq_len=64, dim=96, n_layers=3, n_heads=3, hidden_dim=320, dropout=0.0, batch_size=64)
    cfg = gpt1.Config(**{**sizes, "precision": "fp32", "warmup_steps": 0, **overrides})
    model = gpt1.GPT1(cfg)
    gpt1.init_weights(model, cfg)
    model = gpt1.parallelize(model, cfg, types.SimpleNamespace(size=lambda: 1))
    tokens = torch.randint(99, (64, 64), generator=torch.Generator().manual_seed(0))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        gpt1.objective(model, {"tokens": tokens, "targets": tokens, "n_targets": 4096}, cfg)[0].backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    live = sum(size for kind, size in peak.items() if "ACT" in str(kind) or "TEMP" in str(kind))
    gpt1.dry_run(cfg)
    planned = float(re.search(r"activations +([\d.]+) GiB", capsys.readouterr().out)[1]) * 2**30
    assert live == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("script", [name for name in CAUSAL.args[1] if name not in ("gpt1", "gemma", "deepseek_v3", "llama3", "kimi_muon")], indirect=True)
@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(recompute="block")])
def test_activation_bytes(script, overrides):
    """memory_per_rank against what autograd keeps, at a size where statistics and weights are small."""
    module, row = script
    sizes = {**row.tiny, "dim": 96, "hidden_dim": 320, "seq_len": 64, **overrides}
    sizes |= {"context": 64} if "context" in sizes else {}
    sizes |= {"head_dim": 32} if hasattr(module, "RelativeAttention") else {}
    sizes |= {"dp": 1} if module.__name__ == "gpt3" else {}
    cfg = module.Config(**sizes)
    model, kept = make_model(module, row, cfg), {}
    if module.__name__ == "chinchilla":  # whose blocks are recomputed from outside
        model = module.parallelize(model, cfg, types.SimpleNamespace(size=lambda: 1))
    elif module.__name__ == "gpt3":
        model = module.parallelize(model, cfg, MagicMock(device_type="cpu"))
    weights, least = {p.data_ptr() for p in model.parameters()}, cfg.dim * cfg.hidden_dim

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > least:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(257, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.objective(model, {"tokens": tokens, "targets": tokens, "n_targets": 512, "n_sequences": 8}, cfg)
    expected = module.memory_per_rank(cfg)["activations"]
    if cfg.recompute == "block":  # the block that backward will recompute is not there yet
        one, two = ({**sizes, "recompute": "none", "n_layers": n} for n in (1, 2))
        expected += module.memory_per_rank(module.Config(**one))["activations"]
        expected -= module.memory_per_rank(module.Config(**two))["activations"]
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.03)


class Count(TorchDispatchMode):
    """Numbers of the operators that run."""

    def __init__(self):
        super().__init__()
        self.n = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n[function.name().split("::")[1].split(".")[0]] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("how, attention, rsqrt, products", [("none", 0, 0, 4), ("paper", 0, 6, 4), ("block", 2, 8, 6)])
def test_deepseek_v3_recomputes_what_it_should_and_counts_tokens_once(how, attention, rsqrt, products):
    import deepseek_v3 as v3

    row = SCRIPTS["deepseek_v3"]
    cfg = v3.Config(**{**row.tiny, "n_layers": 2, "mtp": False})
    model, tokens = make_model(v3, row, cfg), torch.arange(22).view(2, 11)
    model(tokens, tokens).sum().backward()
    gradients, (router,) = [p.grad.clone() for p in model.parameters()], v3.routers(model)
    load = router.load.clone()
    model.zero_grad()
    router.load.zero_()
    v3.recompute_activations(model, how)
    loss = model(tokens, tokens).sum()
    with Count() as backward:
        loss.backward()
    found = [backward.n[name] for name in ("_scaled_dot_product_flash_attention_for_cpu", "rsqrt", "_grouped_mm")]
    assert found == [attention, rsqrt, products], "attention, norms, and the experts' last product"
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-4)
    assert torch.equal(router.load, load)


@pytest.mark.parametrize("precision, recompute", [("fp32", "none"), ("bf16", "none"), ("fp8", "none"), ("bf16", "paper"), ("bf16", "block")])
def test_deepseek_v3_planned_activations_are_those_of_the_peak(precision, recompute):
    import deepseek_v3 as v3
    from torch.distributed._tools.mem_tracker import MemTracker

    sizes = dict(vocab_size=300, dim=256, hidden_dim=512, expert_dim=128, n_heads=4, q_rank=128, kv_rank=128, head_dim=64, rope_dim=32)
    sizes |= dict(precision=precision, recompute=recompute, seq_len=128, batch_size=8)
    cfg = v3.fit_layout(v3.Config(**SCRIPTS["deepseek_v3"].tiny | sizes), 1)
    v3.init_distributed(30)
    pipe = v3.Pipeline1F1B(cfg, v3.expert_mesh(cfg, "cpu"))
    v3.init_weights(pipe.model, cfg)
    pipe.share()
    pipe.enter(cfg)
    tokens = torch.randint(300, (8, 128))
    tracker = MemTracker()
    tracker.track_external(pipe.model)
    with tracker:
        pipe.model(tokens, tokens).sum().backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    live = sum(size for kind, size in peak.items() if "ACT" in str(kind) or "TEMP" in str(kind))
    assert v3.memory_per_rank(cfg)["activations"] == pytest.approx(live, rel=0.12)
    torch.distributed.destroy_process_group()


# Data


@WINDOWS
def test_batches_depend_on_nothing_but_the_sequences(script):
    module, row = script
    cfg = module.Config(**row.tiny)
    corpus, _ = make_corpora(module, cfg)
    whole = module.get_batch(corpus, 5, 8, cfg)
    parts = [module.get_batch(corpus, 5 + i, n, cfg) for i, n in ((0, 3), (3, 1), (4, 4))]
    for name in whole:
        if name.startswith("n_"):
            assert whole[name] == sum(part[name] for part in parts)
        else:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [0, 1])
@WINDOWS
def test_ranks_and_accumulation_share_out_the_same_sequences(script, monkeypatch, ranks, micro_batch):
    module, row = script
    cfg = module.Config(**{**row.tiny, "micro_batch": micro_batch})
    corpus, _ = make_corpora(module, cfg)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: ranks)
    found = []
    for rank in range(ranks):
        found += module.read_batch(corpus, 16, cfg, torch.device("cpu"), rank, ranks)
    assert len(found) == (8 if micro_batch else ranks)
    whole = module.get_batch(corpus, 16, 8, cfg)
    for name in (name for name in whole if not name.startswith("n_")):
        assert torch.equal(torch.cat([batch[name] for batch in found]), whole[name])


@SHARED
def test_an_epoch_has_every_window_once(script):
    module, row = script
    length, ids = 7, np.arange(1000, dtype=np.uint16)  # every id says where it stands
    corpus = module.Corpus([("a", ids[:300]), ("b", ids[300:305]), ("c", ids[305:])], 5, 990, -1, np.ones(1000, np.int64), in_order=False)
    n, orders, phases = corpus.n_windows(length), [], set()
    assert n == (985 - 1) // 7 - 1
    for epoch in range(4):
        windows = [corpus.window(epoch * n + i, length, seed=4).tolist() for i in range(n)]
        assert all(w == list(range(w[0], w[0] + length + 1)) for w in windows)
        starts = [w[0] for w in windows]
        phase = min(starts) - 5
        assert 0 <= phase < 7 and sorted(starts) == list(range(5 + phase, 5 + phase + 7 * n, 7)) and max(starts) + 7 < 990
        orders.append(starts)
        phases.add(phase)
    assert len(phases) > 1 and all(order != sorted(order) for order in orders)
    assert [s - min(orders[0]) for s in orders[0]] != [s - min(orders[1]) for s in orders[1]]


@SHARED
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_shuffle_is_a_permutation(script, n):
    module, _ = script
    order = module.permutation(n, "key").tolist()
    assert sorted(order) == list(range(n))
    if n == 1000:
        assert abs(np.corrcoef(order, range(n))[0, 1]) < 0.1
        assert order != module.permutation(n, "other").tolist()


@SHARED
def test_held_out_documents_are_chosen_by_name(script):
    module, row = script
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])
    texts = {f"{i:03}": f"document {i:03} " + "x" * 50 for i in range(400)}

    def held_out(names):
        documents = module.tokenize(((name, texts[name]) for name in names), tokenizer, 256)
        train, held = module.load_corpora([], documents, tokenizer, 256, 257, 1, 7)
        first, second = (str(bytes(c.read(0, c.size).astype(np.uint8))) for c in (train, held))
        found = {name for name in names if f"document {name} " in second}
        assert all((f"document {name} " in first) != (name in found) for name in names)
        return found

    every = held_out(list(texts))
    assert 5 < len(every) < 45
    assert held_out([name for name in texts if name > "100"]) == {name for name in every if name > "100"}


# GPT-1


@pytest.fixture
def gpt1():
    import gpt1

    return gpt1, SCRIPTS["gpt1"]


def test_gpt1_golden_value(gpt1):
    """The specification's golden value, computed there with the reference implementation."""
    module, _ = gpt1
    cfg = module.Config(vocab_size=96, seq_len=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256, dropout=0.0)
    model = module.GPT1(cfg)
    assert module.count_parameters(model)[0] == 108_160
    for k, (name, p) in enumerate(module.hf_tensors(model)):  # in the reference's order and layout
        order = GOLDEN_ORDER(cfg).index(name)
        j = torch.arange(p.numel(), dtype=torch.float64)
        values = 0.1 * torch.sin(0.37 * j + order) + (".ln_" in name and name.endswith("weight"))
        p.copy_(values.view(p.shape))
    tokens = (torch.arange(32) * 7 + 3).view(2, 16) % 96
    logits = model(tokens)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": 30}
    assert module.objective(model, batch, cfg)[0].item() == pytest.approx(9.240197, abs=2e-5)
    assert logits[0, 0, :3].tolist() == pytest.approx([3.2696603, -3.0907639, -3.9977272], abs=2e-5)
    assert logits[1, 15, 95].item() == pytest.approx(-2.0817057, abs=2e-5)


def GOLDEN_ORDER(cfg):
    block = [f"{module}.{kind}" for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
             for kind in ("weight", "bias")]
    names = ["tokens_embed.weight", "positions_embed.weight"]
    return names + [f"h.{i}.{name}" for i in range(cfg.n_layers) for name in block]


def test_gpt1_gelu_is_the_tanh_form(gpt1):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which erf's form misses by up to 5e-4."""
    mlp = gpt1[0].MLP(1, 1, 0.0).double()
    for p, value in zip(mlp.parameters(), (1.0, 0.0, 1.0, 0.0)):
        torch.nn.init.constant_(p, value)
    for x in (-2.7, -0.5, 0.3, 2.2):
        expected = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert mlp(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)


def test_gpt1_preset_is_the_papers_table(gpt1):
    module, _ = gpt1
    cfg = module.Config(**module.PRESETS["gpt1"])
    table = dict(vocab_size=40478, seq_len=512, dim=768, n_layers=12, n_heads=12, hidden_dim=3072, dropout=0.1,
                 batch_size=64, epochs=100, steps=0, lr=2.5e-4, warmup_steps=2000, weight_decay=0.01, clip=1.0)  # fmt: skip
    assert {name: getattr(cfg, name) for name in table} == table
    with torch.device("meta"):
        tuned = module.GPT1(module.Config(vocab_size=40481))  # with the three tokens of fine-tuning
        tiny = module.GPT1(module.Config(vocab_size=96, seq_len=32, dim=64, n_layers=2, n_heads=4, hidden_dim=256))
    assert module.count_parameters(tuned)[0] == 116_537_088 and len(list(tiny.parameters())) == 26


def test_gpt1_vocabulary_needs_no_separator(gpt1):
    """A rank file of exactly V entries fits the paper's V, although documents end with a token V."""
    module, row = gpt1
    cfg = module.Config(**{**row.tiny, "vocab_size": 256})
    corpus, heldout = make_corpora(module, cfg)
    assert corpus.separator == 256 and (corpus.read(0, 200) == 256).any()
    for i in range(100):
        batch = module.get_batch(corpus, i, 1, cfg)
        assert batch["tokens"].max() < 256 and batch["targets"].max() < 256
    with pytest.raises(ValueError, match="255"):
        module.vocabulary_size(255, module.load_tokenizer("bytes", ["<|endoftext|>"]), "")


def make_corpus(module, ids, separator, in_order):
    return module.Corpus([("", np.array(ids, np.uint16))], 0, len(ids), separator, np.ones(1000, np.int64), in_order)


def test_gpt1_inputs_and_labels(gpt1):
    """ids [5, 9, 2, 7] -> inputs [5, 9, 2], labels [9, 2, 7]."""
    module, _ = gpt1
    corpus = make_corpus(module, [5, 9, 2, 7, 0, 0, 0], -1, True)
    batch = module.get_batch(corpus, 0, 1, module.Config(seq_len=3))
    assert batch["tokens"].tolist() == [[5, 9, 2]] and batch["targets"].tolist() == [[9, 2, 7]]


def test_gpt1_every_token_is_a_target_once_an_epoch(gpt1):
    """Documents of 160 tokens between ones of 2,000 at T = 512: all but the first token of a document and what lies outside
    of the epoch's grid is predicted once, from its own document; separators are neither read nor predicted."""
    module, _ = gpt1
    ids, numbers = [], iter(range(1, 60_000))
    for i in range(16):
        ids += [next(numbers) for _ in range(160 if i % 2 else 2000)] + [0]
    cfg = module.Config(seq_len=512)
    corpus = make_corpus(module, ids, 0, False)
    corpus.token_bytes = np.ones(65_536, np.int64)
    seen = []
    for i in range(corpus.n_windows(512)):
        batch = module.get_batch(corpus, i, 1, cfg)
        tokens, targets = batch["tokens"][0], batch["targets"][0]
        scored = targets >= 0
        assert (targets[scored] == tokens[scored] + 1).all() and batch["n_targets"] == batch["n_bytes"] == scored.sum()
        assert not (tokens[: len(ids)] == 0)[:-10].any(), "separators are removed"
        seen += targets[scored].tolist()
    assert len(seen) == len(set(seen)) > 0.93 * (len(ids) - 32)
    short = set(range(2001, 2161))
    assert len(short & set(seen)) >= 159, "a short document is learned like a long one"


def test_gpt1_zero_weights_know_nothing(gpt1):
    module, row = gpt1
    model = module.GPT1(module.Config(**{**row.tiny, "vocab_size": 40478}))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    batch = {"tokens": torch.ones(1, 4, dtype=torch.long), "targets": torch.ones(1, 4, dtype=torch.long), "n_targets": 4}
    assert module.objective(model, batch, module.Config())[0].item() == pytest.approx(10.6085, abs=1e-4)


def test_gpt1_initialisation(gpt1):
    module, row = gpt1
    cfg = module.Config(**{**row.tiny, "dim": 96, "hidden_dim": 384})
    model = module.GPT1(cfg)
    module.init_weights(model, cfg)
    matrices = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 2])
    assert matrices.std().item() == pytest.approx(0.02, rel=0.01) and abs(matrices.mean().item()) < 1e-4
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert p.unique().tolist() == [float("norm" in name and "weight" in name)], name
    model.blocks.add_module("stranger", torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="stranger"):
        module.init_weights(model, cfg)


def test_gpt1_adam(gpt1):
    """p = 1, lr 1e-3, decay 0.01, gradients 0.5 and -0.25, as torch's AdamW has it."""
    module, _ = gpt1
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(model.weight)
    optimizer = module.build_optimizer(model, module.Config(lr=1e-3))
    for gradient, value in zip((0.5, -0.25), (0.99899, 0.9987136731)):
        model.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        assert model.weight.item() == pytest.approx(value, abs=1e-10)


def test_gpt1_decays_matrices_and_embeddings_only(gpt1):
    module, row = gpt1
    model = module.GPT1(module.Config(**row.tiny))
    decayed, others = module.build_optimizer(model, module.Config()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in others["params"]} == {n for n in names.values() if n.endswith("bias") or "norm" in n}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_gpt1_dropout_falls_where_the_paper_has_it(gpt1):
    """Embeddings, both branches and the probabilities; none in eval mode."""
    module, row = gpt1
    cfg = module.Config(**{**row.tiny, "dropout": 0.5})
    model = make_model(module, row, cfg)
    tokens = torch.randint(256, (2, 7))
    calls = []
    dropout, sdpa = F.dropout, F.scaled_dot_product_attention
    try:
        F.dropout = lambda x, p, training: calls.append((p, training)) or dropout(x, p, training)
        F.scaled_dot_product_attention = lambda *a, dropout_p, **k: calls.append(dropout_p) or sdpa(*a, dropout_p=dropout_p, **k)
        model(tokens)
        assert calls == [(0.5, True)] + cfg.n_layers * [0.5, (0.5, True), (0.5, True)]
        calls.clear()
        model.eval()(tokens)
        assert calls == [(0.5, False)] + cfg.n_layers * [0.0, (0.5, False), (0.5, False)]
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, sdpa
