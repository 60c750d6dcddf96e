"""`ceu-rl muse-eval`: what a model remembers of long texts, word for word and in answers to questions.

    ceu-rl muse-eval --model DIR --dataset FOLDER

The first two criteria of MUSE (Shi et al. 2024, arXiv 2407.06460, section 3), in its symbols:

    VerbMem(f, D) = mean over x in D of ROUGE(f(x_1 ... x_l), x_(l+1) ...)
    KnowMem(f, D) = mean over (q, a) in D of ROUGE(f(q), a)

f(.) is the greedy continuation and ROUGE the F1 of ROUGE-L in unstemmed words of any script, on ASCII as in its code.
After unlearning both should be low on what is forgotten and as before on what is kept. Texts of no more than l
tokens are left out and counted. The result is `muse_eval.json`.

A dataset is a folder with some of `forget.jsonl` and `retain.jsonl` (rows of `text`, or of `prompt` and `gt`),
`forget_qa.jsonl` and `retain_qa.jsonl` (question and answer), and `forget_qa_icl.jsonl` and `retain_qa_icl.jsonl`,
questions with their answers that are shown before each; `builtin:articles`; or on the Hub one with the configs
`verbmem` and `knowmem` and these names as splits, such as `muse-bench/MUSE-News`.
"""

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.load import open_dataset
from ..data.prompts import PromptFormat, prompt_ids
from ..data.rows import check_columns
from ..tasks.generate import recorded_decoding
from . import command
from .data import checked_row, load_tofu, tofu_configs, tokenize
from .metrics import rouge_l_f1
from .scoring import Answer, check_counts, measure

RESULT = "muse_eval.json"
TEXTS, QUESTIONS = ("forget", "retain"), ("forget_qa", "retain_qa")
PARTS = (*TEXTS, *QUESTIONS, "forget_qa_icl", "retain_qa_icl")
METRICS = {**{part: f"{part}_verbmem" for part in TEXTS}, "forget_qa": "forget_knowmem", "retain_qa": "retain_knowmem"}
NEXT = re.compile("\n\n|\nQuestion|Question:")  # where the answer of a model that asks more is cut, as in MUSE's code


def load_parts(name: str) -> dict[str, Dataset]:
    """The parts that a dataset has of the layout above; a ValueError if it has none, or columns are missing."""
    if name.startswith("builtin:") or Path(name).is_dir():
        splits = {part: load_tofu(name, part) for part in tofu_configs(name) if part in PARTS}
    else:
        splits = {**open_dataset(name, "verbmem"), **open_dataset(name, "knowmem")}
    parts = {part: splits[part] for part in PARTS if part in splits}
    if not parts.keys() & METRICS.keys():
        raise ValueError(f"{name} has none of {', '.join(METRICS)}; give files of these names, or builtin:articles.")
    for part, dataset in parts.items():
        text = ("prompt", "gt") if "prompt" in dataset.column_names else ("text",)
        check_columns(dataset, part, text if part in TEXTS else ("question", "answer"))
    return parts


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | Mapping[str, Dataset],
    *,
    template: str | PromptFormat | None = None,
    prompt_tokens: int = 64,
    text_tokens: int = 128,
    answer_tokens: int = 32,
    batch_size: int | None = None,
    limit: int | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model and return what `muse_eval.json` holds, but for model, command and provenance.

    Args:
        model: A causal language model, or a PEFT model of one; its training mode is restored.
        tokenizer: Its tokenizer.
        dataset: A name, or the parts themselves by theirs; see the module.
        template: How questions are asked, see [`ceu_rl.data.prompts.PromptFormat`]; None is `question_answer`.
        prompt_tokens: l, the tokens of a text that are shown; rows of `prompt` and `gt` have their own.
        text_tokens: Most tokens to continue a text by, and to compare with (MUSE's 128).
        answer_tokens: Most tokens of an answer (MUSE's 32).
        batch_size, limit, keep: As for [`ceu_rl.tofu.evaluate.evaluate`].

    Raises:
        ValueError: for a setting or dataset that does not fit, texts that are all too short, and with the row for one
            that the model's context cuts off.
        OSError: if the dataset cannot be reached, or `keep` cannot be written.
    """
    numbers = {"prompt_tokens": prompt_tokens, "text_tokens": text_tokens, "answer_tokens": answer_tokens}
    check_counts(**numbers, batch_size=batch_size, limit=limit)
    parts = load_parts(dataset) if isinstance(dataset, str) else dict(dataset)
    prompt = PromptFormat.made_of(template or "question_answer").settle(tokenizer)
    made: dict[str, list[Answer]] = {}
    too_short: dict[str, int] = {}
    for part in (each for each in METRICS if each in parts):
        rows = parts[part].select(range(min(limit or len(parts[part]), len(parts[part]))))
        if part in QUESTIONS:
            shown = parts.get(f"{part}_icl", ())  # all of them, whatever the limit
            made[part] = [_question(tokenizer, prompt, shown, part, *pair) for pair in enumerate(rows)]
            continue
        texts = [_text(tokenizer, part, *pair, prompt_tokens, text_tokens) for pair in enumerate(rows)]
        made[part] = [text for text in texts if text.question_ids and text.text]
        if not made[part]:
            raise ValueError(
                f"None of the {len(rows)} texts of {part} goes on after its prompt_tokens, {prompt_tokens}; lower "
                "prompt_tokens."
            )
        too_short[part] = len(rows) - len(made[part])
    settings = {
        "dataset": dataset if isinstance(dataset, str) else None,
        "prompt": prompt.record(tokenizer),
        **numbers,
        "batch_size": batch_size,
        "limit": limit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": recorded_decoding(model, tokenizer) | {"max_new_tokens": [text_tokens, answer_tokens]},
        "rows": {part: len(prompts) for part, prompts in made.items()},
        "too_short": too_short,
    }
    lengths = {part: "text_tokens" if part in TEXTS else "answer_tokens" for part in made}
    asked = [(prompts, numbers[lengths[part]], lengths[part]) for part, prompts in made.items()]
    generations = measure(model, tokenizer, settings, [], asked, batch_size, keep)
    items: dict[str, list[dict[str, Any]]] = {part: [] for part in made}
    for answer in itertools.chain(*made.values()):
        text = generations[answer.key]
        text = NEXT.split(text)[0].strip() if answer.config in QUESTIONS else text
        row = {"truth": answer.text, "generation": text, "rouge_l_f1": rouge_l_f1(answer.text, text)}
        items[answer.config].append(row)
    means = {METRICS[part]: float(np.mean([row["rouge_l_f1"] for row in rows])) for part, rows in items.items()}
    return {**settings, "summary": means, "items": items}


def _text(tokenizer: Any, part: str, index: int, row: Mapping[str, Any], shown: int, longest: int) -> Answer:
    """The beginning of a text as what is asked, and what follows as its answer."""
    if "text" in row:
        ids = prompt_ids(tokenizer, row["text"])
        asked, following = ids[:shown], ids[shown : shown + longest]
    else:
        asked = prompt_ids(tokenizer, row["prompt"])
        following = tokenizer(row["gt"], add_special_tokens=False)["input_ids"][:longest]
    truth = tokenizer.decode(following, skip_special_tokens=True).strip()
    return Answer(part, index, "answer", 0, truth, asked)


def _question(
    tokenizer: Any, prompt: PromptFormat, shown: Sequence[Any], part: str, index: int, row: Mapping[str, Any]
) -> Answer:
    """A question behind those that are shown with their answers, as MUSE asks a model that was taught nothing else."""
    pair = checked_row(tokenizer, prompt, row["question"], row["answer"], f"row {index} of {part}")
    if len(shown) and prompt.template == "chat":
        raise ValueError(f"{part}_icl has examples, which go into a text, and template is 'chat'; use question_answer.")
    if len(shown):
        examples = [prompt.row(each["question"], each["answer"]) for each in shown]
        pair["prompt"] = "".join(f"{each['prompt']}{each['completion']}\n\n" for each in examples) + pair["prompt"]
    return Answer(part, index, "answer", 0, row["answer"], tokenize(tokenizer, pair)[0])


def main(argv: Sequence[str]) -> int:
    """`ceu-rl muse-eval`: returns 0, or raises for bad input as [`evaluate`] does."""
    path, result = command.run(["muse-eval", *argv], _parser().parse_args(argv), RESULT, _evaluate)
    command.save(path, result)
    return 0


def _evaluate(args: argparse.Namespace, model: Any, tokenizer: Any, keep: Path) -> dict[str, Any]:
    prompt = PromptFormat.of(args, args.model_name_or_path)
    settings = ("prompt_tokens", "text_tokens", "answer_tokens", "batch_size", "limit")
    given: dict[str, Any] = {each: getattr(args, each) for each in settings}
    given["template"] = None if prompt == PromptFormat() else prompt
    return evaluate(model, tokenizer, args.dataset_name, keep=keep, **given)


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser("muse-eval", __doc__, RESULT, None)
    option = parser.add_argument
    option("--prompt_tokens", type=int, default=64, help="tokens of a text that are shown (%(default)s)")
    option("--text_tokens", type=int, default=128, help="most tokens to continue a text by (%(default)s)")
    option("--answer_tokens", type=int, default=32, help="most tokens of an answer (%(default)s)")
    return parser
