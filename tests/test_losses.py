"""The formulas against 60-digit arithmetic, and against the naive expressions in float64."""

import math

import pytest
import torch

from ceu_rl.losses import (
    cross_entropy_unlearning_loss,
    descent_weight,
    kl_loss,
    log_ratio,
    npo_loss,
    satimp_loss,
    undial_loss,
    weighted_gradient_ascent_loss,
)

from .reference import LOG_ODDS, exact, logits_with, worst_relative_error


def random_logits(seed):
    """Logits (6, 7) in float64, labels, and the log-probabilities of these."""
    torch.manual_seed(seed)
    logits, labels = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 7, (6,))
    return logits, labels, logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("log_odds", LOG_ODDS)
def test_value_and_gradient_are_exact_at_any_probability(log_odds, dtype, tolerance):
    logits = logits_with(log_odds, dtype).requires_grad_()
    value, gradient = exact(logits, 2)
    loss = cross_entropy_unlearning_loss(logits, torch.tensor(2))
    loss.backward()
    assert worst_relative_error([loss.item()], [value]) <= tolerance
    assert worst_relative_error(logits.grad.tolist(), gradient) <= tolerance
    # The L1 norm is 2 p_y, so it never exceeds 2: p - q is p_y at the label
    norm = logits.grad.abs().sum().item()
    assert worst_relative_error([norm], [2 * gradient[2]]) <= tolerance
    assert norm <= 2 * (1 + 1e-6)


def test_equals_the_naive_expression_in_float64():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5))
    q = logits.detach().scatter(-1, labels.unsqueeze(-1), float("-inf")).softmax(-1)
    naive = -(q * logits.log_softmax(-1)).sum(-1)
    ours = cross_entropy_unlearning_loss(logits, labels, reduction="none")
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)
    weights = torch.randn(3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((naive * weights).sum(), logits)
    (found,) = torch.autograd.grad((ours * weights).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_is_the_unlikelihood_loss_up_to_the_entropy_of_q():
    logits, labels, log_p = random_logits(1)
    unlikelihood = -torch.log(1 - log_p.exp())
    ours = cross_entropy_unlearning_loss(logits, labels, reduction="none")
    q = logits.detach().scatter(-1, labels.unsqueeze(-1), float("-inf")).softmax(-1)
    torch.testing.assert_close(ours - unlikelihood, torch.special.entr(q).sum(-1), rtol=1e-10, atol=0)
    (expected,) = torch.autograd.grad(unlikelihood.sum(), logits)
    (found,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_is_gradient_ascent_with_each_token_weighted_by_its_odds():
    logits, labels, log_p = random_logits(2)
    odds = (log_p.exp() / (1 - log_p.exp())).detach()
    (expected,) = torch.autograd.grad((odds * log_p).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(cross_entropy_unlearning_loss(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    weight = descent_weight(log_p, coef=1.0, scale=1.0, max_weight=float("inf"))
    torch.testing.assert_close(weight, odds, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_logit", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_half_precision_stays_finite(dtype, label_logit):
    logits = torch.tensor([[label_logit, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    loss = cross_entropy_unlearning_loss(logits, torch.tensor([0]))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert logits.grad.dtype == dtype and torch.isfinite(logits.grad).all()
    assert logits.grad.float().abs().sum() <= 2.01


def test_reductions_and_ignored_positions():
    torch.manual_seed(3)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[1, -100, 2, 4], [-100, -100, 0, 3]])
    each = cross_entropy_unlearning_loss(logits, labels, reduction="none")
    kept = labels != -100
    assert (each[~kept] == 0).all() and (each[kept] > 0).all()
    assert cross_entropy_unlearning_loss(logits, labels, reduction="sum") == each.sum()
    assert cross_entropy_unlearning_loss(logits, labels) == each.sum() / kept.sum()
    nothing = cross_entropy_unlearning_loss(logits.requires_grad_(), torch.full_like(labels, -100))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()
    other = labels.masked_fill(~kept, 3)
    found = cross_entropy_unlearning_loss(logits, other, ignore_index=3, reduction="sum")
    torch.testing.assert_close(found, each[kept & (labels != 3)].sum())


@pytest.mark.parametrize(
    ("logits", "labels", "kwargs", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, "label 3 is outside the vocabulary of 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), {}, "label -1 is outside"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, r"labels have shape \(1,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"reduction": "median"}, "reduction is 'median'"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), {}, "the vocabulary has 1 entry"),
    ],
)
def test_bad_arguments_are_named(logits, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_unlearning_loss(logits, labels, **kwargs)


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("max_weight", [0.5, 1.0, 2.0, float("inf")])
def test_descent_weight_is_the_formula(coef, scale, max_weight):
    p = torch.tensor([1e-12, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    odds = p / (1 - p)
    expected = (1 - coef) + coef / (1 / (scale * odds) + 1 / max_weight)
    found = descent_weight(p.log(), coef, scale, max_weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_descent_weight_of_the_settings_that_have_a_name():
    log_p = torch.tensor([-20.0, -2.0, -0.5, -1e-3], requires_grad=True)
    assert torch.equal(descent_weight(log_p, coef=0.0), torch.ones(4))  # stock gradient ascent
    torch.testing.assert_close(descent_weight(log_p), log_p.detach().exp())  # the bounded default is p
    assert not descent_weight(log_p).requires_grad


@pytest.mark.parametrize("max_weight", [1.0, float("inf")])
def test_descent_weight_is_finite_and_not_negative_at_the_edges(max_weight):
    # A log-probability can round to zero or just above it, and run to -inf
    log_p = torch.tensor([1e-7, 0.0, -1e-30, -200.0, -float("inf")])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = descent_weight(log_p.to(dtype), max_weight=max_weight)
        assert torch.isfinite(weight).all() and (weight >= 0).all()
        assert (weight[3:] < 1e-6).all()


def test_descent_weight_of_the_published_form_in_float32():
    """As documented: 1 % down to 1 - p = 1e-4, and too small, never too large, below 1e-6."""
    remainder = torch.tensor([1e-2, 1e-3, 1e-4, 1e-8], dtype=torch.float64)
    found = descent_weight(torch.log1p(-remainder).float(), max_weight=float("inf")).double()
    expected = (1 - remainder) / remainder
    assert ((found - expected).abs() <= 0.01 * expected)[:3].all()
    assert found[3] < 0.2 * expected[3]


def test_ascent_vanishes_where_ce_u_is_largest_and_the_other_way_round():
    """The L1 norm of the gradient on the logits is 2 (1 - p_y) for ascent, 2 p_y for CE-U."""
    for log_odds in (-12.0, -3.0, 0.0, 3.0, 12.0):
        logits = logits_with(log_odds, torch.float64).requires_grad_()
        p = logits.softmax(-1)[2].item()
        (ascent,) = torch.autograd.grad(logits.log_softmax(-1)[2], logits)
        (ce_u,) = torch.autograd.grad(cross_entropy_unlearning_loss(logits, torch.tensor(2)), logits)
        assert ascent.abs().sum().item() == pytest.approx(2 * (1 - p), rel=1e-9)
        assert ce_u.abs().sum().item() == pytest.approx(2 * p, rel=1e-9)


def test_with_weight_p_the_push_is_the_gradient_of_p():
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)[3]
    (push,) = torch.autograd.grad(descent_weight(log_p) * log_p, logits, retain_graph=True)
    (of_p,) = torch.autograd.grad(log_p.exp(), logits)
    torch.testing.assert_close(push, of_p)


def test_on_policy_sampling_supplies_the_factor_p():
    """Over y drawn from p, stock's expected push A log p_y is the gradient of the expected advantage sum_y p_y A_y."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.1], dtype=torch.float64)
    p = logits.softmax(-1)
    (expected,) = torch.autograd.grad((p * advantages).sum(), logits, retain_graph=True)
    (met,) = torch.autograd.grad((p.detach() * advantages * logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(met, expected)


@pytest.mark.parametrize("coef", [0.3, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("max_weight", [0.5, 1.0])
def test_with_a_cap_of_one_the_weight_never_exceeds_that_of_stock(coef, scale, max_weight):
    log_p = torch.cat([torch.linspace(-30, -1e-3, 100), torch.zeros(1)])
    assert (descent_weight(log_p, coef, scale, max_weight) <= 1).all()


def family(x, scale=1.0, max_weight=math.inf):
    return 1 / (1 / (scale * x) + 1 / max_weight)


def slope(loss, log_prob):
    (found,) = torch.autograd.grad(loss, log_prob, retain_graph=True)
    return found


@pytest.mark.parametrize("ratio", [1e-3, 0.4, 1.0, 1.9])
def test_neighbours_are_the_same_family_with_another_x(ratio):
    """The weight on the gradient of log pi that each method's own loss gives, by autograd."""
    log_ref = torch.tensor(-3.0, dtype=torch.float64)
    log_pi = (log_ref + math.log(ratio)).requires_grad_()
    r = (log_pi - log_ref).exp()
    # BDPO: log of the mixture lambda pi + (1 - lambda) pi_ref
    for mix in (0.1, 0.5, 0.9):
        mixture = (mix * log_pi.exp() + (1 - mix) * log_ref.exp()).log()
        assert slope(mixture, log_pi).item() == pytest.approx(family(ratio, mix / (1 - mix), 1.0))
    # NFT: -log of the implicit negative policy (pi_old - q pi) / (1 - q), over pi_old
    for rate in (0.1, 0.5):
        negative = -torch.log((1 - rate * r) / (1 - rate))
        odds, of_rate = rate * ratio / (1 - rate * ratio), rate / (1 - rate)
        assert slope(negative, log_pi).item() == pytest.approx(of_rate * family(odds / of_rate))
    # TOPR: sg[min(1, pi / mu)] log pi
    assert slope(r.detach().clamp(max=1) * log_pi, log_pi).item() == pytest.approx(family(min(1.0, ratio)))


def test_weighted_gradient_ascent_is_the_bounded_descent_weight():
    log_probs = torch.linspace(-20, -1e-3, 50, dtype=torch.float64, requires_grad=True)
    weighted_gradient_ascent_loss(log_probs).sum().backward()
    torch.testing.assert_close(log_probs.grad, descent_weight(log_probs))


@pytest.mark.parametrize("loss", [weighted_gradient_ascent_loss, satimp_loss])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_token_that_the_model_rules_out_is_at_the_limit_of_p_log_p(loss, dtype):
    logits = torch.tensor([0.0, 1.0, -math.inf], dtype=dtype, requires_grad=True)
    value = loss(logits.log_softmax(dim=-1))[2]
    value.backward()
    assert value.item() == 0 and logits.grad.tolist() == [0, 0, 0]


def test_a_token_that_both_models_rule_out_has_no_ratio():
    log_probs = torch.tensor([-math.inf, -math.inf, -1.0, -2.0], requires_grad=True)
    ratio = log_ratio(log_probs, torch.tensor([-math.inf, -1.0, -math.inf, -2.0]))
    assert ratio.tolist() == [0.0, -math.inf, math.inf, 0.0]
    npo_loss(ratio[[0, 1, 3]]).sum().backward()
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_token_that_both_models_rule_out_counts_for_nothing():
    logits, ref = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    without = [kl_loss(logits[:, :5], ref[:, :5]), undial_loss(logits[:, :5], ref[:, :5], labels)]
    logits[:, 5] = ref[:, 5] = -math.inf
    logits.requires_grad_()
    found = [kl_loss(logits, ref), undial_loss(logits, ref, labels)]
    for one, other in zip(found, without, strict=True):
        torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(sum(each.sum() for each in found), logits)
    assert torch.isfinite(gradient).all()
