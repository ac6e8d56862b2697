"""What the loss is before training, and that training lowers it on the corpus that is always there."""
import json
import math
import signal
import sysconfig

import pytest
import torch
from conftest import CAUSAL, SCRIPTS
from ranks import make_corpora, with_short_sample


@CAUSAL
def test_first_loss_on_random_tokens(script):
    """N(0, 0.02) logits know nothing of random targets: ln V, within what chance leaves."""
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    tokens = torch.randint(cfg.vocab_size, (64, 8), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": tokens[:, 1:].numel(), "n_sequences": 64}
    loss, _ = module.objective(model, batch, cfg)
    assert loss.item() == pytest.approx(math.log(cfg.vocab_size), abs=0.1)


@CAUSAL
def test_loss_counts_targets_not_batches(script):
    """A batch of two unequal halves: its loss weighs each target alike, and ignored ones nothing."""
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    batch = module.get_batch(make_corpora(module, cfg)[0], 0, 8, cfg)
    documents = {key: batch[key] for key in ("documents",) if key in batch}
    nats = -model(batch["tokens"], **documents).log_softmax(-1).double()
    targets = batch["targets"]
    every = [nats[b, t, targets[b, t]].item() for b in range(8) for t in range(cfg.seq_len) if targets[b, t] >= 0]
    assert batch["n_targets"] == len(every) and (len(every) < targets.numel() or module.__name__ in ("gpt3", "chinchilla", "deepseek_v3", "kimi_muon"))
    loss, _ = module.objective(model, batch, cfg)
    assert loss.item() == pytest.approx(sum(every) / len(every), rel=1e-6)


@pytest.mark.parametrize("name, flags", [(name, flags) for name, row in SCRIPTS.items() for flags in row.variants])
def test_thirty_steps_on_python_source(name, flags, tmp_path, capsys):
    module, row = with_short_sample(name), SCRIPTS[name]
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    source = sysconfig.get_paths()["stdlib"] + "/asyncio"  # a part of the embedded corpus, for speed
    steps = 15 if "--precision" in flags else 30  # low precision is slow on a CPU
    module.main(["--preset", "demo", "--data", source, "--steps", str(steps), *row.warm.split(), "--val_batches", "1", "--log_every", "1",
                 "--out", str(tmp_path / "run"), *flags.split()])  # fmt: skip
    for signum, handler in before.items():
        signal.signal(signum, handler)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert rows[0]["loss"] - sum(r["loss"] for r in rows[-5:]) / 5 > row.falls * steps / 30
    if name == "bert":  # whose loss is no code for the text
        assert rows[-1]["bpb"] is None
    else:
        assert rows[-1]["bpb"] == pytest.approx(rows[-1]["loss"] / math.log(2), rel=5e-3)  # a byte a token
    assert rows[-1]["tokens"] == steps * math.prod(row.batch)
