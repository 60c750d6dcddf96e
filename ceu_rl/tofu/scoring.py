"""What a model makes of every token of every answer, and what it answers itself, as far as a file does not hold it."""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data.answer_spans import part_answer, template_edges
from ..data.prompts import PromptFormat, fingerprint
from ..run.progress import progress
from ..tasks.generate import answer_logits, answer_texts, evaluating, generate_tokens, in_batches, plan_forwards
from . import metrics
from .data import checked_row, tokenize

TOGETHER = 256  # answers that are kept together: what a kill loses at most


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


def make_answers(
    datasets: Mapping[str, Dataset], tokenizer: Any, prompt: PromptFormat, ends: Sequence[int]
) -> list[Answer]:
    """The answers of all rows: correct, paraphrased and perturbed; a ValueError for a row without what it needs."""
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
                pair = checked_row(tokenizer, prompt, row["question"], text, where)
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
    """Raise a ValueError, with the row, for one that the model's context cuts off: scored, or asked for new tokens."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [each.length if generated is None else len(each.question_ids) + generated for each in answers]
    if context is None or max(lengths, default=0) <= context:
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


class AnswerCache(dict[str, Any]):
    """What was found by the keys of answers, in JSON lines behind one of settings; without a path in memory alone."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        if path is None:
            return
        # Without its last line, in which the process may have been killed
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        lines = lines or [json.dumps(settings)]
        begun = json.loads(lines[0])
        if other := [name for name, value in json.loads(json.dumps(settings)).items() if begun.get(name) != value]:
            raise ValueError(
                f"{path} holds a part of an evaluation with another {' and '.join(other)}; choose another folder with "
                "--output_dir, or remove it."
            )
        for line in lines[1:]:
            self |= json.loads(line)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")

    def add(self, found: Mapping[str, Any]) -> None:
        self |= found
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def measure(
    model: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
    scored: Sequence[Answer],
    asked: Sequence[tuple[Sequence[Answer], int, str]],
    batch_size: int | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Fill in the scores of `scored`, and return the model's greedy answers to the questions of `asked` by their keys.

    What the file `keep` holds is not done again, and each batch is added to it. `asked` has answers, the most tokens
    that the model may write, and what sets that.

    Raises:
        ValueError: for a row that the model's context would cut off, and a file of another model, rows or settings.
    """
    for answers, most, setting in [(scored, None, ""), *asked]:
        check_context(model, answers, most, setting)
    if keep is not None:
        everything = itertools.chain(scored, *(prompts for prompts, *_ in asked))
        texts = [[answer.key, answer.question_ids, answer.text] for answer in everything]
        sums = [parameter.sum(dtype=torch.float64).item() for parameter in model.parameters()]
        settings = {**settings, "weights": fingerprint(sums), "texts": fingerprint(texts)}
    cache, count = AnswerCache(keep, settings), batch_size or TOGETHER

    def finish(name: str, answers: Sequence[Answer], before: str, work: Callable[[list[Answer]], list[Any]]) -> None:
        left = [answer for answer in answers if before + answer.key not in cache]
        left.sort(key=lambda answer: -answer.length)
        with progress(name, len(answers), len(answers) - len(left)) as bar, evaluating(model):
            for start in range(0, len(left), count):
                batch = left[start : start + count]
                cache.add({before + each.key: found for each, found in zip(batch, work(batch), strict=True)})
                bar.update(len(batch))

    finish("log-probabilities", scored, "scores/", lambda batch: score_answers(model, batch, batch_size))
    for answer in scored:
        answer.scores = cache[f"scores/{answer.key}"]
    for prompts, most, _ in asked:
        finish("generation", prompts, "", functools.partial(generate_texts, model, tokenizer, most, batch_size))
    return cache


@torch.no_grad()
def score_answers(model: Any, answers: Sequence[Answer], batch_size: int | None = None) -> list[dict[str, float]]:
    """What the model makes of every answer, as its `scores` too; a ValueError, with the row, for NaN and infinity.

    In a distributed run every rank must call: they share the batches.
    """
    plan = plan_forwards(model, [answer.length for answer in answers], batch_size)

    def score(places: list[int]) -> list[dict[str, float]]:
        batch = [answers[place] for place in places]
        logits = answer_logits(model, [(answer.prompt_ids, answer.completion_ids) for answer in batch], model.device)
        return [_scores(*pair) for pair in zip(batch, logits, strict=True)]

    found = in_batches(plan, score)
    for answer, scores in zip(answers, found, strict=True):
        answer.scores = scores
    return found


def generate_texts(
    model: Any, tokenizer: Any, max_new_tokens: int, batch_size: int | None, prompts: Sequence[Answer]
) -> list[str]:
    """The greedy answer to the question of each as text, without its end and what the template adds before it."""
    questions = [prompt.question_ids for prompt in prompts]
    answers = [each for (each,) in generate_tokens(model, tokenizer, questions, max_new_tokens, batch_size=batch_size)]
    starts = [
        len(each.added_ids) * (ids[: len(each.added_ids)] == each.added_ids)
        for each, ids in zip(prompts, answers, strict=True)
    ]
    said = [ids[start:] for ids, start in zip(answers, starts, strict=True)]
    return [text.strip() for text in answer_texts(model, tokenizer, said)]


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
        "loss": -log_prob,  # the loss attack (Yeom et al. 2018, arXiv 1709.01604)
        "zlib": metrics.zlib_score(log_prob, answer.text),
        "min_k": metrics.min_k_score(text_log_probs),
        "min_k_plus_plus": metrics.min_k_plus_plus_score(text_log_probs, text_means, text_variances),
    }
