"""Where the runs of a comparison run: on this machine, as jobs of Slurm through submitit, or as tasks of Ray.

All three call [`run_job`] in a process of its own, which holds the lock of the run. So two comparisons never work on
one run, and one that was killed leaves runs for which the next one waits. On several machines the folder of the
comparison has to be shared; a run whose machine died starts again from its last checkpoint.
"""

import contextlib
import importlib
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from .courses import Course, Courses
from .grid import (
    EVALUATIONS,
    FAILURE,
    MODULE,
    RESULT,
    Job,
    is_done,
    lacks_evaluation,
    lock_of,
    prepare_folder,
    write_record,
)

LAUNCHERS = ("local", "ray", "submitit")
OUTPUT, OUTPUT_TAIL = "log.txt", 15  # what the processes of a run print; lines of it that a failure keeps
POLL = 0.5  # seconds
DAYS = 7  # the limit of a Slurm job without another one


# One run, in a process of its own


def run_job(job: Job) -> str:
    """Train one run, and evaluate it where that is asked for; says what came out.

    Raises:
        KeyboardInterrupt: once the run has ended after its step, with a checkpoint; a second signal ends it at once.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock_of(job.folder)):
            if is_done(job):
                return f"{job.found.status}, by an earlier call"
            trained = job.found.record(RESULT)
            resume = None if trained and trained.get("steps") != 0 else prepare_folder(job)
            write_record(job)
            (job.folder / FAILURE).unlink(missing_ok=True)
            commands = [] if resume is None else [[*job.launcher, "ceu_rl.cli", *job.command, *resume]]
            commands += [[*MODULE, "ceu_rl.cli", *words] for words in lacks_evaluation(job)]
            for path in (job.folder / name for name in EVALUATIONS):
                if path.is_file() and not job.found.record(path.name):  # one that cannot be used
                    path.rename(path.with_name(f"{path.name}.broken"))
            ended = all(_succeeds(job, command) for command in commands)
        return job.found.status if ended else f"{job.found.status}: {job.found.reason}"
    except OSError as error:
        return f"failed: {error.filename or job.folder} cannot be written ({error.strerror}); the other runs continue."


def _succeeds(job: Job, command: Sequence[str]) -> bool:
    with open(job.folder / OUTPUT, "a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        given: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, start_new_session=True, **given)  # to end all that it starts together
        try:
            process.wait()
        except BaseException:
            _end(process)
            raise
    if process.returncode and not (job.folder / FAILURE).exists():  # a run that diverged wrote its own
        _write_failure(job, command, process.returncode, start)
    return process.returncode == 0


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started, after the step that it is in; an interrupt meanwhile ends them at once."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write_failure(job: Job, command: Sequence[str], status: int, start: int) -> None:
    from ..run.provenance import environment, write_json

    with open(job.folder / OUTPUT, errors="replace") as log:
        log.seek(start)
        lines = [line.rstrip() for line in log if line.strip()] or ["it printed nothing"]
    reason = next((line for line in reversed(lines) if ": error: " in line), lines[-1]).split(": error: ", 1)[-1]
    failure = {
        "status": status,
        "reason": f"It was ended by {signal.Signals(-status).name}." if status < 0 else reason,
        "diverged": False,
        "log_tail": lines[-OUTPUT_TAIL:],
        "command": shlex.join(command),
        "method": job.method,
        "settings": dict(job.settings),
        **environment(),
    }
    write_json(job.folder / FAILURE, failure)


# Where


class There:
    """A job on any machine that shares the folder in which the comparison was started.

    A scheduler that ends it asks for a `checkpoint` first and submits what that returns again (submitit's protocol).
    """

    def __init__(self, job: Job) -> None:
        self.job = replace(job, run=replace(job.run, folder=job.folder.absolute()))
        self.at = os.getcwd()

    def __call__(self) -> str:
        os.chdir(self.at)
        return run_job(self.job)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Worker:
    """A process of this machine that does a job; jobs at the same time share its cores, or take its GPUs in turn."""

    def __init__(self, job: Job, at_once: int, slots: list[int]) -> None:
        self.slot, self.slots = slots.pop(0), slots
        given: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # In a session of its own: Ctrl-C reaches the comparison alone, which ends the runs
        words = [sys.executable, "-m", __name__]
        variables = _variables(self.slot, at_once, alone=job.launcher == MODULE)
        self.process = subprocess.Popen(words, env=variables, start_new_session=True, **given)
        with self.process.stdin:  # type: ignore[union-attr]
            pickle.dump(job, self.process.stdin)  # type: ignore[arg-type]

    def done(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> str:
        self.slots.append(self.slot)
        said = self.process.stdout.read().decode(errors="replace").strip()  # type: ignore[union-attr]
        return (said.splitlines() or ["stopped"])[-1]

    def cancel(self) -> None:
        self.process.terminate()


def _variables(slot: int, at_once: int, alone: bool = True) -> dict[str, str]:
    """Jobs at the same time share the cores, and take the visible GPUs in turn, each process that is alone one."""
    import torch

    variables = dict(os.environ)
    if at_once > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    if torch.cuda.is_available() and (alone or at_once > 1):
        visible = variables.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return variables


class RayTask:
    """A task of Ray, which starts one whose machine died again elsewhere."""

    def __init__(self, ray: Any, task: Any, job: Job) -> None:
        self.ray, self.handle, self.asked = ray, task.remote(There(job)), False

    def done(self) -> bool:
        return bool(self.ray.wait([self.handle], timeout=0)[0])

    def result(self) -> str:
        return self.ray.get(self.handle)

    def cancel(self) -> None:
        self.ray.cancel(self.handle, force=self.asked)
        self.asked = True


def _there(work: There) -> str:
    return work()


Submit = Callable[[Job], Any]  # starts a job; what it returns has done(), result() and cancel()


def make_launcher(
    name: str, folder: Path, at_once: int | None, options: Mapping[str, Any]
) -> tuple[Submit, tuple[type[Exception], ...]]:
    """What starts a job, and the errors that the result of one may raise.

    Args:
        name: One of `LAUNCHERS`.
        folder: The folder of the comparison.
        at_once: How many jobs run at the same time; None leaves it to the scheduler, on this machine it is one.
        options: For ray, options of its tasks; for submitit, parameters of its AutoExecutor and `cluster`.

    Raises:
        ValueError: for options that the launcher does not take.
        ImportError: if its package is not installed.
    """
    if name == "local":
        if options:
            raise ValueError(f"--launcher local takes no options, but {', '.join(options)} is given; use --jobs.")
        slots = list(range(at_once or 1))
        return lambda job: Worker(job, at_once or 1, slots), ()
    try:
        engine: Any = importlib.import_module(name)
    except ImportError as error:
        extra = {"ray": "ray", "submitit": "slurm"}[name]
        message = f"--launcher {name} needs the package {name} ({error}): pip install 'ceu-rl[{extra}]'."
        raise ImportError(message) from None
    try:
        if name == "ray":
            engine.init(ignore_reinit_error=True, log_to_driver=False)
            task = engine.remote(_there).options(**{"max_retries": -1, **options})
            return lambda job: RayTask(engine, task, job), (engine.exceptions.RayError,)
        parameters = {"timeout_min": DAYS * 24 * 60, "name": "ceu-rl", **options}
        executor = engine.AutoExecutor(folder / "submitit", cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError, AssertionError) as error:
        raise ValueError(f"--launcher_config: {name} refuses the options ({error}).") from error
    errors = (engine.core.utils.UncompletedJobError, engine.core.utils.FailedSubmissionError)
    return lambda job: executor.submit(There(job)), errors


# All runs


def run_jobs(
    jobs: Sequence[Job],
    launcher: tuple[Submit, tuple[type[Exception], ...]],
    at_once: int | None,
    console: Console,
    draw: Callable[[], object],
) -> None:
    """Run every job, `at_once` of them at the same time; `draw` is called each time that one has ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every run has ended; a second one ends them at once.
    """
    submit, errors = launcher
    waiting, running = list(jobs), dict[Any, Course]()
    with Courses(len(jobs), console) as courses:
        try:
            while waiting or running:
                while waiting and len(running) < (at_once or len(jobs)):
                    job = waiting.pop(0)
                    running[submit(job)] = courses.start(job.name, job.folder, job.settings)
                time.sleep(POLL)
                ended = [handle for handle in running if handle.done()]
                for handle in ended:
                    course = running.pop(handle)
                    try:
                        outcome = handle.result()
                    except errors as error:
                        outcome = f"failed: {' '.join(str(error).split())[-300:]}"
                    courses.end(course, outcome)
                courses.show(list(running.values()), len(waiting))
                if ended and running:
                    draw()
        except BaseException:
            _stop(list(running))
            raise


def _stop(handles: Sequence[Any]) -> None:
    """End the jobs and wait until they have ended; another Ctrl-C or SIGTERM meanwhile ends them at once."""
    for said in (False, True, True):
        try:
            for handle in (each for each in handles if not each.done()):
                handle.cancel()
            if handles and not said:
                print("Ending the runs after their step, with a checkpoint; once more ends at once.", file=sys.stderr)
            while not all(handle.done() for handle in handles):
                time.sleep(POLL / 5)
            return
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(run_job(pickle.load(sys.stdin.buffer)))
    except KeyboardInterrupt:
        sys.exit(130)
