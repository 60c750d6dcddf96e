"""`ceu-rl compare`: a grid of recipes, overrides and seeds, each run its own process, and one report over all of them.

    ceu-rl compare RECIPE.yaml ... [--learning_rate 1e-5 3e-5] [--seed 0 1 2] [--any_field v1 v2] [--jobs 2]
    ceu-rl compare RECIPE.yaml ... --dry_run
    ceu-rl compare --report_only --output_dir DIR

Each recipe is an arm, named after its file; the first is what the others are compared with. A run lies in
`OUTPUT_DIR/<arm>/<setting>/<seed>/`. Call it again to go on: finished runs are kept, a run that an earlier call left
training is waited for, an interrupted one goes on from its last checkpoint, and a failed one starts again. A run that
stopped at a non-finite loss has diverged, which is a result and is kept. In all options `-` is the same as `_`.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import quote, unquote

import yaml
from rich.console import Console

from ..models import check_model_name
from ..run.checks import check_numbers
from ..run.config import NO_SETTINGS, read_recipe, read_settings
from ..tofu.data import SPLITS, is_tofu
from .jobs import MODULE, Job, is_done
from .launchers import LAUNCHERS, make_launcher, run_jobs
from .report import write_report
from .runs import FAILURE, LOG, RESULT, TOFU_RESULT, Run, read_outcome, to_float

METHODS = {"dpo": "dpo", "grpo": "grpo", "tofu": "unlearn"}  # by the folder that a recipe is in
RESERVED = ("config", *NO_SETTINGS)
DEFAULT_SEED = 42  # of transformers


def main(argv: Sequence[str]) -> int:
    """`ceu-rl compare`: 0 if each run finished or diverged, 1 if one failed, 130 for Ctrl-C, 143 for SIGTERM; raises a
    ValueError for bad input."""
    console = Console()
    command = shlex.join(["ceu-rl", "compare", *argv])
    try:
        with _raising_at_sigterm():
            return _compare(argv, console, command)
    except KeyboardInterrupt as error:
        print("ceu-rl compare: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130


def _compare(argv: Sequence[str], console: Console, command: str) -> int:
    args, recipes, fields = parse(argv)
    if args.report_only and not recipes:
        runs = find_runs(args.output_dir)
        return _report(args.output_dir, runs, console, command)
    folder = args.output_dir or _default_folder(recipes[0], args.method)
    jobs = make_jobs(recipes, fields, folder, args.method, args.accelerate_config, args.retain)

    def report(to: Console) -> int:
        return _report(folder, [job.found for job in jobs], to, command)

    def draw() -> None:  # a report that cannot be drawn ends no run; the last one says why
        with contextlib.suppress(Exception):
            report(Console(quiet=True))

    if args.report_only:
        return report(console)
    # Seed by seed, so that a grid that is cut short has every arm
    ordered = sorted(jobs, key=lambda job: job.seed_place)
    pending = [job for job in ordered if not is_done(job)]
    if args.dry_run:
        _print_commands(jobs, pending)
        return 0
    for job in pending:
        if model := job.settings.get("model_name_or_path"):
            check_model_name(model, job.recipe)
    options = _read_mapping(args.launcher_config) if args.launcher_config else {}
    _check_writable(folder)
    kept = len(jobs) - len(pending)
    console.print(f"{len(jobs)} runs in {folder}: {kept} done earlier and kept, {len(pending)} to do", soft_wrap=True)
    interrupted: KeyboardInterrupt | None = None
    if pending:
        launcher = make_launcher(args.launcher, folder, args.jobs, options)
        at_once = args.jobs or (1 if args.launcher == "local" else None)
        try:  # the report is there to look at before the last run is
            run_jobs(pending, launcher, at_once, console, draw)
        except KeyboardInterrupt as error:
            interrupted = error
        finally:
            launcher.close()
    status = report(console)
    if interrupted:
        raise interrupted
    return status


def _report(folder: Path, runs: Sequence[Run], console: Console, command: str) -> int:
    try:
        write_report(folder, runs, console, command)
    except OSError as error:
        print(
            f"ceu-rl compare: error: the report in {folder} cannot be written ({error.strerror}); the results of the "
            "runs are kept, and --report_only draws it again.",
            file=sys.stderr,
        )
        return 1
    return 1 if any(run.status in ("failed", "missing") for run in runs) else 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _raising_at_sigterm() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; ceu-rl compare --help shows how to call it.")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Path], dict[str, list[str]]]:
    """The options of the comparison, its recipes, and the fields of its grid.

    Raises:
        ValueError: for an option with a value of the wrong type, or what [`parse_fields`] refuses.
        SystemExit: after `--help`.
    """
    args, rest = _parser().parse_known_args([_underscored(word) for word in argv])
    if args.output_dir is not None and not args.output_dir.strip():
        raise ValueError(f"--output_dir is {args.output_dir!r}; give a folder.")
    args.output_dir = args.output_dir and Path(args.output_dir).expanduser()  # as a run does
    count = next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))
    recipes, fields = [Path(word) for word in rest[:count]], parse_fields(rest[count:])
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; use at least 1.")
    if args.report_only and not recipes:
        if args.output_dir is None:
            raise ValueError("--report_only needs recipes, or --output_dir with the runs.")
        if fields:
            raise ValueError(f"--{next(iter(fields))} is given without recipes; --report_only takes what lies there.")
    elif not recipes:
        raise ValueError("No recipe is given; write ceu-rl compare RECIPE.yaml ... --field value ...")
    return args, recipes, fields


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ceu-rl compare",
        usage="ceu-rl compare RECIPE.yaml ... [--any_field v1 v2 ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", help="default: runs/<method>-<folder of the first recipe>")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at the same time, which share the cores or GPUs; default: 1, or what the scheduler takes",
    )
    parser.add_argument("--accelerate_config", type=Path, help="launch each run through accelerate with this config")
    parser.add_argument("--method", choices=sorted(METHODS.values()), help="default: by the folder of the recipe")
    parser.add_argument("--retain", type=Path, help="TOFU: tofu_eval.json of the retain model, for forget quality")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where the runs run; default: local")
    parser.add_argument(
        "--launcher_config", type=Path, help="YAML: options of a Ray task, or parameters of submitit's AutoExecutor"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the command of each run, and run nothing")
    parser.add_argument(
        "--report_only", action="store_true", help="draw the report of what lies there; without recipes, of every run"
    )
    return parser


def parse_fields(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field of the grid, from `--field v1 v2 ...`.

    Raises:
        ValueError: for a word before the first field, a field without a value, given twice, or set by the comparison.
    """
    fields: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if name in fields:
                raise ValueError(f"--{name} is given twice; give all its values after one.")
            if name in RESERVED:
                raise ValueError(f"--{name} is given, which the comparison sets for each run; leave it out.")
            fields[name] = [value] if value else []
        elif not name:
            raise ValueError(f"{word!r} is no field; write recipes first, then --field value ...")
        else:
            fields[name].append(word)
    for name, values in fields.items():
        if not values:
            raise ValueError(f"--{name} has no value; give at least one.")
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} has a value twice ({' '.join(values)}); give each once.")
    return fields


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes().decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}; write `name: value` lines.")
    return {str(name): value for name, value in content.items()}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir.") from error


# the grid


def make_jobs(
    recipes: Sequence[Path],
    fields: Mapping[str, Sequence[str]],
    folder: Path,
    method: str | None = None,
    accelerate_config: Path | None = None,
    retain: Path | None = None,
) -> list[Job]:
    """The runs of the grid: the product of recipes, values of the fields and seeds, in this order.

    Each recipe is read here and never again.

    Raises:
        ValueError: for two recipes of one name, a recipe whose method cannot be told, or a field or value that its
            method does not take.
        OSError: for a recipe that cannot be read.
    """
    for path in (accelerate_config, retain):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file; check its name.")
    if retain is not None and isinstance(problem := read_outcome(retain), str):
        raise ValueError(f"--retain: {problem}")
    stems = [recipe.stem for recipe in recipes]
    if len(set(stems)) < len(stems):
        raise ValueError(f"Two recipes have one name among {[str(recipe) for recipe in recipes]}; rename one.")
    launcher = list(MODULE)
    if accelerate_config is not None:
        launcher += ["accelerate.commands.launch", "--config_file", str(accelerate_config), "-m"]
    return [
        job
        for recipe in recipes
        for job in _jobs_of(recipe, method or method_of(recipe), fields, folder / recipe.stem, launcher, retain)
    ]


def _jobs_of(
    recipe: Path,
    method: str,
    fields: Mapping[str, Sequence[str]],
    folder: Path,
    launcher: Sequence[str],
    retain: Path | None,
) -> list[Job]:
    if recipe.is_dir():
        raise ValueError(f"{recipe} is a folder; name a recipe in it.")
    content = {name: value for name, value in read_recipe(method, recipe).items() if name not in NO_SETTINGS}
    typed = {name: _typed(method, name, values) for name, values in fields.items()}
    grid = {name: values for name, values in fields.items() if name != "seed"}
    known = _setting_folders(folder, method) if grid else {}
    jobs = []
    for values in itertools.product(*grid.values()):
        overrides = dict(zip(grid, values, strict=True))
        changed = {name: typed[name][value] for name, value in overrides.items()}
        settings = {**content, **changed, "disable_tqdm": True}
        check_numbers(settings)
        if settings.get("learning_rate") == 0:
            raise ValueError(
                "learning_rate is 0, with which nothing is trained: the base before training is in every report; leave "
                "it out."
            )
        setting = {n: value for n, value in overrides.items() if len(grid[n]) > 1 or n == "learning_rate"}
        words = [word for name, value in overrides.items() for word in (f"--{name}", value)]
        seeds = typed["seed"].values() if "seed" in typed else [settings.get("seed", DEFAULT_SEED)]
        for place, seed in enumerate(seeds):
            at = folder / known.get(_key(changed), _setting_folder(overrides)) / str(seed)
            direct = [method, "--config", str(recipe), *words, "--seed", str(seed), "--output_dir", str(at)]
            job = Job(
                run=Run(recipe.stem, setting, seed, at),
                recipe=recipe,
                method=method,
                settings={**settings, "seed": seed},
                words=[*direct, "--disable_tqdm", "true"],
                seed_place=place,
                evaluation=_tofu_evaluation(recipe, settings, at, retain) if method == "unlearn" else None,
                retain=retain,
                launcher=launcher,
            )
            jobs.append(job)
    return jobs


def _typed(method: str, name: str, values: Sequence[str]) -> dict[str, Any]:
    """The values of a field by how they were written, each of the type that the method gives it."""
    typed: dict[str, Any] = {}
    for value in values:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                typed[value] = read_settings(method, [f"--{name}={value}"])[name]
        except SystemExit:  # argparse prints what is wrong
            message = (said.getvalue().strip().splitlines() or ["it is refused"])[-1].split(": error: ", 1)[-1]
            raise ValueError(f"--{name} {value}: {message}.") from None
    if len({_key(value) for value in typed.values()}) < len(values):
        raise ValueError(f"--{name} has a value twice ({' '.join(values)}); give each once.")
    return typed


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _setting_folders(folder: Path, method: str) -> dict[str, str]:
    """The folders of earlier calls by their typed settings: 1e-4 and 0.0001 are one setting."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*=*")):
        with contextlib.suppress(ValueError, KeyError):
            fields = setting_of_folder(path.name)
            found[_key({name: _typed(method, name, [value])[value] for name, value in fields.items()})] = path.name
    return found


def method_of(recipe: Path) -> str:
    """The command that trains a recipe, by the folder that it is in."""
    methods = [METHODS[part] for part in recipe.resolve().parts if part in METHODS]
    if not methods:
        raise ValueError(
            f"{recipe} is in no folder named {', '.join(METHODS)}, which says how to train it; give --method."
        )
    return methods[-1]


def _default_folder(recipe: Path, method: str | None) -> Path:
    return Path("runs", f"{method or method_of(recipe)}-{recipe.resolve().parent.name}")


def _setting_folder(overrides: Mapping[str, str]) -> str:
    return ",".join(f"{name}={quote(value, safe='+')}" for name, value in overrides.items()) or "recipe"


def setting_of_folder(name: str) -> dict[str, str]:
    """The overrides that a folder is named after; the reverse of how it is named."""
    parts = [part.partition("=") for part in name.split(",")] if "=" in name else []
    return {field: unquote(value) for field, _, value in parts}


def _tofu_evaluation(recipe: Path, settings: Mapping[str, Any], folder: Path, retain: Path | None) -> list[str] | None:
    dataset, forget = settings.get("dataset_name"), settings.get("forget", "forget10")
    if not dataset:
        raise ValueError(f"{recipe} has no dataset_name; give locuslab/TOFU, a folder, or builtin:authors.")
    if settings.get("dataset_config") is not None or not is_tofu(dataset) or forget not in SPLITS:
        return None
    words = ["tofu-eval", "--model", str(folder), "--dataset", str(dataset), "--split", forget]
    return words + (["--retain", str(retain)] if retain else [])


def _print_commands(jobs: Sequence[Job], pending: Sequence[Job]) -> None:
    """The commands that would make the runs without a comparison, ready for a shell; those of done ones as comments."""
    for job in jobs:
        mark = "" if job in pending else "# done: "
        for words in (job.words, job.evaluation):
            if words:
                module = [] if job.launcher == MODULE else [*job.launcher, "ceu_rl.cli"]
                print(mark + shlex.join([*module, *words] if module and words is job.words else ["ceu-rl", *words]))


# what lies there


def find_runs(folder: Path) -> list[Run]:
    """The runs that lie in the folder of a comparison, in the order of its last report, else stock first.

    Raises:
        ValueError: if there are none, or a folder's name says no number as its learning rate.
    """
    traces = (RESULT, FAILURE, LOG, TOFU_RESULT)
    places = sorted(path for path in folder.glob("*/*/*") if any((path / name).exists() for name in traces))
    places = [path for path in places if path.name.isdecimal()]
    if not places:
        raise ValueError(f"{folder} holds no runs; they lie in <arm>/<setting>/<seed>/.")
    settings = _spelled_alike({path: setting_of_folder(path.parent.name) for path in places})
    several = {"learning_rate"} | {
        name
        for setting in settings.values()
        for name in setting
        if len({each.get(name) for each in settings.values()}) > 1
    }
    runs = []
    for path, setting in settings.items():
        number = to_float(setting.get("learning_rate", 0))
        if number is None or not math.isfinite(number) or ("learning_rate" in setting and number <= 0):
            raise ValueError(f"{path.parent} names no number above 0 as its learning rate; move it away.")
        shown = {name: value for name, value in setting.items() if name in several}
        runs.append(Run(path.parent.parent.name, shown, int(path.name), path))
    order = _arms_of_report(folder)
    names = sorted(
        {run.arm for run in runs},
        key=lambda arm: (order.index(arm) if arm in order else len(order), arm != "stock", arm),
    )
    return sorted(runs, key=lambda run: names.index(run.arm))


def _spelled_alike(settings: Mapping[Path, Mapping[str, str]]) -> dict[Path, dict[str, str]]:
    """The same with one spelling for each number, as for 0.1 and .1: the first."""
    first: dict[tuple[str, Any], str] = {}
    found: dict[Path, dict[str, str]] = {}
    for path, setting in settings.items():
        found[path] = {}
        for name, value in setting.items():
            number = to_float(value)
            found[path][name] = first.setdefault((name, value if number is None else number), value)
    return found


def _arms_of_report(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "report.json").read_bytes())["runs"]
        return list(dict.fromkeys(str(run["arm"]) for run in found))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
