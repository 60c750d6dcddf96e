"""The launchers for several machines, on one: Ray's cluster of two nodes, submitit's local mode; how far runs are."""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from ceu_rl.cli import main
from ceu_rl.stability import grid, report, runs
from ceu_rl.stability import launch as launch_module

# Trains for two seconds, with a checkpoint at each step; a killed one goes on from the last of them
STAND_IN = """
import json, os, pathlib, sys, time, yaml
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
settings = yaml.safe_load((folder / "recipe.yaml").read_text())
settings.pop("method")
step = 0
for path in folder.glob("checkpoint-*"):
    step = max(step, int(path.name.split("-")[1]))
with open(folder.with_name(f"{folder.name}.started"), "a") as file:
    file.write(f"{os.getpid()} {step} {' '.join(sys.argv)}\\n")
while step < 20:
    time.sleep(0.1)
    step += 1
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 0.5}) + "\\n")
(folder / "result.json").write_text(json.dumps({"settings": settings, "steps": step}))
"""


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Compare two recipes with two seeds through a launcher, by runs that only take two seconds."""
    (tmp_path / "dpo").mkdir()
    for arm in ("stock", "ceu"):
        (tmp_path / "dpo" / f"{arm}.yaml").write_text(yaml.safe_dump({"method": "dpo", "max_steps": 20}))
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "MODULE", [sys.executable, "stand_in.py"])  # of the folder where it was started
    monkeypatch.setattr(report, "_html", lambda *args: "a page")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    def call(launcher, options=None, *words):
        config = []
        if options:
            (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
            config = ["--launcher_config", "options.yaml"]
        recipes = ["dpo/stock.yaml", "dpo/ceu.yaml", "--seed", "0", "1"]
        status = main(["compare", *recipes, "--output_dir", "runs", "--launcher", launcher, *config, *words])
        read = capsys.readouterr()
        return status, read.out + read.err

    return call


def starts(folder):
    """For each run the steps that it had at each of its starts."""
    found = [path.read_text().splitlines() for path in folder.glob("runs/*/*/*.started")]
    return [[int(line.split()[1]) for line in lines] for lines in found]


def assert_all_finished(status, out, folder):
    assert status == 0, out
    assert [run.status for run in runs.find_runs(folder / "runs")] == ["finished"] * 4


def test_submitit_runs_them_at_the_same_time_and_keeps_what_is_done(launch, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install -e .[slurm]")
    options = {"cluster": "local", "timeout_min": 5}
    assert_all_finished(*launch("submitit", options), tmp_path)
    status, out = launch("submitit", options)
    assert status == 0 and "4 done earlier and kept, 0 to do" in out
    assert starts(tmp_path) == [[0]] * 4


def test_submitit_names_what_it_does_not_take(launch, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install -e .[slurm]")
    status, out = launch("submitit", {"cluster": "local", "gpu_count": 1})
    assert status == 2 and "--launcher_config: submitit refuses the options" in out and "gpu_count" in out
    status, out = launch("submitit", {"cluster": "lokal"})
    assert status == 2 and "lokal" in out and not starts(tmp_path)


def test_the_report_is_drawn_as_each_run_ends(launch, tmp_path, monkeypatch):
    """One run at a time too, where none runs when one has ended."""
    drawn = []
    monkeypatch.setattr(report, "_html", lambda *args: drawn.append(len(starts(tmp_path))) or "a page")
    assert_all_finished(*launch("local"), tmp_path)
    assert drawn == [1, 2, 3, 4]


@pytest.mark.parametrize(("launcher", "package", "extra"), [("ray", "ray", "ray"), ("submitit", "submitit", "slurm")])
def test_a_launcher_without_its_package_is_one_sentence(launch, monkeypatch, launcher, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    status, out = launch(launcher)
    (line,) = out.splitlines()[1:]
    assert status == 2 and f"--launcher {launcher} needs the package {package}" in line and f"'ceu-rl[{extra}]'" in line


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes with one CPU each, beside a head without any."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e .[ray]")
    from ray.cluster_utils import Cluster

    # Ray's logger keeps the stderr of the test that first came here, which pytest has closed since
    monkeypatch.setattr(logging.getLogger("ray"), "handlers", [])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    ray.shutdown()
    made.shutdown()


def test_ray_runs_them_over_its_nodes(launch, cluster, tmp_path):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    assert_all_finished(*launch("ray"), tmp_path)
    assert starts(tmp_path) == [[0]] * 4
    status, out = launch("ray", {"num_cpu": 1})
    assert status == 0 and "0 to do" in out  # nothing is asked of Ray
    (tmp_path / "runs" / "ceu" / "recipe" / "0" / "result.json").unlink()
    status, out = launch("ray", {"num_cpu": 1})
    assert status == 2 and "--launcher_config: ray refuses the options" in out and "num_cpu" in out


def test_a_run_whose_machine_dies_starts_again_elsewhere_from_its_checkpoint(launch, cluster, tmp_path):
    import psutil

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    killed = []

    def machine_dies():
        while True:
            time.sleep(0.05)
            (raylet,) = (each.process for each in nodes[0].all_processes["raylet"])
            its = [each for each in psutil.Process(raylet.pid).children(recursive=True) if trains(each)]
            if its and list((tmp_path / "runs").glob("*/*/*/checkpoint-3")):
                break
        killed.extend(str(each.pid) for each in its)
        everything = psutil.Process(raylet.pid).children(recursive=True)
        raylet.kill()
        for each in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        cluster.remove_node(nodes[0], allow_graceful=False)

    def trains(process):
        with contextlib.suppress(psutil.Error):
            return "stand_in.py" in " ".join(process.cmdline())
        return False

    thread = threading.Thread(target=machine_dies)
    thread.start()
    status, out = launch("ray")
    thread.join()
    assert_all_finished(status, out, tmp_path)
    begun = [path.read_text().splitlines() for path in tmp_path.glob("runs/*/*/*.started")]
    again = [lines for lines in begun if len(lines) > 1]
    assert len(killed) == len(again) == 1 and again[0][0].split()[0] == killed[0]
    assert int(again[0][1].split()[1]) > 0 and again[0][1].endswith("--resume_from_checkpoint true")


@pytest.mark.parametrize("launcher", ["ray", "submitit"])
def test_ctrl_c_ends_the_runs_wherever_they_are(launch, request, tmp_path, launcher):
    pytest.importorskip(launcher)
    options = {"cluster": "local"} if launcher == "submitit" else None
    if launcher == "ray":
        request.getfixturevalue("cluster").add_node(num_cpus=2)

    def interrupt():
        while not list((tmp_path / "runs").glob("*/*/*/checkpoint-1")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, out = launch(launcher, options, "--jobs", "2")
    thread.join()
    assert status == 130 and "interrupted; the same command continues" in out and "Traceback" not in out
    pids = [int(line.split()[0]) for path in tmp_path.glob("runs/*/*/*.started") for line in path.open()]
    assert 0 < len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_job_gets_one_of_the_visible_gpus(at_once, monkeypatch):
    """A run that sees several is refused, a comparison of one job at a time too."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [launch_module._variables(slot, at_once)["CUDA_VISIBLE_DEVICES"] for slot in range(at_once)]
    assert devices == ["0", "1", "0"][:at_once]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert launch_module._variables(0, at_once)["CUDA_VISIBLE_DEVICES"] == "5"
    launched = launch_module._variables(0, at_once, alone=False)  # accelerate's processes share what they see
    assert launched["CUDA_VISIBLE_DEVICES"] == ("5,7" if at_once == 1 else "5")


def test_the_time_of_each_run_is_its_own_and_the_first_estimate_is_from_its_first_steps(tmp_path):
    """The second run's bar kept the end of the first, with nothing left. Loading takes 20 s here and a step 5 s."""
    now, console = SimpleNamespace(at=0.0), Console(file=io.StringIO(), width=200)

    def added(name, **settings):
        (tmp_path / name).mkdir()
        return bars.add(name, job=SimpleNamespace(folder=tmp_path / name, settings=settings))

    def logged(task, seconds, done, **entry):
        now.at = seconds
        lines = [json.dumps({"step": 0}), json.dumps(entry)]
        (task.fields["job"].folder / "metrics.jsonl").write_text("\n".join(lines))
        bars.show([task], done)

    with launch_module.Bars(3, console, get_time=lambda: now.at) as bars:
        first = added("stock", max_steps=10)
        for seconds, step in ((20, 0), (25, 1), (30, 2), (35, 3)):
            logged(first, seconds, 0, step=step)
        assert (first.fields["at"], first.completed) == ("3 of 10 steps", pytest.approx(0.3))
        assert (first.elapsed, first.time_remaining) == (35, 35)
        assert bars.all.elapsed == 35 and bars.all.time_remaining == pytest.approx(135, abs=1)
        now.at = 70.0
        bars.end(first, "finished")
        second = added("ceu", num_train_epochs=2.0)
        bars.show([second], 1)
        # Nothing is known of it yet
        assert (second.fields["at"], second.completed, second.elapsed, second.time_remaining) == ("", 0, 0, None)
        assert len(bars.tasks) == 2 and bars.all.fields["at"] == "1 of 3" and bars.all.elapsed == 70
        for seconds, epoch in ((90, 0.5), (100, 1.0)):
            logged(second, seconds, 1, step=9, epoch=epoch)
        assert (second.fields["at"], second.elapsed, second.time_remaining) == ("step 9", 30, 20)
    lines = [line for line in console.file.getvalue().splitlines() if "left" in line]
    assert lines == ["stock: 2 of 10 steps, about 0 min 40 s left"]
