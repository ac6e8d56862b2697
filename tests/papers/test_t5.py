"""T5: relative positions, span corruption, UL2, Adafactor, Hugging Face, runs; in the order of the script."""
import importlib.util
import json
import math
import re
import sysconfig
from unittest.mock import MagicMock

import numpy as np
import pytest
import t5
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import live_activations, make_corpora, make_model, run_main

ROW = SCRIPTS["t5"]


def test_relative_positions_initialisation_and_dropout(monkeypatch):
    """Buckets by their first distance. Of standard deviations a cut at two sigma leaves 0.8796."""
    for both, starts in (True, [*range(9), 12, 16, 23, 32, 46, 64, 91]), (False, [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]):
        distance, bias = torch.arange(300)[:, None] - torch.arange(300), t5.RelativePositionBias(3, both)
        buckets = torch.bucketize(distance.abs(), torch.tensor(starts), right=True) - 1
        buckets = torch.where(distance >= 0, buckets, buckets + 16 if both else 0)
        assert torch.equal(bias(300), bias.table.weight[buckets].permute(2, 0, 1)) and bias(300).is_contiguous()
    cfg, limit = t5.Config(vocab_size=1000, dim=200, n_layers=2, n_heads=6, head_dim=25, hidden_dim=300, gated=True, tied=False), math.sqrt(6 / 38)
    model = t5.T5(cfg)
    t5.init_weights(model, cfg)
    sigma = dict(token_embedding=1, q=(200 * 25) ** -0.5, out=150**-0.5, down=300**-0.5) | dict.fromkeys(("k", "v", "gate", "up", "head"), 200**-0.5)
    for name, p in model.named_parameters():
        kind, std = name.split(".")[-2], p.std().item()
        if kind in sigma:
            cut = 0.8796 if kind in ("gate", "up", "down", "head") else 1
            assert std == pytest.approx(cut * sigma[kind], rel=0.02), name
        elif kind == "table":  # uniform
            assert std * math.sqrt(3) == pytest.approx(limit, rel=0.15) and p.abs().max() <= limit, name
        else:
            assert p.ndim == 1 and (p == 1).all(), name
    seen, dropout, attend = [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p * training, *x.shape)) or dropout(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: seen.append(args[4]) or attend(*args, **more))
    t5.T5(t5.Config(**ROW.tiny | dict(dropout=0.25)))(torch.randint(250, (2, 9)), torch.randint(250, (2, 5)))
    (x, hidden_x), (y, hidden_y) = (((0.25, 2, length, 24), (0.25, 2, length, 40)) for length in (9, 5))
    assert seen == [x, *2 * [0.25, x, hidden_x, x], x, y, *2 * [0.25, y, 0.25, y, hidden_y, y], y]


@pytest.mark.parametrize("name, batch, steps, denoiser, targets, flops", [
    ("baseline", 2**16, 2**19, "iid", 192, 956740698), ("t5_11b", 2**20, 10**6, "t5", 114, 40033298807), ("v1_1_xl", 2**20, 10**6, "t5", 114, 9405195394)])
def test_presets_are_the_papers(name, batch, steps, denoiser, targets, flops):
    """FLOPs as torch counts them, less the half of the decoder's square that is not seen."""
    cfg = t5.Config(**t5.PRESETS[name])
    assert (cfg.batch_size * cfg.inputs, cfg.steps, cfg.denoiser, t5.row_lengths(cfg)[1:]) == (batch, steps, denoiser, (512, targets))
    assert (cfg.lr, cfg.z_loss, cfg.rate, cfg.span, round(t5.flops_per_token(cfg))) == (0.01, 1e-4, 0.15, 3.0, flops) and cfg.gated == (cfg.dropout == 0)


@pytest.mark.parametrize("overrides", [dict(), dict(precision="bf16"), dict(gated=True, tied=False, denoiser="iid")])
def test_planned_memory_is_that_of_the_peak(overrides, monkeypatch, capsys):
    """With attention that keeps no scores, as a GPU's."""
    cfg = t5.Config(**ROW.tiny | dict(dim=48, n_layers=6, head_dim=16, hidden_dim=160, inputs=64, seq_len=0, batch_size=64, sentinels=90) | overrides)
    attend, (_, T, U), model = F.scaled_dot_product_attention, t5.row_lengths(cfg), make_model(t5, ROW, cfg)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, bias, p, scale: attend(q, k, v, scale=scale))
    batch = dict(source=torch.ones(64, T).long(), target_in=torch.ones(64, U).long(), targets=torch.ones(64, U).long(), n_targets=64 * U)
    peak = live_activations(model, lambda: t5.objective(model, batch, cfg)[0])[1]
    t5.dry_run(cfg)
    planned = sum(map(float, re.findall(r"(?:gathered|activations) +([\d.]+)", capsys.readouterr().out)))
    assert peak == pytest.approx(planned * 2**30, rel=0.03)


def test_corruption_of_the_specification():
    """Spans are uniform among all compositions: chi squared of 9 degrees, p 0.001. UL2's S hides a suffix; the single span of X moves."""
    for (inputs, rate, span), (length, targets) in {
        (512, 0.15, 3): (568, 114), (32, 0.15, 3): (34, 8), (128, 0.15, 3): (141, 29), (256, 0.15, 3): (284, 58), (64, 0.2, 2): (70, 22),
        (64, 0.2, 1): (63, 27), (512, 0.15, 8): (588, 100), (512, 0.5, 3): (766, 512), (512, 0.5, 8): (908, 512), (512, 0.15, 64): (600, 92),
        (512, 0.5, 64): (1006, 512)}.items():  # fmt: skip
        assert t5.row_lengths(t5.Config(inputs=inputs, rate=rate, span=span))[::2] == (length, targets)
        noise = round(length * rate)
        for seed in range(20):
            mask = t5.span_mask(length, rate, span, np.random.default_rng(seed))
            assert [len(mask), mask[0], mask[-1], mask.sum(), (mask[1:] & ~mask[:-1]).sum()] == [length, False, True, noise, max(round(noise / span), 1)]
    rng = np.random.default_rng(0)
    parts, counts = np.unique([t5.random_parts(6, 3, rng) for _ in range(5000)], axis=0, return_counts=True)
    assert parts.tolist() == [[a, b, 6 - a - b] for a in range(1, 5) for b in range(1, 6 - a)] and ((counts - 500) ** 2 / 500).sum() < 27.9
    text, seen = np.arange(1000, 2006), {}
    for seed in range(20):
        mask = np.random.default_rng(seed).random(511) < 0.15
        whole, few = ([[*ids] for ids in t5.corrupt(text[:511], np.random.default_rng(seed), t5.Config(denoiser="iid", sentinels=n))] for n in (100, 20))
        assert whole == [t5.replace_spans(text[:511], part, 32099).tolist() for part in (mask, ~mask)]
        assert min(i for i in sum(few, []) if i >= 32000) == 32080 + mask[0]
    for seed in range(700):
        inputs, targets = t5.corrupt(text, np.random.default_rng(seed), t5.Config(denoiser="ul2", sentinels=128, sentinel=32127, mode=32128))
        assert len(inputs) < 512 and len(targets) < 512, "EOS has a place"
        hidden, spans = sum(i < 32000 for i in targets), sum(32000 <= i < 32128 for i in inputs)
        seen.setdefault((inputs[0], round(hidden / (len(inputs) - 1 - spans + hidden), 2), spans if spans > 2 else 1), []).append((inputs, targets))
    assert seen.keys() == {(32128, 0.15, 28), (32128, 0.15, 11), (32129, 0.25, 1), (32130, 0.5, 127), (32130, 0.5, 57), (32130, 0.15, 1), (32130, 0.5, 8)}
    assert all(60 < len(rows) < 145 for rows in seen.values())
    for inputs, targets in seen[32129, 0.25, 1]:
        assert inputs[-1] == 32127 and [*inputs[1:-1], *targets[1:]] == text[: len(inputs) + len(targets) - 3].tolist()
    moved = [inputs for inputs, _ in seen[32130, 0.15, 1]]
    assert len({inputs.index(32127) for inputs in moved}) > 30 and any(32126 in inputs and inputs[1] == 32127 for inputs in moved)
    mask = np.repeat([False, True] * 2, [10, 2, 19, 3])
    for mask, ids, first, inputs, targets in (
        (mask, (100, 134), 32099, [*range(100, 110), 32099, *range(112, 131), 32098], [32099, 110, 111, 32098, 131, 132, 133]),
        (np.array([1, 1, 0, 0, 1, 0], bool), (10, 16), 999, [999, 12, 13, 998, 15], [10, 11, 999, 14, 998])):  # fmt: skip
        assert [t5.replace_spans(np.arange(*ids), part, first).tolist() for part in (mask, ~mask)] == [inputs, targets]


@pytest.mark.parametrize("way", [dict(), dict(denoiser="iid"), dict(denoiser="ul2")])
def test_batches(way):
    """Rows end in EOS and targets are behind PAD; those of spans are full and have all of the text."""
    cfg = t5.Config(**ROW.tiny | way | dict(inputs=64, seq_len=0))
    corpus, (length, T, U) = make_corpora(t5, cfg)[0], t5.row_lengths(cfg)
    batch = t5.get_batch(corpus, 3, 8, cfg)
    scored, mask = batch["targets"] >= 0, batch["source"] != cfg.pad
    assert scored.shape == (8, U) and mask.shape == (8, T) and torch.equal(mask, batch.get("source_mask", mask))
    assert batch["n_targets"] == scored.sum() and batch["n_bytes"] == (scored & (batch["targets"] < 256)).sum()
    assert len((batch["source"] > 341).unique(dim=0)) > 1, "all rows have the same spans"
    for row in range(8):
        inputs, targets = batch["source"][row][mask[row]].tolist(), batch["targets"][row][scored[row]].tolist()
        assert inputs[-1] == targets[-1] == cfg.eos and batch["target_in"][row, : len(targets)].tolist() == [cfg.pad, *targets[:-1]]
        text = [i for i in inputs[:-1] + targets[:-1] if i < 342]
        assert way or (len(inputs), len(targets), sorted(text)) == (T, U, sorted(corpus.window(3 + row, length, 0)[:-1]))


@pytest.mark.parametrize("gated, loss, logits, z", [
    (False, 4.8243751, [0.0917766, -0.0080138, -0.0936643], 0.0023563), (True, 4.5082590, [0.7332990, 0.6078949, -0.5901020], 0.0025440)])  # fmt: skip
def test_golden_values(gated, loss, logits, z):
    """The specification's, of Hugging Face in float64 and in the order of its parameters; z is in the loss of training alone."""
    cfg = t5.Config(vocab_size=128, dim=64, n_layers=2, n_heads=4, head_dim=16, hidden_dim=128, dropout=0.0, gated=gated, tied=not gated)
    model = t5.T5(cfg).double()
    parts = ["shared", "encoder", "decoder", "lm_head", "block", "final_layer_norm", "SelfAttention", "EncDecAttention", "DenseReluDense", "layer_norm",
             "q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo", "layer", "weight"]  # fmt: skip
    place = lambda name: [int(part) if part.isdigit() else parts.index(part) for part in name.split(".")]  # noqa: E731
    named = {t5.t5_name(name, gated): p for name, p in model.named_parameters()}
    for k, p in enumerate(named[name] for name in sorted(named, key=place)):
        p.data = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + k).view_as(p) + (p.ndim == 1)
    source, labels = ((torch.arange(24) * 7 + 3) % 120 + 2).view(2, 12), ((torch.arange(12) * 5 + 1) % 120 + 2).view(2, 6)
    labels[1, 5] = -100
    batch = dict(source=source, target_in=F.pad(labels[:, :-1], (1, 0)), targets=labels, n_targets=11, source_mask=torch.arange(12) < torch.tensor([[12], [9]]))
    assert model(source, batch["target_in"], batch["source_mask"])[0, 0, :3].tolist() == pytest.approx(logits, rel=1e-5, abs=1e-7)
    assert t5.objective(model, batch, cfg)[0].item() == pytest.approx(loss + z, rel=1e-5)
    assert torch.no_grad()(t5.objective)(model, batch, cfg)[0].item() == pytest.approx(loss, rel=1e-5)


def test_adafactor_of_the_specification(monkeypatch):
    """A matrix, and a row without gradient, as of a token that does not occur. An update has the rate of its call."""
    monkeypatch.setattr(t5, "dist", MagicMock(get_world_size=lambda: 1))
    monkeypatch.setattr(t5, "objective", lambda model, batch, cfg: (sum((p * g).sum() for p, g in zip(model, batch["gradients"])), {}))
    p, rows = model = torch.nn.ParameterList([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 1)])
    optimizer = t5.build_optimizer(model, t5.Config(lr=1.0))
    for g, new in ([0.1, -0.2, 0.3, 0.4], [0.9787868, 2.03, 2.9715395, 3.97316718]), ([0.05, 0.1, -0.2, 0.3], [0.96450354, 2.01042023, 2.99419044, 3.94987946]):
        batch = dict(targets=p, gradients=[torch.tensor(g).view(2, 2), torch.tensor([[0.0], [1e-8]])])
        t5.update_shards(model, optimizer, [batch], 0.01, t5.Config())
        assert p.flatten().tolist() == pytest.approx(new, rel=0, abs=1e-6)
    assert rows[0] == 1 and rows[1] < 1


@pytest.mark.parametrize("gated", [False, True], ids=["v1.0", "v1.1"])
def test_hugging_face_reads_and_writes_the_same_model(gated, tmp_path):
    """Beyond the last bucket and with padding. A model that transformers 5 has tied is written without a softmax."""
    transformers, cfg = pytest.importorskip("transformers"), t5.Config(**ROW.tiny | dict(gated=gated, tied=not gated))
    ours = make_model(t5, ROW, cfg)
    t5.to_hf(ours, cfg, tmp_path / "ours")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    source, target, mask = torch.randint(250, (3, 140)), torch.randint(250, (3, 130)), torch.arange(140) < torch.tensor([[140], [99], [7]])
    logits = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    assert (ours(source, target, mask) - logits).abs().max() <= 1e-5 * logits.abs().max()
    theirs.lm_head.weight = theirs.shared.weight
    theirs.save_pretrained(tmp_path / "theirs")
    read, found = t5.from_hf(tmp_path / "theirs")
    assert (read.eval()(source, target) - theirs(input_ids=source, decoder_input_ids=target).logits).abs().max() <= 1e-5 * logits.abs().max()
    assert all(getattr(found, field) == getattr(cfg, field) for field in t5.SHAPE)
    assert not gated or not read.head.weight.is_set_to(read.token_embedding.weight)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key, value in dict(feed_forward_proj="gelu", num_decoder_layers=9, decoder_start_token_id=0, relative_attention_num_buckets=16, d_kv=5).items():
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"holds no T5For.*{'shape' if key == 'd_kv' else key}"):
            t5.from_hf(tmp_path / "ours")


@pytest.mark.parametrize("flags, tolerance", [("--precision bf16", 0.02), ("--denoiser iid", 1e-4), ("--denoiser ul2", 1e-4)])
def test_runs_of_one_rank_and_of_two(ranks, tmp_path, flags, tolerance):
    flags += f" --data {sysconfig.get_paths()['stdlib']}/asyncio --val_batches 1 --log_every 1 --timeout 30 --batch_size 4 --inputs 64 --dim 48"
    runs = [(1, "--steps 30 --recompute block"), (2, "--steps 6 --micro_batch 1")]
    if importlib.util.find_spec("safetensors"):
        runs = [runs[0], (2, f"{runs[1][1]} --export {tmp_path}/hf"), (2, f"--eval --init {tmp_path}/hf")]
    flags += " --preset demo --hidden_dim 64 --lr 0.03 --ramp_down 0 "
    statuses, outputs, errors = zip(*(ranks.run(n, run_main, "t5", (flags + more).split(), timeout=120)[0] for n, more in runs))
    assert not any(statuses), errors
    losses = [[float(loss) for loss in re.findall(r"^step .*? loss ([\d.]+)", output, re.M)] for output in outputs]
    assert len(losses[0]) == 30 and losses[0][0] - sum(losses[0][-5:]) / 5 > 1.5 and "⟦" in outputs[0]
    assert losses[1] == pytest.approx(losses[0][:6], rel=tolerance)
    assert len(runs) == 2 or outputs[2].split("val 0")[1][:14] == outputs[1].split("val 6")[1][:14]


def test_fills_in_the_prompt(monkeypatch, capsys):
    """Greedy answers stand in place of the sentinels, at the end without one; special ids count down from the tokenizer's last one."""
    cfg = t5.Config(**ROW.tiny | dict(denoiser="ul2", sentinels=100))
    tokenizer = t5.load_vocabulary(cfg, is_text=True)
    assert (cfg.eos, cfg.pad, cfg.mode, cfg.sentinel, cfg.vocab_size) == (256, 257, 258, 360, 384)
    model = make_model(t5, ROW, cfg)
    ids = t5.sample(model, [5, 6, 256], 4, cfg)
    assert ids == model(torch.tensor([[5, 6, 256]]), torch.tensor([[257, *ids[:-1]]]))[0].argmax(-1).tolist()
    monkeypatch.setattr(t5, "sample", lambda *_: [*b"lost", 360, *b"old", 359, 380, *b"son", 257, 256])
    for text, shown, filled in ("an <extra_id_0> man <extra_id_1>.",) * 2 + ("an ⟦old⟧ man ⟦son⟧.",), ("an ", "an <extra_id_0>", "an ⟦old⟧"):
        t5.fill_spans(model, text, make_corpora(t5, cfg)[1], tokenizer, cfg)
        assert capsys.readouterr().out == f"[R]{shown}\n---\n[R]{filled}\n"
    with pytest.raises(ValueError, match=r"t5-small has PAD, EOS \(0, 1\)"):
        t5.load_stream(t5.Config(init="t5-small"))
