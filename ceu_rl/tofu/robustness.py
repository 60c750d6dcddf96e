"""Does it hold? What an unlearned model knows again after a few steps on the forget set.

Relearning is known to bring back what was only hidden (Hu et al. 2024, arXiv 2406.13356).
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import ProgressCallback
from trl import SFTConfig, SFTTrainer

from ..data.prompts import PromptFormat
from ..models import load_model
from .data import to_prompt_completion

BATCH_SIZE = 16


def load_to_relearn(name: str) -> Any:
    """A model with all its weights in float32, where each small step moves them; an adapter is merged into its model.

    In bfloat16 most steps of an optimizer are lost in rounding, and what comes back looks like less than it is.

    Raises:
        ValueError: for an adapter that has nothing to merge, such as tuned prompts.
    """
    model = load_model(name, torch.float32)
    if not isinstance(model, PeftModel):
        return model
    if (kind := model.active_peft_config).is_prompt_learning:
        raise ValueError(
            f"{name} is an adapter of the kind {kind.peft_type.value}, which cannot be merged into its model to be "
            "relearned; leave --relearn out."
        )
    return model.merge_and_unload().requires_grad_(True)


def relearn(
    model: Any, tokenizer: Any, rows: Dataset, prompt: PromptFormat, steps: int, learning_rate: float, seed: int = 0
) -> None:
    """Train a model on question and answer for some steps, in place: AdamW, constant rate, batches of 16.

    Args:
        model: A causal language model whose weights all train; see [`load_to_relearn`].
        tokenizer: Its tokenizer.
        rows: The forget set.
        prompt: That of the evaluation.
        steps: Of the optimizer.
        learning_rate: Of them all.
        seed: Orders the rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH_SIZE,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        args._n_gpu = 1  # several would be wrapped in DataParallel, which TRL does not support
        data = to_prompt_completion(rows, tokenizer, prompt)
        trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
