"""Qwen3.5-Omni's specification, in the order of omni.py: worked examples, independent loops, and runs of the command line."""
import gc
import itertools
import json
import math
import os
import re
import signal
import wave
from unittest import mock

import numpy as np
import omni
import pytest
import torch
from conftest import SCRIPTS
from ranks import make_corpora, make_model, run_main
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROW = SCRIPTS["omni"]
S = omni.Segment


def test_log_mel_of_a_tone():
    mel = omni.log_mel(0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000))
    assert mel.shape == (128, 100) and mel[:, 50].argmax() == 42
    assert [x.item() for x in (mel[:, 50].max(), mel.max(), mel.min(), mel.mean())] == pytest.approx([1.474446, 1.474446, -0.525554, -0.430371], abs=1e-5)
    filters = omni.mel_filters(128, 400, 16000)
    assert (filters != 0).sum() == 394 and filters.sum().item() == pytest.approx(3.190986, abs=1e-6)


def test_audio_tokens():
    """Of so many samples, by three convolutions of chunks of 100 frames and by four of chunks of 160."""
    for samples, by8, by16 in ((400, 1, 1), (1600, 2, 1), (15_999, 13, 7), (16_000, 13, 7), (16_160, 14, 7), (24_000, 20, 10),
                               (40_000, 33, 16), (80_000, 65, 32), (480_000, 390, 188), (960_000, 780, 375)):  # fmt: skip
        found = omni.count_audio_tokens(samples // 160, 100, 3), omni.count_audio_tokens(samples // 160, 160, 4)
        assert found == (by8, by16), samples


def test_audio_windows_do_not_see_each_other():
    """Chunks of 100 frames, windows of 200: frames from 200 on move nothing before token 26. What is counted is what comes out."""
    model = omni.AudioTransformer(4, 3, 24, 2, 2, 36).eval()
    mel = torch.randn(128, 350, generator=torch.Generator().manual_seed(0))
    other = torch.cat((mel[:, :200], torch.randn(128, 150)), 1)
    first, second = (model(*omni.cut_into_windows([x], 100, 2), torch.float32) for x in (mel, other))
    assert first.shape == (omni.count_audio_tokens(350, 100, 3), 24)
    assert torch.equal(first[:26], second[:26]) and not torch.equal(first[26], second[26])
    assert (model(*omni.cut_into_windows([mel], 100, 4), torch.float32)[0] - first[0]).abs().max() > 1e-4


def test_smart_resize():
    for size, tokens in (((480, 640), 300), ((100, 100), 64), ((90, 120), 70), ((1080, 1920), 2040), ((5000, 5000), 16_384), ((3000, 9000), 16_133)):
        height, width = omni.smart_resize(*size, 32, 65_536, 16_777_216)
        assert height % 32 == width % 32 == 0 and height * width // 32**2 == tokens


def test_patches_come_by_blocks_of_four():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    patches, size = omni.cut_into_patches(frames, 2, 1, 10**6)
    assert patches.shape == (2, 24, 3 * 2 * 2 * 2) and size == (4, 6)
    frames = np.concatenate((frames, frames[-1:])) / 127.5 - 1  # an odd number repeats its last one
    order = [(2 * i + a, 2 * j + b) for i in range(2) for j in range(3) for a in range(2) for b in range(2)]
    for t, (n, (i, j)) in itertools.product(range(2), enumerate(order)):
        expected = frames[2 * t : 2 * t + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(3, 0, 1, 2)
        assert patches[t, n].numpy() == pytest.approx(expected.flatten(), abs=1e-6)


@pytest.mark.parametrize("segments, t, h, w", [  # an image, a sound and an image, a video by absolute time and one with timestamps
    ([S([0] * 3), S([0]), S(grid=(1, 2, 3)), S([0] * 3)], "0 1 2 3 4 4 4 4 4 4 7 8 9", "0 1 2 3 4 4 4 5 5 5 7 8 9", "0 1 2 3 4 5 6 4 5 6 7 8 9"),
    ([S([0] * 2), S(n_audio=3), S([0] * 2), S(grid=(1, 2, 2)), S([0] * 2)],
     "0 1 2 3 4 5 6 7 7 7 7 9 10", "0 1 2 3 4 5 6 7 7 8 8 9 10", "0 1 2 3 4 5 6 7 8 7 8 9 10"),
    ([S([0] * 2), S(grid=(3, 2, 2), step=13.0), S([0] * 2)], "0 1 2 2 2 2 15 15 15 15 28 28 28 28 29 30",
     "0 1 2 2 3 3 2 2 3 3 2 2 3 3 29 30", "0 1 2 3 2 3 2 3 2 3 2 3 2 3 29 30"),
    ([S([0] * 5), S(grid=(1, 2, 2)), S([0] * 4), S(grid=(1, 2, 2)), S([0] * 2)], "0 1 2 3 4 5 5 5 5 7 8 9 10 11 11 11 11 13 14",
     "0 1 2 3 4 5 5 6 6 7 8 9 10 11 11 12 12 13 14", "0 1 2 3 4 5 6 5 6 7 8 9 10 11 12 11 12 13 14"),
])  # fmt: skip
def test_positions_of_the_specification(segments, t, h, w):
    ids, _ = omni.position_ids(segments)
    assert ids.tolist() == [[float(x) for x in row.split()] for row in (t, h, w)]


def test_positions_of_sound_and_frames_together():
    ids, kinds = omni.position_ids([S([0] * 4), S(n_audio=26, grid=(2, 2, 2), step=13.0), S([0] * 3)])
    assert "".join("TAV"[k] for k in kinds) == "TTTT" + 2 * ("VVVV" + 13 * "A") + "TTT"
    assert ids[0].tolist() == [*range(4), *[4] * 4, *range(4, 17), *[17] * 4, *range(17, 33)]
    assert ids[1, kinds == 2].tolist() == [4, 4, 5, 5] * 2 and ids[2, kinds == 2].tolist() == [4, 5, 4, 5] * 2
    ids, _ = omni.position_ids([S([0] * 2), *[S([0] * 3), S(n_audio=10, grid=(1, 2, 2))] * 2, S([0] * 4)])
    assert ids[0].tolist() == [*range(5), *[5] * 4, *range(5, 18), *[18] * 4, *range(18, 32)]


def test_rotary_axes():
    for section, expected in (((24, 20, 20), "thw" * 20 + "tttt"), (omni.rotary_section(32), "thw" * 10 + "th")):
        assert "".join("thw"[i] for i in omni.rotary_axes(*section)) == expected
    cos, _ = omni.rotary_angles(torch.arange(9).expand(3, 1, 9), 16, 1e4)
    torch.testing.assert_close(cos[0, 0], (torch.arange(9)[:, None] * 1e4 ** (-torch.arange(8) / 8)).cos())


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
    outputs, last = omni.gated_delta_rule(q, k, v, -2 * g, beta, 16)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, expected = torch.zeros(2, 4, 8, 6, dtype=torch.float64), []
    for t in range(T):  # the error is that of the decayed state
        state = state * (-2 * g[:, :, t, None, None]).exp()
        error = v[:, :, t, None] - k[:, :, t, None] @ state
        state = state + beta[:, :, t, None, None] * k[:, :, t, :, None] * error
        expected.append(q[:, :, t, None] @ state / 8**0.5)
    torch.testing.assert_close((outputs, last), (torch.cat(expected, 2), state), atol=1e-12, rtol=1e-12)


def test_gated_attention():
    """It turns the first dimensions of a head alone; a gate whose weights are 0 lets half of the head through."""
    layer = omni.GatedAttention(24, 4, 2, 8)
    rope = omni.rotary_angles(torch.arange(5).expand(3, 1, 5), 4, 100.0)
    x = torch.randn(1, 4, 5, 8)
    turned = layer.turn(x, *rope)
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[..., 1:, :4], x[..., 1:, :4])
    layer.q.weight.data.view(4, 2, 8, 24)[:, 1] = 0  # of each head, query and gate
    with mock.patch.object(omni, "causal_attention", return_value=x):
        torch.testing.assert_close(layer(torch.randn(1, 5, 24), *rope), layer.out(x.transpose(1, 2).flatten(2) / 2))


def test_balance_loss_of_the_specification():
    """Its logits of three tokens for four experts, top 2, with the shares that this batch leaves; a fourth token does not exist."""
    moe = omni.SharedExpertMoE(4, 4, 4, 4, 2)
    for p in moe.parameters():
        torch.nn.init.zeros_(p)
    moe.router.data = torch.eye(4)
    batch = torch.tensor([[[2.0, 1, 0, -1], [0, 3, 0, 0], [1, 1, 1, 4], [9, 9, 9, 9]]]), torch.tensor([[True, True, True, False]])
    moe(*batch)
    assert moe.load.sum() == 6
    with mock.patch.object(omni.dist, "all_reduce"):
        omni.update_shares(torch.nn.ModuleList([moe]))
    assert moe(*batch)[1].item() / 3 == pytest.approx(2.264744, abs=1e-6)


def test_interleaving():
    found = ["".join("TS"[x] for x in omni.interleave(*sizes, 0)) for sizes in ((3, 8), (4, 2), (2, 7))]
    assert found == ["TSSTSSSTSSS", "TTSTTS", "TSSSTSSSS"]
    for text, speech, lead in itertools.product((1, 3, 7), (1, 5, 20), (0, 2, 5)):
        order = omni.interleave(text, speech, lead)
        assert (order.count(False), order.count(True)) == (text, speech)
        for i in range(1, len(order) + 1):
            assert sum(order[:i]) * text <= (i - sum(order[:i])) * speech


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
    cfg = omni.Config(**ROW.tiny | {"stage": "t1"})
    model, batch = make_model(omni, ROW, cfg), omni.get_batch(make_corpora(omni, cfg)[0], 0, 3, cfg)
    _, middle, _ = model.thinker(torch.zeros(*batch["tokens"].shape, 24), batch["positions"], batch["kinds"] >= 0)
    h, _ = model.run_talker(middle, batch)
    (places,) = torch.where(batch["codes"][0, :, 0] >= 0)
    place = places[len(places) // 2]
    changed = batch["codes"].clone()
    changed[0, place] = (changed[0, place] + 1) % cfg.codebook_size
    moved = ((model.run_talker(middle, {**batch, "codes": changed})[0] - h).abs() > 1e-6).any(-1)
    assert not moved[0, :place].any() and moved[0, place] and not moved[1:].any()
    h, codes = h[0, places[:2]], batch["codes"][0, places[:2], :-1]
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % cfg.codebook_size
    moved = (model.talker.predict_codes(h, changed) - model.talker.predict_codes(h, codes)).abs() > 1e-6
    assert moved.any(-1).any(0).tolist() == [False, True, True]


def test_items_depend_on_seed_and_number_alone():
    cfg = omni.Config(**ROW.tiny)
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
    tokenizer = omni.load_tokenizer("bytes", omni.SPECIALS)

    def text(media, time="text"):
        cfg = omni.Config(fps=1.25, audio_chunk=160, patch=16, min_pixels=1, time=time)
        item = omni.make_item([("hi", "")], {kind: (None, size) for kind, size in media.items()}, tokenizer, np.random.default_rng(0), cfg)
        return re.sub(r"<\|(\w)\w+_pad\|>", r"\1", tokenizer.decode(omni.place_tokens(item, tokenizer)[0].tolist()))

    video, av = {"frames": (4, 32, 64)}, {"frames": (4, 32, 64), "wave": 51_200}
    assert text({"frames": (1, 64, 32)}) == "<|vision_start|>ii<|vision_end|>hi<|endoftext|>"
    assert text(video) == "<0.4 seconds><|vision_start|>vv<|vision_end|><2.0 seconds><|vision_start|>vv<|vision_end|>hi<|endoftext|>"
    assert text(video, "abs") == "<|vision_start|>vvvv<|vision_end|>hi<|endoftext|>"
    both = f"<0.4 seconds>vv{10 * 'a'}<2.0 seconds>vv{10 * 'a'}"
    assert text(av) == f"<|vision_start|><|audio_start|>{both}<|audio_end|><|vision_end|>hi<|endoftext|>"
    *parts, last = re.findall(r"(a+)<(?:(\d+\.\d) seconds>)?", text({"wave": 16_000 * 30}))
    tokens = [len(sound) for sound, _ in parts]
    assert sum(tokens) + len(last[0]) == 188 and all(10 <= n <= 50 for n in tokens)
    assert [float(seconds) for _, seconds in parts] == pytest.approx(0.16 * np.cumsum(tokens), abs=0.051)


def test_dealing():
    parts, sums = omni.deal([5, 1, 4, 2, 3, 3], 3)
    assert sorted(sum(parts, [])) == list(range(6)) and sums == [6, 6, 6]
    cfg = omni.Config(**ROW.tiny | {"micro_batch": 1})
    source, _ = make_corpora(omni, cfg)
    dealt = [omni.read_dealt(source, 3, cfg, torch.device("cpu"), rank, 4)[0] for rank in range(4)]
    seen = [batch["n_targets"] for batches in dealt for batch in batches]
    assert len(seen) == 8 and sum(seen) == omni.get_batch(source, 3, 8, cfg)["n_targets"]


def test_manifest(tmp_path):
    """Sounds, an image and a clip that is read at half its rate; then lines that are broken."""
    for name, hertz in (("good", 16_000), ("fast", 44_100)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, hertz, 0, "NONE", ""))
            file.writeframes(np.arange(4000, dtype="<i2").tobytes())
    (tmp_path / "text.wav").write_text("no sound")
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    (tmp_path / "a.ppm").write_bytes(b"P6\n# made here\n16 8\n255\n" + image.tobytes())
    np.save(tmp_path / "b.npy", image.astype(np.float32))
    (tmp_path / "clip").mkdir()
    for i in range(4):
        np.save(tmp_path / "clip" / f"{i}.npy", image + i)
    rows = [dict(text="x", image="a.ppm"), dict(text="y", audio="good.wav"), dict(text="z", video="clip", fps=2.5, audio="good.wav")]
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (_, picture), (_, sound), (caption, clip) = omni.read_manifest(tmp_path / "m.jsonl", omni.Config(fps=1.25))
    assert np.array_equal(picture["frames"][0](), image[None]) and caption == [("z", "")]
    assert sound["wave"][1] == 4000 and sound["wave"][0]() == pytest.approx(np.arange(4000) / 32768)
    assert clip["frames"][1] == (2, 8, 16) and np.array_equal(clip["frames"][0](), np.stack((image, image + 2)))
    for row, message in (
        (dict(text="x", audio="fast.wav"), "ffmpeg"), (dict(text="x", audio="text.wav"), "not a PCM"), (dict(text="x", audio="no.wav"), "No such"),
        (dict(text="x", image="b.npy"), "float32"), (dict(text="x", image="text.wav"), "neither"), (dict(text="x", video="clip"), "fps"),
        (dict(image="a.ppm"), "no text"), (dict(text=3), "no text"), (dict(text="x", sound="a"), "sound"), ([], "TypeError"),
    ):  # fmt: skip
        (tmp_path / "m.jsonl").write_text(json.dumps(dict(text="fine")) + "\n" + json.dumps(row))
        with pytest.raises(ValueError, match=f"line 2: .*{message}"):
            omni.read_manifest(tmp_path / "m.jsonl", omni.Config())


def test_dry_run_of_every_preset(capsys):
    for preset, count in ROW.counts.items():
        omni.main(["--preset", preset, "--dry_run", "--world_size", "2"])
        out = capsys.readouterr().out
        sizes = {kind: float(size) for kind, size in re.findall(r"(\w+) +([\d.]+) GiB", out)}
        assert f"parameters {count:,} | activated" in out and min(sizes.values()) > 0, preset
        assert sizes["parameters"] == pytest.approx(4 * count / 2 / 2**30, abs=1e-3)
    flops = omni.flops_per_token(omni.Config(**omni.PRESETS["35b_a3b"], seq_len=1))
    assert flops == pytest.approx(6 * (2_946_429_568 + 30 * 3 * 32 * 128**2), rel=1e-3), "activated parameters, and products of the states"


@pytest.fixture(scope="module")
def run():
    """run(*flags): exit status, stdout and stderr of a small run with documents of its own."""
    small = "--preset demo_walk --stage s2 --batch_size 4 --val_items 1 --log_every 1 --dim 32 --head_dim 8 --rotary_dim 4 --delta_head_dim 8"
    texts = [(f"{i}", "a text " * 9 * (i % 3 > 0)) for i in range(99)]  # a third of them empty
    with mock.patch.multiple(omni, show=mock.Mock(), find_files=lambda path: ([], []), read_documents=lambda *_: texts):
        yield lambda *flags: run_main("omni", [*small.split(), "--mix", "text:1,audio:1,image:1,video:1,av:1", *flags])


def checkpoint(folder):
    """{name: tensor} of the newest checkpoint."""
    dcp_to_torch_save(sorted(folder.glob("step_*[0-9]"))[-1], folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)["model"]


def test_stages_train_their_own_parameters(run, tmp_path):
    assert run("--stage", "all", "--steps", 2, "--out", tmp_path, "--warmup", 0)[0] == 0
    states = [checkpoint(tmp_path / name) for name in omni.STAGES]
    every = {"audio", "audio_adapter", "vision", "vision.merger", "thinker"}
    stages = dict(lm={"thinker"}, s1a={"audio_adapter", "vision.merger"}, s1b={"audio", "vision"}, s2=every, s3=every, t1={"talker"})
    for (name, parts), before, after in zip(stages.items(), states, states[1:]):
        trained = {k for k in after if re.match(r"vision\.merger|\w+", k)[0] in parts and not k.endswith("share")}
        moved = {k for k in after if not torch.equal(after[k], before[k]) and not k.endswith("share")}
        assert moved <= trained and len(moved) > 0.9 * len(trained), name


def test_stopped_or_killed_and_resumed_is_the_uninterrupted_one(run, tmp_path):
    """A signal in the third update saves it; what ends in the midst of the next save leaves that, and a directory that is not whole."""
    whole, out, rate = tmp_path / "whole", tmp_path / "out", omni.learning_rate
    flags = ["--steps", 6, "--save_every", 2, "--out"]

    def stop(step, cfg):
        os.kill(os.getpid(), signal.SIGTERM if step == 2 else 0)
        return rate(step, cfg)

    with mock.patch.object(omni, "learning_rate", stop):
        assert "stopped in stage s2" in run(*flags, out)[1]
    with mock.patch.object(omni.Path, "rename", side_effect=OSError("no space")):
        status, _, err = run(*flags, out, "--resume")
    gc.collect()  # the process lives on, and with it the lock of the run that failed
    assert status == 2 and "no space" in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in out.glob("s2/step_*")) == ["step_000000002", "step_000000003", "step_000000004.tmp"]
    assert run(*flags, out, "--resume")[0] == run(*flags, whole)[0] == 0
    logs = [map(json.loads, (folder / "s2" / "metrics.jsonl").read_text().splitlines()) for folder in (whole, out)]
    first, second = ({row["step"]: row for row in log if "loss" in row} for log in logs)  # of each step the last counts
    assert first == second and len(first) == 6
    torch.testing.assert_close(checkpoint(out / "s2"), checkpoint(whole / "s2"), rtol=0, atol=0)


def test_steps_that_are_not_finite(run, tmp_path):
    """The second leaves the weights alone, and training goes on; three in a row end the run in one line, without a save."""
    objective, weights = omni.objective, [None]

    def broken(model, batch, cfg):
        loss, metrics = objective(model, batch, cfg)
        if torch.is_grad_enabled():
            weights.append(model.thinker.head.weight.detach().clone())
            loss = loss * (math.nan if len(weights) - 1 in (2, 4, 5, 6) else 1.0)
        return loss, metrics

    with mock.patch.object(omni, "objective", broken):
        status, out, err = run("--steps", 8, "--save_every", 1, "--warmup", 0, "--out", tmp_path)
    assert status == 2 and out.count("skipped: its loss or gradient is not finite") == 4
    assert "no finite gradient in the last 3 steps to 6" in err and len(err.splitlines()) == 1
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights[1:])] == [False, True, False, True, True]
    assert sorted(path.name for path in tmp_path.glob("s2/step_*")) == ["step_000000001", "step_000000003"]


def test_mistakes_end_in_one_line_and_status_2(run, tmp_path):
    run("--steps", 1, "--out", tmp_path)
    for flags, phrase in (
        ("--resume --dim 64", "dim 32, and this run 64"), ("--resume --talker_layers 8", "has talker_layers 4"), ("--resume --seed 1", "has seed 0"),
        ("--resume --mix text:1", "has data_fingerprint"), ("", "--resume continues"), ("--mix text", "--mix text is not"), ("--n_kv_heads 3", "3 key-value"),
        ("--rotary_dim 10", "--rotary_dim 10"), ("--audio_convs 5", "--audio_convs 5"), ("--top_k 9", "--top_k 9"), ("--image_size 40", "--image_size 40"),
        ("--stage a0 --decoder_layers 0", "a0 needs"), ("--stage t1 --talker_layers 0", "t1 needs"), ("--warmup 0.2", "--warmup 0.2"), ("--ep 2", "ep 2"),
        ("--micro_batch 3", "micro-batches of 3"), ("--n_codebooks 17", "--n_codebooks 17"), ("--lr nan", "--lr nan"), ("--stage all --eval", "--eval needs"),
    ):  # fmt: skip
        status, out, err = run("--out", tmp_path, *flags.split())
        assert status == 2 and phrase in err and len(err.splitlines()) == 1 and "step 1/" not in out, (flags, err)
