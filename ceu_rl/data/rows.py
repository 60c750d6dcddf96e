"""One check of a dataset's rows for all methods, before anything is tokenized; and what tokenized rows tell.

TRL has two layouts: all texts, or all messages. A row that says the same in another way is brought into them:

| a row has | it becomes |
|---|---|
| `question`, `query`, `instruction` or `input`, and no `prompt` | that column is the prompt |
| a `prompt`, and whole conversations that say it | their prompt, and what follows it |
| messages beside a text | messages |
| `content` in parts of text | their text |

A column whose words are in neither prompt nor answer, such as a system prompt, is refused by its name.
"""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from datasets import Dataset, Features, IterableDataset, Json, Value, concatenate_datasets
from trl.data_utils import extract_prompt

from ..run.errors import note

Kind = Literal["sft", "preference", "prompt"]
Rows: TypeAlias = Dataset | IterableDataset

COMPLETIONS = {"sft": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}
TEXTS = ("messages", "text", "conversations", "input_ids")  # what else supervised fine-tuning can be made of
LAYOUT = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")  # TRL takes any for the layout
QUESTIONS = ("question", "query", "instruction", "input")
SYSTEMS = ("system", "system_prompt", "system_message")
CONTEXTS = tuple(
    "context contexts document documents passage passages history messages conversation conversations".split()
)
BESIDE = ("tools", "chat_template_kwargs")  # what the chat template takes of a row
IMAGES = ("image", "images")
WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # messages as Python or JSON writes them


def check_layout(dataset: Any, name: str, kind: Kind, num_proc: int | None = None, text_field: str = "text") -> Rows:
    """Judge every row of a dataset before it is tokenized, and bring it into the layout that TRL reads right.

    A text is a string; a conversation a list of messages with a role and content. Completions must not be empty: the
    last message has content, reasoning or a tool call. The rows of a stream are judged when they come. A dataset in
    which nothing has to change is returned as it is.

    Raises:
        ValueError: for what is no dataset, no rows or a column that is missing, and with row and column for a value
            that cannot be learned from, or that would be left unread.
    """
    columns = check_dataset(dataset, name, kind, text_field)
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        if kind != "prompt":  # what tokenization adds would not be among what the transform gives
            raise ValueError(f"The {name} dataset has a transform, which tokenization loses; apply it with map.")
        return dataset  # its rows are made when they are read, from columns that only it knows
    judged = _judged(columns, kind, text_field)
    if source := _source(columns, kind):
        note(f"The {name} dataset has no column 'prompt'; {source!r} is the prompt.")
    elif kind == "preference" and "prompt" not in columns and (others := sorted({*columns} - {*judged, *BESIDE})):
        note(
            f"The {name} dataset has no column 'prompt': the prompt is what 'chosen' and 'rejected' begin with alike, "
            f"and {others} is not read."
        )
    judge = _Judge(name, kind, text_field, pictured=bool({*IMAGES} & {*columns}))
    unread = [column for column in LAYOUT if column in columns and column not in judged and kind != "prompt"]
    if isinstance(dataset, IterableDataset):
        return dataset.map(judge, with_indices=True, remove_columns=unread)
    plain = dataset.with_format(None)  # not the tensors or arrays that it was set to give
    if kind != "prompt" and dataset.format["type"] is not None:  # TRL joins the lists of ids
        dataset = plain
    seen = (*judged, "prompt", *QUESTIONS, *SYSTEMS, *CONTEXTS, *BESIDE)
    asks = kind != "preference" or "prompt" in columns  # else any column may hold the prompt
    given = plain.select_columns([column for column in columns if column.lower() in seen or not asks])
    first = judge(given[0], 0)
    judge = dataclasses.replace(judge, chats=_is_chat(first))
    settings: dict[str, Any] = {"with_indices": True, "remove_columns": given.column_names, "num_proc": num_proc}
    if any(given.map(judge.changes, desc=f"Checking {name} dataset", **settings)["changes"]):
        features = Features({column: Json() if judge.chats else Value("string") for column in first})
        parts = given.map(judge, features=features, desc=f"Bringing the {name} dataset into TRL's layout", **settings)
        dataset = concatenate_datasets([plain.remove_columns([c for c in first if c in columns]), parts], axis=1)
    return dataset.remove_columns(unread) if unread else dataset


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Judges a row of a dataset, and gives the columns of it that TRL reads, in the layout that it reads right."""

    name: str
    kind: Kind
    text_field: str
    pictured: bool  # whether the dataset has a column of images
    chats: bool | None = None  # whether its first row is messages

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        _check_columns(row, self.name, self.kind, self.text_field)
        where, source = f"Row {index} of the {self.name} dataset", _source(row, self.kind)
        new = {**row, "prompt": row[source]} if source else dict(row)
        judged = [column for column in _judged(row, self.kind, self.text_field) if column in new]

        def refuse(column: str, problem: str, fix: str) -> ValueError:
            named = source if column == "prompt" and source else column
            return ValueError(f"{where} has {problem} {named!r} ({_short(new[column])}); {fix}.")

        for column in judged:
            self._check_cell(new, column, refuse)
            new[column] = plain_content(new[column])
        if self.kind != "prompt":
            _check_template_arguments(new, refuse)
        new |= _joined(new, [column for column in COMPLETIONS[self.kind] if column in row], refuse)
        others = {"prompt", *QUESTIONS, *SYSTEMS, *CONTEXTS} if self.kind != "prompt" else {*SYSTEMS}
        if self.kind == "preference" and "prompt" not in new and not _is_asked(new):
            others |= {column.lower() for column, value in row.items() if any(map(_is_prose, _leaves(value)))}
        if judged != ["input_ids"]:
            unread = [c for c in row if c.lower() in others and c not in {*judged, source, *BESIDE}]
            _check_unread(new, judged, unread, where)
        made = {column: new[column] for column in judged}
        if self.chats not in (None, _is_chat(made)):
            now, first = ("text", "messages") if self.chats else ("messages", "text")
            raise ValueError(f"{where} is {now}, and row 0 is {first}, by which TRL reads all; make them alike.")
        return made

    def changes(self, row: Mapping[str, Any], index: int) -> dict[str, bool]:
        """Whether a row has to change."""
        return {"changes": any(value is not row.get(column) for column, value in self(row, index).items())}

    def _check_cell(self, row: Mapping[str, Any], column: str, refuse: Any) -> None:
        value, completes = row[column], column in COMPLETIONS[self.kind]
        if column == "input_ids":
            if not isinstance(value, list) or not value or any(type(token) is not int or token < 0 for token in value):
                raise refuse(column, "no token ids as", "give a list of them, or the text")
            return
        rest = "remove the row or give it " + ("a completion" if completes else "one")
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise refuse(column, "an empty", rest)
        if isinstance(value, list):
            for turn in value:
                if problem := _turn_problem(turn, column == "conversations", self.pictured):
                    raise refuse(column, f"{problem} in", "give each message a role and text")
            if (completes or column == "messages") and is_empty(value[-1]):
                raise refuse(column, "an empty", rest)
        elif not isinstance(value, str) or column in ("messages", "conversations"):
            raise refuse(column, f"a {type(value).__name__} as", "make it text, or a list of messages")
        elif WRITTEN_CHAT.match(value):
            raise refuse(column, "messages that are written as text in", "save them as jsonl or parquet, not as CSV")


def check_dataset(dataset: Any, name: str, kind: Kind, text_field: str = "text") -> list[str]:
    """Its columns; a ValueError unless it is a dataset with rows and the columns needed."""
    if not isinstance(dataset, Rows):
        raise ValueError(f"The {name} dataset is {_short(dataset)}; give one datasets.Dataset.")
    columns = _columns(dataset, name)
    _check_columns(columns, name, kind, text_field)
    return columns


def check_columns(dataset: Rows, name: str, required: Sequence[str]) -> None:
    """Raise a ValueError if the dataset has no rows or lacks one of the required columns."""
    _require(_columns(dataset, name), name, required)


def _columns(dataset: Rows, name: str) -> list[str]:
    """The columns; a stream has them in its first row."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset has no rows; give it at least one.")
    return list(first)


def check_questions(dataset: Dataset, name: str) -> None:
    """Raise a ValueError for rows of question and answer whose other columns say what neither of the two says."""
    others = [c for c in dataset.column_names if c.lower() in (*QUESTIONS[1:], *SYSTEMS, *CONTEXTS)]
    for index, row in enumerate(dataset.select_columns(["question", "answer", *others]) if others else ()):
        _check_unread(row, ["question", "answer"], others, f"Row {index} of the {name} dataset")


def prompt_of(row: Mapping[str, Any]) -> str:
    """What a row asks, whatever its layout: two rows with the same are not in two parts."""
    asked = next((row[name] for name in ("prompt", *QUESTIONS) if row.get(name) is not None), None)
    with contextlib.suppress(LookupError, TypeError, AttributeError):  # which is judged later
        if asked is None and row.get("chosen") is not None:
            asked = extract_prompt({name: row[name] for name in ("chosen", "rejected")})["prompt"]
        elif asked is None:
            asked = next((row[name] for name in TEXTS if row.get(name) is not None), dict(row))
            asked = asked[:-1] if isinstance(asked, list) else asked
    return str(row if asked is None else asked).strip()


# tokenized rows

ANSWER_IDS = ("chosen_ids", "rejected_ids")


def check_prepared(prepared: Rows, dataset: Rows, name: str, args: Any) -> None:
    """Say how many rows TRL dropped, whose prompt leaves no room for a completion; a ValueError if it dropped all."""
    if not isinstance(prepared, Dataset) or not isinstance(dataset, Dataset):
        return
    if len(prepared) == 0:
        raise ValueError(f"Every prompt of the {name} dataset fills max_length ({args.max_length}); raise it.")
    if dropped := len(dataset) - len(prepared):
        note(f"{name} dataset: {dropped} of {len(dataset)} rows dropped: prompt fills max_length ({args.max_length}).")


def leave_ties_out(prepared: Any, dataset: Any, name: str, args: Any, leaves_out: bool) -> Any:
    """Leave the pairs out of what TRL prepared whose answers are the same after truncation, or else count them alone.

    Raises:
        ValueError: if no pair is left.
    """

    def compare(row: Mapping[str, Any]) -> dict[str, Any]:
        kept = [_kept(row, column, args.max_length, args.truncation_mode) for column in ANSWER_IDS]
        cut = sum(ids != row[column] for ids, column in zip(kept, ANSWER_IDS, strict=True))
        return {"tie": kept[0] == kept[1], "cut": cut}

    if isinstance(prepared, IterableDataset):
        return prepared.filter(lambda row: not compare(row)["tie"]) if leaves_out else prepared
    check_prepared(prepared, dataset, name, args)
    if ANSWER_IDS[0] not in prepared.column_names:  # of images, which are tokenized with their batch
        return prepared
    rows = prepared.select_columns(["prompt_ids", *ANSWER_IDS])
    found = rows.map(
        compare, remove_columns=rows.column_names, num_proc=args.dataset_num_proc, desc="Comparing answers"
    )
    ties = sum(found["tie"])
    note(
        f"The {name} dataset: {sum(found['cut'])} answers cut at max_length ({args.max_length}); {ties} pairs "
        f"{'left out' if leaves_out else 'without effect'}, whose two answers are the same."
    )
    if not ties or not leaves_out:
        return prepared
    if ties == len(prepared):
        raise ValueError(
            f"The {name} dataset: the answers are the same in all {ties} pairs, cut at max_length ({args.max_length}); "
            "give answers that differ, or raise max_length."
        )
    return prepared.select([number for number, tie in enumerate(found["tie"]) if not tie])


def _kept(row: Mapping[str, Any], column: str, max_length: int | None, truncation_mode: str) -> list[int]:
    """What TRL's collator leaves of a response."""
    if max_length is None:
        return row[column]
    if truncation_mode == "keep_end":
        return row[column][-max_length:]
    return row[column][: max(max_length - len(row["prompt_ids"]), 0)]


# columns


def _judged(columns: Iterable[str], kind: Kind, text_field: str) -> list[str]:
    if kind == "sft" and "completion" not in columns:
        return [next((column for column in (*TEXTS, text_field) if column in columns), text_field)]
    return ["prompt", *COMPLETIONS[kind]]


def _source(columns: Iterable[str], kind: Kind) -> str | None:
    """The column that is the prompt, where none has that name."""
    if "prompt" in columns or (kind == "sft" and "completion" not in columns):
        return None
    return next((column for column in QUESTIONS if column in columns), None)


def _check_columns(columns: Iterable[str], name: str, kind: Kind, text_field: str) -> None:
    columns = list(columns)
    required = list(COMPLETIONS[kind])
    if kind == "sft" and "completion" not in columns:
        texts = any(column in columns for column in (*TEXTS, text_field))
        required = [] if texts else ["completion" if "prompt" in columns else "messages"]
    elif kind != "preference" and not _source(columns, kind):
        required = ["prompt"]
    _require(columns, name, required)


def _require(columns: Iterable[str], name: str, required: Iterable[str]) -> None:
    for column in required:
        if column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            fix = f"rename {close[0]!r} to {column!r}" if close else f"add {column!r}, or rename the one that holds it"
            raise ValueError(f"The {name} dataset has no column {column!r} among {sorted(columns)}; {fix}.")


# rows


def _check_template_arguments(row: Mapping[str, Any], refuse: Any) -> None:
    tools = row.get("tools")
    with contextlib.suppress(ValueError):  # TRL reads them from JSON too
        tools = json.loads(tools) if isinstance(tools, str) else tools
    given = {"tools": (tools, list | None), "chat_template_kwargs": (row.get("chat_template_kwargs", {}), Mapping)}
    for column, (value, kind) in given.items():
        if not isinstance(value, kind):  # type: ignore[arg-type]
            fix = "give what the chat template takes, or remove the column"
            raise refuse(column, f"a {type(row[column]).__name__} as", fix)


def _joined(row: Mapping[str, Any], completions: Sequence[str], refuse: Any) -> dict[str, Any]:
    """Prompt and completions as one of the two layouts that TRL knows: all text, or all messages without the prompt."""
    chats, prompt = [column for column in completions if isinstance(row[column], list)], row.get("prompt")
    if 0 < len(chats) < len(completions):
        text = next(column for column in completions if column not in chats)
        raise refuse(text, "text beside messages in", "make all completions text, or all of them messages")
    if prompt is None or not completions or (isinstance(prompt, str) and not chats):
        return {}
    if not chats:  # completions as text: each is the assistant's turn
        return {column: [{"role": "assistant", "content": row[column]}] for column in completions}
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if asked[-1]["role"] != "user" or all(row[column][0]["role"] == "assistant" for column in completions):
        return {"prompt": asked}
    for column in completions:
        said = [_text(message) for message in row[column]]
        if not all(any(_text(message).strip() in text for text in said) for message in asked):
            fix = "give one prompt, in the conversation"
            raise refuse("prompt", f"words that are in no message of {column!r} as", fix)
    if len(completions) == 2:
        return dict(extract_prompt({column: row[column] for column in completions}))
    messages = row[completions[0]]  # the answer is the last turn
    if len(messages) < 2:
        raise refuse(completions[0], "no answer in", "add the assistant's turn")
    return {"prompt": messages[:-1], completions[0]: messages[-1:]}


def _check_unread(row: Mapping[str, Any], judged: Sequence[str], others: Sequence[str], where: str) -> None:
    """Raise a ValueError for a column whose words are nowhere in what is learned."""
    if not others:
        return
    read = _squeezed(" ".join(text for column in judged for text in _leaves(row.get(column))))
    for column in others:
        if any(_squeezed(text) not in read for text in _leaves(row[column])):
            raise ValueError(
                f"{where} has {column!r} ({_short(row[column])}), which is in neither prompt nor answer; move it there."
            )


def _is_chat(row: Mapping[str, Any]) -> bool:
    return any(column != "input_ids" and isinstance(value, list) for column, value in row.items())


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


def _is_prose(text: str) -> bool:
    """Whether a text is more than a label; not every script has spaces."""
    return len(text.split()) > 1 or not text.isascii()


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _turn_problem(turn: Any, is_from_value: bool, pictured: bool) -> str | None:
    if is_from_value:  # a layout that TRL turns into messages
        return None if isinstance(turn, Mapping) and {"from", "value"} <= set(turn) else "a turn without from and value"
    if not isinstance(turn, Mapping):
        return f"the item {_short(turn)}"
    if not isinstance(turn.get("role"), str):
        return f"a message without a role ({_short(dict(turn))})"
    content = turn.get("content")
    if not (content is None or isinstance(content, str | list)):
        return f"a content of type {type(content).__name__}"
    kinds = {str(part.get("type")) for part in _parts(turn)}
    if unread := sorted(kinds & {"image", "image_url", "video", "audio"}) if not pictured else []:
        return f"content of type {unread[0]}, which TRL takes from a column 'images' alone,"
    # Many datasets have a system message of no words
    empty = turn["role"] == "user" and is_empty(turn)
    if empty or (turn["role"] == "system" and content is None):
        return f"a message without content ({_short(dict(turn))})"
    return None


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn says nothing: no content, no reasoning, no tool call."""
    said = [_text(message), *(str(message.get(name) or "") for name in ("reasoning_content", "thinking", "reasoning"))]
    shown = any(part.get("type") not in (None, "text") for part in _parts(message))
    called = message.get("tool_calls") or message.get("function_call")
    return not called and not shown and not any(text.strip() for text in said)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _text(message: Mapping[str, Any]) -> str:
    if isinstance(message.get("content"), list):
        return "".join(str(part.get("text") or "") for part in _parts(message))
    return message.get("content") or ""


def plain_content(value: Any) -> Any:
    """A conversation whose content is text alone, with parts of text joined: a template of text writes their Python."""
    messages = [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    if not parts or not all(isinstance(part, Mapping) and part.get("type") in (None, "text") for part in parts):
        return value
    return [{**each, "content": _text(each)} if isinstance(each.get("content"), list) else each for each in messages]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
