"""One check of a dataset's rows for all methods, before anything is tokenized; and what tokenized rows tell.

| columns | become |
|---|---|
| `question`, `query`, `instruction` (with `input`) or `input`, where there is no `prompt` | the prompt |
| `system`, `system_prompt` | a system message before the prompt; before a text, a paragraph |
| a `prompt` beside whole conversations, or messages beside text | one of TRL's two layouts |

A column of these whose words are in neither prompt nor answer is refused.
"""

import contextlib
import difflib
import functools
import json
import re
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, Json, Value, concatenate_datasets
from trl.data_utils import extract_prompt

from ..run.errors import note

Kind = Literal["sft", "preference", "prompt"]
Rows = Dataset | IterableDataset

COMPLETIONS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}
TEXTS = ("messages", "text", "conversations", "input_ids")  # what else supervised fine-tuning can be made of
MESSAGES = ("prompt", "completion", "chosen", "rejected", "messages")
LAYOUT = (*MESSAGES, "conversations")  # TRL takes any for the layout
QUESTIONS = ("question", "query", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
CONTEXTS = ("context", "history", "messages", "conversations")
BESIDE = ("tools", "chat_template_kwargs")  # what the chat template takes of a row
WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # messages as Python or JSON writes them


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

    A text is a string; a conversation a list of messages with a role and content. Completions must not be empty: the
    last message has content, reasoning or a tool call. What the table above names is said, and done.

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
            that cannot be learned from, or that would be left unread.
    """
    check_dataset(dataset, name, kind, text_field)
    if _is_transformed(dataset):
        if kind != "prompt":  # what tokenization adds would not be among what the transform gives
            raise ValueError(f"The {name} dataset has a transform, which tokenization loses; apply it with map.")
        return dataset  # its rows are made when they are read, from columns that only it knows
    judge = _Judge(name, kind, text_field, blank_user)
    if isinstance(dataset, IterableDataset):
        if kind != "preference":  # of pairs TRL looks at the first row itself
            with first_row(name):
                next(iter(dataset))
        unread = [] if kind == "prompt" else list(LAYOUT)
        return dataset.map(judge, with_indices=True, remove_columns=unread)
    columns = dataset.column_names
    judged = _judged(columns, kind, text_field)
    judge.note_columns(columns)
    unread = [column for column in LAYOUT if column in columns and column not in judged and kind != "prompt"]
    plain = dataset.with_format(None)  # not the tensors or arrays that it was set to give
    if kind != "prompt" and dataset.format["type"] is not None:  # TRL joins the lists of ids
        dataset = plain
    others = ("prompt", *QUESTIONS, *SYSTEMS, *CONTEXTS, *BESIDE)
    seen = [column for column in columns if column in (*judged, *others)]
    given = plain if kind == "preference" and "prompt" not in columns else plain.select_columns(seen)
    settings: dict[str, Any] = {"with_indices": True, "remove_columns": given.column_names, "num_proc": num_proc}
    found = given.map(judge.describe, desc=f"Checking {name} dataset", **settings)
    chats = found["_chat"][:]
    if len(set(chats)) > 1:
        index = chats.index(not chats[0])
        now, first = ("messages", "text") if chats[index] else ("text", "messages")
        raise ValueError(
            f"Row {index} of the {name} dataset is {now}, and row 0 is {first}, by which TRL reads all; make "
            "them one or the other."
        )
    if any(found["_changed"]):
        made = [column for column in judged if column in columns or (column == "prompt" and _sources(columns, kind))]
        features = Features({column: Json() if chats[0] else Value("string") for column in made})
        parts = given.map(judge, features=features, desc=f"Bringing the {name} dataset into TRL's layout", **settings)
        dataset = concatenate_datasets([plain.remove_columns([c for c in made if c in columns]), parts], axis=1)
    return dataset.remove_columns(unread) if unread else dataset


@dataclass
class _Judge:
    """Judges a row of a dataset, and gives the columns of it that TRL reads."""

    name: str
    kind: Kind
    text_field: str
    blank_user: bool
    noted: bool = False

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        new = _normal_row(row, index, self.name, self.kind, self.text_field, self.blank_user)
        if not self.noted:  # of a stream the first row tells the columns
            self.note_columns(list(row))
        return {column: row[column] for column in _judged(row, self.kind, self.text_field) if column in row} | new

    def describe(self, row: Mapping[str, Any], index: int) -> dict[str, bool]:
        """Whether a row has to change, and whether it is messages."""
        made = self(row, index)
        changed = any(value is not row.get(column) for column, value in made.items())
        return {
            "_changed": changed,
            "_chat": any(column != "input_ids" and isinstance(made[column], list) for column in made),
        }

    def note_columns(self, columns: Sequence[str]) -> None:
        """Say what is taken from where."""
        self.noted, name, judged = True, self.name, _judged(columns, self.kind, self.text_field)
        if sources := _sources(columns, self.kind):
            note(f"The {name} dataset has no column 'prompt'; {' and '.join(map(repr, sources))} is the prompt.")
        elif self.kind == "preference" and "prompt" not in columns:
            if others := sorted({*columns} - {*judged, *BESIDE}):
                note(
                    f"The {name} dataset has no column 'prompt': the prompt is what 'chosen' and 'rejected' begin with "
                    f"alike, and {others} is not read."
                )
        if (system := next((column for column in SYSTEMS if column in columns), None)) and judged[0] in LAYOUT:
            note(f"Each prompt of the {name} dataset begins with its {system!r}.")


def check_dataset(dataset: Any, name: str, kind: Kind, text_field: str = "text") -> None:
    """What [`check_layout`] can tell without reading a row: whether it is a dataset, with rows and the columns needed.

    Raises:
        ValueError: if not.
    """
    if not isinstance(dataset, Rows):
        raise ValueError(
            f"The {name} dataset is a {type(dataset).__name__} ({_short(dataset)}); give one datasets.Dataset, such as "
            "load_dataset gives of a name and a split."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset has no rows; give it at least one.")
    columns = list(dataset[0]) if _is_transformed(dataset) else dataset.column_names
    if columns is not None:  # a stream that was not looked at tells them with its first row
        _check_columns(columns, name, kind, text_field)


def check_columns(dataset: Dataset | IterableDataset, name: str, required: Sequence[str]) -> None:
    """Raise a ValueError if the dataset has no rows or lacks one of the required columns."""
    with first_row(name):
        columns: dict[str, Any] = next(iter(dataset))
    _require(columns, name, required)


def check_questions(dataset: Dataset, name: str) -> None:
    """Raise a ValueError for rows of question and answer whose other columns say what neither of the two says."""
    others = [c for c in (*QUESTIONS[1:], *SYSTEMS, *CONTEXTS) if c in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(["question", "answer", *others]) if others else ()):
        _check_unread(row, ["question", "answer"], others, f"Row {index} of the {name} dataset")


@contextlib.contextmanager
def first_row(name: str) -> Iterator[None]:
    """Says of a stream that it has no rows, where TRL looks at the first one and meets its end."""
    try:
        yield
    except StopIteration as error:
        raise ValueError(f"The {name} dataset has no rows; give it at least one.") from error


def prompt_of(row: Mapping[str, Any]) -> str:
    """What a row asks, whatever its layout: two rows with the same are not in two parts."""
    asked = row.get("prompt")
    if asked is None and (sources := [name for name in QUESTIONS if row.get(name) is not None]):
        asked = row[sources[0]] if len(sources) == 1 else "\n\n".join(str(row[name]) for name in sources)
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


# tokenized rows

ANSWER_IDS = ("chosen_ids", "rejected_ids")


def leave_ties_out(prepared: Any, dataset: Any, name: str, args: Any, leaves_out: bool) -> Any:
    """Leave the pairs out whose answers are the same after truncation, and say what became of the rows.

    Args:
        prepared: What TRL tokenized of the dataset.
        dataset: The dataset.
        name: What it is called in messages, such as train.
        args: `max_length`, `truncation_mode` and `dataset_num_proc`.
        leaves_out: False counts them alone.

    Raises:
        ValueError: if no pair is left.
    """

    def kept(row: Mapping[str, Any]) -> list[list[int]]:
        return [_kept(row, column, args.max_length, args.truncation_mode) for column in ANSWER_IDS]

    def compare(row: Mapping[str, Any]) -> dict[str, Any]:
        chosen, rejected = kept(row)
        return {
            "tie": chosen == rejected,
            "cut": sum(ids != row[c] for ids, c in zip(kept(row), ANSWER_IDS, strict=True)),
        }

    if isinstance(prepared, IterableDataset):
        return prepared.filter(lambda row: not compare(row)["tie"]) if leaves_out else prepared
    if len(prepared) == 0:
        raise ValueError(
            f"Every prompt of the {name} dataset has max_length ({args.max_length}) tokens or more, which leaves no "
            "completion to learn from; raise max_length."
        )
    if ANSWER_IDS[0] not in prepared.column_names:  # of images, which are tokenized with their batch
        return prepared
    columns = ["prompt_ids", *ANSWER_IDS]
    found = prepared.select_columns(columns).map(
        compare, remove_columns=columns, num_proc=args.dataset_num_proc, desc="Comparing answers"
    )
    tied, ties, rows = found["tie"][:], sum(found["tie"]), len(dataset)
    note(
        f"The {name} dataset has {rows} rows: {rows - len(prepared)} dropped, whose prompt fills max_length "
        f"({args.max_length}); {sum(found['cut'])} answers cut there; {ties} pairs "
        f"{'left out' if leaves_out else 'without effect'}, whose two answers are the same."
    )
    if not ties or not leaves_out:
        return prepared
    if ties == len(prepared):
        raise ValueError(
            f"In each of the {ties} pairs of the {name} dataset the two answers are the same, with what max_length "
            f"({args.max_length}) leaves of them; give answers that differ, or raise max_length."
        )
    return prepared.select([number for number, tie in enumerate(tied) if not tie])


def mean_response_tokens(dataset: Any, max_length: int | None, truncation_mode: str = "keep_start") -> dict[str, float]:
    """Mean number of tokens of a chosen and of a rejected response that the loss counts, after truncation.

    Empty for a dataset that was not tokenized beforehand (a stream, images).
    """
    if not isinstance(dataset, Dataset) or not {"prompt_ids", *ANSWER_IDS} <= set(dataset.column_names):
        return {}

    def scored(row: Mapping[str, Any], column: str) -> int:  # the first of a sequence is predicted from nothing
        kept = len(_kept(row, column, max_length, truncation_mode))
        return max(kept - (not row["prompt_ids"] or kept == max_length), 0)

    rows = dataset.select_columns(["prompt_ids", *ANSWER_IDS])
    return {column.removesuffix("_ids"): sum(scored(row, column) for row in rows) / len(rows) for column in ANSWER_IDS}


def _kept(row: Mapping[str, Any], column: str, max_length: int | None, truncation_mode: str) -> list[int]:
    """What TRL's collator leaves of a response."""
    if max_length is None:
        return row[column]
    if truncation_mode == "keep_end":
        return row[column][-max_length:]
    return row[column][: max(max_length - len(row["prompt_ids"]), 0)]


def name_rows(batch: Mapping[Any, str], dataset: Iterable[Hashable]) -> list[str]:
    """Each row of a batch by its number in the dataset and its text, such as `row 3 ('In Oslo.')`.

    Args:
        batch: The text of each row by what tells it from others, such as its token ids.
        dataset: What tells each row of the dataset from others, in order.
    """
    numbers = {key: number for number, key in enumerate(dataset) if key in batch}
    return [f"row {numbers.get(key, 'unknown')} ({textwrap.shorten(text, 60)!r})" for key, text in batch.items()]


# columns


def _is_transformed(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _judged(columns: Iterable[str], kind: Kind, text_field: str) -> list[str]:
    if kind == "sft" and "completion" not in columns:
        return [next((column for column in (*TEXTS, text_field) if column in columns), text_field)]
    return ["prompt", *COMPLETIONS[kind]]


def _sources(columns: Iterable[str], kind: Kind) -> list[str]:
    """The columns that are the prompt, where there is no other."""
    if "prompt" in columns or (kind == "sft" and "completion" not in columns):
        return []
    return [column for column in QUESTIONS if column in columns]


def _check_columns(columns: Iterable[str], name: str, kind: Kind, text_field: str) -> None:
    columns = list(columns)
    sources, required = _sources(columns, kind), list(COMPLETIONS[kind])
    if kind == "sft" and "completion" not in columns:
        texts = any(column in columns for column in (*TEXTS, text_field))
        required = [] if texts else ["completion" if "prompt" in columns else "messages"]
    elif kind != "preference" and not sources:
        required = ["prompt"]
    _require(columns, name, required)
    if len(sources) > 1 and sources != ["instruction", "input"]:
        raise ValueError(f"The {name} dataset has {sources} and no 'prompt'; make one column 'prompt' of them.")


def _require(columns: Iterable[str], name: str, required: Iterable[str]) -> None:
    for column in required:
        if column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            fix = f"rename {close[0]!r} to {column!r}" if close else f"add {column!r}, or rename the one that holds it"
            raise ValueError(f"The {name} dataset has no column {column!r} among {sorted(columns)}; {fix}.")


# rows


def _normal_row(
    row: Mapping[str, Any], index: int, name: str, kind: Kind, text_field: str, blank_user: bool = False
) -> dict[str, Any]:
    """The columns that have to change for TRL."""
    _check_columns(row, name, kind, text_field)
    judged, sources, where = _judged(row, kind, text_field), _sources(row, kind), f"Row {index} of the {name} dataset"
    new = dict(row)

    def refuse(column: str, problem: str, fix: str) -> ValueError:
        return ValueError(f"{where} has {problem} {column!r} ({_short(new[column])}); {fix}.")

    for column in (*sources[:1], *judged):
        if column in new:
            _check_cell(new[column], column, column in COMPLETIONS[kind], blank_user, functools.partial(refuse, column))
    if kind != "prompt":
        tools, kwargs = row.get("tools"), row.get("chat_template_kwargs", {})
        with contextlib.suppress(ValueError):
            tools = json.loads(tools) if isinstance(tools, str) else tools
        for column, wrong in (
            ("tools", not isinstance(tools, list | None)),
            ("chat_template_kwargs", not isinstance(kwargs, Mapping)),
        ):
            if wrong:
                fix = "give what the chat template takes, or remove the column"
                raise refuse(column, f"a {type(row[column]).__name__} as", fix)
    new |= {column: plain_content(new[column]) for column in (*sources[:1], *judged) if column in new}
    completions = tuple(column for column in COMPLETIONS[kind] if column in row)
    if sources:
        new |= _asked(new, sources, completions, refuse)
    new |= _joined(new, completions, refuse)
    new |= _with_system(new, judged, refuse)
    if kind != "prompt" and judged != ["input_ids"]:
        others = [c for c in ("prompt", *QUESTIONS, *SYSTEMS, *CONTEXTS) if c in row and c not in (*judged, *sources)]
        _check_unread(new, judged, others, where)
        if kind == "preference" and "prompt" not in new and not _is_asked(new):
            prose = [c for c, value in row.items() if isinstance(value, str) and len(value.split()) > 1]
            _check_unread(new, judged, [column for column in prose if column not in (*judged, *BESIDE)], where)
    return {column: new[column] for column in ("prompt", *judged) if new.get(column) is not row.get(column)}


def _check_cell(value: Any, column: str, completes: bool, blank_user: bool, refuse: Any) -> None:
    """Judge a text, a conversation or token ids."""
    if column == "input_ids":
        if not isinstance(value, list) or not value or any(type(token) is not int or token < 0 for token in value):
            raise refuse("no token ids as", "give a list of them, or the text")
        return
    rest = "remove the row or give it " + ("a completion" if completes else "one")
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise refuse("an empty", rest)
    if isinstance(value, list):
        if column == "conversations":  # of the layout from/value, which TRL turns into messages
            if not all(isinstance(turn, Mapping) and {"from", "value"} <= set(turn) for turn in value):
                raise refuse("a turn without from and value in", "give each both, or name the column messages")
            return
        if problem := next((p for message in value if (p := _message_problem(message, blank_user))), None):
            raise refuse(f"{problem} in", "give each message a role and content")
        if (completes or column == "messages") and is_empty(value[-1]):
            raise refuse("an empty", rest)
    elif not isinstance(value, str) or column in ("messages", "conversations"):
        raise refuse(f"a {type(value).__name__} as", "make it text, or a list of messages")
    elif WRITTEN_CHAT.match(value):
        raise refuse("messages that are written as text in", "save them as jsonl or parquet, not as CSV")


def _asked(row: Mapping[str, Any], sources: Sequence[str], completions: tuple[str, ...], refuse: Any) -> dict[str, Any]:
    """The prompt out of the columns that hold it."""
    asked = row[sources[0]]
    for more in sources[1:]:
        if not isinstance(asked, str) or not isinstance(row[more] or "", str):
            raise refuse(more, f"a {type(row[more]).__name__} as", "make it text, or one column 'prompt' of both")
        asked = f"{asked}\n\n{row[more]}" if (row[more] or "").strip() else asked
    if isinstance(asked, str) and len(completions) == 2:
        if all(isinstance(row[column], str) and asked.strip() in row[column] for column in completions):
            return dict(extract_prompt({column: row[column] for column in completions}))
    return {"prompt": asked}


def _joined(row: Mapping[str, Any], completions: tuple[str, ...], refuse: Any) -> dict[str, Any]:
    """Prompt and completions as one of the two layouts that TRL knows: all text, or all messages without the prompt."""
    kinds = {column: isinstance(row[column], list) for column in completions}
    if len(set(kinds.values())) > 1:
        column = next(column for column, is_list in kinds.items() if not is_list)
        raise refuse(column, "text beside messages in", "make all completions text, or all of them messages")
    prompt, chats = row.get("prompt"), any(kinds.values())
    if not kinds or prompt is None:
        return {}
    if not chats:
        if isinstance(prompt, list):  # completions as text: each is the assistant's turn
            return {column: [{"role": "assistant", "content": row[column]}] for column in completions}
        return {}
    if isinstance(prompt, list):
        heads = {column: _plain(row[column][: len(prompt)]) == _plain(prompt) for column in completions}
        for column, head in heads.items():
            roles = [messages[0].get("role") for messages in (prompt[-1:], row[column]) if messages]
            if not head and roles in (["user", "user"], ["user", "system"]):
                raise refuse(
                    "prompt", f"messages that {column!r} does not begin with as", "give one prompt, in the conversation"
                )
        if not all(len(row[column]) > len(prompt) for column, head in heads.items() if head):
            return {}
        return {column: row[column][len(prompt) :] for column, head in heads.items() if head}
    if all(row[column][0]["role"] == "assistant" for column in completions):
        return {"prompt": [{"role": "user", "content": prompt}]}
    for column in completions:
        if not any(prompt.strip() in _text(message) for message in row[column]):
            raise refuse(
                "prompt", f"a text that is in no message of {column!r} as", "give one prompt, in the conversation"
            )
    if len(completions) == 1:  # all but the last turn
        messages = row[completions[0]]
        if len(messages) < 2:
            raise refuse(completions[0], "no answer in", "add the assistant's turn")
        return {"prompt": messages[:-1], completions[0]: messages[-1:]}
    return dict(extract_prompt({column: row[column] for column in completions}))


def _with_system(row: Mapping[str, Any], judged: Sequence[str], refuse: Any) -> dict[str, Any]:
    """What a row begins with, and its system prompt before it."""
    column = next((column for column in SYSTEMS if column in row), "")
    text, prompt = row.get(column), row.get("prompt")
    if text is None or text == "":
        return {}
    if not isinstance(text, str):
        raise refuse(column, f"a {type(text).__name__} as", "make it text")
    if isinstance(prompt, str):
        return {} if _squeezed(text) in _squeezed(prompt) else {"prompt": f"{text}\n\n{prompt}"}
    places = ["prompt"] if prompt else [c for c in judged if c in MESSAGES and isinstance(row.get(c), list)]
    if any(row[place][0]["role"] == "system" for place in places):
        return {}  # the words of another system prompt are unread
    return {place: [{"role": "system", "content": text}, *row[place]] for place in places}


def _check_unread(row: Mapping[str, Any], judged: Sequence[str], others: Sequence[str], where: str) -> None:
    """Raise a ValueError for a column whose words are nowhere in what is learned."""
    if not others:
        return
    read = _squeezed(" ".join(text for column in judged for text in _leaves(row.get(column))))
    for column in others:
        if any(_squeezed(text) not in read for text in _leaves(row[column])):
            raise ValueError(
                f"{where} has {column!r} ({_short(row[column])}), which is in neither prompt nor answer; put it into "
                "'prompt', or remove the column."
            )


def _is_asked(row: Mapping[str, Any]) -> bool:
    """Whether two conversations without a prompt begin with what a user said."""
    chosen, rejected = row["chosen"], row["rejected"]
    return isinstance(chosen, list) and chosen[0]["role"] != "assistant" and chosen[0] == rejected[0]


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a cell: itself, or what its messages say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from () if name in ("role", "from", "type", "id") else _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _message_problem(message: Any, blank_user: bool) -> str | None:
    if not isinstance(message, Mapping):
        return f"the item {_short(message)}"
    if not isinstance(message.get("role"), str):
        return f"a message without a role ({_short(dict(message))})"
    content = message.get("content")
    if not (content is None or isinstance(content, str | list)):
        return f"a content of type {type(content).__name__}"
    # Many datasets have a system message of no words
    empty = message["role"] == "user" and not blank_user and is_empty(message)
    if empty or (message["role"] == "system" and content is None):
        return f"a message without content ({_short(dict(message))})"
    return None


def is_empty(message: Mapping[str, Any]) -> bool:
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


def plain_content(value: Any) -> Any:
    """A conversation whose content is text alone, with parts of text joined: a template of text writes their Python."""
    messages = [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    if not parts or not all(isinstance(part, Mapping) and part.get("type") in (None, "text") for part in parts):
        return value
    return [{**each, "content": _text(each)} if isinstance(each.get("content"), list) else each for each in messages]


def _plain(messages: Iterable[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    return [(message.get("role"), _text(message).strip()) for message in messages]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
