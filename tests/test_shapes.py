"""Shapes, masks, counts, schedules, and the worked examples of the papers' specifications."""
import itertools
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


WINDOWS = pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "omni"], indirect=True)  # tests/papers/test_omni.py has items


def build(module, row, **overrides):
    cfg = module.Config(**{**row.tiny, **overrides})
    return make_model(module, row, cfg).eval(), cfg


@CAUSAL
def test_logits_shape_and_who_sees_whom(script):
    module, row = script
    model, cfg = build(module, row)
    noise = 1e-5 if hasattr(module, "MoE") else 0  # of products whose rows are grouped by expert
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
def test_flops_are_those_of_the_matrix_products(script):
    """The counter sees the full square of attention, flops_per_token half of it and the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    with torch.device("meta"):
        model = getattr(module, row.model)(cfg)
        tokens = torch.zeros(2, cfg.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    unseen = 12 * cfg.n_layers * cfg.dim * (cfg.seq_len - (cfg.seq_len + 1) / 2)
    if hasattr(cfg, "band"):  # two of the four layers see at most three positions
        causal, banded = (sum(min(i + 1, most) for i in range(7)) / 7 for most in (7, 3))
        unseen = 12 * cfg.dim * (4 * cfg.seq_len - 2 * causal - 2 * banded)
    if hasattr(module, "MoE"):  # queries, keys and padded values are as wide as each other
        wide, seen = 2 * (cfg.head_dim + cfg.rope_dim), (2 * cfg.head_dim + cfg.rope_dim)
        unseen = 6 * cfg.n_layers * cfg.n_heads * (wide * cfg.seq_len - seen * (cfg.seq_len + 1) / 2)
        unseen += 6 * (cfg.n_layers - cfg.n_dense) * cfg.top_k * cfg.dim  # weights of the experts: no product of matrices
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


@pytest.mark.parametrize("script", [name for name in CAUSAL.args[1] if name not in ("gpt1", "gemma")], indirect=True)
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
    for name, p in model.named_parameters() if hasattr(module, "keeps_bf16") else ():
        p.data = p.data.bfloat16() if module.keeps_bf16(name, cfg) else p.data
    weights, least = {p.data_ptr() for p in model.parameters()}, 0 if hasattr(module, "Alive") else cfg.dim * cfg.hidden_dim

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > least:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(257, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.objective(model, {"tokens": tokens, "targets": tokens, "n_targets": 512, "n_sequences": 8}, cfg)
    expected = module.memory_per_rank(cfg)["activations"]
    if cfg.recompute == "block" and least:  # the block that backward will recompute is not there yet
        one, two = ({**sizes, "recompute": "none", "n_layers": n} for n in (1, 2))
        expected += module.memory_per_rank(module.Config(**one))["activations"]
        expected -= module.memory_per_rank(module.Config(**two))["activations"]
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.03)


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
    cfg = module.Config(**{**row.tiny, "batch_size": 1})
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


# GPT-3


@pytest.fixture
def gpt3():
    import gpt3

    return gpt3, SCRIPTS["gpt3"]


def test_gpt3_banded_mask(gpt3):
    """The specification's example, T = 8 and band = 3, and its counts of attended pairs at T = 2,048."""
    module, _ = gpt3
    expected = ["1.......", "11......", "111.....", ".111....", "..111...", "...111..", "....111.", ".....111"]
    mask = module.banded_mask(8, 3, torch.device("cpu"))
    assert ["".join(".1"[int(seen)] for seen in row) for row in mask] == expected
    for band, pairs in ((128, 254_016), (256, 491_648), (2048, 2_098_176)):
        assert module.banded_mask(2048, band, torch.device("cpu")).sum() == pairs


@pytest.mark.parametrize("banded, first", [("odd", 1), ("even", 0)])
def test_gpt3_banded_layers_reach_back_only_so_far(gpt3, banded, first):
    """Through two banded layers a position depends on those less than 2 (band - 1) before it, and all of them; one dense
    layer among them, and it depends on all."""
    module, row = gpt3
    cfg = module.Config(**{**row.tiny, "seq_len": 12, "banded": banded})
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    for layers, reach in (((first, first + 2), 2 * (cfg.band - 1)), ((first, 1 - first), 12)):
        torch.manual_seed(0)
        model = module.GPT3(cfg, layers)
        for j in range(12):
            changed = tokens.clone()
            changed[0, j] = (changed[0, j] + 1) % 256
            moved = (model(changed) != model(tokens)).any(-1)[0]
            assert moved.tolist() == [0 <= i - j <= reach for i in range(12)]


def test_gpt3_block_mask_is_the_dense_one(gpt3, monkeypatch):
    """The mask of the kernel that skips blocks, which trains on GPUs only: built and run forward here, uncompiled."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    module, _ = gpt3
    monkeypatch.setattr(module, "flex_kernels", lambda: (flex_attention, lambda *args, device: create_block_mask(*args, device="cpu")))
    mask = module.banded_mask.__wrapped__(512, 70, torch.device("cuda"))
    assert isinstance(mask, BlockMask) and mask.sparsity() > 30
    q, k, v = torch.randn(3, 2, 4, 512, 16, generator=torch.Generator().manual_seed(0))
    dense = module.attend(q, k, v, module.banded_mask(512, 70, torch.device("cpu")))
    torch.testing.assert_close(module.attend(q, k, v, mask), dense, atol=1e-5, rtol=1e-5)


def test_gpt3_ramp_and_steps(gpt3):
    """The specification's vectors: whole sequences, linear in tokens."""
    module, _ = gpt3
    for preset, tokens, ramp, steps, flat in (("175b", 40_960, 17_718, 109_271, 95_368), ("125m", 36_864, 22_806, 587_382, 572_205)):
        cfg = module.Config(**{**module.PRESETS[preset], "batch_multiple": 1})
        seen = 0
        for step in range(1000):
            assert seen == 0 or module.batch_at(seen, cfg) >= before
            before = module.batch_at(seen, cfg)
            seen += before * 2048
        assert module.batch_at(seen, cfg) * 2048 == tokens
        assert module.count_steps(cfg) == (ramp, steps)
        cfg.first_batch = 0
        assert module.count_steps(cfg) == (0, flat)
    cfg = module.Config(first_batch=16, batch_size=1536, ramp_tokens=12e9, batch_multiple=16)
    sizes = [module.batch_at(tokens, cfg) for tokens in (0, 6e9, 12e9 - 1, 12e9, 1e12)]
    assert sizes == [16, 768, 1520, 1536, 1536]


def test_gpt3_presets_are_the_papers_tables(gpt3):
    module, _ = gpt3
    table = {  # layers, width, heads, batch in tokens, rate, ramp: Table 2.1, misprints settled by Table D.1
        "125m": (12, 768, 12, 0.5, 6e-4, 4), "350m": (24, 1024, 16, 0.5, 3e-4, 4), "760m": (24, 1536, 16, 0.5, 2.5e-4, 4),
        "1.3b": (24, 2048, 16, 1, 2e-4, 6), "2.7b": (32, 2560, 32, 1, 1.6e-4, 6), "6.7b": (32, 4096, 32, 2, 1.2e-4, 8),
        "13b": (40, 5120, 40, 2, 1e-4, 8), "175b": (96, 12288, 96, 3, 0.6e-4, 12),
    }  # fmt: skip
    for name, (layers, dim, heads, batch, lr, ramp) in table.items():
        cfg = module.Config(**module.PRESETS[name])
        assert (cfg.n_layers, cfg.dim, cfg.n_heads, cfg.hidden_dim, cfg.lr) == (layers, dim, heads, 4 * dim, lr)
        assert cfg.batch_size * 2048 == batch * 2**20 and cfg.ramp_tokens == ramp * 1e9 and cfg.first_batch * 2048 == 2**15
        assert (cfg.tokens, cfg.warmup_tokens, cfg.decay_tokens, cfg.weight_decay, cfg.clip) == (3e11, 375e6, 260e9, 0.1, 1.0)
        assert (cfg.vocab_size, cfg.seq_len, cfg.band, cfg.banded, cfg.dropout) == (50257, 2048, 128, "odd", 0.0)
    for name, shape in dict(gpt2=(12, 768, 12), gpt2_medium=(24, 1024, 16), gpt2_large=(36, 1280, 20), gpt2_xl=(48, 1600, 25)).items():
        cfg = module.Config(**module.PRESETS[name])
        assert (cfg.n_layers, cfg.dim, cfg.n_heads) == shape and (cfg.seq_len, cfg.batch_size, cfg.band) == (1024, 512, 0)
        assert module.count_steps(cfg) == (0, 300_000) and cfg.warmup_tokens == 2000 * 512 * 1024


def test_gpt3_initialisation(gpt3):
    module, row = gpt3
    cfg = module.Config(**{**row.tiny, "dim": 192, "hidden_dim": 640, "seq_len": 64})
    model = module.GPT3(cfg)
    module.init_weights(model, cfg)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.unique().tolist() == [float("norm" in name and "weight" in name)], name
        else:
            std = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.01 if "position" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    model.blocks.add_module("stranger", torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="stranger"):
        module.init_weights(model, cfg)
    decayed, others = module.build_optimizer(module.GPT3(cfg), cfg).param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"], decayed["eps"]) == (0.1, 0.0, (0.9, 0.95), 1e-8)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])


def test_gpt3_noise_scale(gpt3):
    """The specification's vector; and a simulation in which the truth is known."""
    module, _ = gpt3
    assert module.noise_scale(math.sqrt(16.5), math.sqrt(5.5625), 8, 64) == pytest.approx((4.0, 100.0))
    draws, mean = torch.Generator().manual_seed(0), torch.linspace(-1, 1, 50, dtype=torch.float64)
    square = trace = 0.0
    for _ in range(400):
        noise = 3 * torch.randn(64, 50, dtype=torch.float64, generator=draws)
        small, big = (mean + noise[:8].mean(0)).norm(), (mean + noise.mean(0)).norm()
        found = module.noise_scale(small.item(), big.item(), 8, 64)
        square, trace = square + found[0] / 400, trace + found[1] / 400
    assert square == pytest.approx(mean.square().sum().item(), rel=0.05) and trace == pytest.approx(9 * 50, rel=0.05)


def test_gpt3_packing_counts_every_target(gpt3):
    """Documents back to back, a separator after each; nothing is masked, and the first token of the next is predicted, too."""
    module, _ = gpt3
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])
    documents = module.tokenize((("a", "abc"), ("b", "de"), ("c", "f" * 20)), tokenizer, 256)
    stream = np.concatenate([ids for _, ids in documents])
    corpus = module.Corpus([("", stream)], 0, len(stream), 256, (np.arange(257) < 256).astype(int), in_order=True)
    batch = module.get_batch(corpus, 0, 1, module.Config(seq_len=8))
    assert batch["tokens"].tolist() == [[97, 98, 99, 256, 100, 101, 256, 102]]
    assert batch["targets"].tolist() == [[98, 99, 256, 100, 101, 256, 102, 102]]
    assert batch["n_targets"] == 8 and batch["n_bytes"] == 6, "the separator has no bytes"


def test_gpt3_mix_of_the_paper(gpt3, tmp_path):
    """Table 2.2: its weights normalised, their epochs in 300B tokens, and no window twice within an epoch."""
    module, _ = gpt3
    sizes = {"cc": 410, "webtext2": 19, "books1": 12, "books2": 55, "wikipedia": 3}
    weights = module.parse_mix("60:cc,22:webtext2,8:books1,8:books2,3:wikipedia")
    assert [round(w, 4) for w in weights.values()] == [0.5941, 0.2178, 0.0792, 0.0792, 0.0297]
    start, mix = 0, []
    for name, size in sizes.items():  # a five-millionth of each; ids tell where a window comes from
        np.save(tmp_path / f"{name}.npy", np.arange(start, start + 200 * size, dtype=np.uint32))
        start += 200 * size
        mix.append(f"{weights[name]}:{tmp_path / name}.npy")
    cfg = module.Config(data=",".join(mix), vocab_size=100_000, seq_len=10, batch_size=20, val_batches=1)
    _, mixture, heldout = module.load_mixture(cfg)
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


def naive_bpe(text, entries):
    """What heaps and indices must not change: count all pairs again for each merge."""
    import collections
    import re

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(pattern, text)]
    ids = {bytes([i]): i for i in range(256)}
    while len(ids) < entries:
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        first, second = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault(first + second, len(ids))
        for word in words:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == (first, second):
                    word[j : j + 2] = [first + second]
                j += 1
    return ids


def test_gpt3_bpe_is_the_naive_one(gpt3):
    module, _ = gpt3
    text = "the cat's hat, the hatter; aaaa aaa banana bananas 1234 12345 été naïve\n\n  def f(x):\n    return x_1\n" * 3 + "thaththat aaaaa"
    text += "".join(itertools.islice((text for _, text in module.read_documents("", module.find_files("")[0])), 1))[:6000]
    assert module.train_bpe([text], 600) == naive_bpe(text, 600)
    assert list(module.train_bpe(["aaab aab ab ab", "ab"], 258).items())[256:] == [(b"ab", 256), (b" ab", 257)]
    with pytest.raises(ValueError, match="no more than"):
        module.train_bpe(["ab ab"], 400)


def test_gpt3_bpe_spells_any_text_and_every_script_loads_it(gpt3, script, tmp_path, monkeypatch):
    module, _ = gpt3
    text = "".join(text for _, text in itertools.islice(module.read_documents("", module.find_files("")[0]), 12))
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    ranks = module.learn_ranks([("text", text)], 700, 10**6, tmp_path / "out")
    tokenizer = script[0].load_tokenizer(str(tmp_path / "out" / "ranks.tiktoken"), ["<|endoftext|>"])
    assert len(ranks) == 700 and tokenizer.n_vocab == 701
    for sample in (text[:20_000], "naïve 🙂 \x00\t текст 你好\r\n", " <|endoftext|>"):
        ids = tokenizer.encode_ordinary(sample)
        assert tokenizer.decode(ids) == sample and max(ids) < 700
    assert len(tokenizer.encode_ordinary(text)) < 0.5 * len(text.encode())


def test_gpt3_shots_and_positions_of_a_model_that_knows(gpt3):
    """A model that copies what stood after the last same pair of tokens: it needs the shots, and with them is right."""
    module, _ = gpt3
    cfg = module.Config(vocab_size=257, seq_len=128)
    tokenizer = module.load_tokenizer("bytes", ["<|endoftext|>"])

    class Copier(torch.nn.Module):
        token_embedding = torch.nn.Embedding(1, 1)

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 257)
            for b, row in enumerate(tokens.tolist()):
                for i in range(len(row)):
                    context = next((j for n in (7, 3, 2) for j in range(i - 1, n - 2, -1) if row[j - n + 1 : j + 1] == row[i - n + 1 : i + 1]), None)
                    if context is not None:
                        logits[b, i, row[context + 1]] = 20.0
            return logits

    (no_nats, none), (one_nats, one), (_, eight) = (module.shots(Copier(), tokenizer, n, 12, cfg) for n in (0, 1, 8))
    assert none == 0 and no_nats > 5 * math.log(257) - 4 and one == eight == 1.0 and one_nats < 0.1
    assert all(math.isnan(x) for x in module.shots(Copier(), tokenizer, 8, 1, module.Config(seq_len=20)))
    corpus, heldout = make_corpora(module, cfg := module.Config(**SCRIPTS["gpt3"].tiny))
    model = make_model(module, SCRIPTS["gpt3"], cfg)
    nats = module.loss_by_position(model, heldout, 8, cfg)
    loss, _ = module.objective(model, module.get_batch(heldout, 0, 8, cfg), cfg)
    assert len(nats) == 7 and sum(nats) / 7 == pytest.approx(loss.item(), rel=1e-5) and len(set(nats)) == 7


# Llama 3


@pytest.fixture
def llama3():
    import llama3

    return llama3, SCRIPTS["llama3"]


ROPE = {  # head width, factor: {i: frequency} of the specification's tables
    (128, 1): {0: 1.0, 28: 3.211446e-03, 29: 2.616099e-03, 32: 1.414214e-03, 34: 9.384738e-04, 35: 7.644970e-04, 63: 2.455141e-06},
    (128, 8): {0: 1.0, 28: 3.211446e-03, 29: 2.166571e-03, 32: 5.248461e-04, 34: 1.785078e-04, 35: 9.556212e-05, 63: 3.068926e-07},
    (128, 32): {0: 1.0, 28: 3.211446e-03, 29: 2.118407e-03, 32: 4.295567e-04, 34: 9.708286e-05, 35: 2.389053e-05, 63: 7.672315e-08},
    (64, 32): {15: 1.290548e-03, 16: 4.295567e-04, 17: 9.708286e-05},
    (16, 8): {4: 5.248461e-04, 5: 3.428102e-05, 7: 1.289173e-06},
    (8, 8): {0: 1.0, 1: 3.7606e-02, 2: 5.2485e-04, 3: 6.6479e-06},
}  # fmt: skip


@pytest.mark.parametrize("width, factor", ROPE)
def test_llama3_rotary_frequencies(llama3, width, factor):
    scaling = "llama3" if factor > 1 else "none"
    found, scale = llama3[0].rope_frequencies(width, 500_000.0, scaling, factor, 8192)
    assert scale == 1 and len(found) == width // 2
    for i, value in ROPE[width, factor].items():
        assert found[i].item() == pytest.approx(value, rel=2e-5 if width == 8 else 1e-6), i
    plain, _ = llama3[0].rope_frequencies(width, 500_000.0, "none", 1.0, 8192)
    if width == 128 and factor == 8:
        ratio = plain / found
        assert [(ratio == 1).sum(), (ratio > 1).logical_and(ratio < 7.99).sum(), (ratio > 7.99).sum()] == [29, 6, 29]


def test_llama3_context_extensions(llama3):
    """Position Interpolation, NTK-aware and YaRN against their formulas in plain Python; Qwen2.5's YaRN has its worked
    values: s = 4 from 32,768 at base 1e6, E = 128."""
    module, _ = llama3
    for width, theta, original, s in ((128, 1e6, 32768, 4.0), (24, 1e4, 512, 16.0)):
        plain = [theta ** (-2 * i / width) for i in range(width // 2)]
        interpolated, _ = module.rope_frequencies(width, theta, "pi", s, original)
        assert interpolated.tolist() == pytest.approx([f / s for f in plain], rel=1e-5)
        ntk, _ = module.rope_frequencies(width, theta, "ntk", s, original)
        base = theta * s ** (width / (width - 2))
        assert ntk.tolist() == pytest.approx([base ** (-2 * i / width) for i in range(width // 2)], rel=1e-5)
        assert ntk[-1].item() == pytest.approx(plain[-1] / s, rel=1e-5) and ntk[0] == 1
        yarn, scale = module.rope_frequencies(width, theta, "yarn", s, original)
        dim = lambda r: width * math.log(original / (2 * math.pi * r)) / (2 * math.log(theta))  # noqa: E731
        low, high = math.floor(dim(32)), math.ceil(dim(1))
        for i, f in enumerate(plain):
            ramp = min(max((i - low) / (high - low), 0), 1)
            assert yarn[i].item() == pytest.approx(f * (1 - ramp) + f / s * ramp, rel=1e-5)
        assert scale == pytest.approx(0.1 * math.log(s) + 1)
    assert module.rope_frequencies(128, 1e6, "yarn", 4.0, 32768)[1] == pytest.approx(1.1386, abs=1e-4)
    low, high = 23, 40  # floor(dim(32)), ceil(dim(1)) of that, counted by hand: 23.57 and 39.63
    yarn, plain = (module.rope_frequencies(128, 1e6, kind, 4.0, 32768)[0] for kind in ("yarn", "none"))
    assert torch.equal(yarn[: low + 1], plain[: low + 1]) and yarn[low + 1] < plain[low + 1]
    assert torch.allclose(yarn[high:], plain[high:] / 4) and yarn[high - 1] > plain[high - 1] / 4


def test_llama3_document_mask(llama3):
    """The specification's example, documents of 3, 2 and 1 tokens; and perturbation through the model."""
    module, row = llama3
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    mask = module.attention_mask(documents, torch.arange(6), torch.arange(6))
    assert mask.shape == (1, 1, 6, 6) and mask.sum() == 10
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0],
                                         [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]  # fmt: skip
    model, cfg = build(module, row)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    tokens = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, documents)
    for b in range(2):
        for j in range(6):
            changed = tokens.clone()
            changed[b, j] = (changed[b, j] + 1) % 256
            moved = (model(changed, documents) != logits).any(-1)
            assert moved[b].tolist() == [i >= j and documents[b, i].item() == documents[b, j].item() for i in range(6)]
            assert not moved[1 - b].any()


def test_llama3_block_mask_is_the_dense_one(llama3, monkeypatch):
    """The mask of the kernel that skips blocks, which trains on GPUs only: built and run forward here, uncompiled."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    module, _ = llama3
    monkeypatch.setattr(module, "flex_kernels", lambda: (flex_attention, create_block_mask))
    T, generator = 256, torch.Generator().manual_seed(0)
    documents = torch.randint(3, (2, T), generator=generator).cumsum(1) // 40
    rows, columns = module.context_positions(T, 2, 1), torch.cat([module.context_positions(T, 2, i) for i in range(2)])
    q = torch.randn(2, 4, T // 2, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, T, 16, generator=generator)
    dense = module.attend(q, k, v, module.attention_mask(documents, rows, columns))

    class OnGPU(torch.Tensor):  # documents that say they are on a GPU
        is_cuda = True

    mask = module.attention_mask(documents.as_subclass(OnGPU), rows, columns)
    assert isinstance(mask, BlockMask)
    torch.testing.assert_close(module.attend(q, k, v, mask), dense, atol=1e-5, rtol=1e-5)


def test_llama3_context_parallel_chunks(llama3):
    module, _ = llama3
    assert module.context_positions(16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert module.context_positions(16, 2, 1).tolist() == list(range(4, 12))
    scored = [sum(p + 1 for p in module.context_positions(16, 2, i).tolist()) for i in range(2)]
    assert scored == [68, 68]
    chunks = [{p // 2 for p in module.context_positions(16, 4, i).tolist()} for i in range(4)]
    assert chunks == [{0, 7}, {1, 6}, {2, 5}, {3, 4}]


def test_llama3_pipeline_stages(llama3):
    """405B: 126 layers, embedding and head on 16 ranks x 8 stages, one each; and every layer on one stage, always."""
    module, _ = llama3
    cfg = module.Config(**module.PRESETS["405b"], pp=16)
    stages = [list(module.stage_layers(cfg, i)) for i in range(128)]
    assert stages[0] == stages[127] == [] and stages[1:127] == [[i] for i in range(126)]
    cfg = module.Config(n_layers=30, pp=4, pp_chunks=2)
    assert [len(module.stage_layers(cfg, i)) for i in range(8)] == [3, 4, 4, 4, 4, 4, 4, 3]
    for layers, pp, chunks in ((7, 3, 1), (4, 2, 3), (13, 4, 2), (5, 2, 1)):
        cfg = module.Config(n_layers=layers, pp=pp, pp_chunks=chunks)
        stages = [list(module.stage_layers(cfg, i)) for i in range(pp * chunks)]
        assert sum(stages, []) == list(range(layers))
    bubble = module.Config(**{**module.PRESETS["405b"], "pp": 16, "dp": 128})
    assert module.pipeline_bubble(bubble) == 15 / (8 * 16)


def test_llama3_plan_of_the_405b(llama3):
    """The updates that the specification derives from the paper's tokens."""
    module, _ = llama3
    plan = module.phases(module.Config(**module.PRESETS["405b"]))
    sizes = [(p.stage, p.cfg.seq_len, p.cfg.batch_size, p.end - p.first) for p in plan]
    assert sizes[:3] == [("initial", 4096, 1024, 60), ("initial", 8192, 1024, 342_101), ("initial", 8192, 2048, 711_083)]
    assert [s[1] for s in sizes[3:9]] == [16384, 32768, 49152, 65536, 98304, 131072]
    assert sizes[-1] == ("annealing", 131072, 128, 2384)
    assert all(p.cfg.rope_scaling == ("none" if p.stage == "initial" else "llama3") for p in plan)
    for stage, tokens in (("long-context", 8e11), ("annealing", 4e10)):
        assert sum(s[1] * s[2] * s[3] for s in sizes if s[0] == stage) == pytest.approx(tokens, rel=1e-3)
    assert all(a.end == b.first for a, b in zip(plan, plan[1:])) and plan[0].first == 0
    qwen = module.phases(module.Config(**module.PRESETS["qwen2_5_7b"]))
    assert [(p.cfg.seq_len, p.cfg.rope_theta) for p in qwen] == [(4096, 1e4), (32768, 1e6)]


def test_llama3_mix_changes_by_tokens_and_by_stage(llama3):
    module, _ = llama3
    cfg = module.Config(data="0.9:a,0.1:b;1e6;b,c", anneal_data="c", tokens=2e6, anneal_tokens=1e6, ramp="64x8:5e5",
                        seq_len=100, batch_size=100)  # fmt: skip
    plan = [(p.stage, p.first, p.end, p.cfg.data) for p in module.phases(cfg)]
    assert plan == [("initial", 0, 977, "0.9:a,0.1:b"), ("initial", 977, 1027, "0.9:a,0.1:b"),
                    ("initial", 1027, 1127, "b,c"), ("annealing", 1127, 1227, "c")]  # fmt: skip
    assert module.parse_mix("3:x/web,1:y") == {"x/web": 0.75, "y": 0.25}


def test_llama3_mixture_has_exact_shares_and_positions(llama3):
    """50/25/17/8 over 10,000 draws; each corpus' own sequences come in order, without a gap; a later phase goes on."""
    module, _ = llama3
    weights = [0.5, 0.25, 0.17, 0.08]
    corpora = [module.Corpus([("", np.zeros(9, np.uint16))], 0, 9, -1, np.ones(10, np.int64), in_order=False)] * 4
    mixture = module.Mixture(dict(zip("abcd", weights)), corpora, [0, 0, 0, 70], 0)
    draws = [mixture.draw(i, seed=1) for i in range(25_000)]
    for corpus, weight in enumerate(weights):
        assert sum(c == corpus for c, _ in draws[:10_000]) == round(10_000 * weight)
        positions = sorted(p - 70 * (corpus == 3) for c, p in draws if c == corpus)
        assert positions == list(range(round(25_000 * weight)))
        assert abs(sum(c == corpus for c, _ in draws[:300]) - 300 * weight) < 4 * math.sqrt(300 * weight)
        assert mixture.spent(24_001)[corpus] == round(25_000 * weight) + 70 * (corpus == 3)
    assert [c for c, _ in draws[:50]] != [mixture.draw(i, seed=2)[0] for i in range(50)]
    later = module.Mixture(dict(zip("abcd", weights)), corpora, [0, 0, 0, 70], 777)
    assert [later.draw(i, 1) for i in range(2000)] == draws[777:2777]


def test_llama3_phases_do_not_draw_a_window_twice(llama3, tmp_path):
    """Over a change of batch, of mix and of stage, the windows of a corpus at one length are all different."""
    module, _ = llama3
    for name, start in (("a", 0), ("b", 30_000)):
        np.save(tmp_path / f"{name}.npy", np.arange(start, start + 30_000, dtype=np.uint16))
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    cfg = module.Config(data=f"0.7:{a},0.3:{b};6000;{b},{a}", anneal_data=str(b), vocab_size=60_000, seq_len=10, batch_size=40,
                        ramp="10x20:3000", tokens=16_000, anneal_tokens=4000, val_batches=1)  # fmt: skip
    plan = module.phases(cfg)
    mixtures, heldout = module.load_mixtures(cfg, *module.find_sources(cfg))
    assert len(plan) == 4
    seen = []
    for phase, mixture in zip(plan, mixtures):
        n = (phase.end - phase.first) * phase.cfg.batch_size
        seen += [mixture.window(i, 10, 0)[0].item() for i in range(n)]
    phases = {c.window(0, 10, 0)[0].item() % 10 for c in mixtures[0].corpora}
    assert len(seen) == len(set(seen)) > 1990 and len(phases) <= 2
    assert sum(token < 30_000 for token in seen[:600]) == pytest.approx(420, abs=30)
    held = np.array([heldout.window(i, 10, 0) for i in range(heldout.n_windows(10))])
    assert not set(seen) & set(held.flatten().tolist()) and 0.6 < (held < 30_000).mean() < 0.8
    assert [module.plan_position(plan, {"sequences": n, "undone": u}) for n, u in ((0, 0), (299, 0), (300, 0), (320, 10), (2100, 0))] == [
        (0, 0), (0, 14.95), (1, 15), (1, 15.25), (3, 60)]  # fmt: skip


def test_llama3_packing(llama3):
    """Documents of 5, 4 and 6 tokens, markers included, in windows of 8: the specification's example."""
    module, _ = llama3
    B, E = 256, 257
    stream = [B, 1, 2, 3, E, B, 4, 5, E, B, 6, 7, 8, 9, E] + [0] * 20
    token_bytes = (np.arange(264) < 256).astype(np.int64)
    corpus = module.Corpus([("", np.array(stream, np.uint16))], 0, len(stream), E, token_bytes, in_order=True)
    batch = module.get_batch(corpus, 0, 1, module.Config(seq_len=8))
    assert batch["tokens"].tolist() == [[B, 1, 2, 3, E, B, 4, 5]] and batch["documents"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch["targets"].tolist() == [[1, 2, 3, E, -100, 4, 5, E]]
    assert batch["n_targets"] == 7 and batch["n_bytes"] == 5, "markers have no bytes"
    batch = module.get_batch(corpus, 1, 1, module.Config(seq_len=8))
    assert batch["tokens"][0, 0] == E and batch["targets"][0, 0] == -100 and batch["documents"][0, :3].tolist() == [0, 1, 1]
    plain = module.get_batch(corpus, 0, 1, module.Config(seq_len=8, document_mask=False))
    assert "documents" not in plain and plain["targets"].tolist() == [stream[1:9]]


def test_llama3_tokenizer_file(llama3, tmp_path):
    """A rank file in which only the specification's reference tokens are merged: its pieces and special ids."""
    import base64

    module, _ = llama3
    words = ["Hello", " world", " ", "123", "45", "!", "I", "'LL", " go", "go", "\n\n", " now", "x", " =", "3", ".", "14", "\n"]
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        for end in range(2, len(word.encode()) + 1):  # merge order: every prefix is a token
            ranks.setdefault(word.encode()[:end], len(ranks))
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    tokenizer, separator = module.load_specials(module.Config(tokenizer=str(path)))
    assert tokenizer.n_vocab == len(ranks) + 256 and separator == len(ranks) + 1
    pieces = lambda text: [tokenizer.decode([i]) for i in tokenizer.encode_ordinary(text)]  # noqa: E731
    assert pieces("Hello world 12345!") == ["Hello", " world", " ", "123", "45", "!"]
    assert pieces("I'LL go\n\n  now") == ["I", "'LL", " go", "\n\n", " ", " now"]
    assert pieces("  x = 3.14\n") == [" ", " ", "x", " =", " ", "3", ".", "14", "\n"]
    special = {token: tokenizer.encode_single_token(token) - len(ranks) for token in module.SPECIALS}
    assert [special[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "reserved_special_token_0", "finetune_right_pad_id",
            "start_header_id", "eot_id", "python_tag", "reserved_special_token_2", "reserved_special_token_245")] == [0, 1, 2, 4, 6, 9, 10, 12, 255]  # fmt: skip
    qwen, end = module.load_specials(module.Config(tokenizer=str(path), bos=False))
    assert qwen.encode_single_token(module.END) == end == len(ranks)
    (_, ids), = module.tokenize_pieces([("", "Hello<|end_of_text|>")], tokenizer, separator)
    assert ids[0] == len(ranks) and ids[-1] == len(ranks) + 1 and (ids >= len(ranks)).sum() == 2, "text is never a special token"
    (_, ids), = module.tokenize_pieces([("", "Hello")], qwen, end)
    assert ids.tolist() == [ranks[b"Hello"], len(ranks)]
    for text in (" " * 1_000_000, "x" * 60_000, ""):  # tiktoken alone fails on the first
        found = [ids for _, ids in module.tokenize_pieces([("", text)], tokenizer, separator)]
        assert len(found) == bool(text) and all(tokenizer.decode(ids[1:-1].tolist()) == text for ids in found)
    with pytest.raises(BaseException, match="(?i)stack|limit"):
        tokenizer.encode_ordinary("x" + " " * 1_000_000)


def test_llama3_cuts_text_as_released(llama3):
    """Against the loop of the released tokenizer: blocks of 400,000 characters, runs of 25,000."""
    module, _ = llama3

    def released(text):
        for first in range(0, len(text), 400_000):
            block = text[first : first + 400_000]
            length, space, start = 0, block[0].isspace(), 0
            for i, letter in enumerate(block):
                if letter.isspace() != space:
                    length, space = 1, letter.isspace()
                else:
                    length += 1
                    if length > 25_000:
                        yield block[start:i]
                        start, length = i, 1
            yield block[start:]

    for text in ("", "a b", "a" * 25_000, "a" * 25_001, "word " * 90_000 + "\u3000" * 50_001 + "b" * 49_999 + "\n\x85\x1c" * 20_000,
                 ("x" * 30_000 + "\t" * 25_002) * 9, " " * 1_000_000):  # fmt: skip
        assert list(module.cut_text(text)) == list(released(text))


def test_llama3_initialisation(llama3):
    module, row = llama3
    cfg = module.Config(**{**row.tiny, "dim": 192, "hidden_dim": 640, "qkv_bias": True})
    model = module.Llama3(cfg)
    module.init_weights(model, cfg)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.unique().tolist() == [float("norm" in name)], name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    model.blocks.add_module("stranger", torch.nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="stranger"):
        module.init_weights(model, cfg)
    decayed, others = module.build_optimizer(module.Llama3(cfg), cfg).param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"], decayed["eps"]) == (0.1, 0.0, (0.9, 0.95), 1e-8)


def test_llama3_bfloat16_keeps_the_norms_rope_and_loss_in_float32(llama3):
    """Rotation at position 100,000 would be off by radians in bf16; the norm casts before its gain, as released."""
    module, row = llama3
    cfg = module.Config(**{**row.tiny, "precision": "bf16"})
    model = make_model(module, row, cfg)
    tokens = torch.randint(256, (2, 12))
    logits = model(tokens)
    assert logits.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    exact = make_model(module, row, module.Config(**row.tiny))(tokens)
    assert 1e-5 < (logits - exact).abs().max() / exact.abs().max() < 0.03
    x, position = torch.randn(1, 1, 1, 8), torch.tensor([100_000.0])
    angles = position[:, None] * module.rope_frequencies(8, 1e4, "none", 1.0, 1)[0]
    turned = module.rotate(x.bfloat16(), angles.cos(), angles.sin())
    assert turned.dtype == torch.bfloat16 and (turned.float() - module.rotate(x, angles.cos(), angles.sin())).abs().max() < 0.05
    norm = module.RMSNorm(64, 1e-5)
    norm.weight.data.uniform_(0.5, 1.5)
    x = (100 * torch.randn(3, 64)).bfloat16()
    y = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(norm(x), y * norm.weight.bfloat16())


def test_llama3_average_is_the_mean_of_checkpoints(llama3):
    """Seven updates of annealing and three checkpoints of them: after the third, the fifth and the seventh."""
    module, _ = llama3
    phase = module.Phase("annealing", 0, 7, 0, module.Config(average=3))

    class Pipeline:
        model = torch.nn.Linear(2, 1)
        average = {name: torch.zeros_like(p.data) for name, p in model.named_parameters()}

    for done in range(1, 8):
        torch.nn.init.constant_(Pipeline.model.weight, float(done**2))
        module.update_average(Pipeline, done, phase)
    assert Pipeline.average["weight"].tolist() == [[pytest.approx((9 + 25 + 49) / 3)] * 2]


def test_llama3_spikes(llama3):
    """Six standard deviations of the last losses, not five; and a trend is none."""
    module, _ = llama3
    state = {"watched": 0, "loss_mean": 0.0, "loss_variance": 0.0}
    generator = np.random.default_rng(0)
    assert not any(module.is_spike(state, 5 - i / 100 + 0.1 * generator.standard_normal(), 6.0) for i in range(200))
    assert not any(module.is_spike(state, 3 + 0.1 * generator.standard_normal(), 6.0) for i in range(300))
    deviation, mean = math.sqrt(state["loss_variance"]), state["loss_mean"]
    assert 0.08 < deviation < 0.12 and abs(mean - 3) < 0.1
    assert module.is_spike(dict(state), mean + 6.1 * deviation, 6.0)
    assert not module.is_spike(dict(state), mean + 5.9 * deviation, 6.0)
    assert not module.is_spike(dict(state), mean + 100, 0.0)
    assert sum(module.is_spike(state, mean + 1, 6.0) for _ in range(100)) < 5, "a level that lasts is no spike"


# The worked examples of DeepSeek-V3's specification, W1 to W8


@pytest.fixture
def v3():
    import deepseek_v3

    yield deepseek_v3
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


S12 = [0.90, 0.10, 0.20, 0.60, 0.55, 0.50, 0.70, 0.65, 0.05, 0.80, 0.30, 0.15]


@pytest.mark.parametrize("bias, experts, weights", [
    ([0] * 12, [3, 4, 6, 7], [0.60, 0.55, 0.70, 0.65]),
    ([0] * 5 + [0.20, -0.10, -0.12] + [0] * 4, [3, 4, 5, 6], [0.638298, 0.585106, 0.531915, 0.744681]),
])  # fmt: skip
def test_deepseek_v3_w1_routing(v3, bias, experts, weights):
    s = torch.tensor([S12, S12[::-1]])
    found, gates = v3.route(s, torch.tensor(bias).float(), 4, 4, 2, 2.5)
    order = found[0].argsort()
    assert found[0][order].tolist() == experts
    torch.testing.assert_close(gates[0][order], torch.tensor(weights), atol=1e-6, rtol=0)
    alone, _ = v3.route(s, torch.zeros(12), 4, 1, 1, 2.5)
    assert sorted(alone[0].tolist()) == [0, 6, 7, 9], "without groups"
    negative = torch.tensor([-1.5] * 12)  # a dropped group must stay behind biased scores below 0
    assert sorted(v3.route(s, negative, 4, 4, 2, 1.0)[0][0].tolist()) == [3, 4, 6, 7]


def test_deepseek_v3_the_bias_only_chooses(v3):
    s = torch.rand(5, 12, requires_grad=True)
    bias = torch.zeros(12, requires_grad=True)
    v3.route(s, bias, 3, 1, 1, 1.0)[1].square().sum().backward()
    assert bias.grad is None and s.grad.abs().sum() > 0


def test_deepseek_v3_w2_bias_step(v3):
    v3.init_distributed(30)
    router = v3.Router(6, 6, 2, 1, 1, 1.0)
    router.load.copy_(torch.tensor([10.0, 6, 8, 8, 12, 4]))
    relative = v3.update_biases([router], 0.001, None)
    assert (relative.max().item(), relative.min().item()) == (1.5, 0.5)
    torch.testing.assert_close(router.bias, torch.tensor([-0.001, 0.001, 0, 0, -0.001, 0.001]))
    assert not router.load.any()


@pytest.mark.parametrize("gamma, balanced", [(1e-2, True), (0.0, False)])
def test_deepseek_v3_biases_balance_a_skewed_router(v3, gamma, balanced):
    v3.init_distributed(30)
    torch.manual_seed(0)
    moe = v3.MoE(16, 8, 16, 1, (4, 4, 2, 1.0), False)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.3)
        moe.router.weight[:4] += 0.05  # the inputs have a mean, so that the first group is the favourite
    for _ in range(100):
        moe(torch.randn(4, 400, 16, generator=torch.Generator().manual_seed(_)) + 1.0)
        largest = v3.update_biases([moe.router], gamma, None).max().item()
    assert (largest < 1.3) == balanced, largest


def test_deepseek_v3_w3_sequence_balance(v3):
    s = torch.tensor([[[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.2], [0.1, 0.2, 0.9, 0.8], [0.6, 0.1, 0.2, 0.7]]])
    s.requires_grad_()
    loss = v3.sequence_balance(s, 2)
    assert loss.item() == pytest.approx(1.04375, rel=1e-6)
    assert v3.sequence_balance(torch.cat((s, s)), 2).item() == pytest.approx(2 * 1.04375, rel=1e-6), "a sum over sequences"
    loss.backward()
    f, every = torch.tensor([1.5, 1.0, 0.5, 1.0]), s.detach()[0]
    total = every.sum(-1, keepdim=True)
    expected = (f / total - (f * every).sum(-1, keepdim=True) / total**2) / 4  # f is no function of s
    torch.testing.assert_close(s.grad[0], expected)


def test_deepseek_v3_w4_e4m3_tiles(v3):
    codes, scales = v3.quantize(3.5 * torch.arange(1, 129)[None] / 128, 1, 128)
    assert scales[0].tolist() == [2**-7] and codes[0, :8].float().tolist() == [3.5, 7, 10, 14, 18, 20, 24, 28]
    x, back = 3.5 * torch.arange(1, 129) / 128, v3.dequantize(codes, scales)[0]
    assert back[:8].tolist() == [0.02734375, 0.0546875, 0.078125, 0.109375, 0.140625, 0.15625, 0.1875, 0.21875]
    error = (back - x).abs() / x
    assert error.argmax() == 38 and error.max().item() == pytest.approx(0.054945, abs=1e-6) and back[38] == 1.125
    assert error.mean().item() == pytest.approx(0.022131, abs=1e-6)
    tile = F.pad(torch.tensor([[1, 0.5, 0.3, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6]]), (0, 119))
    codes, scales = v3.quantize(tile, 1, 128)
    assert scales[0, 0].item() == pytest.approx(1 / 448)
    assert codes[0, :9].float().tolist() == [448, 224, 128, 44, 4.5, 0.4375, 0.04296875, 0.00390625, 0]
    codes, scales = v3.quantize(tile, 1, 128, powers=True)
    assert scales[0, 0].item() == 2**-8
    assert codes[0, :9].float().tolist() == [256, 128, 80, 26, 2.5, 0.25, 0.025390625, 0.001953125, 0]
    tile[0, 100] = 1000.0
    assert (v3.dequantize(*v3.quantize(tile, 1, 128))[0, 5:9] == 0).all()


def test_deepseek_v3_w5_tiles_anew(v3):
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    for powers, changed in ((True, 0.0), (False, 0.99)):
        once = v3.dequantize(*v3.quantize(x, 1, 128, powers))
        twice = v3.dequantize(*v3.quantize(once, 128, 1, powers))
        assert (once != twice).float().mean().item() == pytest.approx(changed, abs=0.02)
    w = torch.randn(200, 300)  # a ragged edge is padded
    (codes, scales), (codes_t, scales_t) = v3.transposed(v3.quantize(w, 128, 128)), v3.quantize(w.T, 128, 128)
    assert torch.equal(scales, scales_t) and torch.equal(codes.float(), codes_t.float())
    assert v3.quantize(torch.randn(2, 200, 300), 128, 128)[1].shape == (2, 2, 3)


def test_deepseek_v3_w6_e5m6(v3):
    x = torch.tensor([1.0, 1.0078125, 1.0234375, 3.14159, 0.1, -1.0234375, 0.0, 2.0**-16])
    expected = [1.0, 1.0, 1.03125, 3.15625, 0.099609375, -1.03125, 0.0, 2.0**-16]
    assert v3.round_e5m6(x).tolist() == expected
    x = torch.linspace(1, 2, 10001)
    assert ((v3.round_e5m6(x) - x).abs() / x).max().item() == pytest.approx(0.00775, abs=2e-5)
    x = torch.randn(3, 200).bfloat16()
    assert ((v3.cache_e5m6(x).float() - x.float()).abs() <= 2**-7 * x.float().abs()).all()


def test_deepseek_v3_w7_products_in_fp8(v3):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 4096, generator=generator), 0.006 * torch.randn(512, 4096, generator=generator)
    error = lambda found, exact: ((found - exact).norm() / exact.norm()).item()  # noqa: E731
    tiles, blocks = v3.quantize(x, 1, 128), v3.quantize(w, 128, 128)
    assert 0.02 < error(v3.dequantize(*tiles), x) < 0.03 and 0.02 < error(v3.dequantize(*blocks), w) < 0.03
    assert 0.035 < error(v3.scaled_product(tiles, blocks, torch.float32), x @ w.T) < 0.04
    slices = sum(  # the sum as the tensor cores have it, by slices of 128 and in fp32
        tiles[0][:, k : k + 128].float() @ blocks[0][:, k : k + 128].float().T
        * tiles[1][:, k // 128, None] * blocks[1][:, k // 128].repeat_interleave(128)
        for k in range(0, 4096, 128)
    )  # fmt: skip
    torch.testing.assert_close(v3.scaled_product(tiles, blocks, torch.float32), slices, atol=1e-5, rtol=1e-5)


def test_deepseek_v3_fp8_layers_follow_exact_ones(v3):
    """Outputs and all gradients of the FP8 linear layer and experts, ragged sizes and an empty expert included."""
    torch.manual_seed(0)
    error = lambda found, exact: ((found - exact).norm() / exact.norm()).item()  # noqa: E731
    layer = v3.FP8Linear(160, 200, bias=False)
    for wide, limits in ((False, (0.045, 0.045, 0.065)), (True, (0.045, 0.045, 0.045))):
        layer.wide_cache, layer.weight.grad = wide, None
        x, dy = torch.randn(3, 50, 160, requires_grad=True), torch.randn(3, 50, 200)
        y = layer(x)
        y.backward(dy)
        exact = x @ layer.weight.T, dy @ layer.weight, dy.flatten(0, 1).T @ x.flatten(0, 1)
        for found, value, limit in zip((y, x.grad, layer.weight.grad), exact, limits):
            assert 0.01 < error(found, value) < limit
        layer.weight.grad, x.grad, found = None, None, (x.grad, layer.weight.grad)
        layer(x).backward(dy * 2.0**-30)  # gradients of a mean over many tokens are small
        for small, value in zip((x.grad, layer.weight.grad), found):
            torch.testing.assert_close(small * 2.0**30, value, atol=0, rtol=1e-5)
    experts = v3.Experts(5, 48, 80, fp8=True)
    for p in experts.parameters():
        p.data.normal_(0, 0.1)
    ends, x, dy = torch.tensor([7, 7, 200, 231, 300], dtype=torch.int32), torch.randn(300, 48, requires_grad=True), torch.randn(300, 48)
    results = []
    for experts.fp8 in (True, False):
        experts.zero_grad()
        x.grad = None
        y = experts(x, ends)
        y.backward(dy)
        results.append((y, x.grad, experts.gate_up.grad, experts.down.grad))
    for found, exact in zip(*results):
        assert 0.01 < error(found, exact) < 0.1
    assert not results[0][2][1].any() and not results[0][3][1].any(), "an expert without tokens has no gradient"


def test_deepseek_v3_keeps_fp8_for_the_backward_pass(v3):
    kept = []
    layer = v3.FP8Linear(256, 128, bias=False)
    experts = v3.Experts(2, 128, 128, fp8=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        layer(torch.randn(128, 256, requires_grad=True))
        assert kept.count(torch.float8_e4m3fn) == 1 and kept.count(torch.float32) == 2  # the weight and the scales
        kept.clear()
        experts.gate_up.data.normal_(), experts.down.data.normal_()
        experts(torch.randn(256, 128, requires_grad=True), torch.tensor([100, 256], dtype=torch.int32))
    assert kept.count(torch.float8_e4m3fn) == 2 and kept.count(torch.float32) == 4  # weights and scales


def test_deepseek_v3_w8_yarn(v3):
    plain, one = v3.rope_frequencies(64, 1e4, "none", 40.0, 4096)
    yarn, mscale = v3.rope_frequencies(64, 1e4, "yarn", 40.0, 4096)
    assert one == 1.0 and mscale == pytest.approx(1.3688879, abs=1e-7)
    for j, (before, after) in {10: (0.0562341, 0.0562341), 11: (0.0421697, 0.0390069), 16: (0.01, 0.0055),
                               23: (1.333521e-3, 3.333804e-5), 31: (1.333521e-4, 3.333804e-6)}.items():  # fmt: skip
        assert plain[j].item() == pytest.approx(before, rel=1e-5) and yarn[j].item() == pytest.approx(after, rel=1e-5)
    assert mscale**2 / math.sqrt(192) == pytest.approx(0.13523378, abs=1e-8)


def test_deepseek_v3_w8_schedule(v3):
    cfg = v3.Config(**v3.PRESETS["671b"], pp=16, ep=64, dp=2)
    rows = v3.plan(cfg)
    assert [row.cfg.batch_size for row in rows[:2]] == [3072, 3200] and rows[-3].cfg.batch_size == 15360
    assert [(row.cfg.seq_len, row.cfg.batch_size, row.end - row.first) for row in rows[-2:]] == [(32768, 1920, 1000), (131072, 480, 1000)]
    assert {row.cfg.rope_scaling for row in rows[:-2]} == {"none"} and {row.cfg.rope_scaling for row in rows[-2:]} == {"yarn"}
    ramp = v3.plan(v3.dataclasses.replace(cfg, batch_multiple=1))
    assert ramp[-3].first == pytest.approx(14_997, rel=2e-3) and ramp[-3].end == pytest.approx(242_800, rel=2e-3)
    assert rows[-3].tokens == pytest.approx(469e9, rel=2e-3)
    tokens = lambda share: next(  # noqa: E731
        row.first + int((share - row.tokens) // (row.cfg.batch_size * 4096)) for row in rows[::-1] if row.tokens <= share
    )
    for share, weight, gamma in ((9.99e12, 0.3, 0.001), (10.01e12, 0.1, 0.001), (14.29e12, 0.1, 0.001), (14.31e12, 0.1, 0.0)):
        _, now, _ = v3.at_step(tokens(share), cfg)
        assert (now.mtp_weight, now.gamma) == (weight, gamma)
    assert v3.learning_rate(rows[-1].end - 1, cfg) == 7.3e-6
    steps = v3.Config(**v3.PRESETS["3b"])
    end = v3.plan(steps)[-1].end
    for part, factor in ((0.5, 1.0), (0.79, 1.0), (0.81, 0.316), (0.91, 0.1)):
        assert v3.learning_rate(int(part * end), steps) == pytest.approx(factor * 8.6e-4)


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_deepseek_v3_w8_multi_token_prediction(v3, kind):
    """T = 6: five terms divided by six; position i sees tokens up to i + 1, and in parallel up to i."""
    row = SCRIPTS["deepseek_v3"]
    cfg = v3.Config(**{**row.tiny, "mtp": kind, "balance_loss": 0.0, "mtp_weight": 0.3})
    model = make_model(v3, row, cfg)
    x = torch.randint(250, (1, 7), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": x[:, :-1], "targets": x[:, 1:], "n_targets": 6, "n_sequences": 1}
    loss, metrics = v3.objective(model, batch, cfg)
    main, ahead = (logits.double().log_softmax(-1)[0] for logits in model(x[:, :6], x[:, :6]))
    assert main.shape[0] == 6 and ahead.shape[0] == 5
    first = -sum(main[i, x[0, i + 1]] for i in range(6)).item() / 6
    second = -sum(ahead[i, x[0, i + 2]] for i in range(5)).item() / 6
    assert metrics["main"].item() == pytest.approx(first, rel=1e-5) and metrics["mtp"].item() == pytest.approx(second, rel=1e-5)
    assert loss.item() == pytest.approx(first + 0.3 * second, rel=1e-5)
    for j in range(6):
        changed = x[:, :6].clone()
        changed[0, j] = (changed[0, j] + 1) % 250
        moved = ((model(changed, changed)[1][0].log_softmax(-1) - ahead).abs() > 1e-5).any(-1)
        assert moved.tolist() == [i + (kind == "sequential") >= j for i in range(5)]
    loss.backward()
    grad = model.token_embedding.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(x[:, :6])[0], x[0, 1:]).backward()
    assert not torch.allclose(grad, model.token_embedding.weight.grad), "the module's gradient reaches the shared embedding"


def test_deepseek_v3_balance_loss_is_in_value_and_gradient(v3):
    row = SCRIPTS["deepseek_v3"]
    cfg = v3.Config(**{**row.tiny, "mtp": "none", "balance_loss": 0.5})
    model, x = make_model(v3, row, cfg), torch.randint(250, (4, 12))
    batch = {"tokens": x[:, :-1], "targets": x[:, 1:], "n_targets": 44, "n_sequences": 8}  # half of a global batch
    affinities = []
    for router in v3.routers(model):
        router.register_forward_hook(lambda m, inputs, _: affinities.append(torch.sigmoid(inputs[0] @ m.weight.T)))
    loss, metrics = v3.objective(model, batch, cfg)
    balance = sum(0.5 / 8 * v3.sequence_balance(s, cfg.top_k) for s in affinities)
    assert len(affinities) == 3 and (loss - metrics["main"]).item() == pytest.approx(balance.item(), rel=1e-4)
    loss.backward()
    found = [router.weight.grad.clone() for router in v3.routers(model)]
    model.zero_grad()
    affinities.clear()
    for router in v3.routers(model):
        router.balance = 0.0
    nats, _ = v3.nats_ahead(model(x[:, :-1]), x[:, 1:])
    total = nats / 44 + sum(0.5 / 8 * v3.sequence_balance(s, cfg.top_k) for s in affinities)
    total.backward()
    for router, gradient in zip(v3.routers(model), found):
        torch.testing.assert_close(router.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_deepseek_v3_recomputes_norms_and_up_projections(v3):
    row = SCRIPTS["deepseek_v3"]
    sizes = {}
    for recompute in ("none", "paper"):
        cfg = v3.Config(**{**row.tiny, "recompute": recompute, "n_layers": 1, "n_dense": 1, "mtp": "none", "seq_len": 64})
        model = make_model(v3, row, cfg)
        tokens = torch.randint(250, (4, 64))
        v3.gc.collect()
        with v3.Alive(model.parameters()) as alive:
            logits = model(tokens)
            sizes[recompute] = alive.bytes() - logits.numel() * 4
    positions = 4 * 64 * 4
    heads, norms = 3 * 3 * 16 + 3 * 2 * 10 + 3 * 10, 2 * 2 * 24 + 20 + 28
    saved = sizes["none"] - sizes["paper"]
    assert saved > 0.8 * positions * (3 * 16 * 2 + norms), (sizes, positions * heads)


# DeepSeek-V3's documents


def packed(v3, texts, length, n, fim=0.0, split=0.0):
    tokenizer = v3.load_tokenizer("bytes", v3.SPECIALS)
    documents = v3.tokenize(((str(i), text) for i, text in enumerate(texts)), tokenizer, tokenizer.eot_token)
    ids = np.concatenate([ids for _, ids in documents])
    corpus = v3.Corpus([("", ids)], 0, len(ids), tokenizer.eot_token, np.ones(tokenizer.n_vocab, np.int64), in_order=False)
    return corpus, *v3.pack(corpus, tokenizer, 0, length, n, fim, split, 0)


def test_deepseek_v3_packs_best_fit(v3):
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(97, 122, n))) for n in generator.integers(2, 60, 2000)]
    corpus, rows, counts = packed(v3, texts, 63, 64)
    assert rows.shape == (64, 64) and (rows >= 0).all(), "no gap and no padding"
    stretch = corpus.window(0, 64 * 64 - 1, 0)
    assert sorted(rows.flatten()) == sorted(stretch), "every token of the stretch once"
    documents = [bytes(part[:-1].astype(np.uint8)) for part in np.split(stretch, np.flatnonzero(stretch == 256) + 1)[1:-1]]
    whole = [bytes(part[:-1].astype(np.uint8)) for row in rows for part in np.split(row, np.flatnonzero(row == 256) + 1)[:-1]]
    unbroken = sum(document in whole for document in documents)
    cut = sum(1 for document in documents if document not in whole)
    assert counts[:, 0].sum() in (len(documents), len(documents) + 1) and counts[:, 2].sum() >= cut
    plain = sum(1 for i in range(64) if stretch[64 * i + 63] != 256)
    assert cut < plain / 2, f"{cut} of {len(documents)} documents are cut, and {plain} without packing; {unbroken} are whole"


def test_deepseek_v3_fills_in_the_middle(v3):
    texts = [f"document {i}, whose text is “unlike” all others: {i * i}." for i in range(3000)]
    _, rows, counts = packed(v3, texts, 299, 256, fim=0.1)
    begin, hole, end = range(257, 260)
    assert (rows == begin).sum() == (rows == hole).sum() == (rows == end).sum() == counts[:, 1].sum()
    share = counts[:, 1].sum() / counts[:, 0].sum()
    assert 0.07 < share < 0.13
    assert packed(v3, texts, 299, 256, fim=0.0)[2][:, 1].sum() == 0
    tokenizer = v3.load_tokenizer("bytes", v3.SPECIALS)
    ids = np.array([*tokenizer.encode_ordinary("naïve text"), 256])
    found = set()
    for key in range(200):
        out = v3.fill_in_the_middle(ids, tokenizer, key).tolist()
        pre, rest = out[1:].__getitem__(slice(out.index(hole) - 1)), out[out.index(hole) + 1 :]
        suffix, middle = rest[: rest.index(end)], rest[rest.index(end) + 1 : -1]
        assert out[0] == begin and out[-1] == 256
        assert tokenizer.decode([*pre, *middle, *suffix]) == "naïve text" and "\ufffd" not in tokenizer.decode(middle)
        found.add((len(pre), len(middle)))
    assert len(found) > 40, "the cuts vary"


def test_deepseek_v3_splits_joined_tokens(v3):
    ranks = {bytes([i]): i for i in range(256)} | {b".\n": 256, b"\n\n": 257, b");\n\n": 258, b"ab": 259, b");": 260}
    tokenizer = v3.tiktoken.Encoding("x", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={v3.SPECIALS[0]: 261})
    assert v3.joined_tokens(tokenizer) == {256: (46, 10), 258: (260, 257)}
    ids = np.array([259, 256] * 500 + [261])
    out, _ = v3.prepare_document(ids, tokenizer, 0.0, 0.1, "key")
    assert 30 < (out == 10).sum() < 70 and tokenizer.decode(out.tolist()) == tokenizer.decode(ids.tolist())


def test_deepseek_v3_quantizes_as_the_recipe_says(v3, monkeypatch):
    """Tile, power-of-two scale or not, and floor of every cast: forward, then backward."""
    calls, inner = [], v3.quantize

    def spy(x, rows, columns, powers=False, least=1e-4):
        calls.append((rows, columns, powers, least))
        return inner(x, rows, columns, powers, least)

    monkeypatch.setattr(v3, "quantize", spy)
    monkeypatch.setattr(v3, "quantize_gradient", lambda *args, **how: spy(*args, **how, least=1e-30))
    tile, block, column, small = (1, 128), (128, 128), (128, 1), 1e-30
    layer = v3.FP8Linear(128, 128, bias=False)
    for wide in (False, True):  # the output projection of attention
        calls.clear()
        layer.wide_cache = wide
        layer(torch.randn(128, 128, requires_grad=True)).sum().backward()
        assert sorted(calls[:2]) == [(*tile, wide, 1e-4), (*block, False, 1e-4)]
        assert sorted(calls[2:]) == sorted([(*block, False, 1e-4), (*tile, False, small), (*tile, False, small), (*tile, wide, 1e-4)])
    experts = v3.Experts(2, 128, 128, fp8=True)
    experts.gate_up.data.normal_(), experts.down.data.normal_()
    calls.clear()
    experts(torch.randn(256, 128, requires_grad=True), torch.tensor([100, 256], dtype=torch.int32)).sum().backward()
    forward, backward = calls[:5], calls[5:]
    # the input before dispatch; both matrices; the SwiGLU's output, and its input for the cache
    assert sorted(forward) == sorted([(*tile, True, 1e-4), *[(*block, False, 1e-4)] * 2, *[(*tile, False, 1e-4)] * 2])
    # the gradient before the down-projection keeps its powers along tokens, and so does the input
    assert sorted(backward) == sorted([
        (*tile, True, small), (*block, False, 1e-4), (*column, True, small), (*column, False, 1e-4),
        (*tile, False, small), (*block, False, 1e-4), (*column, False, small), (*column, True, 1e-4),
    ])  # fmt: skip
