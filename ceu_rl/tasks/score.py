"""Accuracy of a model on a task and divergence from its start, measured by generating answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ceu_rl.models import end_token_ids
from ceu_rl.tasks.generate import (
    Batch,
    answers_in_order,
    copies,
    forward_bytes,
    generate_tokens,
    plan_batches,
    positions,
    read_prompts,
    share,
)
from ceu_rl.tasks.protocol import Messages, Task, right_answer

Row = Mapping[str, Any]
LONGEST = 512  # most tokens of an answer where neither the task nor its rows set a limit
DIVERGED = 2  # samples of each row whose divergence is computed: each costs a pass of two models
DOUBLES = 2**22  # most logits at once in float64


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], max_new_tokens: int, **settings: Any
) -> list[str]:
    """The texts of [`ceu_rl.tasks.generate.generate_tokens`], which takes the same settings, for conversations."""
    return _texts(model, tokenizer, _answer(model, tokenizer, prompts, max_new_tokens, **settings))


def _answer(model: Any, tokenizer: Any, prompts: Sequence[Messages], longest: int, **settings: Any) -> list[Batch]:
    ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]
    return generate_tokens(model, tokenizer, ids, longest, **settings)


def _texts(model: Any, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Batch]) -> list[str]:
    ends = set(end_token_ids(model, tokenizer))
    answers = answers_in_order(batches)
    return [
        str(tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True))
        for ids in answers
    ]


@torch.no_grad()
def evaluate_divergence(model: Any, reference: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Divergence from a reference and entropy on the model's own samples, in nats per token.

        KL = mean_t sum_v p(v) log(p(v) / p_ref(v))        H = -mean_t sum_v p(v) log p(v)

    with p and p_ref given the prompt and the sampled tokens before t, and the mean over the tokens of all answers, the
    end token included: the sum over v is exact, and only the prefixes are sampled. Every rank must call.

    Args:
        model: What drew the samples.
        reference: The model before training.
        batches: What [`generate_tokens`] returned for `sample=True`.
    """
    was_training, vocabulary = model.training, model.config.get_text_config().vocab_size
    each = 2 * forward_bytes(model)  # of two models

    def diverge(batch: Batch) -> tuple[torch.Tensor, int]:
        logits = [_answer_logits(one, batch) for one in (model, reference)]
        total = torch.zeros(2, dtype=torch.float64)
        for few in zip(*(each.split(max(1, DOUBLES // vocabulary)) for each in logits), strict=True):
            # Finite also for tokens that a model rules out
            log_p, log_ref = (each.double().log_softmax(dim=-1).clamp(min=-1e4) for each in few)
            p = log_p.exp()
            total += torch.stack([(p * (log_p - log_ref)).sum(), -(p * log_p).sum()]).cpu()
        return total, len(logits[0])

    model.eval()
    try:
        found = share([part for batch in batches for part in _split(batch, each)], diverge)
    finally:
        model.train(was_training)
    total, count = torch.stack([total for total, _ in found]).sum(dim=0), sum(count for _, count in found)
    divergence, entropy = (total / count).tolist()
    return {"kl": divergence, "sampled_entropy": entropy}


def _split(batch: Batch, token_bytes: int) -> list[Batch]:
    """A batch in parts that take little memory; a prompt is cached, and only the answers have logits."""
    tokens = batch.answers[0].numel()
    parts = plan_batches([tokens] * len(batch.answers), lambda length: length * token_bytes, batch.answers.device)
    return [batch.part(places) for places in parts]


def _answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """What predicts each token of the answers that counts, (tokens, vocabulary)."""
    samples, width = batch.answers.shape[1], batch.prompts.shape[1]
    answers, kept = batch.answers.flatten(0, 1), batch.answer_mask.flatten(0, 1)
    prompts, prompt_mask = copies((batch.prompts, batch.prompt_mask), samples)
    mask = torch.cat([prompt_mask, kept], dim=1)
    logits = model(
        input_ids=torch.cat([prompts, answers], dim=1)[:, width - 1 : -1],
        attention_mask=mask[:, :-1],
        position_ids=positions(mask)[:, width - 1 : -1],
        past_key_values=read_prompts(model, batch.prompts, batch.prompt_mask, samples),
        use_cache=True,
    ).logits
    return logits[kept.bool()]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of pass@k, the chance that one of k answers is right: 1 - C(n - c, k) / C(n, k).

    n is the number of samples, of which c are right, and k is at most n (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def evaluate_task(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], seed: int, reference: Any = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Score the greedy answer to each row's prompt, and `task.samples` answers drawn at temperature 1.

    Safe in the middle of a training run, see [`ceu_rl.tasks.generate.generate_tokens`]. An answer is right where the
    task's verifier gives 1.

    Returns:
        The means over the rows, each 0 to 1: `greedy_accuracy`, `sampled_accuracy` and `pass@k` for each power of two
        up to the number of samples (pass@1 is the sampled accuracy, and not repeated); with a reference also
        [`evaluate_divergence`] of the first two of the same samples. And the same of each row: `greedy` (0 or 1),
        `sampled` (the share of right samples) and `pass@k`.

    Raises:
        ValueError: if there are no rows.
    """
    count = task.samples
    greedy = _right(model, tokenizer, task, rows, _generate(model, tokenizer, task, rows))
    batches = _generate(model, tokenizer, task, rows, sample=True, seed=seed, samples=count)
    right = _right(model, tokenizer, task, [row for row in rows for _ in range(count)], batches)
    questions = []
    for place, found in enumerate(greedy):
        drawn = sum(right[place * count : (place + 1) * count])
        passes = {f"pass@{k}": pass_at_k(count, drawn, k) for k in (2**power for power in range(1, count.bit_length()))}
        questions.append({"greedy": float(found), "sampled": drawn / count, **passes})
    means = {name: sum(each[name] for each in questions) / len(questions) for name in questions[0]}
    scores = {f"{name}_accuracy" if name in ("greedy", "sampled") else name: mean for name, mean in means.items()}
    if reference is not None:
        scores |= evaluate_divergence(model, reference, [batch.part(samples=DIVERGED) for batch in batches])
    return scores, questions


def _generate(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], **settings: Any) -> list[Batch]:
    if not rows:
        raise ValueError("There are 0 rows to score: pass at least one.")
    longest = task.max_new_tokens
    if longest is None:
        answers = [answer for row in rows if (answer := right_answer(row)) is not None]
        lengths = [len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids] if answers else []
        longest = min(max(lengths, default=LONGEST) + 1, LONGEST)
    return _answer(model, tokenizer, [row["prompt"] for row in rows], longest, **settings)


def _right(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], batches: Sequence[Batch]) -> list[bool]:
    return [task.score(row, text) >= 1 for row, text in zip(rows, _texts(model, tokenizer, batches), strict=True)]
