"""How far the runs of a comparison are, and how long they will take: a bar for each in a terminal, else one line."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..run.progress import duration
from .grid import LOG, is_number


class Course:
    """How far a run is: the share of its steps, the time since it started, and an estimate from its own steps."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], task: Any) -> None:
        self.name, self.folder, self.settings, self.task = name, folder, settings, task
        self.began = time.monotonic()
        self.share, self.told, self.marks = 0.0, "", list[tuple[float, float]]()
        self.seen: float | None = None  # the share that was looked at before; at first that of an earlier call

    @property
    def gone(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """From the pace since its first step in this call; None before the second."""
        if len(self.marks) < 2:
            return None
        (first, start), (last, share) = self.marks[0], self.marks[-1]
        return max(0.0, (1 - share) * (last - first) / (share - start) - (time.monotonic() - last))

    def look(self) -> float:
        """Read its log; returns the share of its steps."""
        entry = _last_entry(self.folder)
        step, total = entry.get("step", 0), self.settings.get("max_steps") or -1
        if total > 0:
            self.share, told = min(step / total, 1.0), f"{step} of {total} steps"
        else:
            epochs = float(self.settings.get("num_train_epochs") or 3.0)
            self.share, told = min(entry.get("epoch", 0.0) / epochs, 1.0), f"step {step}"
        if self.seen is not None and self.share > self.seen:
            self.marks.append((time.monotonic(), self.share))
        self.seen = self.share
        told += f", {duration(self.gone)} gone"
        self.told = told if self.left is None else f"{told}, about {duration(self.left)} left"
        return self.share


class Courses:
    """The courses of all runs.

    Args:
        total: How many runs there are.
        console: Where they are shown. Without a terminal the first estimate is one line.
    """

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.console, self.began, self.told = total, console, time.monotonic(), console.is_terminal
        self.seconds: list[float] = []
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[told]}"))
        self.bars = Progress(*columns, console=console)
        self.task = self.bars.add_task("runs", total=total, told="")

    def __enter__(self) -> "Courses":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> Course:
        return Course(name, folder, settings, self.bars.add_task(name, total=1.0, told=""))

    def end(self, course: Course, outcome: str) -> None:
        self.bars.remove_task(course.task)
        self.seconds.append(course.gone)
        said = f"{course.name}: {outcome} ({duration(course.gone)})"
        self.console.print(said, soft_wrap=True, markup=False, highlight=False)

    def show(self, running: Sequence[Course], waiting: int) -> None:
        for course in running:
            self.bars.update(course.task, completed=course.look(), told=course.told)
        done, left = self.total - waiting - len(running), self._left(running, waiting)
        told = f"{done} of {self.total} done, {duration(time.monotonic() - self.began)} gone"
        told += "" if left is None else f", about {duration(left)} left"
        self.bars.update(self.task, completed=done + sum(each.share for each in running), told=told)
        known = next((each for each in running if each.left is not None), None)
        if known and not self.told:
            self.told = True
            self.console.print(
                f"{known.name}: {known.told}; runs: {told}", soft_wrap=True, markup=False, highlight=False
            )

    def _left(self, running: Sequence[Course], waiting: int) -> float | None:
        """Seconds until all runs have ended, as many at the same time as now."""
        whole = self.seconds or [each.gone + each.left for each in running if each.left is not None]
        if not running or not whole:
            return None
        typical = sum(whole) / len(whole)
        rest = [max(0.0, typical - each.gone) if each.left is None else each.left for each in running]
        return max(*rest, (sum(rest) + waiting * typical) / len(rest))


def _last_entry(folder: Path) -> dict[str, float]:
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            entry = json.loads(file.read().splitlines()[-1])
        return {name: entry[name] for name in ("step", "epoch") if is_number(entry.get(name))}
    except (OSError, IndexError, ValueError, AttributeError, RecursionError):
        return {}  # not there yet, or a line that is being written
