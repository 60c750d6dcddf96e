"""`ceu-rl recipes`: the recipes that the package brings, listed and copied.

    ceu-rl recipes                          list them
    ceu-rl recipes dpo/addition             copy a folder of them to recipes/dpo/addition
    ceu-rl recipes dpo/addition/ceu-1.yaml    copy one
    ceu-rl recipes dpo/addition DEST        copy to DEST/dpo/addition

With the default DEST the command in the header of each recipe holds as it stands.
"""

import argparse
import filecmp
import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """Where the recipes lie: in the package of a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "_recipes", PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"There are no recipes beside {PACKAGE} or in it; install the package again.")


def list_recipes() -> list[tuple[str, str, str]]:
    """Name, what it is and hardware of each recipe, a sentence each, from the comment that it opens with."""
    found = []
    for path in sorted(recipes_folder().rglob("*.yaml")):
        header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
        at = next((i for i, line in enumerate(header) if line.startswith("Hardware: ")), len(header))
        what, hardware = (re.split(r"(?<=[^.]{2}\.)\s", " ".join(header[start:]))[0] for start in (0, at))
        found.append((str(path.relative_to(recipes_folder())), what, hardware.removeprefix("Hardware: ")))
    return found


def copy_recipes(name: str, destination: Path) -> list[Path]:
    """Copy a recipe and the files beside it that it names, or a whole folder, to the same place under a destination.

    What is the same there stays.

    Raises:
        ValueError: for a name that no recipe has.
        FileExistsError: for a file there that differs; nothing is written then.
    """
    root = recipes_folder().resolve()
    source, found = (root / name).resolve(), list[Path]()
    if source.is_file():
        text = source.read_text()
        found = [source, *(path for path in source.parent.iterdir() if path != source and f"/{path.name}\n" in text)]
    elif source.is_relative_to(root):
        found = sorted(path for path in source.rglob("*") if path.is_file())
    if not found or not source.is_relative_to(root):
        folders = sorted({str(Path(each).parent) for each, _, _ in list_recipes()})
        raise ValueError(f"There is no recipe {name}; use one that ceu-rl recipes lists, or {', '.join(folders)}.")
    copies = {path: destination / path.relative_to(root) for path in found}
    for path, target in copies.items():
        if target.exists() and not filecmp.cmp(path, target, shallow=False):
            raise FileExistsError(f"{target} is there and differs; move it away, or give another destination.")
    for path, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
    return list(copies.values())


def main(argv: Sequence[str]) -> int:
    """`ceu-rl recipes`: list them, or copy those of a name; raises as [`copy_recipes`]."""
    args = parser().parse_args(argv)
    if args.name is not None:
        print(*copy_recipes(args.name, args.destination), sep="\n")
        return 0
    for folder, group in itertools.groupby(list_recipes(), lambda row: Path(row[0]).parent):
        rows = list(group)
        width = max(len(name) for name, *_ in rows)
        lines = (f"  {name:<{width}}  {what}{hardware and f' ({hardware})'}" for name, what, hardware in rows)
        print(f"\n{folder}", *lines, sep="\n")
    return 0


def parser() -> argparse.ArgumentParser:
    shown: Any = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    found = argparse.ArgumentParser(prog="ceu-rl recipes", **shown)
    option = found.add_argument
    option("name", nargs="?", metavar="NAME", help="a recipe, or a folder of them; default: list all")
    option("destination", nargs="?", metavar="DEST", type=Path, default=Path("recipes"), help="default: recipes")
    return found
