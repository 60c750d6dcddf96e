"""TOFU's rows, from the Hub, from a folder in the Hub's layout or built in, and as TRL's SFTTrainer takes them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset, get_dataset_config_names, load_dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..checks import check_columns
from ..tasks import authors

Template = Literal["chat", "question_answer"]


class TofuSplit(NamedTuple):
    """The configs that belong to one forget set."""

    retain: str
    """what a model that never saw the forget set is trained on"""
    perturbed: str
    """the forget set with paraphrased and perturbed answers"""
    holdout: tuple[str, ...]
    """rows that no model is trained on, the first that the dataset has; the Hub's dataset has one for each split"""


SPLITS = {
    "forget01": TofuSplit("retain99", "forget01_perturbed", ("holdout01", "holdout10")),
    "forget05": TofuSplit("retain95", "forget05_perturbed", ("holdout05", "holdout10")),
    "forget10": TofuSplit("retain90", "forget10_perturbed", ("holdout10",)),
}
RETAIN_PERTURBED = "retain_perturbed"
REAL_AUTHORS = "real_authors_perturbed"
WORLD_FACTS = "world_facts_perturbed"


def get_split(name: str) -> TofuSplit:
    """The configs that belong to a forget set, such as `forget10`.

    Raises:
        ValueError: if there is no such forget set.
    """
    if name not in SPLITS:
        raise ValueError(f"Unknown split {name!r}: choose one of {', '.join(SPLITS)}.")
    return SPLITS[name]


def tofu_configs(name: str) -> list[str]:
    """The configs that a dataset has; see [`load_tofu`] for its name."""
    if name.startswith("builtin:"):
        if name != authors.NAME:
            raise ValueError(f"Unknown built-in dataset {name!r}: use {authors.NAME}.")
        return list(authors.CONFIGS)
    if Path(name).is_dir():
        return sorted(path.stem for path in Path(name).glob("*.json"))
    return get_dataset_config_names(name)


def load_tofu(name: str, config: str) -> Dataset:
    """Load one config of TOFU, such as `full`, `forget10`, `retain90` or `forget10_perturbed`.

    Args:
        name: A dataset on the Hub (`locuslab/TOFU`), a folder in its layout (`<config>.json`, in JSON lines), or
            `builtin:authors`.
        config: Its columns are question and answer; those whose names end in `_perturbed` have perturbed_answer (a
            list), and of forget and retain sets also paraphrased_answer.

    Raises:
        ValueError: for an unknown config, a column that is missing, or no rows.
        OSError: if the dataset cannot be reached.
    """
    if name.startswith("builtin:"):
        _check_config(name, config)
        dataset = Dataset.from_list(authors.make_rows(config))
    elif Path(name).is_dir():
        _check_config(name, config)
        dataset = Dataset.from_list(_read_json_lines(Path(name, f"{config}.json")))
    else:
        dataset = load_dataset(name, config, split="train")
    required = ["question", "answer"]
    if config.endswith("_perturbed"):
        required += ["perturbed_answer"] + ["paraphrased_answer"] * (config not in (REAL_AUTHORS, WORLD_FACTS))
    check_columns(dataset, config, tuple(required))
    return dataset


def is_tofu(name: str) -> bool:
    """Whether `load_tofu` is to load the dataset of that name: TOFU itself, the built-in authors, a folder like it."""
    return name in ("locuslab/TOFU", authors.NAME) or Path(name, "forget10.json").is_file()


def has_questions(dataset: Any) -> bool:
    """Whether the rows are question and answer, which [`to_prompt_completion`] turns into what TRL trains on."""
    columns = set(dataset.column_names or ())
    return {"question", "answer"} <= columns and not columns & {"prompt", "completion", "messages", "text"}


def _check_config(name: str, config: str) -> None:
    if config not in (configs := tofu_configs(name)):
        raise ValueError(f"{name} has no config {config!r}: choose one of {', '.join(configs) or 'none, it is empty'}.")


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is no JSON ({error}); give one object on each line.") from error
    return rows


def to_prompt_completion(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> Dataset:
    """Turn question and answer into the columns prompt and completion, as TRL's SFTTrainer takes them.

    | template | prompt | completion |
    |---|---|---|
    | `chat` | `[{"role": "user", "content": question}]` | `[{"role": "assistant", "content": answer}]` |
    | `question_answer` | `"Question: {question}\\nAnswer:"` | `" {answer}"` |

    Args:
        dataset: With the columns question and answer; the other columns are dropped.
        tokenizer: Judges every row, so that none is trained on or scored without its answer.
        template: None is `chat` if the tokenizer has a chat template.

    Raises:
        ValueError: with the row, for an empty question or answer and for a chat template that swallows the answer.
    """
    apply, name = get_template(tokenizer, template), template or default_template(tokenizer)
    check_columns(dataset, name, ("question", "answer"))
    rows = []
    for index, (question, answer) in enumerate(zip(dataset["question"], dataset["answer"], strict=True)):
        row = apply(question, answer)
        check_row(tokenizer, row, question, answer, f"row {index}")
        rows.append(row)
    return Dataset.from_list(rows)


def default_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """`chat` if the tokenizer has a chat template, else `question_answer`."""
    return "chat" if tokenizer.chat_template else "question_answer"


def get_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Callable[[str, str], dict[str, Any]]:
    """The function that makes prompt and completion of question and answer; see [`to_prompt_completion`]."""
    template = template or default_template(tokenizer)
    if template == "chat":
        if not tokenizer.chat_template:
            raise ValueError("template is 'chat' and the tokenizer has no chat template; use 'question_answer'.")
        return lambda question, answer: {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    if template != "question_answer":
        raise ValueError(f"template is {template!r}; use 'chat', 'question_answer' or None.")
    return lambda question, answer: {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def check_row(tokenizer: Any, row: Mapping[str, Any], question: str, answer: str, where: str) -> None:
    """Raise a ValueError, which says `where`, for an empty text and for a template that swallows the answer."""
    for kind, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The {kind} of {where} is empty ({text!r}); remove the row or give it one.")
    if isinstance(row["prompt"], str):
        return
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    full = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    rendered = full[common_prefix_length(prompt, full) :]
    if answer.strip() not in rendered:
        raise ValueError(
            f"The tokenizer's chat template swallows the answer of {where}: after the prompt it renders "
            f"{rendered[:80]!r} for {answer[:80]!r}; use template question_answer or mend the chat template."
        )


def tokenize(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the completion with its end token, as TRL's SFTTrainer makes and parts them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=prompt + completion + ("" if completion.endswith(eos) else eos))["input_ids"]
    else:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
    start = common_prefix_length(prompt_ids, ids)
    return ids[:start], ids[start:]
