"""Parity with Hugging Face's implementation: logits, loss, gradients, and checkpoints both ways."""
import importlib

import pytest
import torch
from ranks import make_model

transformers = pytest.importorskip("transformers")

# script: (class, its config for the row's tiny Config)
PEERS = {
    "gpt1": lambda cfg: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=cfg.vocab_size, n_positions=cfg.context, n_embd=cfg.dim, n_layer=cfg.n_layers,
            n_head=cfg.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
}  # fmt: skip
TINY = {"gpt1": dict(hidden_dim=96)}  # Hugging Face fixes F = 4 D


def close(found, expected):
    """To 1e-4 of the largest entry, as the design asks, and in truth far better."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def pair(script, tmp_path):
    """Our model with distinct gains and biases, and Hugging Face's read from what to_hf wrote of it."""
    module, row = script
    name = module.__name__
    cfg = module.Config(**{**row.tiny, **TINY[name]})
    model = make_model(module, row, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # so that errors show
    module.to_hf(model, cfg, tmp_path)
    return model.eval(), type(PEERS[name](cfg)).from_pretrained(tmp_path).eval(), cfg


def test_logits_loss_and_gradients(script, tmp_path):
    module, _ = script
    ours, theirs, cfg = pair(script, tmp_path)
    tokens = torch.randint(cfg.vocab_size, (3, cfg.context), generator=torch.Generator().manual_seed(0))
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


def test_reads_what_hugging_face_writes(script, tmp_path):
    module, row = script
    cfg = module.Config(**{**row.tiny, **TINY[module.__name__]})
    theirs = PEERS[module.__name__](cfg).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours, read = module.from_hf(tmp_path)
    assert all(getattr(read, name) == getattr(cfg, name) for name in (*module.HF_CONFIG, "hidden_dim"))
    tokens = torch.randint(cfg.vocab_size, (2, cfg.context))
    close(ours.eval()(tokens), theirs(tokens).logits)


def test_export_then_init_on_the_command_line(script, tmp_path, capsys):
    module, row = script
    text = tmp_path / "text.txt"
    text.write_text("a text that repeats itself, " * 300)
    flags = ["--preset", "demo", "--data", str(text), "--batch_size", "2", "--dim", "32", "--hidden_dim", "128",
             "--context", "16", "--n_heads", "2", "--val_batches", "1", "--lr", "0.01", "--warmup_steps", "1"]  # fmt: skip
    module.main([*flags, "--steps", "20", "--export", str(tmp_path / "hf")])
    trained = capsys.readouterr().out.split("val 20 | loss ")[1].split()[0]
    module.main([*flags, "--dim", "8", "--steps", "1", "--init", str(tmp_path / "hf")])
    assert capsys.readouterr().out.split("val 0 | loss ")[1].split()[0] == trained
    theirs = type(PEERS[module.__name__](module.Config(**row.tiny))).from_pretrained(tmp_path / "hf")
    assert theirs.config.vocab_size == 257


def test_directories_that_hold_no_such_model(script, tmp_path):
    module, _ = script
    with pytest.raises(ValueError, match="holds no"):
        module.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 9, "n_positions": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}')
    with pytest.raises(ValueError, match="holds no"):
        module.from_hf(tmp_path)
