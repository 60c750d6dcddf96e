"""The backward route: CE-U in the place of gradient ascent, inside TRL's own trainers.

TRL's trainers read per-token log-probabilities from a fused LM head that `trl.trainer.utils.add_fused_lm_head` wraps
around `model.forward`. The route wraps `forward` once more and changes the backward pass only. With g the gradient
that reaches the log-probability of one token, and w = `losses.descent_weight`:

    g > 0  (the step lowers the log-probability):  g -> g * w(p_y)
    g <= 0 (the step raises it):                   g -> g

The forward value is untouched, so losses, rewards, KL terms and importance ratios equal the stock ones to the last bit.
"""

import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from .losses import check_descent_coefficients, descent_weight

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")
RECORD = 10  # numbers that a route keeps of what it met
CITATION = textwrap.dedent("""\
    @article{yang2025ceu,
        title  = {{CE-U: Cross Entropy Unlearning}},
        author = {Bo Yang},
        year   = 2025,
        eprint = {arXiv:2503.01224},
    }""")


class DescentRoute:
    """The coefficients of one attached route, and what it met in the backward passes since it was last read."""

    def __init__(self, coef: float, scale: float, max_weight: float, drop: bool = False, observe: bool = False) -> None:
        check_descent_coefficients(coef, scale, max_weight)
        self.coefficients = (coef, scale, max_weight)
        self.drop = drop
        self.is_attached = self.weighs or observe
        self._record: torch.Tensor | None = None

    @property
    def weighs(self) -> bool:
        """Whether it changes gradients."""
        return self.drop or self.coefficients[0] != 0

    def weigh(self, grad: torch.Tensor, log_probs: torch.Tensor, label_mask: torch.Tensor) -> torch.Tensor:
        """Return `grad` (shape of `log_probs`) with the weight on its descending tokens, and record them.

        With coef 0 it is `grad` itself. Recording stays on the device, so a step never waits for it.
        """
        weight = torch.zeros_like(log_probs) if self.drop else descent_weight(log_probs, *self.coefficients)
        descending = (grad > 0) & label_mask
        weights = weight.masked_fill(~descending, 0.0)
        weighed = grad
        if self.weighs:
            weighed = torch.where(descending, grad * weight.to(grad.dtype), grad)
        rare, sure = log_probs < math.log(0.01), log_probs > math.log(0.99)
        groups = torch.stack([label_mask, descending, descending & rare, descending & sure]).flatten(1).float()
        norms = weighed.abs().float() * -torch.expm1(log_probs).clamp(max=0).float()
        largest = weights.max() if weights.numel() else weights.sum()
        over_weights = torch.stack([weights.sum(), largest]).float()
        record = torch.cat([groups.sum(dim=1), (groups * norms.flatten()).sum(dim=1), over_weights])
        self._record = merge_records([record] if self._record is None else [self._record, record])
        return weighed

    def pop_record(self) -> torch.Tensor | None:
        """What this process met since the last call, for `merge_records` and `descent_metrics`, or None."""
        record, self._record = self._record, None
        return record

    def pop_metrics(self) -> dict[str, float]:
        """`descent_metrics` of what this process met since the last call; empty if no backward pass went through."""
        record = self.pop_record()
        return {} if record is None else descent_metrics(record)


def merge_records(records: list[torch.Tensor]) -> torch.Tensor:
    """One record of several of shape (RECORD,). The last number is a maximum, the others are sums."""
    if len(records) == 1:
        return records[0]
    stacked = torch.stack(records)
    return torch.cat([stacked[:, :-1].sum(dim=0), stacked[:, -1:].amax(dim=0)])


def descent_metrics(record: torch.Tensor) -> dict[str, float]:
    """Read a record of shape (RECORD,).

    With g the gradient on the log-probability of one token, weight included, the L1 norm of what it sends into the
    logits is exactly known from p alone: |g (e_y - p)|_1 = 2 |g| (1 - p_y), half of it on the token's own logit.

    Returns:
        `ceu/descending_fraction` of the labelled tokens; over the descending ones `ceu/weight_mean`, `ceu/weight_max`,
        and the shares `ceu/descending_below_0.01` and `ceu/descending_above_0.99` whose probability is below or above
        that; and of the sum of those norms over all labelled tokens what descending ones carry,
        `ceu/gradient_descending`, and what those two groups of them do, `ceu/gradient_below_0.01` and
        `ceu/gradient_above_0.99`.
    """
    tokens, descending, rare, sure, norm, norm_descending, norm_rare, norm_sure, total, largest = record.tolist()
    return {
        "ceu/descending_fraction": descending / max(tokens, 1.0),
        "ceu/descending_below_0.01": rare / max(descending, 1.0),
        "ceu/descending_above_0.99": sure / max(descending, 1.0),
        "ceu/gradient_descending": norm_descending / (norm or 1.0),
        "ceu/gradient_below_0.01": norm_rare / (norm or 1.0),
        "ceu/gradient_above_0.99": norm_sure / (norm or 1.0),
        "ceu/weight_mean": total / max(descending, 1.0),
        "ceu/weight_max": largest,
    }


class _Route(torch.autograd.Function):
    """Identity forward; the descent weight on the descending tokens backward."""

    @staticmethod
    def forward(ctx: Any, log_probs: torch.Tensor, label_mask: torch.Tensor, route: DescentRoute) -> torch.Tensor:
        ctx.save_for_backward(log_probs, label_mask)
        ctx.route = route
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_probs, label_mask = ctx.saved_tensors
        return ctx.route.weigh(grads[0], log_probs, label_mask), None, None


def route_descent(
    model: PreTrainedModel,
    coef: float = 1.0,
    scale: float = 1.0,
    max_weight: float = 1.0,
    drop: bool = False,
    observe: bool = False,
) -> DescentRoute:
    """Attach the route to a model that has TRL's fused LM head.

    Our trainers call it after TRL's constructor. To try it under another TRL trainer that reads `log_probs` from the
    fused head (RLOO, KTO), call it on `trainer.model` before `trainer.train()`. The reference model stays stock. A copy
    of the model (`copy.deepcopy`, pickle, `torch.save`) has its own weights, head and route.

    Args:
        model: The policy, after `trl.trainer.utils.add_fused_lm_head`; a PEFT model is routed at its base model, where
            TRL puts the head.
        coef, scale, max_weight: a, s and M of `losses.descent_weight`. With coef 0 nothing is attached, unless:
        drop: Descending tokens get no gradient at all, whatever the coefficients: the weight with a = 1 and M -> 0.
        observe: Attach with coef 0 as well: the route then returns each gradient untouched, and tells what it met.

    Returns:
        The route, whose `pop_metrics` tells what it met.

    Raises:
        ValueError: if a coefficient is out of range, the model has no fused head, or it is routed already.
        ImportError: if TRL is of another version than the one whose fused head this was written for.
    """
    check_trl_version()
    route = DescentRoute(coef, scale, max_weight, drop, observe)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if getattr(model.forward, "ceu_wrapper", None) is _routed_forward:
        raise ValueError(f"{type(model).__name__} has a descent route already; attach it once.")
    if "fused_lm_head" not in inspect.signature(model.forward, follow_wrapped=False).parameters:
        raise ValueError(
            f"{type(model).__name__}.forward takes no fused_lm_head, so there are no log-probabilities to route; "
            "call trl.trainer.utils.add_fused_lm_head(model) first, as TRL's trainers do."
        )
    if route.is_attached:
        model._descent_route = route  # type: ignore[assignment]
        wrap_forward(model, _routed_forward)
    return route


def _routed_forward(
    forward: Callable[..., Any], self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any
) -> Any:
    outputs = forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)
    if fused_lm_head and torch.is_grad_enabled() and outputs.log_probs.requires_grad:
        outputs.log_probs = _Route.apply(outputs.log_probs, outputs.label_mask, self._descent_route)
    return outputs


def wrap_forward(model: PreTrainedModel, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(forward, self, *args, **kwargs)` in the place of `model.forward`, on the model and on its copies.

    On the instance, as TRL does: PEFT calls its `forward` directly, so a module hook would be skipped. But TRL's head
    keeps the bound forward of the model it was put on, with which a copy would score by the weights of the original,
    and pickle forgets what was put on an instance. So the `forward` that the wrapper gets is a function of the model,
    and a copy that came without its head and wrappers gets them again.

    Args:
        model: A model with or without TRL's fused head.
        wrapper: A function of a module, which pickle finds by its name.
    """
    forward, head = _function_of(model.forward, model), None
    closure = inspect.getclosurevars(forward).nonlocals if inspect.isfunction(forward) else {}
    if "original_forward" in closure:
        fused, plain = forward, _function_of(closure["original_forward"], model)
        head = {name: closure[name] for name in inspect.signature(add_fused_lm_head).parameters if name in closure}

        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if fused_lm_head:
                return fused(self, *args, fused_lm_head=True, **kwargs)
            return plain(self, *args, **kwargs)

    # Keep the original signature: `generate` and `Trainer` validate their arguments against it
    @functools.wraps(type(model).forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, self, *args, **kwargs)

    wrapped.ceu_wrapper = wrapper  # type: ignore[attr-defined]
    # A head that was put on above earlier wrappers hides them
    earlier = vars(model).get("_ceu_wrappers", {}) if head is None else {}
    vars(model)["_ceu_wrappers"] = {"head": head, "wrappers": (), **earlier}
    vars(model)["_ceu_wrappers"]["wrappers"] += (wrapper,)
    vars(model)["__reduce_ex__"] = types.MethodType(_reduce, model)
    model.forward = types.MethodType(wrapped, model)  # type: ignore[method-assign]


def _function_of(forward: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """The `forward` of a model as a function of it, so that it runs on a copy with the copy's weights."""
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        return forward.__func__
    if isinstance(forward, functools.partial) and forward.args == (model,):  # the hooks of accelerate
        return forward.func
    return lambda self, *args, **kwargs: forward(*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """How `copy` and `pickle` take a wrapped model apart: `__reduce_ex__` of the instance."""
    state = {name: value for name, value in vars(self).items() if name != "__reduce_ex__"}
    return _blank, (type(self),), state


def _blank(kind: Any) -> Any:
    model = kind.__new__(kind)
    vars(model)["__setstate__"] = types.MethodType(_restore, model)
    return model


def _restore(self: Any, state: dict[str, Any]) -> None:
    del vars(self)["__setstate__"]
    type(self).__setstate__(self, state)
    vars(self)["__reduce_ex__"] = types.MethodType(_reduce, self)
    # `copy` binds the wrapped function to the copy; `pickle` knows a bound method by its name, and finds the class's
    if getattr(self.forward, "__func__", None) is type(self).forward:
        kept = vars(self).pop("_ceu_wrappers")
        del vars(self)["forward"]
        if kept["head"] is not None:
            add_fused_lm_head(self, **kept["head"])
        for wrapper in kept["wrappers"]:
            wrap_forward(self, wrapper)


def check_trl_version() -> None:
    """Raise an ImportError unless TRL is of a version whose fused LM head this package was tested with."""
    if trl.__version__ not in SUPPORTED_TRL:
        raise ImportError(
            f"trl is {trl.__version__}, and its fused LM head is not a stable interface; "
            f"install a tested version: pip install 'trl{SUPPORTED_TRL}'."
        )


@dataclass
class DescentConfig:
    """The fields that our configs add to their TRL parent; see `losses.descent_weight`."""

    ceu_coef: float = field(
        default=0.5,
        metadata={
            "help": "Share of the CE-U weight in the gradient of tokens whose log-probability is lowered, from 0 "
            "(stock gradient ascent, bit for bit TRL's trainer) to 1 (CE-U alone)."
        },
    )
    ceu_scale: float = field(
        default=1.0,
        metadata={"help": "Scale s > 0 of the CE-U weight: larger pushes rare tokens harder. 1 is CE-U's own."},
    )
    ceu_max_weight: float = field(
        default=1.0,
        metadata={
            "help": "Soft cap M > 0 on the CE-U weight. With M <= 1 the only balance of a token that chosen and "
            "rejected responses share is at probability 1; `inf` is CE-U as published, which drives it to 1/2."
        },
    )

    drop_descending: bool = field(
        default=False,
        metadata={
            "help": "Whether tokens whose log-probability the step would lower get no gradient at all, whatever the "
            "ceu_* fields: training on positives only, the control for every claim about the weight."
        },
    )

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()  # type: ignore[misc]

    def check(self) -> None:
        """Raise a ValueError for a coefficient out of range or a setting that the route cannot honour."""
        check_trl_version()
        check_descent_coefficients(self.ceu_coef, self.ceu_scale, self.ceu_max_weight)
        check_no_liger(self)

    @classmethod
    def adopt(cls, args: Any, model: Any) -> Any:
        """Return `args` as this config: the object that was given, so that later changes of it have their effect.

        A config of the TRL parent becomes one of this class where it stands, with the defaults of our fields, so that
        switching the class of the trainer is enough. One of a subclass of the parent becomes one of a class that
        inherits from both, whose methods are those of the subclass. None gives a default config, which writes to the
        folder that TRL's trainer would write to.

        Raises:
            ValueError: for an object that is no config of the parent, or one with a setting that is not honoured.
        """
        config_class: Any = cls
        parent = cls.__bases__[1]
        if args is None:
            config: Any = getattr(model, "config", None)
            name = model if isinstance(model, str) else get_config_model_id(config)
            return config_class(f"{name.split('/')[-1]}-{parent.__name__.removesuffix('Config')}")
        if not isinstance(args, parent):
            raise ValueError(f"args is a {type(args).__name__}; give a {cls.__name__} or a {parent.__name__}.")
        if not isinstance(args, cls):
            check_no_liger(args)
            given: Any = type(args)
            args.__class__ = _joined(config_class, given)
        config_class.check(args)
        return args


@functools.cache
def _joined(cls: Any, given: Any) -> Any:
    """`cls` if it inherits from `given`, else a class that inherits from `given` and then from `cls`."""
    if issubclass(cls, given):
        return cls
    methods = {"__reduce_ex__": _reduce_joined, "__module__": given.__module__, "__doc__": given.__doc__}
    joined: Any = type(given.__name__, (given, cls), methods)
    return dataclass(init="__dataclass_fields__" in vars(given), repr=False, eq=False)(joined)


def _reduce_joined(self: Any, protocol: Any) -> tuple[Any, ...]:
    given, cls = type(self).__bases__  # pickle finds these by their names, and not the class that joins them
    return _blank_joined, (cls, given), dict(vars(self))


def _blank_joined(cls: Any, given: Any) -> Any:
    return object.__new__(_joined(cls, given))


def check_no_liger(args: Any) -> None:
    """Raise a ValueError for `use_liger_kernel`."""
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel is True, and Liger's kernels replace the forward that the CE-U route wraps; leave it "
            "out, or use the Hub kernels with model_init_kwargs={'use_kernels': True}."
        )


class DescentTrainer:
    """Trainer mixin: attaches the route after TRL's constructor and logs what it met."""

    descent_route: DescentRoute
    _descent_record: torch.Tensor | None = None  # of all processes, since the last log

    def attach_route(self, observe: bool = False) -> None:
        """Attach the route to the policy with the coefficients of `self.args`."""
        args: Any = self.args  # type: ignore[attr-defined]
        self.descent_route = route_descent(
            self.model,  # type: ignore[attr-defined]
            args.ceu_coef,
            args.ceu_scale,
            args.ceu_max_weight,
            args.drop_descending,
            observe,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        # Here, where every process comes by: a callback may log on one of them alone
        if accelerator.sync_gradients and self.descent_route.is_attached:
            record = self.descent_route.pop_record()
            record = torch.full((RECORD,), -1.0, device=loss.device) if record is None else record
            records = accelerator.gather(record).view(-1, RECORD)
            if (records < 0).all() and self.descent_route.weighs:  # in every process, so that all of them end
                raise ValueError(
                    "No gradient of this step went through the descent route: another trainer was built on this model "
                    "after this one, and its head or route took the place; build this trainer again."
                )
            earlier = [] if self._descent_record is None else [self._descent_record]
            self._descent_record = merge_records([*earlier, *records.clamp(min=0)])
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and self._descent_record is not None:  # type: ignore[attr-defined]
            logs.update(descent_metrics(self._descent_record))
            self._descent_record = None
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
