"""What a built-in task is: a source of examples and a verifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One question with everything that the three dataset kinds need, as plain text.

    `answer` is right, `corrupted` is wrong in one place, and `demonstration` is what supervised fine-tuning
    imitates: the answer, with as many errors as the task's config asks for.
    """

    question: str
    answer: str
    corrupted: str
    demonstration: str


@dataclass(frozen=True)
class Task:
    """A built-in task; one module defines it and one line of the registry in `ceu_rl.tasks` adds it.

    `configs` maps each config's name to the error rate of the demonstrations in its `sft` data; the first is
    the default. `make_examples(split, count, error_rate, seed)` returns `count` examples with distinct
    questions, none of which appears in the other split, whatever the two seeds.
    `is_correct(prompt, completion)` is the verifier. No answer has more than `max_new_tokens` tokens, the end
    token included.
    """

    name: str
    configs: Mapping[str, float]
    make_examples: Callable[[str, int, float, int], list[Example]]
    is_correct: Callable[[str | Messages, str | Messages], bool]
    max_new_tokens: int


def last_content(text_or_messages: str | Messages) -> str:
    """The text itself, or the content of the last message."""
    return text_or_messages if isinstance(text_or_messages, str) else text_or_messages[-1]["content"]
