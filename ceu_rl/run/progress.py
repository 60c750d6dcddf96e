"""How far a long loop is: a bar in a terminal, elsewhere a line for each 5 % with the time left."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

STEPS = 20  # lines of a whole loop


class Progress:
    """Shows on stderr how many of `total` units are done.

    Without a terminal that is a line after the first units, which says how long it will take, and one for each 5 %; a
    loop that is over in a second prints none.

    Args:
        name: What is done.
        total: In how many units.
        done: How many were done before.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.before, self.done = name, total, done, done
        self.silent = True
        self.bars: Any = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bars = Bars(*columns, console=Console(stderr=True))
            self.task = self.bars.add_task(name, total=total, completed=done)

    def __enter__(self) -> "Progress":
        self.start = time.perf_counter()
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bars is not None:
            self.bars.stop()

    def advance(self, units: int) -> None:
        """Count units that are done."""
        earlier, self.done = self.done, self.done + units
        if self.bars is not None:
            self.bars.advance(self.task, units)
            return
        spent, made = time.perf_counter() - self.start, self.done - self.before
        if spent > 1 and (self.silent or earlier * STEPS // self.total < self.done * STEPS // self.total):
            self.silent = False
            left = duration(spent * (self.total - self.done) / made)
            share = 100 * self.done // self.total
            print(f"{self.name}: {share} %, {self.done} of {self.total}, {left} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"
