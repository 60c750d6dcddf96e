"""The report: what its sentences carry, its table, its JSON, and the page in a real browser."""

import functools
import io
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from ceu_rl.stability import figures
from ceu_rl.stability.report import summarize, write_report
from ceu_rl.stability.runs import Run
from ceu_rl.stability.table import Table

from .made_runs import make_run, pair, question, scored

COMMAND = "ceu-rl compare stock.yaml ceu.yaml --learning_rate 1e-6 1e-5 1e-4"


@pytest.fixture
def make(tmp_path):
    return functools.partial(make_run, tmp_path / "runs")


def verdict(runs):
    return summarize(Table(runs), COMMAND)["verdict"]


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
    runs = []
    for arm, by_rate in ends.items():
        for each, scores in by_rate.items():
            for seed, score in enumerate(scores):
                log, end = (scored(1.0), "diverged") if math.isnan(score) else (scored(1.0, score), "finished")
                runs.append(make(arm, {"learning_rate": each}, seed, log, end))
    return runs


def test_at_which_rates_a_score_is_kept(make, report):
    """95 % of 1.0 is 0.95. ceu keeps it up to 1e-5 with every seed; stock keeps it at 1e-6, and at 1e-5 one seed keeps
    it and one does not, which is no answer; a seed that diverged has lost it."""
    ends = {
        "stock": {1e-6: [0.99, 0.96], 1e-5: [0.97, 0.60], 1e-4: [0.99, math.nan]},
        "ceu": {1e-6: [0.99, 0.99], 1e-5: [0.98, 0.951], 1e-4: [0.94, 0.93]},
        "lost": {1e-6: [0.0, 0.0], 1e-5: [0.0, 0.0]},
    }
    found, page, terminal = report(grid(make, ends))
    kept = ("greedy accuracy: stock at 1e-6 (undecided at 1e-5);", "; ceu at 1e-6, 1e-5;", "; lost at none.")
    for text in (found["verdict"][0], " ".join(terminal.split()), page.replace("\u2060", "")):
        assert all(part in text for part in kept)
    assert "stock: 1 of 6 runs diverged." in found["verdict"]
    kept = {(g["arm"], g["rate"]): g["scores"]["greedy accuracy"]["kept"] for g in found["groups"]}
    assert [kept["stock", each] for each in (1e-6, 1e-5, 1e-4)] == [True, None, False]
    assert [kept["ceu", each] for each in (1e-6, 1e-5, 1e-4)] == [True, True, False]
    best = found["comparisons"][0]
    assert best["settings"] == [{"learning_rate": 1e-6}, {"learning_rate": 1e-6}] and best["seeds"] == 2
    assert (best["difference"], best["interval"]) == (pytest.approx(0.015), pytest.approx([0.0, 0.03]))


def test_a_difference_is_told_where_a_paired_interval_carries_it(make):
    """Differences 0.2 and 0.4: their mean is 0.3, and the means of resamples go from 0.2 to 0.4. With -0.1 and 0.4 they
    go from below 0 to above."""
    ends = {"stock": [0.5, 0.6], "ceu": [0.7, 1.0], "other": [0.4, 1.0]}
    runs = [make(arm, {}, seed, scored(0.9, end)) for arm, values in ends.items() for seed, end in enumerate(values)]
    (told,) = verdict(runs)
    assert told.startswith("Greedy accuracy, stock 0.55: ")
    assert "ceu 0.85 is higher (by 0.3, 95 % interval over 2 seeds 0.2 to 0.4)" in told
    assert "other 0.7 is not told apart (by 0.15, 95 % interval over 2 seeds -0.1 to 0.4)" in told
    # One seed without rows carries no verdict: two single numbers differ by noise too
    (told,) = verdict([runs[0], runs[2]])
    assert "ceu 0.7 has no interval" in told and "higher" not in told


def pairs(better):
    """50 held-out pairs before and after; `better` nats are added to each margin."""
    at = {0: [0.0] * 50, 100: [(row - 25) / 2 + better * (1 + row / 500) for row in range(50)]}
    return [pair(step, row, margin) for step, margins in at.items() for row, margin in enumerate(margins)]


def test_held_out_pairs_give_one_seed_an_interval_over_rows(make, report):
    runs = [make(arm, held=pairs(better)) for arm, better in (("stock", 0.0), ("ceu", 8.0))]
    found, page, _ = report(runs)
    text = " ".join(found["verdict"])
    assert "Preference accuracy, stock 0.49: ceu 0.82 is higher (by 0.33, 95 % interval over 1 seed and 50 rows" in text
    assert re.search(r"DPO loss, stock [\d.]+: ceu [\d.]+ is lower", text)
    columns = found["runs"][1]["held_out"]
    assert columns["step"] == 100 and columns["row"][7] == "eval:7" and len(columns["chosen"]) == 50
    assert "preference accuracy (n = 50)" in page and "log-probability of chosen, nats per token" in page
    assert found["runs"][1]["measures"]["displacement"] == pytest.approx(0.814, abs=1e-3)  # 8.14 nats of 10 tokens


def test_while_runs_go_on(make, report):
    """A running arm was said not to have started, and the title was that there is no comparison."""
    runs = [
        make("stock", held=[question(step, row, 1) for step in (0, 100) for row in range(3)]),
        make("ceu", log=[*scored(0.9), {"step": 42, "loss": 0.5}], end="running"),
        Run("paper", {}, 0, make("x").folder.with_name("no"), {"method": "dpo", "settings": {"ceu_coef": 0.5}}),
    ]
    found, page, terminal = report(runs)
    first = "1 of 3 runs finished; ceu is running: It is at step 42 of 100."
    assert found["verdict"][0] == first and first in " ".join(terminal.split())
    assert [run["status"] for run in found["runs"]] == ["finished", "running", "waiting"]
    assert "No comparison" not in page and "not started" not in page and "2 not done at " in page
    assert "1 running" in terminal and "greedy accuracy (n = 3)" in page  # of 3 questions
    assert "paper: ceu_coef 0.5" in terminal  # what it will be


def test_each_arm_is_explained(make, report):
    runs = [
        make("stock", {"learning_rate": 1e-5}, log=scored(1.0, 0.9)),
        make("ceu", {"learning_rate": 1e-5}, log=scored(1.0, 0.9), settings={"beta": 0.5, "loss_type": ["ipo"]}),
    ]
    found, page, terminal = report(runs)
    assert found["arms"][1]["differs"] == {"ceu_coef": 1, "beta": 0.5, "loss_type": ["ipo"]}
    lines = ["stock: dpo, recipes/stock.yaml", 'ceu: ceu_coef 1, beta 0.5, loss_type ["ipo"]']
    assert all(line in " ".join(terminal.split()) for line in lines)
    assert all(line.replace('"', "&#34;") in page for line in lines)


def test_measures_of_a_log_with_values_that_are_not_finite(make, report):
    log = [
        *scored(1.0, 0.4, 0.3),
        *({"step": step, "loss": 0.5, "grad_norm": 1.0} for step in range(1, 10)),
        {"step": 10, "loss": math.nan, "grad_norm": math.inf},
        {"step": 11, "loss": 0.5, "grad_norm": 30.0},
    ]
    run = make("stock", log=log)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "lo')  # what a kill leaves
    found, _, _ = report([run])
    # The largest fall from the best so far is from 1.0 to 0.3
    assert found["runs"][0]["measures"] == {"grad_norm_largest": 30, "drawdown": 0.7}
    assert found["runs"][0]["curves"] == {"step": [0, 50, 100], "eval_greedy_accuracy": [1.0, 0.4, 0.3]}


def test_failed_and_interrupted_runs_are_left_out_and_named(make, report):
    runs = grid(make, {"stock": {1e-6: [1.0]}, "ceu": {1e-6: [1.0]}})
    runs += [
        make("ceu", {"learning_rate": 1e-6}, 1, [{"step": 7, "loss": 0.5, "grad_norm": 99.0}], end="interrupted"),
        make("ceu", {"learning_rate": 1e-6}, 2, end="failed"),
        make("stock", {"learning_rate": 1e-6}, 3, log=[{"step": 1, "loss": 0.5}]),
    ]
    found, page, terminal = report(runs)
    for status, arm in (("failed", "ceu"), ("interrupted", "ceu"), ("finished without a greedy accuracy", "stock")):
        assert any(each.startswith(f"{arm}: 1 of ") and each.endswith(f" runs {status}.") for each in found["verdict"])
    assert all(group["measures"].get("grad_norm_largest") != 99.0 for group in found["groups"])
    assert "Its log ends at step 7" in page and "it met a non-finite loss" in page and "last &lt;line&gt;" in page
    assert "1 failed" in terminal and "1 not done at " in page


@pytest.mark.parametrize(
    ("log", "end", "words"),
    [
        ([], "finished", "No run logged an evaluation"),
        ([], "waiting", "0 of 1 runs finished"),
        ([{"step": 1, "loss": math.nan}], "failed", "No run has finished"),
        ([{"step": 50, "eval_greedy_accuracy": 0.5}], "finished", "No difference between arms"),
        (scored(-2.0, -1.0, key="eval_reward"), "finished", "No difference between arms"),
    ],
)
def test_little_to_report(make, report, log, end, words):
    assert report([])[0]["verdict"] == ["No run has finished, so there is nothing to compare."]
    found, page, terminal = report([make("stock", log=log, end=end)])
    assert found["verdict"][0].startswith(words) and words in " ".join(terminal.split())
    assert "</html>" in page


def test_names_are_escaped_and_nothing_is_loaded(make, report):
    setting = {"learning_rate": 1e-5, "template": r"\d {question} \g<1> x"}
    runs = [make(arm, setting, log=scored(1.0, 0.5, loss=0.1)) for arm in ("stock", 'a<b>&"c$x_1$[red]')]
    _, page, terminal = report(runs)
    assert "[red]" in terminal and r"\d {question}" in page
    assert "<script" not in page
    assert "a<b>" not in page and "a&lt;b&gt;&amp;" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script |<link""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {ref for ref in re.findall(r'(?:href="#|url\(#)([^")]+)', page)} <= set(ids)


def test_where_the_runs_come_from_is_said_once_and_differences_are_said(make, report):
    runs = [make("stock", log=scored(1.0)), make("ceu", log=scored(1.0)), make("x", log=scored(1.0), commit="1" * 40)]
    found, page, _ = report(runs)
    assert [entry["runs"] for entry in found["provenance"]] == [[0, 1], [2]]
    assert "The runs differ in commit" in page
    assert COMMAND in page


def test_pass_at_k_and_the_divergence_of_grpo(make, report):
    runs = []
    for seed, reward in enumerate((0.80, 0.82)):
        ends = [(0, 0.5, 0.0), (100, reward, 0.2)]
        log = [{"step": s, "eval_sampled_accuracy": v, "eval_kl": kl, "eval_pass@16": 0.9} for s, v, kl in ends]
        runs.append(make("stock", {"learning_rate": 1e-4}, seed, log, method="grpo"))
    found, page, terminal = report(runs)
    assert found["groups"][0]["measures"]["kl"] == pytest.approx(0.2)
    sampled, tries = (found["groups"][0]["scores"][name] for name in found["scores"])
    assert sampled["mean"] == pytest.approx(0.81) and tries["kept"]  # 0.9 of 0.9
    assert "pass@16" in terminal and "pass@16</" in page


# TOFU


def unlearned(make, arm, each, quality, utility, seed=0, start="nowhere"):
    log = [{"step": 1, "forget_loss": 2.0, "retain_loss": 1.0}]
    settings = {"model_name_or_path": str(start)}
    run = make(arm, {"learning_rate": each}, seed, log, method="unlearn", settings=settings)
    summary = {"forget_quality": quality, "model_utility": utility, "forget_probability": 0.1, "ks_distance": 0.3}
    (run.folder / "tofu_eval.json").write_text(json.dumps({"summary": summary, "items": {}}))
    return run


def scored_model(folder, utility, quality):
    folder.mkdir()
    summary = {"model_utility": utility, "forget_quality": quality}
    (folder / "tofu_eval.json").write_text(json.dumps({"summary": summary}))
    return folder


def test_tofu_on_the_plane(make, report, tmp_path):
    """90 % of the base's utility 0.6 is 0.54: ceu at 1e-4 forgets but loses it, and at 1e-5 reaches both."""
    start = scored_model(tmp_path / "full", 0.6, 1e-20)
    at = {"grad_diff": {1e-5: (1e-9, 0.59), 1e-4: (0.01, 0.2)}, "ceu": {1e-5: (0.06, 0.55), 1e-4: (0.5, 0.4)}}
    runs = [
        *(unlearned(make, arm, each, *end, start=start) for arm, rates in at.items() for each, end in rates.items()),
        make("npo", {"learning_rate": 1e-5}, method="unlearn"),
    ]
    found, page, terminal = report(runs)
    (sentence,) = found["verdict"]
    assert sentence.endswith(": ceu (learning rate 1e-5).")
    assert found["tofu"] == {"model_utility": 0.6, "forget_quality": 1e-20}
    assert 'class="plane"><h3>forget quality</h3>' in page
    assert "forget_loss" in page and "KS distance" in terminal and "KS distance" in page


def test_what_is_reached_is_reached_on_every_seed(make, tmp_path):
    """A seed that falls short or diverges is enough; gradient ascent destroys the model and has the best forget quality
    of all."""
    start = scored_model(tmp_path / "full", 0.6, 0.0286)
    runs = [
        *(unlearned(make, "ceu", 1e-5, quality, 0.58, seed, start) for seed, quality in enumerate((0.2, 0.051))),
        *(unlearned(make, "npo", 1e-5, quality, 0.58, seed) for seed, quality in enumerate((0.2, 0.049))),
        unlearned(make, "wga", 1e-5, 0.3, 0.59),
        make("wga", {"learning_rate": 1e-5}, 1, end="diverged", method="unlearn"),
        *(unlearned(make, "grad_ascent", 1e-4, 0.9, utility, seed) for seed, utility in enumerate((0.59, 0.01))),
    ]
    found = summarize(Table(runs), COMMAND)
    reached = {"ceu": True, "npo": False, "wga": False, "grad_ascent": False}
    assert {group["arm"]: group["measures"]["reached"] for group in found["groups"]} == reached
    text = " ".join(found["verdict"])
    assert "has a forget quality of 0.0286 already" in text and "KS distance" in text


def test_without_the_start_nothing_is_reached(make):
    assert verdict([unlearned(make, "ceu", 1e-5, 0.2, 0.5)])[0].startswith("The model utility before unlearning is not")


def test_arms_stand_beside_each_other_at_rates_in_order(make, monkeypatch):
    """Also where nothing but a run that diverged is at a rate; its cross stands with its arm."""
    monkeypatch.setattr(figures, "_svg", lambda figure: figure)
    ends = {"stock": {1e-6: [0.9], 1e-5: [math.nan], 1e-4: [0.8]}, "ceu": {1e-6: [0.9], 1e-4: [0.8]}}
    found = figures.finals(Table(grid(make, ends)), figures.looks(["stock", "ceu"]))
    (axes,) = found[0]["svg"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-6", "1e-5", "1e-4"]
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert list(cross.get_xdata()) == [1 - figures.WIDTH / 2]
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 3]
    at = [set(line.get_xdata()[np.isfinite(line.get_ydata())]) for line in drawn]
    assert at == [{at + shift for at in (0, 2)} for shift in (-figures.WIDTH / 2, figures.WIDTH / 2)]


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with chromedriver (Debian packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile):
        options.add_argument(flag)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def curves(end, seed):
    """A log of 60 steps towards a final score, with all that a run can log."""
    noise = np.random.default_rng(seed)
    log = []
    for step in range(61):
        share = 1 + (end - 1) * step / 60
        log.append({"step": step, "loss": 0.7, "grad_norm": float(np.exp(noise.normal()))})
        if step % 10 == 0:
            log[-1] |= {"eval_greedy_accuracy": share, "eval_sampled_accuracy": 0.6 * share, "eval_kl": 1 - share}
            log[-1] |= {"eval_entropy": 0.1}
    return log


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a grid that is under way, and of TOFU, with the number of their figures."""
    make, runs = functools.partial(make_run, tmp_path_factory.mktemp("grid")), []
    for arm, fall in {"stock": 1.0, "ceu": 0.1, "a-recipe-with-quite-a-long-name": 0.4}.items():
        for (place, each), seed in itertools.product(enumerate((1e-6, 1e-5, 1e-4)), range(2)):
            end = "diverged" if (arm, place, seed) == ("stock", 2, 1) else "finished"
            log = curves(1 - fall * place / 2, seed)
            runs.append(make(arm, {"learning_rate": each}, seed, log, end, held=pairs(fall)))
    runs.append(make("ceu", {"learning_rate": 1e-6}, 2, end="failed"))
    runs.append(make("ceu", {"learning_rate": 1e-5}, 2, log=curves(0.9, 0)[:31], end="running"))
    make = functools.partial(make_run, tmp_path_factory.mktemp("tofu"))
    values = {"grad_diff": (1e-9, 0.59), "paper": (0.5, 0.4), "grad_ascent": (0.078, 0.01)}
    start = scored_model(tmp_path_factory.mktemp("start") / "full", 0.6, 1e-20)
    tofu = [unlearned(make, arm, 1e-4, *at, start=start) for arm, at in values.items()]
    made = {}
    for name, members, count in (("grid", runs, 14), ("tofu", tofu, 3)):
        folder = tmp_path_factory.mktemp(f"report-{name}")
        write_report(folder, members, Console(file=io.StringIO()), COMMAND)
        made[name] = (folder / "report.html").as_uri(), count
    return made


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["grid", "tofu"])
def test_the_page_in_a_browser(browser, pages, name, width):
    address, count = pages[name]
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    browser.get(address)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    figures = browser.find_elements("css selector", "figure [role=img][aria-label] > svg")
    assert len(figures) == count
    for figure in figures:
        assert figure.size["width"] >= 200 and figure.size["height"] >= 120
    assert browser.execute_script(TEXT_OUTSIDE) == []
    if width == 1400:  # the first table is not cut
        cut = "const box = document.querySelector('.scroll'); return box.scrollWidth - box.clientWidth"
        assert browser.execute_script(cut) <= 0
    # The verdict is what is read first
    assert browser.find_element("css selector", ".verdict strong").location["y"] < 300


TEXT_OUTSIDE = """
const outside = [];
for (const svg of document.querySelectorAll('figure svg')) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const at = text.getBoundingClientRect();
    if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1)
      outside.push(svg.id + ': ' + text.textContent);
  }
}
return outside;
"""
