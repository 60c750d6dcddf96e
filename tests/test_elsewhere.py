"""The functions of docs/elsewhere.md, on tensors of the shapes that verl's and prime-rl's documents give."""

import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ADVANTAGE = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-0.5, -0.5, -0.5, -0.5]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
PROBABILITY = torch.tensor([[0.9, 0.5, 0.1, 0.3], [0.9, 0.5, 0.1, 0.001]], dtype=torch.float64)


def token_mean(loss_mat, loss_mask, loss_agg_mode):
    assert loss_agg_mode == "token-mean"
    return (loss_mat * loss_mask).sum() / loss_mask.sum()


@pytest.fixture
def functions(monkeypatch):
    """The functions of the document, with stand-ins for the two packages."""
    registered = {}

    def register_policy_loss(name):
        return lambda function: registered.setdefault(name, function)

    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.agg_loss, core.register_policy_loss = token_mean, register_policy_loss
    loss = types.ModuleType("prime_rl.trainer.rl.loss")
    loss.LossInputs = loss.LossOutputs = SimpleNamespace
    for module in (core, loss):
        for end in (i for i, letter in enumerate(module.__name__) if letter == "."):
            monkeypatch.setitem(sys.modules, module.__name__[:end], types.ModuleType(module.__name__[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found: dict = {}
    text = (Path(__file__).parents[1] / "docs" / "elsewhere.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, found)
    assert registered["ceu"] is found["ceu_policy_loss"]
    return found


# On-policy, weight 1/2 + p/2 on the tokens of the second row, which has a negative advantage: -A w for each token
EXPECTED = -ADVANTAGE * torch.where(ADVANTAGE < 0, 0.5 + PROBABILITY / 2, 1.0) * MASK


def test_verl(functions):
    log_prob = PROBABILITY.log().requires_grad_()
    config = SimpleNamespace(clip_ratio=0.2)
    given = (log_prob.detach(), log_prob, ADVANTAGE, MASK)
    loss, metrics = functions["ceu_policy_loss"](*given, loss_agg_mode="token-mean", config=config)
    loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(log_prob.grad, EXPECTED / MASK.sum())
    assert metrics == {"actor/ceu_descending_fraction": pytest.approx(4 / 7)}
    corrected, _ = functions["ceu_policy_loss"](*given, config=config, rollout_is_weights=torch.full_like(ADVANTAGE, 2))
    assert corrected.item() == pytest.approx(2 * loss.item())


def test_prime_rl(functions):
    def inputs(row, log_probs, sampled):
        masked = {"advantages": ADVANTAGE[row], "loss_mask": MASK[row].bool(), "loss_weights": None}
        return SimpleNamespace(trainer_logprobs=log_probs, inference_logprobs=sampled, ref_logprobs=None, **masked)

    for row in range(2):
        log_probs = PROBABILITY[row].log().requires_grad_()
        outputs = functions["ceu_loss"](inputs(row, log_probs, log_probs.detach()))
        outputs.loss.backward()
        assert outputs.loss.shape == outputs.metrics["ceu_descending_fraction"].shape == ()
        torch.testing.assert_close(log_probs.grad, EXPECTED[row])
        assert outputs.metrics["ceu_descending_fraction"] == row
    # A token that is clipped is not descended
    log_probs = PROBABILITY[1].log().requires_grad_()
    functions["ceu_loss"](inputs(1, log_probs, log_probs.detach() + 1)).loss.backward()
    assert (log_probs.grad == 0).all()
