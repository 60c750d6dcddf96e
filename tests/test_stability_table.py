"""The numbers of a comparison: intervals against plain loops, scores by hand, files of every kind."""

import functools
import itertools
import json
import math

import numpy as np
import pytest

from ceu_rl.stability.runs import Run, rate
from ceu_rl.stability.table import Table, number, paired_bootstrap, preference_scores, setting_name

from .made_runs import make_run, pair, question, scored


@pytest.fixture
def make(tmp_path):
    return functools.partial(make_run, tmp_path)


def test_numbers_for_people():
    assert [rate(value) for value in (3e-5, 1e-4, 2.5e-6)] == ["3e-5", "1e-4", "2.5e-6"]
    values = (None, math.nan, 0, 0.996, 33.333, 1234.5, 1e-20, -0.4435184)
    assert [number(value) for value in values] == ["none", "none", "0", "0.996", "33.3", "1234", "1e-20", "-0.444"]
    assert setting_name({"learning_rate": 3e-5, "beta": 0.5}) == "learning rate 3e-5, beta 0.5"


# Held-out rows and intervals


def test_margin_accuracy_and_loss_of_pairs():
    """Against math alone, in float64, a pair at a time; a tie is half right."""
    pairs = [(-34.5, -31.2, -33.1, -30.9), (-10.0, -20.0, -12.0, -15.0), (-5.0, -6.0, -5.0, -6.0), (-1e4, 0, 0, -1e4)]
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


def test_the_interval_of_one_seed_of_one_row_and_of_none():
    assert paired_bootstrap([[1.0]]) is None and paired_bootstrap([[1.0], [math.nan]]) is None
    assert paired_bootstrap([[0.2], [0.4]]) == pytest.approx((0.2, 0.4))  # seeds alone
    low, high = paired_bootstrap([np.linspace(0, 1, 101)])  # rows alone: 0.5 +- 1.96 * 0.29 / sqrt(101)
    assert (low, high) == pytest.approx((0.443, 0.557), abs=0.006)


def test_differences_are_paired_by_row_and_seed(make):
    """Rows differ by far more than the arms do. The rows of ceu are written in another order, and one is missing."""
    right, runs = {row: 30.0 * (row - 20) for row in range(41)}, []
    for arm, seed in itertools.product(("stock", "ceu"), range(3)):
        more, rows = (1.0 + 0.1 * seed, reversed(right)) if arm == "ceu" else (0.0, right)
        held = [question(100, row, right[row] + more) for row in rows if arm == "stock" or row != 3]
        runs.append(make(arm, seed=seed, held=held))
    table = Table(runs)
    found = table.difference([3, 4, 5], [0, 1, 2], table.scores[0])
    assert found["difference"] == pytest.approx(1.1) and (found["seeds"], found["rows"]) == (3, 40)
    assert found["interval"] == pytest.approx((1.0, 1.2), abs=0.03)  # over seeds: rows shift alike


@pytest.mark.parametrize(("lost", "kept"), [(0, True), (1, None), (9, False)])
def test_a_score_is_kept_if_its_interval_excludes_a_loss_of_five_percent(make, lost, kept):
    """Of 40 questions, all right before, that many wrong after; 1 of 40 is a loss of 2.5 %, within noise."""
    held = [question(step, row, int(step == 0 or row >= lost)) for step in (0, 100) for row in range(40)]
    table = Table([make("stock", held=held)])
    score = table.scores[0]
    found = table.loss([0], score)
    assert score.name == "greedy accuracy" and found["kept"] is kept and found["rows"] == 40
    assert table.ends[table.ends.score == score.name].final.iloc[0] == pytest.approx(1 - lost / 40)


def test_without_rows_seeds_are_paired_and_one_seed_has_no_interval(make):
    ends = {"stock": [0.5, 0.9], "ceu": [0.6, 1.0]}
    runs = [make(arm, seed=seed, log=scored(1.0, end)) for arm, each in ends.items() for seed, end in enumerate(each)]
    table = Table(runs)
    (score,) = table.scores
    found = table.difference([2, 3], [0, 1], score)
    assert found["difference"] == pytest.approx(0.1) and found["interval"] == pytest.approx((0.1, 0.1))
    assert (found["seeds"], found["rows"]) == (2, None)
    assert table.difference([2], [0], score)["interval"] is None
    # By sorted values in place of seeds the gaps would be the same; with the seeds of one arm swapped they are not
    swapped = Table([runs[0], runs[1], Run("ceu", {}, 0, runs[3].folder), Run("ceu", {}, 1, runs[2].folder)])
    assert swapped.difference([2, 3], [0, 1], score)["interval"] == pytest.approx((-0.3, 0.5))


# Frames


def values(table, metric, run=0):
    """What a run logged under a metric, by step."""
    return table.values[(table.values.run == run) & (table.values.metric == metric)].set_index("step").value.to_dict()


def test_the_frame_is_tidy(make):
    log = [{"step": 1, "loss": 0.5, "grad_norm": math.inf}, {"step": 1, "loss": 0.4}, {"step": 2, "loss": None}]
    table = Table([make("stock", {"learning_rate": 1e-5, "beta": 0.5}, 3, log)])
    columns = ["arm", "setting", "seed", "step", "metric", "value"]
    assert list(table.values[columns].itertuples(index=False, name=None)) == [
        ("stock", "learning rate 1e-5, beta 0.5", 3, 1, *each) for each in (("grad_norm", math.inf), ("loss", 0.4))
    ]
    assert (table.runs[0].rate, table.about.condition[0]) == (1e-5, "beta 0.5")


def test_scores_of_pairs_are_taken_from_the_pairs(make):
    """A tie is half right: the policy is its reference at step 0, which TRL counts as wrong. Log-probabilities are per
    token, of all tokens: two pairs of 4 and 12 tokens with sums of -20 each have -40 / 16."""
    held = [pair(step, row, step * (row - 20)) for step in (0, 100) for row in range(41)]
    short = [pair(step, row, 0.0, tokens) for step in (0, 100) for row, tokens in ((0, 4), (1, 12))]
    log = [{"step": step, "eval_rewards/accuracies": 0.0} for step in (0, 100)]
    table = Table([make("stock", log=log, held=held, settings={"beta": 0.1}), make("short", held=short)])
    ends = table.ends[table.ends.run == 0].set_index("score").loc["preference accuracy"]
    assert (ends.base, ends.final) == (0.5, pytest.approx(20.5 / 41))
    assert values(table, "chosen", 1) == {0: -2.5, 100: -2.5} and values(table, "rejected", 1)[0] == -60 / 16
    chosen = table.ends[table.ends.score == "probability per token of chosen responses"]
    assert list(chosen.final[chosen.run == 1]) == [pytest.approx(math.exp(-2.5))]


def test_each_start_is_its_own_base(make):
    """The median over the runs that start from one model; sampling makes them differ."""
    models = [{"model_name_or_path": model} for model in "aaab"]
    logs = [scored(base) for base in (0.4, 0.5, 0.9, 0.8)]
    runs = [make("stock", seed=seed, log=logs[seed], settings=models[seed]) for seed in range(4)]
    assert list(Table(runs).ends.base) == [0.5, 0.5, 0.5, 0.8]


def test_what_was_known_is_a_score(make):
    """Solutions keep exp(-0.11) of their probability per token."""
    ends = Table([make("stock", log=scored(1.0, 1.11, key="eval_solutions_nll"))]).ends.set_index("score")
    shares = ends.final / ends.base
    assert shares["probability per token of solutions"] == pytest.approx(math.exp(-0.11))


# Runs


def test_how_a_run_ended_is_a_field(make, tmp_path):
    log = [{"step": 3, "loss": 0.5}]
    runs = {end: make(end, log=log, end=end) for end in ("diverged", "failed", "interrupted", "running", "finished")}
    runs["waiting"] = Run("a", {}, 0, tmp_path / "nowhere")
    assert {name: run.status for name, run in runs.items()} == {name: name for name in runs}
    assert runs["running"].reason == "It is at step 3 of 100." and "at step 3" in runs["interrupted"].reason
    assert runs["failed"].reason == runs["diverged"].reason == "it met a non-finite loss, or it did not"


@pytest.mark.parametrize(("name", "content"), [("result.json", "[3]"), ("tofu_eval.json", '{"summary": {"model_ut')])
def test_a_record_that_cannot_be_used_is_named_and_the_rest_is_read(make, name, content):
    stock, ceu = (make(arm, log=scored(1.0)) for arm in ("stock", "ceu"))
    (ceu.folder / name).write_text(content)
    table = Table([stock, ceu])
    assert [run.status for run in table.runs] == ["finished", "failed"]
    assert str(ceu.folder / name) in ceu.reason
    assert list(table.ends.final.isna()) == [False, True]


@pytest.mark.parametrize(
    "line",
    ["3", "[null]", "{", "\x00", "[" * 50_000, '{"loss": 1.0}', '{"step": "x"}'],
    ids=lambda line: repr(line[:20]),
)
def test_a_log_line_that_is_no_entry_is_left_out_and_named(make, line):
    run = make("stock", log=[{"step": 0, "eval_kl": 0.0}, {"step": 1, "eval_kl": 0.5}])
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + f"{line}\n" + json.dumps({"step": 2, "eval_kl": 1.0}) + '\n{"step": 3, "lo')
    assert values(Table([run]), "eval_kl") == {0: 0.0, 1: 0.5, 2: 1.0}
    assert run.log_problem.startswith(f"{path} is read without 1 lines") and "line 3" in run.log_problem


def test_odd_but_right_log_lines_are_read(make):
    run = make("stock")
    text = '{"step": 1.0, "loss": 1e999, "note": "a\u2028b"}\n\n{"step": 2, "loss": 1.0, "grad_norm": null}\n'
    (run.folder / "metrics.jsonl").write_text(text + '{"step": 3, "loss": 2}')
    assert values(Table([run]), "loss") == {1: math.inf, 2: 1.0, 3: 2.0} and not run.log_problem
