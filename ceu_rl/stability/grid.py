"""`ceu-rl compare`: a grid of recipes, overrides and seeds, each run its own process, and one report over all of them.

    ceu-rl compare RECIPE.yaml ... [--learning_rate 1e-5 3e-5] [--seed 0 1 2] [--any_field v1 v2] [--jobs 2]
    ceu-rl compare RECIPE.yaml ... --dry_run
    ceu-rl compare --report_only --output_dir DIR

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
import json
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .runs import EVALUATIONS, FAILURE, LOG, RECORD, RESULT, Run, find_runs, key_of, rate, read_json, write_whole

# What needs torch is imported where it is used: the process of each run imports this module too

RECIPE = "recipe.yaml"  # the settings that a comparison gave to the run
RESERVED = ("config", "output_dir", "resume_from_checkpoint")
DEFAULT_SEED = 42  # of transformers
MODULE = [sys.executable, "-m"]
LONGEST = 80  # characters of a folder's name


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def main(argv: Sequence[str]) -> int:
    """`ceu-rl compare`: 0 if each run finished or diverged, 1 if one failed, 130 for Ctrl-C, 143 for SIGTERM; raises a
    ValueError for bad input."""

    def terminate(*_: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    try:
        return _compare(argv, Console(), shlex.join(["ceu-rl", "compare", *argv]))
    except KeyboardInterrupt as error:
        print("ceu-rl compare: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130


def _compare(argv: Sequence[str], console: Console, command: str) -> int:
    from ..models import check_model_name
    from ..run.config import load_yaml, recipe_method
    from .launch import make_launcher, run_jobs

    args, recipes, fields = parse(argv)
    if args.report_only and not recipes:
        return _report(args.output_dir, find_runs(args.output_dir), console, command)
    folder = args.output_dir or Path("runs", f"{recipe_method(recipes[0])}-{recipes[0].resolve().parent.name}")
    jobs = make_jobs(recipes, fields, folder, args.accelerate_config, args.retain)

    def report(to: Console) -> int:
        return _report(folder, [job.found for job in jobs], to, command)

    if args.report_only:
        return report(console)
    # Seed by seed, so that a grid that is cut short has every arm
    pending = [job for job in sorted(jobs, key=lambda job: job.seed_place) if not is_done(job)]
    if args.dry_run:
        for job in jobs:
            _print_commands(job, "" if job in pending else "# done: ")
        return 0
    for job in pending:
        if model := job.settings.get("model_name_or_path"):
            check_model_name(model, job.recipe)
    options = {str(k): v for k, v in load_yaml(args.launcher_config).items()} if args.launcher_config else {}
    folder.mkdir(parents=True, exist_ok=True)
    kept = len(jobs) - len(pending)
    console.print(f"{len(jobs)} runs in {folder}: {kept} done earlier and kept, {len(pending)} to do", soft_wrap=True)
    try:
        if pending:  # the report is there to look at before the last run is
            launcher = make_launcher(args.launcher, folder, args.jobs, options)
            at_once = args.jobs or (1 if args.launcher == "local" else None)
            run_jobs(pending, launcher, at_once, console, lambda: report(Console(quiet=True)))
    except KeyboardInterrupt:
        report(console)
        raise
    return report(console)


def _report(folder: Path, runs: Sequence[Run], console: Console, command: str) -> int:
    """Draw the report; one that cannot be written ends no run, and the last one says why."""
    from .report import write_report

    try:
        write_report(folder, runs, console, command)
    except OSError as error:
        if not console.quiet:
            print(
                f"ceu-rl compare: error: the report in {folder} cannot be written ({error.strerror}); the results of "
                "the runs are kept, and --report_only draws it again.",
                file=sys.stderr,
            )
        return 1
    return 0 if all(run.status in ("finished", "diverged") for run in runs) else 1


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; ceu-rl compare --help shows how to call it.")


def _parser() -> argparse.ArgumentParser:
    from .launch import LAUNCHERS

    parser = _Parser(
        prog="ceu-rl compare",
        usage="ceu-rl compare RECIPE.yaml ... [--any_field v1 v2 ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    option("--report_only", action="store_true", help="draw the report again; without recipes, of every run there")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Path], dict[str, list[str]]]:
    """The options of the comparison, its recipes, and the values of each field of its grid.

    Raises:
        ValueError: for an option with a value of the wrong type, or a field without a value, given twice, or set by the
            comparison.
        SystemExit: after `--help`.
    """
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
    if not recipes and fields and args.report_only:
        raise ValueError(f"--{next(iter(fields))} is given without recipes; --report_only takes what lies there.")
    if not recipes and not (args.report_only and args.output_dir):
        raise ValueError("No recipe is given; write ceu-rl compare RECIPE.yaml ... --field value ...")
    return args, recipes, fields


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _print_commands(job: "Job", mark: str) -> None:
    """The commands that would make a run without a comparison, ready for a shell."""
    launched = ["ceu-rl"] if job.launcher == MODULE else [*job.launcher, "ceu_rl.cli"]
    print(mark + shlex.join([*launched, *job.words]))
    if job.evaluation:
        print(mark + shlex.join(["ceu-rl", *job.evaluation]))


# The grid


@dataclass(frozen=True)
class Job:
    """A run of the grid and how it is made."""

    run: Run
    recipe: Path
    overrides: Mapping[str, Any]  # the settings that the grid gives, but the seed
    text: str  # of the recipe that is stored in its folder
    words: Sequence[str]  # arguments of ceu-rl that would make it without a comparison
    seed_place: int
    evaluation: Sequence[str] | None  # arguments of ceu-rl for what is to be run after it
    retain: Path | None  # the retain model's result that its forget quality is computed against
    launcher: Sequence[str]  # the words before `ceu_rl.cli`

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.run.planned["settings"]

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def found(self) -> Run:
        """The run as it lies in its folder now."""
        return replace(self.run)


def make_jobs(
    recipes: Sequence[Path],
    fields: Mapping[str, Sequence[str]],
    folder: Path,
    accelerate_config: Path | None = None,
    retain: Path | None = None,
) -> list[Job]:
    """The runs of the grid: the product of recipes, values of the fields and seeds, in this order.

    Each recipe is read here and never again.

    Raises:
        ValueError: for two recipes of one name, a recipe without its method, or a field or value that its method does
            not take.
        OSError: for a recipe that cannot be read.
    """
    for path in (accelerate_config, retain):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file; check its name.")
    if retain is not None:
        read_json(retain)
    stems = [recipe.stem for recipe in recipes]
    if len(set(stems)) < len(stems):
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

    if recipe.is_dir():
        raise ValueError(f"{recipe} is a folder; name a recipe in it.")
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
        for place, seed in enumerate(seeds):
            settings = {**content, **overrides, "disable_tqdm": True, "seed": seed}
            check_numbers(settings)
            if settings.get("learning_rate") == 0:
                raise ValueError("learning_rate is 0, which trains nothing; leave it out: every report shows the base.")
            at = folder / known.get(key_of(overrides), folder_name(setting)) / str(seed)
            direct = [method, "--config", str(recipe), *words, "--seed", str(seed), "--output_dir", str(at)]
            yield Job(
                run=Run(
                    recipe.stem, setting, seed, at, {"method": method, "recipe": str(recipe), "settings": settings}
                ),
                recipe=recipe,
                overrides=overrides,
                text=dump_recipe({"method": method, **settings}),
                words=[*direct, "--disable_tqdm", "true"],
                seed_place=place,
                evaluation=_evaluation(recipe, settings, at, retain) if method == "unlearn" else None,
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
    """A short and safe name for what varies, such as `learning_rate=3e-5`; what had to be cut gets a hash."""
    parts = []
    for name, value in setting.items():
        text = rate(value) if name == "learning_rate" else str(value)
        safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)[-40:]
        parts.append(f"{name}={safe}" + ("" if safe == text else f"-{_hash(value)}"))
    text = ",".join(parts) or "recipe"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}-{_hash(setting)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(key_of(value).encode()).hexdigest()[:8]


def _known_settings(folder: Path) -> dict[str, str]:
    """The folders of earlier calls by their overrides: a grid that grows keeps them, whatever varies now."""
    found = {}
    for path in sorted(folder.glob(f"*/*/{RECORD}")):
        with contextlib.suppress(ValueError):
            found[key_of((read_json(path) or {}).get("overrides"))] = path.parent.parent.name
    return found


def _evaluation(recipe: Path, settings: Mapping[str, Any], folder: Path, retain: Path | None) -> list[str] | None:
    from ..tasks import articles
    from ..tofu.data import SPLITS, is_tofu

    dataset, forget = settings.get("dataset_name"), settings.get("forget", "forget10")
    if not dataset:
        raise ValueError(f"{recipe} has no dataset_name; give locuslab/TOFU, a folder, or builtin:authors.")
    words = ["--model", str(folder), "--dataset", str(dataset)]
    if dataset == articles.NAME or str(dataset).startswith("muse-bench/"):
        return ["muse-eval", *words]
    if settings.get("dataset_config") is not None or not is_tofu(dataset) or forget not in SPLITS:
        return None
    return ["tofu-eval", *words, "--split", forget] + (["--retain", str(retain)] if retain else [])


# What is left to do for a run


def is_done(job: Job) -> bool:
    """Whether nothing is left to do for a run: it finished and was evaluated, or it diverged.

    Raises:
        ValueError: for a run that was made or begun with other settings; one that failed with them starts again.
    """
    found = job.found
    records = {name: found.record(name) for name in (RESULT, FAILURE, RECORD)}
    failed = records[FAILURE] and not records[FAILURE].get("diverged")
    name = next((name for name, record in records.items() if record.get("settings") is not None), None)
    if name and not failed and _is_begun(job.folder):
        if other := _others(job.settings, records[name]["settings"]):
            raise ValueError(
                f"{job.folder / name} was made with other settings ({', '.join(other)}); choose another --output_dir, "
                "or give these."
            )
    return found.status == "diverged" or (found.status == "finished" and not _lacks_evaluation(job))


def _is_begun(folder: Path) -> bool:
    """As `run.checkpoints.traces`, without torch."""
    return any(any(folder.glob(name)) for name in ("checkpoint-*", RESULT, LOG, "*.safetensors"))


def _others(ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """The fields in which recorded settings are not those of a job: by value and type, not by how they were written."""
    old, new = (json.loads(key_of(dict(each))) for each in (recorded, ours))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in names]


def _lacks_evaluation(job: Job) -> list[Sequence[str]]:
    """The commands of ceu-rl that evaluate what was trained, as far as that is not done; a retain model may come with
    a later call."""
    if job.evaluation is None:
        return []
    path = job.folder / next(name for name in EVALUATIONS if name.startswith(job.evaluation[0].split("-")[0]))
    found = job.found.record(path.name)
    if not found or not found.get("summary"):
        return [job.evaluation]
    known = found.get("retain")
    if job.retain is None or (known and Path(known).resolve() == job.retain.resolve()):
        return []
    return [["tofu-eval", "--results", str(path), "--retain", str(job.retain)]]


def commands_of(job: Job) -> list[list[str]]:
    """What is left to do for a run; its folder is made ready for it, with a record and the recipe that it trains by."""
    if is_done(job):
        return []
    commands, folder, trained = [], job.folder, job.found.record(RESULT)
    if not trained or trained.get("steps") == 0:
        words = [job.words[0], "--config", str(folder / RECIPE), "--output_dir", str(folder), *_resume(job)]
        commands = [[*job.launcher, "ceu_rl.cli", *words]]
    commands += [[*MODULE, "ceu_rl.cli", *words] for words in _lacks_evaluation(job)]
    for path in (folder / name for name in EVALUATIONS):
        if path.is_file() and not job.found.record(path.name):  # one that cannot be used
            path.rename(path.with_name(f"{path.name}.broken"))
    record = {"arm": job.run.arm, "seed": job.run.seed, **job.run.planned, "overrides": dict(job.overrides)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole({folder / RECIPE: job.text, folder / RECORD: json.dumps(record, indent=2, default=str) + "\n"})
    (folder / FAILURE).unlink(missing_ok=True)
    return commands


def _resume(job: Job) -> list[str]:
    """How to continue what an interrupted run left; what cannot be continued is moved aside, never deleted."""
    folder, record = job.folder, job.found.record(RECORD)
    if not _is_begun(folder):
        return []
    from ..run.checkpoints import missing_states, saved_checkpoints

    same = bool(record) and not _others(job.settings, record.get("settings") or {})
    last = [path for _, path in saved_checkpoints(folder)][-1:]
    if same and last and not missing_states(last[0]):
        return ["--resume_from_checkpoint", "true"]
    number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}-interrupted-{i}").exists())
    folder.rename(folder.with_name(f"{folder.name}-interrupted-{number}"))
    return []
