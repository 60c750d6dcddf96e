"""Asynchronous GRPO whose push on falling tokens fades; experimental, as TRL's trainer is.

Rollouts come from a server that works while the trainer learns, and are up to `max_staleness` syncs of weights old. TRL
folds the rollouts of a step into a prefix trie, in which a token that several completions share is forwarded once; the
route therefore weighs the net gradient of a shared token, by its sign.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .losses import anchor_log_ratio
from .route import DescentConfig, DescentTrainer  # which refuses another TRL, where the next may not be

# isort: split
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from .run.checkpoints import WholeCheckpoints
from .run.checks import StopAtNonFinite
from .run.engines import Float32Outputs


@dataclass
class CEUAsyncGRPOConfig(DescentConfig, AsyncGRPOConfig):
    """`trl.experimental.async_grpo.AsyncGRPOConfig` and the rule of the descending tokens, by default half of CE-U's.

    `weight_sync_steps` is TRL's own. Rules of a whole response (sequence_ratio, gate) are refused: in TRL's trie of
    rollouts a token belongs to several.

    Raises:
        ValueError: for an unknown rule, a parameter out of range or one that the rule does not read, or
            `use_liger_kernel`.
    """

    def check(self) -> None:
        super().check()
        if self.ceu_coef and self.descent_rule in ("sequence_ratio", "gate"):
            raise ValueError(
                f"descent_rule is {self.descent_rule!r}, which weighs whole responses, and asynchronous GRPO folds "
                "them into a trie; use ceu, anchored, token_ratio or constant."
            )


class CEUAsyncGRPOTrainer(DescentTrainer, StopAtNonFinite, WholeCheckpoints, Float32Outputs, AsyncGRPOTrainer):
    """TRL's experimental `AsyncGRPOTrainer` whose descending tokens get the weight of a rule (arXiv 2503.01224).

    It takes the same arguments; its kernel and its own worker need a GPU and a vLLM server. It logs
    `ceu/descending_fraction` and `ceu/weight_mean`. With `ceu_coef` 0 it trains the same weights as
    TRL's, bit for bit.

    Raises:
        ValueError: before any step, for a model without a language-model head.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUAsyncGRPOConfig
    stock, config_class = AsyncGRPOTrainer, CEUAsyncGRPOConfig

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.descent_route.collect() as forwards:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.args.needs_anchor:
            # A token that several rollouts share stands once in the trie, with what one of them was sampled from
            selected = inputs["token_index"] >= 0
            anchor = torch.full_like(forwards[0].log_probs, torch.nan).flatten()
            anchor[inputs["token_index"][selected]] = inputs["old_log_probs"][selected].to(anchor.dtype)
            forwards[0].anchor = anchor = anchor.view_as(forwards[0].log_probs)
            if self.args.is_anchored:
                forwards[0].log_importance = anchor_log_ratio(forwards[0].log_probs, anchor)
        return loss
