"""Where the runs of a comparison run: on this machine, as jobs of Slurm through submitit, or as tasks of Ray.

All three call [`run_job`] in a process of its own, which holds the lock of the run. So two comparisons never work on
one run, and one that was killed leaves runs for which the next one waits. On several machines the folder of the
comparison has to be shared; a run whose machine died starts again from its last checkpoint.
"""

import contextlib
import importlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from rich.console import Console

from ..run.progress import ShareBar, duration
from .job import MODULE, Job, run_job

LAUNCHERS = ("local", "ray", "submitit")
POLL = 0.5  # seconds
DAYS = 7  # the limit of a Slurm job without another one


# What starts a job returns a handle with done(), result() and cancel(), as submitit's


class Worker:
    """A process of this machine that does a job; jobs at the same time share its cores, or take its GPUs in turn."""

    def __init__(self, job: Job, at_once: int, slots: list[int]) -> None:
        self.slot, self.slots = slots.pop(0), slots
        words = [sys.executable, "-m", run_job.__module__]
        env = _variables(self.slot, at_once, alone=job.launcher == MODULE)
        # In a session of its own: Ctrl-C reaches the comparison alone, which ends the runs
        self.process = Popen(words, stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=env, start_new_session=True)
        with self.process.stdin as pipe:  # type: ignore[union-attr]
            pickle.dump(job, pipe)
        self.cancel = self.process.terminate

    def done(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> str:
        self.slots.append(self.slot)
        said = self.process.stdout.read().decode(errors="replace").strip()  # type: ignore[union-attr]
        return (said.splitlines() or ["stopped"])[-1]


def _variables(slot: int, at_once: int, alone: bool = True) -> dict[str, str]:
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
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


class RayTask:
    """A task of Ray, which starts one whose machine died again elsewhere."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self.ray, self.handle, self.asked = ray, handle, False
        self.done, self.result = handle.future().done, lambda: ray.get(handle)

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
        raise ImportError(f"--launcher {name} needs its package ({error}): pip install 'ceu-rl[{extra}]'.") from None
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


def run_jobs(
    jobs: Sequence[Job], launcher: Launcher, at_once: int, console: Console, draw: Callable[[], object]
) -> None:
    """Run every job, `at_once` of them at the same time; `draw` is called each time that one has ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every run has ended; a second one ends them at once.
    """
    submit, errors = launcher
    waiting, running = list(jobs), dict[Any, tuple[Job, float]]()
    with ShareBar(console, len(jobs)) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[submit(job)] = job, time.monotonic()
                time.sleep(POLL)
                ended = [handle for handle in running if handle.done()]
                for handle in ended:
                    try:
                        outcome = handle.result()
                    except errors as error:
                        outcome = f"failed: {' '.join(str(error).split())[-300:]}"
                    job, start = running.pop(handle)
                    bar.say(f"{job.run.name}: {outcome} ({duration(time.monotonic() - start)})")
                at = {job.run.name: job.run.at for job, _ in running.values()}
                bar.show(len(jobs) - len(waiting) - len(running), at)
                if ended and (waiting or running):
                    draw()
        except BaseException:
            if running:
                print("Ending the runs after their step, with a checkpoint; once more ends at once.", file=sys.stderr)
            while not all(handle.done() for handle in running):
                with contextlib.suppress(KeyboardInterrupt):
                    _cancel(list(running))
            raise


def _cancel(handles: Sequence[Any]) -> None:
    for handle in handles:
        if not handle.done():
            handle.cancel()
    while not all(handle.done() for handle in handles):
        time.sleep(POLL / 5)
