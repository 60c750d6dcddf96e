"""Where the runs of a comparison run: on this machine, as jobs of Slurm through submitit, or as tasks of Ray.

All three call [`run_job`] in a process of its own, which holds the lock of the run. So two comparisons never work on
one run, and one that was killed leaves runs for which the next one waits. On several machines the folder of the
comparison has to be shared; a run whose machine died starts again from its last checkpoint.
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from typing import Any

import filelock
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..run.progress import duration
from .grid import MODULE, Job, commands_of
from .runs import FAILURE, LOG, lock_of

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
            all(_succeeds(job, command) for command in commands_of(job))
    except OSError as error:
        return f"failed: {error.filename or job.folder} cannot be written ({error.strerror}); the other runs continue."
    found = job.found
    return f"{found.status}: {found.reason}" if found.reason else found.status


def _succeeds(job: Job, command: Sequence[str]) -> bool:
    with open(job.folder / OUTPUT, "a+", errors="replace") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        # In a session of its own, to end all that it starts together
        process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True)
        try:
            process.wait()
        except BaseException:
            _end(process)
            raise
        log.seek(start)
        lines = [line.rstrip() for line in log if line.strip()] or ["it printed nothing"]
    if process.returncode and not (job.folder / FAILURE).exists():  # a run that diverged wrote its own
        _write_failure(job, command, process.returncode, lines)
    return process.returncode == 0


def _end(process: Popen) -> None:
    """End a process and all that it started, after the step that it is in; an interrupt meanwhile ends them at once."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write_failure(job: Job, command: Sequence[str], status: int, lines: Sequence[str]) -> None:
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


# Where: what starts a job returns a handle with done(), result() and cancel(), as submitit's


class Worker:
    """A process of this machine that does a job; jobs at the same time share its cores, or take its GPUs in turn."""

    def __init__(self, job: Job, at_once: int, slots: list[int]) -> None:
        self.slot, self.slots = slots.pop(0), slots
        words, env = [sys.executable, "-m", __name__], _variables(self.slot, at_once, alone=job.launcher == MODULE)
        # In a session of its own: Ctrl-C reaches the comparison alone, which ends the runs
        self.process = Popen(words, stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=env, start_new_session=True)
        with self.process.stdin as pipe:  # type: ignore[union-attr]
            pickle.dump(job, pipe)

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

    variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
    variables |= os.environ
    if torch.cuda.is_available() and (alone or at_once > 1):
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % len(visible.split(","))]
    return variables


class There:
    """A job on any machine that shares the folder in which the comparison was started."""

    def __init__(self, job: Job) -> None:
        self.job, self.at = job, os.getcwd()

    def __call__(self) -> str:
        os.chdir(self.at)
        return run_job(self.job)

    def checkpoint(self) -> Any:
        """What a scheduler that ends it submits again (submitit's protocol)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class RayTask:
    """A task of Ray, which starts one whose machine died again elsewhere."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self.ray, self.handle, self.asked = ray, handle, False

    def done(self) -> bool:
        return bool(self.ray.wait([self.handle], timeout=0)[0])

    def result(self) -> str:
        return self.ray.get(self.handle)

    def cancel(self) -> None:
        self.ray.cancel(self.handle, force=self.asked)
        self.asked = True


Launcher = tuple[Callable[[Job], Any], tuple[type[Exception], ...]]


def make_launcher(name: str, folder: Path, at_once: int | None, options: Mapping[str, Any]) -> Launcher:
    """What starts a job, `at_once` at the same time, and the errors that the result of one may raise.

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
            task = engine.remote(There.__call__).options(**{"max_retries": -1, **options})
            return lambda job: RayTask(engine, task.remote(There(job))), (engine.exceptions.RayError,)
        parameters = {"timeout_min": DAYS * 24 * 60, "name": "ceu-rl", **options}
        executor = engine.AutoExecutor(folder / "submitit", cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError, AssertionError) as error:
        raise ValueError(f"--launcher_config: {name} refuses the options ({error}).") from error
    errors = (engine.core.utils.UncompletedJobError, engine.core.utils.FailedSubmissionError)
    return lambda job: executor.submit(There(job)), errors


# All runs


def run_jobs(
    jobs: Sequence[Job], launcher: Launcher, at_once: int | None, console: Console, draw: Callable[[], object]
) -> None:
    """Run every job, `at_once` of them at the same time; `draw` is called each time that one has ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every run has ended; a second one ends them at once.
    """
    submit, errors = launcher
    waiting, running = list(jobs), dict[Any, Task]()
    with Bars(len(jobs), console) as bars:
        try:
            while waiting or running:
                while waiting and len(running) < (at_once or len(jobs)):
                    job = waiting.pop(0)
                    running[submit(job)] = bars.add(str(Path(*job.folder.parts[-3:])), job=job)
                time.sleep(POLL)
                ended = [handle for handle in running if handle.done()]
                for handle in ended:
                    try:
                        outcome = handle.result()
                    except errors as error:
                        outcome = f"failed: {' '.join(str(error).split())[-300:]}"
                    bars.end(running.pop(handle), outcome)
                bars.show(running.values(), len(jobs) - len(waiting) - len(running))
                if ended and (waiting or running):
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


class Bars(Progress):
    """A bar for each run and one for all: the time since its start, and what is left by the pace since its first step.

    Without a terminal the first estimate is one line.
    """

    def __init__(self, total: int, console: Console, **options: Any) -> None:
        text = [TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[at]}")]
        clock = [TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")]
        options |= {"console": console, "disable": not console.is_terminal, "speed_estimate_period": math.inf}
        super().__init__(*text, *clock, **options)
        self.told, self.all = console.is_terminal, self.add("all runs", total)

    def add(self, name: str, total: float = 1.0, job: Job | None = None) -> Task:
        self.add_task(name, total=total, at="", job=job)
        return self.tasks[-1]

    def end(self, task: Task, outcome: str) -> None:
        self.remove_task(task.id)
        self._say(f"{task.description}: {outcome} ({duration(task.elapsed or 0)})")

    def show(self, running: Iterable[Task], done: int) -> None:
        for task in running:
            if found := _share(task.fields["job"]):
                self.update(task.id, completed=found[0], at=found[1])
            if not self.told and task.time_remaining is not None:
                self.told = True
                self._say(f"{task.description}: {task.fields['at']}, about {duration(task.time_remaining)} left")
        at, completed = f"{done} of {self.all.total:.0f}", done + sum(task.completed for task in running)
        self.update(self.all.id, completed=completed, at=at)

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def _share(job: Job) -> tuple[float, str] | None:
    """The share of its steps that a run has done by its log, and its step in words."""
    try:
        entry = json.loads((job.folder / LOG).read_bytes().splitlines()[-1])
        step, epoch = int(entry["step"]), float(entry.get("epoch", 0))
    except (OSError, LookupError, ValueError, TypeError, RecursionError):
        return None  # not there yet, or a line that is being written
    steps, epochs = job.settings.get("max_steps") or -1, job.settings.get("num_train_epochs") or 3.0
    return (min(step / steps, 1), f"{step} of {steps} steps") if steps > 0 else (min(epoch / epochs, 1), f"step {step}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(run_job(pickle.load(sys.stdin.buffer)))
    except KeyboardInterrupt:
        sys.exit(130)
