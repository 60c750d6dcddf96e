"""A run of a comparison as work: what is left to do for it, and doing it in processes of its own on this machine.

A run works from its stored copy of the settings, `recipe.yaml` in its folder, so that what happens to the recipe
meanwhile changes nothing. Where it lies and how it is resumed are no settings: a comparison may be moved.
"""

import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run.checkpoints import missing_states, saved_checkpoints, traces
from ..run.config import dump_recipe, read_settings
from ..run.provenance import environment, write_json
from .runs import FAILURE, RECIPE, RESULT, TOFU_RESULT, Run

OUTPUT = "log.txt"  # what the processes of a run print
OUTPUT_TAIL = 15  # lines
POLL = 0.5  # seconds
MODULE = [sys.executable, "-m"]


class Stop(threading.Event):
    """Set to end the runs: each is asked to, and ends after its step with a checkpoint. `now` kills them instead."""

    now = False


@dataclass(frozen=True)
class Job:
    """A run of the grid and how it is made."""

    run: Run
    recipe: Path
    method: str  # the command of ceu-rl that trains it
    settings: Mapping[str, Any]
    words: Sequence[str]  # arguments of ceu-rl that would make it without a comparison
    seed_place: int
    evaluation: Sequence[str] | None  # arguments of ceu-rl for what is to be run after it
    retain: Path | None  # the retain model's result that this is held against
    launcher: Sequence[str]

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
    def max_steps(self) -> int | None:
        steps = self.settings.get("max_steps")
        return steps if steps and steps > 0 else None

    @property
    def command(self) -> list[str]:
        """Arguments of ceu-rl that make it from its stored settings."""
        return [self.method, "--config", str(self.folder / RECIPE), "--output_dir", str(self.folder)]


def is_done(job: Job) -> bool:
    """Whether nothing is left to do for a run: it finished and was evaluated, or it diverged.

    Raises:
        ValueError: for a run that was made or begun with other settings; one that failed with them starts again.
    """
    found = job.found
    if found.result and not same_settings(job, found.settings):
        raise ValueError(_others(job.folder / RESULT, "made"))
    if found.failure and not same_settings(job, found.settings):
        return False
    if not found.failure and not found.result and traces(job.folder):
        stored = _stored_settings(job)
        if stored is not None and not same_settings(job, stored):
            raise ValueError(_others(job.folder / RECIPE, "begun"))
    if found.status == "finished":
        return job.evaluation is None or (found.tofu is not None and not _other_retain(job))
    return found.status == "diverged"


def _other_retain(job: Job) -> bool:
    """Whether its evaluation was held against no retain model, or another one than is asked for."""
    known = job.found.retain
    return job.retain is not None and (known is None or Path(known).resolve() != job.retain.resolve())


def _others(path: Path, how: str) -> str:
    return f"{path} was {how} with other settings than the recipe has now; choose another --output_dir."


def same_settings(job: Job, recorded: Mapping[str, Any]) -> bool:
    """Whether recorded settings are those of a job: compared by value and type, not by how they were written."""
    ours = _plain(job.settings)
    if "overrides" not in recorded and _plain(recorded) == ours:
        return True
    given = recorded.get("overrides")
    words = [str(word) for word in given] if isinstance(given, list) else []
    fields = {name: value for name, value in recorded.items() if name != "overrides"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_recipe(fields))
        file.flush()
        try:
            typed = read_settings(job.method, ["--config", file.name, *words])
        except (ValueError, SystemExit):  # fields or values that the method does not have now
            return False
    return _plain(typed) == ours


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(settings), default=str))


def _stored_settings(job: Job) -> dict[str, Any] | None:
    path = job.folder / RECIPE
    try:
        return read_settings(job.method, ["--config", str(path)]) if path.is_file() else None
    except (ValueError, OSError):
        return None


def run_job(job: Job, variables: Mapping[str, str], stop: Stop) -> str:
    """Train one run, and evaluate it where that is asked for, as processes of their own; says what came out."""
    try:
        with _lock(job.folder, stop) as lock:
            return "not started" if lock is None else _run_locked(job, lock, variables, stop)
    except OSError as error:
        where = error.filename or job.folder
        return f"failed: {where} cannot be written ({error.strerror}); the other runs go on."


def _run_locked(job: Job, lock: int, variables: Mapping[str, str], stop: Stop) -> str:
    if is_done(job):  # by the process that was waited for
        return f"{job.found.status}, by an earlier call"
    commands, result = [], job.found.result
    if not result or result.get("steps") == 0:
        resume = _prepare_folder(job)
        commands.append([*job.launcher, "ceu_rl.cli", *job.command, *resume])
    (job.folder / FAILURE).unlink(missing_ok=True)
    evaluated = job.folder / TOFU_RESULT
    if not commands and job.found.tofu is not None:  # it is at most to be held against the retain model
        if _other_retain(job):
            again = ["tofu-eval", "--results", str(evaluated), "--retain", str(job.retain)]
            commands.append([*MODULE, "ceu_rl.cli", *again])
    else:
        if evaluated.is_file():  # one that cannot be used
            evaluated.rename(evaluated.with_name(f"{TOFU_RESULT}.broken"))
        if job.evaluation is not None:
            commands.append([*MODULE, "ceu_rl.cli", *job.evaluation])
    for command in commands:
        if not _succeeds(job, command, lock, variables, stop):
            return "stopped" if stop.is_set() else f"{job.found.status}: {job.found.reason}"
    return job.found.status


@contextmanager
def _lock(folder: Path, stop: Stop) -> Iterator[int | None]:
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


def _prepare_folder(job: Job) -> list[str]:
    """How to go on with what an interrupted run left; what cannot be gone on with is moved aside, never deleted."""
    folder, stored = job.folder, _stored_settings(job)
    same = stored is not None and same_settings(job, stored)
    last = [path for _, path in saved_checkpoints(folder)][-1:]
    resume = ["--resume_from_checkpoint", "true"] if same and last and not missing_states(last[0]) else []
    if traces(folder) and not resume:
        number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}-interrupted-{i}").exists())
        folder.rename(folder.with_name(f"{folder.name}-interrupted-{number}"))
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{RECIPE}.part"
    part.write_text(dump_recipe(job.settings), encoding="utf-8")
    part.replace(folder / RECIPE)
    return resume


def _succeeds(job: Job, command: Sequence[str], lock: int, variables: Mapping[str, str], stop: Stop) -> bool:
    """Run a command with its output in the log of the run; what failed is written into its `failure.json`."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / OUTPUT, "a") as log:
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
        try:
            while process.poll() is None and not stop.wait(POLL):
                pass
        finally:  # also where a scheduler ends this process
            if process.poll() is None:
                _end(process, stop)
    if process.returncode and not stop.is_set():
        _write_failure(job, command, process.returncode, start)
    return process.returncode == 0


def _end(process: subprocess.Popen, stop: Stop) -> None:
    """End a process and all that it started: it may first finish its step and save, unless there is no time for it."""
    if not stop.now:
        os.killpg(process.pid, signal.SIGTERM)
    while process.poll() is None and not stop.now:
        time.sleep(POLL / 5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_failure(job: Job, command: Sequence[str], status: int, start: int) -> None:
    with open(job.folder / OUTPUT, errors="replace") as log:
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
        "log_tail": lines[-OUTPUT_TAIL:],
        "command": shlex.join(command),
        "settings": dict(job.settings),
        "seed": job.run.seed,
        **environment(),
    }
    write_json(job.folder / FAILURE, failure)
