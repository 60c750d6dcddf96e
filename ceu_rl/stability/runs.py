"""What a run of a comparison left in its folder, read once. A file that is cut, empty or no record is named, and
costs no other run."""

import json
import math
from collections.abc import Mapping
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
    """One run of a comparison: an arm (the stem of its recipe) at a setting, the fields of the grid that vary.

    `planned` is what is known of it before it starts, as in `run.json`.
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
    def name(self) -> str:
        """Its arm, setting and seed, as its folder has them."""
        return str(Path(*self.folder.parts[-3:]))

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
        if self.record(FAILURE).get("diverged"):
            return "diverged"
        if self._records[1] or self.record(FAILURE):
            return "failed"
        if self.record(RESULT):
            return "finished"
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
    def at(self) -> tuple[float, str]:
        """The share of its steps that are done, and the last one in words; (0, "") before its first line."""
        steps, epochs = self.settings.get("max_steps") or -1, self.settings.get("num_train_epochs") or 3.0
        try:
            entry = json.loads((self.folder / LOG).read_bytes().splitlines()[-1])
            share = min(entry["step"] / steps if steps > 0 else entry["epoch"] / epochs, 1)
            return share, f"at step {entry['step']}" + (f" of {steps}" if steps > 0 else "")
        except (OSError, LookupError, ValueError, TypeError, RecursionError):  # no whole line yet
            return 0.0, ""

    @property
    def steps(self) -> int:
        """The last step that it logged."""
        return max((entry["step"] for entry in self.log), default=0)

    @property
    def reason(self) -> str | None:
        """Why there is no result; None if there is."""
        told = {
            "finished": None,
            "running": f"It is {self.at[1] or 'at its start'}.",
            "interrupted": f"Its log ends at step {self.steps}; the same command continues it.",
            "waiting": "It has not started.",
        }
        return told.get(self.status, " ".join(self._records[1]) or self.record(FAILURE).get("reason"))

    @cached_property
    def _lines(self) -> tuple[tuple[list[dict[str, Any]], str], ...]:
        return _read_lines(self.folder / LOG), _read_lines(self.folder / HELD_OUT)

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
    """A record of a run; None where there is none.

    Raises:
        ValueError: with the file, for what is cut short or no record.
    """
    try:
        found = json.loads(path.read_bytes())
        return {name: value for name, value in found.items() if name not in ("items", "rows")}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is empty, cut short or no record ({str(error)[:80]}).") from error


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The entries of a log; a last line that a kill cut short is left out, others that are no entries are named."""
    try:
        *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror})."
    entries, bad = [], []
    for number, line in enumerate([*lines, last], 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip() and number <= len(lines):
                bad.append(f"line {number} ({line[:40]!r})")
    return entries, f"{path} is read without {len(bad)} lines that are no entries, first {bad[0]}." if bad else ""
