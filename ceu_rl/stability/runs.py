"""One run of a comparison, as it lies in its folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

STATUSES = ("finished", "diverged", "failed", "missing")


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        arm: The stem of its recipe, such as stock or ceu.
        setting: The overrides of the grid as given, such as `{"learning_rate": "3e-5"}`; empty if there are none.
        seed: Its seed.
        folder: Where it left `metrics.jsonl` and `result.json`, or `failure.json`, and for TOFU `tofu_eval.json`.
    """

    arm: str
    setting: Mapping[str, str]
    seed: int
    folder: Path

    @cached_property
    def result(self) -> dict[str, Any] | None:
        return _read(self.folder / "result.json")

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        return _read(self.folder / "failure.json")

    @property
    def tofu(self) -> dict[str, float] | None:
        """The summary of its evaluation on TOFU."""
        return self._tofu_eval.get("summary")

    @property
    def retain(self) -> str | None:
        """The result file of the retain model that it was evaluated against."""
        return self._tofu_eval.get("retain")

    @cached_property
    def _tofu_eval(self) -> dict[str, Any]:
        found = _read(self.folder / "tofu_eval.json") or {}
        return {name: found.get(name) for name in ("summary", "retain")}  # its rows are many

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The entries of `metrics.jsonl`; a last line that was cut short by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @cached_property
    def status(self) -> str:
        """finished, diverged (stopped at a loss or gradient that is not finite), failed, or missing (no outcome)."""
        if self.failure:  # of the training, or of the evaluation after it
            return "diverged" if self.failure.get("diverged") else "failed"
        return "finished" if self.result or self.tofu else "missing"

    @property
    def reason(self) -> str | None:
        """Why there is no result; None if there is."""
        if self.status == "finished":
            return None
        if self.failure:
            return str(self.failure.get("reason") or f"exit status {self.failure.get('status')}")
        steps = [entry["step"] for entry in self.log if "step" in entry]
        if steps:
            return f"no result; the log ends at step {max(steps)}"
        return "no result and no log; it has not started, or ended before the first step"

    @cached_property
    def learning_rate(self) -> float | None:
        """Its override, else the largest that was logged, else that of the recipe."""
        given: Any = self.setting.get("learning_rate")
        if given is None:
            logged = [rate for rate in self.values("learning_rate") if math.isfinite(rate)]
            given = max(logged) if logged else self.settings.get("learning_rate")
        return None if given is None else float(given)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The fields of its recipe."""
        return (self.result or {}).get("settings") or {}

    def series(self, key: str) -> list[tuple[int, float]]:
        """What was logged under a key, as (step, value); values need not be finite."""
        return [
            (int(entry["step"]), float(entry[key]))
            for entry in self.log
            if isinstance(entry.get(key), int | float) and "step" in entry
        ]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key)]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none or a kill cut it short."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None
