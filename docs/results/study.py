"""A study over arms that no recipe has: `ceu-rl compare` of one recipe with other settings and other programs."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ceu_rl import cli
from ceu_rl.run.provenance import write_json
from ceu_rl.stability import compare


def study(
    method: str,
    folder: Path,
    recipe: Path,
    arms: Mapping[str, tuple[str, Mapping[str, Any]]],
    script: str,
    command: str,
    words: Sequence[str],
    add_to_run: Callable[[dict[str, Any]], None] = lambda run: None,
) -> int:
    """Run or go on with a study; its report is `ceu-rl compare`'s.

    Args:
        method: Of the recipe.
        folder: Where the runs go, and the recipes of the arms.
        recipe: What the arms have in common.
        arms: Of each the variant, with which `script` is called for it, and the settings that differ from the recipe.
            The first is the baseline.
        script: The program that trains an arm, called as `script VARIANT ceu_rl.cli METHOD ...`.
        command: What the report names as its command.
        words: Of `ceu-rl compare`.
        add_to_run: Changes the record of each run in the report.
    """
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for arm, (_, settings) in arms.items():
        content = {**yaml.safe_load(recipe.read_text()), **settings}
        (folder / "recipes" / f"{arm}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    make_jobs = compare.make_jobs

    def with_variants(*args: Any, **kwargs: Any) -> Any:
        jobs = make_jobs(*args, **kwargs)
        return [replace(job, launcher=[sys.executable, script, arms[job.run.arm][0]]) for job in jobs]

    compare.make_jobs = with_variants
    recipes = [str(folder / "recipes" / f"{arm}.yaml") for arm in arms]
    status = cli.main(["compare", *recipes, *words, "--method", method, "--output_dir", str(folder)])
    path = folder / "report.json"
    if path.exists():
        found = json.loads(path.read_text())
        found["command"] = command
        for run in found["runs"]:
            add_to_run(run)
        write_json(path, found)
    return status


def train(method: str, variant: str, words: Sequence[str]) -> int:
    """One run: `ceu-rl METHOD` as the program has changed it, with the variant in its result."""
    status = cli.main([method, *words])
    if status == 0:
        path = Path(words[list(words).index("--output_dir") + 1], "result.json")
        write_json(path, {**json.loads(path.read_text()), "variant": variant})
    return status
