"""Column addition, written out.

The question `827+695=` has one right answer, the columns from the units up and then the sum:

    7+5+0=12 2+9+1=12 8+6+1=15 1522

A column is `digit+digit+carry in=total`, with the total in two digits: the first is the carry into the next
column. A corrupted answer has exactly one computed digit changed, in a total or in the sum.
"""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

from ceu_rl.tasks.protocol import Messages, Task, conversation, last_content

NAME = "builtin:addition"
CONFIGS = {"clean": 0.0, "noisy": 0.04, "noisier": 0.13}  # error rate of the computed digits that `sft` rows show
ROWS = {"sft": 20_000, "preference": 9_600, "prompt": 9_600}
TEST_ROWS = 500
DIGITS = 3
TEST_SHARE = 16  # one pair in 16 belongs to the test split


def addition_trace(a: int, b: int) -> str:
    """The written-out addition of two non-negative numbers of at most `DIGITS` digits."""
    columns, carry = [], 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        columns.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return " ".join([*columns, str(a + b)])


def computed_places(trace: str) -> list[int]:
    """The places of the digits that are computed, not copied: those of the totals and of the sum."""
    return [place for run in re.finditer(r"(?<==)\d+|\d+$", trace) for place in range(*run.span())]


def change_digits(trace: str, places: list[int], rng: random.Random) -> str:
    """Change the digits at these places, each to another one."""
    characters = list(trace)
    for place in places:
        characters[place] = str((int(trace[place]) + rng.randint(1, 9)) % 10)
    return "".join(characters)


def is_correct(prompt: str | Messages, completion: str | Messages) -> bool:
    """Whether the completion is the right answer, character for character.

    The whole trace must be right, not only the sum. So the right answer is unique, and sampled accuracy is
    the mean of exp(its log-probability): accuracy and DPO's chosen log-probability speak of the same thing.
    Both arguments are text or a message list, of which the last message counts.
    """
    question = last_content(prompt)
    match = re.fullmatch(r"(\d+)\+(\d+)=", question, re.ASCII)
    if match is None or max(len(number) for number in match.groups()) > DIGITS:
        raise ValueError(f"{question!r} is no addition: use a prompt like '827+695=', up to {DIGITS} digits.")
    return last_content(completion) == addition_trace(int(match[1]), int(match[2]))


def make_examples(split: str, count: int, error_rate: float, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Draw `count` distinct questions of `split` ("train" or "test"), both numbers with `DIGITS` digits.

    Each comes with its answer, one that is wrong in one place, and the answer with errors at `error_rate`. A pair of
    numbers, in either order, belongs to test or to train once for all, by its checksum.
    """
    rng, errors = random.Random(f"{split} {seed}"), random.Random(f"{split} {seed} errors")
    seen: set[str] = set()
    while len(seen) < count:
        a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
        is_test = crc32(f"{min(a, b)}+{max(a, b)}".encode()) % TEST_SHARE == 0
        question = f"{a}+{b}="
        if is_test != (split == "test") or question in seen:
            continue
        seen.add(question)
        answer = addition_trace(a, b)
        places = computed_places(answer)
        wrong, slips = [rng.choice(places)], [place for place in places if errors.random() < error_rate]
        yield question, answer, change_digits(answer, wrong, rng), change_digits(answer, slips, errors)


def accuracy(prompts: list[str | Messages], completions: list[str | Messages], **kwargs: object) -> list[float]:
    """The verifier as a reward function for GRPO: 1 for the right answer, else 0."""
    return [float(is_correct(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def make_task(name: str, config: str | None = None) -> Task:
    """Column addition; the config, `clean` by default, sets the error rate of what the train split of `sft` shows."""
    config = next(iter(CONFIGS)) if config is None else config
    if config not in CONFIGS:
        raise ValueError(f"Unknown config {config!r} of {name}: choose one of {', '.join(CONFIGS)}.")

    def rows(kind: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
        count, error_rate = (ROWS[kind], CONFIGS[config]) if split == "train" else (TEST_ROWS, 0.0)
        yield from (conversation(kind, *example) for example in make_examples(split, count, error_rate, seed))

    longest = len(addition_trace(10**DIGITS - 1, 1)) + 1
    return Task(name, rows, _score, max_new_tokens=longest)


def _score(row: Mapping[str, Any], answer: str) -> float:
    return float(is_correct(row["prompt"], answer))
