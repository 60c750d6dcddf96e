"""Accuracy of a model on a task and divergence from its start, measured by generating answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ceu_rl.models import end_token_ids, seeded_rng
from ceu_rl.tasks.protocol import Messages, Task, right_answer

Row = Mapping[str, Any]
LONGEST = 512  # most tokens of an answer where neither the task nor its rows set a limit
DIVERGED = 2  # samples of each row whose divergence is computed: each costs a pass of two models
LOGITS = 2**25  # most logits that one forward pass of `evaluate_divergence` returns, beyond those of one answer
DOUBLES = 2**22  # most of them at once in float64


class Batch(NamedTuple):
    """Prompts (batch, prompt length), padded on the left, and answers (batch, samples, length), padded on the right.

    A mask is 1 for what counts: all of the prompt, and the answer up to its first end token, that one included.
    """

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    answers: torch.Tensor
    answer_mask: torch.Tensor


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 512,
    samples: int = 1,
) -> list[Batch]:
    """Generate `samples` answers to each prompt: greedy, or drawn at temperature 1 from `seed`.

    A prompt is read once for all its answers, of which a batch has `batch_size`. `model` is a causal language model or
    a PEFT model of one; an answer ends with any of the tokens that [`ceu_rl.models.end_token_ids`] names. Nothing
    outlives the call: the random state, the model's training mode and the tokenizer's padding side are as before.
    """
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    decoding: dict[str, Any] = {"do_sample": False}
    if sample:
        decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ends, was_training = end_token_ids(model, tokenizer), model.training
    model.eval()
    batches = []
    try:
        with seeded_rng(seed, model.device):
            for start in range(0, len(texts), at_once := max(1, batch_size // samples)):
                batch = tokenizer(
                    texts[start : start + at_once],
                    padding=True,
                    padding_side="left",
                    add_special_tokens=False,
                    return_tensors="pt",
                ).to(model.device)
                prompts_read = batch["input_ids"], batch["attention_mask"]
                tokens = model.generate(
                    **dict(zip(("input_ids", "attention_mask"), _copies(prompts_read, samples), strict=True)),
                    past_key_values=_read(model, *prompts_read, samples),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends or None,
                    use_cache=True,
                    **decoding,
                )
                answers = tokens[:, batch["input_ids"].shape[1] :].unflatten(0, (-1, samples))
                ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
                mask = (ended.cumsum(dim=-1) - ended == 0).long()
                batches.append(Batch(*prompts_read, answers, mask))
    finally:
        model.train(was_training)
    return batches


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], max_new_tokens: int, **settings: Any
) -> list[str]:
    """The texts of [`generate_tokens`], which takes the same arguments."""
    return _texts(model, tokenizer, generate_tokens(model, tokenizer, prompts, max_new_tokens, **settings))


def _texts(model: Any, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Batch]) -> list[str]:
    ends = torch.tensor(end_token_ids(model, tokenizer), device=model.device)
    return [
        str(tokenizer.decode(answer[mask.bool() & ~torch.isin(answer, ends)], skip_special_tokens=True))
        for batch in batches
        for answer, mask in zip(batch.answers.flatten(0, 1), batch.answer_mask.flatten(0, 1), strict=True)
    ]


@torch.no_grad()
def evaluate_divergence(model: Any, reference: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Divergence from a reference and entropy on the model's own samples, in nats per token.

        KL = mean_t sum_v p(v) log(p(v) / p_ref(v))        H = -mean_t sum_v p(v) log p(v)

    with p and p_ref given the prompt and the sampled tokens before t, and the mean over the tokens of all answers, the
    end token included: the sum over v is exact, and only the prefixes are sampled. It is computed a few answers at a
    time, so that a large vocabulary takes little memory.

    Args:
        model: What drew the samples.
        reference: The model before training.
        batches: What [`generate_tokens`] returned for `sample=True`.
    """
    was_training, total, count = model.training, torch.zeros(2, dtype=torch.float64), 0
    vocabulary = model.config.get_text_config().vocab_size
    model.eval()
    try:
        for batch in batches:
            at_once = max(1, LOGITS // (batch.answers[0].numel() * vocabulary))
            for part in zip(*(each.split(at_once) for each in batch), strict=True):
                logits = [_answer_logits(one, Batch(*part)) for one in (model, reference)]
                count += len(logits[0])
                for few in zip(*(each.split(max(1, DOUBLES // vocabulary)) for each in logits), strict=True):
                    # Finite also for tokens that a model rules out
                    log_p, log_ref = (each.double().log_softmax(dim=-1).clamp(min=-1e4) for each in few)
                    p = log_p.exp()
                    total += torch.stack([(p * (log_p - log_ref)).sum(), -(p * log_p).sum()]).cpu()
    finally:
        model.train(was_training)
    divergence, entropy = (total / count).tolist()
    return {"kl": divergence, "sampled_entropy": entropy}


def _answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """What predicts each token of the answers that counts, (tokens, vocabulary)."""
    samples, width = batch.answers.shape[1], batch.prompts.shape[1]
    answers, kept = batch.answers.flatten(0, 1), batch.answer_mask.flatten(0, 1)
    prompts, prompt_mask = _copies((batch.prompts, batch.prompt_mask), samples)
    mask = torch.cat([prompt_mask, kept], dim=1)
    logits = model(
        input_ids=torch.cat([prompts, answers], dim=1)[:, width - 1 : -1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, width - 1 : -1],
        past_key_values=_read(model, batch.prompts, batch.prompt_mask, samples),
        use_cache=True,
    ).logits
    return logits[kept.bool()]


def _read(model: Any, prompts: torch.Tensor, mask: torch.Tensor, samples: int) -> Any:
    """What the model keeps of each prompt but for its last token, once for every sample."""
    past = model(
        input_ids=prompts[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    past.batch_repeat_interleave(samples)
    return past


def _copies(tensors: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    return [each.repeat_interleave(samples, dim=0) for each in tensors]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, without bias from `samples` of which `right` are (Chen et al. 2021,
    arXiv 2107.03374, equation 1): 1 - C(samples - right, k) / C(samples, k).

    Raises:
        ValueError: if k is not one of 1 to the number of samples, or `right` not one of 0 to it.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples; use a k from 1, and draw at least as many.")
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} samples cannot be right; count from 0 to {samples}.")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def evaluate_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], **settings: Any
) -> float:
    """The share of rows, 0 to 1, whose prompt the model answers right by the task's verifier.

    Safe in the middle of a training run: see [`generate_tokens`], which takes the same settings.

    Raises:
        ValueError: if there are no rows.
    """
    right = _right(model, tokenizer, task, rows, _generate(model, tokenizer, task, rows, **settings))
    return sum(right) / len(right)


def evaluate_samples(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], seed: int, reference: Any = None
) -> dict[str, float]:
    """`sampled_accuracy` and `pass@k` of `task.samples` answers to each row, drawn at temperature 1.

    k is each power of two up to the number of samples; pass@1 is the sampled accuracy and not repeated. With a
    reference, also [`evaluate_divergence`] of the first two of the same samples.

    Raises:
        ValueError: if there are no rows.
    """
    count = task.samples
    batches = _generate(model, tokenizer, task, rows, sample=True, seed=seed, samples=count)
    right = _right(model, tokenizer, task, [row for row in rows for _ in range(count)], batches)
    found = [sum(right[start : start + count]) for start in range(0, len(right), count)]
    scores = {"sampled_accuracy": sum(found) / len(right)}
    for k in (2**power for power in range(1, count.bit_length())):
        scores[f"pass@{k}"] = sum(pass_at_k(count, each, k) for each in found) / len(found)
    if reference is not None:
        few = [Batch(*batch[:2], *(each[:, :DIVERGED] for each in batch[2:])) for batch in batches]
        scores |= evaluate_divergence(model, reference, few)
    return scores


def _generate(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], **settings: Any) -> list[Batch]:
    if not rows:
        raise ValueError("There are 0 rows to score: pass at least one.")
    longest = task.max_new_tokens
    if longest is None:
        answers = [answer for row in rows if (answer := right_answer(row)) is not None]
        lengths = [len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids] if answers else []
        longest = min(max(lengths, default=LONGEST) + 1, LONGEST)
    return generate_tokens(model, tokenizer, [row["prompt"] for row in rows], longest, **settings)


def _right(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], batches: Sequence[Batch]) -> list[bool]:
    return [task.score(row, text) >= 1 for row, text in zip(rows, _texts(model, tokenizer, batches), strict=True)]
