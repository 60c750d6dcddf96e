"""`ceu-rl compare`: a grid of recipes, overrides and seeds, each run its own process, and one report over all of them.

    ceu-rl compare RECIPE.yaml ... [--learning_rate 1e-5 3e-5] [--seed 0 1 2] [--any_field v1 v2] [--jobs 2]

Each recipe is an arm, named after its file; the first is what the others are compared with. A run lies in
`OUTPUT_DIR/<arm>/<setting>/<seed>/`. Call it again to go on: finished runs are kept, a run that an earlier call left
training is waited for, an interrupted one goes on from its last checkpoint, and a failed one starts again. A run that
stopped at a non-finite loss has diverged, which is a result and is kept.
"""

import argparse
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..checks import saved_checkpoints
from ..provenance import environment, write_json
from ..recipe import read_settings
from ..tofu.data import SPLITS, is_tofu
from ..tofu.evaluate import RESULT as TOFU_RESULT
from .report import write_report
from .runs import Run

METHODS = {"dpo": "dpo", "grpo": "grpo", "tofu": "unlearn"}  # by the folder that a recipe is in
RESERVED = ("config", "output_dir", "resume_from_checkpoint")
LOG, FAILURE = "log.txt", "failure.json"
LOG_TAIL = 15  # lines
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Job:
    """A run of the grid and how it is made."""

    run: Run
    command: list[str]  # arguments of ceu-rl
    seed_place: int
    max_steps: int | None
    evaluation: list[str] | None  # arguments of ceu-rl for what is to be run after it
    launcher: list[str]

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def found(self) -> Run:
        """The run as it lies in its folder now."""
        return replace(self.run)


def main(argv: Sequence[str]) -> int:
    """`ceu-rl compare`: 0 if each run finished or diverged, 1 if one failed, 2 for bad input, 130 for Ctrl-C."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    console = Console()
    try:
        fields = parse_fields(rest)
        folder = args.output_dir or _default_folder(args.recipes[0], args.method)
        jobs = make_jobs(args.recipes, fields, folder, args.method, args.accelerate_config, args.retain)
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; use at least 1.")
        # Seed by seed, so that a grid that is cut short has every arm
        ordered = sorted(jobs, key=lambda job: job.seed_place)
        pending = [job for job in ordered if not is_done(job)]
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"ceu-rl compare: error: {error}", file=sys.stderr)
        return 2
    kept = len(jobs) - len(pending)
    console.print(f"{len(jobs)} runs in {folder}: {kept} done earlier and kept, {len(pending)} to do", soft_wrap=True)
    interrupted = False
    try:
        run_jobs(pending, args.jobs, console)
    except KeyboardInterrupt:
        interrupted = True
    runs = [job.found for job in jobs]
    write_report(folder, runs, console, shlex.join(["ceu-rl", "compare", *argv]))
    if interrupted:
        print("ceu-rl compare: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 1 if any(run.status in ("failed", "missing") for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceu-rl compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--output_dir", type=Path, help="default: runs/<method>-<folder of the first recipe>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores or GPUs")
    parser.add_argument("--accelerate_config", type=Path, help="launch each run through accelerate with this config")
    parser.add_argument("--method", choices=sorted(METHODS.values()), help="default: by the folder of the recipe")
    parser.add_argument("--retain", type=Path, help="TOFU: tofu_eval.json of the retain model, for forget quality")
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


def make_jobs(
    recipes: Sequence[Path],
    fields: Mapping[str, Sequence[str]],
    folder: Path,
    method: str | None = None,
    accelerate_config: Path | None = None,
    retain: Path | None = None,
) -> list[Job]:
    """The runs of the grid: the product of recipes, values of the fields and seeds, in this order.

    Raises:
        ValueError: for two recipes of one name, or a recipe whose method cannot be told.
        OSError: for a recipe that cannot be read.
    """
    for path in (accelerate_config, retain):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file; check its name.")
    stems = [recipe.stem for recipe in recipes]
    if len(set(stems)) < len(stems):
        raise ValueError(f"Two recipes have one name among {[str(recipe) for recipe in recipes]}; rename one.")
    grid = {name: values for name, values in fields.items() if name != "seed"}
    launcher = [sys.executable, "-m"]
    if accelerate_config is not None:
        launcher += ["accelerate.commands.launch", "--config_file", str(accelerate_config), "-m"]
    jobs = []
    for recipe in recipes:
        content = yaml.safe_load(recipe.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{recipe} holds no fields; write field: value lines.")
        trained_by = method or method_of(recipe)
        for values in itertools.product(*grid.values()):
            overrides = dict(zip(grid, values, strict=True))
            settings = {**content, **overrides}
            for place, seed in enumerate(fields.get("seed", [str(settings.get("seed", 42))])):
                run = Run(
                    arm=recipe.stem,
                    setting={
                        name: value
                        for name, value in overrides.items()
                        if len(grid[name]) > 1 or name == "learning_rate"
                    },
                    seed=int(seed),
                    folder=folder / recipe.stem / _setting_folder(overrides) / seed,
                )
                words = [word for name, value in overrides.items() for word in (f"--{name}", value)]
                jobs.append(
                    Job(
                        run=run,
                        command=[
                            *(trained_by, "--config", str(recipe), *words, "--seed", seed),
                            *("--output_dir", str(run.folder), "--disable_tqdm", "true"),
                        ],
                        seed_place=place,
                        max_steps=int(settings["max_steps"]) if "max_steps" in settings else None,
                        evaluation=_tofu_evaluation(settings, run.folder, retain) if trained_by == "unlearn" else None,
                        launcher=launcher,
                    )
                )
    return jobs


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


def _tofu_evaluation(settings: Mapping[str, Any], folder: Path, retain: Path | None) -> list[str] | None:
    forget = settings.get("forget", "forget10")
    if settings.get("dataset_config") is not None or not is_tofu(settings["dataset_name"]) or forget not in SPLITS:
        return None
    words = ["tofu-eval", "--model", str(folder), "--dataset", str(settings["dataset_name"]), "--split", forget]
    return words + (["--retain", str(retain)] if retain else [])


def is_done(job: Job) -> bool:
    """Whether nothing is left to do for a run: it finished and was evaluated, or it diverged.

    Raises:
        ValueError: for a result that was made with other settings than the recipe has now.
    """
    for name in ("result.json", FAILURE):
        path = job.folder / name
        if path.is_file() and json.loads(path.read_text())["settings"] != read_settings(
            job.command[0], job.command[1:]
        ):
            if name == FAILURE:
                return False
            raise ValueError(
                f"{path} was made with other settings than the recipe has now; choose another --output_dir."
            )
    if job.found.status == "finished":
        return job.evaluation is None or (job.folder / TOFU_RESULT).is_file()
    return job.found.status == "diverged"


def run_jobs(jobs: Sequence[Job], at_once: int, console: Console) -> None:
    """Run every job, `at_once` of them at the same time, and show how far they are and how long it will take."""
    if not jobs:
        return
    variables = dict(os.environ)
    if at_once > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    stop = threading.Event()
    active: dict[int, Job] = {}  # by the slot that it runs in
    slots = list(range(at_once))

    def work(job: Job) -> str:
        slot = slots.pop()
        active[slot] = job
        try:
            return run_job(job, _on_device(variables, slot, at_once), stop)
        finally:
            del active[slot]
            slots.append(slot)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    overall = Progress(*columns, TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), console=console)
    with overall as progress, ThreadPoolExecutor(at_once) as pool:
        task = progress.add_task("runs", total=len(jobs))
        lines = [progress.add_task("", total=None, visible=False) for _ in range(at_once)]
        futures = {pool.submit(work, job): job for job in jobs}
        remaining = set(futures)
        try:
            while remaining:
                done, remaining = wait(remaining, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = f"{_name(futures[future])}: {future.result()}"
                    progress.console.print(outcome, soft_wrap=True, markup=False, highlight=False)
                shares = 0.0
                for slot, line in enumerate(lines):
                    job = active.get(slot)
                    step = _last_step(job.folder) if job else 0
                    total = job.max_steps if job else None
                    shares += min(step / total, 1.0) if total else 0.0
                    progress.update(
                        line, description=_name(job) if job else "", completed=step, total=total, visible=bool(job)
                    )
                progress.update(task, completed=len(jobs) - len(remaining) + shares)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _name(job: Job) -> str:
    return str(Path(job.folder.parent.parent.name, job.folder.parent.name, job.folder.name))


def _on_device(variables: Mapping[str, str], slot: int, at_once: int) -> dict[str, str]:
    """Runs at the same time take the visible GPUs in turn."""
    import torch

    if at_once == 1 or not torch.cuda.is_available():
        return dict(variables)
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {**variables, "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}


def _last_step(folder: Path) -> int:
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            lines = file.read().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError, KeyError):  # not there yet, or a line that is being written
        return 0


def run_job(job: Job, variables: Mapping[str, str], stop: threading.Event) -> str:
    """Train one run, and evaluate it where that is asked for, as processes of their own; says what came out."""
    with _lock(job.folder, stop) as lock:
        if lock is None:
            return "not started"
        if is_done(job):  # by the process that was waited for
            return f"{job.found.status}, by an earlier call"
        (job.folder / FAILURE).unlink(missing_ok=True)
        commands = []
        if job.found.status != "finished":
            commands.append([*job.launcher, "ceu_rl.cli", *job.command, *_prepare_folder(job.folder)])
        if job.evaluation is not None:
            commands.append([sys.executable, "-m", "ceu_rl.cli", *job.evaluation])
        for command in commands:
            if not _succeeds(job, command, lock, variables, stop):
                return f"{job.found.status}: {job.found.reason}"
    return "finished"


@contextmanager
def _lock(folder: Path, stop: threading.Event) -> Iterator[int | None]:
    """Hold the lock of a run; its processes inherit it, so that it is free only once none of them is left.

    A comparison that is killed leaves its processes training. The next one waits here until they are through.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(POLL):
                    yield None
                    return
        yield None if stop.is_set() else file.fileno()


def _prepare_folder(folder: Path) -> list[str]:
    """How to go on with what an interrupted run left; what cannot be gone on with is moved aside, never deleted."""
    if saved_checkpoints(folder):
        return ["--resume_from_checkpoint", "true"]
    if (folder / "metrics.jsonl").is_file() or any(folder.glob("*.safetensors")):
        number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}-interrupted-{i}").exists())
        folder.rename(folder.with_name(f"{folder.name}-interrupted-{number}"))
    return []


def _succeeds(job: Job, command: Sequence[str], lock: int, variables: Mapping[str, str], stop: threading.Event) -> bool:
    """Run a command with its output in the log of the run; what failed is written into its `failure.json`."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOG, "a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        # A session of its own, so that all its processes can be ended together
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
            pass_fds=[lock],
            start_new_session=True,
        )
        while process.poll() is None:
            if stop.wait(POLL):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                return False
    if process.returncode and not stop.is_set():
        _write_failure(job, command, process.returncode, start)
    return process.returncode == 0


def _write_failure(job: Job, command: Sequence[str], status: int, start: int) -> None:
    with open(job.folder / LOG, errors="replace") as log:
        log.seek(start)
        lines = [line.rstrip() for line in log if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    reason = (errors or lines or ["it printed nothing"])[-1].split(": error: ", 1)[-1]
    if status < 0:
        reason = f"It was ended by {signal.Signals(-status).name}."
    failure = {
        "status": status,
        "reason": reason,
        "diverged": bool(errors) and "met a non-finite" in reason,
        "log_tail": lines[-LOG_TAIL:],
        "command": shlex.join(command),
        "settings": read_settings(job.command[0], job.command[1:]),
        "seed": job.run.seed,
        **environment(),
    }
    write_json(job.folder / FAILURE, failure)
