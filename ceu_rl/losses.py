"""The formulas of CE-U on plain tensors; this module imports torch alone.

Symbols: logits z over a vocabulary of V tokens at one position, p = softmax(z), y the label, p_y its probability,
e_y its one-hot vector, q = softmax(z with z_y = -inf), odds = p_y / (1 - p_y).
"""

import math
from typing import Any

import torch
from torch.nn import functional as F


def cross_entropy_unlearning_loss(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """Cross Entropy Unlearning loss (CE-U; Yang 2025, arXiv 2503.01224).

    For each position

        L = CE(sg[q], p) = -sum_i q_i log p_i        dL/dz = p - q = p_y (e_y - q)

    where sg stops the gradient. The L1 norm of the gradient is 2 p_y <= 2. It is the gradient of the unlikelihood
    loss -log(1 - p_y) (Welleck et al. 2020, arXiv 1908.04319), and the two values differ by the entropy of q:

        L = H(sg[q]) - log(1 - p_y),        -log(1 - p_y) = softplus(z_y - logsumexp_{i != y} z_i)

    This form is computed here, because unlike the naive expression it loses no digits, neither as p_y -> 0 (where
    p - q cancels) nor as p_y -> 1 (where 1 - p_y underflows).

    Args:
        logits: Floating tensor of shape (..., V) with V >= 2. Half precision is computed in float32.
        labels: Integer tensor of shape (...): the token to unlearn at each position. Labels are not shifted.
        ignore_index: Label of the positions that contribute nothing.
        reduction: `"mean"` over the positions that are not ignored, `"sum"`, or `"none"`.

    Returns:
        The loss in nats, in float32 (float64 for float64 logits): a scalar, or shape (...) for `"none"`. Without any
        position to unlearn it is a differentiable zero.

    Raises:
        ValueError: for an unknown reduction, shapes that do not match, or a label outside the vocabulary.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; use 'mean', 'sum' or 'none'.")
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; "
            "give logits of shape (*labels.shape, vocabulary)."
        )
    vocabulary = logits.shape[-1]
    if vocabulary < 2:
        raise ValueError(f"the vocabulary has {vocabulary} entry; CE-U needs at least 2, one of them not the label.")
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} is outside the vocabulary of {vocabulary} entries; "
            f"use 0 to {vocabulary - 1}, or ignore_index ({ignore_index}) for positions to leave out."
        )

    logits = _exact(logits)
    index = labels.masked_fill(~kept, 0).unsqueeze(-1)
    others = logits.scatter(-1, index, float("-inf"))
    log_normalizer = others.logsumexp(dim=-1)
    log_odds = logits.gather(-1, index).squeeze(-1) - log_normalizer
    with torch.no_grad():
        q = (others - log_normalizer.unsqueeze(-1)).exp()
        entropy = torch.special.entr(q).sum(dim=-1)
    loss = (entropy - F.logsigmoid(-log_odds)).masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / kept.sum().clamp(min=1)


def descent_weight(
    log_probs: torch.Tensor, coef: float = 1.0, scale: float = 1.0, max_weight: float = 1.0
) -> torch.Tensor:
    """Weight on the gradient of a token whose log-probability is being lowered.

    Gradient ascent minimises log p_y, with dz = e_y - p; CE-U is the same direction, each token weighted by its odds
    p_y / (1 - p_y). This family scales that weight by s, caps it softly at M, and mixes it with plain ascent by a:

        w(p_y) = (1 - a) + a / (1 / (s * odds) + 1 / M)

    a = 0 is gradient ascent; a = s = 1, M = inf is CE-U as published; a = s = M = 1 is w = p_y.

    Args:
        log_probs: Tensor of any shape: log p_y, in nats.
        coef: a, from 0 to 1.
        scale: s > 0.
        max_weight: M > 0; `inf` for no cap.

    Returns:
        The weight, detached, of the same shape, in float32 (float64 for float64 input). It is always finite: 1 / odds
        is taken as at least 16 epsilons, since log p_y is known to about one ulp of a logit of 16 to 32. With M = inf
        the weight therefore falls short of the formula where 1 - p_y is below 2e-6 in float32;
        `cross_entropy_unlearning_loss` does not.

    Raises:
        ValueError: if a coefficient is outside its range.
    """
    check_ranges(ceu_coef=coef, ceu_scale=scale, ceu_max_weight=max_weight)
    log_probs = _exact(log_probs.detach())
    inverse_odds = torch.expm1(-log_probs).clamp(min=16 * torch.finfo(log_probs.dtype).eps)
    return (1.0 - coef) + coef / (inverse_odds / scale + 1.0 / max_weight)


# Rules that measure a token, or its response, against an anchor: its probability where the data were judged


def anchor_log_ratio(log_probs: torch.Tensor, anchor_log_probs: torch.Tensor) -> torch.Tensor:
    """x = log(p / p_a) of each token, detached, at least in float32; 0 where the anchor is not known (NaN)."""
    return log_ratio(_exact(log_probs.detach()), _exact(anchor_log_probs.detach())).nan_to_num(nan=0.0)


def anchored_weight(log_probs: torch.Tensor, anchor_log_probs: torch.Tensor) -> torch.Tensor:
    """Weight of each token by its own anchor, the probability p_a that it had where the data were judged.

        w = min(1, p / p_a)

    At the start w = 1, which is gradient ascent. As the token falls, its push is (p / p_a)(e_y - p), the gradient of
    p / p_a: CE-U's bounded push in units of the anchor. It is the gradient of stock's loss with its log-ratio
    x = log(p / p_a) replaced by

        phi(x) = x for x >= 0, e^x - 1 for x < 0

    so that no token pays more than one nat. A token that chosen and rejected responses share is neutral at or above its
    anchor, as with stock, and is drawn back to it from below.

    Args:
        log_probs: log p of each token, in nats, of any shape.
        anchor_log_probs: log p_a, of the same shape; NaN where it is not known, and the weight is 1.

    Returns:
        The weights, detached, of the same shape, in float32 (float64 for float64 input).
    """
    return anchor_log_ratio(log_probs, anchor_log_probs).clamp(max=0).exp()


def token_ratio_weight(log_probs: torch.Tensor, anchor_log_probs: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """TNPO's weight of each token (Wang et al. 2025, arXiv 2502.19301): w = 2 p^b / (p^b + p_a^b) = 2 sigmoid(b x).

    Arguments and result as for [`anchored_weight`]; b > 0. It lies between 0 and 2, and is 1 at the anchor.
    """
    return 2 * torch.sigmoid(beta * anchor_log_ratio(log_probs, anchor_log_probs))


def sequence_ratio_weight(
    log_probs: torch.Tensor, anchor_log_probs: torch.Tensor, mask: torch.Tensor, mixture: float | None = None
) -> torch.Tensor:
    """Weight of a whole response by the ratio R = prod p / p_a over its tokens.

        w = l R / (l R + 1 - l)        with the mixture l: BDPO (arXiv 2506.12725), whose policy is l p + (1 - l) p_a
        w = min(1, R)                  without a mixture: TOPR (arXiv 2503.14286)

    Arguments of shape (B, T) as for [`anchored_weight`], `mask` True at the tokens of the response; l is between 0 and
    1. The weights have shape (B, 1).
    """
    log_sequence = (anchor_log_ratio(log_probs, anchor_log_probs) * mask).sum(dim=-1, keepdim=True)
    if mixture is None:
        return log_sequence.clamp(max=0).exp()
    return torch.sigmoid(log_sequence + math.log(mixture) - math.log1p(-mixture))


def gate_weight(
    log_probs: torch.Tensor, mask: torch.Tensor, slope: float = 100.0, threshold: float = 0.05
) -> torch.Tensor:
    """Gate-DPO's weight of a whole response (arXiv 2605.02626): w = sigmoid(a (p_10 - t)).

    p_10 is the tenth percentile of the probabilities of its tokens: `log_probs` (B, T), in nats, where `mask` is True.
    a > 0 is the slope and t, from 0 to 1, the threshold; their defaults are ours. The weights have shape (B, 1).
    """
    low = _exact(log_probs.detach()).exp().masked_fill(~mask, math.nan).nanquantile(0.1, dim=-1, keepdim=True)
    return torch.sigmoid(slope * (low - threshold)).nan_to_num(nan=1.0)


# Forget losses


def weighted_gradient_ascent_loss(log_probs: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Weighted gradient ascent (WGA), per token: L = sg[p_y^b] log p_y (Wang et al. 2025, arXiv 2502.19301, sec. 4).

    With b = 1 its gradient is p_y's own: CE-U's descent weight at M = 1. With b = 0 it is gradient ascent; b >= 0.
    `log_probs`, in nats, and the loss are of one shape.
    """
    log_probs = _above_minus_inf(log_probs)
    return (beta * log_probs.detach()).exp() * log_probs


def satimp_loss(log_probs: torch.Tensor, beta1: float = 5.0, beta2: float = 1.0) -> torch.Tensor:
    """SatImp, per token: L = sg[p_y^b1 (1 - p_y)^b2] log p_y (Yang et al. 2025, arXiv 2505.11953, sec. 5).

    b1 >= 0 spares the tokens that are unlikely already, b2 >= 0 the tokens that the model is sure of. `log_probs`, in
    nats, and the loss are of one shape.
    """
    log_probs = _above_minus_inf(log_probs)
    detached = log_probs.detach()
    # log(1 - p) = log(-expm1(log p)), and 0 ** 0 = 1
    unlikely = (-torch.expm1(detached)).clamp(min=0) ** beta2
    return (beta1 * detached).exp() * unlikely * log_probs


def _above_minus_inf(log_probs: torch.Tensor) -> torch.Tensor:
    """p log p is 0 at p = 0, where a product would be NaN."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def log_ratio(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """log(p / p_ref) of each token, of any shape, in nats; 0 where both models rule the token out."""
    ruled_out = log_probs.isneginf() & ref_log_probs.isneginf()
    return (log_probs - ref_log_probs).masked_fill(ruled_out, 0.0)


def npo_loss(log_ratios: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Negative preference optimization, of sequences or of tokens, with R = p / p_ref under a reference model.

        L = -(2 / b) log sigmoid(-b log R) >= 0        dL/d(log p) = 2 p^b / (p^b + p_ref^b)

    NPO (Zhang et al. 2024, arXiv 2404.05868, eq. 3) takes R of each answer, TNPO (Wang et al. 2025, arXiv 2502.19301)
    of each token. `log_ratios` is log R, in nats: `log_ratio`, for NPO summed over the tokens of each answer. The loss
    has its shape. b > 0; as b -> 0 the gradient becomes gradient ascent's.
    """
    return -2 / beta * F.logsigmoid(-beta * log_ratios)


def simnpo_loss(mean_log_probs: torch.Tensor, beta: float = 4.5, margin: float = 0.0) -> torch.Tensor:
    """Simple NPO (SimNPO; Fan et al. 2024, arXiv 2410.07163, eq. 4), per sequence; it needs no reference model.

        L = -(2 / b) log sigmoid(-(b / |y|) log p(y|x) - g) >= 0

    `mean_log_probs` (B,) is log p(y|x) / |y|, the mean over the tokens of each answer, in nats; b > 0, and g is the
    reward margin. The loss has shape (B,).
    """
    return -2 / beta * F.logsigmoid(-beta * mean_log_probs - margin)


def undial_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, strength: float = 10.0
) -> torch.Tensor:
    """UNDIAL, per token: self-distillation from logits with the label lowered (Dong et al. 2024, arXiv 2402.10052).

        L = -sum_i t_i log p_i,    t = softmax(z_teacher - b e_y)

    `logits` (..., V) come from the model that is trained, `teacher_logits` (..., V) from the model before unlearning.
    `labels` (...) are the tokens to unlearn, each in the vocabulary. b >= 0 is the strength. The loss has shape (...),
    in float32 (float64 for float64 logits).
    """
    teacher = _exact(teacher_logits.detach())
    lowered = torch.full_like(labels, -strength, dtype=teacher.dtype).unsqueeze(-1)
    target = teacher.scatter_add(-1, labels.unsqueeze(-1), lowered).softmax(dim=-1)
    return -(target * _log_softmax(logits)).sum(dim=-1)


def kl_loss(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(p_ref || p), per token: the retain term that holds the model to its reference (TOFU, arXiv 2401.06121, eq. 7).

    `logits` of the model that is trained and `ref_logits` of its reference have shape (..., V). The divergence, in
    nats, has shape (...), in float32 (float64 for float64 logits).
    """
    log_p, log_ref = _log_softmax(logits), _log_softmax(ref_logits.detach())
    return F.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(dim=-1)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Finite also for tokens that a model rules out, whose probability of 0 it is multiplied with."""
    return _exact(logits).log_softmax(dim=-1).clamp(min=-1e4)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


RANGES = {  # of the numbers that a descent rule takes: above or from the first, up to the second
    "ceu_coef": (0, 1, True),
    "ceu_scale": (0, 1e30, False),  # what float32 holds
    "ceu_max_weight": (0, math.inf, False),
    "constant_weight": (0, 1e30, True),
    "tnpo_beta": (0, 1e30, False),
    "bdpo_lambda": (0, 1 - 1e-6, False),
    "gate_alpha": (0, 1e30, False),
    "gate_tau": (0, 1, True),
}


def check_ranges(**numbers: Any) -> None:
    """Raise a ValueError that names the first number of a rule outside its range (NaN included)."""
    for name, value in numbers.items():
        low, high, includes = RANGES[name]
        if not (isinstance(value, int | float) and (low <= value if includes else low < value) and value <= high):
            raise ValueError(f"{name} is {value}; use a number {'from' if includes else 'above'} {low} up to {high:g}.")
