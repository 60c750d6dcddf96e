"""What a task is: rows for each kind of training, and a verifier."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, str]]

KINDS = ("sft", "preference", "prompt")


@dataclass(frozen=True)
class Task:
    """A task, at one setting of it.

    `rows(kind, split, seed)` yields rows in TRL's conversational formats (see [`conversation`]), with distinct
    questions; none of the split "test" is in "train", whatever the two seeds. `score(row, answer)` is the verifier: a
    number from 0 to 1 for the text of an answer to a row's prompt, 1 if it is right. No right answer has more than
    `max_new_tokens` tokens, the end token included; None means the longest of the rows that are scored. At each
    evaluation `samples` answers are drawn to every question.
    """

    name: str
    rows: Callable[[str, str, int], Iterable[dict[str, Any]]]
    score: Callable[[Mapping[str, Any], str], float]
    max_new_tokens: int | None = None
    samples: int = 1


def conversation(kind: str, question: str, right: str | None, wrong: str = "", shown: str | None = None) -> dict:
    """A row with prompt and completion (`sft`; `shown`, or the right answer), prompt, chosen and rejected
    (`preference`), or prompt and answer (`prompt`). Every column but `answer` is a message list."""
    prompt = [{"role": "user", "content": question}]
    if kind == "prompt":
        return {"prompt": prompt, "answer": right}
    if kind == "sft":
        return {"prompt": prompt, "completion": _assistant(right if shown is None else shown)}
    return {"prompt": prompt, "chosen": _assistant(right), "rejected": _assistant(wrong)}


def _assistant(text: str | None) -> list[dict[str, str | None]]:
    return [{"role": "assistant", "content": text}]


def right_answer(row: Mapping[str, Any]) -> str | None:
    """The answer that a row of any kind shows as right; None where a task has only a verifier."""
    found = next(row[column] for column in ("answer", "completion", "chosen") if column in row)
    return None if found is None else last_content(found)


def last_content(text_or_messages: str | Messages) -> str:
    """The text itself, or that of the last message; what a tool says, or no message at all, is no answer: empty."""
    if isinstance(text_or_messages, str):
        return text_or_messages
    last: Any = text_or_messages[-1] if text_or_messages else {}
    content = None if last.get("role") == "tool" else last.get("content")
    if isinstance(content, list):  # parts, of which some are text
        return "".join(part.get("text") or "" for part in content)
    return content or ""
