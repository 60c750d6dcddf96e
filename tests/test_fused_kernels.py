"""The fused loss through its Triton kernels: on a CUDA device, or in Triton's interpreter, in a process of its own."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ceu_rl import fused
from ceu_rl.fused import fused_linear_unlearning_loss

from . import test_fused
from .test_fused import DEVICE, batch, error, on_logits

BOTH_WAYS = "at_any_probability or losses_on_logits or forbids or nothing_to_learn or extreme_logits"  # of test_fused
kernels = pytest.mark.skipif(
    not fused._kernels(DEVICE, torch.bfloat16), reason="needs Triton, and a CUDA device or its interpreter"
)


def test_in_the_interpreter():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("runs in it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    for file, which in ((__file__, "not compile"), (test_fused.__file__, BOTH_WAYS)):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which, file]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu(capability, dtype, options):
    """Down to its machine code, which needs no device."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ceu_rl import fused_kernels

    if fused_kernels.INTERPRETED:
        pytest.skip("runs in the interpreter")
    given = {name: "i32" for name in ("unlearned", "vocabulary", "width")}
    given |= {f"{name}_stride": "i32" for name in ("logits", "hidden", "weight")}
    given |= {"logit_scale": "fp32", "softcap": "fp32", "labels": "*i64"}
    given |= {name: "*fp32" for name in ("log_odds", "entropy", "scale")}
    given |= {name: f"*{dtype}" for name in ("logits", "hidden", "weight", "bias")}
    flags = {"has_bias": options, "has_cap": options, "with_gradient": True, "block": 4096}
    source = fused_kernels._softmax_of_others
    signature = {name: given.get(name, "constexpr") for name in source.arg_names}
    source, target = ASTSource(source, signature, constexprs=flags), GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target, {"num_warps": 16})
    assert built.asm["cubin"]
    values = {"values": f"*{dtype}", "factor": "*fp32", "size": "i64", "block": "constexpr"}
    source = ASTSource(fused_kernels._multiply, values, constexprs={"block": 4096})
    assert triton.compile(source, target).asm["cubin"]


def with_gradients(function, inputs, labels, mask, upstream=1.0, **options):
    """The value and the gradients of hidden, weight and, if it is given, bias."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*inputs[:2], labels, mask, *inputs[2:], **options)
    return [value, *torch.autograd.grad(value, inputs, torch.tensor(upstream, device=value.device).to(value.dtype))]


def with_log_odds(log_odds, tokens=12, size=32, vocabulary=4999):
    """Hidden states, a weight and labels in bfloat16: every label has these log-odds, other logits are at most 5."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size).bfloat16()
    weight = (torch.randn(vocabulary, size) / size**0.5).bfloat16()
    labels = torch.randperm(vocabulary)[:tokens]
    logits = hidden.double() @ weight.double().T
    assert logits.abs().max() < 8
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    # A feature of its own moves the logit of each label
    hidden, weight = F.pad(hidden, (0, tokens)), F.pad(weight, (0, tokens))
    hidden[:, size:] = torch.eye(tokens)
    weight[labels, size + torch.arange(tokens)] = (others + log_odds - own).bfloat16()
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


@kernels
@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("unlearn", [True, False], ids=["ce-u", "cross entropy"])
@pytest.mark.parametrize("log_odds", [-60.0, 0.0, 60.0])
def test_the_error_of_bfloat16_logits(log_odds, unlearn, chunk_size):
    """Value and gradients are within 1 % of the exact way's in float64, from p = 1e-26 to 1 - p = 1e-26.

    The interpreter cuts bfloat16 off where a GPU rounds, which is twice the error.
    """
    hidden, weight, labels = with_log_odds(log_odds)
    mask = torch.full(labels.shape, unlearn, device=DEVICE)
    found = with_gradients(fused_linear_unlearning_loss, (hidden, weight), labels, mask, chunk_size=chunk_size)
    truth = with_gradients(fused_linear_unlearning_loss, (hidden.double(), weight.double()), labels, mask)
    for ours, expected in zip(found, truth, strict=True):
        assert error(ours, expected) < 0.01
    assert found[1].dtype == found[2].dtype == torch.bfloat16


@kernels
@pytest.mark.parametrize(
    ("kinds", "autocast"),
    [
        (("float32", "float32"), True),  # master weights
        (("float16", "bfloat16"), True),
        (("float32", "bfloat16"), False),
        (("bfloat16", "float32"), False),
    ],
)
def test_inputs_of_several_dtypes_get_gradients_in_theirs(kinds, autocast):
    hidden, weight, labels, mask, _ = (tensor.to(DEVICE) for tensor in batch())
    weight = weight.T.contiguous().T  # and one whose rows are not contiguous
    inputs = [tensor.detach().to(getattr(torch, kind)) for tensor, kind in zip((hidden, weight), kinds, strict=True)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        found = with_gradients(fused_linear_unlearning_loss, inputs, labels, mask)
    truth = with_gradients(on_logits, [tensor.double() for tensor in inputs], labels, mask)
    for ours, expected, kind in zip(found, truth, ("float32", *kinds), strict=True):
        assert ours.dtype == getattr(torch, kind) and error(ours, expected) < 0.03
