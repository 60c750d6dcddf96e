"""What a run of a comparison left in its folder, read once. A file that is cut, empty or of another form is named, and
costs no other run."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

RECORD, RESULT, FAILURE = "run.json", "result.json", "failure.json"
LOG, HELD_OUT, EVALUATIONS = "metrics.jsonl", "held_out.jsonl", ("tofu_eval.json", "muse_eval.json")
STATUSES = ("finished", "diverged", "failed", "running", "interrupted", "waiting")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(found: Any) -> dict[str, float]:
    return {name: float(value) for name, value in dict(found).items() if is_number(value)}


FIELDS: dict[str, Callable[[Any], Any]] = {  # what is read from a record, and as what
    **dict.fromkeys(("settings", "overrides", "metrics", "versions"), dict),
    **dict.fromkeys(("summary", "base", "eval_tokens"), _numbers),
    **dict.fromkeys(("method", "command", "date", "device", "reason", "retain"), str),
    **{"steps": int, "diverged": bool, "log_tail": list},
}


def key_of(value: Any) -> str:
    """A value as text, the same however it was written."""
    return json.dumps(value, sort_keys=True, default=str)


def rate(value: float) -> str:
    """A learning rate as people write it: 3e-05 is 3e-5."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def lock_of(folder: Path) -> Path:
    """What a process holds while it works on a run."""
    return folder.with_name(f"{folder.name}.lock")


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        arm: The stem of its recipe, such as stock.
        setting: The fields of the grid that vary, such as `{"learning_rate": 3e-5}`.
        seed: Its seed.
        folder: Where it left what it logged and its result.
        planned: What is known of it before it starts, as in `run.json`.
    """

    arm: str
    setting: Mapping[str, Any]
    seed: int
    folder: Path
    planned: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _records(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        found, problems = {}, []
        for name in (RESULT, FAILURE, RECORD, *EVALUATIONS):
            try:
                if (content := read_json(self.folder / name)) is not None:
                    found[name] = content
            except ValueError as error:
                problems.append(str(error))
        return found, problems

    def record(self, name: str) -> dict[str, Any]:
        """What a file of its folder holds; empty where it is missing or cannot be read."""
        return self._records[0].get(name, {})

    @property
    def outcome(self) -> Mapping[str, Any]:
        return self.record(RESULT) or self.record(FAILURE) or self.record(RECORD) or self.planned

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.outcome.get("settings") or {}

    @property
    def method(self) -> str | None:
        return self.outcome.get("method")

    @property
    def rate(self) -> float:
        """Its learning rate; NaN where none was set."""
        value = self.setting.get("learning_rate", self.settings.get("learning_rate"))
        return float(value) if is_number(value) and value > 0 else math.nan

    @property
    def summary(self) -> dict[str, float]:
        """What its evaluation after training found."""
        return next(filter(None, (self.record(name).get("summary") for name in EVALUATIONS)), {})

    @cached_property
    def status(self) -> str:
        """One of `STATUSES`; diverged is a loss or a gradient that is not finite."""
        result, failure = self.record(RESULT), self.record(FAILURE)
        if failure.get("diverged"):
            return "diverged"
        if self._records[1] or failure:
            return "failed"
        if result:
            return "failed" if result.get("steps") == 0 else "finished"
        return "running" if self.is_running else "interrupted" if self.steps else "waiting"

    @property
    def is_running(self) -> bool:
        """Whether a process holds its lock."""
        if not lock_of(self.folder).exists():
            return False
        try:
            with filelock.FileLock(lock_of(self.folder), timeout=0):
                return False
        except (filelock.Timeout, OSError) as error:
            return isinstance(error, filelock.Timeout)

    @property
    def steps(self) -> int:
        """The last step that it logged."""
        return max((entry["step"] for entry in self.log), default=0)

    @property
    def reason(self) -> str | None:
        """Why there is no result; None if there is."""
        of, failure = self.settings.get("max_steps"), self.record(FAILURE)
        last = f" of {of}." if isinstance(of, int) and of > 0 else "."
        match self.status:
            case "finished":
                return None
            case "running":
                return f"It is at step {self.steps}{last}"
            case "interrupted":
                return f"Its log ends at step {self.steps}; the same command continues it."
            case "waiting":
                return "It has not started."
        if self._records[1] or failure:
            return " ".join(self._records[1]) or failure.get("reason") or "It failed without a word."
        return "It ended after 0 steps, so nothing was trained."

    @cached_property
    def _lines(self) -> tuple[tuple[list[dict[str, Any]], str], ...]:
        return _read_lines(self.folder / LOG, ("step",)), _read_lines(self.folder / HELD_OUT, ("step", "row"))

    @property
    def log(self) -> list[dict[str, Any]]:
        return self._lines[0][0]

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return self._lines[1][0]

    @property
    def log_problem(self) -> str:
        """What is left out of its log and of its held-out rows."""
        return " ".join(problem for _, problem in self._lines if problem)


def read_json(path: Path) -> dict[str, Any] | None:
    """A record of a run, its `FIELDS` of one type each; None where there is none.

    Raises:
        ValueError: with the file, for what is cut short or of another form.
    """
    try:
        found = json.loads(path.read_bytes())
        typed = {name: kind(found[name]) for name, kind in FIELDS.items() if found.get(name) is not None}
        return {name: value for name, value in found.items() if name not in ("items", "rows")} | typed
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is empty, cut short or of another form ({str(error)[:80]}).") from error


def _read_lines(path: Path, whole: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    """The lines of a log, with some whole numbers; a last one that a kill cut short is left out, others are named."""
    try:
        *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror})."
    entries, bad = [], []
    for number, line in enumerate([*lines, last], 1):
        try:
            entry = json.loads(line, parse_int=float)
            entries.append({**entry, **{name: int(entry[name]) for name in whole}})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if line.strip() and number <= len(lines):
                bad.append(f"line {number} ({line[:40]!r})")
    return entries, f"{path} is read without {len(bad)} lines that are no entries, first {bad[0]}." if bad else ""


def write_whole(files: Mapping[Path, str]) -> None:
    """Write all of the files, or leave all of them as they were."""
    parts = {path: path.with_name(f"{path.name}.part") for path in files}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(files[path], encoding="utf-8")
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
