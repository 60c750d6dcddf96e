"""Does it hold? What an unlearned model knows again after a few steps on the forget set, or with rounded weights.

Both are known to bring back what was only hidden: relearning (Hu et al. 2024, arXiv 2406.13356) and quantisation (Zhang
et al. 2024, arXiv 2410.16454).
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, ProgressCallback
from trl import SFTConfig, SFTTrainer

from ..data.prompts import PromptFormat
from ..models import load_model, resolve_model
from .data import to_prompt_completion

BATCH_SIZE = 16


def load_to_relearn(name: str) -> Any:
    """A model, an adapter merged into it, in float32: in bfloat16 rounding loses most small steps."""
    model = load_model(name, torch.float32)
    return model.merge_and_unload().requires_grad_(True) if isinstance(model, PeftModel) else model


def relearn(model: Any, tokenizer: Any, rows: Dataset, prompt: PromptFormat, steps: int, learning_rate: float) -> None:
    """Train what [`load_to_relearn`] gave on question and answer, in place: AdamW, constant rate, batches of 16."""
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
            seed=0,
        )
        args._n_gpu = 1  # several would be wrapped in DataParallel, which TRL does not support
        data = to_prompt_completion(rows, tokenizer, prompt)
        trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.train()


def load_quantized(name: str, bits: str, dtype: torch.dtype) -> Any:
    """A model with the weights of its linear layers, the head apart, rounded by torchao: one scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    four: Any = IntxWeightOnlyConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
    config = TorchAoConfig(Int8WeightOnlyConfig() if bits == "int8" else four)
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), quantization_config=config, dtype=dtype)
