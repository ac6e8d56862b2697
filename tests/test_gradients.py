"""Every layout of every script gives the gradients of one plain backward pass over the batch."""
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from ranks import gradients, make_corpora, make_model

CASES = [(name, n, overrides) for name, row in SCRIPTS.items() for n, overrides in row.layouts]


def reference(name):
    """Loss and gradients without any of the script's training code: one batch, one mean."""
    module, row = importlib.import_module(name), SCRIPTS[name]
    cfg = module.Config(**row.tiny)
    batch = module.get_batch(make_corpora(module, cfg)[0], 3, cfg.batch_size, cfg)
    assert 0 < batch["n_targets"] < batch["targets"].numel(), "some targets must not count"
    model = make_model(module, row, cfg)
    loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name, n, overrides", CASES)
def test_layout_gives_one_ranks_gradients(ranks, name, n, overrides):
    expected_loss, expected = reference(name)
    largest = max(np.abs(g).max() for g in expected.values())
    for loss, found in ranks.run(n, gradients, name, SCRIPTS[name], overrides):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for key, g in expected.items():
            limit = 1e-5 * max(np.abs(g).max(), 1e-3 * largest)
            assert np.abs(found[key] - g).max() <= limit, key


def join(name):
    """One sum over the group that the script's launch makes."""
    module = importlib.import_module(name)
    return module.sum_over_ranks(1, device=module.launch(30))


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_restart_meets_under_a_name_of_its_own(ranks, name):
    """Workers that torchrun restarts share its store with the dead ones, whose addresses are there."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart in ("0", "3"):
        known = set(server.list_keys()) if restart == "3" else set()
        environment = {"MASTER_PORT": str(server.port), "TORCHELASTIC_RESTART_COUNT": restart,
                       "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        assert ranks.run(2, join, name, **environment) == [[2.0], [2.0]]
        new = set(server.list_keys()) - known
        assert new and all(key.startswith(f"start {restart}/") for key in new)


def test_gradient_of_the_logits_is_p_minus_y(script):
    module, row = script
    cfg = module.Config(**row.tiny)
    batch = module.get_batch(make_corpora(module, cfg)[0], 0, 4, cfg)
    logits = torch.randn(*batch["tokens"].shape, cfg.vocab_size, requires_grad=True)
    loss, _ = module.objective(lambda tokens: logits, batch, cfg)
    loss.backward()
    counted = (batch["targets"] >= 0)[..., None]
    y = F.one_hot(batch["targets"].clamp(min=0), cfg.vocab_size)
    expected = (logits.detach().double().softmax(-1) - y) * counted / counted.sum()
    torch.testing.assert_close(logits.grad.double(), expected, atol=1e-8, rtol=1e-5)
