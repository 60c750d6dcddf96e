"""The documents: every link and name resolves, the code of the README runs, and the figures are those of the files."""

import importlib
import json
import re
from pathlib import Path

import pytest

from ceu_rl.stability.report import Run, table_rows
from ceu_rl.tofu.metrics import forget_quality

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "docs" / "results"
STUDY = RESULTS / "dpo-addition"


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_and_paths_resolve(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"
    for target, anchor in re.findall(r"\]\((?!https)([^)#]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (path.parent / target if target else path).read_text(), flags=re.M)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{name(path)} links to {target}#{anchor}"
    for target in re.findall(r"`((?:tests|docs|recipes|ceu_rl)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), f"{name(path)} mentions {target}"
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", text):
        assert (ROOT / recipe).exists(), f"{name(path)} mentions {recipe}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_names_resolve(path):
    for dotted in set(re.findall(r"`((?:ceu_rl|trl)(?:\.\w+)+)`", path.read_text())):
        module, _, attribute = dotted.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), attribute) or importlib.import_module(dotted)
        except ModuleNotFoundError:
            found = None
        assert found, f"{name(path)} mentions {dotted}"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), flags=re.M)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


def test_the_code_of_the_readme_runs(tiny_model, tokenizer, preferences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    scope = {"model": str(tmp_path / "model"), "dataset": preferences.select(range(4)), "tokenizer": tokenizer}
    exec(code.replace('"runs/mine")  ', '"runs/mine", use_cpu=True, bf16=False)  '), scope)
    assert scope["trainer"].state.global_step > 0
    # In stock's place stands one import and one class name a line
    stock = [line.split("# ")[1] for line in code.splitlines() if "# " in line]
    assert stock == ["from trl import DPOConfig, DPOTrainer", 'args = DPOConfig(output_dir="runs/mine")']


def test_the_demo_in_the_results_is_that_of_its_files():
    results = (ROOT / "docs" / "results.md").read_text()
    for row in table_rows([Run(arm, {}, 0, STUDY / "demo" / arm) for arm in ("stock", "ceu", "paper")]):
        assert "| " + " | ".join(row) + " |" in results
    readme = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(readme) >= 5 and all(line in results for line in readme)


@pytest.mark.parametrize("path", sorted(STUDY.glob("demo/*/result.json")), ids=name)
def test_results_carry_provenance(path):
    result = json.loads(path.read_text())
    assert {"commit", "versions", "device", "seed", "date", "command"} <= set(result)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), "made from source that was not committed"


def grpo_row(path):
    """A run of the GRPO grids: its result.json, with the series of the reward and of the gradient norm."""
    result = json.loads(path.read_text())
    overrides = result["settings"]["overrides"]
    given = dict(zip(overrides[::2], overrides[1::2], strict=True))
    *task, base, variant, arm = re.match(
        r"(?:(\w+)-)?(base\d*)-(?:([a-z_]+)-)?(stock|paper|c[\d.s]+)-", path.stem
    ).groups()
    seed = str(result["seed"])
    if variant:
        assert result["variant"] == variant
        cells = [*task, variant, arm, given["--learning_rate"], given["--num_iterations"], seed]
    elif path.parent.name == "grpo-maze" or "seed" in path.stem:
        cells = [arm, given["--learning_rate"], given["--num_iterations"], seed]
    else:
        cells = [base, arm, given["--learning_rate"], given["--num_iterations"]]
    metrics = [result["metrics"][f"eval_{name}_accuracy"] for name in ("greedy", "sampled")]
    return "| " + " | ".join([*cells, *(f"{m:.3f}" for m in metrics), f"{max(result['grad_norm']):.2f}"]) + " |"


GRPO_RUNS = sorted(
    path for task in ("addition", "maze", "variants") for path in RESULTS.glob(f"grpo-{task}/*base-*.json")
)


@pytest.mark.parametrize("path", GRPO_RUNS, ids=name)
def test_a_row_of_the_grpo_grids_is_that_of_its_file(path):
    assert grpo_row(path) in (ROOT / "docs" / "results.md").read_text()
    assert re.fullmatch(r"[0-9a-f]{40}", json.loads(path.read_text())["commit"])


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_row_of_the_time_of_grpo_is_that_of_its_file(size):
    found = json.loads((RESULTS / "grpo-time" / f"{size}.json").read_text())
    speed = found["median_tokens_per_s"]
    ratios = [found[f"step_time_{pair}"] for pair in ("ceu_over_stock_vllm", "ceu_over_stock_generate")]
    cells = [found["step_time_vllm_over_generate"], speed["vllm-ceu"], speed["generate-ceu"], *ratios]
    assert " | ".join(map(str, cells)) + " |" in (ROOT / "docs" / "results.md").read_text()


def test_the_rows_of_the_fused_loss_are_those_of_its_files():
    memory, seconds = (
        json.loads((RESULTS / "fused" / f"{kind}-cpu-float32.json").read_text())["rows"] for kind in ("memory", "time")
    )
    text = (ROOT / "docs" / "results.md").read_text()
    peaks = {row["method"]: row["peak_above_start_gib"] for row in memory if row["tokens"] == 1024}
    for row in seconds:
        peak = "" if row["method"] == "products" else peaks[row["method"]]  # the products alone are no loss
        median = row["median_s"]
        assert f"| {row['method']} | {peak} | {median:.3f} | {row['times_fused']} |" in text
    larger = [str(row["peak_above_start_gib"]) for row in memory if row["tokens"] > 1024]
    assert f"{' and '.join(larger)} GiB" in text


TOFU = RESULTS / "tofu"
TOFU_MODELS = ("full", "retain90")


def tofu_model(stem):
    """A model that nothing was unlearned from: its training, and its evaluation without the values of each row."""
    return json.loads((TOFU / f"{stem}.json").read_text())


@pytest.mark.parametrize("stem", TOFU_MODELS)
def test_a_row_of_a_tofu_model_is_that_of_its_file(stem):
    found = tofu_model(stem)
    training, summary = found["training"], found["evaluation"]["summary"]
    quality = f"{summary['forget_quality']:.1e}" if stem == "full" else ""
    pace = training["metrics"]["train_runtime"] / training["steps"]
    values = [f"{summary[key]:.3f}" for key in ("model_utility", "forget_rouge_l_recall", "forget_probability")]
    cells = [stem, quality, *values, f"{pace:.2f}", f"{training['peak_memory_gib']:.2f}"]
    assert "| " + " | ".join(cells) + " |" in (ROOT / "docs" / "results.md").read_text()
    for part in found["training"], found["evaluation"]:
        assert {"commit", "versions", "device", "seed", "date", "command"} <= set(part)
        assert re.fullmatch(r"[0-9a-f]{40}", part["commit"]), "made from source that was not committed"


def test_the_forget_quality_of_the_full_model_follows_from_the_truth_ratios():
    full, retain = (tofu_model(stem)["forget_truth_ratios"] for stem in TOFU_MODELS)
    quality = tofu_model("full")["evaluation"]["summary"]["forget_quality"]
    assert len(full) == len(retain) == 400 and forget_quality(full, retain) == pytest.approx(quality, rel=1e-2)


@pytest.mark.parametrize("path", sorted((TOFU / "earlier").glob("*-*.json")), ids=name)
def test_a_row_of_the_earlier_tofu_bases_is_that_of_its_file(path):
    found = json.loads(path.read_text())
    arm, _, rate = path.stem.partition("-")
    summary = found["evaluation"]["summary"]
    row = f"| {arm} | {rate} | {summary['forget_quality']:.1e} | {summary['model_utility']:.3f} |"
    assert row in (ROOT / "docs" / "results.md").read_text()
    assert all(re.fullmatch(r"[0-9a-f]{40}", found[part]["commit"]) for part in ("training", "evaluation"))
    retain = tofu_model("earlier/retain90")["forget_truth_ratios"]
    quality = forget_quality(found["forget_truth_ratios"], retain)
    assert quality == pytest.approx(summary["forget_quality"], rel=1e-2)


TOFU_STUDIES = sorted((RESULTS / "study").glob("tofu*.json"))


@pytest.mark.parametrize("path", TOFU_STUDIES, ids=name)
def test_the_tofu_study_stands_on_these_models(path):
    tofu = json.loads(path.read_text())["tofu"]
    for place, stem in (("base", "full"), ("retain", "retain90")):
        assert tofu[place]["model_utility"] == pytest.approx(
            tofu_model(stem)["evaluation"]["summary"]["model_utility"], rel=1e-5
        )


def test_the_best_rates_of_the_tofu_study_are_those_of_its_report():
    """Of an arm's rates, the one of the highest forget quality at a utility within 10 % of the full model's."""
    tofu, text = (
        json.loads((RESULTS / "study" / "tofu.json").read_text())["tofu"],
        (ROOT / "docs" / "results.md").read_text(),
    )
    for arm in {point["arm"] for point in tofu["points"]}:
        useful = [
            point
            for point in tofu["points"]
            if point["arm"] == arm and point["model_utility"] >= 0.9 * tofu["base"]["model_utility"]
        ]
        if useful:
            best = max(useful, key=lambda point: point["forget_quality"])
            values = f"{best['forget_quality']:.1e} | {best['model_utility']:.3f}"
            assert f"| {arm} | {best['learning_rate']:g} | {values} |" in text
        else:
            assert f"| {arm} | none | | |" in text


TOFU_COLUMNS = (("model_utility", 3), ("seconds_per_step", 2), ("peak_memory_gib", 2))
TOFU_FOLDER = "../shared/tofu"  # where it lay
STUDY_REPORTS = sorted((RESULTS / "study").glob("*.json"))


def study_rows(report):
    """A row for each arm at each setting, of what `ceu-rl compare` reported."""
    for group in report["groups"]:
        varied = [value for key, value in group["setting"].items() if key != "learning_rate"]
        cells = [group["arm"], f"{group['learning_rate']:g}", *varied]
        if report["tofu"]:
            cells += [f"{group['forget_quality']:.1e}"]
            cells += [f"{group[key]:.{digits}f}" for key, digits in TOFU_COLUMNS]
            yield "| " + " | ".join(cells) + " |"
            continue
        scores = [group["final"][name] for name in report["base"]]
        cells += [f"{s['mean']:.3f} ({s['min']:.3f} to {s['max']:.3f})" if s else "none" for s in scores]
        preferences = any(each["depth"] is not None for each in report["groups"])
        measured = [(group[key], 3) for key in ("displacement", "depth") if preferences]
        measured += [(group["kl"], 3), (group["grad_norm_largest"], 2)]
        cells += ["none" if value is None else f"{value:.{digits}f}" for value, digits in measured]
        yield "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("path", STUDY_REPORTS, ids=name)
def test_the_rows_of_a_study_are_those_of_its_report(path):
    report, text = json.loads(path.read_text()), (ROOT / "docs" / "results.md").read_text()
    for row in study_rows(report):
        assert row in text, row
    for sentence in report["verdict"]:
        assert sentence in " ".join(text.split()), sentence
    assert f"    {report['command']}".replace(TOFU_FOLDER, "FOLDER") in text
    assert all(re.fullmatch(r"[0-9a-f]{40}", origin["commit"]) for origin in report["provenance"])
