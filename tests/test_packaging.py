"""The recipes that come with the package, listed and copied, and that the wheel has them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ceu_rl.cli import main
from ceu_rl.run.recipes import copy_recipes, list_recipes

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
FILES = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*") if path.is_file()}


def test_the_list_has_a_line_for_each_recipe_whatever_the_terminal(capsys, monkeypatch):
    """With what it is and its hardware."""
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["recipes"]) == 0
    lines, listed = capsys.readouterr().out.splitlines(), list_recipes()
    assert {name for name, *_ in listed} == {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    for name, what, hardware in listed:
        assert what.endswith(".") and (hardware or name.startswith("accelerate/")), name
        assert [line for line in lines if line.split()[:1] == [name] and what in line and hardware in line], name
    assert "dpo/addition" in lines and len(lines) < 2 * len(RECIPES)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("dpo/addition/ceu-1.yaml", ["ceu-1.yaml"]),
        ("dpo/smollm2-chain-sum/base.yaml", ["base.yaml", "chat_template.jinja"]),
        ("accelerate", sorted(p.name for p in (ROOT / "recipes/accelerate").iterdir())),
    ],
)
def test_copy(name, files, tmp_path, monkeypatch, capsys):
    """By default to the same place under recipes/, where the command of the header finds it."""
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", name]) == 0
    found = sorted(path for path in Path("recipes").rglob("*") if path.is_file())
    assert [path.name for path in found] == files
    assert all(path.read_bytes() == (ROOT / path).read_bytes() for path in found)
    assert capsys.readouterr().out.splitlines() == [str(path) for path in found]
    assert main(["recipes", name]) == 0  # the same again is no harm
    assert main(["recipes", name, "elsewhere"]) == 0 and len(list(Path("elsewhere").rglob("*.*"))) == len(files)


def test_all_of_them(tmp_path):
    assert {path.relative_to(tmp_path) for path in copy_recipes(".", tmp_path)} == FILES


def test_what_is_there_and_differs_is_not_written_over(tmp_path, capsys):
    mine = tmp_path / "dpo/addition/stock.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main(["recipes", "dpo/addition", str(tmp_path)]) == 2
    assert mine.read_text() == "mine" and list(mine.parent.iterdir()) == [mine]
    assert f"{mine} is there and differs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dpo/multiplication", "ceu", "..", "../ceu_rl", "/etc"])
def test_a_name_that_no_recipe_has(name, tmp_path, capsys):
    assert main(["recipes", name, str(tmp_path)]) == 2
    assert f"ceu-rl recipes: error: There is no recipe {name}; " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by what pyproject.toml names, without isolation: no download."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    source = folder / "source"
    ignored = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode:
        pytest.skip("not a git checkout")
    for file in ignored.stdout.splitlines():
        if file.startswith(("ceu_rl/", "recipes/")) or "/" not in file:
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(folder)]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_brings_the_recipes(wheel):
    names = set(wheel.namelist())
    expected = {f"ceu_rl/_recipes/{path}" for path in FILES}
    assert expected <= names
    assert {"ceu_rl/py.typed", "ceu_rl/stability/report.html.jinja", "ceu_rl/tasks/authors.yaml"} <= names
    assert not any(name.startswith(("tests", "docs")) for name in names)


def test_an_installed_wheel_finds_its_recipes(wheel, tmp_path):
    """Unpacked elsewhere, without the repository."""
    wheel.extractall(tmp_path)
    code = "from ceu_rl.run.recipes import list_recipes, recipes_folder; print(recipes_folder(), len(list_recipes()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == [str(tmp_path / "ceu_rl" / "_recipes"), str(len(RECIPES))], ran.stderr


def test_tasks_need_nothing_of_their_extra_until_one_is_asked_for():
    code = "import sys; sys.modules |= {'pydantic': None, 'reasoning_gym': None}; import ceu_rl.tasks.reasoning_gym"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
