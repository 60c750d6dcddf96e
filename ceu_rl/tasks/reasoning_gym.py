"""`reasoning_gym:TASK`: the procedural tasks of Reasoning Gym (Stojanovski et al. 2025, arXiv 2505.24760) as datasets.

The fields of a task are set by `dataset_config`, as its config takes them; `size` is the number of train rows:

    dataset_name: reasoning_gym:chain_sum
    dataset_config: "min_terms=2, max_terms=2, size=1000"

A question belongs to test or to train once for all, by its checksum. The column `entry` holds what the verifier of the
library needs; `score_answer` reads it as a reward function. A few tasks (such as `ransom_note`) draw from sets, so that
their questions also depend on `PYTHONHASHSEED`.
"""

import ast
import contextlib
import functools
import hashlib
import io
import itertools
import math
import random
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ceu_rl.tasks.protocol import Messages, Task, conversation, last_content

PREFIX = "reasoning_gym:"
TRAIN_ROWS = 2000
TEST_ROWS = 100  # no more than train rows
TEST_SHARE = 8  # one question in 8 belongs to the test split
SAMPLES = 8
TRIES = 20  # draws of which one must give a question
OTHERS = 20  # answers to other questions, which may be wrong ones
NOT_A_NUMBER = re.compile(r"(?<![a-z])nanj?(?![a-z])", re.IGNORECASE)  # which some verifiers find near to any number
# What a verifier raises for an answer that it cannot read
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)


def make_task(name: str, config: str | None = None) -> Task:
    """A task of the library with its fields set; a ValueError if one is unknown or does not fit."""
    task = name.removeprefix(PREFIX)
    _dataset(task, config)
    rows = functools.partial(_rows, task, config)
    return Task(name, rows, lambda row, answer: _score(row["entry"], answer), samples=SAMPLES)


def score_answer(
    prompts: Sequence[Any], completions: Sequence[str | Messages], entry: Sequence[str], **kwargs: Any
) -> list[float]:
    """The library's `score_answer` as a reward function for GRPO: 0 to 1, with part of it for some wrong answers."""
    return [_score(one, last_content(completion)) for one, completion in zip(entry, completions, strict=True)]


def _score(entry: str, answer: str) -> float:
    held = ast.literal_eval(entry)
    return _verify(_dataset(held.pop("task"), held.pop("config")), held, answer.strip())


def _verify(dataset: Any, entry: Mapping[str, Any], answer: str) -> float:
    if NOT_A_NUMBER.search(answer) and answer != entry["answer"]:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # some verifiers print
        try:
            found = float(dataset.score_answer(answer, entry))
            return 0.0 if math.isnan(found) else found
        except UNREADABLE:
            return 0.0


def _rows(task: str, config: str | None, kind: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    verifier = _dataset(task, config)
    count = _settings(task, config).get("size", TRAIN_ROWS)
    count = count if split == "train" else min(count, TEST_ROWS)
    # Some tasks have few questions: where no new ones come, the split ends with fewer rows
    drawn = _dataset(task, config, seed, 4 * TEST_SHARE * count)
    rng, seen = random.Random(f"{split} {seed}"), set()
    others = [entry["answer"] for entry in itertools.islice(_draws(drawn), OTHERS)]
    for entry in _draws(drawn):
        question = entry["question"]
        # A cyclic checksum is linear: over questions that differ in few characters it can miss the test split
        is_test = hashlib.sha256(question.encode()).digest()[0] % TEST_SHARE == 0
        if is_test != (split == "test") or question in seen:
            continue
        if kind != "prompt" and not (entry["answer"] or "").strip():
            continue
        held = repr(_plain({"task": task, "config": config, **entry}))  # a literal, which `_score` reads again
        try:
            ast.literal_eval(held)
        except (ValueError, SyntaxError):
            continue  # what the verifier needs cannot be kept in a column
        wrong = ""
        if kind == "preference":
            tried = (each for each in wrong_answers(entry["answer"], others, rng) if each.strip())
            wrong = next((each for each in tried if _verify(verifier, entry, each) < 1), "")
            if not wrong:
                continue
        seen.add(question)
        yield {**conversation(kind, question, entry["answer"], wrong), "entry": held}
        if len(seen) == count:
            return
    if not seen:
        needs = {"prompt": "", "sft": " with a right answer", "preference": " with a right answer and a wrong one"}
        raise ValueError(
            f"{PREFIX}{task} has no question{needs[kind]} for {split} among {drawn.size}; let its fields vary more, or "
            "train by reward alone (ceu-rl grpo)."
        )


def _draws(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The questions but those that the library fails to draw, as some tasks do by chance."""
    drawn = 0
    for index in range(dataset.size):
        try:
            entry = dataset[index]
        except (AssertionError, RuntimeError, *UNREADABLE) as error:
            if not drawn and index + 1 == TRIES:
                raise ValueError(f"{dataset.config} gives no question ({error}); mend dataset_config.") from error
            continue
        drawn += 1
        yield entry


def _plain(value: Any) -> Any:
    """The same without types of numpy, whose repr is no literal."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple, set) else value


def wrong_answers(right: str, others: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Answers in the form of the right one to try in turn: one digit changed, or the answer to another question."""
    digits = [match.start() for match in re.finditer(r"[0-9]", right)]
    for _ in range(10 if digits else 0):
        place = rng.choice(digits)
        leads = right[place + 1 : place + 2].isdigit() and not right[place - 1 : place].isdigit()
        new = rng.choice([digit for digit in "0123456789"[leads:] if digit != right[place]])
        yield right[:place] + new + right[place + 1 :]
    yield from (other for other in rng.sample(others, len(others)) if other != right)


@functools.cache
def _dataset(task: str, config: str | None, seed: int = 0, size: int = TRAIN_ROWS) -> Any:
    """The library's dataset, from which questions are drawn by index."""
    settings = {"seed": seed, **_settings(task, config), "size": size}
    try:
        return _factory().create_dataset(task, **settings)
    except (AssertionError, *UNREADABLE) as error:
        raise ValueError(f"{PREFIX}{task} does not work with {config or 'its default config'}: {error}.") from error


def _factory() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ImportError(f"{PREFIX}TASK needs the package reasoning-gym; pip install 'ceu-rl[tasks]'.") from error
    return factory


def _settings(task: str, config: str | None) -> dict[str, Any]:
    """The fields that `name=value, name=value` sets, in the types of their annotations."""
    _, config_class = _factory().DATASETS.get(task, (None, object))
    from pydantic import TypeAdapter, ValidationError  # of the extra `tasks`, as the library

    try:
        call: Any = ast.parse(f"dict({config or ''})", mode="eval").body
        given = {each.arg: ast.literal_eval(_Words().visit(each.value)) for each in call.keywords}
        if call.args or None in given or len(given) < len(call.keywords):
            raise ValueError("no list of fields")
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"dataset_config is {config!r}; write it as in 'min_terms=2, max_terms=2', each field once."
        ) from error
    hints = typing.get_type_hints(config_class)
    for name in given.keys() & hints.keys():
        kind, default = hints[name], getattr(config_class, name, None)
        if isinstance(default, int | float):  # some are not of their annotated type
            kind |= type(default)
        strict = type(given[name]) in (bool, int)
        try:
            given[name] = TypeAdapter(kind).validate_python(given[name], strict=strict)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise ValueError(f"dataset_config sets {name}={given[name]!r} of {task}: {problem}; mend it.") from error
    return given


class _Words(ast.NodeTransformer):
    """A bare word is text, or true or false."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant({"true": True, "false": False}.get(node.id, node.id))
