"""The exact CE-U loss straight from hidden states and the weight of the LM head, without the logits.

`fused_linear_unlearning_loss` computes the naive expression

    logits = hidden @ weight.T                                     tokens x vocabulary, never held here
    loss   = where(unlearn_mask, CE(sg[q], p), -log p_y)           CE-U (Yang 2025, arXiv 2503.01224) | cross entropy

with the symbols of `losses.py`. Both gradients have the direction q - e_y, since p - e_y = (1 - p_y)(q - e_y) and
p - q = p_y (e_y - q), so one masked softmax serves both:

    log_odds = z_y - logsumexp_{i != y} z_i
    cross entropy:  -logsigmoid(log_odds)            dL/dz =  sigmoid(-log_odds) (q - e_y)
    CE-U:           H(q) - logsigmoid(-log_odds)     dL/dz = -sigmoid(log_odds)  (q - e_y)

No difference of nearly equal numbers occurs, so nothing is lost as p_y -> 0 or p_y -> 1. The loss is a scalar, so the
gradients are formed in the forward pass, chunk by chunk of tokens: three matrix products, nothing recomputed.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional as F

# Logits held at a time: each chunk reads the whole weight, so few chunks are fast and small ones lean
_LOGITS_PER_CHUNK = {"cpu": 2**25, "cuda": 2**27}
_LOGITS_IN_CACHE = 2**20
_HALF = (torch.float16, torch.bfloat16)


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
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Cross entropy where the mask is False and CE-U where it is True, exact at any label probability.

    The value equals `losses.cross_entropy_unlearning_loss` (CE-U: Yang 2025, arXiv 2503.01224) and
    `torch.nn.functional.cross_entropy` on `logits`, where

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    A chunk of the logits is held at a time, besides one float32 gradient for each input that requires one. Under
    autocast the matrix products run in its dtype, else in that of `hidden`; the softmax, the loss and the sum of the
    weight's gradient over the chunks are in float32 (float64 for float64 input).

    Under FSDP2 the weight may be a sharded DTensor: it is gathered, and its gradient averaged over the ranks. Under
    ZeRO-3 the caller gathers it, with `trl.trainer.utils.maybe_gather_lm_head_ctx` around this call and inside the
    model's forward; the backward pass does not need the weight.

    Args:
        hidden: Floating tensor of shape (..., H): the input of the LM head.
        weight: Floating tensor of shape (V, H) with V >= 2.
        labels: Integer tensor of shape (...). Labels are not shifted.
        unlearn_mask: Bool tensor of shape (...): True where the label is to be unlearned. Default: everywhere.
        bias: Floating tensor of shape (V,).
        ignore_index: Label of the positions that contribute nothing; they cost nothing either.
        reduction: `"mean"` over the positions that are not ignored, or `"sum"`.
        softcap, logit_scale: As in `logits` above; `lm_head_options(model)` reads them from a model.
        chunk_size: Tokens per chunk. Default: as many as make 2**25 logits (2**27 on a GPU), 128 MiB in float32.

    Returns:
        The loss in nats, a scalar in float32 (float64 for float64 input). Without any position that counts it is a
        differentiable zero. Its backward pass can run once.

    Raises:
        ValueError: for an unknown reduction, an option out of range, shapes that do not match, a mask that is not bool,
            or a label outside the vocabulary.
        RuntimeError: on a second backward pass through the same loss.
    """
    _check(hidden, weight, labels, unlearn_mask, bias, reduction, softcap, chunk_size)
    kept = labels != ignore_index
    _check_labels(labels, kept, weight.shape[0], ignore_index)
    unlearned = kept if unlearn_mask is None else kept & unlearn_mask
    # Unlearned tokens first: only their rows need the entropy of q, and the count tells where they end
    order = [unlearned.flatten().nonzero(), (kept & ~unlearned).flatten().nonzero()]
    rows = torch.cat(order).squeeze(-1)
    inputs = (hidden.reshape(-1, hidden.shape[-1])[rows], _gather(weight), None if bias is None else _gather(bias))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    form = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    if chunk_size is None:
        chunk_size = max(1, _LOGITS_PER_CHUNK.get(device, _LOGITS_PER_CHUNK["cpu"]) // weight.shape[0])
    with torch.autocast(device, enabled=False):
        total = _FusedLoss.apply(
            *inputs, labels.flatten()[rows], len(order[0]), dtype, form, softcap, logit_scale, chunk_size
        )
        return total if reduction == "sum" else total / max(len(rows), 1)


class _FusedLoss(torch.autograd.Function):
    """The sum of the losses; `backward` only scales the gradients that `forward` has formed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        unlearned: int,
        dtype: torch.dtype,
        form: list[bool],
        softcap: float | None,
        logit_scale: float,
        chunk_size: int,
    ) -> torch.Tensor:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        exact = torch.float32 if dtype in _HALF else dtype
        losses = hidden.new_zeros(len(hidden), dtype=exact)
        gradients = [
            torch.zeros_like(tensor, dtype=exact) if wanted and tensor is not None else None
            for tensor, wanted in zip((hidden, weight, bias), form, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = gradients
        logits = hidden.new_empty((min(chunk_size, len(hidden)), len(weight)), dtype=exact)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            h, index = hidden[chunk], labels[chunk].unsqueeze(-1)
            z = logits[: len(h)]
            _product(h, weight.t(), z)
            if bias is not None:
                z += bias
            slope = _transform(z, logit_scale, softcap, keep_slope=any(form))
            losses[chunk], coefficient = _softmax_of_others(z, index, max(0, min(unlearned - start, len(h))))
            if not any(form):
                continue
            if slope is not None:
                z *= slope
            coefficient *= logit_scale
            if grad_bias is not None:
                grad_bias.addmv_(z.t(), coefficient)
            if grad_weight is not None:
                _add_product(grad_weight, z.t(), h * coefficient.unsqueeze(-1), dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden[chunk], z, weight, dtype)
                grad_hidden[chunk] *= coefficient.unsqueeze(-1)
        ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of fused_linear_unlearning_loss are kept for one backward pass, and this is a second "
                "one; compute the loss again, or add up what is to be differentiated before calling backward."
            )
        # Handed over, not copied: the gradient of the weight is the largest tensor here
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grads[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, *(None,) * 7)


def _softmax_of_others(z: torch.Tensor, index: torch.Tensor, unlearned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite logits (n, V) by q - e_y; return the losses (n,) and the coefficients (n,) of the gradient.

    The first `unlearned` rows are CE-U, the others cross entropy; `index` (n, 1) holds the labels.
    """
    label_logit = z.gather(1, index)
    z.scatter_(1, index, float("-inf"))
    softmax_, block = _softmax_for(z)
    parts = [softmax_(part, n * block < unlearned) for n, part in enumerate(z.split(block))]
    log_normalizer, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    z.scatter_(1, index, -1.0)
    log_odds = label_logit.squeeze(1) - log_normalizer
    sign = torch.ones_like(log_odds)
    sign[:unlearned] = -1.0
    losses = -F.logsigmoid(sign * log_odds)
    losses[:unlearned] += entropy[:unlearned]
    return losses, sign * torch.sigmoid(-sign * log_odds)


def _softmax_(
    z: torch.Tensor, with_entropy: bool, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite logits (n, V) by their softmax; return its log-normalizer (n,) and, if wanted, its entropy (n,)."""
    largest = z.amax(dim=1, keepdim=True)
    z -= largest
    shift = torch.zeros_like(largest)
    if with_entropy:
        # exp is 0 from here on, in float64 too, and 0 * -1e4 is 0 where 0 * -inf would be NaN
        z.clamp_(min=-1e4)
        unnormalized = torch.exp(z, out=None if scratch is None else scratch[: len(z)])
        shift = z.mul_(unnormalized).sum(dim=1, keepdim=True)
        z.copy_(unnormalized)
    else:
        z.exp_()
    total = z.sum(dim=1, keepdim=True)
    z /= total
    # H = log S - sum_i p_i (z_i - max) with S = sum_i exp(z_i - max): two terms that are never negative
    return (largest + total.log()).squeeze(1), (total.log() - shift / total).squeeze(1)


_Softmax = Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]


def _softmax_for(z: torch.Tensor) -> tuple[_Softmax, int]:
    """The softmax to use for these logits, and the rows to give it at a time.

    Compiled on a GPU, where its passes become two. A CPU takes rows that fit its cache through the same passes, which
    measures as fast as the compiled form without the seconds that compiling takes.
    """
    if z.is_cuda:
        return _compiled_softmax() if importlib.util.find_spec("triton") else _softmax_, max(1, len(z))
    block = max(1, _LOGITS_IN_CACHE // z.shape[1])
    # One scratch for all blocks: one for each would leave holes in the heap, which grows by the size of the chunk
    return functools.partial(_softmax_, scratch=torch.empty_like(z[:block])), block


@functools.cache
def _compiled_softmax() -> _Softmax:
    return torch.compile(_softmax_, dynamic=True, fullgraph=True)


def _transform(z: torch.Tensor, logit_scale: float, softcap: float | None, keep_slope: bool) -> torch.Tensor | None:
    """Scale and cap the projection in place; return the slope of the cap, if there is one and it is needed."""
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = 1.0 - z * z if keep_slope else None
    z *= softcap
    return slope


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """`out = a @ b`: a float32 `out` from half-precision factors is not rounded to half where the device can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    """`total += a @ b` for a float32 `total`, which is not rounded to half precision on the way.

    A GPU takes factors in `dtype`. A CPU takes them in float32, so it casts a `b` of half precision block by block.
    """
    if dtype in _HALF and total.is_cuda:
        torch.addmm(total, a.to(dtype), b.to(dtype), out_dtype=total.dtype, out=total)
    elif b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        for left, right in zip(a.split(4096, dim=1), b.split(4096), strict=True):
            total.addmm_(left, right.to(total.dtype))


def _gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that FSDP2 has sharded; its gradient is the mean over the ranks, as FSDP2 takes it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


def lm_head_options(model: Any) -> dict[str, Any]:
    """The `softcap` and `logit_scale` of a model's LM head, read from its config as TRL 1.16's fused head does.

    Args:
        model: A `transformers` model, or one that PEFT wraps.

    Returns:
        The keyword arguments of the same names for `fused_linear_unlearning_loss`.
    """
    config = model.config.get_text_config()
    scales = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((value for value in scales if value is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor  # which multiplies by it
    return {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1.0 if scale is None else scale,
    }


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    unlearn_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    reduction: str,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    """Raise a ValueError for an argument that does not fit, without reading a tensor's values."""
    if reduction == "none":
        raise ValueError(
            "reduction is 'none', and the gradient is formed with the loss, which needs a scalar; "
            "use 'mean' or 'sum', or losses.cross_entropy_unlearning_loss on logits."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; use 'mean' or 'sum'.")
    if hidden.dim() == 0 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and hidden {tuple(hidden.shape)}; "
            "give hidden of shape (*labels.shape, hidden size)."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and hidden {tuple(hidden.shape)}; "
            f"give weight of shape (vocabulary, {hidden.shape[-1]}), gathered if it is sharded."
        )
    if weight.shape[0] < 2:
        raise ValueError(
            f"the vocabulary has {weight.shape[0]} entry; CE-U needs at least 2, one of them not the label."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give one of shape ({weight.shape[0]},).")
    if unlearn_mask is not None and unlearn_mask.dtype != torch.bool:
        raise ValueError(f"unlearn_mask has dtype {unlearn_mask.dtype}; give a bool tensor, True where to unlearn.")
    if unlearn_mask is not None and unlearn_mask.shape != labels.shape:
        raise ValueError(
            f"unlearn_mask has shape {tuple(unlearn_mask.shape)} and labels {tuple(labels.shape)}; give the same shape."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; use a number above 0, or None for no cap.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token.")


def _check_labels(labels: torch.Tensor, kept: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise a ValueError for the first kept label outside the vocabulary."""
    outside = kept & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} is outside the vocabulary of {vocabulary} entries; "
            f"use 0 to {vocabulary - 1}, or ignore_index ({ignore_index}) for positions to leave out."
        )
