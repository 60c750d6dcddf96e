"""GRPO whose push on completions with a negative advantage fades as their tokens fall."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.hf_argparser import HfArg
from trl import GRPOConfig, GRPOTrainer

from .data.prompts import prompt_ids
from .data.rows import check_layout
from .losses import anchor_log_ratio
from .rollouts import ReloadingVLLMGeneration
from .route import DescentConfig, DescentTrainer, Scored, Weight, descent_rule
from .run.checkpoints import WholeCheckpoints
from .run.checks import RolloutError, StopAtNonFinite, check_reference_is_loaded
from .run.engines import Float32Outputs, is_asked_for
from .run.errors import NameCause, note, note_once


@dataclass
class CEUGRPOConfig(DescentConfig, GRPOConfig):
    """`trl.GRPOConfig` and the rule of the descending tokens, by default half of CE-U's weight.

    With the whole weight (`ceu_coef` 1) GRPO learned more slowly than stock wherever stock learned, with half of it
    about as fast on-policy (docs/results/grpo.md).

    Raises:
        ValueError: for an unknown rule, a parameter out of range or one that the rule does not read, settings that
            would count an importance ratio twice, `use_liger_kernel`, or a `weight_sync_steps` below 1, without vLLM or
            with its sleep mode.
    """

    weight_sync_steps: int = HfArg(
        default=1,
        help="Steps between two syncs of vLLM's weights, which are up to one step less than that old; 1 is "
        "TRL's behaviour. vllm_importance_sampling_correction stays as it is set. An evaluation syncs too.",
    )

    def check(self) -> None:
        super().check()
        steps = self.weight_sync_steps
        if type(steps) is not int or steps < 1:
            raise ValueError(f"weight_sync_steps is {steps}; use a whole number from 1, which syncs before each step.")
        if steps > 1 and (not self.use_vllm or self.vllm_enable_sleep_mode):
            raise ValueError(
                f"weight_sync_steps is {steps} with use_vllm {self.use_vllm} and vllm_enable_sleep_mode "
                f"{self.vllm_enable_sleep_mode}; set True and False, or leave weight_sync_steps out."
            )
        if self.bdpo_lambda is not None:
            raise ValueError(f"bdpo_lambda is {self.bdpo_lambda}, and sequence_ratio is TOPR in GRPO; leave it out.")
        if not self.is_anchored:
            return
        # The rule replaces TRL's importance weight, which it must know
        for name, value, allowed in (
            ("importance_sampling_level", self.importance_sampling_level, ("token",)),
            ("loss_type", self.loss_type, ("grpo", "bnpo", "dr_grpo", "dapo")),
            ("beta", self.beta, (0.0,)),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r}, and descent_rule {self.descent_rule!r} replaces TRL's importance weight, "
                    f"which it knows for {' or '.join(map(repr, allowed))} alone; use that."
                )

    def weight(self) -> Weight:
        """The weight function of the rule; sequence_ratio is TOPR's."""
        return super().weight() if self.descent_rule != "sequence_ratio" else descent_rule("truncated_sequence_ratio")

    @property
    def cuts_distribution(self) -> bool:
        """Whether vLLM samples from a part of the distribution, whose probabilities are not the policy's."""
        return self.use_vllm and (self.top_p < 1 or (self.top_k or 0) > 0 or bool(self.min_p))


class CEUGRPOTrainer(DescentTrainer, StopAtNonFinite, WholeCheckpoints, Float32Outputs, GRPOTrainer):
    """`trl.GRPOTrainer` whose descending tokens get the weight of a rule; nothing else changes (arXiv 2503.01224).

    A token descends where the loss lowers its log-probability: in completions with a negative advantage, unless
    clipping or the KL term says otherwise. With `ceu_coef` 0 it trains the same weights as `trl.GRPOTrainer`, bit for
    bit, from the same rollouts. It takes the same arguments, and a `CEUGRPOConfig`.

    The anchor of a rule is the token's probability under what generated it: vLLM's, else the policy's when the rollouts
    came. A rule that measures against it (anchored, token_ratio, sequence_ratio) replaces TRL's importance weight:
    descending tokens get the rule's, ascending ones 1. TRL's clip and masks still decide which tokens have a gradient.
    It logs what `route.descent_metrics` returns.

    Raises:
        ValueError: before any step, for a dataset without rows or without `prompt`, or a model without a
            language-model head.
        RolloutError: at the step whose rewards or rollouts cannot be used, with the function or what failed.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUGRPOConfig
    stock, config_class = GRPOTrainer, CEUGRPOConfig
    vllm_generation: ReloadingVLLMGeneration

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.use_vllm:
            self._name_what_moves_samples()
        else:
            self.vllm_generation.__class__ = ReloadingVLLMGeneration
            self.vllm_generation.period = self.args.weight_sync_steps
            self.vllm_generation.clock = lambda: self.state.global_step

    def check_given(self, given: dict[str, Any]) -> None:
        config: CEUGRPOConfig = given["args"]
        for role in ("train", "eval"):
            dataset = given.get(f"{role}_dataset")
            if isinstance(dataset, dict):
                given[f"{role}_dataset"] = {name: self._check_rows(one, name, given) for name, one in dataset.items()}
            elif dataset is not None:
                given[f"{role}_dataset"] = self._check_rows(dataset, role, given)
        if config.needs_anchor and not self._knows_behaviour(given):
            raise ValueError(
                f"descent_rule {config.descent_rule!r} measures a token against what generated it, and these rollouts "
                "are the policy's own; set use_vllm to True, raise steps_per_generation, or choose another rule."
            )
        if config.needs_anchor and config.cuts_distribution:
            note(
                "top_p, top_k or min_p cuts what vLLM samples from, so its probabilities are no anchor; the policy's "
                "when the rollouts came are taken where TRL computes them."
            )
        adapts = given.get("peft_config") is not None or isinstance(given["model"], PeftModel)
        check_reference_is_loaded(needs_reference=config.beta != 0 and not adapts)
        if not config.use_vllm:
            return
        if adapts and (is_asked_for("FSDP") or config.fsdp_plugin_args is not None):
            raise ValueError("use_vllm with an adapter under FSDP is not tested; leave one of the three out.")

    def _check_rows(self, dataset: Any, name: str, given: dict[str, Any]) -> Any:
        """The layout check; an environment's `reset` may give the prompts or their words, which TRL then judges."""
        if name == "train" and "completions" in (getattr(dataset, "column_names", None) or ()):
            raise ValueError("The train dataset has 'completions'; use OfflineGRPOTrainer, or remove the column.")
        return dataset if given.get("environment_factory") else check_layout(dataset, name, "prompt")

    @staticmethod
    def _knows_behaviour(given: dict[str, Any]) -> bool:
        """Whether TRL keeps the log-probabilities of what generates the completions."""
        config: CEUGRPOConfig = given["args"]
        every = (config.steps_per_generation or 1) * config.num_iterations
        aligned = config.gradient_accumulation_steps % every == 0
        return config.use_vllm or not aligned or given.get("rollout_func") is not None

    def _name_what_moves_samples(self) -> None:
        """What `generate` fills in from the model's own config, as in stock, though TRL never asked for it."""
        own = (getattr(self.model, "generation_config", None) or GenerationConfig()).to_diff_dict()
        plain = GenerationConfig._get_default_generation_params() | {"max_length": own.get("max_length")}
        brought = {
            name: value
            for name, value in own.items()
            if getattr(self.generation_config, name, "") is None and value not in (None, False, plain.get(name))
            if not name.startswith(("_", "output_", "cache_")) and not name.endswith(("token_id", "_version"))
        }
        if brought:
            note(
                f"The model's own generation_config brings {brought}, so its rollouts are not the policy's own; set "
                "these fields to None in it if you did not mean them."
            )

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, *rest = super()._tokenize_prompts(prompts)
        if isinstance(prompts[0], str) and ids[0] != prompt_ids(self._tokenizer, prompts[0]):
            note_once("The tokenizer ends a prompt with its end token, and completions follow it; turn that off there.")
        return ids, *rest

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        with self.descent_route.collect() as forwards:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        if self.args.needs_anchor:
            self._set_anchor(forwards[0], inputs)
        return loss

    def _set_anchor(self, policy: Scored, inputs: Any) -> None:
        """Give the rule its anchor, and what takes TRL's own importance weight out of the gradient."""
        sampled, old = inputs.get("sampling_per_token_logps"), inputs.get("old_per_token_logps")
        anchor = old if sampled is None or (self.args.cuts_distribution and old is not None) else sampled
        log_probs = policy.log_probs[:, -inputs["completion_ids"].size(1) :]
        if anchor is None:
            if policy.log_probs.requires_grad:
                note_once("The probabilities of what generated these rollouts are not known, so every weight is 1.")
            anchor = log_probs
        if anchor.shape != log_probs.shape:
            raise RolloutError(
                f"The rollouts have log-probabilities of shape {tuple(anchor.shape)}; give {tuple(log_probs.shape)}."
            )
        policy.anchor = anchor
        if self.args.is_anchored:
            log_weight = torch.zeros_like(log_probs) if old is None else anchor_log_ratio(log_probs, old)
            if self.args.use_vllm and self.args.vllm_importance_sampling_correction:
                log_weight = log_weight + inputs["importance_sampling_ratio"].log()
            policy.log_importance = log_weight

    def close(self) -> None:
        """End the colocated vLLM engine, if there is one: in every process, at the end of a script.

        It must come before `torch.distributed.destroy_process_group`, which vLLM's exit does for itself.
        """
        if self.use_vllm:
            self.vllm_generation.shutdown()

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        remedy = "return a finite number for each completion, or None for one that it cannot judge."
        with NameCause(f"The reward function {' or '.join(self.reward_func_names)}", remedy, RolloutError):
            rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            if column.isinf().any():
                raise RolloutError(f"The reward function {name} returned an infinite number; {remedy}")
        return rewards
