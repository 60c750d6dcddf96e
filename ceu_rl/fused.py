"""The exact CE-U loss straight from hidden states and the weight of the LM head, without the logits.

`fused_linear_unlearning_loss` computes the naive expression

    logits = hidden @ weight.T                                     tokens x vocabulary, never held here
    loss   = where(unlearn_mask, CE(sg[q], p), -log p_y)           CE-U (Yang 2025, arXiv 2503.01224) | cross entropy

The symbols are defined in `losses.py`. Both gradients point along q - e_y, so one masked softmax serves both:

    p - e_y = (1 - p_y)(q - e_y)                     p - q = -p_y (q - e_y)
    log_odds = z_y - logsumexp_{i != y} z_i
    cross entropy:  -logsigmoid(log_odds)            dL/dz =  sigmoid(-log_odds) (q - e_y)
    CE-U:           H(q) - logsigmoid(-log_odds)     dL/dz = -sigmoid(log_odds)  (q - e_y)

Nothing is lost as p_y -> 0 or p_y -> 1, since no two nearly equal numbers are subtracted. The loss is a scalar, so the
forward pass forms the gradients, chunk by chunk of tokens: three matrix products, and nothing is computed again.

The softmax comes in two ways. The exact one is plain torch with logits in float32. The one for a GPU with Triton holds
them in bfloat16 or float32 and reads them twice, in the kernel of `fused_kernels.py`.
"""

import importlib.util
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional as F

# Bytes of logits held at a time: each chunk reads the whole weight, so few chunks are fast and small ones lean
_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29, "kernels": 2**32}
_LOGITS_IN_CACHE = 2**20


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
    num_items_in_batch: torch.Tensor | float | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Cross entropy where the mask is False and CE-U where it is True.

    The value equals `losses.cross_entropy_unlearning_loss` (CE-U: Yang 2025, arXiv 2503.01224) and
    `torch.nn.functional.cross_entropy` on `logits`, where

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    A chunk of the logits is held at a time, besides one gradient for each input that requires one. Under autocast the
    matrix products run in its dtype, else in the dtype of `hidden`. The loss, the softmax and sums over chunks are in
    float32 (float64 for float64 input), exact at any label probability. On a GPU with Triton the logits of other tokens
    than the label are rounded to bfloat16 where `hidden` is; `exact=True` keeps them in float32.

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
        chunk_size: Tokens per chunk. Default: as many as make 128 MiB of logits, 512 MiB on a GPU, or 4 GiB there with
            Triton.
        num_items_in_batch: What `"mean"` divides by instead, a number or a scalar tensor that is not read on the host.
            Backward then has nothing to do where the gradient of the loss is 1.
        exact: Whether to keep the logits in float32 on a GPU with Triton too.

    Returns:
        The loss in nats, a scalar in float32 (float64 for float64 input). Without any position that counts it is a
        differentiable zero. Its backward pass can run once.

    Raises:
        ValueError: for an unknown reduction, an option out of range, shapes that do not match, a mask that is not bool,
            or a label outside the vocabulary.
        RuntimeError: on a second backward pass through the same loss.
    """
    _check_shapes(hidden, weight, labels, unlearn_mask, bias)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction is {reduction!r}; use 'mean' or 'sum', or losses.cross_entropy_unlearning_loss on logits for "
            "the loss of each token."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; use a number above 0, or None for no cap.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; use at least 1 token.")
    kept = labels != ignore_index
    unlearned = kept if unlearn_mask is None else kept & unlearn_mask
    outside = kept & ((labels < 0) | (labels >= weight.shape[0]))
    # The one read on the host
    many, first, wrong = torch.stack([kept.sum(), unlearned.sum(), outside.sum()]).tolist()
    if wrong:
        raise ValueError(
            f"label {labels[outside][0].item()} is outside the vocabulary of {weight.shape[0]} entries; "
            f"use 0 to {weight.shape[0] - 1}, or ignore_index ({ignore_index}) for positions to leave out."
        )
    # Unlearned tokens first: only their rows need the entropy of q, and the count tells where they end
    rows = (2 - kept.int() - unlearned.int()).flatten().argsort(stable=True)[:many]
    inputs = (hidden.reshape(-1, hidden.shape[-1])[rows], _gather(weight), None if bias is None else _gather(bias))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    kernels = None if exact else _kernels(device, dtype)
    if chunk_size is None:
        size = dtype.itemsize if kernels else max(4, dtype.itemsize)
        budget = _CHUNK_BYTES["kernels" if kernels else device if device in _CHUNK_BYTES else "cpu"]
        chunk_size = _equal_chunks(many, budget // (size * weight.shape[0]))
    divisor = 1.0 if reduction == "sum" else max(many, 1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(hidden.device, non_blocking=True)
    one = torch.ones((), device=hidden.device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scale = one / divisor
    form = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    given = (labels.flatten()[rows], first, scale, dtype, form, softcap, logit_scale, chunk_size, kernels)
    with torch.autocast(device, enabled=False):
        return _FusedLoss.apply(*inputs, *given)


def _kernels(device: str, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels, where they can run: not float16, whose range is too small for the gradient of a logit."""
    if dtype not in (torch.bfloat16, torch.float32) or not importlib.util.find_spec("triton"):
        return None
    if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return None
    from . import fused_kernels

    return fused_kernels if device == "cuda" or fused_kernels.INTERPRETED else None


def _equal_chunks(rows: int, limit: int) -> int:
    """The length of equal chunks of at most `limit` rows, a multiple of 256 where the limit is above."""
    step = 256 if limit >= 256 else 1
    limit = max(1, limit // step * step)
    chunks = max(1, math.ceil(rows / limit))
    return max(1, math.ceil(rows / chunks / step) * step)


class _FusedLoss(torch.autograd.Function):
    """The sum of the losses times a scale; `backward` only scales the gradients that `forward` has formed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        unlearned: int, scale: torch.Tensor, dtype: torch.dtype, form: list[bool], softcap: float | None,
        logit_scale: float, chunk_size: int, kernels: ModuleType | None,
    ) -> torch.Tensor:  # fmt: skip
        """The labels (the first `unlearned` are CE-U's), the dtype of the products, and which gradients to form."""
        rows, exact = len(hidden), torch.promote_types(dtype, torch.float32)
        ctx.kernels, ctx.dtypes = kernels, [None if each is None else each.dtype for each in (hidden, weight, bias)]
        hidden, weight = hidden.to(dtype), weight.to(dtype).contiguous()  # the kernel reads its rows
        new = torch.empty if rows else torch.zeros  # the first product overwrites what is there
        # A sum over chunks, or what the exact way has yet to scale, is in float32
        once = (kernels, kernels and chunk_size >= rows, False)
        kinds = [each if whole and each == dtype else exact for each, whole in zip(ctx.dtypes, once, strict=True)]
        ctx.gradients = grad_hidden, grad_weight, grad_bias = [
            new(tensor.shape, dtype=kind, device=hidden.device) if wanted and tensor is not None else None
            for tensor, kind, wanted in zip((hidden, weight, bias), kinds, form, strict=True)
        ]
        losses = hidden.new_empty(rows, dtype=exact)
        # The products of a GPU read aligned rows; some of a CPU compute with what lies between them
        shape = (min(chunk_size, rows), math.ceil(len(weight) / 64) * 64 if hidden.is_cuda else len(weight))
        logits = hidden.new_empty(shape, dtype=dtype if kernels else exact)[:, : len(weight)]
        softmax_of_others_ = kernels.softmax_of_others_ if kernels else _softmax_of_others_
        for start in range(0, rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            h, z = hidden[chunk], logits[: min(chunk_size, rows - start)]
            here = max(0, min(unlearned - start, len(h)))
            _product(h, weight.t(), z)
            given = (scale, logit_scale, softcap, any(form))
            log_odds, entropy = softmax_of_others_(z, h, weight, bias, labels[chunk], here, *given)
            losses[chunk] = -F.logsigmoid(_signs(log_odds, here) * log_odds)
            losses[start : start + here] += entropy[:here]
            if grad_hidden is not None:
                _product(z, weight, grad_hidden[chunk])
            if grad_weight is not None:
                _product(z.t(), h, grad_weight, add=start > 0)
            if grad_bias is not None:
                sums = z.sum(dim=0, dtype=exact)
                grad_bias.copy_(grad_bias + sums if start else sums)
        return losses.sum() * scale

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
        multiply = ctx.kernels.multiply_ if ctx.kernels else torch.Tensor.mul_
        scaled = [
            None if gradient is None else multiply(gradient, grads[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, *[None] * 9)


def _signs(log_odds: torch.Tensor, unlearned: int) -> torch.Tensor:
    """-1 for the first `unlearned` rows, which are CE-U, and 1 for the others, cross entropy."""
    sign = torch.ones_like(log_odds)
    sign[:unlearned] = -1.0
    return sign


def _softmax_of_others_(
    z: torch.Tensor, hidden: Any, weight: Any, bias: torch.Tensor | None, labels: torch.Tensor, unlearned: int,
    scale: torch.Tensor, logit_scale: float, softcap: float | None, with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What `fused_kernels.softmax_of_others_` does, in plain torch and the dtype of `z`."""
    if bias is not None:
        z += bias
    slope = _transform(z, logit_scale, softcap, with_gradient)
    index = labels.unsqueeze(-1)
    log_odds, entropy = z.gather(1, index).squeeze(1), z.new_zeros(len(z))
    z.scatter_(1, index, float("-inf"))
    sign = _signs(log_odds, unlearned)
    # A CPU takes rows that fit its cache through all passes; one scratch, or each would leave a hole in the heap
    block = max(1, len(z) if z.is_cuda else _LOGITS_IN_CACHE // z.shape[1])
    scratch = torch.empty_like(z[:block])
    for start in range(0, len(z), block):
        rows = slice(start, start + block)
        part = z[rows]
        largest = part.amax(dim=1, keepdim=True)
        part -= largest
        shift: torch.Tensor | float = 0.0
        if start < unlearned:
            # exp is 0 from here on, in float64 too, and 0 * -1e4 is 0 where 0 * -inf would be NaN
            part.clamp_(min=-1e4)
            unnormalized = torch.exp(part, out=scratch[: len(part)])
            shift = part.mul_(unnormalized).sum(dim=1)
            part.copy_(unnormalized)
        else:
            part.exp_()
        total = part.sum(dim=1)
        log_odds[rows] -= largest.squeeze(1) + total.log()
        # H = log S - sum_i p_i (z_i - max) with S = sum_i exp(z_i - max): two terms that are never negative
        entropy[rows] = total.log() - shift / total
        if with_gradient:
            coefficient = sign[rows] * torch.sigmoid(-sign[rows] * log_odds[rows]) * logit_scale * scale
            part *= (coefficient / total).unsqueeze(1)
            part.scatter_(1, index[rows], -coefficient.unsqueeze(1))
    if slope is not None:
        z *= slope
    return log_odds, entropy


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


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`: what reaches a float32 `out` is not rounded to half where the device can."""
    if out.is_cuda and b.dtype == torch.bfloat16:  # float16 has too small a range for the gradient of a logit
        a = a.to(b.dtype)
    if out.is_cuda and a.dtype == b.dtype != out.dtype:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.dtype == b.dtype and not add:
        out.copy_(a @ b) if out.dtype != a.dtype else torch.mm(a, b, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


def _gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that FSDP2 has sharded; its gradient is the mean over the ranks, as FSDP2 takes it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


def lm_head_options(model: Any) -> dict[str, Any]:
    """The `softcap` and `logit_scale` of a model's LM head for the loss above, from its config as TRL 1.16 reads it."""
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    scales = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    name, scale = next(iter(scales.items()), ("logit_scale", 1.0))
    if name == "logits_scaling" and config.model_type != "hyperclovax":  # which multiplies by it
        scale = 1 / scale
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale}


def _check_shapes(hidden: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raise a ValueError for a tensor that does not fit the others (labels, mask and bias), without reading values."""
    h, w = tuple(hidden.shape), tuple(weight.shape)
    shapes = {"weight": (*w[:1], *h[-1:]), "labels": h[:-1], "unlearn_mask": h[:-1], "bias": w[:1]}
    for (name, shape), tensor in zip(shapes.items(), (weight, *others), strict=True):
        if tensor is not None and (tuple(tensor.shape) != shape or not h):
            found = tuple(tensor.shape)
            raise ValueError(f"{name}: shape {found} does not fit hidden {h} and weight {w}; give {shape}.")
        if name == "unlearn_mask" and tensor is not None and tensor.dtype != torch.bool:
            raise ValueError(f"unlearn_mask has dtype {tensor.dtype}; give a bool tensor, True where to unlearn.")
    if w[0] < 2:
        raise ValueError(f"the vocabulary has {w[0]} entry; CE-U needs at least 2, one of them not the label.")
