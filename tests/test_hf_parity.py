"""Parity with Hugging Face's implementation: logits, loss, gradients, and checkpoints both ways."""
import importlib
import json

import deepseek_v3
import gpt3
import omni
import pytest
import torch
from conftest import SCRIPTS
from ranks import make_model, run_main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def deepseek_config(cfg):
    """Also of Kimi's models, which have one group of experts, no multi-token prediction and both factors of YaRN."""
    rope = dict(rope_type="default", rope_theta=cfg.rope_theta)
    if cfg.rope_factor > 1:
        rope |= dict(rope_type="yarn", factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original,
                     beta_fast=getattr(cfg, "rope_beta_fast", 32), beta_slow=1)  # fmt: skip
        scales = {key: getattr(cfg, f"rope_{key}", 1.0) for key in ("mscale", "mscale_all_dim")}
        rope |= {key: value for key, value in scales.items() if value}
    return transformers.DeepseekV3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.hidden_dim, moe_intermediate_size=cfg.expert_dim,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_heads,
        n_shared_experts=cfg.n_shared, n_routed_experts=cfg.n_experts, num_experts_per_tok=cfg.top_k, n_group=getattr(cfg, "n_groups", 1),
        topk_group=getattr(cfg, "groups_kept", 1), routed_scaling_factor=cfg.route_scale, norm_topk_prob=True, first_k_dense_replace=cfg.n_dense,
        q_lora_rank=cfg.q_rank or None, kv_lora_rank=cfg.kv_rank, qk_nope_head_dim=cfg.head_dim, qk_rope_head_dim=cfg.rope_dim,
        v_head_dim=cfg.head_dim, max_position_embeddings=cfg.seq_len, rms_norm_eps=cfg.norm_eps,
        num_mtp_layers=int(getattr(cfg, "mtp", False)), rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip


kimi_config = deepseek_config


def gpt2_config(cfg, kind=transformers.GPT2Config):
    return kind(
        vocab_size=cfg.vocab_size, n_positions=cfg.seq_len, n_embd=cfg.dim, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.hidden_dim,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip


def peer(name, cfg):
    """Hugging Face's model of a script's Config; Llama's base and context are not the defaults, so that both are read."""
    if name == "gpt1":
        return transformers.OpenAIGPTLMHeadModel(gpt2_config(cfg, transformers.OpenAIGPTConfig))
    if name == "gpt3":
        return transformers.GPT2LMHeadModel(gpt2_config(cfg))
    if name in ("deepseek_v3", "kimi_muon"):
        return transformers.DeepseekV3ForCausalLM(deepseek_config(cfg))
    if name == "gemma":
        kind = transformers.Gemma3ForCausalLM if cfg.qk_norm else transformers.Gemma2ForCausalLM
        more = dict(attn_logit_softcapping=cfg.attention_cap, final_logit_softcapping=cfg.logit_cap)
        if cfg.qk_norm:
            rope = dict(rope_type="linear", factor=cfg.rope_factor, rope_theta=cfg.rope_theta)
            more = dict(rope_parameters=dict(full_attention=rope, sliding_attention=dict(rope_type="default", rope_theta=1e4)))
        return kind(kind.config_class(
            vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.hidden_dim, num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.head_dim, sliding_window=cfg.window,
            query_pre_attn_scalar=cfg.query_scalar, max_position_embeddings=cfg.seq_len, attn_implementation="eager", **more,
        ))  # fmt: skip
    kind = transformers.Qwen2ForCausalLM if cfg.qkv_bias else transformers.LlamaForCausalLM
    rope = dict(rope_type={"none": "default", "pi": "linear"}.get(cfg.rope_scaling, cfg.rope_scaling), rope_theta=cfg.rope_theta)
    if cfg.rope_scaling != "none":
        rope |= dict(factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original)
    if cfg.rope_scaling == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    return kind(kind.config_class(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.hidden_dim, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied, max_position_embeddings=cfg.seq_len, rope_parameters=rope,
    ))  # fmt: skip


V3 = dict(vocab_size=512, dim=64, hidden_dim=176, expert_dim=48, n_layers=4, n_heads=4, n_shared=1, n_experts=16, top_k=4, n_groups=4, groups_kept=2,
          route_scale=2.5, n_dense=1, q_rank=24, kv_rank=32, head_dim=16, rope_dim=8, rope_theta=10000.0, seq_len=48, init_std=0.02, balance_loss=0.0,
          mtp_weight=0.0)  # fmt: skip
V3_YARN = V3 | dict(rope_original=16, rope_factor=8.0)
KIMI = dict(vocab_size=512, dim=64, hidden_dim=96, expert_dim=32, n_layers=4, n_heads=4, n_shared=1, n_experts=8, top_k=2, q_rank=32, kv_rank=16,
            head_dim=16, rope_dim=8, rope_theta=50000.0, seq_len=48)  # fmt: skip
LLAMA = dict(rope_from="initial", rope_original=16)
GEMMA = dict(n_layers=7, window=8, seq_len=23)  # 22 and 23 tokens are no multiples of the window
CASES = {  # case: (script, overrides of its tiny Config)
    "gpt1": ("gpt1", dict(hidden_dim=96)),  # F = 4 D is fixed there
    "gpt2": ("gpt3", dict(band=0, n_heads=3, seq_len=11)),
    "llama3": ("llama3", LLAMA | dict(rope_scaling="llama3", rope_factor=8.0, rope_theta=1000.0, seq_len=64)),
    "llama3_yarn_tied": ("llama3", LLAMA | dict(rope_scaling="yarn", rope_factor=4.0, seq_len=64, tied=True)),
    "llama3_pi": ("llama3", LLAMA | dict(rope_scaling="pi", rope_factor=3.0, seq_len=48)),
    "qwen2_5": ("llama3", dict(rope_from="initial", qkv_bias=True, tied=True, norm_eps=1e-6, seq_len=24)),
    "deepseek_v3": ("deepseek_v3", V3), "deepseek_v3_yarn": ("deepseek_v3", V3_YARN),  # and YaRN's factors as they may be written
    "deepseek_v3_yarn_without_mscale": ("deepseek_v3", V3_YARN | dict(rope_mscale=0.0, rope_mscale_all_dim=0.0)),
    "deepseek_v3_yarn_with_two": ("deepseek_v3", V3_YARN | dict(rope_mscale=0.7, rope_mscale_all_dim=0.4)),
    "deepseek_v3_yarn_with_one": ("deepseek_v3", V3_YARN | dict(rope_mscale=0.0, rope_mscale_all_dim=0.4)),
    "deepseek_v3_lite": ("deepseek_v3", V3 | dict(q_rank=0, n_groups=1, groups_kept=1, n_shared=2, mtp=False)),  # V2-Lite's
    "kimi_k2": ("kimi_muon", KIMI | dict(rope_factor=32.0, rope_original=16)),  # as released, with YaRN of beta 1
    "kimi_k25": ("kimi_muon", KIMI | dict(rope_factor=64.0, rope_original=400, rope_beta_fast=32.0)),
    "moonlight": ("kimi_muon", KIMI | dict(q_rank=0, n_shared=2, norm_eps=1e-5, route_scale=2.446)),
    "gemma2": ("gemma", GEMMA | dict(qk_norm=False, attention_cap=5.0, logit_cap=3.0, local_layers=1, rope_theta=1e4, rope_factor=1.0)),
    "gemma3": ("gemma", GEMMA | dict(qk_norm=True, attention_cap=0.0, logit_cap=0.0, local_layers=5, rope_theta=1e6, rope_factor=8.0)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """(module, its row, tiny Config, Hugging Face's model of that)."""
    name, overrides = CASES[request.param]
    module = importlib.import_module(name)
    cfg = module.Config(**{**SCRIPTS[name].tiny, **overrides})
    return module, SCRIPTS[name], cfg, peer(name, cfg).eval()


def close(found, expected):
    """To 1e-4 of the largest entry, as the design asks, and in truth far better."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def pair(case, tmp_path):
    """Our model with distinct gains and biases, and Hugging Face's read from what to_hf wrote of it."""
    module, row, cfg, _ = case
    model = make_model(module, row, cfg)
    for p in model.parameters():
        p.data.mul_(4)  # so that errors show
    module.to_hf(model, cfg, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    return model.eval(), theirs.eval(), cfg


def test_logits_loss_and_gradients(case, tmp_path, monkeypatch):
    """Of what to_hf writes, and of what Hugging Face's class writes with a config of its own; gradients are read as such weights."""
    module, _, _, peer = case
    monkeypatch.setattr(module, "slices", lambda n, V: [slice(i, min(i + 10, n)) for i in range(0, n, 10)], raising=False)  # of the loss
    ours, theirs, cfg = pair(case, tmp_path)
    tokens = torch.randint(1, cfg.vocab_size, (3, cfg.seq_len), generator=torch.Generator().manual_seed(0))  # Gemma's 0 is padding there
    close(ours(tokens), theirs(tokens).logits)
    peer.load_state_dict(theirs.state_dict())
    peer.save_pretrained(tmp_path / "theirs")
    read, found = module.from_hf(tmp_path / "theirs")
    own = "seq_len", "rope_theta", "rope_scaling", "qkv_bias", "rope_mscale", "rope_mscale_all_dim", "qk_norm", "local_layers"
    wanted = (*module.HF_CONFIG, "hidden_dim", *(name for name in own if hasattr(cfg, name)))
    assert {name: getattr(found, name) for name in wanted} == {name: getattr(cfg, name) for name in wanted}
    close(read.eval()(tokens), theirs(tokens).logits)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": tokens[:, 1:].numel(), "n_sequences": 3}
    loss, _ = module.objective(ours, batch, cfg)
    expected = peer(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for p in peer.parameters():
        p.data = p.grad
    peer.save_pretrained(tmp_path / "gradients")
    expected = dict(module.from_hf(tmp_path / "gradients")[0].named_parameters())
    for name, p in ours.named_parameters():
        if not name.startswith("mtp."):
            close(p.grad, expected[name].data)


@pytest.mark.parametrize("case", ["deepseek_v3"], indirect=True)
def test_deepseek_v3_predicts_ahead_as_hugging_face_does(case, tmp_path):
    """Multi-token prediction, of which Hugging Face has a model of its own."""
    from transformers.modeling_layers import MtpModel

    ours, theirs, cfg = pair(case, tmp_path)
    ahead, tensors = MtpModel(theirs, 1).eval(), deepseek_v3.read_hf_tensors(tmp_path)
    layer = ahead.layers[0]
    deeper = type(theirs).from_pretrained(tmp_path, num_hidden_layers=cfg.n_layers + 1)  # whose last block is the one of the prediction
    layer.mtp_block.load_state_dict(deeper.model.layers[-1].state_dict())
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
        part = layer.get_submodule(name.replace("shared_head.norm", "post_norm"))
        part.weight.data.copy_(tensors[f"model.layers.{cfg.n_layers}.{name}.weight"])
    tokens = torch.randint(cfg.vocab_size, (3, cfg.seq_len), generator=torch.Generator().manual_seed(0))
    state = theirs.model(tokens).last_hidden_state
    positions = torch.arange(cfg.seq_len - 1)[None]
    hidden = ahead.forward_layer(0, state[:, :-1], positions, None, input_ids=tokens[:, 1:])
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    state = ours.final_norm(ours.run_blocks(ours.embed(tokens), 0.0)[0])
    close(ours.logits(ours.mtp(state, ours.embed(tokens), *ours.rope(state))[0]), theirs.lm_head(hidden))


@pytest.mark.parametrize("case", ["deepseek_v3", "kimi_k2"], indirect=True)
def test_reads_fp8_weights_with_their_block_scales(case, tmp_path):
    """As released: E4M3 codes, and the factor of each block of 128 x 128 under a name that says the inverse."""
    module = case[0]
    model, _, _ = pair(case, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            rows, columns = tensors[key].shape
            codes, scales = deepseek_v3.quantize(tensors[key], 128, 128)
            tensors[key], tensors[f"{key}_scale_inv"] = codes[:rows, :columns].contiguous(), scales
        safetensors.save_file(tensors, file)
    read, _ = module.from_hf(tmp_path)
    for (key, p), exact in zip(read.named_parameters(), model.parameters()):
        error = ((p - exact).norm() / exact.norm()).item()
        assert error == 0 or 0.005 < error < 0.05 and "norm" not in key, (key, error)


YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize("key, change", [
    ("model_type", dict(model_type=None)), ("scoring_func", dict(scoring_func="softmax")), ("attention_bias", dict(attention_bias=True)),
    ("rope_interleave", dict(rope_interleave=False)), ("num_key_value_heads", dict(num_key_value_heads=2)), ("v_head_dim", dict(v_head_dim=8)),
    ("num_nextn_predict_layers", dict(num_nextn_predict_layers=2)), ("linear", dict(rope_scaling=dict(type="linear", factor=2))),
    ("attention_factor", dict(rope_scaling=YARN | dict(attention_factor=1.5))), ("beta_fast", dict(rope_scaling=YARN | dict(beta_fast=16))),
])  # fmt: skip
def test_deepseek_v3_refuses_other_configs_by_name(key, change, tmp_path):
    """The released config.json is read with Hugging Face's defaults; what would change the result is refused."""
    config = dict(model_type="deepseek_v3", num_hidden_layers=4, num_nextn_predict_layers=1, q_lora_rank=None, rope_theta=20000, rope_scaling=YARN)
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = deepseek_v3.read_config(tmp_path)
    read = (cfg.n_layers, cfg.dim, cfg.q_rank, cfg.mtp, cfg.seq_len, cfg.rope_theta, cfg.rope_factor, cfg.rope_original)
    assert read == (4, 7168, 0, True, 4096, 20000, 40, 4096)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"holds no DeepSeek-V3 model.*{key}"):
        deepseek_v3.read_config(tmp_path)


@pytest.mark.parametrize("banded", ["odd", "even"])
def test_gpt3_banded_layers_are_gpt2s_with_another_mask(banded, tmp_path):
    """Hugging Face's model, in which every banded block is handed the band for a mask. The directory reads back as banded."""
    cfg = gpt3.Config(vocab_size=257, seq_len=48, dim=64, n_layers=4, n_heads=4, hidden_dim=256, band=8, banded=banded)
    ours, theirs, _ = pair((gpt3, SCRIPTS["gpt3"], cfg, peer("gpt3", cfg)), tmp_path)
    tokens = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    mask = torch.where((j <= i) & (i - j < 8), 0.0, torch.finfo(torch.float32).min)[None, None]
    for block in theirs.transformer.h[int(banded == "odd") :: 2]:
        block.attn.register_forward_pre_hook(lambda attention, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True)
    close(ours(tokens), theirs(tokens).logits)
    read, found = gpt3.from_hf(tmp_path)
    assert (found.band, found.banded) == (8, banded) and torch.equal(read(tokens), ours(tokens))
    file = tmp_path / "model.safetensors"
    tensors = {key: p.T.contiguous() if "c_fc.weight" in key else p for key, p in safetensors.load_file(file).items()}
    safetensors.save_file(tensors, file)
    with pytest.raises(ValueError, match="c_fc.weight is"):
        gpt3.from_hf(tmp_path)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("bert", "omni")])  # bert: test_bert.py
def test_export_then_init_on_the_command_line(name, tmp_path):
    """A run that begins with --init has the held-out loss with which the other ended, whatever its own shape."""
    (tmp_path / "text.txt").write_text("a text that repeats itself, " * 300)
    sizes = SCRIPTS[name].small | dict(preset="demo", data=tmp_path / "text.txt", hidden_dim=192, val_batches=1)
    flags = [f"--{flag}={value}" for flag, value in sizes.items()]
    status, out, err = run_main(name, [*flags, "--lr=0.01", "--steps=20", "--export", tmp_path / "hf"])
    assert status == 0, err
    trained = out.split("val 20 | loss ")[1].split()[0]
    _, out, _ = run_main(name, [*flags, "--dim=24", "--steps=1", "--init", tmp_path / "hf"])
    assert out.split("val 0 | loss ")[1].split()[0] == trained


def test_directories_that_hold_no_such_model(script, tmp_path):
    """None at all, another kind of model, and one whose shapes are wrong."""
    module, _ = script
    config = dict(vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=2, hidden_size=8, intermediate_size=9, num_hidden_layers=1,
                  num_attention_heads=2, num_key_value_heads=1, model_type="llama", max_position_embeddings=16)  # fmt: skip
    for change in (None, {}, {"model_type": "mistral", "n_head": 3}):
        if change is not None:
            (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="holds no"):
            module.from_hf(tmp_path)


def test_omni_hears_and_sees_as_hugging_face_does(tmp_path):
    """Text, an image and a video through Qwen3_5Moe, sounds through Qwen3OmniMoe's audio tower; directories are written bit for bit."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe, modeling_qwen3_omni_moe

    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = dict(vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=32,
                shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=2, max_position_embeddings=512, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=48, intermediate_size=96, num_heads=4, patch_size=4, out_hidden_size=64, num_position_embeddings=64)
    marks = dict(image_token_id=502, video_token_id=503, vision_start_token_id=505, vision_end_token_id=506)
    theirs = transformers.Qwen3_5MoeForConditionalGeneration(
        transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, attn_implementation="eager", **marks))
    tower = modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder(configuration_qwen3_omni_moe.Qwen3OmniMoeAudioEncoderConfig(
        num_mel_bins=128, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96, d_model=48, max_source_positions=100, n_window=50,
        n_window_infer=200, downsample_hidden_size=8, output_dim=64, attn_implementation="eager"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for p in [*theirs.parameters(), *tower.parameters()]:
        p.data.normal_(0, 0.2, generator=generator)
    theirs.eval().save_pretrained(tmp_path / "a")
    tower.eval().save_pretrained(tmp_path / "a" / "audio_tower")
    ours, cfg = omni.from_hf(tmp_path / "a")
    ours.eval()
    assert (cfg.audio_convs, cfg.audio_chunk, cfg.audio_window) == (3, 100, 200)
    tokens = torch.randint(500, (2, 131), generator=generator)
    close(ours(tokens), theirs(tokens).logits)
    pixels = lambda *size: torch.randint(256, size, generator=generator, dtype=torch.uint8).numpy()  # noqa: E731
    image, size = omni.cut_into_patches(pixels(1, 32, 16, 3), 4, 1, 10**9)
    video, clip_size = omni.cut_into_patches(pixels(5, 16, 24, 3), 4, 1, 10**9)
    segments = [omni.Segment([1, 2, 505]), omni.Segment(grid=(1, 4, 2)), omni.Segment([506, 7])]
    for i in range(3):
        segments += [omni.Segment([10 + i, 505]), omni.Segment(grid=(1, 2, 3)), omni.Segment([506])]
    positions, kinds = map(torch.from_numpy, omni.position_ids([*segments, omni.Segment([40, 41])]))
    tokens = torch.empty(1, len(kinds), dtype=torch.int64)
    tokens[0, kinds == omni.TEXT] = torch.tensor([i for segment in segments for i in segment.text] + [40, 41])
    tokens[0, kinds == omni.VISION] = torch.tensor([502] * 8 + [503] * 18)
    mel, n_frames = omni.cut_into_windows([torch.zeros(128, 1)], 100, 2)
    batch = dict(kinds=kinds[None], positions=positions[:, None], mel=mel, mel_frames=n_frames,
                 patches=omni.stack([*image, *video], 0.0), grid=torch.tensor([size] + [clip_size] * 3))  # fmt: skip
    expected = theirs(input_ids=tokens, pixel_values=image.flatten(0, 1), image_grid_thw=torch.tensor([[1, *size]]),
                      pixel_values_videos=video.flatten(0, 1), video_grid_thw=torch.tensor([[3, *clip_size]]),
                      mm_token_type_ids=(tokens == 502).int() + 2 * (tokens == 503).int())  # fmt: skip
    close(ours(tokens, batch), expected.logits)
    mels = [torch.randn(128, n, generator=generator) for n in (437, 250, 100, 33)]
    expected = tower(torch.cat(mels, 1), torch.tensor([mel.shape[1] for mel in mels])).last_hidden_state
    close(ours.audio_adapter(ours.audio(*omni.cut_into_windows(mels, 100, 2), torch.float32)), expected)
    omni.to_hf(ours, cfg, tmp_path / "b")
    for model, folder in ((theirs, "b"), (tower, "b/audio_tower")):
        read = type(model).from_pretrained(tmp_path / folder)
        torch.testing.assert_close(read.state_dict(), model.state_dict(), rtol=0, atol=0)
