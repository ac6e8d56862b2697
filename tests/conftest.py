"""One row a script: what the tests must know of it. A new script is a new row, not a new test."""
import dataclasses
import importlib
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers below are a CPU's
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclasses.dataclass
class Row:
    model: str  # name of the model class
    tiny: dict  # a Config whose sizes are pairwise different, for shapes and gradients
    counts: dict  # preset: exact parameters, from the paper or its specification
    schedule: tuple  # (overrides of Config, {step: learning rate})
    layouts: tuple  # (ranks, overrides of Config): all must give one rank's gradients
    falls: float  # nats that 30 steps of the demo's shape take off the loss, at least


SCRIPTS = {
    "gpt1": Row(
        model="GPT1",
        tiny=dict(vocab_size=257, context=11, dim=24, n_layers=2, n_heads=3, hidden_dim=80, dropout=0.0,
                  seq_len=7, batch_size=8, precision="fp32", lr=1e-3, steps=5, warmup_steps=1),
        counts={"paper": 116_534_784, "small": 85_645_056, "demo": 260_640},
        # half the peak at 1000, all of it at 2000, a little less at 2001: the cosine began at 0
        schedule=(dict(lr=1.0, steps=100_000, warmup_steps=2000),
                  {0: 0.0, 1: 0.0005, 1000: 0.5, 2000: 1.0, 2001: 0.999012, 50_000: 0.5, 99_999: 2.5e-10}),
        layouts=((1, dict(micro_batch=8)), (1, dict(micro_batch=2)), (1, dict(micro_batch=1)),
                 (2, dict(micro_batch=4)), (2, dict(micro_batch=1)), (4, dict(micro_batch=2)),
                 (4, dict(micro_batch=1)), (2, dict(recompute="block"))),
        falls=1.0,
    ),
}  # fmt: skip


@pytest.fixture(params=SCRIPTS)
def script(request):
    """(module, its row) of each script in turn."""
    return importlib.import_module(request.param), SCRIPTS[request.param]


@pytest.fixture(scope="session")
def ranks():
    """The pool of worker processes; see ranks.py."""
    from ranks import Ranks

    pool = Ranks(4)
    yield pool
    pool.close()
