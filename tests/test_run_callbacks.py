"""What a run records while it trains."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from ceu_rl.models import build_model
from ceu_rl.run import callbacks
from ceu_rl.run.callbacks import HeldOutFile, Pace, TaskScore
from ceu_rl.tasks import Task

from .conftest import TINY


@pytest.mark.parametrize(("before", "counted"), [(0, [30, 90]), (1000, [1030, 1090])])
def test_tokens_per_second_are_those_of_the_steps_up_to_the_last_log(before, counted, monkeypatch):
    """Three steps of 2, 3 and 5 s with logs after the first two, and an evaluation of 100 s between."""
    pace, now = Pace(2), [0.0]
    assert pace.result() == {}  # of a trainer that counts no tokens
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
    assert pace.result() == {"tokens_per_second": 18.0, "tokens_per_second_per_process": 9.0}  # 90 tokens in 5 s


def test_held_out_pairs_are_appended_and_cut_back_to_the_step_of_a_checkpoint(tmp_path):
    trainer, args = SimpleNamespace(), SimpleNamespace(output_dir=str(tmp_path))
    callback = HeldOutFile(trainer)
    callback.on_train_begin(args, SimpleNamespace(global_step=0, is_world_process_zero=True), None)
    for step in (0, 30, 60):
        tokens = {"chosen_tokens": 2.0, "rejected_tokens": 4.0}
        second = {**tokens, "chosen": -2.0, "chosen_tokens": 3.0}
        trainer.held_out = {"eval": [{"chosen": -1.0 - step, **tokens}, second]}
        callback.on_evaluate(args, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    assert trainer.held_out == {}
    with open(tmp_path / "held_out.jsonl", "a") as file:
        file.write('{"step": 60, "datas')  # a run that died while it wrote
    callback.on_train_begin(args, SimpleNamespace(global_step=30, is_world_process_zero=True), None)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 30, 30]
    assert rows[2] == {"step": 30, "dataset": "eval", "row": 0, "chosen": -31.0, **tokens}


def test_each_question_of_a_task_is_recorded(tmp_path, tokenizer):
    """Greedy answers are right to the first two questions, and one of 4 samples to each."""
    prompts = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n)} for n in range(6)]
    asked = []

    def score(row, answer):
        asked.append(row["answer"])
        is_greedy = asked.count(row["answer"]) == 1
        return float(int(row["answer"]) < 2 if is_greedy else asked.count(row["answer"]) == 2)

    trainer = SimpleNamespace(model=build_model(tokenizer, **TINY), processing_class=tokenizer, log=print)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    task = Task("task", lambda *given: prompts, score, max_new_tokens=2, samples=4)
    held_out, args = HeldOutFile(trainer), SimpleNamespace(output_dir=str(tmp_path), seed=0)
    for callback in (TaskScore(trainer, task, prompts), held_out):
        callback.on_evaluate(args, SimpleNamespace(global_step=60, is_world_process_zero=True), None)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["greedy"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    fourth = {"step": 60, "dataset": "questions", "row": 3, "greedy": 0.0, "sampled": 0.25}
    assert rows[3] == {**fourth, "pass@2": 0.5, "pass@4": 1.0}
