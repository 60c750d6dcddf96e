"""Runs that are killed, lose a process or run out of room end at the weights of a run that was left alone.

The counts of the slow tests are in docs/results/faults/sigkill.json, written by `python -m tests.faults.harness`.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ceu_rl.cli import main
from ceu_rl.run.checkpoints import saved_checkpoints

from .harness import ROOT, STEPS, folders_of, make, recipe_of, same_weights, steps_of

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def harness(folder, *words):
    command = [sys.executable, "-m", "tests.faults.harness", folder, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


@pytest.mark.parametrize(
    ("methods", "tries"),
    [
        (["dpo", "unlearn"], 1),
        pytest.param(["dpo", "unlearn"], 20, marks=pytest.mark.slow),
        pytest.param(["grpo"], 20, marks=[pytest.mark.slow, pytest.mark.vllm, needs_vllm]),
        pytest.param(["compare"], 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_what_is_killed_at_random_and_resumed_loses_nothing(tmp_path, methods, tries):
    result = harness(tmp_path / "runs", *methods, "--tries", tries, "--output", tmp_path / "faults.json")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    counts = json.loads((tmp_path / "faults.json").read_text())["sigkill"]
    for method in methods:
        assert counts[method]["tries"] == counts[method]["killed"] == tries
        assert counts[method]["lost"] == counts[method]["processes_left_behind"] == 0


@pytest.fixture
def runs(tmp_path):
    make(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, and how to give it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own needs root, and the right to mount")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(runs, small_disk, capsys):
    """Room for one checkpoint and a part of the next: the first is whole, and a run with room goes on from it."""
    disk, resize = small_disk
    words = ["dpo", "--config", str(recipe_of(runs, "dpo")), "--output_dir"]
    assert main([*words, str(runs / "whole")]) == 0
    capsys.readouterr()
    assert main([*words, str(disk / "out")]) == 1
    printed = capsys.readouterr().err
    assert "go on from the last with --resume_from_checkpoint true" in printed and "Traceback" not in printed
    assert [step for step, _ in saved_checkpoints(disk / "out")] == [2] and len(folders_of(disk / "out")) == 2
    resize("64m")
    assert main([*words, str(disk / "out"), "--resume_from_checkpoint", "true"]) == 0
    assert same_weights(disk / "out", runs / "whole")


TWO = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
DDP = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_of_which_one_gets_a_signal(runs, number):
    """It takes the other along, by SIGTERM with a checkpoint, and the two that go on end where two end."""

    def start(out, *more):
        words = [*TWO, DDP, "-m", "ceu_rl.cli", "dpo", "--config", recipe_of(runs, "dpo"), "--output_dir", out, *more]
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, env=ENVIRONMENT, cwd=runs, stderr=subprocess.DEVNULL)

    assert start(runs / "whole").wait() == 0
    launcher = start(runs / "out")
    while steps_of(runs / "out") < 3:
        assert launcher.poll() is None
        time.sleep(0.001)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(launcher.pid).children()[-1].send_signal(number)
    assert launcher.wait() != 0 and steps_of(runs / "out") < STEPS
    assert [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(runs)] == []
    assert saved_checkpoints(runs / "out")
    assert start(runs / "out", "--resume_from_checkpoint", "true").wait() == 0
    assert same_weights(runs / "out", runs / "whole")
