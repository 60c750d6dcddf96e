"""How far a long loop is, and how long it takes."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm


def progress(name: str, total: int, done: int = 0) -> Any:
    """tqdm's bar on stderr, with the time left; a log, which keeps each of its states, gets one in ten seconds."""
    return tqdm(desc=name, total=total, initial=done, mininterval=0.1 if sys.stderr.isatty() else 10)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


class ShareBar(Progress):
    """How far several runs are by the share of their steps: the time since the start, and what is left by the pace
    since the first step; without a terminal the first estimate is one line."""

    def __init__(self, console: Console, runs: int, **options: Any) -> None:
        columns = [TextColumn("{task.description}", markup=False), BarColumn(20)]
        clock = [TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")]
        options |= {"console": console, "disable": not console.is_terminal, "speed_estimate_period": math.inf}
        super().__init__(*columns, *clock, **options)
        self.add_task("", total=runs)
        self.is_told = console.is_terminal

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, done: int, running: Mapping[str, tuple[float, str]]) -> None:
        """Move the bar to the runs that are done and the share of each that runs, and say where it is."""
        (task,) = self.tasks
        places = [f"{name} {place}" for name, (_, place) in running.items() if place]
        said = ", ".join([f"{done} of {task.total:.0f} runs", *places])
        self.update(task.id, completed=done + sum(share for share, _ in running.values()), description=said)
        if running and not self.is_told and task.time_remaining is not None:
            self.is_told = True
            self.say(f"{said}: about {duration(task.time_remaining)} left")
