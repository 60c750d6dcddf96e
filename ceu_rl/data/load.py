"""What a dataset's name means, and one check of its rows for all methods.

`load` finds the datasets of a recipe: on the Hub, in a folder, in one file, built in, TOFU's, or a mixture.
`check_layout` judges rows before anything is tokenized, and turns layouts that say the same into the one that TRL reads
right.
"""

import ast
import contextlib
import csv
import difflib
import functools
import glob
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas
from datasets import (
    Dataset,
    DatasetDict,
    DownloadManager,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from trl.data_utils import extract_prompt

Kind = Literal["sft", "preference", "prompt"]
Rows = Dataset | IterableDataset

COMPLETIONS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}
TEXTS = ("messages", "text", "conversations", "input_ids")  # what else supervised fine-tuning can be made of
BESIDE = ("tools", "chat_template_kwargs")  # what the chat template takes of a row
KIND_OF: dict[str, Kind] = {"sft": "sft", "dpo": "preference", "grpo": "prompt", "unlearn": "sft"}
# What TRL passes to a reward function beside the columns of the dataset
REWARD_ARGUMENTS = ("prompts", "completions")
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
NOTHING = Value("null")
SCALARS = {bool: Value("bool"), int: Value("int64"), float: Value("float64"), str: Value("string")}
BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


# names


def load(method: str, script: Any, mixture: Any, evaluates: bool) -> tuple[dict[str, Any], Any]:
    """The datasets of a recipe by their name in the trainer, and the task that scores them, if there is one.

    | `dataset_name` | meaning |
    |---|---|
    | `builtin:addition`, `reasoning_gym:TASK` | a task, at the setting of `dataset_config` |
    | `locuslab/TOFU`, a folder in its layout, `builtin:authors`, `builtin:articles` | its `dataset_config`, or a+b |
    | `rows.jsonl` (`.json`, `.csv`, `.tsv`, `.parquet`) | that file, as the split train |
    | a folder | what `save_to_disk` wrote there, or its files |
    | anything else | a dataset on the Hub |

    `datasets` of the recipe, a mixture, goes before it. Where there is no split `dataset_test_split`, a share such as
    `0.1` takes that part of the train split, the same rows for every seed, and no prompt in both parts; a run that does
    not evaluate leaves them out all the same.

    Returns:
        train and eval, or forget and retain for unlearning; and the task or None.

    Raises:
        ValueError: for a name, config or split that there is not.
        OSError: for what cannot be read or reached.
    """
    from ..tasks import get_task, is_task, load_task_dataset
    from ..tofu.data import has_questions, is_tofu, load_tofu

    name, config, task = script.dataset_name, script.dataset_config, None
    if method == "unlearn":
        if mixture.datasets or _share(script.dataset_test_split) is not None:
            given = "datasets" if mixture.datasets else "dataset_test_split"
            raise ValueError(f"{given} is given, which unlearning does not read; name dataset_name, forget and retain.")
        if is_task(name) and not name.startswith("builtin:"):  # of which some are made for this
            raise ValueError(f"dataset_name is {name!r}, a task, of which there is nothing to forget; name other rows.")
        sets = {"forget": script.forget, **({"retain": script.retain} if script.retain else {})}
        if config is None and Path(name).suffix not in BUILDERS:
            return {role: load_tofu(name, one) for role, one in sets.items()}, None
        splits = open_dataset(name, config)
        return {role: _split(splits, one, role) for role, one in sets.items()}, None
    if mixture.datasets:
        dataset = _mix(mixture)
    elif is_tofu(name):
        if config is None:
            raise ValueError(
                f"dataset_config is missing; give a config of {name}, such as full, or several joined by +."
            )
        parts = [load_tofu(name, one) for one in config.split("+")]
        columns = ["question", "answer"] if all(map(has_questions, parts)) else ["text"]
        parts = [part.select_columns(columns) for part in parts]
        dataset = {script.dataset_train_split: concatenate_datasets(parts)}
    elif is_task(name):
        task = get_task(name, config)
        dataset = load_task_dataset(name, KIND_OF[method], config)
    else:
        dataset = open_dataset(name, config, streaming=script.dataset_streaming)
    share = _share(script.dataset_test_split) if script.dataset_test_split not in dataset else None
    train = _split(dataset, script.dataset_train_split, "dataset_train_split")
    if share is not None:
        if not isinstance(train, Dataset):
            raise ValueError(
                f"dataset_test_split is {script.dataset_test_split}, and a streamed dataset cannot be parted; name a "
                "split."
            )
        if not 0 < round(share * len(train)) < len(train):
            raise ValueError(
                f"dataset_test_split is {script.dataset_test_split}, which leaves a part of the {len(train)} rows "
                "empty; choose another share."
            )
        test = _test_rows(train, share)
        taken = set(test)
        rest = [index for index in range(len(train)) if index not in taken]
        if not rest:
            raise ValueError(
                f"dataset_test_split is {script.dataset_test_split}, which takes all of the {len(train)} rows, because "
                "rows with the same prompt stay together; choose a smaller share."
            )
        return {"train": train.select(rest), **({"eval": train.select(test)} if evaluates else {})}, task
    datasets = {"train": train}
    if evaluates:
        datasets["eval"] = _split(dataset, script.dataset_test_split, "dataset_test_split")
    return datasets, task


def _mix(mixture: Any) -> Any:
    """The parts of a mixture in one, by shares and splits as `trl.get_dataset` has them."""
    from ..tasks import is_task

    parts, shares = [], [part.fraction for part in mixture.datasets]
    if any(shares) and (None in shares or mixture.streaming):
        raise ValueError(f"fraction of datasets is {shares}; give one for each, without streaming, or none.")
    for part in mixture.datasets:
        if is_task(part.path):
            raise ValueError(f"datasets names {part.path!r}, a task, and mixes other rows; name it as dataset_name.")
        where = {name: value for name in ("data_dir", "data_files") if (value := getattr(part, name)) is not None}
        if where:
            splits = _read(part.path, "datasets", part.path, mixture.streaming, name=part.name, **where)
        else:
            splits = open_dataset(part.path, part.name, mixture.streaming, "datasets")
        rows = splits[part.split] if part.split in splits else _slice(splits, part.split)
        parts.append(rows if part.columns is None else rows.select_columns(part.columns))
    if any(shares):
        total = min(len(rows) * sum(shares) / share for rows, share in zip(parts, shares, strict=True) if share)
        wanted = [round(share / sum(shares) * total) for share in shares]
        parts = [rows.select(range(count)) for rows, count in zip(parts, wanted, strict=True)]
    if not mixture.streaming:  # what one part keeps as JSON, the others do too
        kept = {name: Json() for rows in parts for name, kind in rows.features.items() if isinstance(kind, Json)}
        forms = [
            Features({n: kind if isinstance(kind, Value) else kept.get(n, kind) for n, kind in rows.features.items()})
            for rows in parts
        ]
        parts = [rows.cast(form) for rows, form in zip(parts, forms, strict=True)]
    with _reading("datasets", ", ".join(part.path for part in mixture.datasets)):
        joined = concatenate_datasets(parts)
        share = mixture.test_split_size
        return {"train": joined} if share is None else joined.train_test_split(test_size=share)


def _slice(splits: Any, spec: str) -> Any:
    """The rows of a split such as train[:10%]."""
    with _reading("datasets", spec):
        places = ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
        return concatenate_datasets([splits[each.splitname].select(range(each.from_, each.to)) for each in places])


def open_dataset(name: str, config: str | None, streaming: bool = False, field: str = "dataset_name") -> Any:
    """A dataset of a file, a folder or the Hub, by split; `field` is what names it."""
    path = Path(name)
    saved = any((path / marker).is_file() for marker in SAVED)
    if config is not None and (path.is_file() or saved):
        raise ValueError(f"dataset_config is {config!r}, and {name} has no configs; leave it out.")
    if path.suffix in BUILDERS and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise ValueError(f"{field} {name} is no file; check its name.")
        if path.stat().st_size == 0:
            raise ValueError(f"{field} {name} is an empty file; give it rows.")
        files = glob.escape(str(path))  # a name with [ is no pattern
        return _read(BUILDERS[path.suffix], field, name, streaming, data_files=files)
    if path.is_file():
        raise ValueError(f"{field} {name} is a file of another kind; give one that ends in {', '.join(BUILDERS)}.")
    if saved:
        with _reading(field, name):
            found = load_from_disk(name)
        return found if not isinstance(found, Dataset) else DatasetDict(train=found)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"{field} {name} is no folder and no file; check its name.")
    return _read(name, field, name, streaming, name=config)


def _read(source: str, field: str, said: str, streaming: bool, **where: Any) -> Any:
    """`load_dataset` of all splits, in which a text of JSON and a cell of CSV are what stands there.

    pyarrow would make times of dates, fill the keys of one object into others, and take its columns from the first
    rows; pandas would make 7 of 007, and nothing of None. Features that a dataset's card gives are left to `datasets`.
    """
    with _reading(field, said):
        builder = load_dataset_builder(source, **where)
        config, files = builder.config, {name: list(each) for name, each in (builder.config.data_files or {}).items()}
        local = all(Path(file).is_file() for each in files.values() for file in each)
        own = isinstance(config, CsvConfig | JsonConfig) and builder.info.features is None
        if own and files and (local or not streaming):
            files = DownloadManager().download_and_extract(files)
            if isinstance(config, CsvConfig):
                where |= _cells(Path(next(iter(files.values()))[0]), config.sep)
        if not own or isinstance(config, CsvConfig) or config.field is not None or (streaming and not local):
            return load_dataset(source, **where, streaming=streaming)
    found: dict[str, Dataset | IterableDataset] = {}
    for split, paths in files.items():
        given = {"paths": paths, "encoding": config.encoding}
        features = Features()
        try:
            for row in _json_rows(**given):
                features.update({column: _merge(features.get(column, NOTHING), row[column]) for column in row})
        except ValueError as error:
            raise ValueError(f"{field} {said} cannot be read: {error}") from error
        if not features:
            raise ValueError(f"{field} {said} has no rows; give it at least one.")
        given |= {"features": features, "written": [Path(path).stat().st_mtime_ns for path in paths]}
        with _reading(field, said):
            kind = IterableDataset if streaming else Dataset
            found[split] = kind.from_generator(_encoded, features=features, gen_kwargs=given)
    return IterableDatasetDict(found) if streaming else DatasetDict(found)


def _cells(path: Path, separator: str) -> dict[str, Any]:
    """Options with which every cell of CSV or TSV is text."""
    separator = "\t" if path.suffix == ".tsv" else separator
    header = list(pandas.read_csv(path, sep=separator, nrows=0))  # with its names for cells that are empty or repeated
    csv.field_size_limit(2**31 - 1)  # a row may be long
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = filter(None, csv.reader(file, delimiter=separator))
        next(lines, None)
        first = next(lines, [])
    if len(first) > len(header):  # pandas takes the first ones for an index, and shifts the others
        raise ValueError(
            f"row 0 has {len(first)} fields and the header {len(header)}, so quote texts that have a separator"
        )
    features = Features({name: Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def _json_rows(paths: Sequence[str], encoding: str) -> Iterator[dict[str, Any]]:
    """The objects of files in JSON lines, or in one array each; a line ends at a newline and nowhere else."""
    for path in paths:
        with open(path, "rb") as file:
            begun = array = False
            for number, line in enumerate(file, 1):
                where, fix = f"Line {number} of {path}", "give one object on each line"
                try:
                    text = line.decode("utf-8-sig" if encoding == "utf-8" and number == 1 else encoding)
                    if not text.strip():
                        continue
                    if array := not begun and text.lstrip().startswith("["):
                        where, fix = path, "give an array of objects, or one object on each line"
                        text += file.read().decode(encoding)
                    found = _parse(text)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is no JSON ({error}); {fix}.") from error
                begun = True
                for place, row in enumerate(found if array else [found], 1):
                    if not isinstance(row, dict):
                        where = f"Entry {place} of {path}" if array else where
                        raise ValueError(f'{where} is {row!r:.80}; give an object, such as {{"prompt": ...}}.')
                    yield row


def _parse(text: str) -> Any:
    found = json.loads(text, parse_int=_integer)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(found, ensure_ascii=False).encode()  # half a character is no text
    return found


def _integer(digits: str) -> int:
    if (number := int(digits)).bit_length() > 63:
        raise ValueError(f"{digits:.30} has more than 64 bits, so write it as text")
    return number


def _merge(kind: Any, value: Any) -> Any:
    """The feature that holds `value` too: Json where objects have other keys, or values are of other kinds."""
    if value is None or isinstance(kind, Json):
        return kind
    first = kind == NOTHING
    if isinstance(value, list) and (first or isinstance(kind, List)):
        inner = functools.reduce(_merge, value, NOTHING if first else kind.feature)
        return inner if isinstance(inner, Json) else List(inner)
    if isinstance(value, dict) and value and (first or (isinstance(kind, dict) and set(kind) == set(value))):
        found = {key: _merge(NOTHING if first else kind[key], each) for key, each in value.items()}
        return Json() if any(isinstance(each, Json) for each in found.values()) else found
    own = SCALARS.get(type(value), Json())
    if first or own == kind:
        return own
    return SCALARS[float] if {str(own), str(kind)} == {str(SCALARS[int]), str(SCALARS[float])} else Json()


def _encoded(paths: Sequence[str], encoding: str, features: Features, written: Sequence[int]) -> Iterator[Any]:
    """The rows, those that are kept as JSON written so: `datasets` would take the text "12" for a number."""
    kept = {column for column, feature in features.items() if isinstance(feature, Json)}
    for row in _json_rows(paths, encoding):
        yield {name: json.dumps(row[name]) if name in kept else row[name] for name in row}


class _reading:
    """Names the dataset in whatever a reader of `datasets` raises; the cause under it says what was wrong."""

    def __init__(self, field: str, name: str) -> None:
        self.name, self.field = name, field

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):
                raise ValueError(f"{self.field} {self.name} has no rows; give it at least one.") from error
            raise ValueError(
                f"{self.field} {self.name} cannot be read ({type(cause).__name__}: {' '.join(str(cause).split())}); "
                "check its name and its rows."
            ) from error


def _share(split: str) -> float | None:
    try:
        share = float(split)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"dataset_test_split is {split}; use a split's name or a share between 0 and 1, such as 0.1.")
    return share


def _test_rows(dataset: Dataset, share: float) -> list[int]:
    """About that share of the rows, drawn by their prompts, so that no prompt is in both parts; if all rows have
    the same one, drawn by row. A prompt of so many rows that the part would have twice the share stays in the other."""
    names = [name for name in ("prompt", "question", "chosen", "rejected", *TEXTS) if name in dataset.column_names]
    rows: dict[str, list[int]] = {}
    written: dict[str, str] = {}  # how a prompt is written first, by which they are ordered
    for index, row in enumerate(dataset.select_columns(names) if names else ()):
        prompt = _prompt_of(row)
        rows.setdefault(prompt, []).append(index)
        written.setdefault(prompt, str(row.get("prompt", row.get("question", prompt))))
    if len(rows) < 2:
        rows = {str(index): [index] for index in range(len(dataset))}
        written = {name: name for name in rows}
    drawn = sorted(rows, key=lambda prompt: written[prompt])
    random.Random(0).shuffle(drawn)
    wanted, test, larger = round(share * len(dataset)), list[int](), list[list[int]]()
    for prompt in reversed(drawn):
        if len(test) >= wanted:
            break
        if len(test) + len(rows[prompt]) > 2 * wanted:
            larger.append(rows[prompt])
        else:
            test += rows[prompt]
    return sorted(test or sorted(larger, key=len)[0])


def _prompt_of(row: Mapping[str, Any]) -> str:
    """What a row asks, whatever its layout: two rows with the same are not in two parts."""
    asked = next((row[name] for name in ("prompt", "question") if row.get(name) is not None), None)
    if asked is None:
        try:
            if row.get("chosen") is not None:
                asked = extract_prompt({name: row[name] for name in ("chosen", "rejected")})["prompt"]
            else:
                asked = next(row[name] for name in TEXTS if row.get(name) is not None)
                asked = asked if isinstance(asked, str) else asked[:-1]
        except (LookupError, TypeError, AttributeError, StopIteration):  # which is judged later
            return str(dict(row))
    if isinstance(asked, list) and len(asked) == 1 and isinstance(asked[0], Mapping) and asked[0].get("role") == "user":
        asked = _text(asked[0])
    return asked.strip() if isinstance(asked, str) else str(asked)


def _split(dataset: Any, split: str, field: str) -> Any:
    if split not in dataset:
        share = ", or a share of the train split such as 0.1" if field == "dataset_test_split" else ""
        raise ValueError(f"{field} is {split!r}, and the dataset has {sorted(dataset)}; name one of these{share}.")
    return dataset[split]


# rows


def check_layout(
    dataset: Any,
    name: str,
    kind: Kind,
    num_proc: int | None = None,
    text_field: str = "text",
    *,
    blank_user: bool = False,
) -> Dataset | IterableDataset:
    """Judge every row of a dataset before it is tokenized, and bring it into the layout that TRL reads right.

    A text is a string; a conversation a list of messages with a role and content. Where `prompt` is one of the two and
    the completions the other, or where the completions hold the whole conversation beside a `prompt`, the prompt is
    taken from the conversations. Completions must not be empty: the last message has content, reasoning or a tool call.

    Args:
        dataset: A `Dataset`, or an `IterableDataset`, whose rows are judged when they come.
        name: What it is called in messages, such as train.
        kind: sft (prompt and completion, messages, or text), preference (chosen and rejected, with or without prompt)
            or prompt.
        num_proc: Processes that judge.
        text_field: The column of texts of kind sft.
        blank_user: Whether a message of the user may be without words, which an environment adds.

    Returns:
        The dataset, the same object if nothing had to be changed.

    Raises:
        ValueError: for what is no dataset, no rows or a column that is missing, and with row and column for a value
            that cannot be learned from.
    """
    check_dataset(dataset, name, kind, text_field)
    if _is_transformed(dataset):
        if kind != "prompt":  # what tokenization adds would not be among what the transform gives
            raise ValueError(f"The {name} dataset has a transform, which tokenization loses; apply it with map.")
        return dataset  # its rows are made when they are read, from columns that only it knows
    normal = functools.partial(_normal_row, name=name, kind=kind, text_field=text_field, blank_user=blank_user)
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row, index: normal(row, index) or {}, with_indices=True)
    judged = [column for column in _judged(dataset.column_names, kind, text_field) if column in dataset.column_names]
    beside = [column for column in BESIDE if column in dataset.column_names]
    plain = dataset.with_format(None)  # not the tensors or arrays that it was set to give
    if kind != "prompt" and dataset.format["type"] is not None:  # TRL joins the lists of ids
        dataset = plain
    changed = plain.select_columns([*judged, *beside]).map(
        lambda row, index: {"_changed": normal(row, index) is not None, "_chat": _is_chat(row, kind, text_field)},
        with_indices=True,
        remove_columns=[*judged, *beside],
        num_proc=num_proc,
        desc=f"Checking {name} dataset",
    )
    if len(set(changed["_chat"])) > 1:
        chats = list(changed["_chat"])
        index = chats.index(not chats[0])
        now, first = ("messages", "text") if chats[index] else ("text", "messages")
        raise ValueError(
            f"Row {index} of the {name} dataset is {now}, and row 0 is {first}, by which TRL reads all; make "
            "them one or the other."
        )
    if not any(changed["_changed"]):
        return dataset
    parts = plain.select_columns(judged).map(
        lambda row, index: {**row, **(normal(row, index) or {})},
        with_indices=True,
        remove_columns=judged,
        num_proc=num_proc,
        desc=f"Taking the prompt of the {name} dataset from its conversations",
    )
    return concatenate_datasets([plain.remove_columns(judged), parts], axis=1)


def check_dataset(dataset: Any, name: str, kind: Kind, text_field: str = "text") -> None:
    """What [`check_layout`] can tell without reading a row: whether it is a dataset, with rows and the columns needed.

    Raises:
        ValueError: if not.
    """
    if not isinstance(dataset, Rows):
        raise ValueError(f"The {name} dataset is {_describe(dataset)}.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset has no rows; give it at least one.")
    columns = list(dataset[0]) if _is_transformed(dataset) else dataset.column_names
    if columns is not None:  # a stream that was not looked at tells them with its first row
        _check_columns(columns, name, kind, text_field)


def _is_transformed(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


class FirstRow:
    """Says of a stream that it has no rows, where TRL looks at the first one and meets its end."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, StopIteration):
            raise ValueError(f"The {self.name} dataset has no rows; give it at least one.") from error


def _describe(value: Any) -> str:
    """What was given in place of a dataset, and what to do."""
    kind = type(value).__name__
    if isinstance(value, Mapping) and value and all(hasattr(each, "column_names") for each in value.values()):
        return f"a {kind} with the splits {sorted(map(str, value))}; give one of them"
    if isinstance(value, str | Path):
        return f"the path {str(value)!r}; load it first, with datasets.load_dataset"
    return f"a {kind}; give a datasets.Dataset, such as Dataset.from_list makes of rows"


def _judged(columns: Iterable[str], kind: Kind, text_field: str) -> list[str]:
    found = ["prompt", *COMPLETIONS[kind]]
    if kind == "sft" and "completion" not in columns:
        found = [next((c for c in (*TEXTS, text_field) if c in columns), text_field)]
    return found


def _check_columns(columns: Iterable[str], name: str, kind: Kind, text_field: str) -> None:
    columns = list(columns)
    if kind == "prompt":
        clash = [column for column in REWARD_ARGUMENTS if column in columns]
        if clash:
            raise ValueError(
                f"The {name} dataset has a column {clash[0]!r}, which is what the trainer itself passes to reward "
                "functions; rename it."
            )
    if kind == "sft":
        texts = [column for column in (*TEXTS, text_field) if column in columns and column != "input_ids"]
        if texts and "prompt" in columns and not {"completion", "input_ids"} & set(columns):
            raise ValueError(
                f"The {name} dataset has 'prompt' beside {texts[0]!r}, and TRL reads a prompt with a 'completion' "
                f"alone; rename {texts[0]!r} to 'completion', or remove 'prompt'."
            )
        if "completion" in columns or any(column in columns for column in (*TEXTS, text_field)):
            required = ["prompt"] if "completion" in columns else []
        else:
            required = ["completion"] if "prompt" in columns else ["messages"]
    else:
        required = list(COMPLETIONS[kind]) or ["prompt"]
    for column in required:
        if column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            fix = f"rename {close[0]!r} to {column!r}" if close else f"add {column!r}, or rename the one that holds it"
            raise ValueError(f"The {name} dataset has no column {column!r} among {sorted(columns)}; {fix}.")


def _normal_row(
    row: Mapping[str, Any], index: int, name: str, kind: Kind, text_field: str, blank_user: bool = False
) -> dict[str, Any] | None:
    """The columns that have to change for TRL, None if there are none."""
    _check_columns(row, name, kind, text_field)

    def refuse(column: str, problem: str, fix: str) -> ValueError:
        return ValueError(f"Row {index} of the {name} dataset has {problem} {column!r} ({_short(row[column])}); {fix}.")

    for column in _judged(row, kind, text_field):
        if column not in row:
            continue
        value = row[column]
        if column == "input_ids":
            if not isinstance(value, list) or not value or any(type(token) is not int or token < 0 for token in value):
                raise refuse(column, "no token ids as", "give a list of them, or the text")
            continue
        completes = column in COMPLETIONS[kind]
        rest = "remove the row or give it " + ("a completion" if completes else "one")
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise refuse(column, "an empty", rest)
        if isinstance(value, list):
            if column == "conversations":  # of the layout from/value, which TRL turns into messages
                if not all(isinstance(turn, Mapping) and {"from", "value"} <= set(turn) for turn in value):
                    raise refuse(
                        column, "a turn without from and value in", "give each both, or name the column messages"
                    )
                continue
            if problem := next((p for message in value if (p := _message_problem(message, blank_user))), None):
                raise refuse(column, f"{problem} in", "give each message a role and content")
            if (completes or column == "messages") and _is_empty(value[-1]):
                raise refuse(column, "an empty", rest)
        elif not isinstance(value, str) or column in ("messages", "conversations"):
            raise refuse(column, f"a {type(value).__name__} as", "make it text, or a list of messages")
        elif _is_written_chat(value):
            raise refuse(column, "messages that are written as text in", "save them as jsonl or parquet, not as CSV")
    if kind != "prompt":
        tools, kwargs = row.get("tools"), row.get("chat_template_kwargs", {})
        if not (tools is None or isinstance(tools, list) or (isinstance(tools, str) and _is_json(tools))):
            raise refuse("tools", f"a {type(tools).__name__} as", "give a list, or JSON of one, or remove the column")
        if not isinstance(kwargs, Mapping):
            what = f"a {type(kwargs).__name__} as"
            raise refuse("chat_template_kwargs", what, "give an object, or remove the column")
    return _joined(row, tuple(c for c in COMPLETIONS[kind] if c in row), refuse)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_chat(row: Mapping[str, Any], kind: Kind, text_field: str) -> bool:
    """Whether a row is messages, by what is learned of it."""
    return any(isinstance(row.get(column), list) for column in _judged(row, kind, text_field))


def _joined(row: Mapping[str, Any], completions: tuple[str, ...], refuse: Any) -> dict[str, Any] | None:
    """Prompt and completions as one of the two layouts that TRL knows: all text, or all messages without the prompt."""
    kinds = {column: isinstance(row[column], list) for column in completions if column in row}
    if not kinds:
        return None
    if len(set(kinds.values())) > 1:
        column = next(column for column, is_list in kinds.items() if not is_list)
        raise refuse(column, "text beside messages in", "make all completions text, or all of them messages")
    if row.get("prompt") is None:
        return None
    prompt, chats = row["prompt"], all(kinds.values())
    if not chats:
        if isinstance(prompt, list):  # completions as text: each is the assistant's turn
            return {column: [{"role": "assistant", "content": row[column]}] for column in completions}
        return None
    if isinstance(prompt, list):
        heads = {column: _plain(row[column][: len(prompt)]) == _plain(prompt) for column in completions}
        for column, head in heads.items():
            roles = [messages[0].get("role") for messages in (prompt[-1:], row[column]) if messages]
            if not head and roles in (["user", "user"], ["user", "system"]):
                raise refuse(
                    "prompt", f"messages that {column!r} does not begin with as", "give one prompt, in the conversation"
                )
        if not any(heads.values()) or not all(len(row[column]) > len(prompt) for column, head in heads.items() if head):
            return None
        return {column: row[column][len(prompt) :] if heads[column] else row[column] for column in completions}
    if all(row[column][0]["role"] == "assistant" for column in completions):
        return {"prompt": [{"role": "user", "content": prompt}]}
    for column in completions:
        texts = [_text(message) for message in row[column]]
        if not any(prompt.strip() in text for text in texts):
            raise refuse(
                "prompt", f"a text that is in no message of {column!r} as", "give one prompt, in the conversation"
            )
    if len(completions) == 1:  # all but the last turn
        messages = row[completions[0]]
        if len(messages) < 2:
            raise refuse(completions[0], "no answer in", "add the assistant's turn")
        return {"prompt": messages[:-1], completions[0]: messages[-1:]}
    return dict(extract_prompt({column: row[column] for column in completions}))


def _message_problem(message: Any, blank_user: bool) -> str | None:
    if not isinstance(message, Mapping):
        return f"the item {_short(message)}"
    if not isinstance(message.get("role"), str):
        return f"a message without a role ({_short(dict(message))})"
    content = message.get("content")
    if not (content is None or isinstance(content, str | list)):
        return f"a content of type {type(content).__name__}"
    # Many datasets have a system message of no words
    empty = message["role"] == "user" and not blank_user and _is_empty(message)
    if empty or (message["role"] == "system" and content is None):
        return f"a message without content ({_short(dict(message))})"
    return None


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn says nothing: no content, no reasoning, no tool call."""
    if message.get("tool_calls"):
        return False
    said = [_text(message), *(str(message.get(name) or "") for name in ("reasoning_content", "thinking", "reasoning"))]
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    shown = any(isinstance(part, Mapping) and part.get("type") not in (None, "text") for part in parts)
    return not shown and not any(text.strip() for text in said)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content or ""


def _is_written_chat(text: str) -> bool:
    """Whether a text is a list of messages as Python or JSON writes it."""
    if not text.lstrip().startswith("[{") or "role" not in text:
        return False
    for read in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(text.strip())
            return isinstance(found, list) and all(isinstance(each, dict) and "role" in each for each in found)
    return False


def _plain(messages: Iterable[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    return [(message.get("role"), _text(message).strip()) for message in messages]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
