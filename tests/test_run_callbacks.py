"""What a run records while it trains."""

import json
from types import SimpleNamespace

import pytest

from ceu_rl.run import callbacks
from ceu_rl.run.callbacks import HeldOutFile, Pace


@pytest.mark.parametrize(("before", "counted"), [(0, [30, 90]), (1000, [1030, 1090])])
def test_tokens_per_second_are_those_of_the_steps_up_to_the_last_log(before, counted, monkeypatch):
    """Three steps of 2, 3 and 5 s with logs after the first two, and an evaluation of 100 s between."""
    pace, now = Pace(), [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    state = SimpleNamespace(num_input_tokens_seen=before)
    pace.on_train_begin(None, state, None)
    for seconds, logged in ((2, counted[0]), (3, counted[1]), (5, None)):
        pace.on_step_begin(None, state, None)
        now[0] += seconds
        pace.on_step_end(None, state, None)
        if logged:
            pace.on_log(None, state, None, logs={"loss": 1.0, "num_tokens": logged})
        now[0] += 100
        pace.on_log(None, state, None, logs={"eval_loss": 1.0})
    assert pace.result(2) == {"tokens_per_second": 18.0, "tokens_per_second_per_process": 9.0}  # 90 tokens in 5 s


def test_a_trainer_that_counts_no_tokens_has_no_pace():
    assert Pace().result() == {}


def test_held_out_pairs_are_appended_and_cut_back_to_the_step_of_a_checkpoint(tmp_path):
    trainer = SimpleNamespace(held_out={"eval": [{"chosen": -1.0}, {"chosen": -2.0}]})
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback = HeldOutFile(trainer)
    callback.on_train_begin(args, SimpleNamespace(global_step=0, is_world_process_zero=True), None)
    for step in (0, 30, 60):
        trainer.held_out = {"eval": [{"chosen": -1.0 - step}, {"chosen": -2.0}]}
        callback.on_evaluate(args, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    assert trainer.held_out == {}
    with open(tmp_path / "held_out.jsonl", "a") as file:
        file.write('{"step": 60, "datas')  # a run that died while it wrote
    callback.on_train_begin(args, SimpleNamespace(global_step=30, is_world_process_zero=True), None)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 30, 30]
    assert rows[2] == {"step": 30, "dataset": "eval", "row": 0, "chosen": -31.0}
