"""What to know of this package on a CUDA device, in ten minutes; on a CPU it runs what can run there, in small.

    python -m tests.gpu_check OUTPUT.json [--device cuda] [--minutes 10] [--only fused unlearning]

Each check runs in a process of its own, so that one which fails leaves the device to the others. The file has for each
its state (passed, failed, skipped), why, its seconds and its numbers, and where they come from. The exit status is 1 if
a check failed.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from trl import DPOConfig, DPOTrainer

from ceu_rl import CEUDPOConfig, CEUDPOTrainer, UnlearnConfig, UnlearnTrainer
from ceu_rl import fused as fused_module
from ceu_rl.fused import fused_linear_unlearning_loss
from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.run.provenance import environment, write_json
from ceu_rl.unlearn import METHODS

from .benchmarks.measure import measure
from .trainers import SETTINGS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
M135 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
M135 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


class Skipped(Exception):
    """Why a check cannot run here."""


def need_cuda(device: str) -> None:
    if device != "cuda":
        raise Skipped("needs a CUDA device")


# The checks: each takes the device and an empty folder, and returns its numbers


def versions(device: str, folder: Path) -> dict[str, Any]:
    """What was installed, and which device this is."""
    packages = ("triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "nvidia-cublas")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    for compiler in ("gcc", "nvcc"):
        path = shutil.which(compiler)
        found[compiler] = subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path else None
    found["cuda"] = torch.version.cuda
    if device == "cuda":
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return {**environment(), "also": found}


def gpu_tests(device: str, folder: Path) -> dict[str, Any]:
    """The tests of the kernels on the device, and those marked gpu."""
    need_cuda(device)
    if not importlib.util.find_spec("pytest"):
        raise Skipped("pytest is not installed")
    here = Path(__file__).parent
    from .test_fused_kernels import BOTH_WAYS

    both = ["-k", BOTH_WAYS, str(here / "test_fused.py")]
    for which in ([str(here / "test_fused_kernels.py")], both, ["-m", "gpu", str(here)]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which]
        status = subprocess.run(command, cwd=here.parent).returncode
        assert status in (0, 5), f"pytest ended with {status}"  # 5: no test was selected
    return {}


def fused(device: str, folder: Path) -> dict[str, Any]:
    """Time and memory of the fused loss beside three products and other losses, in several chunks."""
    shape = {"hidden_size": 4096, "vocabulary": 128_256, "dtype": "bfloat16", "rounds": 20}
    rows = [{"tokens": 8192, "chunks": [2048, 4096]}, {"tokens": 32_768, "chunks": [8192], "rounds": 8}]
    if device == "cpu":
        shape |= {"hidden_size": 32, "vocabulary": 1009, "dtype": "float32", "rounds": 2}
        rows = [{"tokens": 64, "chunks": [16]}]
    found = []
    for row in rows:
        need = 8 * row["tokens"] * shape["vocabulary"] * 2  # bytes, for the losses that hold all logits
        if device == "cuda" and torch.cuda.mem_get_info()[0] < need:
            row["arms"] = ["fused", "trl"]
        found.append(measure({"subject": "fused", **shape, **row}, device))
    return {"rows": found}


def recompilations(device: str, folder: Path) -> dict[str, Any]:
    """How often the kernel is compiled for batches of ten lengths."""
    need_cuda(device)
    module = fused_module._kernels(device, torch.bfloat16)
    if module is None:
        raise Skipped("triton is not installed")
    weight = torch.randn(32_000, 512, device=device).bfloat16().requires_grad_()
    for tokens in range(100, 1100, 100):
        hidden = torch.randn(tokens + tokens // 100, 512, device=device).bfloat16().requires_grad_()
        labels = torch.randint(32_000, hidden.shape[:1], device=device)
        fused_linear_unlearning_loss(hidden, weight, labels, labels % 3 == 0).backward()
    compiled = len(module._softmax_of_others.device_caches[torch.cuda.current_device()][0])
    assert compiled <= 2, compiled
    return {"compiled": compiled}


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 1000)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight, bias = self.head.weight, self.head.bias
        assert isinstance(weight, DTensor) == isinstance(self, FSDPModule)
        return fused_linear_unlearning_loss(self.body(hidden), weight, labels, labels % 3 == 0, bias)


def assert_sharded_as_whole(device: str) -> None:
    """FSDP2 averages over its processes the gradients of one, of a head that is sharded apart from its model."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh(device, (processes,))
    whole, sharded = Toy().to(device), Toy().to(device)
    fully_shard(sharded.head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    hidden, labels = torch.randn(32, 64, device=device), torch.randint(1000, (32,), device=device)
    whole(hidden, labels).backward()
    sharded(hidden.chunk(processes)[rank], labels.chunk(processes)[rank]).backward()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(other.grad, DTensor)
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-5, atol=1e-7)


def fsdp2(device: str, folder: Path) -> dict[str, Any]:
    """FSDP2 with a world of one: the gradients of the fused loss are those without it."""
    backend, store = "nccl" if device == "cuda" else "gloo", torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    assert_sharded_as_whole(device)
    torch.distributed.destroy_process_group()
    return {}


def settings(device: str, folder: Path, **given: Any) -> dict[str, Any]:
    on_device = {"use_cpu": device == "cpu", "bf16": device == "cuda", "output_dir": str(folder / "run")}
    return {**SETTINGS, "per_device_train_batch_size": 4, "learning_rate": 1e-5, **on_device, **given}


def dpo(device: str, folder: Path) -> dict[str, Any]:
    """Five steps of DPO with checkpointing in bf16: `ceu_coef` 0 is TRL's trainer, bit for bit."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    tokenizer = build_tokenizer()
    start = build_model(tokenizer, **(M135 if device == "cuda" else SMALL), attn_implementation="eager")
    rows = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i + 2} or so"} for i in range(20)]
    found, weights = {}, []
    for name, config, trainer_class, given in (
        ("stock", DPOConfig, DPOTrainer, {}),
        ("ceu_coef 0", CEUDPOConfig, CEUDPOTrainer, {"ceu_coef": 0.0}),
        ("ceu_coef 0.5", CEUDPOConfig, CEUDPOTrainer, {"ceu_coef": 0.5}),
    ):
        args = config(**settings(device, folder, max_steps=5, gradient_checkpointing=True, **given))
        model, reference, data = copy.deepcopy(start), copy.deepcopy(start), Dataset.from_list(rows)
        trainer = trainer_class(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
        began = time.perf_counter()
        trainer.train()
        found[name] = {"seconds": time.perf_counter() - began, "loss": trainer.state.log_history[-2]["loss"]}
        weights.append([value.detach().cpu() for value in trainer.model.parameters()])
    assert all(map(torch.equal, weights[0], weights[1])), "ceu_coef 0 is not bit for bit stock"
    assert not all(map(torch.equal, weights[0], weights[2]))
    return found


def unlearn(device: str, folder: Path, loss_type: str, dtype: torch.dtype, **given: Any) -> Any:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **(M135 if device == "cuda" else SMALL)).to(dtype)
    rows = [{"prompt": f"{a}+{b}=", "completion": f" {a + b} it is"} for a in range(4) for b in range(6)]
    forget, retain = Dataset.from_list(rows[:12]), Dataset.from_list(rows[12:])
    given = {"gradient_checkpointing": False, "max_steps": 3, **given}
    args = UnlearnConfig(**settings(device, folder, loss_type=loss_type, **given))
    kept = None if loss_type == "grad_ascent" else retain
    return UnlearnTrainer(model, args, forget, kept, processing_class=tokenizer)


@contextmanager
def host_syncs(device: str) -> Iterator[Counter[str]]:
    """Where the host waits for the device, by file and line, and how often."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield places
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    for each in seen:
        if "synchroniz" in str(each.message):
            places[f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"] += 1


def unlearning(device: str, folder: Path) -> dict[str, Any]:
    """Three steps of each unlearning loss, with the time of a step and the host syncs of the last."""
    found = {}
    for loss_type in METHODS:
        trainer = unlearn(device, folder, loss_type, torch.bfloat16 if device == "cuda" else torch.float32)
        step, seconds, syncs = trainer.training_step, [], []

        def timed(*args: Any, step: Any = step, seconds: Any = seconds, syncs: Any = syncs) -> torch.Tensor:
            began = time.perf_counter()
            with host_syncs(device) as places:
                loss: torch.Tensor = step(*args)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            syncs.append(dict(places))
            return loss

        trainer.training_step = timed
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert len(losses) == 3 and all(map(math.isfinite, losses)), losses
        found[loss_type] = {"loss": losses, "seconds": min(seconds), "syncs": syncs[-1]}
    return found


def precision(device: str, folder: Path) -> dict[str, Any]:
    """The first loss and gradient norm of CE-U: weights in bfloat16 beside float32 under autocast and in float32."""
    found = {}
    kinds = {"float32": (torch.float32, False), "float32 under autocast": (torch.float32, True)}
    for name, (dtype, bf16) in {**kinds, "bfloat16": (torch.bfloat16, False)}.items():
        trainer = unlearn(device, folder, "ceu", dtype, max_steps=1, bf16=bf16)
        trainer.train()
        log = trainer.state.log_history[0]
        found[name] = {"loss": log["forget_loss"], "grad_norm": float(log["grad_norm"])}
    for name, each in found.items():
        for key, value in each.items():
            assert math.isclose(value, found["float32"][key], rel_tol=0.05), (name, key, found)
    return found


CHECKS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    check.__name__: check for check in (versions, fused, recompilations, fsdp2, precision, unlearning, dpo, gpu_tests)
}


def _child(name: str, device: str, folder: Path) -> None:
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        record = {"state": "passed", "found": CHECKS[name](device, folder)}
    except Skipped as reason:
        record = {"state": "skipped", "reason": str(reason)}
    (folder / "record.json").write_text(json.dumps(record))


def run(name: str, device: str, limit: float) -> dict[str, Any]:
    """The record of one check, which is ended after `limit` seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder, began = Path(place), time.perf_counter()
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, device, folder))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            record: dict[str, Any] = {"state": "skipped", "reason": f"not done within the {limit:.0f} s that were left"}
        elif (folder / "record.json").exists():
            record = json.loads((folder / "record.json").read_text())
        else:
            log = (folder / "log").read_text()[-3000:]
            record = {"state": "failed", "reason": f"its process ended with {process.exitcode}", "log": log}
        return {**record, "seconds": round(time.perf_counter() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks without touching CUDA, which a fork would not survive
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    end = time.perf_counter() + 60 * args.minutes
    command = f"python -m tests.gpu_check {args.output.name} --device {device} --minutes {args.minutes:g}"
    checks: dict[str, Any] = {}
    for name in args.only:
        checks[name] = run(name, device, end - time.perf_counter())
        said = f"{name}: {checks[name]['state']} ({checks[name]['seconds']} s) {checks[name].get('reason', '')}"
        print(said, flush=True)
        write_json(args.output, {"command": command, "device": device, "checks": checks})
    return int(any(check["state"] == "failed" for check in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
