"""Memory and time of the CE-U loss from hidden states: this package's, losses on logits, and TRL's fused head.

    python docs/results/fused/benchmark.py                                 # CPU, 2 threads, float32: about 5 minutes
    python docs/results/fused/benchmark.py --device cuda --dtype bfloat16 --hidden_size 4096

Hardware: 2 CPU cores and 8 GiB, or one GPU. It writes `memory-<device>-<dtype>.json` and `time-<device>-<dtype>.json`
beside itself. Memory is the peak above the start, over forward and backward, each in a process of its own. Times are
taken in turn, round after round in one process, so that whatever else the machine does meets every method alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from trl.kernels import ChunkedLogProbFunction

from ceu_rl.fused import fused_linear_unlearning_loss
from ceu_rl.losses import descent_weight
from ceu_rl.provenance import environment

SEED = 0


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return fused_linear_unlearning_loss(hidden, weight, labels)


def logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits, the label masked, and cross entropy with the detached softmax as its target."""
    z = hidden @ weight.T
    masked = z.scatter(-1, labels.unsqueeze(-1), float("-inf"))
    return F.cross_entropy(z, masked.softmax(dim=-1).detach())


def peer(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The steps of open-unlearning's CE-U, which shifts the logits and selects the labelled ones before `logits`."""
    first, last = hidden[:1], labels[-1:]  # so that as many tokens are left
    z = torch.cat([hidden, first]).unsqueeze(0) @ weight.T
    shifted, targets = z[:, :-1].contiguous(), torch.cat([last, labels]).unsqueeze(0)[:, 1:].contiguous()
    labelled = targets != -100
    z, targets = shifted[labelled], targets[labelled]
    masked = z.detach().clone().scatter_(-1, targets.unsqueeze(-1), float("-inf"))
    return F.cross_entropy(z, masked.softmax(dim=-1))


def trl(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """TRL 1.16's fused log-probabilities, as its head calls them, with the odds as the weight of the gradient."""
    log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))[0]
    return (descent_weight(log_probs, max_weight=float("inf")) * log_probs).mean()


def products(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The three matrix products alone, all tokens at once: what every method above does, and no loss around them."""
    with torch.no_grad():
        z = hidden @ weight.T
        gradients = z @ weight, z.T @ hidden
    return gradients[0][0, 0] + gradients[1][0, 0]


METHODS: dict[str, Callable[..., torch.Tensor]] = {"fused": fused, "logits": logits, "peer": peer, "trl": trl}


def inputs(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(SEED)
    shape = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(tokens, args.hidden_size, **shape).requires_grad_()
    weight = torch.randn(args.vocabulary, args.hidden_size, **shape).mul_(args.hidden_size**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, args.vocabulary, (tokens,), device=args.device)


class PeakMemory:
    """The most memory above the start, in GiB, while the context is open.

    On a CPU that is anonymous memory, looked at every 2 ms (each large tensor lives for many times that): the peak that
    Linux keeps also counts the pages of libraries, which come and go.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.gib = 0.0

    @staticmethod
    def anonymous_gib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20

    def watch(self) -> None:
        while not self.finished.wait(0.002):
            self.gib = max(self.gib, self.anonymous_gib() - self.start)

    def __enter__(self) -> "PeakMemory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**30
            return self
        self.start = self.anonymous_gib()
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.cuda:
            self.gib = torch.cuda.max_memory_allocated() / 2**30 - self.start
            return
        self.finished.set()
        self.thread.join()


def peak_above_start_gib(args: argparse.Namespace, method: str, tokens: int) -> float:
    METHODS[method](*inputs(args, 2)).backward()  # what a library sets up on first use is no cost of the loss
    hidden, weight, labels = inputs(args, tokens)
    with PeakMemory(args.device) as memory:
        METHODS[method](hidden, weight, labels).backward()
    return memory.gib


def measure_memory(args: argparse.Namespace) -> list[dict]:
    runs = [(method, args.tokens) for method in METHODS] + [("fused", args.tokens * factor) for factor in (4, 16)]
    rows = []
    for method, tokens in runs:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", method, str(tokens)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"method": method, "tokens": tokens, "peak_above_start_gib": round(float(result.stdout), 3)})
        print(rows[-1], flush=True)
    return rows


def measure_time(args: argparse.Namespace) -> list[dict]:
    hidden, weight, labels = inputs(args, args.tokens)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    timed = {**METHODS, "products": products}
    seconds: dict[str, list[float]] = {method: [] for method in timed}
    for turn in range(args.rounds + 1):
        for method, loss in timed.items():
            hidden.grad = weight.grad = None
            synchronize()
            start = time.perf_counter()
            value = loss(hidden, weight, labels)
            if value.requires_grad:
                value.backward()
            synchronize()
            if turn > 0:  # the first round warms up
                seconds[method].append(time.perf_counter() - start)
        print({method: round(values[-1], 3) for method, values in seconds.items() if values}, flush=True)
    return [
        {
            "method": method,
            "tokens": args.tokens,
            "seconds": [round(value, 4) for value in values],
            "median_s": round(statistics.median(values), 4),
            "times_fused": round(statistics.median(a / b for a, b in zip(values, seconds["fused"], strict=True)), 2),
        }
        for method, values in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["memory", "time"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(peak_above_start_gib(args, args.worker[0], int(args.worker[1])))
        return
    settings = {name: getattr(args, name) for name in ("device", "dtype", "hidden_size", "vocabulary", "threads")}
    for name, measure in {"memory": measure_memory, "time": measure_time}.items():
        if args.only in (None, name):
            report = {
                "command": " ".join(["python", "docs/results/fused/benchmark.py", *sys.argv[1:]]),
                "seed": SEED,
                **settings,
                **environment(),
                "rows": measure(args),
            }
            path = args.output / f"{name}-{args.device}-{args.dtype}.json"
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
