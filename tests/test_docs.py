"""The documents: every link and name resolves, the code of the README runs, and the figures are those of the files."""

import importlib
import json
import re
from pathlib import Path

import pytest

from ceu_rl.stability.report import table_rows

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDY = ROOT / "docs" / "results" / "dpo-addition"


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_and_paths_resolve(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"
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


def test_results_are_those_of_the_files():
    results = (ROOT / "docs" / "results.md").read_text()
    for run in sorted(path.parent for path in STUDY.rglob("result.json")):
        provenance = json.loads((run / "result.json").read_text())
        assert {"commit", "versions", "device", "seed", "date", "command"} <= set(provenance)
        assert not provenance["commit"].endswith("-dirty")
    for folder in sorted({path.parents[1] for path in STUDY.rglob("result.json")}):
        arms = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
        for row in table_rows(folder, arms, {}):
            assert "| " + " | ".join(row) + " |" in results, f"{row} of {name(folder)} is not in docs/results.md"


def test_the_table_of_the_readme_is_in_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| (stock|ceu|paper) ", line)]
    assert len(rows) >= 3 and all(row in results for row in rows)
