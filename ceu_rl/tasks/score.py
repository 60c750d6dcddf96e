"""Accuracy of a model on a built-in task and divergence from its start, measured by generating answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ceu_rl.models import seeded_rng
from ceu_rl.tasks.protocol import Messages, Task

Batches = list[tuple[torch.Tensor, torch.Tensor]]  # token ids of prompts and answers, see `generate_tokens`


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 512,
) -> Batches:
    """Generate one answer for each prompt: greedy, or drawn at temperature 1 from `seed`.

    `model` is a causal language model or a PEFT model of one. Nothing outlives the call: the random state,
    the model's training mode and the tokenizer's padding side are as before.

    Returns:
        For each batch the prompts, padded on the left, and the answers, padded on the right after their end token.
    """
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    decoding: dict[str, Any] = {"do_sample": False}
    if sample:
        decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    batches = []
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
                batches.append(tokens.split([width := batch["input_ids"].shape[1], tokens.shape[1] - width], dim=1))
    finally:
        model.train(was_training)
    return batches


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], max_new_tokens: int, **settings: Any
) -> list[str]:
    """The texts of [`generate_tokens`], which takes the same arguments."""
    return _texts(tokenizer, generate_tokens(model, tokenizer, prompts, max_new_tokens, **settings))


@torch.no_grad()
def evaluate_divergence(
    model: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, batches: Batches
) -> dict[str, float]:
    """Divergence from a reference and entropy on the model's own samples, in nats per token.

        KL = mean_t sum_v p(v) log(p(v) / p_ref(v))        H = -mean_t sum_v p(v) log p(v)

    with p and p_ref given the prompt and the sampled tokens before t, and the mean over the tokens of all answers, the
    end token included: the sum over v is exact, and only the prefixes are sampled.

    Args:
        model: What drew the samples.
        reference: The model before training.
        tokenizer: Of both.
        batches: What [`generate_tokens`] returned for `sample=True`.
    """
    was_training, total, count = model.training, torch.zeros(2, dtype=torch.float64), 0
    model.eval()
    try:
        for prompts, answers in batches:
            ends = (answers == tokenizer.eos_token_id).long()
            kept = ends.cumsum(dim=1) - ends == 0  # up to the end token
            mask = torch.cat([prompts != tokenizer.pad_token_id, kept], dim=1).long()
            inputs = {
                "input_ids": torch.cat([prompts, answers], dim=1),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            }
            log_p, log_ref = (
                one(**inputs, use_cache=False).logits[:, prompts.shape[1] - 1 : -1][kept].double().log_softmax(dim=-1)
                for one in (model, reference)
            )
            p = log_p.exp()
            total += torch.stack([(p * (log_p - log_ref)).sum(), -(p * log_p).sum()]).cpu()
            count += len(p)
    finally:
        model.train(was_training)
    divergence, entropy = (total / count).tolist()
    return {"kl": divergence, "sampled_entropy": entropy}


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

    Safe in the middle of a training run: see [`generate_tokens`].

    Raises:
        ValueError: if there are no prompts.
    """
    if not prompts:
        raise ValueError("There are 0 prompts to score: pass at least one.")
    settings: dict[str, Any] = {"sample": sample, "seed": seed, "batch_size": batch_size}
    batches = generate_tokens(model, tokenizer, prompts, task.max_new_tokens, **settings)
    return _accuracy(tokenizer, task, prompts, batches)


def evaluate_samples(
    model: Any, reference: Any, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[Messages], seed: int
) -> dict[str, float]:
    """`sampled_accuracy` as [`evaluate_accuracy`] gives it, and [`evaluate_divergence`] of the same samples."""
    batches = generate_tokens(model, tokenizer, prompts, task.max_new_tokens, sample=True, seed=seed)
    accuracy = _accuracy(tokenizer, task, prompts, batches)
    return {"sampled_accuracy": accuracy, **evaluate_divergence(model, reference, tokenizer, batches)}


def _accuracy(tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[Messages], batches: Batches) -> float:
    return sum(map(task.is_correct, prompts, _texts(tokenizer, batches))) / len(prompts)


def _texts(tokenizer: PreTrainedTokenizerBase, batches: Batches) -> list[str]:
    return [text for _, answers in batches for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
