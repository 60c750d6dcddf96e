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
from ceu_rl.run.progress import ShareBar
from ceu_rl.stability import grid, report, runs
from ceu_rl.stability import launch as launch_module


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Compare two recipes with two seeds through a launcher, by runs that only take two seconds."""
    (tmp_path / "dpo").mkdir()
    for arm in ("stock", "ceu"):
        (tmp_path / "dpo" / f"{arm}.yaml").write_text(yaml.safe_dump({"method": "dpo", "max_steps": 20}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "MODULE", [sys.executable, "-m", "tests.stand_in_run"])
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
    found = [runs.Run("", {}, 0, path.parent) for path in folder.glob("runs/*/*/*/run.json")]
    assert [run.status for run in found] == ["finished"] * 4


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


@pytest.mark.parametrize(("launcher", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_a_launcher_without_its_package_is_one_sentence(launch, monkeypatch, launcher, extra):
    monkeypatch.setitem(sys.modules, launcher, None)
    status, out = launch(launcher)
    (line,) = out.splitlines()[1:]
    assert status == 2 and f"--launcher {launcher} needs its package" in line and f"'ceu-rl[{extra}]'" in line


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
            its = {each: run_of(each) for each in psutil.Process(raylet.pid).children(recursive=True)}
            its = {each: folder for each, folder in its.items() if folder and (folder / "checkpoint-3").exists()}
            if its:
                break
        killed.extend(str(each.pid) for each in its)
        everything = psutil.Process(raylet.pid).children(recursive=True)
        raylet.kill()
        for each in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        cluster.remove_node(nodes[0], allow_graceful=False)

    def run_of(process):
        with contextlib.suppress(psutil.Error, ValueError):
            words = process.cmdline()
            return tmp_path / words[words.index("--output_dir") + 1]

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


def test_the_bar_has_the_share_of_all_steps_and_the_time_left_by_the_pace_since_the_first(tmp_path):
    """The bar of a second run kept the end of the first. Loading takes 20 s here and a step of ten 5 s."""
    now = SimpleNamespace(at=0.0)
    stock, ceu = (
        runs.Run(arm, {}, 0, tmp_path / "runs" / arm / "recipe" / "0", {"settings": settings})
        for arm, settings in (("stock", {"max_steps": 10}), ("ceu", {"num_train_epochs": 2.0}))
    )
    with ShareBar(Console(file=io.StringIO()), 2, get_time=lambda: now.at) as bar:
        (task,) = bar.tasks
        first = [(stock, 20 + 5 * step, 0, {"step": step}) for step in range(4)]
        for run, seconds, done, entry in (*first, (ceu, 100, 1, {"step": 9, "epoch": 0.5})):
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps(entry))
            now.at = seconds
            bar.show(done, {run.name: run.at})
            if seconds == 35:
                assert (task.description, task.completed) == ("0 of 2 runs, stock/recipe/0 at step 3 of 10", 0.3)
                assert task.elapsed == 35 and task.time_remaining in (85, 86)  # 17 of 20 steps, rounded up
        assert (task.description, task.completed) == ("1 of 2 runs, ceu/recipe/0 at step 9", 1.25)
        bar.show(1, {"none": runs.Run("none", {}, 0, tmp_path / "none").at})
        assert (task.description, task.elapsed) == ("1 of 2 runs", 100)
