"""Asynchronous GRPO with CE-U in the place of the gradient ascent; experimental, as TRL's trainer is.

Rollouts come from a server that works while the trainer learns, and are up to `max_staleness` syncs of weights old. TRL
folds the rollouts of a step into a prefix trie, in which a token that several completions share is forwarded once; the
route therefore weighs the net gradient of a shared token, by its sign.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from .route import CITATION, DescentConfig, DescentTrainer, check_trl_version
from .run.checkpoints import WholeCheckpoints
from .run.checks import StopAtNonFinite, check_language_model, check_numbers
from .run.engines import Float32Outputs

check_trl_version()  # before an import that another version may not have
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer  # noqa: E402


@dataclass
class CEUAsyncGRPOConfig(DescentConfig, AsyncGRPOConfig):
    """`trl.experimental.async_grpo.AsyncGRPOConfig` and the coefficients of the descent weight, half CE-U by default.

    `weight_sync_steps` is TRL's own.

    Raises:
        ValueError: for a coefficient outside its range, or `use_liger_kernel`.
        ImportError: for a version of TRL that this package was not tested with.
    """


class CEUAsyncGRPOTrainer(DescentTrainer, StopAtNonFinite, WholeCheckpoints, Float32Outputs, AsyncGRPOTrainer):
    """TRL's experimental `AsyncGRPOTrainer` whose descending tokens get the CE-U weight (arXiv 2503.01224).

    It takes the same arguments; its kernel and its own worker need a GPU and a vLLM server. It logs
    `ceu/descending_fraction`, `ceu/weight_mean` and `ceu/weight_max`. With `ceu_coef` 0 it trains the same weights as
    TRL's, bit for bit.

    Raises:
        ValueError: before any step, for a model without a language-model head.
        ImportError: for a version of TRL that this package was not tested with.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUAsyncGRPOConfig
    _tag_names = ["trl", "async-grpo", "ceu"]
    _name = "CE-U AsyncGRPO"
    _paper = {"citation": f"{CITATION}\n\n{AsyncGRPOTrainer._paper['citation']}"}

    @functools.wraps(AsyncGRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(AsyncGRPOTrainer.__init__).bind(self, *args, **kwargs)
        given = bound.arguments
        given["args"] = config = CEUAsyncGRPOConfig.given(given.get("args"), given["model"])
        check_numbers(vars(config))
        check_language_model(given["model"], config.trust_remote_code)
        super().__init__(*bound.args[1:], **bound.kwargs)
        self.attach_route(observe=True)

    def describe_rows(self, inputs: Any) -> list[str]:
        # The trie holds each token of the batch once, so that rows cannot be told apart
        ids = inputs["input_ids"][inputs["attention_mask"].bool()]
        text = self.processing_class.decode(ids, skip_special_tokens=True)  # type: ignore[union-attr]
        return [f"{len(ids)} tokens of rollouts that begin with {text[:60]!r}"]
