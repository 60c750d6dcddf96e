"""How far a long loop is, and how long it takes."""

import sys
from typing import Any

from tqdm import tqdm


def progress(name: str, total: int, done: int = 0) -> Any:
    """tqdm's bar on stderr, with the time left; a log, which keeps each of its states, gets one in ten seconds."""
    return tqdm(desc=name, total=total, initial=done, mininterval=0.1 if sys.stderr.isatty() else 10)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"
