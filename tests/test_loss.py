"""What the loss is before training, and that training lowers it on the corpus that is always there."""
import json
import math
import sysconfig

import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, SCRIPTS
from ranks import Process, make_corpora, make_model


@CAUSAL
def test_first_loss_on_random_tokens(script):
    """N(0, 0.02) logits know nothing of random targets: ln V, within what chance leaves."""
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    model = getattr(module, row.model)(cfg)
    module.init_weights(model, cfg)
    tokens = torch.randint(cfg.vocab_size, (64, 8), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "n_targets": tokens[:, 1:].numel(), "n_sequences": 64}
    assert module.objective(model, batch, cfg)[0].item() == pytest.approx(math.log(cfg.vocab_size), abs=0.1)


@CAUSAL
def test_loss_is_the_mean_over_targets(script):
    """Of cross-entropy, each target alike and unscored ones nothing, in value and in the gradient of every parameter."""
    module, row = script
    cfg = module.Config(**row.tiny | row.plain)
    model = make_model(module, row, cfg)
    batch = module.get_batch(make_corpora(module, cfg)[0], 0, 8, cfg)
    documents = {key: batch[key] for key in ("documents",) if key in batch}
    loss, _ = module.objective(model, batch, cfg)
    expected = F.cross_entropy(model(batch["tokens"], **documents).flatten(0, 1).double(), batch["targets"].flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    largest = max(g.abs().max() for g in wanted)
    for g, w in zip(found, wanted):
        assert (g - w).abs().max() <= 1e-5 * max(w.abs().max(), 1e-3 * largest)


@pytest.mark.parametrize("name, flags", [(name, flags) for name, row in SCRIPTS.items() for flags in row.variants])
def test_thirty_steps_on_python_source(name, flags, tmp_path):
    """The demo, as it is and in each of its variants, takes off what its row says; the log's bits per byte are those nats."""
    row = SCRIPTS[name]
    source = sysconfig.get_paths()["stdlib"] + "/asyncio"  # a part of the embedded corpus, for speed
    steps = 15 if "--precision" in flags else 30  # low precision is slow on a CPU
    line = f"--preset demo --data {source} --steps {steps} {row.warm} --val_batches 1 --log_every 1 --out {tmp_path} {flags}"
    process = Process(name, line.split())
    assert process.wait() == 0, process.communicate()
    rows = [json.loads(line) for line in open(tmp_path / "metrics.jsonl") if '"loss"' in line]
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert rows[0]["loss"] - sum(r["loss"] for r in rows[-5:]) / 5 > row.falls * steps / 30
    bpb = None if name == "bert" else pytest.approx(rows[-1]["loss"] / math.log(2), rel=5e-3)  # a byte a token, but BERT's loss is no code
    assert rows[-1]["bpb"] == bpb and rows[-1]["tokens"] == steps * math.prod(row.batch)
