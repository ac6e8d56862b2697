"""Gemma 2 and Gemma 3: the worked examples of the specification; test_hf_parity.py compares with Hugging Face's classes."""
import json
import math
from unittest import mock

import gemma
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import live_activations, make_model, run_main


def heads(T):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, T, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]


def test_pieces_are_the_specifications():
    """(1 + w) in fp32, cast at the end; GELU's tanh form (erf's: 0.841345); angles of position 1; sqrt(D), rounded with the residual stream."""
    norm = gemma.UnitOffsetRMSNorm(5)
    norm.weight.data, x = torch.tensor([[0.0, 0.5, -1.0, 2.0, 1e-3], [3.0, -1.0, 2.0, 0.5, 7.0]]).bfloat16()
    exact = x.double() / math.sqrt((x.double() ** 2).mean() + 1e-6) * (1 + norm.weight.double())
    assert torch.equal(norm(x), exact.bfloat16())
    mlp = gemma.GeGLU(1, 1)
    torch.nn.utils.vector_to_parameters(torch.tensor([1.0, 2.0, 3.0]), mlp.parameters())
    assert mlp(torch.ones(1)).item() == pytest.approx(6 * 0.841192, abs=1e-5)
    for value, cap, capped in ((50.0, 50.0, 38.0797), (100.0, 50.0, 48.2014), (30.0, 30.0, 22.8478), (7.0, 0.0, 7.0)):
        assert gemma.soft_cap(torch.tensor(value), cap).item() == pytest.approx(capped, abs=1e-4)
    for theta, factor, first, middle in ((1e4, 1.0, 1.0, 1e-2), (1e6, 1.0, 1.0, 1e-3), (1e6, 8.0, 0.125, 1.25e-4)):
        cos, sin = gemma.rotary_table(2, 256, theta, factor, "cpu")
        assert torch.atan2(sin[1], cos[1])[[0, 64]].tolist() == pytest.approx([first, middle])
    for d, scale in {640: 25.25, 1152: 34.0, 2304: 48.0, 2560: 50.5, 3584: 59.75, 3840: 62.0, 4608: 68.0, 5376: 73.5}.items():
        model = gemma.Gemma(gemma.Config(vocab_size=2, dim=d, n_layers=0))
        model.dtype, model.final_norm = torch.bfloat16, torch.nn.Identity()
        w = model.token_embedding.weight.data[1].bfloat16()  # of another value in each place
        assert torch.equal(model.hidden_states(torch.tensor([[1]]))[0, 0], (w.double() * scale).bfloat16())


def test_pattern_windows_and_phases():
    """Gemma 2: every other layer is global; Gemma 3: every sixth. A window of three sees three, as in the specification."""
    for preset, n_global, query_scalar, window, last_factor in (
        ("2b", 13, 256, 4096, 1), ("9b", 21, 256, 4096, 1), ("27b", 23, 144, 4096, 1), ("3_270m", 3, 256, 512, 1),
        ("3_1b", 4, 256, 512, 1), ("3_4b", 5, 256, 1024, 8), ("3_12b", 8, 256, 1024, 8), ("3_27b", 10, 168, 1024, 8),
    ):  # fmt: skip
        c = gemma.Config(**gemma.PRESETS[preset])
        with torch.device("meta"):
            windows = [block.attn.window for block in gemma.Gemma(c).blocks]
        period, *rest = (6, True, 0, 0, 1e6) if preset[:2] == "3_" else (2, False, 50, 30, 1e4)
        assert windows == [window * (i % period > 0) for i in range(1, c.n_layers + 1)] and windows.count(0) == n_global
        assert [c.qk_norm, c.attention_cap, c.logit_cap, c.rope_theta] == rest and c.query_scalar == query_scalar
        assert gemma.token_phases(c)[-1][2].rope_factor == last_factor
    qkv = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6), torch.eye(6)[None, None]
    for x in (gemma.local_attention(*qkv, 1.0, 3), gemma.soft_capped_attention(*qkv, 1.0, 3, 9.0)):
        assert [row.nonzero().flatten().tolist() for row in x[0, 0]] == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    first, last = gemma.token_phases(c := gemma.Config(**gemma.PRESETS["small"]))
    assert gemma.find_phase(first[1] - 1, c) == first[::2] and gemma.find_phase(first[1], c) == last[::2]


def test_attention_in_blocks_is_attention_with_one_mask():
    """Values and gradients, also where the sequence is no multiple of the window, or shorter; with a window of T the layer is global."""
    for cap, T, window in ((cap, T, window) for cap in (0.0, 0.7) for T in (1, 4, 5, 10, 15, 13) for window in (5, T)):
        q, k, v = heads(T)
        x = gemma.soft_capped_attention(q, k, v, 0.4, window, cap) if cap else gemma.local_attention(q, k, v, 0.4, window)
        scores = 0.4 * q @ k.repeat_interleave(2, 1).mT
        scores = cap * torch.tanh(scores / cap) if cap else scores
        distance = torch.arange(T)[:, None] - torch.arange(T)
        expected = scores.masked_fill((distance < 0) | (distance >= window), -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(x, expected, atol=2e-7 if cap else 1e-12, rtol=0)  # scores are capped in fp32
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (x, expected))):
            torch.testing.assert_close(a, b, atol=2e-6 if cap else 1e-12, rtol=0)


def test_memory_is_linear_in_the_length_and_planned():
    """Bytes of attention at most double with T; a block of 512 queries of 2b has scores of 128 MiB at 8,192 tokens."""
    for function, *more in ((gemma.local_attention, 64), (gemma.soft_capped_attention, 64, 50.0), (gemma.soft_capped_attention, 2048, 50.0)):
        sizes = [live_activations(torch.nn.Linear(1, 1), lambda: function(*heads(T), 0.4, *more).sum()) for T in (512, 1024, 2048)]  # noqa: B023
        assert all(0 < long < 2.1 * short for a, b in zip(sizes, sizes[1:]) for short, long in zip(a, b)), "kept, and at the peak"
    assert 4 * 8 * 512 * 8192 == 128 * 2**20 and sizes[-1][1] < 13 * (4 * 4 * 512 * 2048) < 4 * (4 * 4 * 2048**2)
    sizes = dict(vocab_size=300, dim=96, n_layers=6, head_dim=32, hidden_dim=320, seq_len=64, precision="bf16")
    cfg = gemma.Config(**SCRIPTS["gemma"].tiny | sizes)
    model = gemma.parallelize(make_model(gemma, SCRIPTS["gemma"], cfg), cfg, mock.MagicMock(size=lambda: 1))
    tokens, planned = torch.randint(300, (8, 64)), gemma.memory_per_rank(model, cfg)
    _, peak = live_activations(model, lambda: model(tokens, tokens))
    assert planned["activations"] + planned["gathered"] == pytest.approx(peak, rel=0.1)


def test_unimax_and_the_mixture_of_its_weights(monkeypatch):
    """The worked example; in each block of sequences every corpus has its share, and its windows come in order."""
    weights = gemma.unimax({"a": 100, "b": 10, "c": 40}, 100, 2)
    assert weights == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4})
    corpora = [mock.Mock(window=lambda i, length, seed, name=name: f"{name}{i!r:>12}", n_windows=lambda length: 24) for name in weights]
    with pytest.raises(ValueError, match="a corpus has less than one of 100,000"):
        gemma.LanguageMixture(corpora, dict(a=0.5, b=0.5 - 1e-6, c=1e-6))
    monkeypatch.setattr(gemma.LanguageMixture, "BLOCK", 1000)
    mixture = gemma.LanguageMixture(corpora, weights)
    for end, shares in ((1000, (400, 200, 400)), (2000, (800, 400, 800))):
        windows = [mixture.window(i, 8, 0) for i in range(end)]
        expected = [f"{name}{i:12}" for name, share in zip("abc", shares) for i in range(share)]
        assert windows != sorted(windows, key=lambda window: window[0]) == expected, "indices are Python's integers"


def test_distilled_targets_are_the_specifications():
    """Loss and gradient of two targets; the mean of three draws without replacement."""
    P_T, z = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]), torch.tensor([[1.0, 0.5, 0.2, -0.5, -1.0]], requires_grad=True)
    for t, loss, gradient in (
        (P_T, 1.291420, [-0.085806, 0.001222, 0.036110, 0.022419, 0.026055]),
        (torch.tensor([0.694444, 0, 0.208333, 0.097222, 0]), 1.193920, [-0.280250, 0.251222, -0.022224, -0.004803, 0.056055]),
    ):
        (g,) = torch.autograd.grad(found := gemma.chunked_loss(lambda x: x, z, lambda rows: t[None][rows], 5), z)  # noqa: B023
        assert found.item() == pytest.approx(loss, abs=2e-6) and g[0].tolist() == pytest.approx(gradient, abs=2e-6)
    teacher = mock.Mock(hidden_states=lambda tokens: torch.zeros(*tokens.shape, 1), logits=lambda x: P_T.log().expand(*x.shape[:-1], -1),
                        **{"token_embedding.num_embeddings": 5})  # fmt: skip
    batch = {"tokens": torch.zeros(200, 100), "targets": torch.zeros(200, 100), "indices": torch.arange(200)}
    batch["targets"][0, 1] = -100  # where nothing is scored, there is nothing to learn
    sampled, whole = (gemma.soft_targets(teacher, batch, gemma.Config(vocab_size=5, samples=n)) for n in (3, 0))
    torch.testing.assert_close(whole(slice(0, 3)), torch.stack([P_T, 0 * P_T, P_T]))
    t = sampled(slice(2, 20_000))
    torch.testing.assert_close(t, P_T * (t > 0) / (P_T * (t > 0)).sum(1, keepdim=True))
    assert (t > 0).sum(1).eq(3).all() and sampled(slice(0, 3)).sum(1).tolist() == pytest.approx([1, 0, 1])
    assert t.mean(0).tolist() == pytest.approx([0.574413, 0.255219, 0.127421, 0.035466, 0.007481], abs=0.005)


def test_loss_in_chunks_bounds_the_memory(monkeypatch):
    """128 positions of V = 262,144 are 128 MiB of fp32 logits; at the peak there are fewer than nine such tensors, here of 2**20 logits."""
    assert gemma.slices(8192, 262_144)[:2] == [slice(0, 128), slice(128, 256)]
    V, n = 16_384, 64
    head, x, ids = torch.nn.Linear(4, V).forward, torch.randn(1000, 4), torch.randint(V, (1000,))
    monkeypatch.setattr(gemma, "slices", lambda N, V: [slice(i, min(i + n, N)) for i in range(0, N, n)])
    for targets in (ids, lambda rows: F.one_hot(ids[rows], V).float()):
        _, peak = live_activations(torch.nn.Linear(1, 1), lambda: gemma.chunked_loss(head, x, targets, V))  # noqa: B023
        assert 4 * n * V < peak < 9 * 4 * n * V < 4 * 1000 * V
        expected = F.cross_entropy(head(x), ids, reduction="sum").item()
        assert gemma.chunked_loss(head, x, targets, V).item() == pytest.approx(expected, rel=1e-6)


def test_directories_are_read_with_their_classs_defaults_or_refused(tmp_path):
    read = lambda **config: (tmp_path / "config.json").write_text(json.dumps(config)) and gemma.read_gemma_shape(tmp_path)  # noqa: E731
    names = "vocab_size", "attention_cap", "logit_cap", "local_layers", "rope_theta", "rope_factor", "qk_norm"
    assert [read(model_type="gemma2")[name] for name in names] == [256000, 50.0, 30.0, 1, 1e4, 1.0, False]
    old = dict(rope_scaling=dict(factor=8.0, type="linear"), rope_theta=2e6, sliding_window_pattern=3, attn_logit_softcapping=9.0)
    assert [read(model_type="gemma3_text", **old)[name] for name in names] == [262208, 0.0, 0.0, 2, 2e6, 8.0, True]
    for key, value, phrase in (
        ("model_type", "gemma3", "model_type"), ("rope_scaling", dict(rope_type="yarn", factor=2.0), "yarn"),
        ("rope_local_base_freq", 1e5, "100000.0"), ("layer_types", ["full_attention", "sliding_attention"], "period"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"holds no .*{phrase}"):
            read(**{"model_type": "gemma3_text", key: value})


def test_a_student_learns_from_an_exported_teacher(ranks, tmp_path):
    """Two phases; losses of layouts; a resume from before the last update, bit for bit; other starts."""
    pytest.importorskip("safetensors")
    one, mix, hf, text, less = (tmp_path / name for name in ("one", "mix", "hf", "text.txt", "less.txt"))
    losses = lambda out, key="loss": list({row["step"]: row[key] for row in map(json.loads, (out / "metrics.jsonl").open()) if key in row}.values())  # noqa: E731
    text.write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    less.write_text("".join(f"{i} is less\n" for i in range(700)))
    sizes = "--dim=24 --n_layers=3 --head_dim=8 --hidden_dim=32 --window=6 --seq_len=16 --long_seq_len=32 --batch_size=8 --val_batches=1"
    shape = [*sizes.split(), "--log_every=1", "--timeout=30", "--save_every=2", "--data", text]
    assert run_main("gemma", [*shape, "--steps=4", "--n_layers=4", "--export", hf])[0] == 0
    flags = [*shape, "--steps=5", "--long_tokens=1.2e6", "--teacher", hf, "--long_rope_factor=64", "--samples=7"]
    status, out, err = run_main("gemma", [*flags, "--out", one, "--export", tmp_path / "student"])
    assert "x 8 sequences of 16 | positions of global layers / 1" in out and "x 4 sequences of 32 | positions of global layers / 64" in out, err
    expected, val = losses(one), losses(one, "val_loss")[-1]
    results = ranks.run(4, run_main, "gemma", [*flags, "--dp_replicate=2", "--out", tmp_path / "four"], timeout=120)
    assert results[0][0] == 0 and losses(tmp_path / "four") == pytest.approx(expected, rel=1e-5), results[0]
    (one / "step_000000005").rename(tmp_path / "gone")
    status, out, err = run_main("gemma", [*flags, "--out", one, "--resume"])
    assert status == 0 and "step 4/5" not in out and losses(one) == expected and len(losses(one, "val_loss")) == 2 and "| bpb n/a |" in out
    for start, phrase in (
        ([*flags, "--init", tmp_path / "student", "--eval", "--seq_len=32", "--batch_size=4", "--long_tokens=0"], f"val 0 | loss {val:.4f}"),
        ([*shape, "--data", f"{text},{less}", "--steps=5", "--out", mix], "val 5"),
        ([*shape, "--data", f"{text},{less}", "--out", mix, "--resume"], "val 5"),
        ([*flags, "--tokenizer=bytes", "--vocab_size=300"], "has 258 entries, and the student 300"),
    ):  # fmt: skip
        status, out, err = run_main("gemma", start)
        assert phrase in out + err, out + err
