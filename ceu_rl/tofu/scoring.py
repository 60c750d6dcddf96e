"""What a model makes of every token of every answer, from one forward pass in batches of similar length."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from ..data.answer_spans import part_answer, template_edges
from ..data.prompts import PromptFormat
from ..models import end_token_ids
from ..run.progress import Progress
from ..tasks.generate import (
    answers_in_order,
    forward_bytes,
    generate_tokens,
    generate_with_vllm,
    plan_batches,
    share,
)
from . import metrics
from .answer_cache import AnswerCache
from .data import check_row, tokenize


@dataclass
class Answer:
    """One answer to score: where it stands, its tokens, and after the pass what the model makes of it."""

    config: str
    row: int
    kind: str  # answer, paraphrase or perturbed
    number: int  # among those of its row
    text: str
    question_ids: list[int]  # what the model generates from
    added_ids: list[int] = field(default_factory=list)  # what the template writes before every answer
    completion_ids: list[int] = field(default_factory=list)  # up to its end token
    text_length: int = 0  # tokens before the end token
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.config}/{self.row}/{self.kind}/{self.number}"

    @property
    def prompt_ids(self) -> list[int]:
        return self.question_ids + self.added_ids

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def log_prob(self) -> float:
        """l(y), the mean log-probability of a token."""
        return self.scores["log_prob"]


WhenScored = Callable[[Sequence[Answer]], None]
WhenGenerated = Callable[[Sequence[Answer], list[str]], None]


def make_answers(
    datasets: Mapping[str, Dataset], tokenizer: Any, prompt: PromptFormat, ends: Sequence[int]
) -> list[Answer]:
    """The answers of all rows: correct, paraphrased and perturbed.

    Raises:
        ValueError: with the row, for one without what its config needs, and as [`check_row`] does.
    """
    made = []
    for config, dataset in datasets.items():
        for index, row in enumerate(dataset):
            where, perturbed = f"row {index} of {config}", row.get("perturbed_answer") or []
            if not isinstance(perturbed, list) or (config.endswith("_perturbed") and not perturbed):
                raise ValueError(f"The perturbed_answer of {where} is {perturbed!r:.80}; give a list of wrong answers.")
            texts = [("answer", row["answer"]), *(("perturbed", text) for text in perturbed)]
            if row.get("paraphrased_answer") is not None:
                texts.append(("paraphrase", row["paraphrased_answer"]))
            edges = None
            for number, (kind, text) in enumerate(texts):
                check_row(tokenizer, prompt, row["question"], text, where)
                pair = prompt.row(row["question"], text)
                if edges is None:  # the same for all answers to a question
                    kwargs = pair.get("chat_template_kwargs", {})
                    edges = template_edges(tokenizer, pair["prompt"], pair["completion"], **kwargs)
                asked, completion = tokenize(tokenizer, pair)
                ids = asked + completion
                parts = part_answer(ids, len(asked), edges, ends)
                added, answer = ids[parts.prompt : parts.content], ids[parts.content : parts.stop]
                length = max(parts.end - parts.content, 1)
                made.append(Answer(config, index, kind, number, text, asked, added, answer, length))
    return made


def check_context(model: Any, answers: Sequence[Answer], generated: int | None = None, setting: str = "") -> None:
    """Raise a ValueError, with the row, for one that the model's context would cut off.

    Args:
        model: A causal language model.
        answers: What is scored, or whose question is answered.
        generated: Most tokens of such an answer. None: the answers are scored.
        setting: What sets that.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [each.length if generated is None else len(each.question_ids) + generated for each in answers]
    if context is None or max(lengths) <= context:
        return
    longest = answers[lengths.index(max(lengths))]
    with_setting, lower = (f" with {setting} {generated}", f"lower {setting}, or ") if setting else ("", "")
    raise ValueError(
        f"Row {longest.row} of {longest.config} takes {max(lengths)} tokens{with_setting}, and the model's context of "
        f"{context} would cut it off; {lower}use a model with a longer context."
    )


def check_counts(**counts: int | None) -> None:
    """Raise a ValueError for a number below 1; None is a default."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; use at least 1.")


def measure(
    model: Any,
    tokenizer: Any,
    scored: Sequence[Answer],
    asked: Sequence[tuple[Sequence[Answer], int]],
    cache: AnswerCache,
    batch_size: int | None = None,
    vllm_path: str | None = None,
    seed: int = 0,
) -> None:
    """Score answers and generate others, as far as the cache does not hold them: their scores, and texts in the cache.

    Args:
        model: A causal language model, whose training mode is restored.
        tokenizer: Its tokenizer.
        scored: Answers to score.
        asked: Answers whose questions the model answers, with the most tokens that it may write.
        cache: Keeps each batch.
        batch_size: As for [`score_answers`].
        vllm_path: The model's folder, to generate through vLLM.
        seed: vLLM's.
    """
    for answer in scored:
        answer.scores = cache.scores.get(answer.key, {})
    left = [([each for each in prompts if each.key not in cache.generations], most) for prompts, most in asked]
    was_training, total = model.training, sum(len(prompts) for prompts, _ in asked)
    model.eval()
    try:
        if scored:
            with Progress("log-probabilities", len(scored), done=len(cache.scores)) as progress:

                def when_scored(batch: Sequence[Answer]) -> None:
                    cache.add("scores", {answer.key: answer.scores for answer in batch})
                    progress.update(len(batch))

                score_answers(model, scored, batch_size, when_scored)
        with Progress("generation", total, done=total - sum(len(prompts) for prompts, _ in left)) as progress:

            def when_generated(batch: Sequence[Answer], texts: list[str]) -> None:
                cache.add("generations", {answer.key: text for answer, text in zip(batch, texts, strict=True)})
                progress.update(len(batch))

            for prompts, most in left:
                if prompts:
                    given = (prompts, most, batch_size, when_generated, vllm_path, seed)
                    texts = generate_texts(model, tokenizer, *given)
                    cache.generations |= {answer.key: text for answer, text in zip(prompts, texts, strict=True)}
    finally:
        model.train(was_training)


@torch.no_grad()
def score_answers(
    model: Any,
    answers: Sequence[Answer],
    batch_size: int | None = None,
    when_scored: WhenScored = lambda batch: None,
) -> None:
    """Fill in what the model makes of every answer, in one pass of batches of similar length.

    In a distributed run every rank must call: they share the batches.

    Args:
        model: A causal language model.
        answers: Those without scores are scored.
        batch_size: Answers in one forward pass; None is as many as fit into the memory for a batch.
        when_scored: Called with each batch of this rank.

    Raises:
        ValueError: for logits that are not finite, with the row.
    """
    left, each = [answer for answer in answers if not answer.scores], forward_bytes(model)
    lengths = [answer.length for answer in left]
    plan = plan_batches(lengths, lambda length: length * each, model.device, batch_size)

    def score(places: list[int]) -> list[dict[str, float]]:
        batch = [left[place] for place in places]
        logits, first = _answer_logits(model, batch)
        for answer, row in zip(batch, logits, strict=True):
            at = len(answer.prompt_ids) - 1 - first
            answer.scores = _scores(answer, row[at : at + len(answer.completion_ids)])
        when_scored(batch)
        return [answer.scores for answer in batch]

    for places, scores in zip(plan, share(plan, score), strict=True):
        for place, found in zip(places, scores, strict=True):
            left[place].scores = found


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Answer],
    max_new_tokens: int,
    batch_size: int | None = None,
    when_generated: WhenGenerated = lambda batch, texts: None,
    vllm_path: str | None = None,
    seed: int = 0,
) -> list[str]:
    """The greedy answer to the question of each, as text.

    Through [`ceu_rl.tasks.generate.generate_tokens`], or with a `vllm_path` through vLLM, which loads that folder.
    """
    ends = end_token_ids(model, tokenizer)
    found: list[list[int]] = []

    def texts_of(batch: Sequence[Answer], answers: list[list[int]]) -> list[str]:
        return [said(tokenizer, *each, ends) for each in zip(batch, answers, strict=True)]

    def when_done(rows: Sequence[int], answers: list[list[int]]) -> None:
        found.extend(answers)
        batch = [prompts[row] for row in rows]
        when_generated(batch, texts_of(batch, answers))

    ids = [prompt.question_ids for prompt in prompts]
    if vllm_path is not None:  # in order
        generate_with_vllm(vllm_path, model.dtype, ids, ends, max_new_tokens, seed, when_done)
        return texts_of(prompts, found)
    batches = generate_tokens(model, tokenizer, ids, max_new_tokens, batch_size=batch_size, when_done=when_done)
    return texts_of(prompts, answers_in_order(batches))


def said(tokenizer: Any, prompt: Answer, ids: Sequence[int], ends: Sequence[int]) -> str:
    """The text of a generation up to its end token, without what the template adds before every answer."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    start = len(prompt.added_ids) if ids[: len(prompt.added_ids)] == prompt.added_ids else 0
    return tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()


def _answer_logits(model: Any, batch: Sequence[Answer]) -> tuple[torch.Tensor, int]:
    """Logits of a right-padded batch from the position before its first answer token on, and that position."""
    width = max(answer.length for answer in batch) - 1
    first = min(len(answer.prompt_ids) for answer in batch) - 1
    # The last token predicts nothing that is asked for
    rows = [(answer.prompt_ids + answer.completion_ids)[:-1] for answer in batch]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Prompt tuning puts tokens of its own in front
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if prompts or "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return model(input_ids=ids, attention_mask=mask).logits[:, -width:][:, first:], first
    kept = torch.arange(first, width, device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits, first


def _scores(answer: Answer, logits: torch.Tensor) -> dict[str, float]:
    """The scores of one answer from its logits of shape (tokens, vocabulary)."""
    labels = torch.tensor(answer.completion_ids, device=logits.device)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_probs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    if not torch.isfinite(log_probs).all():
        raise ValueError(
            f"The model's logits are not finite in row {answer.row} of {answer.config}, where it gives the "
            f"{answer.kind} {answer.text[:80]!r} a log-probability of {log_probs.sum().item()}; take an earlier "
            "checkpoint, or train with a lower learning rate."
        )
    # Where p is 0 its logarithm counts for nothing, not even if it is infinite, as of tokens that a model rules out
    p, log_p = log_p.exp(), log_p.clamp(min=-1e4)
    means = (p * log_p).sum(dim=-1)
    variances = (p * (log_p - means[:, None]).square()).sum(dim=-1)
    values = (values.double().cpu().numpy()[: answer.text_length] for values in (log_probs, means, variances))
    text_log_probs, text_means, text_variances = values
    matches = (logits.argmax(dim=-1) == labels).cpu().numpy()[: answer.text_length]
    log_prob = log_probs.double().mean().item()
    return {
        "log_prob": log_prob,
        "exact_memorization": metrics.exact_memorization(matches),
        "extraction_strength": metrics.extraction_strength(matches),
        "loss": metrics.loss_score(log_prob),
        "zlib": metrics.zlib_score(log_prob, answer.text),
        "min_k": metrics.min_k_score(text_log_probs),
        "min_k_plus_plus": metrics.min_k_plus_plus_score(text_log_probs, text_means, text_variances),
    }
