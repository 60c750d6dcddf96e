"""The numbers of a comparison: measures by hand, intervals against plain loops, files of every kind."""

import itertools
import json
import math

import filelock
import numpy as np
import pandas as pd
import pytest

from ceu_rl.stability.runs import Run, rate
from ceu_rl.stability.table import (
    Table,
    drawdown,
    number,
    paired_bootstrap,
    preference_scores,
    setting_name,
)

# Measures of a series


def test_drawdown():
    assert drawdown([0.5, 0.9, 0.4, 0.7, 0.3]) == pytest.approx(0.6) and drawdown([0.1, 0.2]) == 0


def test_numbers_for_people():
    assert [rate(value) for value in (3e-5, 1e-4, 2.5e-6)] == ["3e-5", "1e-4", "2.5e-6"]
    values = (None, math.nan, 0, 0.996, 33.333, 1234.5, 1e-20, -0.4435184)
    assert [number(value) for value in values] == ["none", "none", "0", "0.996", "33.3", "1234", "1e-20", "-0.444"]
    assert setting_name({"learning_rate": 3e-5, "beta": 0.5}) == "learning rate 3e-5, beta 0.5"


# Held-out rows and intervals


def test_margin_accuracy_and_loss_of_pairs():
    """Against math alone, in float64, a pair at a time; a tie is half right."""
    pairs = [
        (-34.5, -31.2, -33.1, -30.9),
        (-10.0, -20.0, -12.0, -15.0),
        (-5.0, -6.0, -5.0, -6.0),
        (-1e4, 0.0, 0.0, -1e4),
    ]
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    found = preference_scores(dict(zip(names, zip(*pairs, strict=True), strict=True)), beta=0.3)
    margins = [0.3 * ((chosen - ref_chosen) - (rejected - ref)) for chosen, rejected, ref_chosen, ref in pairs]
    assert list(found["margin"]) == pytest.approx(margins, rel=1e-14)
    losses = [math.log1p(math.exp(-margin)) if margin > -700 else -margin for margin in margins]
    assert list(found["loss"]) == pytest.approx(losses, rel=1e-14)
    assert list(found["accuracy"]) == [0.0, 1.0, 0.5, 0.0]


def test_the_interval_draws_seeds_and_rows():
    """Against one resample after another: seeds and rows with replacement, the mean over what is there."""
    drawing, other = np.random.default_rng(3), np.random.default_rng(1)
    rows, seeds = drawing.normal(0, 1.0, size=40), drawing.normal(0, 0.5, size=4)
    differences = 0.3 + rows[None, :] + seeds[:, None] + drawing.normal(0, 0.2, size=(4, 40))
    differences[1, 5:12] = np.nan
    low, high = paired_bootstrap(differences, resamples=4000)
    means = [np.nanmean(differences[other.integers(4, size=4)][:, other.integers(40, size=40)]) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.06)
    alone = paired_bootstrap(differences.mean(axis=0, keepdims=True))
    assert high - low > 1.2 * (alone[1] - alone[0])  # the spread of the seeds is in it
    assert paired_bootstrap(differences) == paired_bootstrap(differences)


def test_the_interval_of_one_seed_of_one_row_and_of_none():
    assert paired_bootstrap([[1.0]]) is None and paired_bootstrap([[1.0], [math.nan]]) is None
    assert paired_bootstrap([[0.2], [0.4]]) == pytest.approx((0.2, 0.4))  # seeds alone
    low, high = paired_bootstrap([np.linspace(0, 1, 101)])  # rows alone: 0.5 +- 1.96 * 0.29 / sqrt(101)
    assert (low, high) == pytest.approx((0.443, 0.557), abs=0.006)


def written(folder, arm, seed=0, setting=None, log=(), held=(), result=True, **fields):
    run = Run(arm, setting or {}, seed, folder / arm / str(setting) / str(seed))
    run.folder.mkdir(parents=True)
    for name, lines in (("metrics.jsonl", log), ("held_out.jsonl", held)):
        if lines:
            (run.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (run.folder / "result.json").write_text(json.dumps({"method": "dpo", "steps": 60, **fields}))
    return run


def pair(step, row, margin, **fields):
    """A held-out pair with a margin of that many nats between the sums, 0.1 of it as a reward."""
    fixed = {"rejected": -30.0, "ref_chosen": -20.0, "ref_rejected": -30.0}
    return {"step": step, "dataset": "eval", "row": row, "chosen": -20.0 + margin, **fixed, **fields}


def test_differences_are_paired_by_row_and_seed(tmp_path):
    """Rows differ by far more than the arms do. The rows of ceu are written in another order, and one is missing."""
    right, runs = {row: 30.0 * (row - 20) for row in range(41)}, []
    for arm, seed in itertools.product(("stock", "ceu"), range(3)):
        more, rows = (1.0 + 0.1 * seed, reversed(right)) if arm == "ceu" else (0.0, right)
        held = [{"step": 60, "row": row, "greedy": right[row] + more} for row in rows if arm == "stock" or row != 3]
        runs.append(written(tmp_path, arm, seed, held=held))
    table = Table(runs)
    found = table.difference([3, 4, 5], [0, 1, 2], table.scores[0])
    assert found["difference"] == pytest.approx(1.1) and (found["seeds"], found["rows"]) == (3, 40)
    assert found["interval"] == pytest.approx((1.0, 1.2), abs=0.03)  # over seeds: rows shift alike


def test_preference_accuracy_is_taken_from_the_pairs(tmp_path):
    """A tie is half right: the policy is its reference at step 0, which TRL counts as 0."""
    held = [pair(step, row, step * (row - 20)) for step in (0, 60) for row in range(41)]
    log = [{"step": 0, "eval_rewards/accuracies": 0.0}, {"step": 60, "eval_rewards/accuracies": 0.77}]
    table = Table([written(tmp_path, "stock", log=log, held=held, settings={"beta": 0.1})])
    ends = table.ends.set_index("score").loc["preference accuracy"]
    assert (ends.base, ends.final) == (0.5, pytest.approx(20.5 / 41))


@pytest.mark.parametrize(("lost", "kept"), [(0, True), (1, None), (9, False)])
def test_a_score_is_kept_if_its_interval_excludes_a_loss_of_five_percent(tmp_path, lost, kept):
    """Of 40 questions, all right before, that many wrong after; 1 of 40 is a loss of 2.5 %, within noise."""
    right = {"dataset": "eval", "sampled": 0.5, "samples": 8}
    held = [
        {"step": s, "row": row, "greedy": int(s == 0 or row >= lost), **right} for s in (0, 60) for row in range(40)
    ]
    table = Table([written(tmp_path, "stock", held=held)])
    score = table.scores[0]
    found = table.loss([0], score)
    assert score.name == "greedy accuracy" and found["kept"] is kept and found["rows"] == 40
    assert table.ends[table.ends.score == score.name].final.iloc[0] == pytest.approx(1 - lost / 40)


def test_without_rows_seeds_are_paired_and_one_seed_has_no_interval(tmp_path):
    ends = {"stock": [0.5, 0.9], "ceu": [0.6, 1.0]}
    runs = [
        written(tmp_path, arm, seed, log=[{"step": s, "eval_greedy_accuracy": v} for s, v in ((0, 1.0), (60, end))])
        for arm, values in ends.items()
        for seed, end in enumerate(values)
    ]
    table = Table(runs)
    (score,) = table.scores
    found = table.difference([2, 3], [0, 1], score)
    assert found["difference"] == pytest.approx(0.1) and found["interval"] == pytest.approx((0.1, 0.1))
    assert (found["seeds"], found["rows"]) == (2, None)
    assert table.difference([2], [0], score)["interval"] is None
    # By sorted values in place of seeds the gaps would be the same; with the seeds of one arm swapped they are not
    swapped = Table([runs[0], runs[1], Run("ceu", {}, 1, runs[2].folder), Run("ceu", {}, 0, runs[3].folder)])
    assert swapped.difference([2, 3], [0, 1], score)["interval"] == pytest.approx((-0.3, 0.5))


# Frames


def test_the_frame_is_tidy(tmp_path):
    log = [
        {"step": 1, "loss": 0.5, "grad_norm": math.inf, "epoch": 0.1},
        {"step": 1, "loss": 0.4},
        {"step": 2, "loss": None},
    ]
    table = Table([written(tmp_path, "stock", 3, {"learning_rate": 1e-5, "beta": 0.5}, log)])
    found = table.values[table.values.metric.isin(["loss", "grad_norm"])]
    columns = ["arm", "setting", "seed", "step", "metric", "value"]
    expected = [
        ("stock", "learning rate 1e-5, beta 0.5", 3, 1, *each) for each in (("grad_norm", math.inf), ("loss", 0.4))
    ]
    assert list(found[columns].itertuples(index=False, name=None)) == expected
    assert (table.runs[0].rate, table.about.condition[0]) == (1e-5, "beta 0.5")


def test_log_probabilities_are_per_token_of_the_run_itself(tmp_path):
    """stock cuts responses at 4 tokens, ceu at 8; a run without a result has the counts of one with its rows."""
    log = [{"step": 0, "eval_logps/chosen": -2.0, "eval_logps/rejected": -3.0}]
    runs = [
        written(tmp_path, "stock", log=log, eval_tokens={"chosen": 4.0, "rejected": 2.0}, settings={"max_length": 8}),
        written(tmp_path, "ceu", log=log, eval_tokens={"chosen": 8.0, "rejected": 6.0}, settings={"max_length": 16}),
        written(tmp_path, "npo", 1, log=log, result=False),
        written(tmp_path, "npo", 2, log=log, result=False),
    ]
    for run, length in zip(runs[2:], (16, 32), strict=True):
        (run.folder / "run.json").write_text(json.dumps({"settings": {"max_length": length}}))
    table = Table(runs)
    assert [table.series(place, "chosen")[0] for place in range(3)] == [-0.5, -0.25, -0.25]
    assert [table.series(place, "rejected")[0] for place in range(3)] == [-1.5, -0.5, -0.5]
    assert len(table.series(3, "chosen")) == 0  # of these rows no count is known: no curve in another unit
    assert list(table.ends.base[:3]) == pytest.approx([math.exp(-0.5), math.exp(-0.25), math.exp(-0.25)])


def test_each_start_is_its_own_base(tmp_path):
    """The median over the runs that start from one model; sampling makes them differ."""
    runs = [
        written(
            tmp_path,
            "stock",
            seed,
            log=[{"step": 0, "eval_sampled_accuracy": value}],
            settings={"model_name_or_path": m},
        )
        for seed, (m, value) in enumerate((("a", 0.4), ("a", 0.5), ("a", 0.9), ("b", 0.8)))
    ]
    assert list(Table(runs).ends.base) == [0.5, 0.5, 0.5, 0.8]


def test_what_was_trained_for_and_what_was_known_are_scores(tmp_path):
    """Chosen answers keep exp(-0.05) of their probability per token, solutions exp(-0.11)."""
    log = [
        {"step": step, "eval_logps/chosen": c, "eval_solutions_nll": n, "eval_rewards/accuracies": a}
        for step, c, n, a in ((0, -2.0, 1.0, 0.0), (60, -2.1, 1.11, 0.7))
    ]
    table = Table([written(tmp_path, "stock", log=log, eval_tokens={"chosen": 2.0, "rejected": 2.0})])
    ends = table.ends.set_index("score")
    shares = ends.final / ends.base
    assert shares["probability per token of chosen responses"] == pytest.approx(math.exp(-0.05))
    assert shares["probability per token of solutions"] == pytest.approx(math.exp(-0.11))
    assert math.isnan(ends.base["preference accuracy"]) and ends.final["preference accuracy"] == 0.7


# Runs


def test_how_a_run_ended_is_a_field(tmp_path):
    """The words of an error decided it before."""
    log = [{"step": 3, "loss": 0.5}]
    names = ("diverged", "failed", "interrupted", "running")
    runs = {name: written(tmp_path, name, log=log, result=False) for name in names}
    message = "it met a non-finite loss, or it did not"
    for name in ("diverged", "failed"):
        failure = {"diverged": name == "diverged", "reason": message, "method": "dpo"}
        (runs[name].folder / "failure.json").write_text(json.dumps(failure))
    (runs["running"].folder / "run.json").write_text(json.dumps({"settings": {"max_steps": 60}}))
    runs["waiting"] = Run("a", {}, 0, tmp_path / "nowhere")
    runs["finished"] = written(tmp_path, "finished")
    with filelock.FileLock(runs["running"].folder.with_name("0.lock")):
        assert {name: run.status for name, run in runs.items()} == {name: name for name in runs}
        assert runs["running"].reason == "It is at step 3 of 60."
    assert Run("stock", {}, 0, runs["running"].folder).status == "interrupted"
    assert "at step 3" in runs["interrupted"].reason and runs["failed"].reason == message
    assert written(tmp_path, "none", steps=0).status == "failed"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"steps": "x"}'),
        ("result.json", '{"versions": [1]}'),
        ("result.json", '{"settings": "beta"}'),
        ("result.json", "[3]"),
        ("failure.json", '{"log_tail": 3}'),
        ("tofu_eval.json", '{"summary": 0.5}'),
    ],
)
def test_an_outcome_of_another_form_is_named_and_the_rest_is_read(tmp_path, name, content):
    log = [{"step": 0, "eval_greedy_accuracy": 1.0}]
    stock, ceu = (written(tmp_path, arm, log=log) for arm in ("stock", "ceu"))
    (ceu.folder / name).write_text(content)
    table = Table([stock, ceu])
    assert [run.status for run in table.runs] == ["finished", "failed"]
    assert str(ceu.folder / name) in ceu.reason
    assert list(table.ends.final.isna()) == [False, True]


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "[null]",
        "{",
        "\x00\x00",
        "[" * 50_000,
        '{"loss": 1.0}',
        '{"step": "x"}',
    ],
    ids=lambda line: line[:20].replace("\x00", "zero"),
)
def test_a_log_line_that_is_no_entry_is_left_out_and_named(tmp_path, line):
    run = written(tmp_path, "stock", log=[{"step": 0, "eval_kl": 0.0}, {"step": 1, "eval_kl": 0.5}])
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + f"{line}\n" + json.dumps({"step": 2, "eval_kl": 1.0}) + '\n{"step": 3, "lo')
    assert list(Table([run]).series(0, "eval_kl")) == [0.0, 0.5, 1.0]
    assert run.log_problem.startswith(f"{path} is read without 1 lines") and "line 3" in run.log_problem


def test_odd_but_right_log_lines_are_read(tmp_path):
    run = written(tmp_path, "stock")
    text = (
        '{"step": 1.0, "loss": NaN, "note": "a\u2028b"}\n\n{"step": 2, "loss": 1' + "0" * 400 + ', "grad_norm": null}\n'
    )
    (run.folder / "metrics.jsonl").write_text(text + '{"step": 3, "loss": 2}')
    found = Table([run]).series(0, "loss")
    assert not run.log_problem and list(found.index) == [1, 2, 3]
    assert math.isnan(found[1]) and (found[2], found[3]) == (math.inf, 2.0)


def test_no_runs_and_no_rows_at_all(tmp_path):
    assert isinstance(Table([]).ends, pd.DataFrame) and Table([written(tmp_path, "stock")]).scores == []
