"""What a result says of the device that its run used."""

from types import SimpleNamespace

import pytest
import torch

from ceu_rl.run import provenance
from ceu_rl.run.provenance import describe_run, peak_memory

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """A machine with two GPUs, and a run of two processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 12 * GIB)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '570.124.06\\n570.124.06\\n'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    # The other process took two GiB less of the GPU, and a thousand more of its host
    monkeypatch.setattr(provenance, "gather_object", lambda mine: [*mine, [mine[0][0] - 2, 1000.0, *mine[0][2:]]])


def trainer_on(device, tiny_model):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=2, mixed_precision="bf16")
    return SimpleNamespace(model=tiny_model(), accelerator=accelerator)


def test_a_run_on_gpus(two_gpus, tiny_model):
    assert describe_run(trainer_on("cuda:0", tiny_model)) == {
        "device": "2 x NVIDIA H200",
        "driver": "570.124.06",
        "dtype": "float32",
        "mixed_precision": "bf16",
        "attention": "sdpa",
    }
    found = peak_memory(torch.device("cuda:0"))
    assert found == {"peak_memory_gib": 10.0, "peak_host_memory_gib": 1000.0, "peak_reserved_gib": 12.0}


def test_a_run_on_the_cpu_of_a_machine_with_gpus(two_gpus, tiny_model):
    """`use_cpu: true` recorded the name of the GPU, and its memory: 0."""
    found = describe_run(trainer_on("cpu", tiny_model))
    assert found["device"].startswith("CPU, ") and "driver" not in found
    peaks = peak_memory(torch.device("cpu"))
    assert peaks.keys() == {"peak_memory_gib", "peak_host_memory_gib"} and peaks["peak_memory_gib"] > 0.1
