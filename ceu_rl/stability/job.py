"""One run of a comparison, in a process of its own: what is left to do for it, and doing that."""

import contextlib
import itertools
import json
import os
import pickle
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

import filelock

from ..run.errors import write_whole
from .runs import EVALUATIONS, FAILURE, LOG, RECORD, RESULT, Run, key_of, lock_of

# What needs torch is imported where it is used

RECIPE = "recipe.yaml"  # the settings that a comparison gave to the run
OUTPUT, OUTPUT_TAIL = "log.txt", 15  # what the processes of a run print; lines of it that a failure keeps
MODULE = [sys.executable, "-m"]


@dataclass(frozen=True)
class Job:
    """A run of the grid and how it is made; `run.planned` is its record."""

    run: Run
    text: str  # of the recipe that is stored in its folder
    words: Sequence[str]  # arguments of ceu-rl that would make it without a comparison
    evaluation: Sequence[str]  # arguments of ceu-rl for what is to be run after it
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


def is_done(job: Job) -> bool:
    """Whether nothing is left to do for a run: it finished and was evaluated, or it diverged.

    Raises:
        ValueError: for a run that was made or begun with other settings; one that failed with them starts again.
    """
    found = job.found
    name = next((name for name in (RESULT, FAILURE, RECORD) if "settings" in found.record(name)), None)
    if name and found.status != "failed" and _is_begun(job.folder):
        if other := _others(job.settings, found.record(name)["settings"]):
            raise ValueError(
                f"{job.folder / name} was made with other settings ({', '.join(other)}); choose another --output_dir, "
                "or give these."
            )
    return found.status == "diverged" or (found.status == "finished" and not _lacks_evaluation(job))


def _is_begun(folder: Path) -> bool:
    """As `run.checkpoints.traces`, without torch."""
    return any(any(folder.glob(name)) for name in ("checkpoint-*", RESULT, LOG, "*.safetensors"))


def _others(ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """The fields whose recorded value is not the job's; how a value is written does not count."""
    new = json.loads(key_of(ours))
    names = [name for name in {**recorded, **new} if recorded.get(name) != new.get(name)]
    return [f"{name}: {recorded.get(name)!r}, now {new.get(name)!r}" for name in names]


def _lacks_evaluation(job: Job) -> list[Sequence[str]]:
    """The commands of ceu-rl that evaluate what was trained, as far as that is not done; a retain model may come with
    a later call."""
    if not job.evaluation:
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
    commands, folder = [], job.folder
    if not job.found.record(RESULT):
        words = [job.words[0], "--config", str(folder / RECIPE), "--output_dir", str(folder), *_resume(job)]
        commands = [[*job.launcher, "ceu_rl.cli", *words]]
    commands += [[*MODULE, "ceu_rl.cli", *words] for words in _lacks_evaluation(job)]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE, job.text)
    write_whole(folder / RECORD, json.dumps(job.run.planned, indent=2, default=str) + "\n")
    (folder / FAILURE).unlink(missing_ok=True)
    return commands


def _resume(job: Job) -> list[str]:
    """How to continue what an interrupted run left; what cannot be continued is moved aside, never deleted."""
    folder = job.folder
    if not _is_begun(folder):
        return []
    from ..run.checkpoints import resumed_by, saved_checkpoints

    last = [path for _, path in saved_checkpoints(folder)][-1:]
    if last and resumed_by(last[0]) and not _others(job.settings, job.found.record(RECORD).get("settings", {})):
        return ["--resume_from_checkpoint", "true"]
    aside = (folder.with_name(f"{folder.name}-interrupted-{number}") for number in itertools.count(1))
    folder.rename(next(path for path in aside if not path.exists()))
    return []


def run_job(job: Job) -> str:
    """Train one run, and evaluate it where that is asked for; says what came out.

    Raises:
        KeyboardInterrupt: once the run has ended after its step, with a checkpoint; a second signal ends it at once.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock_of(job.folder)):
            all(_succeeds(job, command) for command in commands_of(job))
    except OSError as error:
        return f"failed: {error.filename or job.folder} cannot be written ({error.strerror}); the other runs continue."
    found = job.found
    return f"{found.status}: {found.reason}" if found.reason else found.status


def _succeeds(job: Job, command: Sequence[str]) -> bool:
    """Run a command; one that fails leaves a record, as one that diverged does itself."""
    with open(job.folder / OUTPUT, "a+", errors="replace") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        # In a session of its own, to end all that it starts together
        process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        log.seek(start)
        lines = [line.rstrip() for line in log if line.strip()] or ["it printed nothing"]
    if status and not (job.folder / FAILURE).exists():
        from ..run.provenance import environment, write_json

        reason = next((line for line in reversed(lines) if ": error: " in line), lines[-1]).split(": error: ", 1)[-1]
        failure = {
            "status": status,
            "reason": f"It was ended by {signal.Signals(-status).name}." if status < 0 else reason,
            "diverged": False,
            "log_tail": lines[-OUTPUT_TAIL:],
            "command": shlex.join(command),
            "method": job.run.planned["method"],
            "settings": dict(job.settings),
        }
        write_json(job.folder / FAILURE, failure | environment())
    return status == 0


def _end(process: Popen) -> None:
    """End a process and all that it started, after the step that it is in; an interrupt meanwhile ends them at once."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(run_job(pickle.load(sys.stdin.buffer)))
    except KeyboardInterrupt:
        sys.exit(130)
