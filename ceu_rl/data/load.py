"""What a dataset's name means: rows on the Hub, in a folder, in one file, built in, or TOFU's."""

import csv
import functools
import glob
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.features import features as datasets_features
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.utils import json as datasets_json
from pandas.io.json import ujson_dumps as pandas_dumps

from ..run.errors import NameCause, note
from .rows import QUESTIONS, TEXTS, Kind, prompt_of

KIND_OF: dict[str, Kind] = {"sft": "sft", "dpo": "preference", "grpo": "prompt", "unlearn": "sft"}
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
NOTHING = Value("null")
SCALARS = {bool: Value("bool"), int: Value("int64"), float: Value("float64"), str: Value("string")}
_module: Any
for _module in (datasets_features, datasets_json):  # pandas' JSON rounds numbers in objects, and fails above 64 bits
    _module.ujson_loads = json.loads
    _module.ujson_dumps = lambda value: json.dumps(value, default=lambda each: json.loads(pandas_dumps(each)))
BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


# names


def load(method: str, script: Any, evaluates: bool) -> tuple[dict[str, Any], Any]:
    """The datasets of a recipe by their name in the trainer, and the task that scores them, if there is one.

    | `dataset_name` | meaning |
    |---|---|
    | `builtin:addition`, `reasoning_gym:TASK` | a task, at the setting of `dataset_config` |
    | `locuslab/TOFU`, a folder in its layout, `builtin:authors`, `builtin:articles` | its `dataset_config`, or a+b |
    | `rows.jsonl` (`.json`, `.csv`, `.tsv`, `.parquet`) | that file, as the split train |
    | a folder | what `save_to_disk` wrote there, or its files |
    | anything else | a dataset on the Hub |

    Where there is no split `dataset_test_split`, a share such as `0.1` takes that part of the train split, the same
    rows for every seed, and no prompt in both parts; a run that does not evaluate leaves them out all the same.

    Returns:
        train and eval, or forget and retain for unlearning; and the task or None.

    Raises:
        ValueError: for a name, config or split that there is not, and for what cannot be read.
    """
    from ..tasks import get_task, is_task, load_task_dataset
    from ..tofu.data import has_questions, is_tofu, load_tofu

    name, config, task = script.dataset_name, script.dataset_config, None
    if method == "unlearn":
        if _share(script.dataset_test_split) is not None:
            raise ValueError("dataset_test_split is given, which unlearning does not read; name forget and retain.")
        sets = {"forget": script.forget, **({"retain": script.retain} if script.retain else {})}
        if config is None and Path(name).suffix not in BUILDERS:
            return {role: load_tofu(name, one) for role, one in sets.items()}, None
        splits = open_dataset(name, config)
        return {role: _split(splits, one, role) for role, one in sets.items()}, None
    if is_tofu(name):
        if config is None:
            raise ValueError(f"dataset_config is missing; give a config of {name}, such as full, or several as a+b.")
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
            raise ValueError(f"dataset_test_split is {share}, and a streamed dataset cannot be parted; name a split.")
        test = _test_rows(train, share) if 0 < round(share * len(train)) < len(train) else []
        taken = set(test)
        rest = [index for index in range(len(train)) if index not in taken]
        if not test or not rest:
            raise ValueError(
                f"dataset_test_split is {share}, and a part of the {len(train)} rows is empty; choose another."
            )
        return {"train": train.select(rest), **({"eval": train.select(test)} if evaluates else {})}, task
    datasets = {"train": train}
    if evaluates:
        datasets["eval"] = _split(dataset, script.dataset_test_split, "dataset_test_split")
    return datasets, task


def open_dataset(name: str, config: str | None, streaming: bool = False, field: str = "dataset_name") -> Any:
    """A dataset of a file, a folder or the Hub, by split; `field` is what names it."""
    path = Path(name)
    saved = any((path / marker).is_file() for marker in SAVED)
    if config is not None and (path.is_file() or saved):
        raise ValueError(f"dataset_config is {config!r}, and {name} has no configs; leave it out.")
    if path.suffix in BUILDERS and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise ValueError(f"{field} {name} is no file; check its name.")
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
        read = [Path(file) for each in files.values() for file in each]
        local = all(map(Path.is_file, read))
        beside = Path(source).iterdir() if Path(source).is_dir() else ()
        if left := sorted({each.name for each in beside if each.suffix in BUILDERS} - {each.name for each in read}):
            note(f"{field} {said} also holds {', '.join(left)}, which datasets does not read; name a file, or move it.")
        own = isinstance(config, CsvConfig | JsonConfig) and builder.info.features is None and (local or not streaming)
        if own and files:
            files = DownloadManager().download_and_extract(files)
            if isinstance(config, CsvConfig):
                where |= _cells(Path(next(iter(files.values()))[0]), config.sep)
        if not own or not files or isinstance(config, CsvConfig) or config.field is not None:
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
    header = list(pandas.read_csv(path, sep=separator, nrows=0))  # with its names for empty cells
    csv.field_size_limit(2**31 - 1)  # a row may be long
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = filter(None, csv.reader(file, delimiter=separator))
        names = [name for name in next(lines, []) if name]
        first = next(lines, [])
    if len({*names}) < len(names):
        raise ValueError(f"the header has {max(names, key=names.count)!r} twice, so rename one")
    if len(first) > len(header):  # pandas takes the first ones for an index, and shifts the others
        raise ValueError(f"row 0 has {len(first)} fields and the header {len(header)}, so quote texts with separators")
    features = Features({name: Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def _json_rows(paths: Sequence[str], encoding: str) -> Iterator[dict[str, Any]]:
    """The objects of files in JSON lines, or in one array each; a line ends at a newline and nowhere else."""
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig" if encoding == "utf-8" else encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it.") from error
        is_array = text.lstrip().startswith("[")
        for number, line in enumerate([text] if is_array else text.split("\n"), 1):
            if not line.strip():
                continue
            where = path if is_array else f"Line {number} of {path}"
            try:
                found = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                fix = "give one object on each line, or one array of objects"
                raise ValueError(f"{where} is no valid JSON ({error}); {fix}.") from error
            for index, row in enumerate(found if is_array else [found]):
                where = f"Row {index} of {path}" if is_array else where
                if not isinstance(row, dict):
                    raise ValueError(f'{where} holds {row!r:.80}; give an object, such as {{"prompt": ...}}.')
                if "\\u" in line and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
                    raise ValueError(f"{where} has half a character, such as \\ud83d alone; write it whole.")
                yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a ValueError for a key that is given twice, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{max(found, key=[name for name, _ in pairs].count)!r} is given twice")
    return found


def _merge(kind: Any, value: Any) -> Any:
    """The feature that holds `value` too: Json for objects, and where values are of other kinds."""
    if value is None or isinstance(kind, Json):
        return kind
    first = kind == NOTHING
    if isinstance(value, list) and (first or isinstance(kind, List)):
        inner = functools.reduce(_merge, value, NOTHING if first else kind.feature)
        return inner if isinstance(inner, Json) else List(inner)
    fits = not isinstance(value, int) or -(2**63) <= value < 2**63
    own = SCALARS.get(type(value), Json()) if fits else Json()
    if first or own == kind:
        return own
    return SCALARS[float] if {str(own), str(kind)} == {str(SCALARS[int]), str(SCALARS[float])} else Json()


def _encoded(paths: Sequence[str], encoding: str, features: Features, written: Sequence[int]) -> Iterator[Any]:
    """The rows, those that are kept as JSON written so: `datasets` would take the text "12" for a number."""
    kept = {column for column, feature in features.items() if isinstance(feature, Json)}
    for row in _json_rows(paths, encoding):
        yield {name: json.dumps(row[name]) if name in kept else row[name] for name in row}


class _reading(NameCause):
    """Names the dataset in whatever a reader of `datasets` raises; the cause under it says what was wrong."""

    def __init__(self, field: str, name: str) -> None:
        super().__init__(f"Reading {field} {name}", "check its name and its rows.")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, (error and error.__cause__) or error, trace)


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
    names = [name for name in ("prompt", *QUESTIONS, "chosen", "rejected", *TEXTS) if name in dataset.column_names]
    rows: dict[str, list[int]] = {}
    for index, row in enumerate(dataset.select_columns(names) if names else ()):
        rows.setdefault(prompt_of(row), []).append(index)
    if len(rows) < 2:
        rows = {str(index): [index] for index in range(len(dataset))}
    drawn = sorted(rows)
    random.Random(0).shuffle(drawn)
    wanted, test = round(share * len(dataset)), list[int]()
    for prompt in reversed(drawn):
        if len(test) < wanted and len(test) + len(rows[prompt]) <= 2 * wanted:
            test += rows[prompt]
    return sorted(test or rows[min(rows, key=lambda prompt: len(rows[prompt]))])


def _split(dataset: Any, split: str, field: str) -> Any:
    if split not in dataset:
        share = ", or a share of the train split such as 0.1" if field == "dataset_test_split" else ""
        raise ValueError(f"{field} is {split!r}, and the dataset has {sorted(map(str, dataset))}; name one{share}.")
    return dataset[split]
