"""The fused loss against 60-digit arithmetic, and against `losses` and cross entropy on plain logits in float64."""

import contextlib
import os

import mpmath
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from ceu_rl import fused
from ceu_rl.fused import fused_linear_unlearning_loss, lm_head_options
from ceu_rl.losses import cross_entropy_unlearning_loss

from .gpu_check import assert_sharded_as_whole
from .reference import LOG_ODDS, exact, logits_with, worst_relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device():
    """What a test makes lies on a GPU where there is one; `test_fused_kernels.py` has these run in the interpreter."""
    with torch.device(DEVICE) if DEVICE == "cuda" else contextlib.nullcontext():
        yield


def on_logits(hidden, weight, labels, mask, bias=None, softcap=None, logit_scale=1.0, reduction="mean"):
    """The naive expression: all logits, then cross entropy and CE-U on them."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    unlearned, learned = (labels != -100) & mask, (labels != -100) & ~mask
    total = cross_entropy_unlearning_loss(logits[unlearned], labels[unlearned], reduction="sum")
    total = total + F.cross_entropy(logits[learned], labels[learned], reduction="sum")
    return total if reduction == "sum" else total / (labels != -100).sum()


def batch(tokens=21, size=16, vocabulary=1009, dtype=torch.float32, seed=0):
    """Inputs of shape (3, tokens / 3): a third of the labels ignored, half of the others to be unlearned."""
    torch.manual_seed(seed)
    shape = (3, tokens // 3)
    hidden = torch.randn(*shape, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, shape).masked_fill(torch.rand(shape) < 0.3, -100)
    return hidden, weight, labels, torch.rand(shape) < 0.5, bias


def doubled(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("unlearn", [True, False], ids=["ce-u", "cross entropy"])
@pytest.mark.parametrize("log_odds", LOG_ODDS)
def test_value_and_gradients_are_exact_at_any_probability(log_odds, unlearn):
    logits = logits_with(log_odds, torch.float32)
    value, gradient = exact(logits, 2, unlearn)
    # A hidden state (1, 0) makes the first column of the weight the logits, with no rounding
    weight = torch.stack([logits, torch.linspace(0.5, 1.5, 5)], dim=1).requires_grad_()
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    loss = fused_linear_unlearning_loss(hidden, weight, torch.tensor([2]), torch.tensor([unlearn]), bias)
    loss.backward()
    assert worst_relative_error([loss.item()], [value]) <= 1e-5
    assert worst_relative_error(bias.grad.tolist(), gradient) <= 1e-5
    assert worst_relative_error(weight.grad[:, 0].tolist(), gradient) <= 1e-5
    assert (weight.grad[:, 1] == 0).all()
    # The second column has no spread to speak of, so its product may cancel: its own terms are the measure
    columns = weight.detach().T.tolist()
    products = [mpmath.fsum(g * w for g, w in zip(gradient, column, strict=True)) for column in columns]
    sizes = [mpmath.fsum(abs(g * w) for g, w in zip(gradient, column, strict=True)) for column in columns]
    for found, truth, size in zip(hidden.grad[0].tolist(), products, sizes, strict=True):
        assert abs(mpmath.mpf(found) - truth) <= 1e-5 * size


OPTIONS = {"plain": {}, "softcap": {"softcap": 3.0}, "scale": {"logit_scale": 0.25}}
OPTIONS["softcap and scale"] = {"softcap": 5.0, "logit_scale": -0.5}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_equals_the_losses_on_logits(dtype, tolerance, options, chunk_size):
    for reduction, divisor, upstream in (("mean", None, 3), ("sum", None, 3), ("mean", torch.tensor(40.0), 1)):
        hidden, weight, labels, mask, bias = batch(dtype=dtype)
        loss = fused_linear_unlearning_loss(
            hidden, weight, labels, mask, bias, reduction=reduction, chunk_size=chunk_size, num_items_in_batch=divisor,
            **options,
        )  # fmt: skip
        (upstream * loss).backward()
        reference = doubled(hidden, weight, bias)
        reduction = reduction if divisor is None else "sum"
        truth = on_logits(*reference[:2], labels, mask, reference[2], reduction=reduction, **options) / (divisor or 1)
        (upstream * truth).backward()
        assert loss.dtype == dtype and loss.shape == ()
        assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
        for found, expected in zip((hidden, weight, bias), reference, strict=True):
            assert found.grad.dtype == dtype
            assert error(found.grad, expected.grad) <= tolerance
        assert (hidden.grad[labels == -100] == 0).all()


def test_without_a_mask_all_is_unlearned_but_what_is_ignored():
    hidden, weight, labels, mask, _ = batch()
    loss = fused_linear_unlearning_loss(hidden, weight, labels)
    torch.testing.assert_close(loss, cross_entropy_unlearning_loss(F.linear(hidden, weight), labels))
    assert loss == fused_linear_unlearning_loss(hidden, weight, labels, torch.ones_like(mask))
    other = labels.masked_fill(labels == -100, 7)
    loss = fused_linear_unlearning_loss(hidden, weight, other, mask, ignore_index=7)
    assert loss == fused_linear_unlearning_loss(hidden, weight, other.masked_fill(other == 7, -100), mask)


def test_a_vocabulary_larger_than_the_cache_and_one_that_nothing_divides(monkeypatch):
    # Blocks of 1 row, of 3 rows with a rest, and of all rows
    found = []
    for cache in (1, 3 * 1009 + 5, 2**20):
        monkeypatch.setattr(fused, "_LOGITS_IN_CACHE", cache)
        hidden, weight, labels, mask, bias = batch(tokens=30)
        loss = fused_linear_unlearning_loss(hidden, weight, labels, mask, bias, chunk_size=7)
        found.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sure", [False, True])
def test_half_precision_errs_no_more_than_the_naive_loss(dtype, sure):
    totals = {"ours": torch.zeros(4), "naive": torch.zeros(4)}
    for seed in range(10):
        hidden, weight, labels, mask, bias = batch(tokens=60, dtype=dtype, seed=seed)
        with torch.no_grad():
            weight /= 4.0  # logits of an ordinary size
            if sure:  # each hidden state points at its label
                hidden += 6.0 * weight[labels.clamp(min=0)]
        reference = doubled(hidden, weight, bias)
        truth = on_logits(*reference[:2], labels, mask, reference[2])
        truth.backward()
        for name, function in (("ours", fused_linear_unlearning_loss), ("naive", on_logits)):
            inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
            loss = function(*inputs[:2], labels, mask, inputs[2])
            loss.backward()
            assert all(t.grad.dtype == dtype and torch.isfinite(t.grad).all() for t in inputs)
            errors = [error(t.grad, r.grad) for t, r in zip(inputs, reference, strict=True)]
            totals[name] += torch.tensor([abs(loss.item() / truth.item() - 1), *errors])
    # Value, and the gradients of hidden, weight and bias; over ten batches, as a single one is a throw of dice
    assert (totals["ours"] <= totals["naive"] * 1.001 + 1e-6).all(), totals


def test_float16_gradients_survive_a_loss_scale():
    hidden, weight, labels, mask, _ = batch(tokens=600, vocabulary=4001, dtype=torch.float16)
    loss = fused_linear_unlearning_loss(hidden, weight, labels, mask)
    loss.backward(torch.tensor(1024.0))
    reference = doubled(hidden, weight)
    (1024 * on_logits(*reference, labels, mask)).backward()
    # 1 / (tokens x vocabulary) alone is below the smallest float16
    assert error(hidden.grad, reference[0].grad) < 0.01 and error(weight.grad, reference[1].grad) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("label_logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_extreme_logits_stay_finite(dtype, label_logit):
    weight = torch.tensor([[label_logit], [0.0], [1.0]], dtype=dtype, requires_grad=True)
    hidden = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    loss = fused_linear_unlearning_loss(hidden, weight, torch.tensor([0, 0]), torch.tensor([True, False]))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all() and weight.grad.float().abs().sum() <= 2.01


def test_tokens_that_the_bias_forbids_count_nothing():
    hidden, weight, labels, mask, bias = batch(vocabulary=12)
    labels = labels.masked_fill(labels >= 9, 3)
    forbidding = bias.detach().index_fill(0, torch.arange(9, 12), float("-inf"))
    found = fused_linear_unlearning_loss(hidden, weight, labels, mask, forbidding)
    expected = on_logits(hidden, weight[:9], labels, mask, bias[:9])
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that an operation returned, and the shapes of the products."""

    largest = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "addmv_")
        return result


def record(hidden, weight, labels, mask=None, bias=None, **options):
    with Allocations() as allocations:
        loss = fused_linear_unlearning_loss(hidden, weight, labels, mask, bias, **options)
        if loss.requires_grad:
            loss.backward()
    return allocations


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_memory_grows_with_the_chunk_and_not_with_the_tokens(tokens):
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(2001, 4, requires_grad=True)
    labels, mask = torch.randint(0, 2001, (tokens,)), torch.rand(tokens) < 0.5
    allocations = record(hidden, weight, labels, mask, chunk_size=64)
    assert allocations.largest == 64 * 2001
    assert allocations.products == 3 * tokens / 64  # nothing is computed again
    with Allocations() as naive:
        on_logits(hidden, weight, labels, mask).backward()
    assert naive.largest == tokens * 2001


def test_by_default_the_chunk_shrinks_as_the_vocabulary_grows(monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", {"cpu": 40_000})
    for vocabulary in (500, 2000, 20_000):
        hidden, weight = torch.randn(300, 2), torch.randn(vocabulary, 2, requires_grad=True)
        allocations = record(hidden, weight, torch.randint(0, vocabulary, (300,)))
        assert allocations.largest == max(10_000, 2 * vocabulary)


@pytest.mark.parametrize(
    ("needing", "products_per_chunk"),
    [((), 1), (("hidden",), 2), (("weight",), 2), (("bias",), 1), (("hidden", "weight", "bias"), 3)],
)
def test_only_the_gradients_that_are_needed_are_formed(needing, products_per_chunk):
    hidden, weight, labels, mask, bias = batch()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    reference = dict(zip(inputs, doubled(hidden, weight, bias), strict=True))
    on_logits(reference["hidden"], reference["weight"], labels, mask, reference["bias"]).backward()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in needing)
    kept = int((labels != -100).sum())
    allocations = record(hidden, weight, labels, mask, bias, chunk_size=kept)
    assert allocations.products == products_per_chunk
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in needing)
        if name in needing:
            assert error(tensor.grad, reference[name].grad) < 1e-5


def test_the_gradients_serve_one_backward_pass():
    hidden, weight, labels, mask, _ = batch()
    loss = fused_linear_unlearning_loss(hidden, weight, labels, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this is a second one; compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_nothing_to_learn_is_a_differentiable_zero(shape, dtype):
    labels = torch.full(shape, -100)
    for mask in (None, torch.zeros_like(labels, dtype=torch.bool)):
        sizes = ((*shape, 4), (7, 4), (7,))
        hidden, weight, bias = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes)
        loss = fused_linear_unlearning_loss(hidden, weight, labels, mask, bias)
        loss.backward()
        assert loss.item() == 0 and loss.dtype == torch.float32
        for tensor in (hidden, weight, bias):
            assert tensor.grad.shape == tensor.shape and (tensor.grad == 0).all()


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_inputs():
    hidden, weight, labels, mask, bias = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_unlearning_loss(hidden, weight, labels, mask, bias)
    loss.backward()
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    explicit = fused_linear_unlearning_loss(*half, labels, mask, bias.detach())
    explicit.backward()
    assert loss == explicit and loss != fused_linear_unlearning_loss(hidden, weight, labels, mask, bias)
    for tensor, rounded in zip((hidden, weight), half, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad.bfloat16(), rounded.grad)
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "limit", "length"),
    [(8192, 16744, 8192), (8192, 4186, 4096), (1000, 512, 512), (1000, 700, 512), (300, 5, 5), (0, 5, 1), (7, 0, 1)],
)
def test_chunks_are_equal_multiples_of_256(rows, limit, length):
    """Of 128,256 logits in bfloat16 4 GiB hold 16,744 rows."""
    assert fused._equal_chunks(rows, limit) == length


class HostReads(TorchDispatchMode):
    """How often the host waits for the device: a number read, or a selection whose size it must know."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if chosen or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.note()
        return func(*args, **(kwargs or {}))

    def to_list(self, original):
        return lambda tensor: (self.note(), original(tensor))[1]

    def note(self):
        self.count += 1


def test_one_read_on_the_host(monkeypatch):
    reads = HostReads()
    monkeypatch.setattr(torch.Tensor, "tolist", reads.to_list(torch.Tensor.tolist))
    hidden, weight, labels, mask, bias = batch()
    with reads:
        fused_linear_unlearning_loss(hidden, weight, labels, mask, bias).backward()
    assert reads.count == 1


def test_inside_a_compiled_model():
    hidden, weight, labels, mask, bias = batch()
    compiled = torch.compile(lambda *inputs: 2 * fused_linear_unlearning_loss(*inputs), backend="aot_eager")
    compiled(hidden, weight, labels, mask, bias).backward()
    reference = doubled(hidden, weight, bias)
    (2 * on_logits(*reference[:2], labels, mask, reference[2])).backward()
    for found, expected in zip((hidden, weight, bias), reference, strict=True):
        assert error(found.grad, expected.grad) < 1e-5


HEADS = {
    "none": {},
    "logit_scale": {"logit_scale": 0.5},
    "logit_scale of zero": {"logit_scale": 0.0},
    "logit_scale of None": {"logit_scale": None, "output_multiplier": 3.0},
    "lm_head_multiplier": {"lm_head_multiplier": 3.0},
    "logits_scaling": {"logits_scaling": 4.0},
    "logits_scaling of HyperCLOVA X": {"logits_scaling": 4.0, "model_type": "hyperclovax"},
    "final_logit_softcapping": {"final_logit_softcapping": 0.3},
}
HEADS["all of them"] = {**HEADS["final_logit_softcapping"], **HEADS["logits_scaling"], "lm_head_multiplier": 5.0}
HEADS["all of them"] |= {"logit_scale": 2.0, "output_multiplier": 3.0}


@pytest.mark.parametrize("name", HEADS)
def test_lm_head_options_are_those_of_trl(tiny_model, name):
    """Contract with TRL 1.16's head: for every option its loss is ours."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 20  # or a cap or a scale would hardly show
    for key, value in HEADS[name].items():
        setattr(model.config, key, value)
    input_ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden, labels = model.model(input_ids=input_ids).last_hidden_state[:, :-1], input_ids[:, 1:]
    learn = torch.zeros_like(labels, dtype=torch.bool)
    options = lm_head_options(model)
    found = fused_linear_unlearning_loss(hidden, model.lm_head.weight, labels, learn, **options)
    add_fused_lm_head(model)
    expected = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # The comparison can fail: without the options the loss is another one
    plain = fused_linear_unlearning_loss(hidden, model.lm_head.weight, labels, learn)
    assert (options == {"softcap": None, "logit_scale": 1.0}) == (name == "none")
    assert (plain == found) == (name == "none")


def shard(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert_sharded_as_whole("cpu")
    dist.barrier()
    os._exit(0)  # all held; a thread of gloo can still abort the interpreter at an ordinary exit


@pytest.mark.skipif(DEVICE == "cuda", reason="its processes share one CPU")
def test_two_processes_average_the_gradients_of_one(tmp_path):
    """Of a head that is sharded apart from its model; other engines: `test_engines.py`."""
    mp.spawn(shard, args=(str(tmp_path),), nprocs=2)


GOOD = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "labels": torch.tensor([0, 2])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none'; use 'mean' or 'sum'"),
        ({"labels": torch.tensor([0, 3])}, "label 3 is outside the vocabulary of 3"),
        ({"labels": torch.tensor([0])}, r"labels: shape \(1,\) does not fit hidden \(2, 4\)"),
        ({"weight": torch.zeros(3, 5)}, r"weight: shape \(3, 5\)"),
        ({"weight": torch.zeros(0)}, r"weight: shape \(0,\) does not fit hidden \(2, 4\)"),
        ({"weight": torch.zeros(1, 4)}, "the vocabulary has 1 entry"),
        ({"bias": torch.zeros(4)}, r"bias: shape \(4,\) .*; give \(3,\)"),
        ({"unlearn_mask": torch.ones(2)}, "unlearn_mask has dtype torch.float32"),
        ({"unlearn_mask": torch.ones(1, dtype=torch.bool)}, r"unlearn_mask: shape \(1,\)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_unlearning_loss(**{**GOOD, **changes})
