"""`ceu-rl compare`: a grid of recipes, overrides and seeds, each run its own process, and one report over all of them.

    ceu-rl compare RECIPE.yaml ... [--learning_rate 1e-5 3e-5] [--seed 0 1 2] [--any_field v1 v2] [--jobs 2]
    ceu-rl compare RECIPE.yaml ... --dry_run
    ceu-rl compare RECIPE.yaml ... --report_only

Each recipe is an arm, named after its file; the first is the baseline. The recipe's field `method` says how it is
trained. A run lies in `OUTPUT_DIR/<arm>/<what varies>/<seed>/`, and its record in `run.json` there. The same command
continues: finished runs are kept, a run that an earlier call left training is waited for, an interrupted one continues
from its last checkpoint, and a failed one starts again. A run that stopped at a non-finite loss has diverged, which is
a result and is kept. In options `-` is the same as `_`; `--dataset` is `--dataset_name`, `--model` is
`--model_name_or_path`.
"""

import argparse
import contextlib
import hashlib
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .job import MODULE, Job, is_done
from .runs import RECORD, Run, key_of, rate, read_json

RESERVED = ("config", "output_dir", "resume_from_checkpoint")
DEFAULT_SEED = 42  # of transformers
LONGEST = 80  # characters of a folder's name


def main(argv: Sequence[str]) -> int:
    """`ceu-rl compare`: 0 if each run finished or diverged, 1 if one failed, 130 for Ctrl-C, 143 for SIGTERM; raises a
    ValueError for bad input."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        return _compare(argv, Console(), shlex.join(["ceu-rl", "compare", *argv]))
    except KeyboardInterrupt as error:
        print("ceu-rl compare: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 143 if error.args else 130


def _compare(argv: Sequence[str], console: Console, command: str) -> int:
    from ..models import check_model_name
    from ..run.config import load_yaml, recipe_method
    from .launch import make_launcher, run_jobs
    from .report import write_report

    args, recipes, fields = parse(argv)
    folder = args.output_dir or Path("runs", f"{recipe_method(recipes[0])}-{recipes[0].resolve().parent.name}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; choose a folder.")
    jobs = make_jobs(recipes, fields, folder, args.accelerate_config, args.retain)

    def report(to: Console) -> int:
        runs = [job.found for job in jobs]
        write_report(folder, runs, to, command)
        return 0 if all(run.status in ("finished", "diverged") for run in runs) else 1

    def draw() -> None:
        with contextlib.suppress(OSError):  # which ends no run; the last report says why
            report(Console(quiet=True))

    if args.report_only:
        return report(console)
    # Seed by seed, so that a grid that is cut short has every arm
    pending = [job for job in sorted(jobs, key=lambda job: job.run.seed) if not is_done(job)]
    if args.dry_run:
        for job in jobs:
            print(*(("" if job in pending else "# done: ") + line for line in _commands_of(job)), sep="\n")
        return 0
    for job in pending:
        if model := job.settings.get("model_name_or_path"):
            check_model_name(model, Path(job.run.planned["recipe"]))
    options = load_yaml(args.launcher_config) if args.launcher_config else {}
    folder.mkdir(parents=True, exist_ok=True)
    kept = len(jobs) - len(pending)
    console.print(f"{len(jobs)} runs in {folder}: {kept} done earlier and kept, {len(pending)} to do", soft_wrap=True)
    try:
        if pending:  # the report is there to look at before the last run is
            launcher = make_launcher(args.launcher, folder, args.jobs, options)
            at_once = args.jobs or (1 if args.launcher == "local" else len(pending))
            run_jobs(pending, launcher, at_once, console, draw)
    except KeyboardInterrupt:
        report(console)
        raise
    return report(console)


# The command line


def _parser() -> argparse.ArgumentParser:
    from .launch import LAUNCHERS

    parser = argparse.ArgumentParser(
        prog="ceu-rl compare",
        usage="ceu-rl compare RECIPE.yaml ... [--any_field v1 v2 ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    option = parser.add_argument
    option("--output_dir", help="default: runs/<method>-<folder of the first recipe>")
    option("--jobs", type=int, help="runs at the same time, which share the cores or GPUs; default: 1, or all that the "
           "scheduler takes")  # fmt: skip
    option("--accelerate_config", type=Path, help="launch each run through accelerate with this config")
    option("--retain", type=Path, help="TOFU: tofu_eval.json of the retain model, for forget quality")
    option("--launcher", choices=LAUNCHERS, default="local", help="where the runs run; default: local")
    option("--launcher_config", type=Path, help="YAML: options of a Ray task, or of submitit's AutoExecutor")
    option("--dry_run", action="store_true", help="print the command of each run, and run nothing")
    option("--report_only", action="store_true", help="draw the report again, and run nothing")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Path], dict[str, list[str]]]:
    """The options of the comparison, its recipes, and the values of each field of its grid; a ValueError for others."""
    from ..run.config import ALIASES

    args, rest = _parser().parse_known_args([_underscored(word) for word in argv])
    if args.output_dir is not None and not args.output_dir.strip():
        raise ValueError(f"--output_dir is {args.output_dir!r}; give a folder.")
    args.output_dir = args.output_dir and Path(args.output_dir).expanduser()  # as a run does
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; use at least 1.")
    recipes = list(map(Path, itertools.takewhile(lambda word: not word.startswith("--"), rest)))
    fields: dict[str, list[str]] = {}
    name = ""
    for word in rest[len(recipes) :]:
        if not word.startswith("--"):
            fields[name].append(word)
            continue
        name, _, value = word.removeprefix("--").partition("=")
        name = ALIASES.get(name, name)
        if name in fields:
            raise ValueError(f"--{name} is given twice; give all its values after one.")
        if name in RESERVED:
            raise ValueError(f"--{name} is given, which the comparison sets for each run; leave it out.")
        fields[name] = [value] if value else []
    if lacking := [name for name, values in fields.items() if not values]:
        raise ValueError(f"--{lacking[0]} has no value; give at least one.")
    if not recipes:
        raise ValueError("No recipe is given; write ceu-rl compare RECIPE.yaml ... --field value ...")
    return args, recipes, fields


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _commands_of(job: Job) -> list[str]:
    """The commands that would make a run without a comparison, ready for a shell."""
    launched = ["ceu-rl"] if job.launcher == MODULE else [*job.launcher, "ceu_rl.cli"]
    evaluated = [["ceu-rl", *job.evaluation]] if job.evaluation else []
    return [shlex.join(words) for words in ([*launched, *job.words], *evaluated)]


# The grid


def make_jobs(
    recipes: Sequence[Path],
    fields: Mapping[str, Sequence[str]],
    folder: Path,
    accelerate_config: Path | None = None,
    retain: Path | None = None,
) -> list[Job]:
    """The runs of the grid: the product of recipes, values of the fields and seeds, in this order.

    Raises:
        ValueError: for a recipe that is no file, two of one name, or a field or value that a method does not take.
    """
    for path in (accelerate_config, retain):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file; check its name.")
    if retain is not None:
        read_json(retain)
    if len({recipe.stem for recipe in recipes}) < len(recipes):
        raise ValueError(f"Two recipes have one name among {[str(recipe) for recipe in recipes]}; rename one.")
    launcher = list(MODULE)
    if accelerate_config is not None:
        launcher += ["accelerate.commands.launch", "--config_file", str(accelerate_config), "-m"]
    return [job for recipe in recipes for job in _jobs_of(recipe, fields, folder / recipe.stem, launcher, retain)]


def _jobs_of(
    recipe: Path, fields: Mapping[str, Sequence[str]], folder: Path, launcher: Sequence[str], retain: Path | None
) -> Iterator[Job]:
    from ..run.checks import check_numbers
    from ..run.config import dump_recipe, read_recipe, recipe_method, settings_of

    method = recipe_method(recipe)
    content, known = settings_of(read_recipe(method, recipe)), _known_settings(folder)
    typed = {name: _typed(method, name, values) for name, values in fields.items()}
    grid = {name: values for name, values in fields.items() if name != "seed"}
    seeds = typed["seed"].values() if "seed" in typed else [content.get("seed", DEFAULT_SEED)]
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        overrides = {name: typed[name][value] for name, value in given.items()}
        setting = {n: value for n, value in overrides.items() if len(grid[n]) > 1 or n == "learning_rate"}
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        for seed in seeds:
            settings = {**content, **overrides, "disable_tqdm": True, "seed": seed}
            check_numbers(settings)
            if settings.get("learning_rate") == 0:
                raise ValueError("learning_rate is 0, which trains nothing; leave it out: every report shows the base.")
            at = folder / known.get(key_of(overrides), folder_name(setting)) / str(seed)
            record = {"arm": recipe.stem, "seed": seed, "method": method, "recipe": str(recipe), "settings": settings}
            direct = [method, "--config", str(recipe), *words, "--seed", str(seed), "--output_dir", str(at)]
            yield Job(
                run=Run(recipe.stem, setting, seed, at, {**record, "overrides": overrides}),
                text=dump_recipe({"method": method, **settings}),
                words=[*direct, "--disable_tqdm", "true"],
                evaluation=_evaluation(recipe, settings, at, retain) if method == "unlearn" else [],
                retain=retain,
                launcher=launcher,
            )


def _typed(method: str, name: str, values: Sequence[str]) -> dict[str, Any]:
    """The values of a field by how they were written, each of the type that the method gives it."""
    from ..run.config import read_arguments

    typed: dict[str, Any] = {}
    for value in values:
        try:
            typed[value] = read_arguments(method, [f"--{name}={value}"])[name]
        except ValueError as error:
            raise ValueError(f"--{name} {value}: {error}") from None
    if len(set(map(key_of, typed.values()))) < len(values):
        raise ValueError(f"--{name} has a value twice ({' '.join(values)}); give each once.")
    return typed


def folder_name(setting: Mapping[str, Any]) -> str:
    """A short and safe name for what varies, such as `learning_rate=3e-5`; one that had to be changed gets a hash."""
    told = (f"{name}={rate(value) if name == 'learning_rate' else value}" for name, value in setting.items())
    text = ",".join(told) or "recipe"
    safe = re.sub(r"[^\w.+=,-]+", "_", text, flags=re.ASCII)[:LONGEST]
    return text if safe == text else f"{safe[: LONGEST - 9]}-{hashlib.sha256(key_of(setting).encode()).hexdigest()[:8]}"


def _known_settings(folder: Path) -> dict[str, str]:
    """The folders of earlier calls by their overrides: a grid that grows keeps them, whatever varies now."""
    found = {}
    for path in sorted(folder.glob(f"*/*/{RECORD}")):
        with contextlib.suppress(ValueError):
            found[key_of((read_json(path) or {}).get("overrides"))] = path.parent.parent.name
    return found


def _evaluation(recipe: Path, settings: Mapping[str, Any], folder: Path, retain: Path | None) -> list[str]:
    from ..tasks import articles
    from ..tofu.data import SPLITS, is_tofu

    dataset, forget = settings.get("dataset_name"), settings.get("forget", "forget10")
    if not dataset:
        raise ValueError(f"{recipe} has no dataset_name; give locuslab/TOFU, a folder, or builtin:authors.")
    words = ["--model", str(folder), "--dataset", str(dataset)]
    if dataset == articles.NAME or str(dataset).startswith("muse-bench/"):
        return ["muse-eval", *words]
    if settings.get("dataset_config") is not None or not is_tofu(dataset) or forget not in SPLITS:
        return []
    return ["tofu-eval", *words, "--split", forget] + (["--retain", str(retain)] if retain else [])
