"""Accuracy of a model on a built-in task, measured by generating answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ceu_rl.builtin.model import seeded_rng
from ceu_rl.builtin.task import Messages, Task


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 512,
) -> list[str]:
    """Generate one answer for each prompt: greedy, or drawn at temperature 1 from `seed`.

    `model` is a causal language model or a PEFT model of one. Nothing outlives the call: the random state,
    the model's training mode and the tokenizer's padding side are as before.
    """
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    decoding: dict[str, Any] = {"do_sample": False}
    if sample:
        decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    answers = []
    try:
        with seeded_rng(seed, model.device):
            for start in range(0, len(texts), batch_size):
                batch = tokenizer(
                    texts[start : start + batch_size],
                    padding=True,
                    padding_side="left",
                    add_special_tokens=False,
                    return_tensors="pt",
                ).to(model.device)
                tokens = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    use_cache=True,
                    **decoding,
                )
                completions = tokens[:, batch["input_ids"].shape[1] :]
                answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def evaluate_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Messages],
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 512,
) -> float:
    """The share of prompts, 0 to 1, that the model answers correctly by the task's verifier.

    Safe in the middle of a training run: see [`generate_answers`].

    Raises:
        ValueError: if there are no prompts.
    """
    if not prompts:
        raise ValueError("There are 0 prompts to score: pass at least one.")
    answers = generate_answers(model, tokenizer, prompts, task.max_new_tokens, sample, seed, batch_size)
    return sum(map(task.is_correct, prompts, answers)) / len(answers)
