"""What a model knew before and should keep: facts of the world and solutions, scored at every evaluation of a run."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from ..data.prompts import PromptFormat
from ..tasks.generate import evaluating
from ..tasks.score import evaluate_divergence
from .callbacks import StartModel, log_scores
from .errors import NameCause

ROWS = 50  # of each set, the first ones: a look at every evaluation has to be cheap
BATCH = 8
TEXTS = ("solutions", "foreign")  # sets whose likelihood and divergence are scored


@dataclass
class KeptArguments:
    """Fields of every recipe that name what the model should keep."""

    eval_facts: str | None = HfArg(
        default=None, help="TOFU, or its folder: evaluations score 50 answers on the world and 50 on real authors."
    )
    eval_solutions: str | None = HfArg(
        default=None,
        help="A file or dataset with the columns question and answer, such as GSM8K's test.jsonl: each "
        "evaluation logs the negative log-likelihood of the first 50 answers, in nats per token, and the "
        "divergence from the model at the start.",
    )
    eval_foreign: str | None = HfArg(default=None, help="The same for text that is not trained on, as eval_foreign_*.")


def load_kept(arguments: KeptArguments) -> dict[str, Dataset]:
    """The rows that a recipe names, by the set they belong to; empty if it names none."""
    from ..data.load import open_dataset
    from ..tofu.data import REAL_AUTHORS, WORLD_FACTS, load_tofu

    found: dict[str, Dataset] = {}
    if arguments.eval_facts:
        with NameCause(f"Reading eval_facts {arguments.eval_facts}", "give TOFU's name on the Hub, or its folder."):
            found |= {name: load_tofu(arguments.eval_facts, name) for name in (WORLD_FACTS, REAL_AUTHORS)}
    for name in TEXTS:
        if source := getattr(arguments, f"eval_{name}"):
            splits = open_dataset(source, None, field=f"eval_{name}")
            rows = splits["test"] if "test" in splits else next(iter(splits.values()))
            if not {"question", "answer"} <= set(rows.column_names):
                raise ValueError(
                    f"eval_{name} {source} has the columns {', '.join(rows.column_names)}; give question and answer."
                )
            found[name] = rows
    return {name: rows.select(range(min(ROWS, len(rows)))) for name, rows in found.items()}


class KeptScore(TrainerCallback):
    """Logs at every evaluation what the model makes of the rows of [`load_kept`].

    `eval_world_facts_probability` and `eval_real_authors_probability` are TOFU's: the mean over questions of the right
    answer's length-normalised probability among the options, 0 to 1. `eval_solutions_nll` and `eval_foreign_nll` are in
    nats per token, the mean over all tokens of all answers with their end; `eval_solutions_kl` and `eval_foreign_kl`
    the mean divergence KL(p | p_ref) from the model at the `start` at these tokens. What the chat template writes
    before each answer is not scored.
    """

    def __init__(
        self, trainer: Any, rows: Mapping[str, Dataset], form: PromptFormat, start: StartModel | None = None
    ) -> None:
        from ..models import end_token_ids
        from ..tofu.scoring import check_context, make_answers

        tokenizer = trainer.processing_class
        prompt = form.settle(tokenizer)
        self.trainer, self.start = trainer, start
        self.answers = make_answers(rows, tokenizer, prompt, end_token_ids(trainer.model, tokenizer))
        check_context(trainer.model, self.answers)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        with self.trainer.accelerator.autocast():  # the reference in the precision of the model
            scores = self.score(self.trainer.accelerator.unwrap_model(self.trainer.model))
        log_scores(self.trainer, scores, metrics)

    def score(self, model: Any) -> dict[str, float]:
        """What is logged, for a model whose training mode is restored."""
        from ..tofu.metrics import option_probability
        from ..tofu.scoring import score_answers

        with evaluating(model):
            score_answers(model, self.answers, BATCH)
        found: dict[str, float] = {}
        for config, group in itertools.groupby(self.answers, lambda answer: answer.config):
            log_probs, right = defaultdict(list), []
            for answer in group:
                log_probs[answer.kind, answer.row].append(answer.log_prob)
                right += [answer] * (answer.kind == "answer")
            if config in TEXTS:
                lengths = [len(answer.completion_ids) for answer in right]
                total = sum(answer.log_prob * length for answer, length in zip(right, lengths, strict=True))
                found[f"{config}_nll"] = -total / sum(lengths)
                if self.start is not None:
                    pairs = [(answer.prompt_ids, answer.completion_ids) for answer in right]
                    with self.start() as reference:
                        found[f"{config}_kl"] = evaluate_divergence(model, reference, pairs)["kl"]
            else:
                values = [option_probability(each.log_prob, log_probs["perturbed", each.row]) for each in right]
                found[f"{config.removesuffix('_perturbed')}_probability"] = sum(values) / len(values)
        return found
