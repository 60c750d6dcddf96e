"""DPO with CE-U in the place of the gradient ascent on rejected responses."""

import functools
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from .checks import (
    StopAtNonFinite,
    check_columns,
    check_completions,
    check_language_model,
    check_reference_is_loaded,
    check_shared_cache,
)
from .routing import DescentConfig, DescentTrainer

COMPLETIONS = ("chosen", "rejected")


@dataclass
class CEUDPOConfig(DescentConfig, DPOConfig):
    """`trl.DPOConfig` and the three coefficients of the descent weight.

    The defaults, `ceu_coef = ceu_scale = ceu_max_weight = 1`, weigh each descending token by its own probability.

    Raises:
        ValueError: for a coefficient outside its range, or `use_liger_kernel`.
        ImportError: for a version of TRL that this package was not tested with.
    """


class CEUDPOTrainer(DescentTrainer, StopAtNonFinite, DPOTrainer):
    """`trl.DPOTrainer` whose descending tokens get the CE-U weight; nothing else changes (arXiv 2503.01224).

    It takes the same arguments. After TRL's constructor it attaches `routing.route_descent` to the policy, with the
    coefficients of `args` (a plain `trl.DPOConfig` means the defaults of `CEUDPOConfig`). With `ceu_coef` 0 it trains
    the same weights as `trl.DPOTrainer`, bit for bit. It logs `ceu/descending_fraction`, `ceu/weight_mean` and
    `ceu/weight_max`.

    Raises:
        ValueError: before any step, for a dataset without rows, a column that is missing, an empty completion, rows
            whose prompt alone fills `max_length`, or a model without a language-model head.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUDPOConfig
    _tag_names = ["trl", "dpo", "ceu"]
    _name = "CE-U DPO"
    _paper = {
        "citation": textwrap.dedent("""\
            @article{yang2025ceu,
                title  = {{CE-U: Cross Entropy Unlearning}},
                author = {Bo Yang},
                year   = 2025,
                eprint = {arXiv:2503.01224},
            }""")
    }

    @functools.wraps(DPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs)
        given = bound.arguments
        given["args"] = config = CEUDPOConfig.adopt(given.get("args"))
        if given.get("train_dataset") is not None:
            check_columns(given["train_dataset"], "train", COMPLETIONS)
            check_shared_cache(given["train_dataset"], config.world_size if config.precompute_ref_log_probs else 1)
        check_language_model(given["model"], config.trust_remote_code)
        adapts = given.get("peft_config") is not None or isinstance(given["model"], PeftModel)
        check_reference_is_loaded(needs_reference=not adapts)
        super().__init__(*bound.args[1:], **bound.kwargs)
        check_language_model(self.model)
        self.attach_route()

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Dataset | IterableDataset:
        check_columns(dataset, dataset_name, COMPLETIONS)
        dataset = check_completions(dataset, dataset_name, COMPLETIONS, args.dataset_num_proc)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if next(iter(prepared), None) is None:
            raise ValueError(
                f"Every prompt of the {dataset_name} dataset has max_length ({args.max_length}) tokens or more, which "
                "leaves no completion to learn from; raise max_length."
            )
        return prepared

    def describe_rows(self, inputs: Mapping[str, Any]) -> list[str]:
        chosen, mask = inputs["input_ids"].chunk(2)[0], inputs["attention_mask"].chunk(2)[0]
        batch = [tuple(ids[kept.bool()].tolist()) for ids, kept in zip(chosen, mask, strict=True)]
        numbers = {}
        if isinstance(self.train_dataset, Dataset) and "prompt_ids" in self.train_dataset.column_names:
            for number, row in enumerate(self.train_dataset.select_columns(["prompt_ids", "chosen_ids"])):
                ids = tuple((row["prompt_ids"] + row["chosen_ids"])[: self.args.max_length])
                if ids in batch:
                    numbers[ids] = number
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in batch]
        return [
            f"row {numbers.get(ids, 'unknown')} ({textwrap.shorten(text, 60)!r})"
            for ids, text in zip(batch, texts, strict=True)
        ]
