"""What is scored: tasks with verifiers that need no download, and the scoring of a model on them.

`builtin:addition` needs nothing; `reasoning_gym:TASK` is any task of that library.
"""

import inspect
from collections.abc import Iterator
from zlib import crc32

from datasets import Dataset, DatasetDict

from ceu_rl.tasks import addition, protocol, reasoning_gym
from ceu_rl.tasks.protocol import KINDS, Task
from ceu_rl.tasks.score import evaluate_task

__all__ = ["Task", "evaluate_task", "get_task", "is_task", "load_task_dataset"]


def is_task(name: str) -> bool:
    """Whether a `dataset_name` means a task."""
    return name.startswith(("builtin:", reasoning_gym.PREFIX))


def get_task(name: str, config: str | None = None) -> Task:
    """The task of a name, such as `builtin:addition` or `reasoning_gym:chain_sum`, with its `dataset_config`.

    Raises:
        ValueError: if there is no such task or config.
        ImportError: if the library of the task is not installed.
    """
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.make_task(name, config)
    if name != addition.NAME:
        raise ValueError(f"Unknown built-in task {name!r}: choose {addition.NAME} or {reasoning_gym.PREFIX}TASK.")
    return addition.make_task(name, config)


def load_task_dataset(name: str, kind: str, config: str | None = None, seed: int = 0) -> DatasetDict:
    """The splits `train` and `test` of a task, in TRL's format for a kind of training: see [`protocol.conversation`].

    A task may add columns of its own. `test` shares no question with `train`, for any two seeds. The rows depend on the
    arguments alone.

    Raises:
        ValueError: if the name, the kind or the config is unknown, or the task has no rows of that kind.
        ImportError: if the library of the task is not installed.
    """
    task = get_task(name, config)
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r} of {name}: choose one of {', '.join(KINDS)}.")
    for split in ("train", "test"):
        next(iter(task.rows(kind, split, seed)))  # what is wrong is said here, not from inside `datasets`
    # A dataset from a generator lies in the cache of `datasets`, which the processes of a run share; the checksum keeps
    # rows of another version of the task from being taken for these
    sources = "".join(inspect.getsource(module) for module in (protocol, addition, reasoning_gym))
    given = {"name": name, "config": config, "kind": kind, "seed": seed, "checksum": crc32(sources.encode())}
    return DatasetDict(
        {split: Dataset.from_generator(_rows, gen_kwargs={**given, "split": split}) for split in ("train", "test")}
    )


def _rows(name: str, config: str | None, kind: str, seed: int, checksum: int, split: str) -> Iterator[dict]:
    yield from get_task(name, config).rows(kind, split, seed)
