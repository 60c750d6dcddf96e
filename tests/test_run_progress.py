"""How far a long loop is, and how long it takes."""

from types import SimpleNamespace

import pytest
import tqdm.std

from ceu_rl.run.callbacks import ProgressBar
from ceu_rl.run.progress import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 min 00 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (4020, "1 h 07 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("first", [True, False])
def test_training_says_how_far_it_is(monkeypatch, capsys, first):
    """From where a resumed run goes on, on the first process alone; a log gets few lines."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    bar, state = ProgressBar(), SimpleNamespace(max_steps=200, global_step=100, is_world_process_zero=first)
    bar.on_train_begin(None, state, None)
    for _ in range(100):
        clock[0] += 3.0
        state.global_step += 1
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 0.5})
    bar.on_train_end(None, state, None)
    shown = capsys.readouterr().err.split("\r")
    assert len(shown) <= (30 if first else 1)
    assert not first or "104/200 [00:12<04:47,  3.00s/it, loss=0.5]" in shown[2]
