"""Where a command ends: what its input or its machine caused becomes one sentence, our own faults keep a traceback."""

import functools
import importlib
import logging
import os
import pickle
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
PLAIN = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)  # their text is a sentence already
REPORT = "This is a fault of ceu_rl and not of your input: please report it with this traceback and with `ceu-rl env`."


class Boundary(AbstractContextManager["Boundary"]):
    """The outermost block of a command. `status` is its exit status after the block.

    An exception that reaches it is printed as one sentence after `command`, unless it is a fault of this package: of a
    kind that we never raise on purpose, from our own code. `CEU_RL_TRACEBACK=1` keeps every traceback.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.status = 0
        self.failure = 2  # the status of what fails from here on: 2 for bad input, 1 once training has begun
        self.remedy = ""  # what to do about a failure that does not say it itself

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, KeyboardInterrupt):
            print(f"{self.command}: interrupted. {self.remedy}".rstrip(), file=sys.stderr)
            self.status = 130
            return True
        if not isinstance(error, Exception) or os.environ.get("CEU_RL_TRACEBACK"):
            return False
        raised_at = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if raised_at.is_relative_to(PACKAGE) and not isinstance(error, PLAIN):
            error.add_note(REPORT)
            return False
        text = sentence(error)
        remedy = "" if "resume" in text else self.remedy
        print(f"{self.command}: error: {text} {remedy}".rstrip(), file=sys.stderr)
        self.status = self.failure
        return True


def sentence(error: BaseException) -> str:
    """The text of an exception in one line, with its type where the text alone says too little."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to run what is in the file
        return "The weights are a pickle that is damaged or holds more than tensors, and is not run; take safetensors."
    text = " ".join(str(error).split())
    return text if isinstance(error, PLAIN) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def note(message: str) -> None:
    """Say something about a run, once for all its processes: a log record, which `ceu-rl` prints."""
    from accelerate import PartialState  # which takes seconds

    if PartialState().is_main_process:
        logger.info(message)


@functools.cache
def note_once(message: str) -> None:
    """[`note`], the first time that a process meets the message."""
    note(message)


class NameCause(AbstractContextManager["NameCause"]):
    """Turns whatever is raised inside into one sentence of this `kind`: what failed, the error, and the remedy.

    An exception that is of the kind already, and no plain ValueError, passes.
    """

    def __init__(self, what: str, remedy: str, kind: type[Exception] = ValueError) -> None:
        self.what, self.remedy, self.kind = what, remedy, kind

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        named = self.kind is not ValueError and isinstance(error, self.kind)
        if isinstance(error, Exception) and not named:
            text = " ".join(str(error).split())
            raise self.kind(f"{self.what} raised {type(error).__name__}: {text}; {self.remedy}") from error


def import_function(path: str, field: str) -> Any:
    """The function `module.function` that a field names; modules of the working directory are found.

    Raises:
        ValueError: if the module cannot be imported, or holds no such function.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = path.rpartition(".")
    with NameCause(f"{field} names {path!r}, and importing it", "give a function as module.function."):
        found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise ValueError(f"{field} names {path!r}, which is a {type(found).__name__}; give a function.")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave it as it was."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
