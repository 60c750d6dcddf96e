"""The fused loss against 60-digit arithmetic, plain float64 logits, and the naive loss in half precision."""

import math
import re

import mpmath
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from ceu_rl.fused import fused_linear_unlearning_loss, lm_head_options
from ceu_rl.losses import cross_entropy_unlearning_loss

mpmath.mp.dps = 60
# Label probabilities 1e-30, 1e-10, 1e-3, 1/2, 1 - 1e-3, 1 - 1e-10, 1 - 1e-26
LOG_ODDS = [math.log(1e-30), math.log(1e-10), math.log(1e-3), 0.0, math.log(1e3), math.log(1e10), math.log(1e26)]


def plain(hidden, weight, labels, mask=None, bias=None, softcap=None, logit_scale=1.0, reduction="mean"):
    """The naive expression on all logits."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != -100
    mask = kept if mask is None else kept & mask
    unlearn = cross_entropy_unlearning_loss(logits[mask], labels[mask], reduction="sum")
    learn = F.cross_entropy(logits[kept & ~mask], labels[kept & ~mask], reduction="sum")
    return (unlearn + learn) / (kept.sum() if reduction == "mean" else 1)


def problem(tokens=(3, 7), hidden_size=6, vocabulary=13, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(0, vocabulary, tokens, generator=generator)
    labels.view(-1)[::5] = -100
    mask = torch.rand(tokens, generator=generator) > 0.5
    return draw(*tokens, hidden_size), draw(vocabulary, hidden_size), labels, mask, draw(vocabulary)


@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 5.0, "logit_scale": 2.0}], ids=str
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_are_those_of_plain_logits(biased, masked, options, reduction, chunk_size):
    hidden, weight, labels, mask, bias = problem()
    mask, bias = mask if masked else None, bias if biased else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    found = fused_linear_unlearning_loss(
        hidden, weight, labels, mask, bias, reduction=reduction, chunk_size=chunk_size, **options
    )
    expected = plain(hidden, weight, labels, mask, bias, reduction=reduction, **options)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("log_odds", LOG_ODDS)
@pytest.mark.parametrize("unlearn", [True, False])
def test_float32_is_exact_at_any_probability(log_odds, unlearn):
    """Hidden states are logits (the weight is the identity), so that 60 digits can be had of everything."""
    others = [0.3, -1.2, 0.9, -0.4]
    normalizer = torch.tensor(others, dtype=torch.float64).logsumexp(0).item()
    hidden = torch.tensor([[*others[:2], normalizer + log_odds, *others[2:]]], requires_grad=True)
    weight = torch.eye(5, requires_grad=True)
    loss = fused_linear_unlearning_loss(hidden, weight, torch.tensor([2]), torch.tensor([unlearn]))
    loss.backward()
    z = [mpmath.mpf(value) for value in hidden[0].double().tolist()]
    e = [mpmath.exp(value) for value in z]
    p = [value / mpmath.fsum(e) for value in e]
    rest = mpmath.fsum(value for i, value in enumerate(e) if i != 2)
    q = [mpmath.mpf(0) if i == 2 else value / rest for i, value in enumerate(e)]
    if unlearn:
        value = -mpmath.fsum(q_i * mpmath.log(p_i) for q_i, p_i in zip(q, p, strict=True))
        gradient = [p[2] * ((i == 2) - q[i]) for i in range(5)]
    else:
        value = -mpmath.log(p[2])
        gradient = [(rest / mpmath.fsum(e)) * (q[i] - (i == 2)) for i in range(5)]
    assert abs((mpmath.mpf(loss.item()) - value) / value) < 1e-5
    for i in range(5):
        assert abs((mpmath.mpf(hidden.grad[0, i].item()) - gradient[i]) / gradient[i]) < 1e-5
        for j in range(5):
            truth = gradient[i] * z[j]
            assert abs((mpmath.mpf(weight.grad[i, j].item()) - truth) / truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unlearn", [True, False])
def test_half_precision_is_no_worse_than_the_naive_loss(dtype, unlearn):
    """Over ten problems: the error against float64 from the same rounded inputs, ours and that of the naive loss."""
    ours, naive = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for seed in range(10):
        hidden, weight, labels, _, _ = problem((64,), 32, 257, dtype, seed)
        mask = torch.full(labels.shape, unlearn)
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        truth = plain(*exact, labels, mask)
        truths = [truth, *torch.autograd.grad(truth, exact)]
        for loss, errors in (
            (fused_linear_unlearning_loss(hidden, weight, labels, mask, chunk_size=16), ours),
            (plain(hidden, weight, labels, mask), naive),
        ):
            found = [loss, *torch.autograd.grad(loss, (hidden, weight))]
            assert all(torch.isfinite(value).all() for value in found)
            errors += torch.tensor(
                [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truths, strict=True)]
            )
    assert (ours[1:] <= 1.02 * naive[1:]).all() and ours[0] <= naive[0] + 1e-4, (ours, naive)


def test_a_batch_without_tokens_is_a_differentiable_zero():
    hidden, weight, labels, _, bias = problem()
    loss = fused_linear_unlearning_loss(hidden, weight, torch.full_like(labels, -100), bias=bias)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert (gradient == 0).all()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels, mask, _ = problem()
    expected = torch.autograd.grad(plain(hidden, weight, labels, mask), hidden)[0]
    loss = fused_linear_unlearning_loss(hidden, weight.detach(), labels, mask)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)
    frozen = fused_linear_unlearning_loss(hidden.detach(), weight, labels, mask)
    torch.testing.assert_close(
        torch.autograd.grad(frozen, weight)[0], torch.autograd.grad(plain(hidden, weight, labels, mask), weight)[0]
    )
    with torch.no_grad():
        assert not fused_linear_unlearning_loss(hidden, weight, labels, mask).requires_grad


def test_autocast_computes_in_its_type():
    hidden, weight, labels, mask, _ = problem((64,), 32, 257, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_unlearning_loss(hidden, weight, labels, mask)
    half = fused_linear_unlearning_loss(hidden.bfloat16(), weight.bfloat16(), labels, mask)
    assert loss.item() == half.item() and loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    expected = torch.autograd.grad(plain(hidden, weight, labels, mask), (hidden, weight))
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels, _, _ = problem()
    loss = fused_linear_unlearning_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="kept for one backward pass, and this is a second one"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_nothing_is_as_large_as_the_logits(tokens):
    hidden, weight, labels, mask, _ = problem((tokens,), 8, 2000, torch.float32)
    with LargestTensor() as ours:
        fused_linear_unlearning_loss(hidden, weight, labels, mask, chunk_size=64).backward()
    assert ours.largest == max(64 * 2000, tokens * 8)
    with LargestTensor() as naive:
        plain(hidden, weight, labels, mask).backward()
    assert naive.largest > 0.3 * tokens * 2000


HEADS = [
    {},
    {"final_logit_softcapping": 2.0},
    {"logit_scale": 0.25},
    {"output_multiplier": 0.25},
    {"lm_head_multiplier": 0.25},
    {"logits_scaling": 4.0},
    {"logits_scaling": 4.0, "model_type": "hyperclovax"},
    {"final_logit_softcapping": 2.0, "logit_scale": 3.0},
]


@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_contract_the_head_is_read_as_trl_reads_it(tiny_model, fields):
    """If this fails, TRL computes the logits of such a model in another way: follow it in `lm_head_options`."""
    model = tiny_model()
    for name, value in fields.items():
        setattr(model.config, name, value)
    add_fused_lm_head(model)
    ids = torch.randint(8, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    stock = model(input_ids=ids, labels=ids, fused_lm_head=True)
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    learn = torch.zeros(2, 8, dtype=torch.bool)
    ours = fused_linear_unlearning_loss(hidden, model.lm_head.weight, ids[:, 1:], learn, **lm_head_options(model))
    torch.testing.assert_close(ours, -stock.log_probs.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"reduction": "max"}, "reduction is 'max'; use 'mean' or 'sum'"),
        ({"labels": torch.full((3, 7), 13)}, "label 13 is outside the vocabulary of 13 entries"),
        ({"labels": torch.full((3, 7), -1)}, "label -1 is outside"),
        ({"labels": torch.zeros(3, 6, dtype=torch.long)}, "labels have shape (3, 6) and hidden (3, 7, 6)"),
        ({"weight": torch.zeros(13, 5)}, "weight has shape (13, 5)"),
        ({"weight": torch.zeros(1, 6)}, "the vocabulary has 1 entry"),
        ({"bias": torch.zeros(12)}, "bias has shape (12,)"),
        ({"unlearn_mask": torch.zeros(3, 7)}, "unlearn_mask has dtype torch.float32"),
        ({"unlearn_mask": torch.zeros(3, dtype=torch.bool)}, "unlearn_mask has shape (3,)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, weight, labels, mask, bias = problem()
    given = {"hidden": hidden, "weight": weight, "labels": labels, "unlearn_mask": mask, "bias": bias, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_linear_unlearning_loss(**given)
