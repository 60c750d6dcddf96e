"""Where the runs of a comparison run: in threads of this machine, as tasks of a Ray cluster, or as jobs of Slurm.

A launcher starts jobs and says what came out of them. On several machines the folder of the comparison has to be
shared: the lock of a run keeps two machines from working on it, and a run whose machine died starts again from its
checkpoint.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .jobs import POLL, Job, Stop, run_job
from .runs import LOG, as_number

LAUNCHERS = ("local", "ray", "submitit")
LINES = 8  # runs whose progress is shown
DAYS = 7  # the limit of a Slurm job without another one


class Launcher(Protocol):
    """What [`run_jobs`] asks of a launcher; a handle is what stands for a job that was submitted."""

    def submit(self, job: Job) -> Any:
        """Start a job, now or when its turn comes."""

    def done(self, handle: Any) -> bool: ...

    def outcome(self, handle: Any) -> str:
        """What came out of a job that is done, in words."""

    def stop(self, handles: Sequence[Any], now: bool) -> None:
        """Ask the jobs to end with a checkpoint, or end them `now`; returns at once."""

    def close(self) -> None:
        """Give back what the launcher holds."""


def make_launcher(name: str, folder: Path, at_once: int | None, options: Mapping[str, Any]) -> Launcher:
    """A launcher by its name.

    Args:
        name: One of `LAUNCHERS`.
        folder: The folder of the comparison.
        at_once: How many jobs run at the same time; None leaves it to the scheduler, on this machine it is one.
        options: For ray, options of its tasks (num_cpus, num_gpus, resources, max_retries); for submitit, parameters of
            its AutoExecutor (timeout_min, cpus_per_task, gpus_per_node, slurm_partition, ...) and `cluster`.

    Raises:
        ValueError: for options that the launcher does not take.
        ImportError: if its package is not installed.
    """
    match name:
        case "ray":
            return RayLauncher(options)
        case "submitit":
            return SubmititLauncher(folder, options)
    if options:
        raise ValueError(f"--launcher local takes no options, but {', '.join(options)} is given; use --jobs.")
    return LocalLauncher(at_once or 1)


def run_jobs(
    jobs: Sequence[Job], launcher: Launcher, at_once: int | None, console: Console, draw: Callable[[], object]
) -> None:
    """Run every job, `at_once` of them at the same time, and show how far they are and how long it will take.

    Each time that jobs have ended and others have not, `draw` is called, with the next ones started.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every run has ended; a second one ends them at once.
    """
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    ended: list[Any] = []
    with _progress(console, len(jobs), min(at_once or LINES, LINES)) as show:
        try:
            while waiting or running:
                while waiting and len(running) < (at_once or len(jobs)):
                    job = waiting.pop(0)
                    running[launcher.submit(job)] = job
                if ended:
                    draw()
                time.sleep(POLL if len(jobs) > 1 else POLL / 5)
                ended = [handle for handle in running if launcher.done(handle)]
                for handle in ended:
                    job = running.pop(handle)
                    outcome = f"{job.name}: {launcher.outcome(handle)}"
                    console.print(outcome, soft_wrap=True, markup=False, highlight=False)
                show(list(running.values()), len(jobs) - len(waiting) - len(running))
        except BaseException:
            _stop(launcher, list(running))
            raise


def _stop(launcher: Launcher, handles: Sequence[Any]) -> None:
    """End the jobs and wait until they have ended; another Ctrl-C or SIGTERM meanwhile ends them at once."""
    now = False
    while True:
        try:
            launcher.stop([handle for handle in handles if not launcher.done(handle)], now)
            if handles and not now:
                print("Ending the runs after their step, with a checkpoint; once more ends at once.", file=sys.stderr)
            while not all(launcher.done(handle) for handle in handles):
                time.sleep(POLL / 5)
            return
        except KeyboardInterrupt:
            now = True


@contextmanager
def _progress(console: Console, total: int, lines: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    overall = Progress(*columns, TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), console=console)
    with overall as progress:
        task = progress.add_task("runs", total=total)
        tasks = [progress.add_task("", total=None, visible=False) for _ in range(lines)]

        def show(running: Sequence[Job], done: int) -> None:
            steps = {job.name: (_last_step(job.folder), job.max_steps) for job in running}
            shares = sum(min(step / total, 1.0) for step, total in steps.values() if total)
            progress.update(task, completed=done + shares)
            shown = [(name, *of) for name, of in steps.items() if of[0] or len(steps) <= lines][:lines]
            for place, line in enumerate(tasks):
                name, step, total = shown[place] if place < len(shown) else ("", 0, None)
                progress.update(line, description=name, completed=step, total=total, visible=bool(name))

        yield show


def _last_step(folder: Path) -> int:
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            lines = file.read().splitlines()
        return int(as_number(json.loads(lines[-1])["step"]) or 0)
    except (OSError, IndexError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0  # not there yet, or a line that is being written


class LocalLauncher:
    """A thread for each job that runs at the same time; they share the cores, or take the GPUs in turn."""

    def __init__(self, at_once: int) -> None:
        self.at_once, self.ending, self.slots = at_once, Stop(), list(range(at_once))
        self.pool = ThreadPoolExecutor(at_once)

    def submit(self, job: Job) -> Future[str]:
        return self.pool.submit(self._work, job)

    def _work(self, job: Job) -> str:
        slot = self.slots.pop()
        try:
            return run_job(job, _variables(slot, self.at_once), self.ending)
        finally:
            self.slots.append(slot)

    def done(self, handle: Future[str]) -> bool:
        return handle.done()

    def outcome(self, handle: Future[str]) -> str:
        return handle.result()

    def stop(self, handles: Sequence[Future[str]], now: bool) -> None:
        self.ending.now = now
        self.ending.set()

    def close(self) -> None:
        self.pool.shutdown()


def _variables(slot: int, at_once: int) -> dict[str, str]:
    """Jobs at the same time share the cores, and take the visible GPUs in turn, each job one."""
    import torch

    variables = dict(os.environ)
    if at_once > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    if torch.cuda.is_available():
        visible = variables.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return variables


class There:
    """A job on another machine, in the folder in which the comparison was started.

    A scheduler that ends it asks for a `checkpoint` first and submits what that returns again (submitit's protocol).
    """

    def __init__(self, job: Job) -> None:
        self.job, self.at = _absolute(job), os.getcwd()

    def __call__(self) -> str:
        os.chdir(self.at)
        return run_job(self.job, dict(os.environ), Stop())

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _absolute(job: Job) -> Job:
    return replace(job, run=replace(job.run, folder=job.folder.absolute()))


class RayLauncher:
    """A Ray task for each job, on the cluster that `ray.init()` finds (RAY_ADDRESS, a running one, or a new local one).

    Ray gives a task its share of CPUs and GPUs, and starts one whose machine died again elsewhere.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"--launcher ray needs the package ray ({error}): pip install 'ceu-rl[ray]'.") from None
        self.ray = ray
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        try:
            self.task = ray.remote(_there).options(**{"max_retries": -1, **options})
        except (ValueError, TypeError) as error:
            raise ValueError(f"--launcher_config: ray refuses the options ({error}).") from error

    def submit(self, job: Job) -> Any:
        return self.task.remote(There(job))

    def done(self, handle: Any) -> bool:
        return bool(self.ray.wait([handle], timeout=0)[0])

    def outcome(self, handle: Any) -> str:
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return f"failed: {' '.join(str(error).split())[-300:]}"

    def stop(self, handles: Sequence[Any], now: bool) -> None:
        for handle in handles:
            self.ray.cancel(handle, force=now)

    def close(self) -> None:
        self.ray.shutdown()


def _there(work: There) -> str:
    return work()


class SubmititLauncher:
    """A submitit job for each job: Slurm's where there is Slurm, else processes of this machine."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                f"--launcher submitit needs the package submitit ({error}): pip install 'ceu-rl[slurm]'."
            ) from None
        self.failures = (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError)
        parameters = {"timeout_min": DAYS * 24 * 60, "name": "ceu-rl", **options}
        cluster = parameters.pop("cluster", None)
        try:
            self.executor = submitit.AutoExecutor(folder / "submitit", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (ValueError, TypeError, NameError, AssertionError) as error:
            raise ValueError(f"--launcher_config: submitit refuses the parameters ({error}).") from error

    def submit(self, job: Job) -> Any:
        return self.executor.submit(There(job))

    def done(self, handle: Any) -> bool:
        return handle.done()

    def outcome(self, handle: Any) -> str:
        try:
            return handle.result()
        except self.failures as error:
            return f"failed: {' '.join(str(error).split())[-300:]}"

    def stop(self, handles: Sequence[Any], now: bool) -> None:
        for handle in handles:
            handle.cancel()

    def close(self) -> None:
        return None
