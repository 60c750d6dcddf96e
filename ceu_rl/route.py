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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import trl
from packaging.specifiers import SpecifierSet
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from .losses import (
    anchored_weight,
    check_ranges,
    descent_weight,
    gate_weight,
    sequence_ratio_weight,
    token_ratio_weight,
)
from .run.errors import import_function

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")
RECORD = 10  # numbers that a route keeps of what it met
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
        raise ValueError(
            f"descent_rule is {name!r}; use one of {', '.join(RULES)}, or the dotted path of a function of your own."
        )
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
        raise ValueError(
            f"descent_rule {name!r} measures each token against an anchor, and this trainer knows none; use ceu, "
            "constant or gate."
        )
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
        observe: Record what the backward passes meet without a rule as well.
        always: Act on every fused forward; else inside [`collect`] alone, so that other trainers of the model stay
            what they are.
    """

    def __init__(self, weight: Weight | None, coef: float = 1.0, observe: bool = False, always: bool = False) -> None:
        self.weight, self.coef, self.observe, self.always = weight, coef, observe, always
        self._forwards: list[Scored] | None = None
        self._record: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": None, "_record": None}  # a copy has its own

    @property
    def records(self) -> bool:
        """Whether gradients pass through it."""
        return self.observe or self.weight is not None

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
        if self.records and torch.is_grad_enabled() and outputs.log_probs.requires_grad:
            outputs.log_probs.register_hook(functools.partial(self.weigh, scored))
        if self._forwards is not None:
            self._forwards.append(scored)

    def weigh(self, scored: Scored, grad: torch.Tensor) -> torch.Tensor | None:
        """Return `grad` (B, T) times its weights, or None to leave it, and record what it met.

        Recording stays on the device, so a step never waits for it.
        """
        log_probs, mask = scored.log_probs, scored.mask
        descending = (grad > 0) & mask
        weighed, weights = grad, torch.ones_like(log_probs)
        if self.weight is not None:
            anchor = None if scored.anchor is None else _aligned(scored.anchor, log_probs, math.nan)
            weights = self.weight(log_probs, anchor, descending, mask)
            if scored.log_importance is not None:
                log_importance = _aligned(scored.log_importance, log_probs, 0.0).nan_to_num(nan=0.0)
                weights = weights * (-log_importance).clamp(max=80).exp()
            weights = ((1.0 - self.coef) + self.coef * weights).expand_as(grad)
            weighed = grad * torch.where(mask, weights, 1.0).to(grad.dtype)
        descended = weights.masked_fill(~descending, 0.0)
        rare, sure = log_probs < math.log(0.01), log_probs > math.log(0.99)
        groups = torch.stack([mask, descending, descending & rare, descending & sure]).flatten(1).float()
        norms = weighed.abs().float() * -torch.expm1(log_probs).clamp(max=0).float()
        largest = descended.max() if descended.numel() else descended.sum()
        over_weights = torch.stack([descended.sum(), largest]).float()
        record = torch.cat([groups.sum(dim=1), (groups * norms.flatten()).sum(dim=1), over_weights])
        self._record = merge_records(self._record, record)
        return None if self.weight is None else weighed

    def pop_record(self) -> torch.Tensor | None:
        """What this process met since the last call, for `merge_records` and `descent_metrics`, or None."""
        record, self._record = self._record, None
        return record

    def pop_metrics(self) -> dict[str, float]:
        """`descent_metrics` of what this process met since the last call; empty if no backward pass went through."""
        record = self.pop_record()
        return {} if record is None else descent_metrics(record)


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
        ImportError: if TRL is of another version than the one whose fused head this was written for.
    """
    check_trl_version()
    check_ranges(ceu_coef=coef)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "fused_lm_head" not in inspect.signature(base.forward, follow_wrapped=False).parameters:
        raise ValueError(
            f"{type(base).__name__}.forward takes no fused_lm_head, so there are no log-probabilities to route; "
            "call trl.trainer.utils.add_fused_lm_head(model) first, as TRL's trainers do."
        )
    for module in model.modules():
        for key, earlier in list(module._forward_hooks.items()):
            if isinstance(earlier, DescentRoute) and earlier.always:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
    route = DescentRoute((weight or descent_rule()) if coef else None, coef, always=True)
    model.register_forward_hook(route, with_kwargs=True)
    return route


def merge_records(*records: torch.Tensor | None) -> torch.Tensor:
    """One record of several of shape (RECORD,). The last number is a maximum, the others are sums."""
    stacked = torch.stack([record for record in records if record is not None])
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


def check_trl_version() -> None:
    """Raise an ImportError unless TRL is of a version whose fused LM head this package was tested with."""
    if trl.__version__ not in SUPPORTED_TRL:
        raise ImportError(
            f"trl is {trl.__version__}, and its fused LM head is not a stable interface; "
            f"install a tested version: pip install 'trl{SUPPORTED_TRL}'."
        )


# the config and the trainer


@dataclass
class DescentConfig:
    """The fields that our configs add to their TRL parent: the rule, its share, and its parameters."""

    descent_rule: str = field(
        default="ceu",
        metadata={
            "help": "Rule that weighs the gradient of tokens whose log-probability is lowered: ceu (the token's own "
            "probability), anchored (its probability relative to its anchor), constant, token_ratio (TNPO), "
            "sequence_ratio (BDPO; in GRPO TOPR), gate (Gate-DPO), or the dotted path of a weight function."
        },
    )
    ceu_coef: float = field(
        default=0.5,
        metadata={"help": "Share of the rule, from 0 (stock, bit for bit TRL's trainer) to 1 (the rule alone)."},
    )
    ceu_scale: float | None = field(
        default=None,
        metadata={"help": "Scale s > 0 of rule ceu (default 1, CE-U's own): larger pushes rare tokens harder."},
    )
    ceu_max_weight: float | None = field(
        default=None,
        metadata={
            "help": "Soft cap M > 0 of rule ceu (default 1). With M <= 1 the only balance of a token that chosen and "
            "rejected responses share is at probability 1; `inf` is CE-U as published, which drives it to 1/2."
        },
    )
    constant_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of rule constant; 0 trains on positives only, the control for every other rule."},
    )
    tnpo_beta: float | None = field(default=None, metadata={"help": "b > 0 of rule token_ratio (default 1)."})
    bdpo_lambda: float | None = field(
        default=None, metadata={"help": "Mixture between 0 and 1 of rule sequence_ratio in DPO (default 0.5)."}
    )
    gate_alpha: float | None = field(default=None, metadata={"help": "Slope > 0 of rule gate (default 100)."})
    gate_tau: float | None = field(
        default=None, metadata={"help": "Probability at which rule gate is half open (default 0.05)."}
    )
    drop_descending: bool = field(
        default=False, metadata={"help": "Old name of descent_rule constant with constant_weight 0 and ceu_coef 1."}
    )

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()  # type: ignore[misc]

    def check(self) -> None:
        """Raise a ValueError for a rule or parameter that cannot be honoured."""
        check_trl_version()
        if self.drop_descending:
            warnings.warn(
                "drop_descending is deprecated; use descent_rule='constant', constant_weight=0, ceu_coef=1.",
                FutureWarning,
                stacklevel=4,
            )
            self.descent_rule, self.constant_weight, self.ceu_coef = "constant", 0.0, 1.0
            self.drop_descending = False
        check_ranges(ceu_coef=self.ceu_coef)
        self.weight()
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

    @classmethod
    def given(cls, args: Any, model: Any) -> Any:
        """Return `args`, or, where there are none, a default config that writes where TRL's trainer would.

        Raises:
            ValueError: for a config of another class, TRL's own included.
        """
        parent = cls.__mro__[2].__name__
        if args is None:
            config: Any = getattr(model, "config", None)
            name = model if isinstance(model, str) else get_config_model_id(config)
            return cls(f"{name.split('/')[-1]}-{parent.removesuffix('Config')}")  # type: ignore[call-arg]
        if not isinstance(args, cls):
            raise ValueError(
                f"args is a {type(args).__name__}; give a {cls.__name__}, which takes what a {parent} takes."
            )
        args.check()
        return args


class DescentTrainer:
    """Trainer mixin: attaches the route after TRL's constructor and logs what it met."""

    descent_route: DescentRoute
    _descent_record: torch.Tensor | None = None  # of all processes, since the last log

    def attach_route(self, observe: bool = False) -> None:
        """Attach the rule of `self.args` to the policy, and see the forwards of a reference model."""
        trainer: Any = self
        args: DescentConfig = trainer.args
        self.descent_route = DescentRoute(args.weight() if args.ceu_coef else None, args.ceu_coef, observe)
        trainer.model.register_forward_hook(self.descent_route, with_kwargs=True)
        if getattr(trainer, "ref_model", None) is not None:
            # Before the hook of FSDP2, which rounds outputs
            reference = trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
            reference.register_forward_hook(self.descent_route, with_kwargs=True, prepend=True)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        # Here, where every process comes by: a callback may log on one of them alone
        if accelerator.sync_gradients and self.descent_route.records:
            record = self.descent_route.pop_record()
            record = torch.full((RECORD,), -1.0, device=loss.device) if record is None else record
            records = accelerator.gather(record).view(-1, RECORD)
            if (records < 0).all() and self.descent_route.weight is not None:  # in every process, so that all end
                raise ValueError(
                    "No gradient of this step went through the descent route: the model was wrapped or replaced after "
                    "this trainer was built; build it again."
                )
            self._descent_record = merge_records(self._descent_record, *records.clamp(min=0))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and self._descent_record is not None:  # type: ignore[attr-defined]
            logs.update(descent_metrics(self._descent_record))
            self._descent_record = None
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
