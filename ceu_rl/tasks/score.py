"""Accuracy of a model on a task and divergence from its start, measured by generating answers."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .generate import Tokens, answer_logits, answer_texts, evaluating, generate_tokens, in_batches, plan_forwards
from .protocol import Task, right_answer

Row = Mapping[str, Any]
LONGEST = 512  # most tokens of an answer where neither the task nor its rows set a limit
DIVERGED = 2  # samples of each row whose divergence is computed: each costs a pass of two models
DOUBLES = 2**22  # most logits at once in float64


@torch.no_grad()
def evaluate_divergence(model: Any, reference: Any, rows: Sequence[tuple[Tokens, Tokens]]) -> dict[str, float]:
    """Divergence from a reference and entropy at given answers, such as the model's own samples, in nats per token.

        KL = mean_t sum_v p(v) log(p(v) / p_ref(v))        H = -mean_t sum_v p(v) log p(v)

    with p and p_ref given the prompt and the answer's tokens before t, and the mean over the tokens of all answers, the
    end token included: the sum over v is exact, and only the prefixes are sampled. `rows` has the tokens of each prompt
    and answer. Every rank must call.
    """
    most = max(1, DOUBLES // model.config.get_text_config().vocab_size)

    def diverge(places: list[int]) -> list[torch.Tensor]:
        batch = [rows[place] for place in places]
        found = []
        for pair in zip(*(answer_logits(one, batch, model.device) for one in (model, reference)), strict=True):
            total = torch.zeros(2, dtype=torch.float64)
            for few in zip(*(logits.split(most) for logits in pair), strict=True):
                # Finite also for tokens that a model rules out
                log_p, log_ref = (each.double().log_softmax(dim=-1).clamp(min=-1e4) for each in few)
                p = log_p.exp()
                total += torch.stack([(p * (log_p - log_ref)).sum(), -(p * log_p).sum()]).cpu()
            found.append(total)
        return found

    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    with evaluating(model):
        totals = in_batches(plan_forwards(model, lengths, models=2), diverge)
    divergence, entropy = (torch.stack(totals).sum(dim=0) / sum(len(answer) for _, answer in rows)).tolist()
    return {"kl": divergence, "sampled_entropy": entropy}


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
        from 2 up to the number of samples; with a reference also [`evaluate_divergence`] of the first two of the same
        samples. And the same of each row: `greedy` (0 or 1), `sampled` (the share of right samples) and `pass@k`.
    """
    count, longest = task.samples, task.max_new_tokens
    if longest is None:
        answers = [answer for row in rows if (answer := right_answer(row)) is not None]
        lengths = [len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids] if answers else []
        longest = min(max(lengths, default=LONGEST) + 1, LONGEST)
    chats = [row["prompt"] for row in rows]
    asked: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    prompts = asked["input_ids"]
    greedy = generate_tokens(model, tokenizer, prompts, longest)
    drawn = generate_tokens(model, tokenizer, prompts, longest, sample=True, seed=seed, samples=count)
    questions = []
    for row, answers in zip(rows, map(operator.add, greedy, drawn), strict=True):
        found, *samples = [task.score(row, text) >= 1 for text in answer_texts(model, tokenizer, answers)]
        passes = {f"pass@{k}": pass_at_k(count, sum(samples), k) for k in (2**n for n in range(1, count.bit_length()))}
        questions.append({"greedy": float(found), "sampled": sum(samples) / count, **passes})
    means = {name: sum(each[name] for each in questions) / len(questions) for name in questions[0]}
    scores = {f"{name}_accuracy" if name in ("greedy", "sampled") else name: mean for name, mean in means.items()}
    if reference is not None:
        pairs = [(ids, each) for ids, answers in zip(prompts, drawn, strict=True) for each in answers[:DIVERGED]]
        scores |= evaluate_divergence(model, reference, pairs)
    return scores, questions
