"""Run several recipes, each as its own process through the ordinary command line, and report them side by side."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ..checks import saved_checkpoints
from ..provenance import recipe_settings
from .report import write_report

METHODS = ("dpo", "grpo")


def main(argv: list[str]) -> int:
    """`ceu-rl compare RECIPE ... --output_dir DIR`: one arm for each recipe, named after its file.

    Finished arms are kept, an interrupted one goes on from its last checkpoint, and one that failed is named in the
    report. Returns 0 if every arm finished, 1 otherwise, 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog="ceu-rl compare", description=main.__doc__)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(argv)
    console = Console()
    try:
        commands = {recipe.stem: _command(recipe, args.output_dir / recipe.stem) for recipe in args.recipes}
        if len(commands) < len(args.recipes):
            raise ValueError(f"Two recipes have one name among {[str(r) for r in args.recipes]}; rename one.")
        pending = {
            arm: command for arm, command in commands.items() if not _is_finished(args.output_dir / arm, command)
        }
    except (ValueError, OSError) as error:
        print(f"ceu-rl compare: error: {error}", file=sys.stderr)
        return 2
    failed = {}
    for number, (arm, command) in enumerate(commands.items(), 1):
        folder = args.output_dir / arm
        if arm not in pending:
            console.print(f"[bold]{number}/{len(commands)} {arm}[/bold]: finished earlier, kept")
            continue
        console.print(f"[bold]{number}/{len(commands)} {arm}[/bold]: ceu-rl {' '.join(command)}")
        resume = ["--resume_from_checkpoint", "true"] if saved_checkpoints(folder) else []
        status = subprocess.run([sys.executable, "-m", "ceu_rl.cli", *command, *resume]).returncode
        if status:
            failed[arm] = f"failed: exit status {status}"
    write_report(args.output_dir, list(commands), failed, console)
    return 1 if failed else 0


def _command(recipe: Path, folder: Path) -> list[str]:
    methods = [part for part in recipe.resolve().parts if part in METHODS]
    if not methods:
        raise ValueError(f"{recipe} is in no folder named {' or '.join(METHODS)}, which says how to train it; move it.")
    return [methods[-1], "--config", str(recipe), "--output_dir", str(folder)]


def _is_finished(folder: Path, command: list[str]) -> bool:
    settings = recipe_settings(command[1:])
    result = folder / "result.json"
    if not result.is_file():
        return False
    if json.loads(result.read_text())["settings"] != settings:
        raise ValueError(f"{result} was made with other settings than the recipe has now; choose another --output_dir.")
    return True
