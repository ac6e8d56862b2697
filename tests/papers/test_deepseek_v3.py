"""DeepSeek-V3's specification, in the order of the script: its worked examples W1 to W8, and what only this script has."""
import dataclasses

import deepseek_v3 as v3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import make_model

ROW = SCRIPTS["deepseek_v3"]


def tiny(**overrides):
    return v3.Config(**{**ROW.tiny, **overrides})


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_w8_phases_yarn_and_sizes():
    """Parameters are those that a token activates, embedding included, and those of multi-token prediction."""
    cfg = v3.Config(**v3.PRESETS["671b"], pp=16, ep=64, dp=2)
    ends, phases = zip(*v3.plan(cfg))
    assert [phase.batch_size for phase in phases[:2]] == [3072, 3200]
    sizes = [(phase.seq_len, phase.batch_size, phase.rope_factor) for phase in phases[-3:]]
    assert sizes == [(4096, 15360, 1.0), (32768, 1920, 40.0), (131072, 480, 40.0)]
    assert [v3.plan(dataclasses.replace(cfg, seq_len=n))[-1][1].rope_original for n in (2048, 4096)] == [2048, 4096]
    assert np.diff(ends[-3:]).tolist() == [1000 * 62_914_560] * 2
    assert ends[-4] == pytest.approx(469e9, rel=1e-3) and ends[-3] == pytest.approx(14.8e12, rel=1e-5)
    ramp = dataclasses.replace(cfg, batch_multiple=1)
    assert v3.planned_updates(0, 469e9, ramp) == pytest.approx(14_997, rel=2e-3)
    assert v3.planned_updates(0, 14.8e12, ramp) == pytest.approx(242_800, rel=2e-3)
    for tokens, weight, gamma in ((9.99e12, 0.3, 0.001), (10.01e12, 0.1, 0.001), (14.29e12, 0.1, 0.001), (14.31e12, 0.1, 0.0)):
        now = v3.current_phase(tokens, cfg)
        assert (now.mtp_weight, now.gamma) == (weight, gamma)
    lite = v3.Config(**v3.PRESETS["16b"])
    for share, factor in ((0.5, 1.0), (0.79, 1.0), (0.81, 0.316), (0.91, 0.316**2)):
        assert v3.learning_rate(share * 1.33e12, lite) == pytest.approx(factor * 4.2e-4)
    for preset, activated, mtp in (("671b", 37_552_282_624, 11_610_067_968), ("16b", 2_661_150_208, 593_242_624)):
        with torch.device("meta"):
            model = v3.DeepSeekV3(v3.Config(**v3.PRESETS[preset]))
        assert v3.count_parameters(model)[1] == activated and sum(p.numel() for p in model.mtp.parameters()) == mtp
    plain, yarn = (v3.yarn_frequencies(64, 1e4, factor, 4096) for factor in (1.0, 40.0))
    for j, (before, after) in {10: (0.0562341, 0.0562341), 11: (0.0421697, 0.0390069), 16: (0.01, 0.0055),
                               23: (1.333521e-3, 3.333804e-5), 31: (1.333521e-4, 3.333804e-6)}.items():  # fmt: skip
        assert plain[j].item() == pytest.approx(before, rel=1e-5) and yarn[j].item() == pytest.approx(after, rel=1e-5)
    model = v3.DeepSeekV3(tiny(head_dim=128, rope_dim=64, rope_factor=40.0))
    assert model.blocks["0"].attn.scale == pytest.approx(0.13523378, abs=1e-8) == model.mtp.block.attn.scale


def test_w1_routing():
    s = torch.tensor([[0.90, 0.10, 0.20, 0.60, 0.55, 0.50, 0.70, 0.65, 0.05, 0.80, 0.30, 0.15]], requires_grad=True)
    for bias, n_groups, experts, weights in (
        ([0.0] * 12, 4, [3, 4, 6, 7], [0.60, 0.55, 0.70, 0.65]),
        ([0.0] * 12, 1, [0, 6, 7, 9], [2.5 * x / 3.05 for x in (0.9, 0.7, 0.65, 0.8)]),  # not in the specification
        ([0.0] * 5 + [0.20, -0.10, -0.12] + [0.0] * 4, 4, [3, 4, 5, 6], [0.638298, 0.585106, 0.531915, 0.744681]),
        ([-1.5] * 12, 4, [3, 4, 6, 7], [0.60, 0.55, 0.70, 0.65]),  # a dropped group must stay below biased scores under 0
    ):  # fmt: skip
        bias = torch.tensor(bias, requires_grad=True)
        found, gates = v3.route(s, bias, 4, n_groups, min(n_groups, 2), 2.5)
        assert dict(zip(found[0].tolist(), gates[0].tolist())) == pytest.approx(dict(zip(experts, weights)), abs=1e-6)
    gates.square().sum().backward()
    assert bias.grad is None and s.grad.any(), "the bias only selects"


def test_w2_w3_balance(monkeypatch):
    s = torch.tensor([[[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.2], [0.1, 0.2, 0.9, 0.8], [0.6, 0.1, 0.2, 0.7]]])
    assert v3.sequence_balance(s, 2).item() == pytest.approx(1.04375, rel=1e-6)
    monkeypatch.setattr(v3.dist, "all_reduce", lambda loads: None)
    router = v3.Router(6, 6, 2, 1, 1, 1.0)
    router.load.copy_(torch.tensor([10.0, 6, 8, 8, 12, 4]))
    assert v3.update_biases({0: router}, 0.001, torch.zeros(1, 6)).tolist() == [[1.25, 0.75, 1, 1, 1.5, 0.5]]
    torch.testing.assert_close(router.bias, torch.tensor([-0.001, 0.001, 0, 0, -0.001, 0.001]))
    assert not router.load.any()


def test_w8_multi_token_prediction():
    """T = 6: five terms divided by six, and the balance losses of four layers."""
    cfg = tiny(balance_loss=0.5, mtp_weight=0.3)
    model, affinities = make_model(v3, ROW, cfg), []
    x = torch.randint(250, (7,), generator=torch.Generator().manual_seed(0))
    state = model.final_norm(model.run_blocks(model.embed(x[None, :6]), 0.0)[0])
    mtp_state, _ = model.mtp(state, model.embed(x[None, :6]), *model.rope(state))
    main, mtp = (model.logits(h).double().log_softmax(-1)[0] for h in (state, mtp_state))
    first = -sum(main[i, x[i + 1]] for i in range(6)).item() / 6
    second = -sum(mtp[i, x[i + 2]] for i in range(5)).item() / 6
    for router in v3.routers(model).values():
        router.register_forward_hook(lambda m, inputs, _: affinities.append(torch.sigmoid(inputs[0] @ m.weight.T)))
    batch = {"tokens": x[None, :-1], "targets": x[None, 1:], "n_targets": 6, "n_sequences": 2}  # with another sequence, of another rank
    loss, metrics = v3.objective(model, batch, cfg)
    balance = 0.5 / 2 * sum(v3.sequence_balance(s, 3) for s in affinities).item()
    assert metrics["main"].item() == pytest.approx(first, rel=1e-5) and metrics["mtp"].item() == pytest.approx(second, rel=1e-5)
    assert loss.item() == pytest.approx(first + 0.3 * second + balance, rel=1e-5) and balance > 0.1


def packed(texts, length, n, fim):
    ids = np.concatenate([[*text.encode(), 256] for text in texts])
    corpus = v3.Corpus([("", ids)], 0, len(ids), 256, np.ones(260, np.int64), in_order=False)
    return corpus, v3.pack(corpus, 0, length, n, fim, (257, 258, 259), 0)


def test_packs_best_fit_and_fills_in_the_middle():
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(97, 122, n))) for n in generator.integers(2, 60, 2000)]
    corpus, rows = packed(texts, 63, 64, 0.0)
    stretch = corpus.window(0, 64 * 64 - 1, 0)
    assert rows.shape == (64, 64) and sorted(rows.flatten()) == sorted(stretch), "every token of the stretch once"
    split = lambda ids: [bytes(part.astype(np.uint8)) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)]  # noqa: E731
    pieces = {piece for row in rows for piece in split(row)}
    cut = sum(document not in pieces for document in split(stretch)[1:-1])
    assert cut < sum(stretch[64 * i + 63] != 256 for i in range(64)) / 2, "half as many as without packing"
    _, rows = packed([f"document {i}, whose text is unlike all others: {i * i}." for i in range(3000)], 299, 256, 0.1)
    assert 0.07 < (rows == 257).sum() / (rows == 256).sum() < 0.13
    ids, cuts = np.array([*b"some text", 256]), set()
    for key in range(200):
        out = v3.fill_in_the_middle(ids, (257, 258, 259), key).tolist()
        hole, end = out.index(258), out.index(259)
        assert out[0] == 257 and out[-1] == 256
        assert bytes(out[1:hole] + out[end + 1 : -1] + out[hole + 1 : end]) == b"some text"
        cuts.add((hole - 1, end - hole - 1))
    assert len(cuts) > 40 and (0, 0) in cuts and {a + b for a, b in cuts} >= {0, 9}, "the cuts vary, ends included"


def test_w4_w5_w7_e4m3_tiles_and_products():
    x = 3.5 * torch.arange(1, 129) / 128
    codes, scales = v3.quantize(x[None], 1, 128)
    back = v3.dequantize(codes, scales)[0]
    assert scales[0].tolist() == [2**-7] and codes[0, :8].float().tolist() == [3.5, 7, 10, 14, 18, 20, 24, 28]
    assert back[:8].tolist() == [0.02734375, 0.0546875, 0.078125, 0.109375, 0.140625, 0.15625, 0.1875, 0.21875]
    relative = (back - x).abs() / x
    assert relative.argmax() == 38 and relative.max().item() == pytest.approx(0.054945, abs=1e-6) and back[38] == 1.125
    assert relative.mean().item() == pytest.approx(0.022131, abs=1e-6)
    tile = F.pad(torch.tensor([[1, 0.5, 0.3, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6]]), (0, 119))
    for powers, scale, expected in ((False, 1 / 448, [448, 224, 128, 44, 4.5, 0.4375, 0.04296875, 0.00390625, 0]),
                                    (True, 2**-8, [256, 128, 80, 26, 2.5, 0.25, 0.025390625, 0.001953125, 0])):  # fmt: skip
        codes, scales = v3.quantize(tile, 1, 128, powers)
        assert scales[0, 0].item() == pytest.approx(scale) and codes[0, :9].float().tolist() == expected
    tile[0, 100] = 1000.0
    assert (v3.dequantize(*v3.quantize(tile, 1, 128))[0, 5:9] == 0).all()
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    for powers, changed in ((True, 0.0), (False, 0.99)):
        once = v3.dequantize(*v3.quantize(x, 1, 128, powers))
        twice = v3.dequantize(*v3.quantize(once.T, 1, 128, powers)).T
        assert (once != twice).float().mean().item() == pytest.approx(changed, abs=0.02)
    w = torch.randn(200, 300)  # a ragged edge is padded; blocks may be transposed
    for part, transposed in zip(v3.quantize(w, 128, 128), v3.quantize(w.T, 128, 128)):
        assert torch.equal(part.float(), transposed.float().T)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 4096, generator=generator), 0.006 * torch.randn(512, 4096, generator=generator)
    tiles, blocks = v3.quantize(x, 1, 128), v3.quantize(w, 128, 128)
    assert 0.02 < error(v3.dequantize(*tiles), x) < 0.03 and 0.02 < error(v3.dequantize(*blocks), w) < 0.03
    assert 0.035 < error(v3.fprop(tiles, blocks, torch.float32), x @ w.T) < 0.04


def fp8_layers(counts):
    """Outputs and gradients of an FP8 linear layer and of FP8 experts, of sizes that are no multiples of 16, and of what they replace."""
    torch.manual_seed(0)
    x, dy = torch.randn(50, 164), torch.randn(50, 212)
    rows, gates, dz = torch.randn(sum(counts), 40), torch.rand(sum(counts)), torch.randn(sum(counts), 40)
    linear, experts = v3.Linear(164, 212, bias=False), v3.Experts(len(counts), 40, 72)
    for p in experts.parameters():
        p.data.normal_(0, 0.1)
    results = []
    for layer, more in ((v3.FP8Linear(linear.weight, False), v3.FP8Experts(experts.gate_up, experts.down)), (linear, experts)):
        inputs = [t.clone().requires_grad_() for t in (x, rows, gates)]
        weights = [linear.weight, experts.gate_up, experts.down]
        outputs = layer(inputs[0]), more(*inputs[1:], torch.tensor(counts))
        results.append([*outputs, *torch.autograd.grad(outputs, [*inputs, *weights], (dy, dz))])
    return results


def test_fp8_layers(monkeypatch):
    """They follow exact ones; F.scaled_mm on Hopper gets the layouts that it takes, and gives the emulation's bits."""
    counts = [128, 0, 193, 31, 69]
    coded, exact = fp8_layers(counts)
    for found, expected in zip(coded, exact):
        assert 0.01 < error(found, expected) < 0.1
    assert not coded[6][1].any() and not coded[7][1].any(), "an expert without tokens has no gradient"
    tile, block, kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128, []

    def kernel(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
        kinds.append((kind_a, kind_b))
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.T.is_contiguous()
        assert not any(size % 16 for size in (*a.shape, *b.shape)) and a.shape[1] % 128 == 0
        scales = []
        for codes, scale, kind in ((a, scale_a, kind_a), (b.T, scale_b, kind_b)):
            k = codes.shape[1] // 128
            if kind == tile:
                assert scale.shape == (len(codes), k) and (scale.stride() == (1, len(codes)) or k == 1)
            else:
                assert scale.shape == (k + -k % 4, len(codes) // 128) and scale.T.is_contiguous()
                scale = scale[:k].T
            scales.append(scale)
        return (v3.dequantize(a, scales[0]) @ v3.dequantize(b.T, scales[1]).T).to(output_dtype)

    monkeypatch.setattr(v3, "has_fp8_kernels", lambda device: True)
    monkeypatch.setattr(F, "scaled_mm", kernel)
    assert all(map(torch.equal, fp8_layers(counts)[0], coded))
    assert [kinds.count((tile, block)), kinds.count((tile, tile))] == [18, 9], "of four experts, two matrices each, and of a layer"


def test_quantizes_as_the_recipe_says(monkeypatch):
    """Power-of-two scales and floor of every cast of an expert, and of attention's inputs; a weight's codes are made once per update."""
    calls, inner = [], v3.quantize
    spy = lambda x, rows, columns, powers=False, least=1e-4: calls.append((rows, powers, least)) or inner(x, rows, columns, powers, least)  # noqa: E731
    monkeypatch.setattr(v3, "quantize", spy)
    monkeypatch.setattr(v3, "quantize_gradient", lambda *args: spy(*args, least=1e-30))
    experts = v3.FP8Experts(torch.nn.Parameter(torch.randn(1, 256, 128)), torch.nn.Parameter(torch.randn(1, 128, 128)))
    for weights in ([(128, False, 1e-4)] * 2, []):
        y = experts(torch.randn(128, 128, requires_grad=True), torch.rand(128), torch.tensor([128]))
        assert calls == [*weights, (1, True, 1e-4), (1, False, 1e-4)], "the input before dispatch; the SwiGLU's output"
        calls.clear()
        y.sum().backward()
        # by down, then by gate_up: the gradient for dgrad, and for wgrad with the input
        assert calls == [(1, True, 1e-30)] * 2 + [(1, False, 1e-4)] + [(1, False, 1e-30)] * 2 + [(1, True, 1e-4)]
        calls.clear()
    attention = v3.MultiHeadLatentAttention(24, 3, 20, 28, 10, 6)
    v3.use_fp8(torch.nn.Sequential(attention))
    attention(torch.randn(1, 5, 24), torch.ones(5, 3), torch.zeros(5, 3))
    assert [powers for rows, powers, _ in calls if rows == 1] == [False] * 4 + [True], "q_down, q_up, kv_down, kv_up, and the output projection"


def test_first_pipeline_stage_passes_a_balance_loss_in_fp32_on():
    """Also if it has dense blocks alone, under bf16: the next stage's buffer is fp32."""
    model = make_model(v3, ROW, tiny(n_layers=2, n_dense=2, mtp=False)).bfloat16()
    model.dtype, model.head = torch.bfloat16, None
    x, balance = v3.PipelinePart(model)(tokens=torch.arange(22).view(2, 11), targets=None)
    assert (x.dtype, balance.dtype) == (torch.bfloat16, torch.float32) and balance.requires_grad
