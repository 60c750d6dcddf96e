"""GRPO with CE-U in the place of the gradient ascent on completions with a negative advantage."""

import functools
import inspect
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import Module
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from .data.load import check_layout
from .offline_grpo import (
    COLUMNS,
    PREFIX,
    LoggedRollouts,
    check_tokens,
    has_log_probs,
    is_logged,
    logged,
    take_logged,
)
from .rollouts import ReloadingVLLMGeneration, check_rewards, check_vllm, drift_by_sign, name_vllm_settings
from .route import CITATION, DescentConfig, DescentTrainer
from .run.checkpoints import WholeCheckpoints
from .run.checks import (
    StopAtNonFinite,
    check_choices,
    check_language_model,
    check_numbers,
    check_reference_is_loaded,
    note,
)
from .run.engines import Float32Outputs

CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


@dataclass
class CEUGRPOConfig(DescentConfig, GRPOConfig):
    """`trl.GRPOConfig` and the three coefficients of the descent weight, of which half is CE-U by default.

    With the whole weight (`ceu_coef` 1) GRPO learned more slowly than stock wherever stock learned, with half of it
    about as fast on-policy (docs/results/grpo.md).

    Raises:
        ValueError: for a coefficient outside its range, `use_liger_kernel`, or a `weight_sync_steps` below 1, without
            vLLM or with its sleep mode.
        ImportError: for a version of TRL that this package was not tested with.
    """

    weight_sync_steps: int = field(
        default=1,
        metadata={
            "help": "Steps between two syncs of vLLM's weights, which are up to one step less than that old; 1 is "
            "TRL's behaviour. vllm_importance_sampling_correction stays as it is set. An evaluation syncs too."
        },
    )

    def check(self) -> None:
        super().check()
        steps = self.weight_sync_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"weight_sync_steps is {steps}; use a whole number from 1, which syncs before each step.")
        if steps > 1 and not self.use_vllm:
            raise ValueError(
                f"weight_sync_steps is {steps} and use_vllm is False: the model itself then generates, and is never "
                "behind; set use_vllm to True, or leave weight_sync_steps out."
            )
        if steps > 1 and self.vllm_enable_sleep_mode:
            raise ValueError(
                f"weight_sync_steps is {steps} and vllm_enable_sleep_mode is True, which discards the engine's weights "
                "after each generation; set one of the two to its default."
            )


class CEUGRPOTrainer(DescentTrainer, StopAtNonFinite, WholeCheckpoints, Float32Outputs, GRPOTrainer):
    """`trl.GRPOTrainer` whose descending tokens get the CE-U weight; nothing else changes (arXiv 2503.01224).

    A token descends where the loss lowers its log-probability: in completions with a negative advantage, unless
    clipping or the KL term says otherwise. With `ceu_coef` 0 it trains the same weights as `trl.GRPOTrainer`, bit for
    bit: the route then only looks on. It takes the same arguments, and logs what `routing.descent_metrics` returns, and
    with vLLM `rollout/age_mean`, `rollout/age_max` (steps between the weights that generated and those that learn) and
    `rollout/sync_seconds`. Where the log-probabilities of what generated are known, it logs how far the policy has
    moved from it, apart for tokens of positive and of negative advantage: `rollout/ratio_positive`,
    `rollout/ratio_negative`, `rollout/mismatch_positive` and `rollout/mismatch_negative` (`rollouts.drift_by_sign`).

    A train dataset with `completions` and `rewards` (and `log_probs`) is learned from offline, without generating, as
    `logged.py` says. `reward_funcs` then score evaluations on prompts alone, and may be left out.

    Raises:
        ValueError: before any step, for a dataset without rows or without `prompt`, or a model without a
            language-model head.
        RolloutError: at the step whose reward or prompt cannot be used, with the function or row.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUGRPOConfig
    vllm_generation: ReloadingVLLMGeneration
    _tag_names = ["trl", "grpo", "ceu"]
    _name = "CE-U GRPO"
    # Both, and no "method introduced in": neither paper has this trainer
    _paper = {"citation": f"{CITATION}\n\n{GRPOTrainer._paper['citation']}"}

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs)
        given = bound.arguments
        given["args"] = config = CEUGRPOConfig.adopt(given.get("args"), given["model"])
        self._offline = "completions" in (getattr(given.get("train_dataset"), "column_names", None) or [])
        for role in ("train", "eval"):
            generations = config.num_generations if role == "train" else config.num_generations_eval
            check = functools.partial(
                _check_rows,
                prompted=given.get("environment_factory") is None,
                generations=(generations or config.num_generations) if self._offline else None,
            )
            if isinstance(dataset := given.get(f"{role}_dataset"), dict):
                given[f"{role}_dataset"] = {name: check(one, name) for name, one in dataset.items()}
            elif dataset is not None:
                given[f"{role}_dataset"] = check(dataset, role)
        _check_prompts(given.get("train_dataset"), config)
        check_numbers(vars(config))
        self.rollout_rows: Any = []  # those that are being answered
        if self._offline:
            _check_offline(given)
            rewards = given.get("reward_funcs") or []
            given["reward_funcs"] = [logged, *(rewards if isinstance(rewards, list) else [rewards])]
            weights = config.reward_weights
            if weights is not None and len(weights) != len(given["reward_funcs"]):
                raise ValueError(
                    f"reward_weights is {weights}; give {len(given['reward_funcs'])} numbers, the first for the logged "
                    "rewards and one for each of reward_funcs."
                )
            if isinstance(given.get("reward_processing_classes"), list):
                given["reward_processing_classes"] = [None, *given["reward_processing_classes"]]
            given["rollout_func"] = LoggedRollouts()
        check_choices(config, CHOICES)
        _check_generation(config)
        check_language_model(given["model"], config.trust_remote_code)
        adapts = given.get("peft_config") is not None or isinstance(given["model"], PeftModel)
        check_reference_is_loaded(needs_reference=config.beta != 0 and not adapts)
        if config.use_vllm:
            check_vllm(adapts)
        with name_vllm_settings():
            super().__init__(*bound.args[1:], **bound.kwargs)
        if config.use_vllm:
            self.vllm_generation.__class__ = ReloadingVLLMGeneration
            self.vllm_generation.period = config.weight_sync_steps
            self.vllm_generation.clock = lambda: self.state.global_step
        self._ages: list[int] = []
        check_language_model(self.model)
        columns = getattr(self.train_dataset, "column_names", None) or []
        if not isinstance(self.processing_class, ProcessorMixin):
            for column in {"image", "images"} & set(columns):
                raise ValueError(
                    f"The train dataset has a column {column!r}, and {type(self.model).__name__} reads text alone; "
                    "remove the column, or rename it."
                )
        self.attach_route(observe=True)
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **held_out}.items():
            if is_logged(dataset):
                check_tokens(dataset, name, self)

    @property
    def _is_training(self) -> bool:
        model: Any = self.model
        return model.training

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self._is_training and self.use_vllm and self.vllm_generation.rollout_step is not None:
            self._ages.append(self.state.global_step - self.vllm_generation.rollout_step)
        return inputs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = outputs[0].detach()
        return outputs

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        generated = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        # A `rollout_func` need not know the probabilities, and may give something in their place
        if self._is_training and generated is not None and generated.shape == self._log_probs.shape:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            sums = drift_by_sign(self._log_probs, generated, inputs["advantages"], mask)
            sums = self.accelerator.reduce(sums, reduction="sum")
            for sign, (count, ratio, mismatch) in zip(("positive", "negative"), sums.tolist(), strict=True):
                self._metrics["train"][f"rollout/ratio_{sign}"].append(ratio / count if count else math.nan)
                self._metrics["train"][f"rollout/mismatch_{sign}"].append(mismatch / count if count else math.nan)
        del self._log_probs
        return loss

    def _generate(self, prompts: list[Any]) -> Any:
        given = self.rollout_func
        if self._offline and not is_logged(self.rollout_rows):  # an evaluation by generating
            self.rollout_func = None
        try:
            return super()._generate(prompts)
        finally:
            self.rollout_func = given

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self.rollout_rows = inputs
        outputs = super()._generate_and_score_completions(inputs)
        if self._offline and is_logged(inputs):
            # The ratio is that to what wrote the completions, and without log-probabilities of the policy it is 1
            outputs.pop("old_per_token_logps", None)
            if "sampling_per_token_logps" in outputs:
                outputs["old_per_token_logps"] = outputs["sampling_per_token_logps"]
        return outputs

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*columns, *({PREFIX + column for column in COLUMNS} - set(columns))]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_training and self._ages:
            logs["rollout/age_mean"] = sum(self._ages) / len(self._ages)
            logs["rollout/age_max"] = max(self._ages)
            logs["rollout/sync_seconds"], self.vllm_generation.sync_seconds = self.vllm_generation.sync_seconds, 0.0
            self._ages = []
        super().log(logs, *args, **kwargs)

    def close(self) -> None:
        """End the colocated vLLM engine, if there is one: in every process, at the end of a script.

        It must come before `torch.distributed.destroy_process_group`, which vLLM's exit does for itself.
        """
        if self.use_vllm:
            self.vllm_generation.shutdown()

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        given: list[Any] = self.reward_funcs
        self.reward_funcs = [
            reward if isinstance(reward, Module) else check_rewards(reward, name)
            for reward, name in zip(given, self.reward_func_names, strict=True)
        ]
        if self._offline and is_logged(self.rollout_rows):  # logged completions have their rewards
            self.reward_funcs[1:] = [_no_rewards] * (len(given) - 1)
        try:
            return super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = given

    def describe_rows(self, inputs: Any) -> list[str]:
        # TRL hands each step the rows of a whole generation, each row once for every completion
        prompts: dict[str, int | None] = {str(row.get("prompt", row)): None for row in inputs}
        if isinstance(self.train_dataset, Dataset) and "prompt" in self.train_dataset.column_names:
            for number, prompt in enumerate(self.train_dataset["prompt"]):
                if str(prompt) in prompts:
                    prompts[str(prompt)] = number
        return [f"row {number} ({textwrap.shorten(prompt, 60)!r})" for prompt, number in prompts.items()]


def _no_rewards(prompts: list[Any], **kwargs: Any) -> list[float | None]:
    return [None] * len(prompts)


def _check_generation(config: GRPOConfig) -> None:
    """Refuse what generation would only meet in the first step."""
    for name in ("chat_template_kwargs", "generation_kwargs"):
        if not isinstance(value := getattr(config, name) or {}, Mapping):
            raise ValueError(f"{name} is {value!r}; give a mapping, such as {{name: value}}.")
    for name in ("num_return_sequences", "n"):
        if name in (config.generation_kwargs or {}):
            raise ValueError(f"generation_kwargs has {name}, which num_generations sets; set that, and leave it out.")


def _check_offline(given: dict[str, Any]) -> None:
    """Refuse what cannot be honoured where completions are logged."""
    config = given["args"]
    for name in ("rollout_func", "environment_factory", "tools"):
        if given.get(name):
            raise ValueError(f"{name} is given, and the train dataset brings its completions; leave one of them out.")
    if config.use_vllm:
        raise ValueError(
            "use_vllm is True, and the train dataset brings its completions, so nothing is generated; set it to False."
        )
    held_out = given.get("eval_dataset")
    sets = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
    if not given.get("reward_funcs") and not all(rows is None or is_logged(rows) for rows in sets):
        raise ValueError(
            "The eval dataset has no 'completions', so they are generated, and nothing scores them; give reward_funcs, "
            "or completions and rewards."
        )
    if config.off_policy_mask_threshold is not None and not has_log_probs(given["train_dataset"]):
        raise ValueError(
            f"off_policy_mask_threshold is {config.off_policy_mask_threshold}, and the train dataset has no "
            "'log_probs', without which it is not known how far the policy has moved; add them, or leave it out."
        )


def _check_rows(dataset: Any, name: str, prompted: bool, generations: int | None) -> Any:
    """The layout check, which spares a dataset without prompts where an environment's `reset` gives them.

    With `generations` the dataset may bring as many completions for each row.
    """
    if generations is not None:
        dataset = take_logged(dataset, name, generations)
    if prompted or "prompt" in (getattr(dataset, "column_names", None) or ["prompt"]):
        return check_layout(dataset, name, "prompt", blank_user=not prompted)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset has no rows; give it at least one.")
    return dataset


def _check_prompts(dataset: Any, args: GRPOConfig) -> None:
    """Refuse a dataset from which no batch of generations can be made, and say what a partial one drops.

    TRL takes the prompts of one generation together, and leaves a last, smaller batch of them out of every epoch.
    """
    if not isinstance(dataset, Dataset):
        return
    batch, generations = args.generation_batch_size or 1, args.num_generations or 1
    prompts = batch // generations
    if len(dataset) < prompts:
        raise ValueError(
            f"The train dataset has {len(dataset)} prompts, and one generation takes {prompts}: a batch of {batch} "
            f"completions (generation_batch_size) with {generations} for each prompt (num_generations). So no step "
            "would be trained; give more prompts, or lower per_device_train_batch_size or steps_per_generation."
        )
    note(
        f"The train dataset has {len(dataset)} prompts, of which one generation takes {prompts}: "
        f"{len(dataset) % prompts} are left out of each epoch."
    )
