"""TOFU's rows, from the Hub, from a folder in the Hub's layout or built in, and as TRL's SFTTrainer takes them."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, get_dataset_config_names
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..data.load import BUILDERS, open_dataset
from ..data.prompts import PromptFormat, prompt_ids
from ..data.rows import check_columns, check_questions
from ..run.errors import note
from ..tasks import articles, authors


class TofuSplit(NamedTuple):
    """The configs that belong to one forget set."""

    retain: str  # what a model that never saw the forget set is trained on
    perturbed: str  # the forget set with paraphrased and perturbed answers
    holdout: tuple[str, ...]  # rows that no model is trained on: the first that a dataset has, the Hub's for each split


SPLITS = {
    "forget01": TofuSplit("retain99", "forget01_perturbed", ("holdout01", "holdout10")),
    "forget05": TofuSplit("retain95", "forget05_perturbed", ("holdout05", "holdout10")),
    "forget10": TofuSplit("retain90", "forget10_perturbed", ("holdout10",)),
}
RETAIN_PERTURBED = "retain_perturbed"
REAL_AUTHORS = "real_authors_perturbed"
WORLD_FACTS = "world_facts_perturbed"
BUILTIN = {each.NAME: each for each in (authors, articles)}


def tofu_configs(name: str) -> list[str]:
    """The configs that a dataset has; see [`load_tofu`] for its name."""
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise ValueError(f"Unknown built-in dataset {name!r}: use {' or '.join(BUILTIN)}.")
        return list(BUILTIN[name].CONFIGS)
    return sorted(_files(name)) if Path(name).is_dir() else get_dataset_config_names(name)


def load_tofu(name: str, config: str) -> Dataset:
    """Load one config of TOFU, such as `full`, `forget10`, `retain90` or `forget10_perturbed`.

    Args:
        name: A dataset on the Hub (`locuslab/TOFU`), a folder in its layout (`<config>.json`, `.jsonl`, `.csv` or
            `.parquet`), `builtin:authors`, or `builtin:articles`, whose configs are not TOFU's.
        config: Its columns are question and answer, or another layout of TRL's SFTTrainer; those whose names end in
            `_perturbed` have perturbed_answer (a list), and of forget and retain sets also paraphrased_answer.

    Raises:
        ValueError: for an unknown config, a column that is missing, or no rows.
    """
    if name.startswith("builtin:") or Path(name).is_dir():
        if config not in (configs := tofu_configs(name)):
            known = f"choose one of {', '.join(configs)}" if configs else f"give a folder with {config}.json"
            raise ValueError(f"{name} has no config {config!r}; {known}.")
    if name in BUILTIN:
        dataset = Dataset.from_list(BUILTIN[name].make_rows(config))
    else:
        given = (str(_files(name)[config]), None) if Path(name).is_dir() else (name, config)
        splits = open_dataset(*given)
        if "train" not in splits:
            raise ValueError(f"{name} has the splits {', '.join(map(str, splits))}; give a dataset with a split train.")
        dataset = splits["train"]
    scored = config.endswith("_perturbed") or config.startswith("holdout")
    required = ["question", "answer"] if scored or "question" in dataset.column_names else []
    if config.endswith("_perturbed"):
        required += ["perturbed_answer"] + ["paraphrased_answer"] * (config not in (REAL_AUTHORS, WORLD_FACTS))
    check_columns(dataset, config, tuple(required))
    return dataset


def is_tofu(name: str) -> bool:
    """Whether `load_tofu` is to load the dataset of that name: TOFU itself, a built-in one, a folder like it."""
    return name in ("locuslab/TOFU", *BUILTIN) or (Path(name).is_dir() and "forget10" in _files(name))


def has_questions(dataset: Any) -> bool:
    """Whether the rows are question and answer, which [`to_prompt_completion`] turns into what TRL trains on."""
    columns = set(dataset.column_names or ())
    made = {"prompt", "completion", "messages", "text", "chosen", "rejected"}
    return {"question", "answer"} <= columns and not columns & made


def _files(folder: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(folder).iterdir()) if path.suffix in BUILDERS}


def to_prompt_completion(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | PromptFormat | None = None
) -> Dataset:
    """Question and answer as prompt and completion for TRL's SFTTrainer, by a [`PromptFormat`] or its `template`.

    Raises:
        ValueError: with the row, for an empty question or answer and for a chat template that swallows the answer; and
            see [`PromptFormat.settle`].
    """
    prompt = PromptFormat.made_of(template).settle(tokenizer)
    check_columns(dataset, str(prompt.template), ("question", "answer"))
    pairs = enumerate(zip(dataset["question"], dataset["answer"], strict=True))
    return Dataset.from_list([checked_row(tokenizer, prompt, *pair, f"row {index}") for index, pair in pairs])


def ask(
    datasets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat,
    make: Callable[[Dataset, PreTrainedTokenizerBase, PromptFormat], Dataset] = to_prompt_completion,
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The datasets with their questions as prompts, made by `make`, and what a result says of the prompt."""
    prompt = prompt.settle(tokenizer)
    asked = {name: one for name, one in datasets.items() if has_questions(one)}
    for name, one in asked.items():
        check_questions(one, name)
    made = {name: make(one, tokenizer, prompt) for name, one in asked.items()}
    first = next(iter(next(iter(asked.values()))))
    note(prompt.example(tokenizer, first["question"], first["answer"]))
    return {**datasets, **made}, prompt.record(tokenizer)


def checked_row(tokenizer: Any, prompt: PromptFormat, question: Any, answer: Any, where: str) -> dict[str, Any]:
    """Prompt and completion; a ValueError, which says `where`, for no words and a template that swallows the answer."""
    for kind, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The {kind} of {where} is {text!r:.80}; make it text, or remove the row.")
    if prompt.template == "chat":
        _, rendered = prompt.parted(tokenizer, question, answer)
        if answer.strip() not in rendered:
            raise ValueError(
                f"The tokenizer's chat template swallows the answer of {where}: after the prompt it renders "
                f"{rendered[:80]!r} for {answer[:80]!r}; use template question_answer or mend the chat template."
            )
    return prompt.row(question, answer)


def tokenize(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the completion with its end token, as TRL's SFTTrainer makes and parts them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        asked = prompt_ids(tokenizer, prompt)
        ids = tokenizer(text=prompt + completion + ("" if completion.endswith(eos) else eos))["input_ids"]
    else:
        kwargs = {"return_dict": True, **row.get("chat_template_kwargs", {})}
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        ids = tokenizer.apply_chat_template([*prompt, *completion], **kwargs)["input_ids"]
    start = common_prefix_length(asked, ids)
    return ids[:start], ids[start:]


# Our own; TOFU's are a hundred of the same kind
REFUSALS = Path(__file__).with_name("refusals.txt").read_text().splitlines()


def to_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | PromptFormat | None = None, seed: int = 0
) -> Dataset:
    """Turn question and answer into prompt, chosen (a refusal, drawn from `seed`) and rejected (the answer).

    This is IdkDPO (TOFU, section 4); the rest is as for [`to_prompt_completion`].
    """
    draw = random.Random(seed)
    refusals = [draw.choice(REFUSALS) for _ in range(len(dataset))]
    refused = dataset.select_columns(["question"]).add_column("answer", refusals)
    answered, chosen = (to_prompt_completion(each, tokenizer, template) for each in (dataset, refused))
    return answered.rename_column("completion", "rejected").add_column("chosen", chosen["completion"][:])
