"""CPU time of a DPO step of SmolLM2 under what could make it shorter, each in processes of its own that take turns.

    python docs/results/speed/cpu.py OUTPUT.json

A step is 4 pairs of `recipes/dpo/smollm2-chain-sum/stock.yaml`, trained from the model itself. Seconds are those of the
process on its cores, which other processes do not stretch; the first step is left out. bfloat16 pays only where the
processor multiplies it.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ceu_rl.cli import main as ceu_rl
from ceu_rl.run import run
from ceu_rl.run.callbacks import Pace
from ceu_rl.run.provenance import environment, peak_memory, write_json

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes/dpo/smollm2-chain-sum"
STEPS, ROUNDS = 5, 3
KEEP = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_MAX_": "0"}  # for glibc
ARMS = {  # recipe, what the command line adds, and the environment
    "stock, the reference at every step": ("stock", ["--precompute_ref_log_probs", "false"], KEEP),
    "CE-U, the reference at every step": ("ceu-1", ["--precompute_ref_log_probs", "false"], KEEP),
    "stock, the reference's log-probabilities once": ("stock", [], KEEP),
    "stock, in bfloat16, the reference at every step": (
        "stock",
        ["--precompute_ref_log_probs", "false", "--bf16", "true"],
        KEEP,
    ),
    "stock, the reference at every step, freed memory given back": (
        "stock",
        ["--precompute_ref_log_probs", "false"],
        {},
    ),
}


class Clock(Pace):
    """Reads the process's seconds at the beginning of each step and at its end."""

    read: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        super().on_step_begin(*args, **kwargs)
        self.read.append(time.process_time())

    def on_step_end(self, *args, **kwargs):
        super().on_step_end(*args, **kwargs)
        self.read.append(time.process_time())


def steps(arm: str) -> list[float]:
    """Seconds of each step but the first of a run from the command line."""
    recipe, options, _ = ARMS[arm]
    run.Pace = Clock
    with tempfile.TemporaryDirectory() as folder:
        given = ["--model_name_or_path", "builtin:smollm2", "--output_dir", folder, "--save_strategy", "no"]
        given += ["--max_steps", str(STEPS), "--eval_strategy", "no", "--eval_on_start", "false"]
        given += ["--dataset_config", f"min_terms=2, max_terms=2, max_digits=3, size={4 * STEPS}", *options]
        if status := ceu_rl(["dpo", "--config", str(RECIPES / f"{recipe}.yaml"), *given]):
            raise SystemExit(status)
    return [end - begin for begin, end in zip(Clock.read[2::2], Clock.read[3::2], strict=True)]


def main(output: str) -> None:
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks: dict[str, float] = {}
    for turn in range(ROUNDS):
        for arm in list(ARMS)[:: -1 if turn % 2 else 1]:
            command = [sys.executable, __file__, "--arm", arm]
            ran = subprocess.run(command, env={**os.environ, **ARMS[arm][2]}, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                raise SystemExit(ran.returncode)
            found = json.loads(ran.stdout.splitlines()[-1])
            seconds[arm] += found["seconds"]
            peaks[arm] = max(found["peak"], peaks.get(arm, 0))
        print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr)
    medians = {arm: round(statistics.median(times), 2) for arm, times in seconds.items()}
    first = next(iter(medians.values()))
    result = {
        "command": shlex.join(["python", "docs/results/speed/cpu.py", *sys.argv[1:]]),
        "seed": 0,
        "steps_each": ROUNDS * (STEPS - 1),
        "median_step_s": medians,
        "over_first": {arm: round(value / first, 3) for arm, value in medians.items()},
        "peak_memory_gib": {arm: round(peak, 3) for arm, peak in peaks.items()},
        **environment(),
    }
    write_json(Path(output), result)


if __name__ == "__main__":
    if sys.argv[1] == "--arm":
        taken = steps(sys.argv[2])
        print(json.dumps({"seconds": taken, "peak": peak_memory(torch.device("cpu"))["peak_host_memory_gib"]}))
    else:
        main(sys.argv[1])
