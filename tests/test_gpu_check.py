"""The check of a GPU, on a CPU: what can run there runs, and the rest says why it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .gpu_check import CHECKS, METHODS


def test_the_gpu_check_on_a_cpu(tmp_path):
    output = tmp_path / "check.json"
    command = [sys.executable, "-m", "tests.gpu_check", str(output), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads(output.read_text())
    checks = found["checks"]
    assert list(checks) == list(CHECKS) and found["device"] == "cpu"
    assert {name for name, check in checks.items() if check["state"] == "skipped"} == {"recompilations", "gpu_tests"}
    assert all(check["reason"] == "needs a CUDA device" for check in checks.values() if check["state"] == "skipped")
    assert checks["versions"]["found"].keys() >= {"commit", "versions", "device", "date"}
    assert checks["unlearning"]["found"].keys() == METHODS.keys()


def test_a_check_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """In a process that dies without a word, and in one that takes longer than is left."""
    script = (
        "import os, sys, time; from tests import gpu_check; "
        "gpu_check.CHECKS = {'dies': lambda *given: os._exit(3), 'fails': lambda *given: 1 / 0, "
        "'lasts': lambda *given: time.sleep(99), 'fsdp2': gpu_check.fsdp2}; "
        "sys.argv[2:] = ['--device', 'cpu', '--minutes', '0.5', '--only', 'dies', 'fails', 'fsdp2', 'lasts']; "
        "sys.exit(gpu_check.main())"
    )
    output = tmp_path / "check.json"
    result = subprocess.run([sys.executable, "-c", script, str(output)], cwd=Path(__file__).parents[1])
    checks = json.loads(output.read_text())["checks"]
    assert result.returncode == 1
    states = ["failed", "failed", "passed", "skipped"]
    assert [checks[name]["state"] for name in ("dies", "fails", "fsdp2", "lasts")] == states
    assert "ZeroDivisionError" in checks["fails"]["log"] and "ended with 3" in checks["dies"]["reason"]
