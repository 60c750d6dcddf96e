"""The report: numbers against hand-worked ones, runs of every kind, and the page in a real browser."""

import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from ceu_rl.stability.report import Run, table_rows, write_report
from ceu_rl.stability.summary import find_scores, response_tokens, summarize
from ceu_rl.stability.verdict import number, rate, verdict
from ceu_rl.unlearn import UnlearnConfig

ORIGIN = {"commit": "0" * 40, "versions": {"torch": "2.13.0"}, "device": "CPU"}
COMMAND = "ceu-rl compare stock.yaml ceu.yaml --learning_rate 1e-6 1e-5 1e-4"


def maker(root):
    """A function that makes one run in its folder: `log` is a list of entries, `end` one of the outcomes."""

    def run(arm, setting=None, seed=0, log=(), end="finished", **result):
        name = ",".join(f"{key}={value}" for key, value in (setting or {}).items()) or "recipe"
        made = Run(arm, setting or {}, seed, root / arm.replace("/", "_") / name / str(seed))
        made.folder.mkdir(parents=True)
        if log:
            (made.folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        outcome = {
            "command": f"ceu-rl dpo --config {arm}.yaml",
            "date": "2026-11-24T10:00:00+00:00",
            **ORIGIN,
            **result,
        }
        if end == "finished":
            (made.folder / "result.json").write_text(json.dumps({"steps": 100, "settings": {}, **outcome}))
        elif end in ("diverged", "failed"):
            failure = {"status": 1, "reason": f"it {end}", "log_tail": ["last <line>"], "diverged": end == "diverged"}
            (made.folder / "failure.json").write_text(json.dumps(failure | outcome))
        return made

    return run


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path / "runs")


def scored(*values, key="eval_greedy_accuracy", **more):
    """A log with evaluations at the steps 0, 50, 100 and so on."""
    return [{"step": 50 * place, key: value, **more} for place, value in enumerate(values)]


@pytest.fixture
def report(tmp_path):
    """Write the report and read back what it wrote: the dict, the page, and the terminal."""

    def write(runs):
        console = Console(record=True, width=100, file=io.StringIO())
        folder = tmp_path / "report"
        returned = write_report(folder, runs, console, COMMAND)
        text = (folder / "report.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == returned
        return returned, (folder / "report.html").read_text(), console.export_text()

    return write


def grid(make, ends):
    """Runs from the base 1.0 to the last score of each seed, by arm and learning rate; NaN: diverged."""
    return [
        make(
            arm,
            {"learning_rate": each},
            seed,
            scored(1.0, *([] if math.isnan(score) else [score])),
            end="diverged" if math.isnan(score) else "finished",
        )
        for arm, by_rate in ends.items()
        for each, scores in by_rate.items()
        for seed, score in enumerate(scores)
    ]


def test_the_range_of_a_hand_made_grid(make, report):
    """95 % of 1.0 is 0.95. ceu keeps it up to 1e-5 with every seed, stock up to 1e-6, so ten times as far. Without
    seed 1 stock keeps it up to 1e-5 as well, so that resamples have the ratios 10 and 1."""
    runs = grid(
        make,
        {
            "stock": {"1e-6": [0.99, 0.96], "1e-5": [0.97, 0.60], "1e-4": [0.1, math.nan]},
            "ceu": {"1e-6": [0.99, 0.99], "1e-5": [0.98, 0.95], "1e-4": [0.94, 0.93]},
        },
    )
    found, page, terminal = report(runs)
    sentence = (
        "ceu keeps 95 % of the base's greedy accuracy up to a learning rate of 1e-5, stock up to 1e-6: "
        "10 times as far (95 % interval over 2 seeds 1 to 10; 1 lies within it)."
    )
    assert found["verdict"][0] == sentence
    assert sentence.replace("'", "&#39;") in re.sub(r"</?span[^>]*>", "", page)
    assert sentence in " ".join(terminal.split())
    assert found["verdict"][-1] == "1 of 12 runs diverged, which counts as having lost the score: 1 of stock."
    stock, ceu = found["ranges"]
    assert (stock["range"], stock["ratio"], stock["interval"]) == (1e-6, None, None)
    assert (ceu["range"], ceu["baseline_range"], ceu["ratio"], ceu["interval"]) == (1e-5, 1e-6, 10, [1, 10])
    assert ceu["seeds"] == [0, 1] and not ceu["at_most_tried"]
    assert [entry["mean"] for entry in found["best"]] == [0.975, 0.99]


@pytest.mark.parametrize(
    ("stock", "ceu", "words"),
    [
        ({"1e-6": 0, "1e-5": 0}, {"1e-5": 0}, "(below 1e-5), stock at none tried (below 1e-6): how many times as far"),
        ({"1e-6": 1, "1e-5": 0}, {"1e-5": 0}, "(below 1e-5), stock up to 1e-6: at most 10 times as far"),
        ({"1e-6": 1, "1e-5": 0}, {"1e-5": 1}, "tried), stock up to 1e-6: at least 10 times as far"),
        (
            {"1e-7": 1, "1e-6": 1},
            {"1e-5": 1},
            "tried), stock up to at least 1e-6 (the largest tried): how many times as far",
        ),
    ],
)
def test_the_bound_of_a_ratio_where_the_arms_have_other_rates(make, report, stock, ceu, words):
    """As in a grid that has not run to its end."""
    ends = {arm: {rate: [float(each)] for rate, each in at.items()} for arm, at in (("stock", stock), ("ceu", ceu))}
    first = report(grid(make, ends))[0]["verdict"][0]
    assert first.startswith("ceu keeps 95 %") and words in first


def test_the_verdict_says_that_stock_is_better_in_the_same_form(make, report):
    ends = {
        "stock": {"1e-6": [1.0], "1e-5": [1.0], "1e-4": [0.5]},
        "ceu": {"1e-6": [1.0], "1e-5": [0.9], "1e-4": [0.9]},
    }
    assert report(grid(make, ends))[0]["verdict"][0] == (
        "stock keeps 95 % of the base's greedy accuracy up to a learning rate of 1e-5, ceu up to 1e-6: "
        "10 times as far (one seed: no interval)."
    )


@pytest.mark.parametrize(
    ("stock", "ceu", "words"),
    [
        (
            [1, 0],
            [1, 1],
            "ceu {} up to at least a learning rate of 1e-5 (the largest tried), stock up to 1e-6: at least 10 ",
        ),
        (
            [0, 0],
            [1, 1],
            "ceu {} up to at least a learning rate of 1e-5 (the largest tried), stock at none tried (below ",
        ),
        (
            [0, 0],
            [1, 0],
            "ceu {} up to a learning rate of 1e-6, stock at none tried (below 1e-6): how many times as far",
        ),
        (
            [1, 0],
            [0, 0],
            "stock {} up to a learning rate of 1e-6, ceu at none tried (below 1e-6): how many times as far",
        ),
        (
            [0, 0],
            [0, 0],
            "ceu {} at none tried (below 1e-6), stock at none tried (below 1e-6): these rates cannot tell",
        ),
        (
            [1, 1],
            [1, 1],
            "ceu {} up to at least a learning rate of 1e-5 (the largest tried), stock up to at least 1e-5",
        ),
        (
            [1, 0],
            [1, 0],
            "ceu {} up to a learning rate of 1e-6, stock up to 1e-6: the same range (one seed: no interval)",
        ),
        (
            [1, 1],
            [1, 0],
            "stock {} up to at least a learning rate of 1e-5 (the largest tried), ceu up to 1e-6: at least 10",
        ),
    ],
)
def test_open_ends_of_a_range(make, stock, ceu, words):
    ends = {name: {"1e-6": [ends[0]], "1e-5": [ends[1]]} for name, ends in (("stock", stock), ("ceu", ceu))}
    sentence = verdict(summarize(grid(make, ends), COMMAND))[0]
    assert sentence.startswith(words.format("keeps 95 % of the base's greedy accuracy"))


def test_failed_and_missing_runs_are_left_out_and_named(make, report):
    ends = {
        "stock": {"1e-6": [1.0, 1.0], "1e-5": [0.2, 0.2]},
        "ceu": {"1e-6": [1.0, 1.0], "1e-5": [1.0, 0.2]},
    }
    runs = grid(make, ends)
    shutil.rmtree(runs[-1].folder)
    runs[-1] = make("ceu", {"learning_rate": "1e-5"}, 1, [{"step": 7, "loss": 0.5, "grad_norm": 99.0}], end="missing")
    runs += [
        make("ceu", {"learning_rate": "1e-6"}, 2, end="failed"),
        make("stock", {"learning_rate": "1e-6"}, 2, end="no"),
    ]
    found, page, terminal = report(runs)
    assert found["ranges"][1]["seeds"] == [0]
    assert "at least 10 times as far (one seed: no interval)." in found["verdict"][0]
    assert "1 of 10 runs failed and is left out: 1 of ceu." in found["verdict"]
    assert "2 of 10 runs are missing and are left out: 1 of stock and 1 of ceu." in found["verdict"]
    assert [run["status"] for run in found["runs"][-3:]] == ["missing", "failed", "missing"]
    assert all(group["grad_norm_largest"] != 99.0 for group in found["groups"])
    assert "no result; the log ends at step 7" in page and "it has not started" in page
    assert "it failed" in page and "last &lt;line&gt;" in page
    assert "1 failed" in terminal and "missing" in terminal


def test_a_finished_run_without_the_score_is_named(make, report):
    runs = [make("stock", log=scored(1.0, 1.0)), make("ceu", log=scored(1.0, 0.9)), make("ceu", seed=1)]
    found, _, _ = report(runs)
    assert found["verdict"] == [
        "ceu ends with a greedy accuracy of 0.9, stock with 1: 0.1 lower (one seed: no interval).",
        "1 of 3 runs finished without a greedy accuracy and is left out of it: 1 of ceu.",
    ]


def test_a_single_rate_gives_the_difference_over_seeds(make, report):
    """Differences 0.2 and 0.4: their mean is 0.3, and the means of resamples go from 0.2 to 0.4."""
    ends = {"stock": [0.5, 0.6], "ceu": [0.7, 1.0]}
    runs = [make(arm, {}, seed, scored(0.9, end)) for arm, values in ends.items() for seed, end in enumerate(values)]
    found, page, _ = report(runs)
    assert found["verdict"] == [
        "ceu ends with a greedy accuracy of 0.85, stock with 0.55: 0.3 higher (95 % interval over 2 seeds 0.2 to 0.4)."
    ]
    assert "<svg" in page and "as in the recipe" not in page

    lower = [make(arm, {}, 5, scored(0.9, end)) for arm, end in (("stock", 0.9), ("ceu", 0.5))]
    assert report(lower)[0]["verdict"] == [
        "ceu ends with a greedy accuracy of 0.5, stock with 0.9: 0.4 lower (one seed: no interval)."
    ]


def test_a_baseline_that_diverged_has_no_score(make, report):
    runs = [make("stock", log=scored(0.9), end="diverged"), make("ceu", log=scored(0.9, 0.8))]
    found, page, _ = report(runs)
    assert found["verdict"][0] == (
        "No comparison of ceu in greedy accuracy: 1 seed of stock diverged; ceu ends with 0.8."
    )
    assert found["runs"][0]["final"] == {"greedy accuracy": None}
    assert "stock, seed 0: diverged" in page.replace("\n", "")


def test_measures_of_a_log_with_values_that_are_not_finite(make, report):
    log = [
        *scored(1.0, 0.4, 0.3, **{"eval_logps/rejected": -12.0}),
        *({"step": step, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-5} for step in range(1, 10)),
        {"step": 10, "loss": math.nan, "grad_norm": math.inf},
        {"step": 11, "loss": 0.5, "grad_norm": 30.0},
        {"step": 12, "eval_logps/chosen": -1.0},
        {"step": 13, "eval_logps/chosen": -3.0},
    ]
    run = make("stock", log=log, eval_tokens={"chosen": 2.0, "rejected": 4.0}, metrics={"train_runtime": 50.0})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "lo')  # what a kill leaves
    found, page, _ = report([run])
    expected = {
        "grad_norm_largest": 30, "grad_norm_median": 1, "grad_norm_spikes": 1, "loss_spikes": 0, "non_finite_steps": 1,
        "displacement": -1, "depth": 3, "drawdown": 0.7, "collapse_step": 50, "seconds_per_step": 0.5, "kl": None,
    }  # fmt: skip
    measures = found["runs"][0]["measures"]
    assert {name: measures[name] for name in expected} == expected
    assert found["groups"][0]["seconds_per_step_ratio"] == 1
    assert found["runs"][0]["learning_rate"] == 1e-5
    assert found["runs"][0]["curves"]["eval_greedy_accuracy"] == [1.0, None, None, 0.4, 0.3]
    assert "nats per token" in page and "needs" not in found["verdict"][0]
    assert "No run logged what these need: KL" in " ".join(page.split())


def test_without_a_verifier_the_score_is_the_probability_of_chosen_tokens(make, report):
    """exp(-2 / 4) is the geometric mean of four tokens whose log-probabilities sum to -2."""
    ends = {"stock": {"1e-6": -2.1, "1e-5": -4.0}, "ceu": {"1e-6": -1.9, "1e-5": -2.0}}
    runs = [
        make(
            arm,
            {"learning_rate": each},
            log=scored(-2.0, end, key="eval_logps/chosen", **{"eval_rewards/accuracies": 0.7}),
            eval_tokens={"chosen": 4.0, "rejected": 5.0},
        )
        for arm, values in ends.items()
        for each, end in values.items()
    ]
    found, _, terminal = report(runs)
    name = "probability per token of held-out chosen responses"
    assert found["base"] == {name: pytest.approx(math.exp(-0.5), rel=1e-5), "held-out preference accuracy": 0.7}
    assert found["verdict"][0] == (
        f"ceu keeps 95 % of the base's {name} up to at least a learning rate of 1e-5 (the largest tried), stock up to "
        "1e-6: at least 10 times as far (one seed: no interval)."
    )
    assert {entry["score"] for entry in found["ranges"]} == {name}  # preference accuracy starts at 0 by construction
    assert max(len(line) for line in terminal.splitlines() if not line.startswith("Report: ")) <= 100


def test_of_preferences_all_that_the_model_knew_is_to_be_kept(make, report):
    """stock keeps its chosen answers at both rates, and at 1e-5 of its solutions exp(-0.11) = 0.896; ceu keeps at least
    exp(-0.02) of everything."""

    def log(chosen, nll):
        known = {"eval_world_facts_probability": 0.5, "eval_solutions_kl": 0.0}
        start = {"eval_logps/chosen": -2.0, "eval_rewards/accuracies": 0.0, "eval_solutions_nll": 1.0, **known}
        end = {"eval_logps/chosen": chosen, "eval_rewards/accuracies": 0.7, "eval_solutions_nll": nll, **known}
        return [{"step": 0, **start}, {"step": 60, **end, "eval_solutions_kl": 0.25}]

    ends = {"stock": ((-2.0, 1.0), (-2.0, 1.11)), "ceu": ((-2.0, 1.0), (-2.04, 1.02))}
    runs = [
        make(arm, {"learning_rate": each}, log=log(*end), eval_tokens={"chosen": 2.0, "rejected": 2.0})
        for arm, each_end in ends.items()
        for each, end in zip(("1e-6", "1e-5"), each_end, strict=True)
    ]
    found, page, terminal = report(runs)
    assert found["base"] == {
        "worst-kept score": 1.0,
        "probability per token of held-out chosen responses": pytest.approx(math.exp(-1), rel=1e-5),
        "held-out preference accuracy": 0.0,
        "world-facts probability": 0.5,
        "probability per token of solutions": pytest.approx(math.exp(-1), rel=1e-5),
    }
    assert found["verdict"][0] == (
        "ceu keeps 95 % of the base's worst-kept score up to at least a learning rate of 1e-5 (the largest tried), "
        "stock up to 1e-6: at least 10 times as far (one seed: no interval)."
    )
    worst = {(run["arm"], run["learning_rate"]): run["final"]["worst-kept score"] for run in found["runs"]}
    assert worst["stock", 1e-5] == pytest.approx(math.exp(-0.11), rel=1e-5)
    assert worst["ceu", 1e-5] == pytest.approx(math.exp(-0.02), rel=1e-5)
    assert [group["solutions_kl"] for group in found["groups"]] == [0.25] * 4
    assert found["runs"][0]["curves"]["eval_solutions_nll"] == [1.0, 1.0]
    assert "least share of its own base" in page and "NLL of solutions, nats per token" in page
    assert "worst-kept score" in terminal


def test_what_a_model_knew_is_a_score_beside_that_of_a_task(make, report):
    """Of GRPO the first score stays the reward, and it alone is held against the divergence."""
    end = {"eval_kl": 0.1, "eval_real_authors_probability": 0.4}
    runs = [make(arm, log=scored(-1.0, -0.5, key="eval_reward", reward=0.1, **end)) for arm in ("stock", "ceu")]
    found, _, _ = report(runs)
    assert list(found["base"]) == ["held-out reward", "real-authors probability"]
    assert [each["score"] for each in found["frontier"]] == ["held-out reward"]


def test_a_reward_that_is_negative_has_no_share_to_keep(make, report):
    runs = [
        make("stock", {"learning_rate": each}, log=scored(-2.0, -1.0, key="eval_reward")) for each in ("1e-6", "1e-5")
    ]
    found, page, _ = report(runs)
    assert found["ranges"] == [] and found["groups"][0]["collapse_step"] is None and 'class="lost"' not in page
    assert found["verdict"][0] == (
        "There is no share of the base's score to keep (held-out reward -2), so that no range is given."
    )


@pytest.mark.parametrize(
    ("log", "end", "words"),
    [
        ([], "finished", "No run logged an evaluation"),
        ([{"step": 1, "loss": 0.5}], "finished", "No run logged an evaluation"),
        ([], "missing", "No run has finished"),
        ([{"step": 1, "loss": math.nan}], "failed", "No run has finished"),
        ([{"step": 50, "eval_greedy_accuracy": 0.5}], "finished", "stock ends with a greedy accuracy of 0.5 (1 seed)."),
    ],
)
def test_little_to_report(make, report, log, end, words):
    found, page, terminal = report([make("stock", log=log, end=end)])
    assert found["verdict"][0].startswith(words) and words in terminal
    assert "</html>" in page


@pytest.mark.parametrize(("value", "seeds"), [(0.2, 3), (0.7, 3), (0.982, 3), (0.996, 5)])
def test_seeds_that_tie_are_drawn(make, report, value, seeds):
    """The mean of equal numbers can lie an ulp outside of them."""
    ends = {arm: {each: [value] * seeds for each in ("1e-6", "1e-5")} for arm in ("stock", "ceu")}
    found, page, _ = report(grid(make, ends))
    assert found["groups"][0]["final"]["greedy accuracy"]["min"] == value and "</html>" in page


def test_each_start_is_its_own_base(make, report):
    """Two arms that keep all that they had, from models of 0.4 and of 0.9, and a grid over these models."""
    ends = (("stock", "good", 0.9), ("ceu", "weak", 0.4))
    runs = [
        make(arm, {"learning_rate": each}, log=scored(end, end), settings={"model_name_or_path": model, "max_steps": 9})
        for arm, model, end in ends
        for each in ("1e-6", "1e-5")
    ]
    found, page, _ = report(runs)
    assert found["verdict"][0].endswith("these rates cannot tell them apart.")
    assert "The arms do not share model_name_or_path (stock good, ceu weak)" in " ".join(found["verdict"])
    assert 'class="lost"' not in page and found["base"] == {"greedy accuracy": None}
    models = [
        make("npo", {"learning_rate": each, "model_name_or_path": model}, log=scored(end, end))
        for _, model, end in ends
        for each in ("1e-6", "1e-5")
    ]
    assert [entry["range"] for entry in summarize(models, COMMAND)["ranges"]] == [1e-5, 1e-5]


def test_rates_below_the_range_that_lose_are_named(make, report):
    ends = {
        "stock": {"1e-6": [0.9], "1e-5": [0.97], "1e-4": [0.2]},
        "ceu": {"1e-6": [1.0], "1e-5": [1.0], "1e-4": [0.1]},
    }
    found, _, _ = report(grid(make, ends))
    assert found["verdict"][0].count("(but not at 1e-6)") == 1 and "stock up to 1e-5 (but not" in found["verdict"][0]


def test_a_finished_run_without_a_finite_evaluation_has_diverged(make, report):
    runs = [
        make("stock", log=scored(1.0, 1.0)),
        make("ceu", log=scored(1.0, math.nan), metrics={"eval_loss": math.nan}),
    ]
    assert (runs[1].status, runs[1].reason) == ("diverged", "Its last evaluation met a non-finite eval_loss (nan).")
    found, _, _ = report(runs)
    assert any("1 of 2 runs diverged" in sentence for sentence in found["verdict"])


def test_a_column_that_the_first_run_lacks_moves_no_other(make, report):
    entry = {"eval_pass@8": 0.77, "grad_norm": 3.0}
    runs = [
        make("stock", {"learning_rate": "1e-6"}, end="failed"),
        make("stock", {"learning_rate": "1e-5"}, log=[*scored(0.5, 0.5), {"step": 60, **entry}]),
    ]
    _, page, _ = report(runs)
    behind = page.split("The runs behind each row")[1]
    for table in re.findall(r"<table>(.*?)</table>", behind, re.DOTALL)[:2]:
        head, body = table.split("</thead>")
        assert head.count("<th ") == body.count("<td") + body.count("<th ")


def test_rows_as_in_the_recipe_stand_under_no_other_heading(make, report):
    runs = [
        make("stock", {"learning_rate": "1e-6", "beta": "0.5"}, log=scored(0.5, 0.5)),
        make("stock", {"learning_rate": "1e-6"}, log=scored(0.5, 0.3)),
    ]
    _, page, _ = report(runs)
    assert page.index("beta 0.5</th>") < page.index("as in the recipe</th>")


def test_no_runs_at_all(report):
    assert report([])[0]["verdict"] == ["There are no runs to compare."]


def test_a_backslash_is_a_backslash(make, report):
    settings = [{"learning_rate": "1e-5", "template": text} for text in (r"\d {question}", r"\g<1> x")]
    runs = [make(arm, setting, log=scored(1.0, 0.9)) for arm in ("stock", r"st\d") for setting in settings]
    found, page, _ = report(runs)
    assert found["arms"] == ["stock", r"st\d"] and r"\d {question}" in page and r"\g&lt;1&gt; x" in page


def test_a_recorded_length_that_is_a_word_is_no_limit(make, report):
    log = scored(-2.0, -2.1, key="eval_logps/chosen")
    found, _, _ = report(
        [make("stock", log=log, eval_tokens={"chosen": 2, "rejected": 2}, settings={"max_length": "None"})]
    )
    assert found["tokens"] == {"stock": {"chosen": 2, "rejected": 2}}


def test_names_are_escaped_and_nothing_is_loaded(make, report):
    runs = [make(arm, log=scored(1.0, 0.5, loss=0.1)) for arm in ("stock", 'a<b>&"c$x_1$[red]')]
    _, page, terminal = report(runs)
    assert "[red]" in terminal.split("First evaluation")[1]
    assert page.count("<script") == 1 and "http" not in page.split("<script>")[1]
    assert "a<b>" not in page and "a&lt;b&gt;&amp;" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script |<link""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {ref for ref in re.findall(r'(?:href="#|url\(#)([^")]+)', page)} <= set(ids)


# What was set decides, and what the loss counts


@pytest.mark.parametrize(
    ("settings", "command", "expected"),
    [
        ({"learning_rate": 1e-5}, "ceu-rl dpo", 1e-5),
        ({"learning_rate": "1e-5"}, "ceu-rl dpo", 1e-5),  # as earlier versions have it: YAML reads it as text
        ({"learning_rate": 3e-5, "overrides": ["--learning-rate", "1e-5"]}, "ceu-rl dpo", 1e-5),
        ({"learning_rate": 3e-5, "overrides": ["--seed", "1", "--learning_rate=1e-5"]}, "ceu-rl dpo", 1e-5),
        ({"beta": 0.1}, "ceu-rl dpo --config a.yaml", 1e-6),  # TRL's default for DPO
        ({"beta": 0.1}, "ceu-rl unlearn --config a.yaml", None),
        ({}, "ceu-rl dpo", 5.5e-6),  # nothing says what was set
    ],
)
def test_the_learning_rate_is_the_one_that_was_set(make, settings, command, expected):
    """Linear decay from 1e-5, logged each tenth of 20 steps: the largest logged is 5.5e-6."""
    log = [{"step": step, "learning_rate": 1e-5 * (1 - (step - 1) / 20)} for step in (10, 20)]
    run = make("stock", log=log, settings=settings, command=command)
    if expected is None:
        expected = UnlearnConfig.__dataclass_fields__["learning_rate"].default
    assert run.learning_rate == pytest.approx(expected)


def test_each_run_counts_its_own_tokens(make, report):
    """stock cuts responses at 4 tokens, ceu at 8: both start at exp(-1/2) a token. ceu ends at exp(-0.525), 97.5 % of
    that, stock at exp(-0.55) = 95.1 %; by stock's counts ceu would have fallen from exp(-1) to exp(-1.05), by 4.9 %."""
    ends = {"stock": (4.0, -2.0, -2.2), "ceu": (8.0, -4.0, -4.2)}
    runs = [
        make(
            arm,
            {"learning_rate": each},
            log=[
                {"step": 0, "eval_logps/chosen": start, "eval_logps/rejected": start},
                {"step": 9, "eval_logps/chosen": end * (1 if each == "1e-6" else 2), "eval_logps/rejected": 2 * start},
            ],
            eval_tokens={"chosen": count, "rejected": count / 2},
            settings={"max_length": int(2 * count), "learning_rate": float(each)},
        )
        for arm, (count, start, end) in ends.items()
        for each in ("1e-6", "1e-5")
    ]
    found, page, _ = report(runs)
    final = {(run["arm"], run["learning_rate"]): next(iter(run["final"].values())) for run in found["runs"]}
    assert final["stock", 1e-6] == pytest.approx(math.exp(-0.55), rel=1e-5)
    assert final["ceu", 1e-6] == pytest.approx(math.exp(-0.525), rel=1e-5)
    assert [run["measures"]["depth"] for run in found["runs"]] == [2.0, 2.0, 2.0, 2.0]
    assert found["tokens"] == {"stock": {"chosen": 4, "rejected": 2}, "ceu": {"chosen": 8, "rejected": 4}}
    assert [entry["range"] for entry in found["ranges"]] == [1e-6, 1e-6] and "nats per token" in page


def test_each_arm_is_held_against_its_own_base(make):
    """Cut at 4 of 8 tokens, the base itself scores exp(-1) for exp(-1/2): what each arm keeps is a share of its own."""
    runs = [
        make(arm, {"learning_rate": each}, log=scored(start, start, key="eval_logps/chosen"), eval_tokens=tokens)
        for arm, start, tokens in (
            ("stock", -4.0, {"chosen": 8.0, "rejected": 8.0}),
            ("short", -4.0, {"chosen": 4.0, "rejected": 4.0}),
        )
        for each in ("1e-6", "1e-5")
    ]
    found = summarize(runs, COMMAND)
    (bases,) = found["bases"].values()
    assert bases == {"stock": pytest.approx(math.exp(-0.5)), "short": pytest.approx(math.exp(-1.0))}
    assert [entry["range"] for entry in found["ranges"]] == [1e-5, 1e-5]


def test_counts_before_truncation_are_not_used(make):
    """Results of earlier versions counted 401 tokens of responses that were cut at 64; those of 40 were right."""
    rows = {"max_length": 64, "overrides": ["--seed", "0"]}
    cut, whole = ({"chosen": count, "rejected": count} for count in (401.0, 40.0))
    log = scored(-20.0, key="eval_logps/chosen")
    long = make("stock", log=log, settings=rows, eval_tokens=cut)
    assert response_tokens([long]) == {}
    unlimited = make("ceu", log=log, settings={"max_length": None}, eval_tokens=cut)
    right = make("paper", log=log, settings={**rows, "dataset_name": "other"}, eval_tokens=whole)
    found = response_tokens([long, unlimited, right])
    assert found == {unlimited.folder: cut, right.folder: whole}
    (score, *_) = find_scores([long, unlimited, right])
    assert score.final(long) is None and score.final(right) == pytest.approx(math.exp(-0.5))
    # A run that diverged recorded none: those of the same rows are its
    broken = make("wild", log=log, end="diverged", settings={**rows, "dataset_name": "other"})
    assert response_tokens([right, broken])[broken.folder] == whole


# Files that are not what they should be


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", '{"metrics": []}', "metrics is [], not numbers by name"),
        ("result.json", '{"metrics": {"eval_reward": "high"}}', 'metrics.eval_reward is "high", not a number'),
        ("result.json", '{"eval_tokens": {"chosen": [1]}}', "eval_tokens.chosen is [1], not a number"),
        ("result.json", '{"steps": "many"}', 'steps is "many", not a whole number'),
        ("result.json", '{"steps": true}', "steps is true, not a whole number"),
        ("result.json", '{"wall_time_s": {}}', "wall_time_s is {}, not a number"),
        ("result.json", '{"versions": ["torch"]}', 'versions is ["torch"], not a mapping'),
        ("result.json", '{"command": ["ceu-rl"]}', 'command is ["ceu-rl"], not text'),
        ("result.json", '{"settings": "beta"}', 'settings is "beta", not a mapping'),
        ("failure.json", '{"log_tail": "lines"}', 'log_tail is "lines", not a list'),
        ("failure.json", '{"diverged": "no"}', 'diverged is "no", not true or false'),
        ("failure.json", "3", "holds 3, no mapping"),
        ("tofu_eval.json", '{"summary": [1]}', "summary is [1], not numbers by name"),
        ("tofu_eval.json", '{"summary": {"forget_quality": "0.5"}}', 'summary.forget_quality is "0.5", not a number'),
        ("tofu_eval.json", "", "is empty"),
        ("result.json", '{"steps": 3', "is cut short or no JSON"),
    ],
)
def test_an_outcome_of_wrong_types_is_named_and_the_rest_is_reported(make, report, name, content, words):
    runs = [make(arm, log=scored(1.0, 0.9)) for arm in ("stock", "ceu")]
    (runs[1].folder / name).write_text(content)
    found, page, _ = report(runs)
    stock, ceu = found["runs"]
    assert stock["status"] == "finished" and stock["final"] == {"greedy accuracy": 0.9}
    assert ceu["status"] == "failed" and f"{runs[1].folder / name}" in ceu["reason"] and words in ceu["reason"]
    assert str(runs[1].folder / name) in page


@pytest.mark.parametrize(
    "line",
    [
        *("3", "[]", "null", '"step"', "{", "\x00\x00", "[" * 50_000),
        *('{"loss": 1.0}', '{"step": "1"}', '{"step": 1.5}', '{"step": true}', '{"step": null}', '{"step": 1e999}'),
        *('{"step": 1, "loss": "low"}', '{"step": 1, "eval_kl": [1]}'),
    ],
    ids=lambda line: line[:20].replace("\x00", "zero"),
)
def test_a_log_line_that_is_no_entry_is_left_out_and_named(make, report, line):
    run = make("stock", log=scored(1.0, 0.9))
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + f"{line}\n" + json.dumps({"step": 100, "eval_greedy_accuracy": 0.8}) + "\n")
    found, page, _ = report([run])
    assert found["runs"][0]["curves"]["eval_greedy_accuracy"] == [1.0, 0.9, 0.8]
    assert found["runs"][0]["log_problem"].startswith(f"{path} is read without line 3: it")
    assert found["verdict"][-1] == "1 of 1 runs have log lines that could not be read and are left out."
    assert "What could not be read" in page


def test_odd_but_right_log_lines_are_read(make):
    run = make("stock")
    (run.folder / "metrics.jsonl").write_text(
        '{"step": 1.0, "loss": NaN, "note": "a\u2028b"}\n\n{"step": 2, "loss": 1' + "0" * 400 + ', "grad_norm": null}\n'
        '{"step": 3, "loss": 2}'
    )
    assert run.log_problem is None
    (first, *rest) = run.series("loss")
    assert first[0] == 1 and math.isnan(first[1]) and rest == [(2, math.inf), (3, 2.0)]


# GRPO: what a reward costs


def rewarded(make, arm, each, seed, *steps):
    """A GRPO run with (divergence, reward) at its evaluations."""
    log = [
        {"step": 50 * place, "eval_kl": far, "eval_sampled_accuracy": reward, "eval_sampled_entropy": 0.5 - far}
        | {"eval_greedy_accuracy": reward, "eval_pass@1": reward, "eval_pass@16": min(1.0, reward + 0.1)}
        for place, (far, reward) in enumerate(((0.0, 0.5), *steps))
    ]
    log[1:1] = [
        {"step": step, "reward": 0.5, "ceu/descending_below_0.01": 0.1 * step, "ceu/descending_above_0.99": 0.2}
        | {
            "ceu/gradient_descending": 0.5,
            "ceu/gradient_below_0.01": 0.1 * step,
            "ceu/gradient_above_0.99": 0.01 * step,
        }
        | {"rollout/ratio_positive": 1.0 + step, "rollout/mismatch_positive": None if step == 2 else 0.1 * step}
        | {"rollout/ratio_negative": 0.25 * step, "rollout/mismatch_negative": 0.3 * step}
        for step in (1, 2, 3)
    ]
    return make(arm, {"learning_rate": each}, seed, log, settings={"learning_rate": float(each)}, command="ceu-rl grpo")


def frontier_grid(make):
    """Both arms reach 0.8: stock first at 1e-4 with a divergence of 0.2, ceu at 1e-4 with 0.1; ceu at 3e-4 has 0.9."""
    ends = {
        ("stock", "1e-4"): [(0.2, 0.78), (0.2, 0.82)],
        ("stock", "3e-4"): [(0.4, 0.6), (0.4, 0.6)],
        ("ceu", "1e-4"): [(0.08, 0.8), (0.12, 0.8)],
        ("ceu", "3e-4"): [(0.3, 0.9), (0.3, 0.9)],
    }
    return [
        rewarded(make, arm, each, seed, (end[0] / 2, end[1] - 0.1), end)
        for (arm, each), seeds in ends.items()
        for seed, end in enumerate(seeds)
    ]


def test_the_headline_of_grpo_is_reward_against_divergence(make, report):
    """By hand: at 0.8 the divergences are 0.1 and 0.2. Seed 0 alone reaches 0.78 at 0.08 and 0.2, seed 1 alone 0.82,
    which ceu reaches at 3e-4 alone, at 0.3: the resamples' ratios are 0.4, 0.5 (twice) and 1.5."""
    found, page, _ = report(frontier_grid(make))
    assert found["verdict"][0] == (
        "At a sampled accuracy of at least 0.8, which both reach, ceu is 0.1 nats per token from the start (learning "
        "rate 1e-4), stock is 0.2 from the start (learning rate 1e-4): ceu goes 0.5 times as far (95 % interval over "
        "2 seeds 0.4 to 1.5; 1 lies within it)."
    )
    assert found["verdict"][1] == (
        "stock at its best (learning rate 1e-4): sampled accuracy 0.8 (0.78 to 0.82), divergence 0.2 (0.2 to 0.2), "
        "pass@16 0.9, entropy -0.2 (2 seeds)."
    )
    assert found["verdict"][2].startswith("ceu at its best (learning rate 3e-4): sampled accuracy 0.9 (0.9 to 0.9)")
    assert any("keeps 95 % of the base's sampled accuracy" in sentence for sentence in found["verdict"][3:])
    (frontier,) = found["frontier"]
    assert frontier["base"] == 0.5 and len(frontier["points"]) == 4
    assert frontier["points"][0]["path"] == [[0, 0, 0.5], [50, 0.1, 0.7], [100, 0.2, 0.8]]
    measured = found["runs"][0]["measures"]
    assert (measured["pass@1"], measured["pass@16"]) == (0.78, 0.88)
    assert (measured["descending_rare"], measured["descending_sure"]) == (0.2, 0.2)
    assert (measured["gradient_rare"], measured["gradient_sure"]) == (0.2, 0.02)
    assert (measured["ratio_positive"], measured["ratio_negative"]) == (3.0, 0.5)
    assert (measured["mismatch_positive"], measured["mismatch_negative"]) == (0.2, 0.6)  # over the steps that have it
    text = " ".join(page.split())
    assert text.index("Reward against divergence</h2>") < text.index("Final scores</h2>")
    for heading in (
        "pass@1</th>",
        "pass@16</th>",
        "descending below 0.01</th>",
        "gradient of descending</th>",
        "gradient below 0.01</th>",
        "gradient above 0.99</th>",
        "ratio, positive</th>",
        "ratio, negative</th>",
        "mismatch, positive</th>",
        "mismatch, negative</th>",
        "their share of the gradient, below 0.01",
        "importance ratio, negative advantage",
        "mismatch with rollouts, nats, positive advantage",
        "entropy, nats per token",
        "KL from the start, nats per token",
        "pass@16, held out",
        "entropy change</th>",
    ):
        assert heading in text


def test_the_frontier_says_that_stock_is_nearer_in_the_same_form(make):
    ends = {"stock": [(0.1, 0.8)], "ceu": [(0.3, 0.8)]}
    runs = [rewarded(make, arm, "1e-4", seed, *each) for arm, each in ends.items() for seed in range(1)]
    assert verdict(summarize(runs, COMMAND))[0] == (
        "At a sampled accuracy of at least 0.8, which both reach, stock is 0.1 nats per token from the start (learning "
        "rate 1e-4), ceu is 0.3 from the start (learning rate 1e-4): stock goes 0.33 times as far (one seed: no "
        "interval)."
    )


def test_a_reward_no_better_than_at_the_start_costs_nothing_to_compare(make):
    runs = [rewarded(make, arm, "1e-4", 0, (0.1, end)) for arm, end in (("stock", 0.4), ("ceu", 0.8))]
    assert verdict(summarize(runs, COMMAND))[0] == (
        "No comparison of ceu in divergence at equal sampled accuracy: both reach 0.4, which is not above the base's "
        "0.5."
    )


def test_a_setting_with_a_diverged_seed_is_no_arms_best(make):
    runs = [rewarded(make, arm, "1e-4", seed, (0.1, 0.8)) for arm in ("stock", "ceu") for seed in (0, 1)]
    runs.append(rewarded(make, "ceu", "3e-4", 0, (0.3, 0.9)))
    broken = {"settings": {"learning_rate": 3e-4}, "command": "ceu-rl grpo"}
    runs.append(make("ceu", {"learning_rate": "3e-4"}, 1, [{"step": 0, "eval_kl": 7.0}], end="diverged", **broken))
    found = summarize(runs, COMMAND)
    assert any(said.startswith("ceu at its best (learning rate 1e-4): sampled accuracy 0.8") for said in verdict(found))
    assert [point["diverged"] for point in found["frontier"][0]["points"]] == [0, 0, 1]
    (group,) = (group for group in found["groups"] if group["setting"]["learning_rate"] == "3e-4")
    assert group["kl"] == 0.3


def test_without_divergences_there_is_no_frontier(make, report):
    log = [{"step": 0, "eval_reward": 0.1}, {"step": 1, "reward": 0.2}, {"step": 50, "eval_reward": 0.5}]
    found, page, _ = report([make(arm, log=log) for arm in ("stock", "ceu")])
    assert found["frontier"] == [] and "Reward against divergence" not in page
    assert found["verdict"][0].startswith("ceu ends with a held-out reward of 0.5")


def unlearned(make, arm, each, quality, utility, seed=0, probability=0.1):
    method = "unlearn" if each else "sft"
    run = make(
        arm,
        {"learning_rate": each} if each else {},
        seed,
        [{"step": 1, "forget_loss": 2.0, "retain_loss": 1.0}],
        command=f"ceu-rl {method} --config {arm}.yaml",
    )
    summary = {"forget_quality": quality, "model_utility": utility, "forget_probability": probability}
    (run.folder / "tofu_eval.json").write_text(json.dumps({"summary": summary, "items": {}}))
    return run


def test_tofu_on_the_plane(make, report):
    """90 % of the base's utility 0.6 is 0.54. paper at 1e-4 forgets but loses it; grad_diff at 1e-4 is beaten by paper
    at 1e-5 in both."""
    runs = [
        unlearned(make, "full", None, 1e-20, 0.6),
        unlearned(make, "retain90", None, 1.0, 0.61),
        *(unlearned(make, "grad_diff", each, *at) for each, at in (("1e-5", (1e-9, 0.59)), ("1e-4", (0.01, 0.2)))),
        *(unlearned(make, "paper", each, *at) for each, at in (("1e-5", (0.06, 0.55)), ("1e-4", (0.5, 0.4)))),
        make("npo", {"learning_rate": "1e-5"}),
    ]
    found, page, terminal = report(runs)
    assert found["verdict"][0] == (
        "paper (learning rate 1e-5) reaches a forget quality above 0.05 at a model utility within 10 % of the base's "
        "0.6; grad_diff at no setting tried (each with 1 seed, so without an interval)."
    )
    assert found["verdict"][1].endswith(
        ": grad_diff (learning rate 1e-5), paper (learning rate 1e-5), paper (learning rate 1e-4)."
    )
    assert found["verdict"][2].endswith("for want of an evaluation or of a retain model: npo.")
    assert [point["front"] for point in found["tofu"]["points"]] == [True, True, False, True]
    assert "Forget quality and model utility</h2>" in page and "loss on the forget set" in page
    assert "model utility" in terminal


def test_a_collapsed_model_reaches_nothing(make, report):
    """A tenth of the base's utility 0.6 is 0.06. Gradient ascent at 1e-4 destroys the model with one of two seeds, and
    has the best forget quality of all."""
    runs = [
        unlearned(make, "full", None, 1e-20, 0.6),
        unlearned(make, "grad_diff", "1e-5", 0.01, 0.59),
        *(unlearned(make, "grad_ascent", "1e-4", 0.9, utility, seed) for seed, utility in enumerate((0.059, 0.061))),
        unlearned(make, "grad_ascent", "1e-3", 0.078, 0.0),
    ]
    found, page, _ = report(runs)
    assert found["verdict"][0].startswith("No arm reaches a forget quality above 0.05")
    assert found["verdict"][1] == (
        "On the Pareto front of forget quality and model utility: grad_diff (learning rate 1e-5)."
    )
    assert found["verdict"][2] == (
        "Collapsed, with a model utility below a tenth of the base's, so that the forget quality says nothing: "
        "grad_ascent (learning rate 1e-4; 1 of 2 seeds), grad_ascent (learning rate 1e-3; 1 of 1 seed)."
    )
    assert [point["collapsed"] for point in found["tofu"]["points"]] == [0, 1, 1]
    assert [run["collapsed"] for run in found["runs"]] == [False, False, True, False, True]
    assert "<small>1 collapsed</small>" in page and "<small>collapsed</small>" in page
    assert "A cross is a setting at which a seed diverged or collapsed" in page


@pytest.mark.parametrize(("quality", "told"), [(0.0286, False), (0.0049, True)])
def test_a_forget_quality_that_the_base_has_too_tells_little(make, report, quality, told):
    """As with the 40 rows of forget01: the full model of a real base has 0.03."""
    runs = [
        unlearned(make, "full", None, quality, 0.6, probability=0.832),
        unlearned(make, "retain", None, 1.0, 0.6, probability=0.143),
        unlearned(make, "ceu", "1e-5", 0.1, 0.59),
        unlearned(make, "npo", "1e-5", 0.06, 0.59, probability=0.394),
    ]
    found, page, terminal = report(runs)
    said = [sentence for sentence in found["verdict"] if "already" in sentence]
    expected = (
        "The model before unlearning has a forget quality of 0.0286 already, so that it hardly tells models apart, as "
        "where few answers are to be forgotten; the forget probability says more: 0.832 before unlearning and 0.143 of "
        "the retain model."
    )
    assert said == ([] if told else [expected])
    assert [group["forget_probability"] for group in found["groups"]] == [0.832, 0.143, 0.1, 0.394]
    assert "forget probability" in page and "0.394" in terminal


def test_a_method_may_be_named_full_and_a_diverged_seed_reaches_nothing(make, report):
    runs = [
        unlearned(make, "full", None, 1e-20, 0.6),
        unlearned(make, "full-ceu", "1e-5", 0.2, 0.58),
        unlearned(make, "npo", "1e-5", 0.3, 0.59),
        make("npo", {"learning_rate": "1e-5"}, 1, end="diverged", command="ceu-rl unlearn"),
    ]
    found, _, _ = report(runs)
    assert found["tofu"]["base"]["model_utility"] == 0.6
    assert found["verdict"][0] == (
        "full-ceu (learning rate 1e-5) reaches a forget quality above 0.05 at a model utility within 10 % of the "
        "base's 0.6; npo at no setting tried (with 1 to 2 seeds, all of which count)."
    )
    assert [(p["arm"], p["front"], p["diverged"]) for p in found["tofu"]["points"]] == [
        ("full-ceu", True, 0),
        ("npo", False, 1),
    ]


def test_different_retain_models_are_on_no_one_plane(make, report):
    runs = [unlearned(make, "full", None, 1e-20, 0.6)]
    for arm, retain in (("npo", "a/tofu_eval.json"), ("ceu", "b/tofu_eval.json")):
        runs.append(unlearned(make, arm, "1e-5", 0.3, 0.59))
        path = runs[-1].folder / "tofu_eval.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "retain": retain}))
    found, _, _ = report(runs)
    assert found["verdict"][0] == (
        "The runs were held against different retain models (a/tofu_eval.json and b/tofu_eval.json), so that their "
        "forget qualities do not compare; --retain holds all of them against one."
    )
    assert not any("Pareto" in sentence or "reaches" in sentence for sentence in found["verdict"])


def test_the_base_that_an_evaluation_recorded_is_enough(make):
    runs = [unlearned(make, "grad_ascent", each, 0.9, utility) for each, utility in (("1e-5", 0.5), ("1e-4", 0.05))]
    for run in runs:
        path = run.folder / "tofu_eval.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base": {"model_utility": 0.6}}))
    found = summarize([Run(run.arm, run.setting, run.seed, run.folder) for run in runs], COMMAND)
    assert found["tofu"]["base"] == {"model_utility": 0.6}
    assert [point["collapsed"] for point in found["tofu"]["points"]] == [0, 1]


def test_a_comparison_in_which_every_model_collapsed(make, report):
    runs = [unlearned(make, "full", None, 1e-20, 0.6), unlearned(make, "grad_ascent", "1e-3", 0.078, 0.0)]
    found, page, _ = report(runs)
    assert found["verdict"][0].startswith("No arm reaches") and found["verdict"][1].startswith("Collapsed")
    assert "</html>" in page


def test_tofu_without_and_with_the_models_around_it(make, tmp_path):
    run = unlearned(make, "ceu", "1e-5", 0.2, 0.5)
    assert verdict(summarize([run], COMMAND))[0].startswith("The model utility before unlearning is not known")

    for name, utility in (("base", 0.55), ("retain", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tofu_eval.json").write_text(json.dumps({"summary": {"model_utility": utility}}))
    (run.folder / "result.json").write_text(json.dumps({"settings": {"model_name_or_path": str(tmp_path / "base")}}))
    evaluation = json.loads((run.folder / "tofu_eval.json").read_text())
    evaluation["retain"] = str(tmp_path / "retain" / "tofu_eval.json")
    (run.folder / "tofu_eval.json").write_text(json.dumps(evaluation))
    found = summarize([Run(run.arm, run.setting, run.seed, run.folder)], COMMAND)
    assert found["tofu"]["base"] == {"model_utility": 0.55}
    assert found["tofu"]["retain"] == {"model_utility": 0.6, "forget_quality": 1.0}
    assert verdict(found)[0].startswith("ceu (learning rate 1e-5) reaches a forget quality above 0.05")


def test_where_the_runs_come_from_is_said_once_and_differences_are_said(make, report):
    runs = [
        make("stock", log=scored(1.0)),
        make("ceu", log=scored(1.0)),
        make("paper", log=scored(1.0), commit="1" * 40),
    ]
    found, page, _ = report(runs)
    assert [entry["runs"] for entry in found["provenance"]] == [2, 1]
    assert [run["provenance"] for run in found["runs"]] == [0, 0, 1]
    assert "The runs differ in where they come from: commit." in page
    assert COMMAND in page and "ceu-rl dpo --config paper.yaml" in page


def test_the_record_of_a_study_is_small(make, report, tmp_path):
    scores = {f"eval_{name}": 0.123456789 for name in ("greedy_accuracy", "sampled_accuracy", "kl", "logps/chosen")}
    log = [{"step": step, **scores} for step in range(0, 301, 50)]
    rates = {"learning_rate": "1e-5"}
    report([make(arm, rates, seed, log, metrics=scores) for arm in ("stock", "ceu") for seed in range(3)])
    assert (tmp_path / "report" / "report.json").stat().st_size < 6 * 2500 + 3000


def test_first_to_last(make):
    norms = {"calm": [0.5, 0.7, 0.6], "wild": [0.5, 40.0, 3.0]}
    runs = [
        make(
            arm,
            log=[*({"step": i, "grad_norm": v} for i, v in enumerate(values, 1)), *scored(1.0, 0.25)],
            end="failed" if arm == "wild" else "finished",
            wall_time_s=65.7,
        )
        for arm, values in norms.items()
    ]
    rows = table_rows([*runs, make("missing", end="missing")])
    assert ["", "calm", "wild", "missing"] in rows
    assert ["greedy accuracy", "1.000 → 0.250", "1.000 → 0.250", "none"] in rows
    assert ["max gradient norm", "0.70", "40.00", "none"] in rows
    assert ["time (s)", "66", "failed", "missing"] in rows


def test_numbers_for_people():
    assert [rate(value) for value in (3e-5, 1e-4, 2.5e-6)] == ["3e-5", "1e-4", "2.5e-6"]
    values = (None, 0, 0.996, 33.333, 1234.5, 1e-20, -0.4435184)
    assert [number(value) for value in values] == ["none", "0", "0.996", "33.3", "1234", "1e-20", "-0.444"]


FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with chromedriver (Debian packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def curves(end, seed):
    """A log of 60 steps towards a final score, with all that a run can log."""
    noise = np.random.default_rng(seed)
    return [
        {
            "step": step,
            "loss": 0.7 - 0.3 * step / 60,
            "grad_norm": float(np.exp(noise.normal())),
            "entropy": 0.1,
            **(
                {
                    "eval_greedy_accuracy": 1 + (end - 1) * step / 60,
                    "eval_sampled_accuracy": 0.6 * (1 + (end - 1) * step / 60),
                    "eval_logps/chosen": -0.4 - (1 - end) * step / 3,
                    "eval_logps/rejected": -6.0 - step / 6,
                    "eval_kl": (1 - end) * step / 60,
                }
                if step % 10 == 0
                else {}
            ),
        }
        for step in range(61)
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a grid and that of TOFU, with the number of their figures."""
    falls, runs = {"stock": 1.0, "ceu": 0.1, "a-recipe-with-quite-a-long-name": 0.4}, []
    make = maker(tmp_path_factory.mktemp("grid"))
    for arm, fall in falls.items():
        for place, each in enumerate(("1e-6", "1e-5", "1e-4")):
            for seed in range(2):
                end = "diverged" if arm == "stock" and place == 2 and seed else "finished"
                runs.append(make(arm, {"learning_rate": each}, seed, curves(1 - fall * place / 2, seed), end=end))
    runs.append(make("ceu", {"learning_rate": "1e-6"}, 2, end="failed"))
    make = maker(tmp_path_factory.mktemp("tofu"))
    values = {"grad_diff": ((1e-9, 0.59), (0.01, 0.2)), "paper": ((0.06, 0.55), (0.5, 0.4))}
    plane = [unlearned(make, "full", None, 1e-20, 0.6)]
    for arm, each in values.items():
        plane += [unlearned(make, arm, lr, *at) for lr, at in zip(("1e-5", "1e-4"), each, strict=True)]
    plane.append(unlearned(make, "grad_ascent", "1e-4", 0.078, 0.01))
    made = {}
    frontier = frontier_grid(maker(tmp_path_factory.mktemp("grpo")))
    for name, members, count in (
        ("grid", runs, 2 + 3 * 8),
        ("tofu", plane, 1 + 2 * 2),
        ("grpo", frontier, 1 + 2 + 2 * 15),
    ):
        folder = tmp_path_factory.mktemp(f"report-{name}")
        write_report(folder, members, Console(file=io.StringIO()), COMMAND)
        made[name] = (folder / "report.html").as_uri(), count
    return made


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["grid", "tofu", "grpo"])
def test_the_page_in_a_browser(browser, pages, name, width):
    address, count = pages[name]
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    browser.get(address)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    figures = browser.find_elements("css selector", "figure.plot svg")
    assert len(figures) == count
    for figure in figures:
        assert figure.size["width"] >= 200 and figure.size["height"] >= 120
        assert figure.get_attribute("aria-label")
        picture = imread(io.BytesIO(base64.b64decode(figure.screenshot_as_base64)))
        ink = (picture[..., :3].min(axis=-1) < 0.6).mean()
        assert picture[..., :3].std() > 0.02 and ink > 0.005, f"blank: {figure.get_attribute('aria-label')}"
    assert browser.execute_script(TEXT_OUTSIDE) == []
    assert browser.execute_script(TEXT_OVER_TEXT) == []
    # The verdict is what is read first
    assert browser.find_element("css selector", ".verdict strong").location["y"] < 300


def column(browser, place):
    rows = browser.find_elements("css selector", "table.sortable tbody:not(.beside) tr")
    return [row.find_elements("css selector", "th, td")[place].text.split("\n")[0] for row in rows]


def test_the_table_sorts_by_keyboard(browser, pages):
    from selenium.webdriver.common.keys import Keys

    browser.get(pages["grid"][0])
    heads = browser.find_elements("css selector", "table.sortable thead th")
    score = next(place for place, head in enumerate(heads) if head.text.startswith("final greedy"))
    button, before = heads[score].find_element("css selector", "button"), column(browser, score)
    for said, order in (("ascending", False), ("descending", True)):
        button.send_keys(Keys.ENTER)
        assert heads[score].get_attribute("aria-sort") == said
        found = [float(text) for text in column(browser, score) if text != "—"]
        assert found == sorted(found, reverse=order) and len(set(found)) > 2
    button.send_keys(Keys.ENTER)
    assert heads[score].get_attribute("aria-sort") is None and column(browser, score) == before
    heads[0].find_element("css selector", "button").send_keys(Keys.ENTER)
    assert column(browser, 0) == sorted(column(browser, 0), key=lambda text: text.split()[-1])
    heads[1].find_element("css selector", "button").send_keys(Keys.ENTER)
    rates = [float(text) for text in column(browser, 1)]
    assert rates == sorted(rates)


def test_the_seeds_of_a_row_lead_to_its_runs(browser, pages):
    from selenium.webdriver.common.keys import Keys

    browser.get(pages["grid"][0])
    assert not browser.find_elements("css selector", "details[id^=runs][open]")
    rows = browser.find_elements("css selector", "table.sortable tbody tr")
    for row in rows[0], rows[-1]:
        arm, rate, seeds = (row.find_elements("css selector", "th, td")[place].text for place in range(3))
        link = row.find_element("css selector", "a")
        link.send_keys(Keys.ENTER)
        found = browser.find_element(
            "css selector", link.get_attribute("href")[link.get_attribute("href").index("#") :]
        )
        assert found.get_attribute("open") is not None
        assert found.find_element("css selector", "summary").text == f"{arm.split()[-1]}, learning rate {rate}"
        statuses = [each.text for each in found.find_elements("css selector", "tbody td.words")]
        finished, _, others = seeds.partition(", ")
        assert statuses.count("finished") == int(finished) and len(statuses) == int(finished) + bool(others)


CONTRAST = """
const channel = value => { value /= 255; return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
const light = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
};
const behind = element => {
  const colour = getComputedStyle(element).backgroundColor;
  return colour !== "rgba(0, 0, 0, 0)" || !element.parentElement ? colour : behind(element.parentElement);
};
const low = [], written = "h1, h2, h3, p, li, td, th, small, summary, dt, dd, pre, a:not(.skip), strong";
for (const element of document.querySelectorAll(written)) {
  const [one, other] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
  if ((one + 0.05) / (other + 0.05) < 4.5) low.push(element.tagName + ": " + element.textContent.slice(0, 40));
}
return low;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_stands_out(browser, pages, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(pages["grid"][0])
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert browser.execute_script(CONTRAST) == []
    for figure in browser.find_elements("css selector", "figure.plot svg")[:2]:
        picture = imread(io.BytesIO(base64.b64decode(figure.screenshot_as_base64)))
        assert np.median(picture[..., :3]) > 0.95  # a figure stays on white
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


TEXT_OUTSIDE = """
const outside = [];
for (const svg of document.querySelectorAll('figure.plot svg')) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const at = text.getBoundingClientRect();
    if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1)
      outside.push(svg.getAttribute('aria-label') + ': ' + text.textContent);
  }
}
return outside;
"""

# Of the labels of an axis and the titles; what is written next to points may be close
TEXT_OVER_TEXT = """
const over = [];
for (const svg of document.querySelectorAll('figure.plot svg')) {
  const texts = [...svg.querySelectorAll('[id*="axis_"] text')].map(text => [text, text.getBoundingClientRect()]);
  texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 3) over.push([svg.getAttribute('aria-label'), one.textContent, other.textContent]);
  }));
}
return over;
"""
