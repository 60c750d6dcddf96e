"""The exact CE-U loss straight from hidden states and the LM head, without the logits of all tokens at once.

Computes what

    logits = logit_scale * (hidden @ weight.T + bias)          (N, V); softcap * tanh(logits / softcap) with a softcap
    loss = where(unlearn_mask, cross_entropy_unlearning_loss(logits, labels), cross_entropy(logits, labels)).sum()

computes, in chunks of tokens. With z the logits of one token, y its label, q = softmax(z with z_y = -inf) and
a = z_y - logsumexp_{i != y} z_i the log-odds of the label:

    cross entropy    L = -log sigmoid(a)            dL/dz = sigmoid(-a) (q - e_y)
    CE-U             L = H(sg[q]) - log sigmoid(-a)    dL/dz = -sigmoid(a) (q - e_y)

So both are one masked softmax and a factor for each token, exact at any label probability (arXiv 2503.01224).
As the loss is a scalar, its gradients are known up to one factor when it is computed: they are formed in the forward
pass, one chunk at a time, with three matrix products and nothing to recompute.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

CHUNK_SIZE = 128


def fused_linear_unlearning_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    unlearn_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Cross entropy where `unlearn_mask` is False, CE-U where it is True, without the (N, V) logits.

    Peak memory grows with chunk_size * V, and where the weight is trained with its gradient (float32), not with N * V.

    Args:
        hidden: (..., H), the last hidden states.
        weight: (V, H), of the LM head. A sharded DTensor is gathered; under ZeRO-3 the caller gathers it, inside the
            model's forward (`trl.trainer.utils.maybe_gather_lm_head_ctx`).
        labels: Integers of shape (...): the token to learn or unlearn at each position. Labels are not shifted.
        unlearn_mask: Booleans of shape (...); by default every position is unlearned.
        bias: (V,), of the LM head.
        ignore_index: Label of the positions that contribute nothing.
        reduction: `"mean"` over the positions that are not ignored, or `"sum"`.
        softcap, logit_scale: Of the model's logits; see `lm_head_options`.
        chunk_size: Tokens at a time.

    Returns:
        The loss in nats, a scalar in float32 (float64 for float64 input). Without any position it is a differentiable
        zero. Its gradients are kept once: a second backward pass raises a RuntimeError.

    Raises:
        ValueError: for an unknown reduction, shapes that do not match, or a label outside the vocabulary.
    """
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
    mask = torch.ones_like(labels, dtype=torch.bool) if unlearn_mask is None else unlearn_mask
    _check(hidden, weight, labels, mask, bias, ignore_index, reduction, chunk_size)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    kept = labels != ignore_index
    rows = hidden[kept]
    total = _FusedLoss.apply(
        rows, weight.to(rows.dtype), bias, labels[kept], mask[kept], softcap, logit_scale, chunk_size
    )
    return total / kept.sum().clamp(min=1) if reduction == "mean" else total


def lm_head_options(model: Any) -> dict[str, Any]:
    """`softcap` and `logit_scale` of a model's logits, read from its config as TRL's fused head reads them."""
    config = model.config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1.0 if scale is None else scale,
    }


class _FusedLoss(torch.autograd.Function):
    """The summed loss of rows (N, H); its gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        mask: torch.Tensor,
        softcap: float | None,
        logit_scale: float,
        chunk_size: int,
    ) -> torch.Tensor:
        high = torch.promote_types(rows.dtype, torch.float32)
        wanted = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=high) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=high) if bias is not None and wanted[2] else None
        total = rows.new_zeros((), dtype=high)
        for start in range(0, len(rows), chunk_size):
            chunk = slice(start, start + chunk_size)
            loss, grad = _chunk_loss(
                F.linear(rows[chunk], weight, bias), labels[chunk], mask[chunk], softcap, logit_scale, any(wanted)
            )
            total += loss
            if grad is None:
                continue
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(rows.dtype)
            if grad_rows is not None:
                torch.mm(grad, weight, out=grad_rows[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, rows[chunk])
        ctx.dtypes = rows.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.gradients = [grad_rows, grad_weight, grad_bias]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_linear_unlearning_loss keeps its gradients for 1 backward pass, and this is the second; compute "
                "the loss again, or use losses.cross_entropy_unlearning_loss."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if one is None else one.mul_(grads[0]) for one in gradients]
        cast = [None if one is None else one.to(dtype) for one, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return (*cast, None, None, None, None, None)


def _chunk_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of one chunk and its gradient for the raw logits (n, V), which are used up."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits**2
        logits *= softcap
    index = labels.unsqueeze(-1)
    label_logits = logits.gather(-1, index)
    logits.scatter_(-1, index, float("-inf"))
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    log_odds = (label_logits - normalizer).squeeze(-1)
    q = logits.sub_(normalizer).exp_()
    entropy = torch.special.entr(q).sum(dim=-1)
    loss = torch.where(mask, entropy - F.logsigmoid(-log_odds), -F.logsigmoid(log_odds)).sum()
    if not with_gradient:
        return loss, None
    factor = torch.where(mask, -torch.sigmoid(log_odds), torch.sigmoid(-log_odds)).unsqueeze(-1)
    grad = q.mul_(factor).scatter_(-1, index, -factor)
    if slope is not None:
        grad *= slope
    if logit_scale != 1.0:
        grad *= logit_scale
    return loss, grad


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in the precision of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int,
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction is {reduction!r}; use 'mean' or 'sum', since the gradients of a scalar are formed with it."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token.")
    if hidden.dim() == 0 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and hidden {tuple(hidden.shape)}; "
            "give hidden of shape (*labels.shape, hidden size)."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and hidden {tuple(hidden.shape)}; "
            "give a weight of shape (vocabulary, hidden size)."
        )
    vocabulary = weight.shape[0]
    if vocabulary < 2:
        raise ValueError(f"the vocabulary has {vocabulary} entry; CE-U needs at least 2, one of them not the label.")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give ({vocabulary},), one for each row of the weight.")
    if mask.dtype != torch.bool or mask.shape != labels.shape:
        raise ValueError(
            f"unlearn_mask is {mask.dtype} of shape {tuple(mask.shape)}; give booleans of shape {tuple(labels.shape)}."
        )
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} is outside the vocabulary of {vocabulary} entries; "
            f"use 0 to {vocabulary - 1}, or ignore_index ({ignore_index}) for positions to leave out."
        )
