"""Progress without a terminal: few lines, with the time left."""

import itertools
import re
from types import SimpleNamespace

import pytest
import tqdm.std

from ceu_rl.run.callbacks import ProgressBar
from ceu_rl.run.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told."""
    seconds = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(("total", "step"), [(1000, 7), (20, 1), (6497, 32), (3, 1)])
def test_a_line_for_each_5_percent_with_the_time_left(clock, capsys, total, step):
    with Progress("scoring", total) as shown:
        for done in range(0, total, step):
            clock[0] += 2.0 * step
            shown.update(min(step, total - done))
    lines = capsys.readouterr().err.splitlines()
    shares = [int(re.fullmatch(rf"scoring: (\d+) %, \d+ of {total}, .+ left", line)[1]) for line in lines]
    assert len(lines) <= 22 and shares == sorted(set(shares)) and shares[-1] > 94
    assert all(later - earlier <= max(6, 100 * step / total + 6) for earlier, later in itertools.pairwise(shares))
    assert lines[0].endswith(f"{tqdm.std.tqdm.format_interval(2.0 * (total - step))} left")


def test_what_is_over_at_once_prints_nothing(clock, capsys):
    with Progress("scoring", 100) as shown:
        shown.update(0)
        for _ in range(100):
            shown.update(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 min 00 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (4020, "1 h 07 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("first", [True, False])
def test_training_says_how_far_it_is(clock, capsys, first):
    """From where a resumed run goes on, on the first process alone."""
    bar, state = ProgressBar(), SimpleNamespace(max_steps=200, global_step=100, is_world_process_zero=first)
    bar.on_train_begin(None, state, None)
    for _ in range(100):
        clock[0] += 3.0
        state.global_step += 1
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 0.5})
    bar.on_train_end(None, state, None)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == (10 if first else 0)
    assert not first or shown[:2] == [
        "training: 50 %, 101 of 200, 04:57 left",
        "training: 56 %, 111 of 200, 04:27 left, loss=0.5",
    ]
