"""Progress without a terminal: few lines, with the time left."""

import itertools
import re
import sys
import types

import pytest

from ceu_rl.run import progress
from ceu_rl.run.callbacks import ProgressLines
from ceu_rl.run.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(("total", "step"), [(1000, 7), (20, 1), (6497, 32), (3, 1)])
def test_a_line_for_each_5_percent_with_the_time_left(clock, capsys, total, step):
    with Progress("scoring", total) as shown:
        done = 0
        while done < total:
            units = min(step, total - done)
            clock[0] += 2.0 * units
            shown.advance(units)
            done += units
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 22
    shares = [int(re.fullmatch(rf"scoring: (\d+) %, \d+ of {total}, .+ left", line)[1]) for line in lines]
    assert shares == sorted(set(shares)) and shares[-1] == 100
    assert all(later - earlier <= max(6, 100 * step / total + 6) for earlier, later in itertools.pairwise(shares))
    first, of = (int(number) for number in re.findall(r"(\d+) of (\d+)", lines[0])[0])
    assert lines[0].endswith(f"{duration(2.0 * (of - first))} left")


def test_what_is_over_at_once_prints_nothing(clock, capsys):
    with Progress("scoring", 100) as shown:
        shown.advance(0)
        for _ in range(100):
            shown.advance(1)
    assert capsys.readouterr().err == ""


def test_what_was_done_before_does_not_count_for_the_rate(clock, capsys):
    with Progress("scoring", 100, done=50) as shown:
        clock[0] = 10.0
        shown.advance(10)
    assert capsys.readouterr().err.splitlines() == ["scoring: 60 %, 60 of 100, 0 min 40 s left"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("scoring", 10) as shown:
        shown.advance(10)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 min 00 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (4020, "1 h 07 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_training_says_how_far_it_is(clock, capsys):
    """From where a resumed run goes on, on the first process alone."""
    for first in (True, False):
        lines, state = (
            ProgressLines(),
            types.SimpleNamespace(max_steps=200, global_step=100, is_world_process_zero=first),
        )
        lines.on_train_begin(None, state, None)
        for _ in range(100):
            clock[0] += 3.0
            state.global_step += 1
            lines.on_step_end(None, state, None)
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == (11 if first else 0)
        if first:
            assert shown[:2] == [
                "training: 50 %, 101 of 200, 4 min 57 s left",
                "training: 55 %, 110 of 200, 4 min 30 s left",
            ]
