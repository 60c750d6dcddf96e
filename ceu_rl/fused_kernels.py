"""The softmax of `fused.py` as one Triton program a row: one pass over a row of logits, and one that overwrites it.

With the symbols of `fused.py`, and z_y taken from hidden state and weight in float32, apart from the logits:

    log_odds = z_y - logsumexp_{i != y} z_i,  H(q)          maximum, sum and sum of (z - max) e^(z - max), online
    z_i <- scale * c * (q_i - [i = y])                      c = -sigmoid(log_odds) where y is unlearned, else
                                                            sigmoid(-log_odds)

The logits may be bfloat16. What they round away is at most |z_i| / 512 of each: the logsumexp of the others is off by a
mean of that, and so is log c. Nothing else is lost as p_y -> 0 or p_y -> 1, because z_y is not rounded and p - q is not
formed. Needs a CUDA device, or `TRITON_INTERPRET=1` when this module is imported.
"""

import torch
import triton
from triton import language as tl


@triton.jit
def _capped(z, logit_scale, softcap, has_cap: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logit of a projection, and its slope."""
    z *= logit_scale
    if has_cap:
        # tanh and its slope, which the interpreter has not
        up, down = 1.0 / (1.0 + tl.exp(-2.0 * z / softcap)), 1.0 / (1.0 + tl.exp(2.0 * z / softcap))
        return softcap * (up - down), 4.0 * up * down
    else:
        return z, 1.0


# fmt: off
@triton.jit(do_not_specialize=["unlearned"])
def _softmax_of_others(  # type: ignore[no-untyped-def]
    logits, hidden, weight, bias, labels, log_odds, entropy, scale, unlearned, vocabulary, width,
    logits_stride, hidden_stride, weight_stride, logit_scale, softcap,
    has_bias: tl.constexpr, has_cap: tl.constexpr, with_gradient: tl.constexpr, block: tl.constexpr,
):
# fmt: on
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    places = tl.arange(0, block)

    dots = tl.full([block], 0.0, tl.float32)
    for start in range(0, width, block):
        inside = start + places < width
        h = tl.load(hidden + row * hidden_stride + start + places, mask=inside, other=0.0)
        w = tl.load(weight + label * weight_stride + start + places, mask=inside, other=0.0)
        dots += h.to(tl.float32) * w.to(tl.float32)
    own = tl.sum(dots, 0)
    if has_bias:
        own += tl.load(bias + label).to(tl.float32)
    own, own_slope = _capped(own, logit_scale, softcap, has_cap)

    largest, total, shift = -3e38, 0.0, 0.0  # not -inf, whose difference from itself is NaN
    for start in range(0, vocabulary, block):
        # A mask that many neighbours share, rows being padded: they are loaded at once
        z = tl.load(logits + row * logits_stride + start + places, mask=start + places < logits_stride, other=0.0)
        z = z.to(tl.float32)
        inside = (start + places < vocabulary) & (start + places != label)
        if has_bias:
            z += tl.load(bias + start + places, mask=inside, other=0.0).to(tl.float32)
        z, _ = _capped(z, logit_scale, softcap, has_cap)
        z = tl.where(inside, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, 0))
        ratio = tl.exp(largest - larger)
        e = tl.exp(z - larger)
        shift = (shift + total * (largest - larger)) * ratio + tl.sum(tl.where(e > 0.0, (z - larger) * e, 0.0), 0)
        total = total * ratio + tl.sum(e, 0)
        largest = larger
    log_normalizer = largest + tl.log(total)
    odds = own - log_normalizer
    tl.store(log_odds + row, odds)
    tl.store(entropy + row, tl.log(total) - shift / total)

    if with_gradient:
        coefficient = tl.where(row < unlearned, -1.0 / (1.0 + tl.exp(-odds)), 1.0 / (1.0 + tl.exp(odds)))
        coefficient *= logit_scale * tl.load(scale)
        last = (vocabulary - 1) // block * block
        for back in range(0, vocabulary, block):
            start = last - back  # from the end: what was read last is still in the cache
            inside = start + places < logits_stride
            z = tl.load(logits + row * logits_stride + start + places, mask=inside, other=0.0).to(tl.float32)
            if has_bias:
                z += tl.load(bias + start + places, mask=start + places < vocabulary, other=0.0).to(tl.float32)
            z, slope = _capped(z, logit_scale, softcap, has_cap)
            others = start + places != label
            q = tl.where(others, tl.exp(tl.where(others, z - log_normalizer, 0.0)) * slope, -own_slope)
            gradient = (coefficient * q).to(logits.dtype.element_ty)
            tl.store(logits + row * logits_stride + start + places, gradient, mask=inside)


@triton.jit
def _multiply(values, factor, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor)
    if by != 1.0:
        places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = places < size
        product = tl.load(values + places, mask=inside).to(tl.float32) * by
        tl.store(values + places, product.to(values.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_multiply, triton.JITFunction)


def softmax_of_others_(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    unlearned: int,
    scale: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite projections (n, V) by the gradient for them, if it is wanted; return log-odds and entropies, (n,).

    `logits` is `hidden @ weight.T`, before bias, scale and cap, of (n, H), (V, H) and (V,); its rows may be padded. The
    first `unlearned` rows are CE-U, the others cross entropy. `scale`, a float32 scalar on the device, multiplies the
    gradient.
    """
    log_odds, entropy = torch.empty(2, len(labels), dtype=torch.float32, device=labels.device)
    block, num_warps = (4096, 16) if logits.shape[1] > 2048 else (512, 2)  # 16 bytes of bfloat16 a thread
    with torch.cuda.device_of(logits):  # where Triton launches
        _softmax_of_others[(len(logits),)](
            logits, hidden, weight, logits if bias is None else bias, labels, log_odds, entropy, scale, unlearned,
            logits.shape[1], hidden.shape[1], logits.stride(0), hidden.stride(0), weight.stride(0),
            float(logit_scale), float(softcap or 1.0), bias is not None, softcap is not None, with_gradient,
            block=block, num_warps=num_warps,
        )  # fmt: skip
    return log_odds, entropy


def multiply_(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`values *= factor`, of a float32 scalar on the device; it reads nothing else where the factor is 1."""
    with torch.cuda.device_of(values):
        _multiply[(triton.cdiv(values.numel(), 4096),)](values, factor, values.numel(), block=4096, num_warps=8)
    return values
