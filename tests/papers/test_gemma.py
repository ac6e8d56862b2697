"""Gemma 2 and Gemma 3: the worked examples of the specification, and Hugging Face's classes."""
import dataclasses
import json
import math
import time
import timeit
import types
from unittest import mock

import gemma
import pytest
import torch
import torch.nn.functional as F
from ranks import run_main

P_T, Z = [0.5, 0.25, 0.15, 0.07, 0.03], [1.0, 0.5, 0.2, -0.5, -1.0]  # the specification's example of distillation

def heads(T, H=4, K=2, E=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, T, E, generator=generator, dtype=dtype).requires_grad_() for n in (H, K, K)]


def plain(q, k, v, scale, window, cap=0.0):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    return scores.masked_fill(~((j <= i) & (j > i - window)), -math.inf).softmax(-1) @ v


def test_norm_feed_forward_and_soft_cap():
    """(1 + w) in fp32, cast at the end; GELU's tanh form, 0.841192 at 1 (erf's: 0.841345); the specification's capped values."""
    norm = gemma.UnitOffsetRMSNorm(5).bfloat16()
    norm.weight.data = torch.tensor([0.0, 0.5, -1.0, 2.0, 1e-3]).bfloat16()
    x = torch.tensor([3.0, -1.0, 2.0, 0.5, 7.0]).bfloat16()
    exact = x.double() / math.sqrt((x.double() ** 2).mean() + 1e-6) * (1 + norm.weight.double())
    assert torch.equal(norm(x), exact.bfloat16())
    mlp = gemma.GeGLU(1, 1)
    torch.nn.utils.vector_to_parameters(torch.tensor([1.0, 2.0, 3.0]), mlp.parameters())
    assert mlp(torch.ones(1)).item() == pytest.approx(6 * 0.841192, abs=1e-5)
    for value, cap, capped in ((50.0, 50.0, 38.0797), (100.0, 50.0, 48.2014), (30.0, 30.0, 22.8478), (7.0, 0.0, 7.0)):
        assert gemma.soft_cap(torch.tensor(value), cap).item() == pytest.approx(capped, abs=1e-4)


def test_rotary_angles_and_the_scale_of_the_embedding():
    """Angles of position 1, frequencies 0 and 64 of 128; sqrt(D) is rounded with the residual stream, as the specification has it."""
    for theta, factor, first, middle in ((1e4, 1.0, 1.0, 1e-2), (1e6, 1.0, 1.0, 1e-3), (1e6, 8.0, 0.125, 1.25e-4)):
        cos, sin = gemma.rotary_table(2, 256, theta, factor, "cpu")
        assert torch.atan2(sin[1], cos[1])[[0, 64]].tolist() == pytest.approx([first, middle])
    for d, scale in {640: 25.25, 1152: 34.0, 2304: 48.0, 2560: 50.5, 3584: 59.75, 3840: 62.0, 4608: 68.0, 5376: 73.5}.items():
        for dtype, expected in ((torch.bfloat16, scale), (torch.float32, torch.tensor(d).sqrt().item())):
            model = gemma.Gemma(gemma.Config(vocab_size=2, dim=d, n_layers=0))
            model.dtype, model.final_norm = dtype, torch.nn.Identity()
            w = model.token_embedding.weight.data.to(dtype)  # of another value in each place
            assert torch.equal(model.hidden_states(torch.tensor([[1]]))[0, 0], (w[1].double() * expected).to(dtype))


def test_pattern_and_windows():
    """Gemma 2: every other layer is global; Gemma 3: every sixth. A window of three sees three, as in the specification."""
    for preset, n_global in (("2b", 13), ("3_270m", 3), ("3_1b", 4), ("3_4b", 5), ("3_12b", 8), ("3_27b", 10)):
        with torch.device("meta"):
            windows = [block.attn.window for block in gemma.Gemma(gemma.Config(**gemma.PRESETS[preset])).blocks]
        expected = list(range(len(windows)))[1::2] if preset == "2b" else list(range(len(windows)))[5::6]
        assert [i for i, window in enumerate(windows) if not window] == expected and len(expected) == n_global
    seen = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    qkv = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6), torch.eye(6)[None, None]
    for x in (gemma.local_attention(*qkv, 1.0, 3), gemma.soft_capped_attention(*qkv, 1.0, 3, 9.0)):
        assert [row.nonzero().flatten().tolist() for row in x[0, 0]] == seen


@pytest.mark.parametrize("T", [1, 4, 5, 10, 15, 13])
@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_blocks_equal_one_mask_in_values_and_gradients(T, cap):
    """Also where the sequence is no multiple of the window, or shorter; with a window of T the layer is global."""
    for window in (5, T):
        q, k, v = heads(T)
        x = gemma.soft_capped_attention(q, k, v, 0.4, window, cap) if cap else gemma.local_attention(q, k, v, 0.4, window)
        expected = plain(q, k, v, 0.4, window, cap)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(x, expected, atol=2e-7 if cap else 1e-12, rtol=0)  # scores are capped in fp32
        for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (x, expected))):
            torch.testing.assert_close(a, b, atol=2e-6 if cap else 1e-12, rtol=0)


def test_attention_is_linear_in_memory_and_local_attention_in_time(monkeypatch):
    """What is kept at most doubles with T; local time grows at most 2.2 times; 8 heads, 512 queries and 8,192 keys are 128 MiB of scores."""
    for function, *more in ((gemma.local_attention, 64), (gemma.soft_capped_attention, 64, 50.0), (gemma.soft_capped_attention, 2048, 50.0)):
        sizes = []
        for T in (512, 1024, 2048):
            kept = {}
            keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x}) or x  # noqa: B023, E731
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                x = function(*heads(T), 0.4, *more)
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) * x.isfinite().all())
        assert 0 < sizes[2] < 2.1 * sizes[1] < 2.1**2 * sizes[0]
    times = []
    for T in (1024, 8192):
        q, k, v = heads(T, dtype=torch.float32)
        run = lambda: gemma.local_attention(q, k, v, 0.4, 256).sum().backward()  # noqa: B023, E731
        times.append(min(timeit.repeat(run, number=1, repeat=5, timer=time.process_time)))
    assert times[1] < 2.2**3 * times[0]
    shapes = []
    monkeypatch.setattr(gemma, "capped_block", lambda q, k, *more: shapes.append((q.shape[2], k.shape[2])) or q)
    gemma.soft_capped_attention(*heads(1300), 0.4, 1300, 50.0)
    assert shapes == [(512, 512), (512, 1024), (276, 1300)] and 4 * 8 * 512 * 8192 == 128 * 2**20 and 4 * 8 * 8192**2 == 2 * 2**30


def test_distillation_is_the_specifications_example():
    for t, loss, gradient in (
        (P_T, 1.291420, [-0.085806, 0.001222, 0.036110, 0.022419, 0.026055]),
        ([0.694444, 0, 0.208333, 0.097222, 0], 1.193920, [-0.280250, 0.251222, -0.022224, -0.004803, 0.056055]),
    ):
        z = torch.tensor([Z], requires_grad=True)
        found = gemma.chunked_loss(lambda x: x, z, lambda rows: torch.tensor([t])[rows], 5)  # noqa: B023
        found.backward()
        assert found.item() == pytest.approx(loss, abs=2e-6) and z.grad[0].tolist() == pytest.approx(gradient, abs=2e-6)


def test_sampled_targets_are_three_distinct_tokens_renormalised():
    """The specification's expectation of three draws without replacement; noise depends on nothing but seed and sequence."""
    cfg = gemma.Config(vocab_size=5, samples=3, seq_len=100)
    teacher = types.SimpleNamespace(  # the same logits everywhere
        token_embedding=torch.nn.Embedding(5, 1), hidden_states=lambda tokens: torch.zeros(*tokens.shape, 1),
        logits=lambda x: torch.tensor(P_T).log().expand(*x.shape[:-1], -1),
    )  # fmt: skip
    batch = {"tokens": torch.zeros(200, 100), "targets": torch.zeros(200, 100), "indices": torch.arange(200)}
    t = gemma.soft_targets(teacher, batch, cfg)(slice(0, 20_000))
    kept = torch.tensor(P_T) * (t > 0)
    torch.testing.assert_close(t, kept / kept.sum(1, keepdim=True))
    assert (t > 0).sum(1).eq(3).all() and t.mean(0).tolist() == pytest.approx([0.574413, 0.255219, 0.127421, 0.035466, 0.007481], abs=0.005)
    part = {key: value[7:9] for key, value in batch.items()}
    part["targets"][0, 1] = -100
    again = gemma.soft_targets(teacher, part, cfg)(slice(0, 200))
    assert not again[1].any(), "nothing to learn where nothing is scored"
    again[1] = t[701]
    assert torch.equal(again, t[700:900])
    whole = gemma.soft_targets(teacher, part, dataclasses.replace(cfg, samples=0))(slice(0, 3))
    torch.testing.assert_close(whole, torch.tensor([P_T, [0.0] * 5, P_T]))


def test_loss_in_chunks_is_the_loss_and_bounds_the_memory(monkeypatch):
    """128 positions of V = 262,144 are 128 MiB of fp32 logits; at the peak there are fewer than nine such tensors, here of 2**22 logits."""
    from torch.distributed._tools.mem_tracker import MemTracker
    assert gemma.slices(8192, 262_144)[:2] == [slice(0, 128), slice(128, 256)]
    V, size, generator = 65_536, 2**22, torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(V, 4, generator=generator))
    x, ids = torch.randn(1000, 4, generator=generator), torch.randint(V, (1000,), generator=generator)
    ids[5] = -100
    t = lambda rows: F.one_hot(ids[rows].clamp(0), V).float() * (ids[rows, None] >= 0)  # noqa: E731
    head = lambda x: gemma.soft_cap(x @ weight.T, 5.0)  # noqa: E731
    expected = F.cross_entropy(head(x).double(), ids, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, weight)
    monkeypatch.setattr(gemma, "slices", lambda n, V: [slice(i, min(i + size // V, n)) for i in range(0, n, size // V)])
    for targets in (ids, t):
        with (tracker := MemTracker()):
            (found := gemma.chunked_loss(head, x, targets, V)).backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(weight.grad, gradient, atol=1e-4, rtol=1e-5)
        weight.grad = None
        peak = max(sum(kinds.values()) for kinds in tracker.get_tracker_snapshot("peak").values())
        assert peak < 9 * 4 * size < 4 * 1000 * V


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_logits_loss_and_gradients_are_hugging_faces(kind, tmp_path):
    """Seven layers, window 8 and small caps; 23 tokens are no multiple of the window."""
    tr = pytest.importorskip("transformers")
    shape = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=32, query_pre_attn_scalar=16,
                 num_hidden_layers=7, sliding_window=8, attn_implementation="eager")  # fmt: skip
    if kind == "gemma2":
        theirs = tr.Gemma2ForCausalLM(tr.Gemma2Config(**shape, num_key_value_heads=2, attn_logit_softcapping=5.0, final_logit_softcapping=3.0))
    else:
        ropes = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4))
        theirs = tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**shape, num_key_value_heads=1, rope_parameters=ropes))
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        p.data.normal_(0, 0.3 if "norm" in name else 0.15, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, cfg = gemma.from_hf(tmp_path / "theirs")
    tokens = torch.randint(1, 256, (3, 24), generator=generator)
    expected = theirs(tokens[:, :-1]).logits
    assert (ours(tokens[:, :-1]) - expected).abs().max() < 1e-5 * expected.abs().max()
    loss, their_loss = ours(tokens[:, :-1], tokens[:, 1:]) / (3 * 23), theirs(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    (loss + their_loss).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        g = gradients[gemma.gemma_name(name)]
        assert (p.grad - g).abs().max() < 1e-5 * g.abs().max(), name
    gemma.to_hf(ours, cfg, tmp_path / "ours")
    assert torch.equal(type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")(tokens).logits, theirs(tokens).logits)


def test_directories_are_read_with_their_classs_defaults_or_refused(tmp_path):
    read = lambda **config: (tmp_path / "config.json").write_text(json.dumps(config)) and gemma.read_gemma_config(tmp_path)  # noqa: E731
    names = "vocab_size", "attention_cap", "logit_cap", "local_layers", "rope_theta", "rope_factor", "qk_norm"
    assert [getattr(read(model_type="gemma2"), name) for name in names] == [256000, 50.0, 30.0, 1, 1e4, 1.0, False]
    old = dict(rope_scaling=dict(factor=8.0, type="linear"), rope_local_base_freq=1e4, rope_theta=2e6, sliding_window_pattern=3)
    assert [getattr(read(model_type="gemma3_text", **old), name) for name in names] == [262208, 0.0, 0.0, 2, 2e6, 8.0, True]
    uneven = ["sliding_attention"] * 25 + ["full_attention"] * 2
    for key, value, phrase in (
        ("model_type", "gemma3", "model_type"), ("hidden_activation", "silu", "hidden_activation"), ("rms_norm_eps", 1e-5, "rms_norm_eps"),
        ("attention_bias", True, "attention_bias"), ("use_bidirectional_attention", True, "use_bidirectional"), ("layer_types", uneven, "layer_types"),
        ("rope_scaling", dict(rope_type="yarn", factor=2.0), "default and yarn"), ("rope_local_base_freq", 1e5, "rope_theta 100000.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"holds no .*{phrase}"):
            read(**{"model_type": "gemma3_text", key: value})


def test_unimax_and_the_mixture_of_its_weights():
    """The worked example; of each 1,000 sequences the corpora have their shares, each window once, in an order that is not theirs."""
    weights = gemma.unimax({"a": 100, "b": 10, "c": 40}, 100, 2)
    assert weights == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4})
    corpora = [mock.Mock(window=lambda i, length, seed, name=name: (name, i), n_windows=lambda length: 600) for name in weights]
    mixture = gemma.LanguageMixture(corpora, list(weights.values()))
    for n in range(2):
        windows = [mixture.window(i, 8, 0) for i in range(1000 * n, 1000 * (n + 1))]
        expected = [(name, i) for name, share in zip("abc", (400, 200, 400)) for i in range(n * share, (n + 1) * share)]
        assert windows != sorted(windows) == expected
    assert mixture.n_windows(8) == 1500


def test_a_student_learns_from_an_exported_teacher(ranks, tmp_path):
    """Two phases, each from its first sequence; losses and norms of layouts; a resume from before the second phase, bit for bit."""
    pytest.importorskip("safetensors")
    losses = lambda out, key="loss": list({row["step"]: row[key] for row in map(json.loads, (out / "metrics.jsonl").open()) if key in row}.values())  # noqa: E731
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(2000)))
    sizes = "--dim=24 --n_layers=3 --head_dim=8 --hidden_dim=32 --window=6 --seq_len=16 --long_seq_len=32 --batch_size=8 --val_batches=1"
    flags = [*sizes.split(), "--log_every=1", "--timeout=30", "--data", tmp_path / "text.txt"]
    assert run_main("gemma", [*flags, "--steps=4", "--n_layers=4", "--export", tmp_path / "hf"])[0] == 0
    flags += ["--steps=5", "--long_tokens=1.2e6", "--teacher", tmp_path / "hf", "--long_rope_factor=64", "--samples=7", "--save_every=2"]
    with mock.patch.object(gemma, "get_batch", wraps=gemma.get_batch) as get_batch:
        status, out, err = run_main("gemma", [*flags, "--out", tmp_path / "one", "--export", tmp_path / "student"])
    read = [(cfg.seq_len, first, n) for (corpus, first, n, cfg), _ in get_batch.call_args_list if not corpus.in_order]
    assert read[:5] == [(16, 0, 8), (16, 8, 8), (32, 0, 4), (32, 4, 4), (32, 8, 4)], err  # another is read ahead
    assert "x 8 sequences of 16 | positions of global layers / 1" in out and "x 4 sequences of 32 | positions of global layers / 64" in out, err
    one = losses(tmp_path / "one")
    for n, more in ((2, []), (4, ["--dp_replicate=2"])):
        results = ranks.run(n, run_main, "gemma", [*flags, "--micro_batch=1", *more, "--out", tmp_path / f"{n}"], timeout=120)
        assert results[0][0] == 0 and losses(tmp_path / f"{n}") == pytest.approx(one, rel=1e-5), results[0]
        assert losses(tmp_path / f"{n}", "grad") == pytest.approx(losses(tmp_path / "one", "grad"), rel=1e-4)
    run = gemma.Config(**{k: v for k, v in json.loads((tmp_path / "one" / "config.json").read_text()).items() if k != "data_fingerprint"})
    batch = gemma.get_batch(gemma.load_languages(run)[2], 0, 4, dataclasses.replace(run, seq_len=32))
    loss = gemma.objective(gemma.from_hf(tmp_path / "student")[0], batch, run)[0].item()  # with the last phase's positions
    assert loss == pytest.approx(losses(tmp_path / "one", "val_loss")[-1], rel=1e-6)
    (tmp_path / "one" / "step_000000005").rename(tmp_path / "gone")
    status, out, err = run_main("gemma", [*flags, "--out", tmp_path / "one", "--resume"])  # bit for bit
    assert status == 0 and "step 4/5" not in out and losses(tmp_path / "one") == one
    assert " | bpb n/a | " in out.split("step 5/5 | loss ")[1] and len(losses(tmp_path / "one", "val_loss")) == 2
    assert "has 258 entries, and the student 300" in run_main("gemma", [*flags, "--tokenizer=bytes", "--vocab_size=300"])[2]
