"""Qwen3.5-Omni's specification, in the order of omni.py: worked examples, independent loops, and runs of the command line."""
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
TOKENIZER = omni.load_tokenizer("bytes", omni.SPECIALS)


def test_front_ends_and_patches():
    """A tone of 1 kHz; tokens of samples by three convolutions or four; tokens of pixels, and patches by blocks of four."""
    mel = omni.log_mel(0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000))
    assert mel.shape == (128, 100) and mel[:, 50].argmax() == 42
    assert [x.item() for x in (mel[:, 50].max(), mel.max(), mel.min(), mel.mean())] == pytest.approx([1.474446, 1.474446, -0.525554, -0.430371], abs=1e-5)
    filters = omni.mel_filters(128, 400, 16000)
    assert (filters != 0).sum() == 394 and filters.sum().item() == pytest.approx(3.190986, abs=1e-6)
    for samples, by8, by16 in ((400, 1, 1), (1600, 2, 1), (15_999, 13, 7), (16_000, 13, 7), (16_160, 14, 7), (24_000, 20, 10),
                               (40_000, 33, 16), (80_000, 65, 32), (480_000, 390, 188), (960_000, 780, 375)):  # fmt: skip
        assert [omni.count_audio_tokens(samples // 160, *sizes) for sizes in ((100, 3), (160, 4))] == [by8, by16]
    for size, tokens in (((480, 640), 300), ((100, 100), 64), ((90, 120), 70), ((1080, 1920), 2040), ((5000, 5000), 16_384), ((3000, 9000), 16_133)):
        assert math.prod(side / 32 for side in omni.smart_resize(*size, 32, 65_536, 16_777_216)) == tokens
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    patches, size = omni.cut_into_patches(frames, 2, 1, 10**6)
    frames = np.concatenate((frames, frames[-1:])) / 127.5 - 1  # an odd number repeats its last one
    order = [(2 * i + a, 2 * j + b) for i in range(2) for j in range(3) for a in range(2) for b in range(2)]
    expected = [[frames[t : t + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(3, 0, 1, 2).flatten() for i, j in order] for t in (0, 2)]
    assert size == (4, 6) and patches.numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_positions_of_the_specification():
    """Text and an image; a sound and an image; video by absolute time, and with timestamps; sound and frames by both."""
    for segments, t, h, w in (
        ([S([0] * 3), S([0]), S(grid=(1, 2, 3)), S([0] * 3)], "0 1 2 3 4 4 4 4 4 4 7 8 9", "0 1 2 3 4 4 4 5 5 5 7 8 9", "0 1 2 3 4 5 6 4 5 6 7 8 9"),
        ([S([0] * 2), S(n_audio=3), S([0] * 2), S(grid=(1, 2, 2)), S([0] * 2)],
         "0 1 2 3 4 5 6 7 7 7 7 9 10", "0 1 2 3 4 5 6 7 7 8 8 9 10", "0 1 2 3 4 5 6 7 8 7 8 9 10"),
        ([S([0] * 2), S(grid=(3, 2, 2), step=13.0), S([0] * 2)], "0 1 2 2 2 2 15 15 15 15 28 28 28 28 29 30",
         "0 1 2 2 3 3 2 2 3 3 2 2 3 3 29 30", "0 1 2 3 2 3 2 3 2 3 2 3 2 3 29 30"),
        ([S([0] * 5), S(grid=(1, 2, 2)), S([0] * 4), S(grid=(1, 2, 2)), S([0] * 2)], "0 1 2 3 4 5 5 5 5 7 8 9 10 11 11 11 11 13 14",
         "0 1 2 3 4 5 5 6 6 7 8 9 10 11 11 12 12 13 14", "0 1 2 3 4 5 6 5 6 7 8 9 10 11 12 11 12 13 14"),
    ):  # fmt: skip
        assert omni.position_ids(segments)[0].tolist() == [[float(x) for x in row.split()] for row in (t, h, w)]
    ids, kinds = omni.position_ids([S([0] * 4), S(n_audio=26, grid=(2, 2, 2), step=13.0), S([0] * 3)])
    assert "".join("TAV"[k] for k in kinds) == "TTTT" + 2 * ("VVVV" + 13 * "A") + "TTT"
    assert ids[0].tolist() == [*range(4), *[4] * 4, *range(4, 17), *[17] * 4, *range(17, 33)]
    assert ids[1, kinds == 2].tolist() == [4, 4, 5, 5] * 2 and ids[2, kinds == 2].tolist() == [4, 5, 4, 5] * 2
    ids, _ = omni.position_ids([S([0] * 2), *[S([0] * 3), S(n_audio=10, grid=(1, 2, 2))] * 2, S([0] * 4)])
    assert ids[0].tolist() == [*range(5), *[5] * 4, *range(5, 18), *[18] * 4, *range(18, 32)]
    cos, sin = omni.rotary_angles(torch.arange(3.0).view(3, 1, 1), 64, 1.0)  # angles are the ids
    assert torch.atan2(sin, cos).round().flatten().tolist() == [0, 1, 2] * 10 + [0, 1]


def test_delta_rule_in_chunks_is_the_recurrence():
    """In a loop in float64 the error is that of the decayed state."""
    for T in (1, 15, 16, 37, 130):
        q, k, v, g, beta = (torch.randn(2, 4, T, n, dtype=torch.float64) for n in (8, 8, 6, 1, 1))
        g, beta = -2 * g.sigmoid(), beta.sigmoid()
        outputs, last = omni.gated_delta_rule(q, k, v, g[..., 0], beta[..., 0], 16)
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        state, expected = torch.zeros(2, 4, 8, 6, dtype=torch.float64), []
        for t in range(T):
            state = state * g[:, :, t, None].exp()
            error = v[:, :, t, None] - k[:, :, t, None] @ state
            state = state + beta[:, :, t, None] * k[:, :, t, :, None] * error
            expected.append(q[:, :, t, None] @ state / 8**0.5)
        torch.testing.assert_close((outputs, last), (torch.cat(expected, 2), state), atol=1e-12, rtol=1e-12)


def test_balance_loss_of_the_specification():
    """Its logits of three tokens for four experts, top 2, with the shares that this batch leaves; a fourth token does not exist."""
    moe = omni.SharedExpertMoE(4, 4, 4, 4, 2)
    for p in moe.parameters():
        torch.nn.init.zeros_(p)
    moe.router.data = torch.eye(4)
    batch = torch.tensor([[[2.0, 1, 0, -1], [0, 3, 0, 0], [1, 1, 1, 4], [9, 9, 9, 9]]]), torch.tensor([[True, True, True, False]])
    moe(*batch)
    with mock.patch.object(omni.dist, "all_reduce"):
        omni.update_shares(torch.nn.ModuleList([moe]))
    assert moe(*batch)[1].item() / 3 == pytest.approx(2.264744, abs=1e-6)


def test_interleaving_and_toy_codec():
    """ARIA's orders of the specification and its rule for each prefix; the codec keeps the two tones of a letter, and the silence."""
    found = ["".join("TS"[x] for x in omni.interleave(*sizes, 0)) for sizes in ((3, 8), (4, 2), (2, 7))]
    assert found == ["TSSTSSSTSSS", "TTSTTS", "TSSSTSSSS"]
    for text, speech, lead in ((1, 5, 0), (1, 20, 5), (3, 5, 2), (3, 1, 5), (7, 20, 5), (7, 5, 2), (7, 20, 0)):
        order = omni.interleave(text, speech, lead)
        assert (order.count(False), order.count(True)) == (text, speech)
        assert all(sum(order[:i]) * text <= (i - sum(order[:i])) * speech for i in range(1, len(order) + 1))
    for letter, (row, column) in dict(a=(0, 0), m=(2, 0), z=(4, 1)).items():
        codes = omni.encode_speech(omni.spell(letter), 16, 64)
        loudest = np.argsort(np.abs(np.fft.rfft(omni.decode_speech(codes, 64)[:1280])))[-2:] * 12.5
        assert sorted(loudest) == pytest.approx([omni.BANDS[1 + row], omni.BANDS[6 + column]], abs=12.5)
        assert codes.shape == (4, 16) and not omni.decode_speech(codes, 64)[2 * omni.FRAME :].any()


def test_what_the_talker_predicts():
    """The codes of the next frame; and each code from those before it in its frame."""
    cfg = omni.Config(**ROW.tiny | {"stage": "t1"})
    model, batch = make_model(omni, ROW, cfg).eval(), omni.get_batch(make_corpora(omni, cfg)[0], 0, 3, cfg)
    (places,) = torch.where(batch["codes"][0, :, 0] >= 0)
    assert torch.equal(batch["next_codes"][0, places - 1], batch["codes"][0, places])
    assert batch["next_codes"][0, places[-1]].tolist() == [cfg.codebook_size, -1, -1, -1], "the end"
    h, codes = torch.randn(2, 20), batch["codes"][0, places[:2], :-1]
    changed = (codes + torch.tensor([0, 1, 0])) % cfg.codebook_size
    first, second = (model.talker.predict_codes(h, x) for x in (codes, changed))
    assert ((first - second).abs() > 1e-6).any(-1).any(0).tolist() == [False, True, True]
    h, first, others = torch.randn(*batch["codes"].shape[:2], 20), [], []  # the loss: code 0 and the end, and the mean of the others
    for state, code in zip(h.flatten(0, 1), batch["next_codes"].flatten(0, 1)):
        if code[0] >= 0:
            first.append(-model.talker.head(state).log_softmax(-1)[code[0]].item())
        if code[1] >= 0:
            others.append(-model.talker.predict_codes(state[None], code[None, :-1])[0].log_softmax(-1)[range(3), code[1:]].mean().item())
    with mock.patch.object(model, "run_talker", return_value=(h, torch.zeros(()))):
        assert omni.objective(model, batch, cfg)[0].item() == pytest.approx(np.mean(first) + np.mean(others), rel=1e-5)


def test_draws_dealing_and_layouts_of_items():
    """The order of marks, frames and sounds. Items depend on their number alone: see the resumed run below, and test_gradients.py."""
    cfg = omni.Config(**ROW.tiny)
    source, held_out = make_corpora(omni, cfg)
    assert not torch.equal(omni.get_batch(held_out, 5, 1, cfg)["tokens"], omni.get_batch(source, 5, 1, cfg)["tokens"])
    assert {omni.draw_window(i, cfg) for i in range(50)} == {1, 2, 3}
    assert omni.deal([5, 1, 4, 2, 3, 3], 3) == ([[0, 1], [2, 3], [4, 5]], [6, 6, 6])

    def text(media, time="text"):
        cfg = omni.Config(fps=1.25, audio_chunk=160, patch=16, min_pixels=1, time=time)
        item = omni.make_item([("hi", "")], {kind: (None, size) for kind, size in media.items()}, TOKENIZER, np.random.default_rng(0), cfg)
        return re.sub(r"<\|(\w)\w+_pad\|>", r"\1", TOKENIZER.decode(omni.place_tokens(item, TOKENIZER)[0].tolist()))

    video, av = {"frames": (4, 32, 64)}, {"frames": (4, 32, 64), "wave": 51_200}
    assert text({"frames": (1, 64, 32)}) == "<|vision_start|>ii<|vision_end|>hi<|endoftext|>"
    assert text(video) == "<0.4 seconds><|vision_start|>vv<|vision_end|><2.0 seconds><|vision_start|>vv<|vision_end|>hi<|endoftext|>"
    assert text(video, "abs") == "<|vision_start|>vvvv<|vision_end|>hi<|endoftext|>"
    both = f"<0.4 seconds>vv{10 * 'a'}<2.0 seconds>vv{10 * 'a'}"
    assert text(av) == f"<|vision_start|><|audio_start|>{both}<|audio_end|><|vision_end|>hi<|endoftext|>"
    *parts, (last, _) = re.findall(r"(a+)<(?:(\d+\.\d) seconds>)?", text({"wave": 16_000 * 30}))
    tokens = [len(sound) for sound, _ in parts]
    assert sum(tokens) + len(last) == 188 and all(10 <= n <= 50 for n in tokens)
    assert [float(seconds) for _, seconds in parts] == pytest.approx(0.16 * np.cumsum(tokens), abs=0.051)


def test_manifest(tmp_path):
    """Sounds, an image and a clip that is read at half its rate; then lines that are broken."""
    for name, hertz in (("good", 16_000), ("fast", 44_100)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, hertz, 0, "NONE", ""))
            file.writeframes(np.arange(4000, dtype="<i2").tobytes())
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:-2])
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    (tmp_path / "a.ppm").write_bytes(b"P6\n# made here\n16 8\n255\n" + image.tobytes())
    np.save(tmp_path / "b.npy", image.astype(np.float32))
    (tmp_path / "clip").mkdir()
    for i in range(4):
        np.save(tmp_path / "clip" / f"{i}.npy", image + i)
    rows = [dict(text="x", image="a.ppm"), dict(text="y", audio="good.wav"), dict(text="z", video="clip", fps=2.5, audio="good.wav")]
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (_, picture), (_, sound), (caption, clip) = omni.read_manifest(tmp_path / "m.jsonl", 1.25)
    assert np.array_equal(picture["frames"][0](), image[None]) and caption == [("z", "")]
    assert sound["wave"][1] == 4000 and sound["wave"][0]() == pytest.approx(np.arange(4000) / 32768)
    assert clip["frames"][1] == (2, 8, 16) and np.array_equal(clip["frames"][0](), np.stack((image, image + 2)))
    for row, message in (
        (dict(text="x", audio="fast.wav"), "ffmpeg"), (dict(text="x", audio="a.ppm"), "not a PCM"), (dict(text="x", image="b.npy"), "float32"),
        (dict(text="x", image="good.wav"), "neither"), (dict(text="x", video="clip"), "fps"), (dict(text="x", audio="cut.wav"), "ends before"),
        (dict(text="x", video="clip", fps=1, image="a.ppm"), "beside"), (dict(image="a.ppm"), "no text"), (dict(text="x", sound="a"), "sound"),
    ):  # fmt: skip
        (tmp_path / "m.jsonl").write_text(json.dumps(dict(text="fine")) + "\n" + json.dumps(row))
        with pytest.raises(ValueError, match=f"line 2: .*{message}"):
            omni.read_manifest(tmp_path / "m.jsonl", 1.25)


def test_rows_of_a_manifest_and_stages(capsys):
    """A stage reads the rows that have its media, and holds out at least one; of two ranks that validate on it, each has it."""
    rows = [([(f"{i}", "")], [{}, {"wave": (None, 4000)}, {"speech": (None, 0)}][i % 3]) for i in range(9)]
    for stage, sizes in (("s2", (8, 1)), ("a0", (2, 1)), ("t1", (2, 1)), ("lm", (5, 1))):
        cfg = omni.Config(**ROW.tiny | dict(stage=stage, data="m.jsonl"))
        assert tuple(len(omni.Source(cfg, TOKENIZER, [], rows, i).rows) for i in (0, 1)) == sizes
        with pytest.raises(ValueError, match=f"stage {stage} needs 2 lines"):
            [omni.Source(cfg, TOKENIZER, [], rows[:1], i) for i in (0, 1)]
    with mock.patch.object(omni, "sum_over_ranks", lambda *x: list(map(float, x))), \
            mock.patch.multiple(omni.dist, get_rank=lambda: 1, get_world_size=lambda: 2):  # fmt: skip
        omni.measure(make_model(omni, ROW, cfg), omni.Source(cfg, TOKENIZER, [], rows, 1), 7, cfg, torch.device("cpu"))
    assert re.search(r"val 7 \| loss (\d\.\d+) \| bpb .* \| text \1\n", capsys.readouterr().out)


def test_dry_run(capsys):
    """Activated parameters are the specification's, of the language model, and all of both encoders; memory."""
    for preset, active, encoders in (("35b_a3b", 3_454_988_928, 446_571_248 + 645_086_048), ("397b_a17b", 17_349_040_896, 456_010_480 + 647_709_536)):
        omni.main(["--preset", preset, "--dry_run", "--world_size", "2"])
        out = capsys.readouterr().out
        sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", out)]
        assert f"activated {active + encoders:,}" in out
        assert min(sizes) > 0 and sizes[0] == pytest.approx(4 * ROW.counts[preset] / 2 / 2**30, abs=1e-3)
    flops = omni.flops_per_token(omni.Config(**omni.PRESETS["35b_a3b"], seq_len=1))
    assert flops == pytest.approx(6 * (2_946_429_568 + 30 * 3 * 32 * 128**2), rel=1e-3), "activated parameters, and products of the states"
    # Under bf16, the copies of weights that one rank keeps for the backward pass, recognized by their sums.
    cfg = omni.Config(**ROW.tiny | dict(precision="bf16", expert_dim=16, decoder_layers=0, talker_layers=0))
    model, kept = make_model(omni, ROW, cfg), set()
    model.dtype = torch.bfloat16
    sizes = {p.to(model.dtype).double().sum().item(): 2 * p.numel() for p in model.parameters() if p.ndim > 1}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.double().sum().item()), lambda x: x):
        omni.objective(model, omni.get_batch(make_corpora(omni, cfg)[0], 0, 3, cfg), cfg)
    copied = sum(size for key, size in sizes.items() if key in kept)
    assert omni.memory_per_rank(model, cfg)["gathered"] == pytest.approx(copied, rel=0.1)


@pytest.fixture(scope="module")
def run():
    """run(*flags): exit status, stdout and stderr of a small run with documents of its own."""
    small = "--preset demo_walk --stage s2 --batch_size 4 --val_items 1 --log_every 1 --dim 32 --head_dim 8 --rotary_dim 4 --delta_head_dim 8"
    texts = [(f"{i}", "a text " * 9 * (i % 3 > 0)) for i in range(99)]  # a third of them empty
    with mock.patch.multiple(omni, show=mock.Mock(), read_standard_library=lambda: texts):
        yield lambda *flags: run_main("omni", [*small.split(), "--mix", "text:1,audio:1,image:1,video:1,av:1", *flags])


def test_what_the_model_writes_and_says(tmp_path, capsys):
    """Of a stand-in that knows the captions: each token is asked for behind those before, and its codes, up to the end, are the sound."""
    cfg = omni.Config(**ROW.tiny | dict(stage="t1", out=str(tmp_path), n_codebooks=16, codebook_size=64))
    source = make_corpora(omni, cfg)[1]
    texts = [source.items_of(modality, 1)[0].segments[-1].text for modality in omni.MODALITIES[1:]]
    codes = torch.from_numpy(omni.encode_speech(omni.spell(TOKENIZER.decode(texts[-1])), 16, 64))[:9]
    written, said = ((text[:i], text[i]) for text in texts for i in range(len(text))), []

    def forward(tokens, batch, task="logits"):
        if task == "logits":
            before, token = next(written)
            assert tokens[0].tolist()[tokens.shape[1] - len(before) :] == before
            return torch.eye(cfg.vocab_size)[token].view(1, 1, -1)
        heard = batch["codes"][0, : batch["place"] + 1]
        assert torch.equal(heard[heard[:, 0] >= 0], codes[: len(said)]) and batch["codes"][0, batch["place"] + 1, 0] >= 0
        said.append(codes[len(said)] if len(said) < 9 else torch.full((16,), 64))
        return said[-1]

    with mock.patch.object(omni.dist, "get_rank", return_value=0):
        omni.show(mock.Mock(side_effect=forward), source, cfg, torch.device("cpu"))
    out, (read, n) = capsys.readouterr().out, omni.read_wave(tmp_path / "speech.wav")
    assert all(out.count(repr(TOKENIZER.decode(text[:-1]))) == 2 for text in texts) and n == 9 * omni.FRAME
    assert read() == pytest.approx(omni.decode_speech(codes.numpy(), 64).clip(-1, 1), abs=1e-4)


def test_stages_train_their_own_parameters(run, tmp_path):
    assert run("--stage", "all", "--steps", 2, "--out", tmp_path, "--warmup", 0)[0] == 0
    states = []
    for name in omni.STAGES:
        dcp_to_torch_save(tmp_path / name / "step_000000002", tmp_path / "whole.pt")
        states.append(torch.load(tmp_path / "whole.pt", weights_only=False)["model"])
    every = {"audio", "audio_adapter", "vision", "vision.merger", "thinker"}
    stages = dict(lm={"thinker"}, s1a={"audio_adapter", "vision.merger"}, s1b={"audio", "vision"}, s2=every, s3=every, t1={"talker"})
    for (name, parts), before, after in zip(stages.items(), states, states[1:]):
        trained = {k for k in after if re.match(r"vision\.merger|\w+", k)[0] in parts and not k.endswith("share")}
        moved = {k for k in after if not torch.equal(after[k], before[k]) and not k.endswith("share")}
        assert moved <= trained and len(moved) > 0.9 * len(trained), name


def test_init_fixes_the_shape_of_its_parts_alone(run, tmp_path):
    """The Talker's and AuT's stay those of the flags."""
    pytest.importorskip("safetensors")
    config = json.dumps(omni.omni_configs(omni.Config(**ROW.tiny))[0])
    (tmp_path / "config.json").write_text(config)
    with mock.patch.object(omni, "fill_from_hf"):
        assert run("--init", tmp_path, "--stage", "t1", "--steps", 1, "--out", tmp_path / "out")[0] == 0
    cfg = json.loads((tmp_path / "out" / "t1" / "config.json").read_text())
    assert (cfg["dim"], cfg["head_dim"], cfg["talker_layers"], cfg["audio_dim"]) == (24, 10, 4, 96)
    (tmp_path / "config.json").write_text(config.replace('"rope_type": "default"', '"rope_type": "yarn"'))
    assert "rope has rope_type 'yarn'" in run("--init", tmp_path)[2]


def test_loss_falls_and_a_stopped_run_is_the_uninterrupted_one(run, tmp_path):
    """A signal in the 13th update saves it. A finished run has as many items as it planned, whatever the batch."""
    whole, out, rate = tmp_path / "whole", tmp_path / "out", omni.learning_rate
    flags = ["--steps", 30, "--save_every", 10, "--lr", 5e-3, "--out"]

    def stop(step, cfg):
        os.kill(os.getpid(), signal.SIGTERM if step == 12 else 0)
        return rate(step, cfg)

    with mock.patch.object(omni, "learning_rate", stop):
        assert "stopped in stage s2" in run(*flags, out)[1]
    assert run(*flags, out, "--resume")[0] == run(*flags, whole)[0] == 0
    logs = [map(json.loads, (folder / "s2" / "metrics.jsonl").open()) for folder in (whole, out)]
    first, second = ([row["loss"] for row in log if "loss" in row] for log in logs)
    assert first == second and len(first) == 30 and first[0] - sum(first[-5:]) / 5 > ROW.falls
    assert "s2 step" not in run("--out", out, "--resume", "--batch_size", 8)[1]


def test_steps_that_are_not_finite(run, tmp_path):
    """They leave the weights alone; three in a row end the run in one line, without a save."""
    model, optimizer = torch.nn.Linear(3, 1), mock.Mock(param_groups=[])
    with mock.patch.multiple(omni, objective=lambda *_: (math.nan * model.weight.sum(), {}), update_shares=mock.Mock()), \
            mock.patch.object(omni.dist, "all_reduce"):  # fmt: skip
        omni.omni_step(model, optimizer, [{}], 0.0, omni.Config())
    optimizer.step.assert_not_called()
    status, out, err = run("--steps", 8, "--save_every", 1, "--warmup", 0, "--lr", 1e30, "--out", tmp_path)
    assert status == 2 and out.count("skipped: its loss or gradient is not finite") == 3 and len(err.splitlines()) == 1
    assert "in the last 3 steps to 4" in err and [path.name for path in tmp_path.glob("s2/step_*")] == ["step_000000001"]


def test_mistakes_end_in_one_line_and_status_2(run, tmp_path):
    run("--steps", 1, "--out", tmp_path)
    for flags, phrase in (
        ("--resume --talker_layers 8", "has talker_layers 4"), ("--resume --mix text:1", "has data_fingerprint"),
        ("--mix text", "--mix text is not"), ("--mix foo:1", "unknown modality"), ("--vocab_size 99", "264 ids"),
        ("--stage a0 --decoder_layers 0", "a0 needs"), ("--stage t1 --talker_layers 0", "t1 needs"), ("--ep 2", "ep 2"),
        ("--warmup 0.2", "--warmup 0.2"), ("--rotary_dim 10", "--rotary_dim 10"), ("--micro_batch 3", "micro-batches of 3"),
        ("--codebook_size 9", "--codebook_size"), ("--lr nan", "--lr nan"), ("--stage s3 --eval", "--eval needs"),
    ):  # fmt: skip
        status, out, err = run("--out", tmp_path, *flags.split())
        assert status == 2 and phrase in err and len(err.splitlines()) == 1 and "step 1/" not in out, (flags, err)
