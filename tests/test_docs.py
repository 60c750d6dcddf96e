"""The documents: every link and name resolves, the code of the README runs, and the figures are those of the files."""

import hashlib
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from ceu_rl.tofu.metrics import forget_quality

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_and_paths_resolve(path):
    text = path.read_text()
    for target, anchor, title in re.findall(r'\]\((?!https)([^)#\s]*)(?:#([^)\s]+))?(?: "([^"]*)")?\)', text):
        place = path.parent / target if target else path
        assert place.exists(), f"{name(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{name(path)} links to {target}#{anchor}"
        if title.startswith("test_"):
            assert re.search(rf"^def {title}\(", place.read_text(), flags=re.M), f"{name(path)} cites {title}"
    for target in re.findall(r"`((?:tests|docs|recipes|ceu_rl)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), f"{name(path)} mentions {target}"
    for recipe in re.findall(r"recipes/(?!\w+/maze/)[\w./-]+\.yaml", text):  # those of the maze are in the history
        assert (ROOT / recipe).exists(), f"{name(path)} mentions {recipe}"


def test_every_page_is_on_the_site():
    """`make docs` fails at a page that the navigation leaves out, and at a broken link."""
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    assert set(re.findall(r"[\w/.-]+\.md", nav)) == pages


def test_statements_of_the_method_cite_their_tests():
    text = (ROOT / "docs" / "method.md").read_text()
    links = re.findall(r'\]\(\.\./tests/test_\w+\.py(?: "(test_\w+)")?\)', text)
    assert all(links) and len(set(links)) >= 20


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_names_resolve(path):
    for dotted in set(re.findall(r"`((?:ceu_rl|trl)(?:\.\w+)+)`", path.read_text())):
        module, _, attribute = dotted.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), attribute) or importlib.import_module(dotted)
        except ModuleNotFoundError:
            found = None
        assert found, f"{name(path)} mentions {dotted}"


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


def test_the_readme_shows_stock_beside_ce_u():
    """In stock's place stands one import and one class name a line; tests/test_docs_commands.py runs the code."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    stock = [line.split("# ")[1] for line in code.splitlines() if "# " in line]
    assert stock == ["from trl import DPOConfig, DPOTrainer", 'args = DPOConfig(output_dir="runs/mine")']


def load(path):
    """A Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    """What `make results` writes, by path, and the module that writes it."""
    writer = load(RESULTS / "write.py")
    return writer, writer.written()


def shown(svg):
    """What an SVG says in words and numbers: the paths of matplotlib differ from one version to another."""
    return re.findall(r'aria-label="([^"]*)"', svg), re.findall(r">([^<>]+)</t", svg)


def test_the_results_are_what_make_results_writes(results):
    _, written = results
    for path, text in written.items():
        found = path.read_text()
        same = shown(found) == shown(text) if path.suffix == ".svg" else found == text
        assert same, f"{name(path)} is not what its files give: run make results"
    pages = {path for path in RESULTS.glob("*.md")} | set(RESULTS.rglob("*.svg"))
    assert pages == set(written), "a page or figure that nothing writes"


QUESTIONS = [path for path in sorted(RESULTS.glob("*.md")) if path.name != "README.md"]


@pytest.mark.parametrize("path", QUESTIONS, ids=name)
def test_a_page_of_results_opens_with_its_answer_and_a_figure(path):
    title, answer, figure = path.read_text().split("\n\n")[:3]
    assert title.startswith("# ") and title.endswith("?")
    assert [line[:2] for line in answer.splitlines()] == ["- "] * 3
    assert re.fullmatch(r"!\[.+\]\(.+\.svg\)", figure)


@pytest.mark.parametrize("path", QUESTIONS, ids=name)
def test_no_sentence_repeats_a_number_of_a_table(path):
    """A sentence under the answer may name a row, by its learning rate, and say what is to be seen there."""
    lines = "\n\n".join(path.read_text().split("\n\n")[3:]).splitlines()
    cells = [cell.strip() for line in lines if line.startswith("| ") for cell in line.strip("|").split("|")]
    numbers = {each for cell in cells for each in re.findall(r"(?<![\w.-])-?\d+\.\d{2,}(?:e-\d+)?(?![\w.])", cell)}
    assert len(numbers) > 10
    prose = [line for line in lines if line and not line.startswith(("|", "    ", "!["))]
    for line in prose:
        if line.startswith(("Base:", "greedy")) or "greedy 0" in line or "greedy 1" in line:
            continue  # of the base, which is no row
        repeated = numbers & set(re.findall(r"-?\d+\.\d{2,}(?:e-\d+)?", line))
        assert not repeated, f"{repeated} in: {line}"


def test_the_ranges_of_the_first_screen_are_those_of_the_study(results):
    page, text = results[0].Page("dpo"), " ".join((ROOT / "README.md").read_text().split())
    for task, where in (("addition", "addition"), ("maze", "mazes")):
        ours, stock = (page.reach(f"dpo/{task}", arm, "greedy accuracy") for arm in ("ceu-0.5", "stock"))
        assert f"{ours} against {stock} on {where}" in text
    whole = [page.reach(f"dpo/{task}", "ceu", "greedy accuracy") for task in ("addition", "maze")]
    assert f"the whole weight (1) up to {' and '.join(whole)}" in text


@pytest.mark.parametrize(
    ("file", "count", "digest"),
    [
        ("grpo/addition-longer", 49, "cfe1aa5b96eb87d17cdd8a1f06bc7a56f8e996dccedb1bc9a2617d9aabc81bbb"),
        ("grpo/maze-longer", 26, "97f58628217ae6b2c3018eeeb36dbce7a92eaee4e64152aefa758a52742777eb"),
        ("grpo/variants", 26, "ed08ba54c5cde36d88c13ab6b81e5dddd4929e8ac8b692a891e3c28e8ef417cf"),
        ("unlearning/models", 2, "3cc196ea3866287dd6e9297f8baa50197981b0f73d3f108dedda8bb2aa8cbcb8"),
        ("unlearning/earlier", 10, "f888035699995d2c19fd91790c25c19a105ffaafc12ab7ad336975f75ea53243"),
    ],
)
def test_nothing_was_lost_when_single_results_were_merged(results, file, count, digest):
    """The digest is that of the single files before they were put into one, all their fields by their names."""
    writer, _ = results
    runs = {run.pop("name"): run for run in writer.single_runs(file)}
    assert len(runs) == count
    assert hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest() == digest


def provenances(found):
    """Each part of a result file that says where it comes from."""
    if isinstance(found, dict):
        if "commit" in found:
            yield found
        found = list(found.values())
    if isinstance(found, list):
        for each in found:
            yield from provenances(each)


RAW = sorted(RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", RAW, ids=name)
def test_results_carry_provenance(path):
    found = list(provenances(json.loads(path.read_text())))
    assert found
    for origin in found:
        assert {"commit", "versions", "device"} <= set(origin)
        assert re.fullmatch(r"[0-9a-f]{40}", origin["commit"]), "made from source that was not committed"


def test_each_file_of_results_is_used_by_its_page():
    """`docs/results/x/y.json` is what the page x.md draws from."""
    for path in RAW:
        question = path.relative_to(RESULTS).parts[0]
        page = {"fused": "speed", "grpo-time": "speed", "faults": "speed"}.get(question, question)
        template = (RESULTS / f"{page}.md.jinja").read_text()
        folder = path.relative_to(RESULTS).parent
        used = [str(path.relative_to(RESULTS).with_suffix("")), *(f"{each}/" for each in (folder, folder.parent))]
        assert any(word in template for word in used), f"{name(path)} is on no page"


def test_the_forget_qualities_follow_from_the_truth_ratios(results):
    writer, _ = results
    for file, name, rows in (
        *((each, "retain90", 400) for each in ("models", "models-0", "models-1", "earlier")),
        ("models-smollm2", "retain", 40),
    ):
        runs = {run["name"]: run for run in writer.single_runs(f"unlearning/{file}")}
        retain = runs[name]["forget_truth_ratios"]
        assert len(retain) == rows and len(runs) > 1
        for run in runs.values():
            if "forget_quality" in run["evaluation"]["summary"]:
                quality = forget_quality(run["forget_truth_ratios"], retain)
                assert quality == pytest.approx(run["evaluation"]["summary"]["forget_quality"], rel=1e-2)


@pytest.mark.parametrize("path", sorted((RESULTS / "unlearning").glob("tofu*.json")), ids=name)
def test_the_tofu_study_stands_on_these_models(results, path):
    writer, _ = results
    base = re.search(r"-base(-\d)|(-smollm2)", path.stem)
    file = f"unlearning/models{base[1] or base[2] if base else ''}"
    models = {run["name"]: run["evaluation"]["summary"] for run in writer.single_runs(file)}
    tofu = json.loads(path.read_text())["tofu"]
    for place, model in (("base", "full"), ("retain", "retain" if "smollm2" in path.stem else "retain90")):
        assert tofu[place]["model_utility"] == pytest.approx(models[model]["model_utility"], rel=1e-5)
