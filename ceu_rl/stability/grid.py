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
import math
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import filelock
from rich.console import Console

# What needs torch is imported where it is used: the process of each run imports this module too

RECIPE = "recipe.yaml"  # the settings that a comparison gave to the run
RESERVED = ("config", "output_dir", "resume_from_checkpoint")
ALIASES = {"dataset": "dataset_name", "model": "model_name_or_path"}
DEFAULT_SEED = 42  # of transformers
MODULE = [sys.executable, "-m"]
LONGEST = 80  # characters of a folder's name
RECORD, RESULT, FAILURE = "run.json", "result.json", "failure.json"
LOG, HELD_OUT, EVALUATIONS = "metrics.jsonl", "held_out.jsonl", ("tofu_eval.json", "muse_eval.json")
STATUSES = ("finished", "diverged", "failed", "running", "interrupted", "waiting")
LOST = ("eval_loss", "eval_logps/chosen", "eval_logps/rejected", "eval_reward", "eval_kl", "eval_solutions_nll")
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("settings", "metrics", "eval_tokens", "versions", "summary", "base"), dict),
    **dict.fromkeys(("wall_time_s", "peak_memory_gib"), (int, float)),
    **dict.fromkeys(("method", "command", "date", "device", "reason", "retain"), str),
    **{"steps": int, "diverged": bool, "resumed": bool, "log_tail": list},
}


def main(argv: Sequence[str]) -> int:
    """`ceu-rl compare`: 0 if each run finished or diverged, 1 if one failed, 130 for Ctrl-C, 143 for SIGTERM; raises a
    ValueError for bad input."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _compare(argv, Console(), shlex.join(["ceu-rl", "compare", *argv]))
    except KeyboardInterrupt as error:
        print("ceu-rl compare: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130


def _compare(argv: Sequence[str], console: Console, command: str) -> int:
    from ..models import check_model_name
    from ..run.config import recipe_method
    from .launch import make_launcher, run_jobs

    args, recipes, fields = parse(argv)
    if args.report_only and not recipes:
        return _report(args.output_dir, find_runs(args.output_dir), console, command)
    folder = args.output_dir or Path("runs", f"{recipe_method(recipes[0])}-{recipes[0].resolve().parent.name}")
    jobs = make_jobs(recipes, fields, folder, args.accelerate_config, args.retain)

    def report(to: Console) -> int:
        return _report(folder, [job.found for job in jobs], to, command)

    def draw() -> None:  # a report that cannot be written ends no run; the last one says why
        with contextlib.suppress(OSError, ValueError):
            report(Console(quiet=True))

    if args.report_only:
        return report(console)
    # Seed by seed, so that a grid that is cut short has every arm
    pending = [job for job in sorted(jobs, key=lambda job: job.seed_place) if not is_done(job)]
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
    status = report(console)
    if interrupted:
        raise interrupted
    return status


def _report(folder: Path, runs: Sequence["Run"], console: Console, command: str) -> int:
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


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


# The command line


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
    from .launch import LAUNCHERS

    parser = _Parser(
        prog="ceu-rl compare",
        usage="ceu-rl compare RECIPE.yaml ... [--any_field v1 v2 ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", help="default: runs/<folder of the first recipe>")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at the same time, which share the cores or GPUs; default: 1, or what the scheduler takes",
    )
    parser.add_argument("--accelerate_config", type=Path, help="launch each run through accelerate with this config")
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
            name = ALIASES.get(name, name)
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
    from ..run.config import _load_yaml

    return {str(name): value for name, value in _load_yaml(path).items()}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir.") from error


def _print_commands(jobs: Sequence["Job"], pending: Sequence["Job"]) -> None:
    """The commands that would make the runs without a comparison, ready for a shell; those of done ones as comments."""
    for job in jobs:
        mark = "" if job in pending else "# done: "
        launched = [] if job.launcher == MODULE else [*job.launcher, "ceu_rl.cli"]
        print(mark + shlex.join([*(launched or ["ceu-rl"]), *job.words]))
        if job.evaluation:
            print(mark + shlex.join(["ceu-rl", *job.evaluation]))


# One run, as it lies in its folder


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(path: Path) -> dict[str, Any] | None:
    """A record of a run; None where there is none.

    Raises:
        ValueError: with the file, for what is cut short or of another form.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is empty, cut short or no JSON ({str(error)[:80]}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {str(found)[:40]}, no mapping.")
    for name, kind in TYPES.items():
        value = found.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ValueError(f"{path}: {name} is {str(value)[:40]!r}, of another type.")
    for name in ("metrics", "summary", "eval_tokens"):
        for key, value in (found.get(name) or {}).items():
            if value is not None and not is_number(value) and key.startswith(("eval_", "forget_", "model_", "chosen")):
                raise ValueError(f"{path}: {name}.{key} is {str(value)[:40]!r}, not a number.")
    return found


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        arm: The stem of its recipe, such as stock.
        setting: The fields of the grid that vary, such as `{"learning_rate": 3e-5}`.
        seed: Its seed.
        folder: Where it left what it logged and its result.
        planned: What is known of it before it starts, as in `run.json`.
    """

    arm: str
    setting: Mapping[str, Any]
    seed: int
    folder: Path
    planned: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _records(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        found, problems = {}, []
        for name in (RESULT, FAILURE, RECORD, *EVALUATIONS):
            try:
                if (content := read_json(self.folder / name)) is not None:
                    found[name] = {key: value for key, value in content.items() if key not in ("items", "rows")}
            except ValueError as error:
                problems.append(str(error))
        return found, problems

    def record(self, name: str) -> dict[str, Any] | None:
        return self._records[0].get(name)

    @property
    def outcome(self) -> Mapping[str, Any]:
        return self.record(RESULT) or self.record(FAILURE) or self.record(RECORD) or self.planned

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.outcome.get("settings") or {}

    @property
    def method(self) -> str | None:
        return self.outcome.get("method")

    @property
    def rate(self) -> float:
        """Its learning rate; NaN where none was set."""
        value = self.setting.get("learning_rate", self.settings.get("learning_rate"))
        return float(value) if is_number(value) else math.nan

    @property
    def condition(self) -> dict[str, Any]:
        """Its setting without the learning rate."""
        return {name: value for name, value in self.setting.items() if name != "learning_rate"}

    @property
    def summary(self) -> dict[str, float]:
        """What its evaluation after training found."""
        found = [(self.record(name) or {}).get("summary") for name in EVALUATIONS]
        return next(filter(None, found), {})

    @cached_property
    def status(self) -> str:
        """One of `STATUSES`; diverged is a loss, a gradient or a final evaluation that is not finite."""
        result, failure = self.record(RESULT), self.record(FAILURE)
        if failure and failure.get("diverged"):
            return "diverged"
        if self._records[1] or failure:
            return "failed"
        if result:
            return "failed" if result.get("steps") == 0 else "diverged" if self._not_finite else "finished"
        return "running" if self.is_running else "interrupted" if self.steps else "waiting"

    @property
    def is_running(self) -> bool:
        """Whether a process holds its lock."""
        if not lock_of(self.folder).exists():
            return False
        try:
            with filelock.FileLock(lock_of(self.folder), timeout=0):
                return False
        except (filelock.Timeout, OSError) as error:
            return isinstance(error, filelock.Timeout)

    @property
    def _not_finite(self) -> str | None:
        metrics = (self.record(RESULT) or {}).get("metrics") or {}
        found = ((key, metrics.get(key)) for key in LOST)
        return next((f"{k} ({v})" for k, v in found if isinstance(v, float) and not math.isfinite(v)), None)

    @property
    def steps(self) -> int:
        """The last step that it logged."""
        return max((entry["step"] for entry in self.log), default=0)

    @property
    def reason(self) -> str | None:
        """Why there is no result; None if there is."""
        failure, of = self.record(FAILURE) or {}, self.settings.get("max_steps", -1)
        match self.status:
            case "finished":
                return None
            case "running":
                return f"It is at step {self.steps}" + (f" of {of}." if is_number(of) and of > 0 else ".")
            case "interrupted":
                return f"Its log ends at step {self.steps}; the same command continues it."
            case "waiting":
                return "It has not started."
        if self._records[1]:
            return " ".join(self._records[1])
        if failure:
            return str(failure.get("reason") or f"It ended with exit status {failure.get('status')}.")
        if self._not_finite:
            return f"Its last evaluation met a non-finite {self._not_finite}."
        return "It ended after 0 steps, so nothing was trained."

    @property
    def log(self) -> list[dict[str, Any]]:
        return self._log[0]

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return self._held_out[0]

    @property
    def log_problem(self) -> str | None:
        """What is left out of its log and of its held-out rows, and why."""
        return " ".join(filter(None, (self._log[1], self._held_out[1]))) or None

    @cached_property
    def _log(self) -> tuple[list[dict[str, Any]], str | None]:
        return _read_lines(self.folder / LOG, lambda key: key.startswith(("eval_", "ceu/", "loss", "grad_norm")), ())

    @cached_property
    def _held_out(self) -> tuple[list[dict[str, Any]], str | None]:
        return _read_lines(self.folder / HELD_OUT, lambda key: key not in ("dataset",), ("row",))


def lock_of(folder: Path) -> Path:
    """What a process holds while it works on a run."""
    return folder.with_name(f"{folder.name}.lock")


def _read_lines(
    path: Path, is_read: Callable[[str], bool], needed: Sequence[str]
) -> tuple[list[dict[str, Any]], str | None]:
    """The lines of a log; a last one that a kill cut short is left out, others that are no entry are named."""
    try:
        *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror})."
    entries, bad = [], []
    for number, line in enumerate([*lines, last], 1):
        try:
            entry = json.loads(line)
            step = entry["step"]
            wrong = [k for k in entry if is_read(k) and entry[k] is not None and not is_number(entry[k])]
            if not is_number(step) or step != int(step) or abs(step) >= 2**53 or wrong:
                raise ValueError(f"its {wrong[0] if wrong else 'step'} is {entry[wrong[0]] if wrong else step!r}")
            if any(name not in entry for name in needed):
                raise ValueError(f"it has no {needed[0]}")
            entries.append({**entry, "step": int(step)})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if line.strip() and number <= len(lines):
                bad.append((number, " ".join(str(error).split())[:80]))
    if not bad:
        return entries, None
    lines_ = "line" if len(bad) == 1 else f"{len(bad)} lines, the first of them line"
    return entries, f"{path} is read without {lines_} {bad[0][0]}: {bad[0][1]}."


# The grid


@dataclass(frozen=True)
class Job:
    """A run of the grid and how it is made."""

    run: Run
    recipe: Path
    method: str  # the command of ceu-rl that trains it
    settings: Mapping[str, Any]  # typed
    overrides: Mapping[str, Any]  # those of the settings that the grid gives, without the seed
    text: str  # of the recipe that is stored in its folder
    words: Sequence[str]  # arguments of ceu-rl that would make it without a comparison
    seed_place: int
    evaluation: Sequence[str] | None  # arguments of ceu-rl for what is to be run after it
    retain: Path | None  # the retain model's result that its forget quality is computed against
    launcher: Sequence[str]  # the words before `ceu_rl.cli`

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def name(self) -> str:
        return str(Path(*self.folder.parts[-3:]))

    @property
    def found(self) -> Run:
        """The run as it lies in its folder now."""
        return replace(self.run)

    @property
    def command(self) -> list[str]:
        """Arguments of ceu-rl that make it from its stored settings."""
        return [self.method, "--config", str(self.folder / RECIPE), "--output_dir", str(self.folder)]


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
) -> list[Job]:
    from ..run.checks import check_numbers
    from ..run.config import dump_recipe, read_recipe, recipe_method, settings_of

    if recipe.is_dir():
        raise ValueError(f"{recipe} is a folder; name a recipe in it.")
    method = recipe_method(recipe)
    content = settings_of(read_recipe(method, recipe))
    typed = {name: _typed(method, name, values) for name, values in fields.items()}
    grid = {name: values for name, values in fields.items() if name != "seed"}
    known, jobs = _known_settings(folder), []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        overrides = {name: typed[name][value] for name, value in given.items()}
        settings = {**content, **overrides, "disable_tqdm": True}
        check_numbers(settings)
        if settings.get("learning_rate") == 0:
            raise ValueError("learning_rate is 0, which trains nothing; leave it out: every report shows the base.")
        setting = {n: value for n, value in overrides.items() if len(grid[n]) > 1 or n == "learning_rate"}
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        seeds = typed["seed"].values() if "seed" in typed else [settings.get("seed", DEFAULT_SEED)]
        for place, seed in enumerate(seeds):
            at = folder / known.get(_key(overrides), folder_name(setting)) / str(seed)
            direct = [method, "--config", str(recipe), *words, "--seed", str(seed), "--output_dir", str(at)]
            stored = {**settings, "seed": seed}
            planned = {"method": method, "recipe": str(recipe), "settings": stored}
            job = Job(
                run=Run(recipe.stem, setting, seed, at, planned),
                recipe=recipe,
                method=method,
                settings=stored,
                overrides=overrides,
                text=dump_recipe({"method": method, **stored}),
                words=[*direct, "--disable_tqdm", "true"],
                seed_place=place,
                evaluation=_evaluation(recipe, settings, at, retain) if method == "unlearn" else None,
                retain=retain,
                launcher=launcher,
            )
            jobs.append(job)
    return jobs


def _typed(method: str, name: str, values: Sequence[str]) -> dict[str, Any]:
    """The values of a field by how they were written, each of the type that the method gives it."""
    from ..run.config import read_settings

    typed: dict[str, Any] = {}
    for value in values:
        try:
            typed[value] = read_settings(method, [f"--{name}={value}"])[name]
        except ValueError as error:
            raise ValueError(f"--{name} {value}: {error}") from None
    if len({_key(value) for value in typed.values()}) < len(values):
        raise ValueError(f"--{name} has a value twice ({' '.join(values)}); give each once.")
    return typed


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def folder_name(setting: Mapping[str, Any]) -> str:
    """A short and safe name for what varies, such as `learning_rate=3e-5`; what had to be cut gets a hash."""
    parts = []
    for name, value in setting.items():
        text = rate(value) if name == "learning_rate" else str(value)
        safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)[-40:]
        parts.append(f"{name}={safe}" + ("" if safe == text else f"-{_hash(value)}"))
    text = ",".join(parts) or "recipe"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}-{_hash(setting)}"


def rate(value: float) -> str:
    """A learning rate as people write it: 3e-05 is 3e-5."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(_key(value).encode()).hexdigest()[:8]


def _known_settings(folder: Path) -> dict[str, str]:
    """The folders of earlier calls by their overrides: a grid that grows keeps them, whatever varies now."""
    found = {}
    for path in sorted(folder.glob(f"*/*/{RECORD}")):
        with contextlib.suppress(ValueError):
            found[_key((read_json(path) or {}).get("overrides"))] = path.parent.parent.name
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
    records = {name: found.record(name) or {} for name in (RESULT, FAILURE, RECORD)}
    failed = records[FAILURE] and not records[FAILURE].get("diverged")
    name = next((name for name, record in records.items() if record.get("settings") is not None), None)
    if name and not failed and _is_begun(job.folder):
        if other := _others(job.settings, records[name]["settings"]):
            raise ValueError(
                f"{job.folder / name} was made with other settings ({', '.join(other)}); choose another --output_dir, "
                "or give these."
            )
    return found.status == "diverged" or (found.status == "finished" and not lacks_evaluation(job))


def _is_begun(folder: Path) -> bool:
    """As `run.checkpoints.traces`, without torch."""
    return any(any(folder.glob(name)) for name in ("checkpoint-*", RESULT, LOG, "*.safetensors"))


def _others(ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """The fields in which recorded settings are not those of a job: by value and type, not by how they were written."""
    plain = [json.loads(_key(dict(each))) for each in (recorded, ours)]
    return [
        f"{name}: {plain[0].get(name)!r}, now {plain[1].get(name)!r}"
        for name in dict.fromkeys([*plain[0], *plain[1]])
        if plain[0].get(name) != plain[1].get(name)
    ]


def lacks_evaluation(job: Job) -> list[Sequence[str]]:
    """The commands of ceu-rl that evaluate what was trained, as far as that is not done; it may come with a retain
    model after that."""
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


def prepare_folder(job: Job) -> list[str]:
    """How to continue what an interrupted run left; what cannot be continued is moved aside, never deleted."""
    folder, found = job.folder, job.found
    if not _is_begun(folder):
        return []
    from ..run.checkpoints import missing_states, saved_checkpoints

    same = found.record(RECORD) is not None and not _others(
        job.settings, (found.record(RECORD) or {}).get("settings") or {}
    )
    last = [path for _, path in saved_checkpoints(folder)][-1:]
    resume = ["--resume_from_checkpoint", "true"] if same and last and not missing_states(last[0]) else []
    if not resume:
        number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}-interrupted-{i}").exists())
        folder.rename(folder.with_name(f"{folder.name}-interrupted-{number}"))
    return resume


def write_record(job: Job) -> None:
    """Store what a run is and the recipe that it trains by."""
    folder = job.folder
    folder.mkdir(parents=True, exist_ok=True)
    about = {"arm": job.run.arm, "seed": job.run.seed, "method": job.method, "recipe": str(job.recipe)}
    record = {**about, "overrides": dict(job.overrides), "settings": dict(job.settings)}
    for name, text in ((RECIPE, job.text), (RECORD, json.dumps(record, indent=2, default=str) + "\n")):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


# What lies there


def find_runs(folder: Path) -> list[Run]:
    """The runs that lie in the folder of a comparison, in the order of its last report, else stock first.

    Raises:
        ValueError: if there are none, or a record has no number as its learning rate.
    """
    records: dict[Path, dict[str, Any]] = {}
    for path in (path for path in sorted(folder.glob(f"*/*/*/{RECORD}")) if path.parent.name.isdecimal()):
        records[path.parent] = {}
        with contextlib.suppress(ValueError):  # the run says it
            records[path.parent] = read_json(path) or {}
    if not records:
        old = next(folder.glob(f"*/*/*/{RESULT}"), None)
        why = f"; {old.parent} was made by an earlier version, which left no {RECORD}" if old else ""
        raise ValueError(f"{folder} holds no runs; they lie in <arm>/<what varies>/<seed>/{RECORD}{why}.")
    overrides = {path: dict(record.get("overrides") or {}) for path, record in records.items()}
    several = {"learning_rate"} | {
        name
        for each in overrides.values()
        for name in each
        if len({_key(other.get(name)) for other in overrides.values()}) > 1
    }
    for path, each in overrides.items():
        value = each.get("learning_rate", 1.0)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{path / RECORD}: learning_rate is {value!r}, no number above 0; move the folder away.")
    runs = [
        Run(path.parent.parent.name, {n: v for n, v in overrides[path].items() if n in several}, int(path.name), path)
        for path in records
    ]
    order = _arms_of_report(folder)
    place = {
        arm: (order.index(arm) if arm in order else len(order), arm != "stock", arm) for arm in {r.arm for r in runs}
    }
    return sorted(runs, key=lambda run: place[run.arm])


def _arms_of_report(folder: Path) -> list[str]:
    try:
        return [str(arm["name"]) for arm in json.loads((folder / "report.json").read_bytes())["arms"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
