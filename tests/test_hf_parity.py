"""Parity with Hugging Face's implementation: logits, loss, gradients, and checkpoints both ways."""
import importlib
import json

import pytest
import torch
from conftest import SCRIPTS
from ranks import make_model

transformers = pytest.importorskip("transformers")



def llama_config(kind, cfg, **more):
    """With another base and another context than the defaults, so that neither goes unread."""
    rope = dict(rope_type={"none": "default", "pi": "linear"}.get(cfg.rope_scaling, cfg.rope_scaling), rope_theta=cfg.rope_theta)
    if cfg.rope_scaling != "none":
        rope |= dict(factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original)
    if cfg.rope_scaling == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    return kind(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.hidden_dim, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied, max_position_embeddings=cfg.seq_len, rope_parameters=rope, **more,
    )


# case: (script, overrides of its tiny Config, Hugging Face's model for that)
CASES = {
    "gpt1": ("gpt1", dict(hidden_dim=96), lambda cfg: transformers.OpenAIGPTLMHeadModel(  # F = 4 D is fixed there
        transformers.OpenAIGPTConfig(
            vocab_size=cfg.vocab_size, n_positions=cfg.context, n_embd=cfg.dim, n_layer=cfg.n_layers,
            n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )),
}  # fmt: skip
LLAMAS = {
    "llama3": dict(rope_scaling="llama3", rope_factor=8.0, rope_original=16, rope_theta=1000.0, seq_len=64),
    "llama3_yarn_tied": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16, seq_len=64, tied=True),
    "llama3_pi": dict(rope_scaling="pi", rope_factor=3.0, rope_original=16, seq_len=48),
    "qwen2_5": dict(qkv_bias=True, tied=True, norm_eps=1e-6, seq_len=24),
}
for case, overrides in LLAMAS.items():
    kind = ("Qwen2" if "qwen" in case else "Llama") + "{}"
    CASES[case] = ("llama3", overrides, lambda cfg, kind=kind: getattr(transformers, kind.format("ForCausalLM"))(
        llama_config(getattr(transformers, kind.format("Config")), cfg)))  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """(module, its row, tiny Config, Hugging Face's model of that)."""
    name, overrides, peer = CASES[request.param]
    module = importlib.import_module(name)
    cfg = module.Config(**{**SCRIPTS[name].tiny, **overrides, **({"rope_from": "initial"} if name == "llama3" else {})})
    return module, SCRIPTS[name], cfg, peer(cfg).eval()


def close(found, expected):
    """To 1e-4 of the largest entry, as the design asks, and in truth far better."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def pair(case, tmp_path):
    """Our model with distinct gains and biases, and Hugging Face's read from what to_hf wrote of it."""
    module, row, cfg, peer = case
    model = make_model(module, row, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # so that errors show
    module.to_hf(model, cfg, tmp_path)
    return model.eval(), type(peer).from_pretrained(tmp_path).eval(), cfg


def test_logits_loss_and_gradients(case, tmp_path):
    module = case[0]
    ours, theirs, cfg = pair(case, tmp_path)
    tokens = torch.randint(cfg.vocab_size, (3, cfg.seq_len), generator=torch.Generator().manual_seed(0))
    close(ours(tokens), theirs(tokens).logits)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": tokens[:, 1:].numel()}
    loss, _ = module.objective(ours, batch, cfg)
    expected = theirs(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    module_gradients, _ = module.from_hf(tmp_path / "gradients")
    expected = dict(module_gradients.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad, expected[name].data)


def test_reads_what_hugging_face_writes(case, tmp_path):
    module, row, cfg, theirs = case
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours, read = module.from_hf(tmp_path)
    wanted = (*module.HF_CONFIG, "hidden_dim", *(name for name in vars(cfg) if name in ("rope_theta", "rope_scaling", "qkv_bias")))
    assert {name: getattr(read, name) for name in wanted} == {name: getattr(cfg, name) for name in wanted}
    tokens = torch.randint(cfg.vocab_size, (2, cfg.seq_len))
    close(ours.eval()(tokens), theirs(tokens).logits)


EXPORT = {
    "gpt1": "--batch_size 2 --dim 32 --hidden_dim 128 --context 16 --n_heads 2 --val_batches 1 --lr 0.01 --warmup_steps 1",
    "llama3": "--batch_size 2 --dim 32 --hidden_dim 48 --seq_len 16 --ramp= --n_heads 4 --val_batches 1 --lr 0.01 --warmup_steps 1",
}


def test_export_then_init_on_the_command_line(script, tmp_path, capsys):
    module, row = script
    text = tmp_path / "text.txt"
    text.write_text("a text that repeats itself, " * 300)
    flags = ["--preset", "demo", "--data", str(text), *EXPORT[module.__name__].split()]
    module.main([*flags, "--steps", "20", "--export", str(tmp_path / "hf")])
    trained = capsys.readouterr().out.split("val 20 | loss ")[1].split()[0]
    module.main([*flags, "--dim", "8", "--steps", "1", "--init", str(tmp_path / "hf")])
    assert capsys.readouterr().out.split("val 0 | loss ")[1].split()[0] == trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.vocab_size in (257, 264)


def test_directories_that_hold_no_such_model(script, tmp_path):
    module, _ = script
    with pytest.raises(ValueError, match="holds no"):
        module.from_hf(tmp_path)
    config = dict(vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=2, hidden_size=8, intermediate_size=9,
                  num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, model_type="llama",
                  tie_word_embeddings=False, max_position_embeddings=16, rope_theta=10000.0)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no"):
        module.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "n_head": 3}))
    with pytest.raises(ValueError, match="holds no"):
        module.from_hf(tmp_path)
