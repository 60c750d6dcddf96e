"""Memory and time of the fused CE-U loss, against the naive loss on logits and TRL's fused log-probabilities.

    OMP_NUM_THREADS=2 python docs/results/fused/benchmark.py OUTPUT.json

Forward and backward of one loss, in float32, with gradients for hidden states and weight: 1024 tokens, hidden size 512,
vocabulary 128,256. Each peak is that of a process of its own, above what it holds before the loss; times are medians
of turns that the methods take in one process. `logits` is the expression that the peers compute: all logits, the label
masked, a softmax without gradient, a cross entropy with soft targets. `trl` takes CE-U's gradient from TRL's fused
log-probabilities, by weighting each with its odds.
"""

import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.nn import functional as F
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from ceu_rl.fused import fused_linear_unlearning_loss
from ceu_rl.losses import descent_weight
from ceu_rl.provenance import environment

HIDDEN, VOCABULARY, TOKENS, TURNS, SEED = 512, 128_256, 1024, 5, 0


def ours(hidden, weight, labels):
    return fused_linear_unlearning_loss(hidden, weight, labels)


def logits(hidden, weight, labels):
    z = hidden @ weight.T
    q = z.detach().scatter(-1, labels[:, None], float("-inf")).softmax(-1)
    return F.cross_entropy(z, q)


def trl(hidden, weight, labels):
    log_probs = _ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )[0]
    return (descent_weight(log_probs, max_weight=float("inf")) * log_probs).mean()


METHODS = {"ours": ours, "logits": logits, "trl": trl}


def problem(tokens):
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def peak_gib(method, tokens):
    """Run in a process of its own: peak resident memory of one loss with its gradients, above the start, in GiB."""
    inputs = problem(tokens)
    start = psutil.Process().memory_info().rss
    METHODS[method](*inputs).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - start / 2**30


def main(output):
    peaks = {}
    for method, tokens in [("ours", 1024), ("logits", 1024), ("trl", 1024), ("ours", 4096), ("ours", 16384)]:
        command = [sys.executable, __file__, "--peak", method, str(tokens)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        peaks.setdefault(method, {})[str(tokens)] = round(float(found), 3)
        print(f"{method} at {tokens} tokens: {found} GiB", file=sys.stderr)
    inputs, seconds = problem(TOKENS), {method: [] for method in METHODS}
    for turn in range(TURNS + 1):
        for method, loss in METHODS.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(*inputs), inputs[:2])
            if turn:  # the first turn warms up
                seconds[method].append(time.perf_counter() - start)
        print(f"turn {turn} of {TURNS}", file=sys.stderr)
    median = {method: statistics.median(times) for method, times in seconds.items()}
    result = {
        "command": shlex.join(["python", "docs/results/fused/benchmark.py", *sys.argv[1:]]),
        "hidden": HIDDEN,
        "vocabulary": VOCABULARY,
        "tokens": TOKENS,
        "seed": SEED,
        "peak_gib_above_start": peaks,
        "gradient_of_weight_gib": round(HIDDEN * VOCABULARY * 4 / 2**30, 3),
        "median_s": {method: round(value, 3) for method, value in median.items()},
        "time_over_ours": {method: round(value / median["ours"], 2) for method, value in median.items()},
        **environment(),
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--peak":
        print(peak_gib(sys.argv[2], int(sys.argv[3])))
    else:
        main(*sys.argv[1:])
