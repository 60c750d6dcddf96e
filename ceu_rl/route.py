"""The backward route: another weight on the tokens that a step would lower, inside TRL's own trainers.

TRL's trainers read per-token log-probabilities from a fused LM head (`trl.trainer.utils.add_fused_lm_head`). The route
is a forward hook on the policy, and changes the backward pass only. With g the gradient that reaches the
log-probability of one token, and w the weight of a rule (`losses.py`):

    g > 0  (the step lowers the log-probability):  g -> g w
    g <= 0 (the step raises it):                   g -> g

The forward value is untouched, so losses, rewards, KL terms and importance ratios equal stock's to the last bit.
"""

import functools
import inspect
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import trl
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg
from trl.trainer.utils import get_config_model_id

from .losses import (
    anchored_weight,
    check_ranges,
    descent_weight,
    gate_weight,
    sequence_ratio_weight,
    token_ratio_weight,
)
from .run.checks import check_language_model, check_numbers
from .run.errors import import_function

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")
if trl.__version__ not in SUPPORTED_TRL:
    raise ImportError(f"trl is {trl.__version__}, which was not tested; pip install 'trl{SUPPORTED_TRL}'.")
CITATION = textwrap.dedent("""\
    @article{yang2025ceu,
        title  = {{CE-U: Cross Entropy Unlearning}},
        author = {Bo Yang},
        year   = 2025,
        eprint = {arXiv:2503.01224},
    }""")

# weight(log_probs, anchor_log_probs or None, descending, mask) -> the weights of the tokens, all of shape (B, T), or
# what broadcasts to it; 1 where a gradient is left alone
Weight = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]


# the rules by name


class Rule(NamedTuple):
    """A rule of `losses.py`: its weight of log-probabilities, anchor, mask and parameters, and these with defaults."""

    weight: Callable[..., torch.Tensor]
    parameters: dict[str, float | None] = {}  # fields of `DescentConfig`; None has to be given
    anchored: bool = False  # whether it measures against an anchor


RULES = {
    "ceu": Rule(
        lambda log_probs, anchor, mask, scale, max_weight: descent_weight(log_probs, 1.0, scale, max_weight),
        {"ceu_scale": 1.0, "ceu_max_weight": 1.0},
    ),
    "anchored": Rule(lambda log_probs, anchor, mask: anchored_weight(log_probs, anchor), anchored=True),
    "constant": Rule(
        lambda log_probs, anchor, mask, weight: torch.full_like(log_probs, weight), {"constant_weight": None}
    ),
    "token_ratio": Rule(
        lambda log_probs, anchor, mask, beta: token_ratio_weight(log_probs, anchor, beta), {"tnpo_beta": 1.0}, True
    ),
    "sequence_ratio": Rule(sequence_ratio_weight, {"bdpo_lambda": 0.5}, True),
    "gate": Rule(
        lambda log_probs, anchor, mask, slope, threshold: gate_weight(log_probs, mask, slope, threshold),
        {"gate_alpha": 100.0, "gate_tau": 0.05},
    ),
    "truncated_sequence_ratio": Rule(sequence_ratio_weight, anchored=True),  # what sequence_ratio is in GRPO
}
PARAMETERS = {parameter: name for name, rule in RULES.items() for parameter in rule.parameters}


def descent_rule(name: str = "ceu", **parameters: float | None) -> Weight:
    """The weight function of a rule, for [`route_descent`].

    Args:
        name: A rule of `RULES`, or the dotted path of a weight function of your own (`module.function`).
        parameters: Of the rule: ceu_scale and ceu_max_weight; constant_weight; tnpo_beta; bdpo_lambda; gate_alpha and
            gate_tau. None is the default.

    Raises:
        ValueError: for an unknown rule, a parameter that the rule does not read, or one out of range.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    own = "." in name
    if name not in RULES and not own:
        raise ValueError(f"descent_rule is {name!r}; use {', '.join(RULES)}, or the dotted path of a function.")
    reads = {} if own else RULES[name].parameters
    for key, value in given.items():
        if key not in reads:
            other = f", or set descent_rule to {PARAMETERS[key]!r}" if key in PARAMETERS else ""
            raise ValueError(f"{key} is {value}, and descent_rule {name!r} does not read it; leave it out{other}.")
    if own:
        return import_function(name, "descent_rule")
    check_ranges(**given)
    values = [given.get(key, default) for key, default in reads.items()]
    if None in values:
        missing = [*reads][values.index(None)]
        raise ValueError(f"{missing} is missing, which descent_rule {name!r} needs; give a number.")
    return functools.partial(_on_descending, name, values)


def _on_descending(
    name: str,
    parameters: list[float | None],
    log_probs: torch.Tensor,
    anchor: torch.Tensor | None,
    descending: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    rule = RULES[name]
    if anchor is None and rule.anchored:
        raise ValueError(f"descent_rule {name!r} needs an anchor, and there is none; use ceu, constant or gate.")
    return torch.where(descending, rule.weight(log_probs, anchor, mask, *parameters), 1.0)


# the route


@dataclass
class Scored:
    """One forward of TRL's fused head: what the backward pass and an evaluation need of it."""

    log_probs: torch.Tensor  # (B, T), detached
    mask: torch.Tensor  # (B, T), True at the tokens that are scored
    anchor: torch.Tensor | None = None  # (B, up to T), the last tokens; NaN where it is not known
    log_importance: torch.Tensor | None = None  # (B, up to T), of the loss's own weight, which the rule replaces


class DescentRoute:
    """A rule on one model: its forward hook, and what it met in the backward passes since it was last read.

    Args:
        weight: The weight function of the rule; None leaves every gradient as it is.
        coef: Share of the rule; the rest is stock, whose weight is 1.
        always: Act on every fused forward; else inside [`collect`] alone, so that other trainers of the model stay
            what they are.
    """

    def __init__(self, weight: Weight | None, coef: float = 1.0, always: bool = False) -> None:
        self.weight, self.coef, self.always = weight, coef, always
        self._forwards: list[Scored] | None = None
        self._record: torch.Tensor | float = 0.0  # backward passes, tokens, descending ones, the sum of their weights

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": None, "_record": 0.0}  # a copy has its own

    @contextmanager
    def collect(self) -> Iterator[list[Scored]]:
        """The forwards of one loss, in their order: of the policy, and of a reference that has this hook too."""
        self._forwards = []
        try:
            yield self._forwards
        finally:
            self._forwards = None

    @torch.compiler.disable  # dynamo would keep what the hook appends
    def __call__(self, module: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        if not kwargs.get("fused_lm_head") or (self._forwards is None and not self.always):
            return
        scored = Scored(outputs.log_probs.detach(), outputs.label_mask)
        if self.weight is not None and torch.is_grad_enabled() and outputs.log_probs.requires_grad:
            outputs.log_probs.register_hook(functools.partial(self.weigh, scored))
        if self._forwards is not None:
            self._forwards.append(scored)

    def weigh(self, scored: Scored, grad: torch.Tensor) -> torch.Tensor:
        """Return `grad` (B, T) times its weights, and record what it met: on the device, so a step never waits."""
        assert self.weight is not None
        log_probs, mask = scored.log_probs, scored.mask
        descending = (grad > 0) & mask
        anchor = None if scored.anchor is None else _aligned(scored.anchor, log_probs, math.nan)
        weights = self.weight(log_probs, anchor, descending, mask)
        if scored.log_importance is not None:
            log_importance = _aligned(scored.log_importance, log_probs, 0.0).nan_to_num(nan=0.0)
            weights = weights * (-log_importance).clamp(max=80).exp()
        weights = ((1.0 - self.coef) + self.coef * weights).expand_as(grad)
        total = weights.masked_fill(~descending, 0.0).sum()
        met = (torch.ones_like(total), mask.sum(), descending.sum(), total)
        self._record = torch.stack([each.float() for each in met]) + self._record
        return grad * torch.where(mask, weights, 1.0).to(grad.dtype)

    def pop_record(self) -> torch.Tensor | float:
        """What this process met since the last call, for `descent_metrics`; 0 without a backward pass."""
        record, self._record = self._record, 0.0
        return record

    def pop_metrics(self) -> dict[str, float]:
        """`descent_metrics` of what this process met since the last call; empty if no backward pass went through."""
        record = self.pop_record()
        return descent_metrics(record) if isinstance(record, torch.Tensor) else {}


def _aligned(values: torch.Tensor, log_probs: torch.Tensor, fill: float) -> torch.Tensor:
    """Values of the last tokens, for all: a prompt and the virtual tokens of prompt tuning stand before them."""
    if values.size(-1) == log_probs.size(-1):
        return values
    return F.pad(values, (log_probs.size(-1) - values.size(-1), 0), value=fill)


def route_descent(model: PreTrainedModel, weight: Weight | None = None, coef: float = 1.0) -> DescentRoute:
    """Attach a rule to a model that has TRL's fused LM head.

    Our trainers do it after TRL's constructor. To try a rule under another TRL trainer that reads `log_probs` from the
    fused head (RLOO, KTO), call it on `trainer.model` before `trainer.train()`. A model has one route: an earlier one
    is taken off. The reference model stays stock.

    Args:
        model: The policy as the trainer calls it (the `PeftModel` under PEFT), after `add_fused_lm_head`.
        weight: `weight(log_probs, anchor_log_probs, descending, mask)`, the weights of the tokens: 1 where a gradient
            is left alone, so that a rule may scale the ascending side too. All are tensors of shape (B, T), where
            `descending` tells which log-probabilities the step would lower, and `mask` which are scored;
            `anchor_log_probs` is None where the trainer knows no anchor. Default: `descent_rule("ceu")`.
        coef: Share of the rule from 0 to 1; the rest is stock.

    Returns:
        The route, whose `pop_metrics` tells what it met.

    Raises:
        ValueError: if coef is out of range or the model has no fused head.
    """
    check_ranges(ceu_coef=coef)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "fused_lm_head" not in inspect.signature(base.forward, follow_wrapped=False).parameters:
        raise ValueError(f"{type(base).__name__}.forward takes no fused_lm_head; call TRL's add_fused_lm_head(model).")
    for module in model.modules():
        for key, earlier in list(module._forward_hooks.items()):
            if isinstance(earlier, DescentRoute) and earlier.always:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
    route = DescentRoute((weight or descent_rule()) if coef else None, coef, always=True)
    model.register_forward_hook(route, with_kwargs=True)
    return route


def descent_metrics(record: torch.Tensor) -> dict[str, float]:
    """`ceu/descending_fraction` of the labelled tokens, and `ceu/weight_mean` over these, from a record, shape (4,)."""
    _, tokens, descending, total = record.tolist()
    return {"ceu/descending_fraction": descending / max(tokens, 1.0), "ceu/weight_mean": total / max(descending, 1.0)}


# the config and the trainer


@dataclass
class DescentConfig:
    """The fields that our configs add to their TRL parent: the rule, its share, and its parameters."""

    descent_rule: str = HfArg(
        default="ceu",
        help="Rule that weighs the gradient of tokens whose log-probability is lowered: ceu (the token's own "
        "probability), anchored (its probability relative to its anchor), constant, token_ratio (TNPO), "
        "sequence_ratio (BDPO; in GRPO TOPR), gate (Gate-DPO), or the dotted path of a weight function.",
    )
    ceu_coef: float = HfArg(default=0.5, help="Share of the rule, from 0 (stock, bit for bit TRL's) to 1 (it alone).")
    ceu_scale: float | None = HfArg(
        default=None, help="Scale s > 0 of rule ceu (default 1): larger pushes rare tokens more."
    )
    ceu_max_weight: float | None = HfArg(
        default=None,
        help="Soft cap M > 0 of rule ceu (default 1). With M <= 1 the only balance of a token that chosen and "
        "rejected responses share is at probability 1; `inf` is CE-U as published, which drives it to 1/2.",
    )
    constant_weight: float | None = HfArg(
        default=None, help="Weight of rule constant; 0, the control, trains on positives."
    )
    tnpo_beta: float | None = HfArg(default=None, help="b > 0 of rule token_ratio (default 1).")
    bdpo_lambda: float | None = HfArg(
        default=None, help="Mixture, 0 to 1, of rule sequence_ratio in DPO (default 0.5)."
    )
    gate_alpha: float | None = HfArg(default=None, help="Slope > 0 of rule gate (default 100).")
    gate_tau: float | None = HfArg(default=None, help="Probability at which rule gate is half open (default 0.05).")
    drop_descending: bool = HfArg(
        default=False, help="Old name of rule constant with constant_weight 0 and ceu_coef 1."
    )

    def __post_init__(self) -> None:
        if self.drop_descending:
            warnings.warn(
                "drop_descending is deprecated; use descent_rule='constant', constant_weight=0, ceu_coef=1.",
                FutureWarning,
                stacklevel=3,
            )
            self.descent_rule, self.constant_weight, self.ceu_coef = "constant", 0.0, 1.0
            self.drop_descending = False
        check_ranges(ceu_coef=self.ceu_coef)
        check_numbers(vars(self))
        self.weight()
        self.check()
        super().__post_init__()  # type: ignore[misc]

    def check(self) -> None:
        """Raise a ValueError for a setting that the rule cannot honour."""
        if getattr(self, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel is True, and Liger's kernels replace the forward that the route reads; leave it out, "
                "or use the Hub kernels with model_init_kwargs={'use_kernels': True}."
            )

    def weight(self) -> Weight:
        """The weight function of the rule."""
        return descent_rule(self.descent_rule, **{name: getattr(self, name) for name in PARAMETERS})

    @property
    def is_anchored(self) -> bool:
        """Whether the rule is one of ours that measures against an anchor."""
        return self.ceu_coef != 0 and self.descent_rule in RULES and RULES[self.descent_rule].anchored

    @property
    def needs_anchor(self) -> bool:
        """Whether the rule may measure against an anchor, as a function of the user's may."""
        return self.is_anchored or (self.ceu_coef != 0 and "." in self.descent_rule)


def own_config(args: Any, config_class: type, model: Any) -> Any:
    """`args`, or without any a config that writes where TRL's trainer would; a ValueError for another class."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(getattr(model, "config", None))  # type: ignore[arg-type]
        return config_class(f"{name.split('/')[-1]}-{config_class.__name__.removeprefix('CEU').removesuffix('Config')}")
    if not isinstance(args, config_class):
        raise ValueError(f"args is a {type(args).__name__}; give a {config_class.__name__}.")
    return args


class DescentTrainer:
    """Trainer mixin: takes what its parent takes, attaches the route after TRL's constructor, and logs what it met."""

    stock: type  # TRL's trainer
    config_class: type[DescentConfig]
    descent_route: DescentRoute
    _descent_record: torch.Tensor | float = 0.0  # of all processes, since the last log

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        stock: Any = cls.stock
        cls.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
        # Both papers, and no "method introduced in": neither has this trainer
        cls._paper = {"citation": f"{CITATION}\n\n{stock._paper['citation']}"}  # type: ignore[attr-defined]
        cls._name, cls._tag_names = f"CE-U {stock._name}", [*stock._tag_names, "ceu"]  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(self.stock).bind(*args, **kwargs).arguments
        given["args"] = config = own_config(given.get("args"), self.config_class, given["model"])
        self.check_given(given)
        check_language_model(given["model"], config.trust_remote_code)
        super().__init__(**given)
        trainer: Any = self
        check_language_model(trainer.model)
        route = DescentRoute(config.weight() if config.ceu_coef else None, config.ceu_coef)
        self.descent_route = route
        trainer.model.register_forward_hook(route, with_kwargs=True)
        if getattr(trainer, "ref_model", None) is not None:
            # Before the hook of FSDP2, which rounds outputs
            reference = trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
            reference.register_forward_hook(route, with_kwargs=True, prepend=True)

    def check_given(self, given: dict[str, Any]) -> None:
        """Judge the arguments before TRL's constructor gets them; it may change them."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        # Here, where every process comes by: a callback may log on one of them alone
        if accelerator.sync_gradients and self.descent_route.weight is not None:
            record = torch.zeros(4, device=loss.device) + self.descent_route.pop_record()
            record = accelerator.reduce(record, reduction="sum")
            if record[0] == 0:  # in every process, so that all end
                raise ValueError(
                    "No gradient of this step went through the route: the model was changed; build the trainer again."
                )
            self._descent_record = record + self._descent_record
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and isinstance(self._descent_record, torch.Tensor):  # type: ignore[attr-defined]
            logs.update(descent_metrics(self._descent_record))
            self._descent_record = 0.0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
