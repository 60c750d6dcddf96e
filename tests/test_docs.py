"""The documents: every link and name resolves, and the pages of results say what their files say."""

import importlib
import importlib.util
import json
import math
import re
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ceu_rl.tofu.metrics import forget_quality

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"
PAGES = [path for path in sorted(RESULTS.glob("*.md")) if path.name != "README.md"]
RAW = sorted(RESULTS.rglob("*.json"))


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
            slugs += re.findall(r'<details markdown="1" id="([\w-]+)">', place.read_text())
            assert anchor in slugs, f"{name(path)} links to {target}#{anchor}"
        if title.startswith("test_"):
            assert re.search(rf"^def {title}\(", place.read_text(), flags=re.M), f"{name(path)} cites {title}"
    for target in re.findall(r"`((?:tests|docs|recipes|ceu_rl)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), f"{name(path)} mentions {target}"
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", text):
        assert (ROOT / recipe).exists(), f"{name(path)} mentions {recipe}"


def test_every_page_is_on_the_site():
    """`make docs` fails at a page that the navigation leaves out, and at a broken link."""
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    assert pages <= set(re.findall(r"[\w/.-]+\.md", nav))


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


# The pages of results

sys.path.insert(0, str(RESULTS))  # where the writer finds its modules


def writer():
    return module_of(RESULTS / "write.py")


def module_of(path, source=None):
    """A module beside the results, or a mutant of it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    exec(compile(source or path.read_text(), str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.py")), ids=name)
def test_a_script_of_results_loads(path):
    module_of(path)


def shown(svg):
    """What an SVG says in words and numbers: the paths of matplotlib differ from one version to another."""
    return re.findall(r">([^<>\n]+)</text", svg)


def test_the_results_are_what_make_results_writes():
    written = writer().written()
    for path, text in written.items():
        found = path.read_text()
        same = shown(found) == shown(text) and shown(text) if path.suffix == ".svg" else found == text
        assert same, f"{name(path)} is not what its files give: run make results"
    pages = {path for path in RESULTS.glob("*.md")} | set(RESULTS.rglob("*.svg"))
    assert pages == set(written), "a page or figure that nothing writes"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_of_results_opens_with_its_answer_a_figure_and_a_table(path):
    text = path.read_text()
    title, answer, figure = text.split("\n\n")[:3]
    assert title.startswith("# ") and title.endswith("?")
    assert [line[:2] for line in answer.splitlines()] == ["- "] * 3
    assert re.fullmatch(r"!\[.+\]\(.+\.svg\)", figure)
    first, details = text.split("\n## Details\n")
    assert len(tables(first)) == 1 and first.count("![") == 1 and len(first.splitlines()) <= 40
    assert details.count("<details markdown") == details.count("</details>") > 2
    assert len(text.splitlines()) <= 200


# What the tables say, computed once more from the files by plain Python and numpy

KEPT = ("foreign kl", "solutions nll")
NAMES = {"paper": "ceu-published", "drop-descending": "positives"}
CE_U = {"dpo": "ceu-1", "dpo-real-model": "ceu-1", "grpo": "ceu-0.5", "unlearning": "ceu"}
SETTINGS = {each.replace("_", " "): each for each in ("learning_rate", "num_iterations", "weight_sync_steps")}


def tables(text):
    """The tables of a page: header, rows, and the files that they are from."""
    found = []
    for body, source in re.findall(r"((?:^\|.*\n)+)\n(From .*)", text, flags=re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in body.strip().splitlines())
        found.append((header, rows, re.findall(r"`docs/results/([\w./-]+\.json)`", source)))
    assert len(found) == len(re.findall(r"^\| ---", text, flags=re.M)), "a table without its files"
    return found


@cache
def plain(file):
    return json.loads((RESULTS / file).read_text())


@cache
def ks_qualities(n):
    """The p-value of two samples of n whose distributions are h / n apart, exactly (Gnedenko and Korolyuk)."""
    whole = math.comb(2 * n, n)
    return [
        float(2 * Fraction(sum((-1) ** (k + 1) * math.comb(2 * n, n + k * h) for k in range(1, n // h + 1)), whole))
        for h in range(1, n + 1)
    ]


def score(file, run, title):
    measures, key = run["measures"], title.replace(" ", "_")
    if title == "ks distance":
        n = 40 if "smollm2" in file else 400
        gaps = np.abs(np.log(ks_qualities(n)[: n // 2]) - math.log(measures["forget_quality"]))
        assert gaps.min() < 1e-4
        return (int(gaps.argmin()) + 1) / n
    if title == "reached":
        return float(measures["forget_quality"] > 0.05 and measures["model_utility"] >= 0.9 * utility(file))
    ends = {name: values[-1] for name, values in run["curves"].items()}
    places = (measures.get(key), run["final"].get(title), ends.get(f"eval_{key}"), ends.get(f"eval_{key}_accuracy"))
    return next(value for value in places if value is not None)


def utility(file):
    return plain(file)["tofu"]["base"]["model_utility"]


def check_cell(cell, title, members):
    """Whether a cell has the mean (on TOFU the median) of a score, perhaps its range, and is bold where it should."""
    values = [score(file, run, title) for file, run in members]
    if title == "reached":
        expected, kept = [sum(values), len(values)], all(values)
    else:
        middle = np.median(values) if title in ("ks distance", "model utility") else np.mean(values)
        ranged = "(" in cell
        expected = [middle, min(values), max(values)] if ranged else [middle]
        bases = [plain(file)["base"].get(f"{title} accuracy") for file, _ in members]
        kept = all(base and value >= 0.95 * base for value, base in zip(values, bases, strict=True))
    assert [float(each) for each in re.findall(r"[-+]?\d+\.?\d*", cell)] == pytest.approx(expected, abs=6e-4), cell
    assert cell.startswith("**") == kept, f"{cell}: {values}"


def of_arm(files, label):
    """The runs of an arm, with the name of its file where the label has it after a comma."""
    found = []
    for file in files:
        folder, stem = file.removesuffix(".json").split("/")
        for run in plain(file)["runs"]:
            arm = CE_U[folder] if run["arm"] == "ceu" else NAMES.get(run["arm"], run["arm"])
            if label in (arm, f"{arm}, {stem}"):
                found.append((file, run))
    return found


def check_table(header, rows, files):
    scores, _, by = header[0].rpartition("by ")
    settings = [SETTINGS[each] for each in by.split(", ")] if by and header[0] != "arm" else []
    for label, *cells in rows:
        title, _, arm = label.rpartition(": ")
        titles = [title] if title else scores.strip().split(" / ")
        members = of_arm(files, arm)
        assert members, label
        seen = 0
        for at, cell in zip(header[1:], cells, strict=True):
            if not settings:
                check_cell(cell, at, members)
                continue
            there = [(f, run) for f, run in members if at == ", ".join(run["setting"].get(key, "") for key in settings)]
            seen += len(there)
            assert bool(there) == bool(cell), f"{label} at {at}"
            for part, each in zip(cell.split(" / "), titles, strict=True) if cell else ():
                check_cell(part, each, there)
        assert not settings or seen == len(members), f"{label}: runs that no column has"


def check_differences(header, rows, files):
    """Seed by seed, from the first arm."""
    first = re.fullmatch(r"less (.+) of the same seed", header[0])[1]
    for arm, *cells in rows:
        for title, cell in zip(header[1:], cells, strict=True):
            arms = (of_arm(files, each) for each in (arm, first))
            ours, theirs = ({run["seed"]: score(file, run, title) for file, run in runs} for runs in arms)
            gaps = [ours[seed] - theirs[seed] for seed in ours]
            numbers = [float(each) for each in re.findall(r"[-+]\d+\.\d+", cell)]
            assert numbers == pytest.approx([np.mean(gaps), min(gaps), max(gaps)], abs=6e-4), f"{arm}, {title}"


def leaves(found, key=""):
    """Every number and text of a file with the name of its field; fields of one name stay apart by their parents'."""
    if isinstance(found, dict):
        for each, value in found.items():
            yield each, each
            yield from leaves(value, each)
            if not isinstance(value, dict | list):
                yield key, value
    elif isinstance(found, list):
        for value in found:
            yield from leaves(value, key)
    if not isinstance(found, dict):
        yield key, found


def check_records(header, rows, files):
    """Each column is one field of the file, with a word of its title if any has one: every cell is a value of it."""
    fields = {}
    for file in files:
        for key, value in leaves(plain(file)):
            fields.setdefault(key, []).append(value)
    names = [each for file in files for each in re.split(r"[/.]", file)]
    fields["file"] = [NAMES.get(each, CE_U["dpo"] if each == "ceu" else each) for each in names]
    for place, title in enumerate(header):
        cells = [row[place] for row in rows if row[place]]

        def is_of(field, cells=cells):
            return all(any(equal(cell, value) for value in field) for cell in cells)

        texts = [value for values in fields.values() for value in values if isinstance(value, str)]
        words = re.findall(r"[a-z]{3,}", title.lower())
        named = [values for key, values in fields.items() if any(word in key.lower() for word in words)]
        assert any(map(is_of, named or fields.values())) or is_of(texts), f"no field has the column {title}: {cells}"


def equal(cell, value):
    if isinstance(value, list | str):
        return cell == str(value)
    try:
        digits = len(cell.partition(".")[2].partition("e")[0])
        close = 0.51 * 10.0**-digits * (10 ** int(cell.partition("e")[2] or 0) if "e" in cell else 1)
        return value is not None and abs(float(cell) - value) <= close
    except ValueError:
        return False


def preferences(file):
    """Of each finished run by arm, rate and seed: losses and accuracies of its pairs, nats per token, divergence."""
    found = {}
    for run in plain(file)["runs"]:
        if run["status"] == "finished":
            held = {name: np.array(values) for name, values in run["held_out"].items()}
            gains = {side: held[side] - held[f"ref_{side}"] for side in ("chosen", "rejected")}
            margins = 0.1 * (gains["chosen"] - gains["rejected"])
            found[run["arm"], run["setting"]["learning_rate"], run["seed"]] = {
                "loss": np.log1p(np.exp(-margins)),
                "accuracy": (margins > 0) + (margins == 0) / 2,
                **{f"{side} gain": gain / held[f"{side}_tokens"] for side, gain in gains.items()},
                **{key: np.full(len(margins), run["metrics"][f"eval_{key.replace(' ', '_')}"]) for key in KEPT},
            }
    return found


def check_pairs(header, rows, files):
    """At each rate the mean over seeds and pairs, or of the odd pairs at the rate that is best on the even ones."""
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        file = next((each for each in files if each.endswith(f"/{cells.get('pairs')}.json")), files[0])
        runs = preferences(file)

        def of(arm, rate, part, column, runs=runs):
            return np.array([run[column][part] for key, run in runs.items() if key[:2] == (arm, rate)])

        def best(arm, runs=runs):
            rates = {rate for name, rate, _ in runs if name == arm}
            return min(rates, key=lambda rate: runs[arm, rate, 0]["loss"][::2].mean())

        part = slice(1, None, 2) if "pairs" in cells else slice(None)
        rate = float(cells.get("rate") or cells["best rate"])
        assert "pairs" not in cells or rate == best(cells["arm"])
        for title in header:
            if title in ("loss", "accuracy", "chosen gain", "rejected gain", *KEPT):
                values = of(cells["arm"], rate, part, title)
                assert float(cells[title]) == pytest.approx(values.mean(), abs=6e-4), (row, title)
        for other in [each for each in ("stock", "anchored") if cells.get(f"loss less {each}'s")]:
            both = [(key, (other, best(other), key[2])) for key in runs if key[:2] == (cells["arm"], rate)]
            gaps = np.array([runs[ours]["loss"] - runs[its]["loss"] for ours, its in both if its in runs])[:, part]
            drawn = np.random.default_rng(1)
            seeds, many = gaps.shape
            again = [gaps[drawn.integers(seeds, size=seeds)][:, drawn.integers(many, size=many)] for _ in range(4000)]
            expected = [gaps.mean(), *np.quantile([each.mean() for each in again], [0.025, 0.975])]
            numbers = [float(each) for each in re.findall(r"[-+]\d+\.\d+", cells[f"loss less {other}'s"])]
            assert numbers == pytest.approx(expected, abs=0.1 * (expected[2] - expected[1])), row


def check_page(text):
    for header, rows, files in tables(text):
        if "pairs" in header or "rejected gain" in header:
            check_pairs(header, rows, files)
        elif header[0].startswith("less "):
            check_differences(header, rows, files)
        elif "by " in header[0] or (header[0] == "arm" and "curves" in plain(files[0]).get("runs", [{}])[0]):
            check_table(header, rows, files)
        else:
            check_records(header, rows, files)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_tables_follow_from_the_files(path):
    check_page(path.read_text())


@pytest.mark.parametrize(
    ("page", "was", "becomes"),
    [
        ("grpo", "seeds[arm] - seeds[first]", "seeds[arm].sort_values().values - seeds[first].sort_values()"),
        ("unlearning", "(frame.forget_quality > FORGOTTEN) & useful", "(frame.forget_quality > FORGOTTEN) | useful"),
        ("unlearning", "kept.eq(True).all()", "kept.eq(True).any()"),
        ("dpo", "values.mean()", "values.median()"),
        ("grpo", '"ceu-0.5", "unlearning"', '"ceu-1", "unlearning"'),
        ("dpo-anchor", "pairs.pair % 2 == 1", "pairs.pair % 2 == 0"),
        ("dpo-anchor", "paired_bootstrap(gaps.to_numpy())", "paired_bootstrap(gaps.to_numpy() / 2)"),
        ("speed", '":") for field in columns.values()', '":") for field in reversed(columns.values())'),
    ],
)
def test_the_check_of_the_tables_finds_a_wrong_writer(page, was, becomes):
    path = next(each for each in RESULTS.glob("*.py") if was in each.read_text())
    assert path.read_text().count(was) == 1
    mutant = module_of(path, path.read_text().replace(was, becomes))
    module = mutant if path.stem == "write" else writer()
    module.pairs = mutant if path.stem == "pairs" else module.pairs
    for figure in ("by_rate", "over_steps", "plane", "bars"):
        setattr(module.Page, figure, lambda *args, **kwargs: "")
    module.QUESTIONS, module.pictures = (page,), dict
    with pytest.raises((AssertionError, ValueError)):
        check_page(module.written()[RESULTS / f"{page}.md"])


def test_the_stable_rates_of_the_first_page_are_those_of_the_study():
    text = (RESULTS / "dpo.md").read_text().split("\n\n")[1]
    for arm, where in (("ceu", "(`ceu-1`)"), ("stock", "Stock does so")):
        found = []
        for file in ("dpo/addition.json", "dpo/maze.json"):
            kept = {}
            for run in plain(file)["runs"]:
                if run["arm"] == arm:
                    enough = run["final"]["greedy accuracy"] >= 0.95 * plain(file)["base"]["greedy accuracy"]
                    kept.setdefault(run["setting"]["learning_rate"], []).append(enough)
            found.append(max((rate for rate, seeds in kept.items() if all(seeds)), key=float))
        sentence = text[text.index(where) :].split(". ")[0]
        assert re.findall(r"\de-\d", sentence) == found


@pytest.mark.parametrize("path", RAW, ids=name)
def test_each_file_of_results_is_named_by_its_page(path):
    """`docs/results/x/y.json` is what the page x.md draws from, in a table or in a sentence that names it."""
    question = path.relative_to(RESULTS).parts[0]
    page = {"fused": "speed", "grpo-time": "speed", "faults": "speed", "scale": "../scale"}.get(question, question)
    assert f"`{name(path)}`" in (RESULTS / f"{page}.md").read_text(), f"{name(path)} is on no page"


def provenances(found):
    """Each part of a result file that says where it comes from."""
    if isinstance(found, dict):
        if "commit" in found:
            yield found
        found = list(found.values())
    if isinstance(found, list):
        for each in found:
            yield from provenances(each)


@pytest.mark.parametrize("path", RAW, ids=name)
def test_results_carry_provenance(path):
    found = list(provenances(json.loads(path.read_text())))
    assert found
    for origin in found:
        assert {"commit", "versions", "device"} <= set(origin)
        assert re.fullmatch(r"[0-9a-f]{40}", origin["commit"]), "made from source that was not committed"


def test_the_forget_qualities_follow_from_the_truth_ratios():
    models = [(each, "retain90", 400) for each in ("models", "models-0", "models-1", "earlier")]
    for file, retain, rows in (*models, ("models-smollm2", "retain", 40)):
        runs = {run["name"]: run for run in plain(f"unlearning/{file}.json")["runs"]}
        ratios = runs[retain]["forget_truth_ratios"]
        assert len(ratios) == rows and len(runs) > 1
        for run in runs.values():
            if "forget_quality" in run["evaluation"]["summary"]:
                quality = forget_quality(run["forget_truth_ratios"], ratios)
                assert quality == pytest.approx(run["evaluation"]["summary"]["forget_quality"], rel=1e-2)


def test_each_number_of_the_readme_table_stands_in_the_page_that_its_row_links():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == 5
    for row in rows:
        page = (ROOT / re.search(r"\]\(([^)#]+)", row)[1]).read_text()
        numbers = re.findall(r"(?<![\w.-])\d\.\d{3}(?!\d)", row)
        assert numbers and all(number in page for number in numbers), row
