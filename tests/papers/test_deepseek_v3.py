"""DeepSeek-V3's specification, in the order of the script: its worked examples W1 to W8, and what only this script has."""
import collections
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import make_model, run_main
from torch.utils._python_dispatch import TorchDispatchMode

import deepseek_v3 as v3

ROW = SCRIPTS["deepseek_v3"]
S12 = [0.90, 0.10, 0.20, 0.60, 0.55, 0.50, 0.70, 0.65, 0.05, 0.80, 0.30, 0.15]


@pytest.fixture(autouse=True)
def alone():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tiny(**overrides):
    return v3.Config(**{**ROW.tiny, **overrides})


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


# Config


def test_w8_phases():
    cfg = v3.Config(**v3.PRESETS["671b"], pp=16, ep=64, dp=2)
    ends, phases = zip(*v3.plan(cfg))
    assert [phase.batch_size for phase in phases[:2]] == [3072, 3200] and phases[-3].batch_size == 15360
    assert [(phase.seq_len, phase.batch_size, phase.rope_factor) for phase in phases[-3:]] == [
        (4096, 15360, 1.0), (32768, 1920, 40.0), (131072, 480, 40.0)]  # fmt: skip
    assert [b - a for a, b in itertools.pairwise(ends[-3:])] == [1000 * 62_914_560] * 2
    assert ends[-4] == pytest.approx(469e9, rel=1e-3) and ends[-3] == pytest.approx(14.8e12, rel=1e-5)
    ramp = v3.dataclasses.replace(cfg, batch_multiple=1)
    assert v3.count_updates(0, 469e9, ramp) == pytest.approx(14_997, rel=2e-3)
    assert v3.count_updates(0, 14.8e12, ramp) == pytest.approx(242_800, rel=2e-3)
    for tokens, weight, gamma in ((9.99e12, 0.3, 0.001), (10.01e12, 0.1, 0.001), (14.29e12, 0.1, 0.001), (14.31e12, 0.1, 0.0)):
        now = v3.phase_at(tokens, cfg)
        assert (now.mtp_weight, now.gamma) == (weight, gamma)
    lite = v3.Config(**v3.PRESETS["16b"])
    for share, factor in ((0.5, 1.0), (0.79, 1.0), (0.81, 0.316), (0.91, 0.1)):
        assert v3.learning_rate(share * 1.33e12, lite) == pytest.approx(factor * 4.2e-4)


def test_steps_cut_the_plan_and_another_batch_ends_at_the_same_tokens():
    cfg = tiny(batch_size=4, tokens=1e6, steps=10, seq_len=16)
    ((end, _),) = v3.plan(cfg)
    assert end == 640
    for size, updates in ((8, 3), (2, 10)):  # after 4 updates of 4
        assert v3.count_updates(256, end, tiny(batch_size=size, tokens=1e6, seq_len=16)) == updates * 1 + (size == 2) * 2


# Model


def test_w8_yarn():
    plain, yarn = (v3.yarn_frequencies(64, 1e4, factor, 4096) for factor in (1.0, 40.0))
    for j, (before, after) in {10: (0.0562341, 0.0562341), 11: (0.0421697, 0.0390069), 16: (0.01, 0.0055),
                               23: (1.333521e-3, 3.333804e-5), 31: (1.333521e-4, 3.333804e-6)}.items():  # fmt: skip
        assert plain[j].item() == pytest.approx(before, rel=1e-5) and yarn[j].item() == pytest.approx(after, rel=1e-5)
    assert v3.yarn_scales(1.0, 1.0, 1.0) == (1.0, 1.0)
    rotary, scores = v3.yarn_scales(40.0, 1.0, 1.0)
    assert rotary == 1.0 and scores == pytest.approx(1.3688879**2, abs=1e-6)
    model = v3.DeepSeekV3(tiny(head_dim=128, rope_dim=64, rope_factor=40.0))
    assert model.blocks["0"].attn.scale == pytest.approx(0.13523378, abs=1e-8) == model.mtp.block.attn.scale


@pytest.mark.parametrize("bias, experts, weights", [
    ([0] * 12, [3, 4, 6, 7], [0.60, 0.55, 0.70, 0.65]),
    ([0] * 5 + [0.20, -0.10, -0.12] + [0] * 4, [3, 4, 5, 6], [0.638298, 0.585106, 0.531915, 0.744681]),
])  # fmt: skip
def test_w1_routing(bias, experts, weights):
    s = torch.tensor([S12, S12[::-1]], requires_grad=True)
    found, gates = v3.route(s, torch.tensor(bias).float(), 4, 4, 2, 2.5)
    order = found[0].argsort()
    assert found[0][order].tolist() == experts
    torch.testing.assert_close(gates[0][order], torch.tensor(weights), atol=1e-6, rtol=0)
    alone, _ = v3.route(s, torch.zeros(12), 4, 1, 1, 2.5)
    assert sorted(alone[0].tolist()) == [0, 6, 7, 9], "without groups"
    negative = torch.full((12,), -1.5, requires_grad=True)  # a dropped group must stay below biased scores under 0
    found, gates = v3.route(s, negative, 4, 4, 2, 1.0)
    assert sorted(found[0].tolist()) == [3, 4, 6, 7]
    gates.square().sum().backward()
    assert negative.grad is None and s.grad.any(), "the bias only selects"


def test_w3_sequence_balance():
    s = torch.tensor([[[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.2], [0.1, 0.2, 0.9, 0.8], [0.6, 0.1, 0.2, 0.7]]], requires_grad=True)
    loss = v3.sequence_balance(s, 2)
    assert loss.item() == pytest.approx(1.04375, rel=1e-6)
    assert v3.sequence_balance(torch.cat((s, s)), 2).item() == pytest.approx(2 * 1.04375, rel=1e-6), "a sum over sequences"
    loss.backward()
    f, every = torch.tensor([1.5, 1.0, 0.5, 1.0]), s.detach()[0]
    total = every.sum(-1, keepdim=True)
    expected = (f / total - (f * every).sum(-1, keepdim=True) / total**2) / 4  # f is no function of s
    torch.testing.assert_close(s.grad[0], expected)


def test_experts_are_gated_sums():
    """Eq. 12, token by token in float64; the balance loss is that of all affinities."""
    torch.manual_seed(0)
    moe = v3.MoE(24, 16, 12, 2, 3, 4, 2, 2.5)
    for p in moe.parameters():
        p.data.normal_(0, 0.2)
    x = torch.randn(2, 5, 24)
    y, balance = moe(x)
    s = torch.sigmoid(x @ moe.router.weight.T)
    experts, gates = v3.route(s, moe.router.bias, 3, 4, 2, 2.5)
    swiglu = lambda u, gate_up, down: (F.silu(u @ gate_up[:16].T) * (u @ gate_up[16:].T)) @ down.T  # noqa: E731
    for b, t in itertools.product(range(2), range(5)):
        u = x[b, t].double()
        expected = moe.shared.double()(u) if b + t == 0 else moe.shared(u)
        for i, g in zip(experts[b, t], gates[b, t]):
            expected = expected + g * swiglu(u, moe.experts.gate_up[i].double(), moe.experts.down[i].double())
        torch.testing.assert_close(y[b, t].double(), expected, atol=1e-5, rtol=1e-5)
    assert balance.item() == pytest.approx(v3.sequence_balance(s, 3).item(), rel=1e-6)


def test_w8_multi_token_prediction():
    """T = 6: five terms divided by six; position i sees tokens up to i + 1."""
    cfg = tiny(balance_loss=0.0, mtp_weight=0.3)
    model = make_model(v3, ROW, cfg)
    x = torch.randint(250, (1, 7), generator=torch.Generator().manual_seed(0))

    def logits(tokens):
        state = model.final_norm(model.run_blocks(model.embed(tokens), 0.0)[0])
        ahead, _ = model.mtp(state, model.embed(tokens), *model.rope(state))
        return model.logits(state).double().log_softmax(-1)[0], model.logits(ahead).double().log_softmax(-1)[0]

    batch = {"tokens": x[:, :-1], "targets": x[:, 1:], "n_targets": 6, "n_sequences": 1}
    loss, metrics = v3.objective(model, batch, cfg)
    main, ahead = logits(x[:, :6])
    assert main.shape[0] == 6 and ahead.shape[0] == 5
    first = -sum(main[i, x[0, i + 1]] for i in range(6)).item() / 6
    second = -sum(ahead[i, x[0, i + 2]] for i in range(5)).item() / 6
    assert metrics["main"].item() == pytest.approx(first, rel=1e-5) and metrics["mtp"].item() == pytest.approx(second, rel=1e-5)
    assert loss.item() == pytest.approx(first + 0.3 * second, rel=1e-5)
    for j in range(6):
        changed = x[:, :6].clone()
        changed[0, j] = (changed[0, j] + 1) % 250
        moved = ((logits(changed)[1] - ahead).abs() > 1e-5).any(-1)
        assert moved.tolist() == [i + 1 >= j for i in range(5)]
    loss.backward()
    shared = [model.token_embedding.weight.grad.clone(), model.head.weight.grad.clone()]
    model.zero_grad()
    F.cross_entropy(model(x[:, :6])[0], x[0, 1:]).backward()
    for p, g in zip((model.token_embedding.weight, model.head.weight), shared):
        assert not torch.allclose(p.grad, g), "the module's gradients reach embedding and head"


# Data


def packed(texts, length, n, fim):
    tokenizer = v3.load_tokenizer("bytes", v3.SPECIALS)
    documents = v3.tokenize(((str(i), text) for i, text in enumerate(texts)), tokenizer, 256)
    ids = np.concatenate([ids for _, ids in documents])
    corpus = v3.Corpus([ids], 0, len(ids), 256, np.ones(260, np.int64), in_order=False)
    return corpus, v3.pack(corpus, 0, length, n, fim, (257, 258, 259), 0)


def test_packs_best_fit():
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(97, 122, n))) for n in generator.integers(2, 60, 2000)]
    corpus, rows = packed(texts, 63, 64, 0.0)
    assert rows.shape == (64, 64) and (rows >= 0).all(), "no gap and no padding"
    stretch = corpus.window(0, 64 * 64 - 1, 0)
    assert sorted(rows.flatten()) == sorted(stretch), "every token of the stretch once"
    split = lambda ids: [bytes(part.astype(np.uint8)) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)]  # noqa: E731
    whole = {piece for row in rows for piece in split(row)}
    cut = sum(document not in whole for document in split(stretch)[1:-1])
    assert cut < sum(stretch[64 * i + 63] != 256 for i in range(64)) / 2, "half as many as without packing"


def test_fills_in_the_middle():
    texts = [f"document {i}, whose text is unlike all others: {i * i}." for i in range(3000)]
    _, rows = packed(texts, 299, 256, 0.1)
    assert (rows == 257).sum() == (rows == 258).sum() == (rows == 259).sum()
    assert 0.07 < (rows == 257).sum() / (rows == 256).sum() < 0.13
    assert not (packed(texts, 299, 256, 0.0)[1] > 256).any()
    ids, cuts = np.array([*b"some text", 256]), set()
    for key in range(200):
        out = v3.fill_in_the_middle(ids, (257, 258, 259), key).tolist()
        hole, end = out.index(258), out.index(259)
        assert out[0] == 257 and out[-1] == 256
        assert bytes(out[1:hole] + out[end + 1 : -1] + out[hole + 1 : end]) == b"some text"
        cuts.add((hole - 1, end - hole - 1))
    assert len(cuts) > 40 and (0, 0) in cuts and {a + b for a, b in cuts} >= {0, 9}, "the cuts vary, ends included"


@pytest.mark.parametrize("flags, borders, rearranged", [("", 0, 0), ("--eos_id 10", 1, 0), ("--eos_id 10 --fim_ids 7,8,9", 1, 1)])
def test_documents_on_shards_have_borders_that_flags_name(flags, borders, rearranged, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.resize(np.arange(10, 40, dtype=np.uint16), 3000))
    cfg, _ = v3.parse(["--data", str(tmp_path), "--vocab_size", "40", "--seq_len", "16", "--batch_size", "4", "--first_batch", "4",
                       "--long=", *flags.split()])  # fmt: skip
    v3.check(v3.fit_layout(cfg, 1), 1)
    _, corpus, _ = v3.load_documents(cfg)
    out = capsys.readouterr().out
    assert ("no borders" not in out, "no document is rearranged" not in out) == (bool(borders), bool(rearranged))
    tokens = torch.cat([v3.get_batch(corpus, 0, 100, v3.dataclasses.replace(cfg, fim=0.5))["tokens"]])
    assert bool((tokens == 7).any()) == bool(rearranged)


# Objective and optimizer


def test_balance_loss_is_in_value_and_gradient():
    cfg = tiny(mtp=False, balance_loss=0.5)
    model, x = make_model(v3, ROW, cfg), torch.randint(250, (4, 12))
    batch = {"tokens": x[:, :-1], "targets": x[:, 1:], "n_targets": 44, "n_sequences": 8}  # half of a global batch
    affinities = []
    for router in v3.routers(model):
        router.register_forward_hook(lambda m, inputs, _: affinities.append(torch.sigmoid(inputs[0] @ m.weight.T)))
    loss, metrics = v3.objective(model, batch, cfg)
    loss.backward()
    found = [router.weight.grad.clone() for router in v3.routers(model)]
    balance = sum(0.5 / 8 * v3.sequence_balance(s, cfg.top_k) for s in affinities)
    assert len(affinities) == 3 and (loss - metrics["main"]).item() == pytest.approx(balance.item(), rel=1e-4)
    model.zero_grad()
    affinities.clear()
    nats = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
    (nats / 44 + sum(0.5 / 8 * v3.sequence_balance(s, cfg.top_k) for s in affinities)).backward()
    for router, gradient in zip(v3.routers(model), found):
        torch.testing.assert_close(router.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_w2_bias_step():
    v3.init_distributed(30)
    router = v3.Router(6, 6, 2, 1, 1, 1.0)
    router.load.copy_(torch.tensor([10.0, 6, 8, 8, 12, 4]))
    assert v3.update_biases([router], 0.001, None).tolist() == [[1.25, 0.75, 1, 1, 1.5, 0.5]]
    torch.testing.assert_close(router.bias, torch.tensor([-0.001, 0.001, 0, 0, -0.001, 0.001]))
    assert not router.load.any()


# Precision


def test_w4_e4m3_tiles():
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


def test_w5_tiles_along_tokens():
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    for powers, changed in ((True, 0.0), (False, 0.99)):
        once = v3.dequantize(*v3.quantize(x, 1, 128, powers))
        twice = v3.dequantize(*v3.quantize(once.T, 1, 128, powers)).T
        assert (once != twice).float().mean().item() == pytest.approx(changed, abs=0.02)
    w = torch.randn(200, 300)  # a ragged edge is padded; blocks may be transposed
    for part, transposed in zip(v3.quantize(w, 128, 128), v3.quantize(w.T, 128, 128)):
        assert torch.equal(part.float(), transposed.float().T)


def test_w7_products():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 4096, generator=generator), 0.006 * torch.randn(512, 4096, generator=generator)
    tiles, blocks = v3.quantize(x, 1, 128), v3.quantize(w, 128, 128)
    assert 0.02 < error(v3.dequantize(*tiles), x) < 0.03 and 0.02 < error(v3.dequantize(*blocks), w) < 0.03
    found = v3.fprop(tiles, blocks, torch.float32)
    assert 0.035 < error(found, x @ w.T) < 0.04
    slices = sum(  # as the tensor cores have it, by slices of 128
        tiles[0][:, k : k + 128].float() @ blocks[0][:, k : k + 128].float().T
        * tiles[1][:, k // 128, None] * blocks[1][:, k // 128].repeat_interleave(128)
        for k in range(0, 4096, 128)
    )  # fmt: skip
    torch.testing.assert_close(found, slices, atol=1e-5, rtol=1e-5)


def fp8_layers(counts):
    """Outputs and gradients of an FP8 linear layer and of FP8 experts, ragged sizes, and of what they replace."""
    torch.manual_seed(0)
    x, dy = torch.randn(50, 160), torch.randn(50, 208)
    rows, gates, dz = torch.randn(sum(counts), 48), torch.rand(sum(counts)), torch.randn(sum(counts), 48)
    linear, experts = v3.Linear(160, 208, bias=False), v3.Experts(len(counts), 48, 80)
    for p in experts.parameters():
        p.data.normal_(0, 0.1)
    results = []
    for layer, more in ((v3.FP8Linear(linear.weight), v3.FP8Experts(experts.gate_up, experts.down)), (linear, experts)):
        inputs = [t.clone().requires_grad_() for t in (x, rows, gates)]
        weights = [linear.weight, experts.gate_up, experts.down]
        outputs = layer(inputs[0]), more(*inputs[1:], torch.tensor(counts))
        results.append([*outputs, *torch.autograd.grad(outputs, [*inputs, *weights], (dy, dz))])
    return results


def test_fp8_layers_follow_exact_ones():
    coded, exact = fp8_layers([7, 0, 193, 31, 69])
    for found, expected in zip(coded, exact):
        assert 0.01 < error(found, expected) < 0.1
    assert not coded[6][1].any() and not coded[7][1].any(), "an expert without tokens has no gradient"
    coded, _ = fp8_layers([0, 0])
    assert coded[1].shape == (0, 48) and not coded[6].any(), "a rank whose experts get no token"


def test_fp8_kernels_get_the_layouts_that_they_take(monkeypatch):
    """F.scaled_mm on Hopper: row-major by column-major, multiples of 16, tiles outer-dimension-major, blocks padded to 4."""
    kinds = []

    def kernel(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
        kinds.append((kind_a, kind_b))
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.T.is_contiguous()
        assert not any(size % 16 for size in (*a.shape, *b.shape)) and a.shape[1] % 128 == 0
        scales = []
        for codes, scale, kind in ((a, scale_a, kind_a), (b.T, scale_b, kind_b)):
            k = codes.shape[1] // 128
            if kind == F.ScalingType.BlockWise1x128:
                assert scale.shape == (len(codes), k) and (scale.stride() == (1, len(codes)) or k == 1)
            else:
                assert scale.shape == (math.ceil(k / 4) * 4, len(codes) // 128) and scale.T.is_contiguous()
                scale = scale[:k].T
            scales.append(scale)
        return (v3.dequantize(a, scales[0]) @ v3.dequantize(b.T, scales[1]).T).to(output_dtype)

    expected, _ = fp8_layers([128, 0, 256])
    monkeypatch.setattr(v3, "has_fp8_kernels", lambda device: True)
    monkeypatch.setattr(F, "scaled_mm", kernel)
    for found, wanted in zip(fp8_layers([128, 0, 256])[0], expected):
        assert torch.equal(found, wanted), "the emulation's bits"
    tile, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    assert collections.Counter(kinds) == {(tile, block): 10, (tile, tile): 5}  # two experts, two matrices each, and a layer


def test_quantizes_as_the_recipe_says(monkeypatch):
    """Tile, power-of-two scale or not, and floor of every cast; a weight's codes are made once per update."""
    calls, inner = [], v3.quantize

    def spy(x, rows, columns, powers=False, least=1e-4):
        calls.append((rows, columns, powers, least))
        return inner(x, rows, columns, powers, least)

    monkeypatch.setattr(v3, "quantize", spy)
    monkeypatch.setattr(v3, "quantize_gradient", lambda *args: spy(*args, least=1e-30))
    experts = v3.FP8Experts(torch.nn.Parameter(torch.randn(1, 256, 128)), torch.nn.Parameter(torch.randn(1, 128, 128)))
    tile, block = (1, 128, False, 1e-4), (128, 128, False, 1e-4)
    powers, small, small_powers = (1, 128, True, 1e-4), (1, 128, False, 1e-30), (1, 128, True, 1e-30)
    for weights in ([block, block], []):
        calls.clear()
        y = experts(torch.randn(128, 128, requires_grad=True), torch.rand(128), torch.tensor([128]))
        assert calls == [*weights, powers, tile], "x before dispatch; the SwiGLU's output"
        calls.clear()
        y.sum().backward()
        # by down, then by gate_up: dgrad's gradient, then wgrad's gradient and input
        assert calls == [small_powers, small_powers, tile, small, small, powers]
    v3.forget_codes(experts)
    assert experts.blocks is None


# Parallelism


class Count(TorchDispatchMode):
    """Numbers of the operators that run."""

    def __init__(self):
        super().__init__()
        self.n = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n[function.name().split("::")[1].split(".")[0]] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("how, attention, rsqrt, products", [("none", 0, 0, 4), ("paper", 0, 6, 4), ("block", 2, 8, 6)])
def test_recomputes_what_it_should_and_counts_tokens_once(how, attention, rsqrt, products):
    cfg = tiny(n_layers=2, mtp=False)
    model, tokens = make_model(v3, ROW, cfg), torch.arange(22).view(2, 11)
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
def test_planned_activations_are_those_that_are_kept(precision, recompute):
    sizes = dict(vocab_size=300, dim=256, hidden_dim=512, expert_dim=128, n_heads=4, q_rank=128, kv_rank=128, head_dim=64, rope_dim=32)
    cfg = v3.fit_layout(tiny(**sizes, precision=precision, recompute=recompute, seq_len=128, batch_size=8), 1)
    v3.init_distributed(30)
    pipe = v3.Pipeline(cfg, v3.expert_mesh(cfg, "cpu"))
    v3.init_weights(pipe.model, cfg)
    pipe.share()
    pipe.enter(cfg)
    tokens = torch.randint(300, (8, 128))
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(pipe.model)
    with tracker:
        pipe.model(tokens, tokens).sum().backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    live = sum(size for kind, size in peak.items() if "ACT" in str(kind) or "TEMP" in str(kind))
    assert v3.memory_per_rank(cfg)["activations"] == pytest.approx(live, rel=0.12)


def exchanged_in_fp8():
    """Rows to the other rank and back, in their precision and in E4M3 either way: what arrives, and what the gradient is."""
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


def test_rows_travel_in_e4m3_where_they_should(ranks):
    first, second = ranks.run(2, exchanged_in_fp8)
    coded = lambda x: v3.dequantize(*v3.quantize(x, 1, 128, powers=True))[: len(x), :200]  # noqa: E731
    for (x0, y0, g0, d0), (x1, y1, g1, d1), out, back in zip(first, second, (False, True, False), (False, False, True)):
        code, code_back = (coded if on else lambda x: x for on in (out, back))
        assert torch.equal(y0, torch.cat((code(x0)[:1], code(x1)[:2]))) and torch.equal(y1, torch.cat((code(x0)[1:], code(x1)[2:])))
        assert torch.equal(d0, torch.cat((code_back(g0)[:1], code_back(g1)[:3])))
        assert torch.equal(d1, torch.cat((code_back(g0)[1:], code_back(g1)[3:])))


def test_fp8_trains_where_experts_of_a_rank_get_no_token(ranks):
    flags = "--n_experts 2 --n_groups 2 --groups_kept 1 --top_k 1 --seq_len 4 --batch_size 2 --first_batch 2 --dim 32 --hidden_dim 32"
    flags += " --n_layers 2 --precision fp8 --ep 2 --long= --steps 4 --val_batches 1 --log_every 1 --prompt a"
    for rank, (status, out, err) in enumerate(ranks.run(2, run_main, "deepseek_v3", flags.split())):
        assert status == 0, err
        if rank == 0:
            assert "step 4/4 | loss 5." in out and "max_load 2.0" in out


# Training


def test_the_papers_layout_fits(capsys):
    """The docstring's layout, and the extensions, which another or none here can hold."""
    command = re.search(r"deepseek_v3.py (--preset 671b.*?--ep \d+)", v3.__doc__, re.S)[1]
    found = []
    for ranks in ("2048", "1024"):
        v3.main([*command.split(), "--dry_run", "--world_size", ranks])
        first, last, *long = capsys.readouterr().out.splitlines()[2:]
        assert first.endswith(": fits 80 GB") and last.endswith(": fits 80 GB")
        found.append([line.endswith(": fits 80 GB") for line in long])
    assert found == [[False, False], [True, False]]


def test_stops_before_a_phase_that_the_layout_cannot_hold(ranks, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(4000)))
    flags = f"--data {tmp_path}/text.txt --seq_len 16 --batch_size 4 --first_batch 4 --tokens 192 --long 32x1:2 --dim 32 --n_layers 2"
    flags += f" --hidden_dim 32 --val_batches 1 --out {tmp_path}/run --ep 1 --prompt a"
    status, out, err = ranks.run(2, run_main, "deepseek_v3", flags.split())[0]
    assert status == 0 and "this run stops after 0.0M tokens: 1 sequences of 32" in out and "step 3/3" in out, err
    status, out, err = ranks.run(1, run_main, "deepseek_v3", [*flags.split(), "--resume"])[0]
    assert status == 0 and "step 5/5" in out and "YaRN factor 2" in out, err
