"""How far a long loop is: a bar in a terminal, elsewhere a line for each 5 % with the time left."""

import sys
from typing import Any

from tqdm import tqdm

STEPS = 20  # lines of a whole loop


class Progress(tqdm):
    """tqdm on stderr; without a terminal it prints lines, the first one as soon as it can say how long it will take.

    A loop that is over in a second prints none. `done` of the `total` units were done before.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        lines = {
            "bar_format": "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {remaining} left{postfix}",
            "delay": 1,
            "miniters": 1,
            "maxinterval": float("inf"),
            "smoothing": 0,
            "leave": False,
        }
        super().__init__(desc=name, total=total, initial=done, **({} if sys.stderr.isatty() else lines))

    @staticmethod
    def status_printer(file: Any) -> Any:
        return tqdm.status_printer(file) if file.isatty() else lambda line: line and print(line, file=file, flush=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.delay:
            self.miniters = max(1, self.total // STEPS)
        super().display(msg, pos)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"
