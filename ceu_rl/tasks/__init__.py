"""What is scored: tasks with verifiers that need no download, and the scoring of a model on them.

A task is one module that ends in a `TASK` and one line of `TASKS` below.
"""

import inspect
import sys
from collections.abc import Iterator
from zlib import crc32

from datasets import Dataset, DatasetDict

from ceu_rl.tasks import addition, maze
from ceu_rl.tasks.protocol import Example, Task
from ceu_rl.tasks.score import evaluate_accuracy, evaluate_samples, generate_answers

__all__ = [
    "TASKS",
    "evaluate_accuracy",
    "evaluate_samples",
    "generate_answers",
    "get_task",
    "load_task_dataset",
]

TASKS: dict[str, Task] = {task.name: task for task in (addition.TASK, maze.TASK)}

TRAIN_ROWS = {"sft": 20_000, "preference": 9_600, "prompt": 9_600}
TEST_ROWS = 500


def get_task(name: str) -> Task:
    """The task of that name, such as `builtin:addition`.

    Raises:
        ValueError: if there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown built-in task {name!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def load_task_dataset(name: str, kind: str, config: str | None = None, seed: int = 0) -> DatasetDict:
    """Make the splits `train` and `test` of a task, in TRL's conversational formats.

    | kind | columns | train rows |
    |---|---|---|
    | `sft` | prompt, completion | 20 000 |
    | `preference` | prompt, chosen, rejected | 9 600 |
    | `prompt` | prompt, answer (text) | 9 600 |

    Every column but `answer` is a message list. `test` has 500 rows and shares no question with `train`, for
    any two seeds. The rows depend on the arguments alone. `config` sets the error rate of the completions in
    the train split of `sft`, and no other row depends on it; `None` is the task's first config.

    Raises:
        ValueError: if the name, the kind or the config is unknown.
    """
    task = get_task(name)
    if kind not in TRAIN_ROWS:
        raise ValueError(f"Unknown kind {kind!r} of {name}: choose one of {', '.join(TRAIN_ROWS)}.")
    config = next(iter(task.configs)) if config is None else config
    if config not in task.configs:
        raise ValueError(f"Unknown config {config!r} of {name}: choose one of {', '.join(task.configs)}.")
    # A dataset from a generator lies in the cache of `datasets`, which the processes of a run share; the checksum keeps
    # rows of another version of the task from being taken for these
    sources = inspect.getsource(sys.modules[__name__]) + inspect.getsource(sys.modules[task.make_examples.__module__])
    fixed = {"name": name, "kind": kind, "seed": seed, "checksum": crc32(sources.encode())}
    splits = {"train": (TRAIN_ROWS[kind], task.configs[config]), "test": (TEST_ROWS, 0.0)}
    return DatasetDict(
        {
            split: Dataset.from_generator(
                _rows, gen_kwargs={**fixed, "split": split, "count": count, "error_rate": error_rate}
            )
            for split, (count, error_rate) in splits.items()
        }
    )


def _rows(name: str, kind: str, seed: int, checksum: int, split: str, count: int, error_rate: float) -> Iterator[dict]:
    for example in get_task(name).make_examples(split, count, error_rate, seed):
        yield _row(example, kind)


def _row(example: Example, kind: str) -> dict:
    prompt = [{"role": "user", "content": example.question}]
    if kind == "prompt":
        return {"prompt": prompt, "answer": example.answer}
    if kind == "sft":
        return {"prompt": prompt, "completion": _assistant(example.demonstration)}
    return {"prompt": prompt, "chosen": _assistant(example.answer), "rejected": _assistant(example.corrupted)}


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
