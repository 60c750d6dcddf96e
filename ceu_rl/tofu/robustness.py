"""Does it hold? What an unlearned model knows again after a few steps on the forget set, or with rounded weights.

Both are known to bring back what was only hidden: relearning (Hu et al. 2024, arXiv 2406.13356) and quantisation (Zhang
et al. 2024, arXiv 2410.16454).
"""

import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, ProgressCallback
from trl import SFTConfig, SFTTrainer

from ..data.prompts import PromptFormat
from ..models import load_model, resolve_model
from .data import to_prompt_completion

BITS = ("int8", "int4")
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


def load_quantized(name: str, bits: str, dtype: torch.dtype) -> Any:
    """A model with the weights of its linear layers, the head apart, rounded by torchao: one scale for each row.

    Raises:
        ValueError: for other `bits` than int8 and int4.
        ImportError: without torchao.
    """
    check_quantizer(bits)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    four: Any = IntxWeightOnlyConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
    config = TorchAoConfig(Int8WeightOnlyConfig() if bits == "int8" else four)
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), quantization_config=config, dtype=dtype)


def check_quantizer(bits: str) -> None:
    """Raise what [`load_quantized`] would, before anything is loaded."""
    if bits not in BITS:
        raise ValueError(f"quantize is {bits!r}; use {' or '.join(BITS)}.")
    if find_spec("torchao") is None:
        raise ImportError(f"quantize is {bits!r} and torchao is not installed; install torchao, or leave quantize out.")
