"""Qwen3.5-Omni's specification, in the order of omni.py: worked examples, independent loops, Hugging Face's classes."""
import itertools
import json
import math
import re
import wave
from unittest import mock

import numpy as np
import omni
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import make_corpora, make_model

ROW = SCRIPTS["omni"]
S = omni.Segment


def tiny(**overrides):
    cfg = omni.Config(**{**ROW.tiny, **overrides})
    return make_model(omni, ROW, cfg).eval(), cfg


def words(n):
    return S(text=[0] * n)


# Audio


def test_log_mel_of_a_tone():
    mel = omni.log_mel(0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000))
    assert mel.shape == (128, 100) and mel[:, 50].argmax() == 42
    found = [mel[:, 50].max(), mel.max(), mel.min(), mel.mean()]
    assert [x.item() for x in found] == pytest.approx([1.474446, 1.474446, -0.525554, -0.430371], abs=1e-5)
    filters = omni.mel_filters(128, 400, 16000)
    assert (filters != 0).sum() == 394 and filters.sum().item() == pytest.approx(3.190986, abs=1e-6)


@pytest.mark.parametrize("samples, frames, by8, by16", [
    (400, 2, 1, 1), (1600, 10, 2, 1), (15_999, 99, 13, 7), (16_000, 100, 13, 7), (16_160, 101, 14, 7), (24_000, 150, 20, 10),
    (40_000, 250, 33, 16), (80_000, 500, 65, 32), (960_000, 6000, 780, 375),
])  # fmt: skip
def test_audio_tokens(samples, frames, by8, by16):
    assert samples // 160 == frames
    assert (omni.count_audio_tokens(frames, 100, 3), omni.count_audio_tokens(frames, 160, 4)) == (by8, by16)


def test_audio_windows_do_not_see_each_other():
    """Chunks of 100 frames, windows of 200: frames from 200 on move nothing before token 26; what the model counts is what
    the encoder gives."""
    torch.manual_seed(0)
    model = omni.AudioTransformer(4, 3, 24, 2, 2, 36).eval()
    mel = torch.randn(128, 350)
    other = torch.cat((mel[:, :200], torch.randn(128, 150)), 1)
    first, second = (model(*omni.cut_into_windows([x], 100, 2), torch.float32) for x in (mel, other))
    assert first.shape == (omni.count_audio_tokens(350, 100, 3), 24)
    assert torch.equal(first[:26], second[:26]) and not torch.equal(first[26], second[26])
    wide = model(*omni.cut_into_windows([mel], 100, 4), torch.float32)
    assert (wide[0] - first[0]).abs().max() > 1e-4


# Vision


def test_smart_resize():
    for size, tokens in (((480, 640), 300), ((100, 100), 64), ((1080, 1920), 2040), ((5000, 5000), 16_384)):
        height, width = omni.smart_resize(*size, 32, 65_536, 16_777_216)
        assert height % 32 == width % 32 == 0 and height * width // 32**2 == tokens


def test_patches_come_by_blocks_of_four():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    patches, size = omni.cut_into_patches(frames, 2, 1, 10**6)
    assert patches.shape == (2, 24, 3 * 2 * 2 * 2) and size == (4, 6)
    frames = np.concatenate((frames, frames[-1:]))  # an odd number repeats its last one
    order = [(2 * i + a, 2 * j + b) for i in range(2) for j in range(3) for a in range(2) for b in range(2)]
    for t, (n, (i, j)) in itertools.product(range(2), enumerate(order)):
        expected = frames[2 * t : 2 * t + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(3, 0, 1, 2) / 255
        assert patches[t, n].numpy() == pytest.approx(((expected - 0.5) / 0.5).flatten(), abs=1e-6)


def test_position_table_is_read_bilinearly():
    model = omni.VisionTransformer(2, 5, 8, 1, 2, 12, 6)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    coordinates = torch.stack((row, column), -1).flatten(0, 1)[None]
    table = model.position_embedding.weight.T.view(1, 8, 5, 5)
    expected = F.interpolate(table, (4, 6), mode="bilinear", align_corners=True).flatten(2).mT
    torch.testing.assert_close(model.positions(coordinates, torch.tensor([[4, 6]])), expected)


def test_frames_are_encoded_alone_whatever_the_padding():
    torch.manual_seed(0)
    model = omni.VisionTransformer(2, 5, 16, 2, 2, 12, 6).eval()
    small, large = torch.randn(8, 24), torch.randn(24, 24)
    both = model(omni.stack([small, large], 0.0), torch.tensor([[2, 4], [4, 6]]), torch.float32)
    alone = [model(x[None], torch.tensor([size]), torch.float32) for x, size in ((small, (2, 4)), (large, (4, 6)))]
    torch.testing.assert_close(both, torch.cat(alone))


# Thinker


LAYOUTS = {  # segments: t, h, w as the specification has them
    "image": ([words(3), words(1), S(grid=(1, 2, 3)), words(3)],
              "0 1 2 3 4 4 4 4 4 4 7 8 9", "0 1 2 3 4 4 4 5 5 5 7 8 9", "0 1 2 3 4 5 6 4 5 6 7 8 9"),
    "audio and image": ([words(2), S(n_audio=3), words(2), S(grid=(1, 2, 2)), words(2)],
                        "0 1 2 3 4 5 6 7 7 7 7 9 10", "0 1 2 3 4 5 6 7 7 8 8 9 10", "0 1 2 3 4 5 6 7 8 7 8 9 10"),
    "video, absolute": ([words(2), S(grid=(3, 2, 2), step=13.0), words(2)], "0 1 2 2 2 2 15 15 15 15 28 28 28 28 29 30",
                        "0 1 2 2 3 3 2 2 3 3 2 2 3 3 29 30", "0 1 2 3 2 3 2 3 2 3 2 3 2 3 29 30"),
    "timestamps": ([words(5), S(grid=(1, 2, 2)), words(4), S(grid=(1, 2, 2)), words(2)],
                   "0 1 2 3 4 5 5 5 5 7 8 9 10 11 11 11 11 13 14", "0 1 2 3 4 5 5 6 6 7 8 9 10 11 11 12 12 13 14",
                   "0 1 2 3 4 5 6 5 6 7 8 9 10 11 12 11 12 13 14"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions(name):
    segments, *expected = LAYOUTS[name]
    ids, _ = omni.position_ids(segments)
    assert ids.tolist() == [[float(x) for x in row.split()] for row in expected]


def test_positions_of_sound_and_frames_together():
    ids, kinds = omni.position_ids([words(4), S(n_audio=26, grid=(2, 2, 2), step=13.0), words(3)])
    assert "".join("TAV"[k] for k in kinds) == "TTTT" + 2 * ("VVVV" + 13 * "A") + "TTT"
    assert ids[0].tolist() == [*range(4), *[4] * 4, *range(4, 17), *[17] * 4, *range(17, 33)]
    assert ids[1, kinds == 2].tolist() == [4, 4, 5, 5] * 2 and ids[2, kinds == 2].tolist() == [4, 5, 4, 5] * 2
    ids, _ = omni.position_ids([words(2), *[words(3), S(n_audio=10, grid=(1, 2, 2))] * 2, words(4)])
    assert ids[0].tolist() == [*range(5), *[5] * 4, *range(5, 18), *[18] * 4, *range(18, 32)]


def test_rotary_axes():
    assert "".join("thw"[i] for i in omni.rotary_axes(24, 20, 20)) == "thw" * 20 + "tttt"
    assert "".join("thw"[i] for i in omni.rotary_axes(*omni.rotary_section(32))) == "thw" * 10 + "th"
    same = torch.arange(9).expand(3, 1, 9)
    cos, _ = omni.rotary_angles(same, 16, 1e4)
    expected = (torch.arange(9)[:, None] * 1e4 ** (-torch.arange(8) / 8)).cos()
    torch.testing.assert_close(cos[0, 0], expected)


def recurrent(q, k, v, g, beta):
    """The gated delta rule token by token."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, outputs = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        error = v[:, :, t] - torch.einsum("bhef,bhe->bhf", state, k[:, :, t])
        state = state + torch.einsum("bh,bhe,bhf->bhef", beta[:, :, t], k[:, :, t], error)
        outputs.append(torch.einsum("bhef,bhe->bhf", state, q[:, :, t]) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 2), state


def test_delta_rule_by_hand():
    q, k, v = (torch.tensor(x).view(1, 1, 3, 2) for x in ([1.0, 0, 3, 4, 0, 2], [2.0, 0, 3, 4, 0, 1], [1.0, 2, 3, 0, 0, 1]))
    g, beta = torch.tensor([[[1.0, 0.5, 0.5]]]).log(), torch.tensor([[[1.0, 0.5, 1.0]]])
    for chunk in (2, 64):
        o, state = omni.gated_delta_rule(q, k, v, g, beta, chunk)
        assert o.flatten().tolist() == pytest.approx([0.707106, 1.414213, 1.166726, 0.212132, 0, 0.707106], abs=2e-6)
        assert state.flatten().tolist() == pytest.approx([0.655, 0.41, 0, 1], abs=2e-6)


@pytest.mark.parametrize("T", [1, 15, 16, 37, 130])
def test_delta_rule_in_chunks_is_the_recurrence(T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 4, T, n, dtype=torch.float64, generator=generator) for n in (8, 8, 6))
    g, beta = (torch.rand(2, 4, T, dtype=torch.float64, generator=generator) for _ in range(2))
    for found, expected in zip(omni.gated_delta_rule(q, k, v, -2 * g, beta, 16), recurrent(q, k, v, -2 * g, beta)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_attention_gate_and_partial_rotation():
    torch.manual_seed(0)
    layer = omni.GatedAttention(24, 4, 2, 8)
    rope = omni.rotary_angles(torch.arange(5).expand(3, 1, 5), 4, 100.0)
    x = torch.randn(1, 4, 5, 8)
    turned = layer.turn(x, *rope)
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[..., 1:, :4], x[..., 1:, :4])
    outputs = []
    for gate in (0.0, 1e4):  # half open, open
        weight = layer.q.weight.data.view(4, 2, 8, 24)
        weight[:, 1] = 0
        x = F.normalize(torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)))
        x[..., 0] = 1.0
        weight[:, 1, :, 0] = gate
        weight[:, 0, :, 0] = layer.k.weight.data[:, 0] = layer.v.weight.data[:, 0] = 0
        outputs.append(layer(x, *rope))
    torch.testing.assert_close(2 * outputs[0], outputs[1])


def test_experts_one_token_at_a_time():
    model, _ = tiny()
    moe = model.thinker.blocks[0].moe
    x = torch.randn(2, 5, 24)
    y, balance = moe(x, torch.ones(2, 5, dtype=torch.bool))
    probability = 0.0
    for i, j in itertools.product(range(2), range(5)):
        p = (moe.router @ x[i, j]).softmax(-1)
        probability = probability + p
        best = p.topk(3).indices
        expected = 0.0
        for e in best:
            gate, up = (moe.experts.gate_up[e] @ x[i, j]).chunk(2)
            expected = expected + p[e] / p[best].sum() * (moe.experts.down[e] @ (F.silu(gate) * up))
        gate, up = (moe.shared.gate_up.weight @ x[i, j]).chunk(2)
        shared = moe.shared.down.weight @ (F.silu(gate) * up)
        expected = expected + shared * torch.sigmoid(moe.shared_gate.weight @ x[i, j])
        torch.testing.assert_close(y[i, j], expected, atol=1e-6, rtol=1e-4)
    assert balance.item() == pytest.approx((8 * probability * 3 / 8).sum().item(), rel=1e-5)


def test_balance_loss_of_the_specification():
    """Its four logits for two tokens, top 2: the shares of this batch, and those that the next one is to use."""
    moe = omni.SharedExpertMoE(4, 4, 4, 4, 2)
    moe.router.data = torch.eye(4)
    x = torch.tensor([[[2.0, 1, 0, -1], [0, 3, 0, 0], [1, 1, 1, 4], [9, 9, 9, 9]]])
    exists = torch.tensor([[True, True, True, False]])
    for p in moe.parameters():
        p.data = torch.eye(4) if p is moe.router else torch.zeros_like(p)
    moe(x, exists)
    assert moe.load.sum() == 6


    with mock.patch.object(omni.dist, "all_reduce"):
        omni.update_shares(torch.nn.ModuleList([moe]))
    assert moe(x, exists)[1].item() / 3 == pytest.approx(balance(x[0, :3]), rel=1e-6)
    assert balance(torch.tensor([[2.0, 1, 0, -1], [0, 3, 0, 0], [1, 1, 1, 4]])) == pytest.approx(2.264744, abs=1e-6)


def balance(logits):
    p = logits.double().softmax(-1)
    f = torch.zeros(4, dtype=torch.float64)
    for row in p:
        f[row.topk(2).indices] += 1 / len(p)
    return (4 * f * p.mean(0)).sum().item()


# Talker


def test_interleaving():
    found = ["".join("TS"[x] for x in omni.interleave(*sizes, 0)) for sizes in ((3, 8), (4, 2), (2, 7))]
    assert found == ["TSSTSSSTSSS", "TTSTTS", "TSSSTSSSS"]
    for text, speech, lead in itertools.product((1, 3, 7), (1, 5, 20), (0, 2, 5)):
        order = omni.interleave(text, speech, lead)
        assert (order.count(False), order.count(True)) == (text, speech)
        for i in range(1, len(order) + 1):
            n = sum(order[:i])
            assert n * text <= (i - n) * speech


def test_toy_codec_keeps_the_letters():
    for letter in "amz":
        codes = omni.encode_speech(omni.spell(letter), 16, 64)
        spectrum = np.abs(np.fft.rfft(omni.decode_speech(codes, 64)[:1280]))
        row, column = divmod(ord(letter) - 97, 6)
        loudest = np.argsort(spectrum)[-2:] * 12.5
        assert sorted(loudest) == pytest.approx([omni.BANDS[1 + row], omni.BANDS[6 + column]], abs=12.5)
        assert codes.shape == (4, 16) and not codes[2:, 1:].any(), "silence follows the tones"


def test_talker_predicts_what_follows():
    """A frame moves nothing before it, and a code of a frame only the codes behind it."""
    model, cfg = tiny(stage="t1")
    source, _ = make_corpora(omni, cfg)
    batch = omni.get_batch(source, 0, 3, cfg)
    _, middle, _ = model.thinker(torch.zeros(*batch["tokens"].shape, 24), batch["positions"], batch["kinds"] >= 0)
    h, _ = model.run_talker(middle, batch)
    (places,) = torch.where(batch["codes"][0, :, 0] >= 0)
    place = places[len(places) // 2]
    changed = {**batch, "codes": batch["codes"].clone()}
    changed["codes"][0, place] = (changed["codes"][0, place] + 1) % cfg.codebook_size
    moved = ((model.run_talker(middle, changed)[0] - h).abs() > 1e-6).any(-1)
    assert not moved[0, :place].any() and moved[0, place] and not moved[1:].any()
    frame = batch["codes"][0, places[:2]]
    logits = model.talker.predict_codes(h[0, places[:2]], frame[:, :-1])
    other = frame.clone()
    other[:, 1] = (other[:, 1] + 1) % cfg.codebook_size
    moved = ((model.talker.predict_codes(h[0, places[:2]], other[:, :-1]) - logits).abs() > 1e-6).any(-1).any(0)
    assert moved.tolist() == [False, True, True]


# Data


def test_items_depend_on_seed_and_number_alone():
    _, cfg = tiny()
    source, held_out = make_corpora(omni, cfg)
    whole = omni.get_batch(source, 5, 8, cfg)
    for i in range(8):
        one = omni.get_batch(source, 5 + i, 1, cfg)
        n = one["n_tokens"]
        for name in ("tokens", "targets", "kinds", "answers"):
            assert torch.equal(whole[name][i, :n], one[name][0]) and (whole["kinds"][i, n:] == -1).all()
    assert whole["n_targets"] == (whole["targets"] >= 0).sum() == sum(whole[f"n_{m}"] for m in omni.MODALITIES)
    assert not torch.equal(omni.get_batch(held_out, 5, 1, cfg)["tokens"], omni.get_batch(source, 5, 1, cfg)["tokens"])
    assert {omni.draw_window(i, cfg) for i in range(50)} == {1, 2, 3}


def test_layouts_of_items():
    cfg = omni.Config(fps=1.25, audio_chunk=160, patch=16, min_pixels=1)
    tokenizer = omni.load_tokenizer("bytes", omni.SPECIALS)

    def text(media, **overrides):
        config = omni.dataclasses.replace(cfg, **overrides)
        item = omni.make_item([("hi", "")], media, tokenizer, np.random.default_rng(0), config)
        return tokenizer.decode(omni.place_tokens(item, tokenizer)[0].tolist())

    frames = {"frames": (None, (4, 32, 64))}
    pad = {name: f"<|{name}_pad|>" for name in ("image", "video", "audio")}
    assert text({"frames": (None, (1, 64, 32))}) == f"<|vision_start|>{2 * pad['image']}<|vision_end|>hi<|endoftext|>"
    clip = [f"<{s} seconds><|vision_start|>{2 * pad['video']}<|vision_end|>" for s in (0.4, 2.0)]
    assert text(frames) == "".join(clip) + "hi<|endoftext|>"
    assert text(frames, time="abs") == f"<|vision_start|>{4 * pad['video']}<|vision_end|>hi<|endoftext|>"
    both = [f"<{s} seconds>{2 * pad['video']}{n * pad['audio']}" for s, n in ((0.4, 10), (2.0, 10))]
    sound = {"wave": (None, 51_200)}
    assert text(frames | sound) == f"<|vision_start|><|audio_start|>{''.join(both)}<|audio_end|><|vision_end|>hi<|endoftext|>"
    long = text({"wave": (None, 16_000 * 30)})
    gaps = [len(part) // len(pad["audio"]) for part in re.split(r"<\d+\.\d seconds>|hi", long)[:-1]]
    assert long.count(pad["audio"]) == 188 and all(10 <= gap <= 50 for gap in gaps[1:-1])
    assert [float(s) for s in re.findall(r"<(\d+\.\d) seconds>", long)] == pytest.approx(np.cumsum(
        [part.count(pad["audio"]) * 0.16 for part in re.split(r"<\d+\.\d seconds>", long)[:-1]]), abs=0.051)  # fmt: skip


def test_dealing():
    parts, sums = omni.deal([5, 1, 4, 2, 3, 3], 3)
    assert sorted(sum(parts, [])) == list(range(6)) and sums == [6, 6, 6]
    _, cfg = tiny(micro_batch=1)
    source, _ = make_corpora(omni, cfg)
    seen = []
    for rank in range(4):
        batches, _ = omni.read_dealt(source, 3, cfg, torch.device("cpu"), rank, 4)
        seen += [batch["n_targets"] for batch in batches]
    assert len(seen) == 8 and sum(seen) == omni.get_batch(source, 3, 8, cfg)["n_targets"]


def write_media(folder):
    rate = dict(good=16_000, fast=44_100)
    for name, hertz in rate.items():
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, hertz, 0, "NONE", ""))
            file.writeframes(np.arange(4000, dtype="<i2").tobytes())
    (folder / "text.wav").write_text("no sound")
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    (folder / "a.ppm").write_bytes(b"P6\n# made here\n16 8\n255\n" + image.tobytes())
    np.save(folder / "b.npy", image.astype(np.float32))
    (folder / "clip").mkdir()
    for i in range(4):
        np.save(folder / "clip" / f"{i}.npy", image + i)
    return image


def test_manifest(tmp_path):
    image = write_media(tmp_path)
    rows = [dict(text="x", image="a.ppm"), dict(text="y", audio="good.wav"), dict(text="z", video="clip", fps=2.5, audio="good.wav")]
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    read = omni.read_manifest(tmp_path / "m.jsonl", omni.Config(fps=1.25))
    assert [caption[0][0] for caption, _ in read] == ["x", "y", "z"]
    assert np.array_equal(read[0][1]["frames"][0](), image[None]) and read[1][1]["wave"][1] == 4000
    assert read[1][1]["wave"][0]() == pytest.approx(np.arange(4000) / 32768)
    frames, size = read[2][1]["frames"]
    assert size == (2, 8, 16) and np.array_equal(frames(), np.stack((image, image + 2)))


@pytest.mark.parametrize("row, message", [
    (dict(text="x", audio="fast.wav"), "ffmpeg"), (dict(text="x", audio="text.wav"), "not a PCM"), (dict(text="x", audio="no.wav"), "No such"),
    (dict(text="x", image="b.npy"), "float32"), (dict(text="x", image="text.wav"), "neither"), (dict(text="x", video="clip"), "fps"),
    (dict(image="a.ppm"), "no text"), (dict(text=3), "no text"), (dict(text="x", sound="a"), "sound"), ([], "line 2"),
])  # fmt: skip
def test_broken_lines_of_a_manifest(tmp_path, row, message):
    write_media(tmp_path)
    (tmp_path / "m.jsonl").write_text(json.dumps(dict(text="fine")) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"line 2.*{message}|{message}"):
        omni.read_manifest(tmp_path / "m.jsonl", omni.Config())


# Stages, as the command line runs them

FLAGS = "--batch_size 4 --val_items 2 --log_every 1 --save_every 2 --preset demo_walk --dim 32 --head_dim 8 --rotary_dim 4 " \
        "--delta_head_dim 8 --mix text:1,audio:1,image:1,video:1,av:1"  # fmt: skip


def checkpoint(folder):
    """{name: tensor} of the newest checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(sorted(folder.glob("step_*[0-9]"))[-1], folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)["model"]


def run(*flags):
    with mock.patch.object(omni, "show"), mock.patch.object(omni, "find_files", lambda path: (["a"], [])), \
            mock.patch.object(omni, "read_documents", lambda *_: [(f"{i}", "a text " * 9) for i in range(99)]):  # fmt: skip
        omni.main([*FLAGS.split(), *map(str, flags)])


def test_stages_train_their_own_parameters(tmp_path):
    run("--stage", "all", "--steps", 2, "--out", tmp_path, "--warmup", 0)
    before = None
    for name, stage in omni.STAGES.items():
        after = {k: v for k, v in checkpoint(tmp_path / name).items() if not k.endswith("share")}
        if before:
            moved = {k for k in after if not torch.equal(after[k], before[k])}
            trained = {k for k in after if re.match(stage.trained, k)}
            assert moved <= trained and len(moved) > 0.9 * len(trained), name
        before = after


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    rows = lambda path: [r for r in map(json.loads, (path / "s2" / "metrics.jsonl").open()) if "loss" in r]  # noqa: E731
    run("--stage", "s2", "--steps", 4, "--out", tmp_path / "whole")
    whole = tmp_path / "whole" / "s2"
    cut = tmp_path / "cut" / "s2"
    omni.shutil.copytree(whole, cut)
    omni.shutil.rmtree(sorted(cut.glob("step_*[0-9]"))[-1])
    run("--stage", "s2", "--steps", 4, "--out", tmp_path / "cut", "--resume")
    resumed = checkpoint(cut)
    for key, tensor in checkpoint(whole).items():
        assert torch.equal(tensor, resumed[key]), key
    assert rows(tmp_path / "cut")[-2:] == rows(tmp_path / "whole")[-2:]
    with pytest.raises(SystemExit):
        run("--stage", "s2", "--steps", 4, "--out", tmp_path / "cut")
