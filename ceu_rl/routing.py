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
import types
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from transformers import PreTrainedModel

from .losses import check_descent_coefficients, descent_weight

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")


class DescentRoute:
    """The coefficients of one attached route, and what it met in the backward passes since it was last read."""

    def __init__(self, coef: float, scale: float, max_weight: float) -> None:
        check_descent_coefficients(coef, scale, max_weight)
        self.coefficients = (coef, scale, max_weight)
        self._sums: torch.Tensor | None = None  # see `weigh`
        self._max: torch.Tensor | None = None

    def weigh(self, grad: torch.Tensor, log_probs: torch.Tensor, label_mask: torch.Tensor) -> torch.Tensor:
        """Return `grad` (shape of `log_probs`) with the weight on its descending tokens, and record them.

        Recording stays on the device, so a step never waits for it.
        """
        weight = descent_weight(log_probs, *self.coefficients)
        descending = (grad > 0) & label_mask
        weights = weight.masked_fill(~descending, 0.0)
        rare, sure = log_probs < math.log(0.01), log_probs > math.log(0.99)
        counts = [label_mask, descending, descending & rare, descending & sure]
        sums = torch.stack([*(count.sum().float() for count in counts), weights.sum().float()])
        largest = weights.max().float() if weights.numel() else sums.new_zeros(())
        self._sums = sums if self._sums is None else self._sums + sums
        self._max = largest if self._max is None else torch.maximum(self._max, largest)
        return torch.where(descending, grad * weight.to(grad.dtype), grad)

    def pop_metrics(self, accelerator: Any = None) -> dict[str, float]:
        """Read and reset the record, over all processes if an `accelerate.Accelerator` is given.

        Returns:
            `ceu/descending_fraction` of the labelled tokens; over the descending ones `ceu/weight_mean`,
            `ceu/weight_max`, and the shares `ceu/descending_below_0.01` and `ceu/descending_above_0.99` whose
            probability is below or above that. Empty if no backward pass went through the route.
        """
        if self._sums is None or self._max is None:
            return {}
        sums, largest = self._sums, self._max
        self._sums = self._max = None
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
            largest = accelerator.gather(largest.reshape(1)).max()
        tokens, descending, rare, sure, total = sums.tolist()
        return {
            "ceu/descending_fraction": descending / max(tokens, 1.0),
            "ceu/descending_below_0.01": rare / max(descending, 1.0),
            "ceu/descending_above_0.99": sure / max(descending, 1.0),
            "ceu/weight_mean": total / max(descending, 1.0),
            "ceu/weight_max": largest.item(),
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
    model: PreTrainedModel, coef: float = 1.0, scale: float = 1.0, max_weight: float = 1.0
) -> DescentRoute:
    """Attach the route to a model that has TRL's fused LM head.

    Our trainers call it after TRL's constructor. To try it under another TRL trainer that reads `log_probs` from the
    fused head (RLOO, KTO), call it on `trainer.model` before `trainer.train()`. The reference model stays stock.

    Args:
        model: The policy, after `trl.trainer.utils.add_fused_lm_head`; a PEFT model is routed at its base model, where
            TRL puts the head.
        coef, scale, max_weight: a, s and M of `losses.descent_weight`. With coef 0 nothing is attached.

    Returns:
        The route, whose `pop_metrics` tells what it met.

    Raises:
        ValueError: if a coefficient is out of range, the model has no fused head, or it is routed already.
        ImportError: if TRL is of another version than the one whose fused head this was written for.
    """
    check_trl_version()
    route = DescentRoute(coef, scale, max_weight)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    forward = model.forward
    if hasattr(forward, "ceu_route"):
        raise ValueError(f"{type(model).__name__} has a descent route already; attach it once.")
    if "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters:
        raise ValueError(
            f"{type(model).__name__}.forward takes no fused_lm_head, so there are no log-probabilities to route; "
            "call trl.trainer.utils.add_fused_lm_head(model) first, as TRL's trainers do."
        )
    if coef == 0:
        return route

    # Keep the original signature: `generate` and `Trainer` validate their arguments against it
    @functools.wraps(type(model).forward)
    def routed_forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        outputs = forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        if fused_lm_head and torch.is_grad_enabled() and outputs.log_probs.requires_grad:
            outputs.log_probs = _Route.apply(outputs.log_probs, outputs.label_mask, route)
        return outputs

    routed_forward.ceu_route = route  # type: ignore[attr-defined]
    # On the instance, as TRL does: PEFT calls this `forward` directly, so a module hook would be skipped
    model.forward = types.MethodType(routed_forward, model)  # type: ignore[method-assign]
    return route


def check_trl_version() -> None:
    """Raise an ImportError unless TRL is of a version whose fused LM head this package was tested with."""
    if trl.__version__ not in SUPPORTED_TRL:
        raise ImportError(
            f"trl is {trl.__version__}, and its fused LM head is not a stable interface; "
            f"install a tested version: pip install 'trl{SUPPORTED_TRL}'."
        )


@dataclass
class DescentConfig:
    """The three fields that our configs add to their TRL parent; see `losses.descent_weight`."""

    ceu_coef: float = field(
        default=1.0,
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

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()  # type: ignore[misc]

    def check(self) -> None:
        """Raise a ValueError for a coefficient out of range or a setting that the route cannot honour."""
        check_trl_version()
        check_descent_coefficients(self.ceu_coef, self.ceu_scale, self.ceu_max_weight)
        if getattr(self, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel is True, and Liger's kernels replace the forward that the CE-U route wraps; leave it "
                "out, or use the Hub kernels with model_init_kwargs={'use_kernels': True}."
            )

    @classmethod
    def adopt(cls, args: Any) -> Any:
        """Return `args` as this config: a config of the TRL parent gets the defaults of the three fields.

        So that switching the class of the trainer is enough. None gives a default config.
        """
        if args is None or isinstance(args, cls):
            return args or cls()
        parent = cls.__bases__[1]
        if not isinstance(args, parent):
            raise ValueError(f"args is a {type(args).__name__}; give a {cls.__name__} or a {parent.__name__}.")
        adopted = object.__new__(cls)
        vars(adopted).update(vars(args))
        adopted.check()
        return adopted


class DescentTrainer:
    """Trainer mixin: attaches the route after TRL's constructor and logs what it met."""

    descent_route: DescentRoute

    def attach_route(self) -> None:
        """Attach the route to the policy with the coefficients of `self.args`."""
        args: Any = self.args  # type: ignore[attr-defined]
        self.descent_route = route_descent(
            self.model,  # type: ignore[attr-defined]
            args.ceu_coef,
            args.ceu_scale,
            args.ceu_max_weight,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:  # type: ignore[attr-defined]
            logs.update(self.descent_route.pop_metrics(self.accelerator))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
