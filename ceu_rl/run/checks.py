"""What is refused before the first step, and what stops a run that went wrong: one sentence, with the value seen.

`StopAtNonFinite` is mixed into the trainers; the functions are called by their constructors.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoConfig, GenerationMixin
from transformers.integrations import is_fsdp_enabled

from .checkpoints import saved_checkpoints

# What TRL, accelerate and PEFT find too late, by another name, or not at all; what they refuse by its name before the
# first step (a negative learning_rate, lora_r 0, max_completion_length 0) is left to them
POSITIVE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"),
    *("generation_batch_size", "steps_per_generation", "num_generations", "num_generations_eval", "num_iterations"),
    *("temperature", "repetition_penalty", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "discopop_tau"),
    *("ref_model_sync_steps", "pad_to_multiple_of", "lora_alpha", "eval_steps", "save_steps"),
)
NOT_NEGATIVE = (
    *("weight_decay", "beta", "epsilon", "epsilon_high", "off_policy_mask_threshold", "logging_steps"),
    *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    *("beta2", "forget_weight", "retain_weight", "ignore_first_n_answer_tokens"),
)
SHARES = (
    *("top_p", "min_p", "top_entropy_quantile", "ld_alpha", "ref_model_mixup_alpha", "lora_dropout"),
    "label_smoothing",
)
BOUNDS = ("ceu_max_weight", "max_grad_norm", "delta", "epsilon_high", "vllm_importance_sampling_clip_max")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for a number with which training would end somewhere in a dependency, or silently be wrong."""
    for name, value in settings.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, int | float):
                continue
            wanted = ""
            if not math.isfinite(number) and not (name in BOUNDS and number == math.inf):
                wanted = "a finite number"
            elif name in POSITIVE and number <= 0:
                wanted = "a number above 0"
            elif name in SHARES and not 0 <= number <= 1:
                wanted = "a number from 0 to 1"
            elif name in NOT_NEGATIVE and number < 0:
                wanted = "a number from 0"
            elif name == "top_k" and number < -1:
                wanted = "a number above 0, or 0 for no limit"
            elif name == "max_steps" and (number == 0 or number < -1):
                wanted = "a number above 0, or -1 for num_train_epochs"
            elif name == "num_train_epochs" and number <= 0 and settings.get("max_steps", -1) == -1:
                wanted = "a number above 0, or give max_steps"
            if wanted:
                raise ValueError(f"{name} is {number}; use {wanted}.")


def check_choices(args: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise a ValueError for a setting that TRL would refuse only in the loss of the first step."""
    for name, allowed in choices.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}.")


def check_language_model(model: Any, trust_remote_code: bool = False) -> None:
    """Raise a ValueError unless TRL's fused LM head fits: a decoder with a language-model head.

    `model` is a model or its path; a path is judged by its configuration, before any weight is loaded.
    """
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:  # it comes with the checkpoint, and is judged once it is loaded
            return
    else:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        config, kind = getattr(base, "config", None), type(base)
    if config is None or not issubclass(kind, GenerationMixin) or config.is_encoder_decoder:
        raise ValueError(f"{kind.__name__} is not a decoder with a language-model head; use a causal language model.")
    if isinstance(model, PeftModel) and isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise ValueError(
            "trainable_token_indices changes the model's head (or tied weights), which TRL's fused head does not see; "
            "leave it out, or train the embeddings whole with modules_to_save."
        )


def check_reference_is_loaded(needs_reference: bool) -> None:
    """Raise a ValueError where FSDP would leave the reference model empty on every process but the first.

    Only the first process reads weights. TRL's trainers send the policy's to the others, and not the reference's.
    """
    if needs_reference and is_fsdp_enabled():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, which leaves the reference model without weights on every "
            "process but the first, and its log-probabilities wrong; set it to false in the accelerate config."
        )


class StopAtNonFinite:
    """Trainer mixin: a step with a non-finite loss or gradient ends the run, before it reaches the weights.

    Raises:
        FloatingPointError: with the step and the last good checkpoint. Under float16 mixed precision gradients overflow
            as part of loss scaling, so there only the loss is checked.
    """

    _losses: list[torch.Tensor] = []  # of the micro-batches since the last step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._losses = [*self._losses, loss]
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]  # its backward pass may already step
            self._check_losses()
        return loss

    def _check_losses(self) -> None:
        # Together: to read each would make the host wait for the device at each micro-batch
        losses = torch.stack([loss.mean() for loss in self._losses])
        if not (finite := losses.isfinite()).all():
            self._stop(f"loss ({losses[~finite][0].item()})")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once before each optimizer step, whether or not gradients are clipped
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._check_losses()
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(grad_norm)).all():  # type: ignore[attr-defined]
            self._stop(f"gradient (norm {float(grad_norm)})")
        self._losses = []
        return grad_norm

    def _stop(self, what: str) -> None:
        step: int = self.state.global_step  # type: ignore[attr-defined]
        output_dir: str = self.args.output_dir  # type: ignore[attr-defined]
        # The checkpoint of this very step holds the weights that failed
        good = [path for number, path in saved_checkpoints(output_dir) if number < step]
        fix = f"There is no earlier checkpoint in {output_dir}: start again"
        if good:
            fix = f"The last good checkpoint is {good[-1]}: start a new run with it as model_name_or_path,"
        raise FloatingPointError(
            f"Step {step + 1} met a non-finite {what} and was not applied. {fix} with a lower learning_rate."
        )


class RolloutError(ValueError):
    """A rollout or its reward cannot be used; the message names the cause and the row or function."""
