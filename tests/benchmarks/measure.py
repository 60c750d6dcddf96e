"""Time and peak memory of what this package computes, each beside the same work without it.

    python -m tests.benchmarks.measure OUTPUT.json [--subject dpo grpo fused] [--device cuda]

The arms of a row take turns in one process, round after round, so that whatever else the machine does meets each of
them; a ratio is the median over rounds. On a CPU a second is one of this process on a core, which other processes do
not stretch. Memory is what torch has allocated at most above the start of the work: tensors, which are the same on
every machine, and not pages. `test_benchmarks.py` measures the rows of a file again and fails where a ratio has grown.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from ceu_rl import CEUDPOConfig, CEUDPOTrainer, CEUGRPOConfig, CEUGRPOTrainer
from ceu_rl.fused import fused_linear_unlearning_loss
from ceu_rl.losses import descent_weight
from ceu_rl.models import build_model, build_tokenizer, resolve_model
from ceu_rl.run.provenance import describe_device, environment, write_json

ROOT = Path(__file__).parents[2]
SEED = 0
Arms = dict[str, Callable[[], float]]
"""What to measure by name, ours first; each does its work once and returns its seconds."""

TINY = {"model": "tiny", "ranks": 1, "steps": 6, "rounds": 16}
SMOLLM2 = {"model": "smollm2", "ranks": 1, "steps": 1, "rounds": 16}
LOSS = {"subject": "fused", "hidden_size": 256, "dtype": "float32", "rounds": 4}
ROWS: dict[str, list[dict[str, Any]]] = {
    "cpu": [
        {"subject": "dpo", "sequences": 8, "tokens": 32, **TINY},
        {"subject": "dpo", "sequences": 8, "tokens": 128, **TINY},
        {"subject": "dpo", "rule": "anchored", "sequences": 8, "tokens": 128, **TINY},
        {"subject": "dpo", "sequences": 8, "tokens": 32, **TINY, "ranks": 2},
        {"subject": "dpo", "sequences": 2, "tokens": 64, **SMOLLM2},
        {"subject": "grpo", "sequences": 8, "tokens": 32, **TINY},
        {"subject": "grpo", "sequences": 8, "tokens": 128, **TINY},
        {"subject": "grpo", "sequences": 8, "tokens": 32, **TINY, "ranks": 2},
        {"subject": "grpo", "sequences": 2, "tokens": 64, **SMOLLM2},
        {"tokens": 256, "vocabulary": 8192, **LOSS},
        {"tokens": 1024, "vocabulary": 8192, **LOSS},
        {"tokens": 1024, "vocabulary": 32_768, **LOSS},
    ],
    "cuda": [{"tokens": 8192, "vocabulary": 128_256, **LOSS, "hidden_size": 4096, "dtype": "bfloat16", "rounds": 20}],
}


def measure(row: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The row with what was measured: seconds and peak of each arm, and the ratios of the first to each other."""
    if row.get("ranks", 1) > int(os.environ.get("WORLD_SIZE", "1")):
        return _on_ranks(row)
    with tempfile.TemporaryDirectory() as folder:
        arms = SUBJECTS[row["subject"]](row, device, Path(folder))
        for work in arms.values():
            work()  # what a library sets up on its first use is no cost of ours
        peaks = {name: peak_gib(work, device) for name, work in arms.items()}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(row["rounds"]):
            for name in list(arms)[:: -1 if turn % 2 else 1]:
                seconds[name].append(arms[name]())
    ours, *others = arms
    ratios = {}
    for other in others:
        pairs = [a / b for a, b in zip(seconds[ours], seconds[other], strict=True)]
        first, middle, third = statistics.quantiles(pairs, n=4)
        ratios[other] = {"time": round(middle, 3), "time_quartiles": [round(first, 3), round(third, 3)]}
        ratios[other]["memory"] = round(peaks[ours] / peaks[other], 4)
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {**row, "seconds": medians, "peak_gib": {k: round(v, 5) for k, v in peaks.items()}, "ratios": ratios}


def _on_ranks(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same in so many processes; the first writes what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "row.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(row["ranks"])]
        worker = ["-m", "tests.benchmarks.measure", str(output), "--row", json.dumps(row)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *launcher, *worker], check=True, cwd=ROOT, env=environment)
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def now(device: str) -> float:
    if device != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(work: Callable[[], Any], device: str) -> float:
    """The most memory that torch allocates above the start while the work is done, in GiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - start) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**30


# A step of training


class Clock(TrainerCallback):
    """The least seconds of a step, from its beginning to the next one's: what comes between only adds to them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.begins: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begins.append(now(self.device))

    @property
    def seconds(self) -> float:
        return min(after - before for before, after in itertools.pairwise(self.begins))


def training(row: Mapping[str, Any], device: str, folder: Path) -> Arms:
    """Steps of TRL's own trainer and of ours, on one batch of sequences of full length; GRPO's are given."""
    model, tokenizer = folder / "model", build_tokenizer()
    if row["model"] == "smollm2":
        model = Path(resolve_model("builtin:smollm2"))
    else:
        build_model(tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)
    chance = random.Random(SEED)
    many, prompt_tokens = row["sequences"] // row["ranks"], 8

    def digits(length: int) -> str:  # a token each, for both tokenizers
        return "".join(chance.choice("0123456789") for _ in range(length))

    def completed(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        encode = trainer.processing_class
        texts = [digits(row["tokens"] - prompt_tokens) for _ in prompts]
        given = {"prompt_ids": prompts, "completion_ids": texts}
        return {"logprobs": None, **{name: [encode(each)["input_ids"] for each in given[name]] for name in given}}

    def alternating(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    settings: dict[str, Any] = {
        "max_steps": row["steps"] + 1, "learning_rate": 1e-6, "logging_steps": 1, "bf16": False,
        "use_cpu": device == "cpu", "gradient_checkpointing": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if row["subject"] == "dpo":
        answers = [[digits(row["tokens"]) for _ in ("chosen", "rejected")] for _ in range(32)]
        rows = [{"prompt": digits(prompt_tokens), "chosen": a, "rejected": b} for a, b in answers]
        settings |= {"per_device_train_batch_size": many // 2, "max_length": row["tokens"]}
        ours = functools.partial(CEUDPOConfig, descent_rule=row.get("rule", "ceu"))
        classes: dict[str, Any] = {"ceu": (ours, CEUDPOTrainer), "stock": (DPOConfig, DPOTrainer)}
        given: dict[str, Any] = {}
    else:
        rows = [{"prompt": digits(prompt_tokens)} for _ in range(32)]
        settings |= {"per_device_train_batch_size": many, "num_generations": 2}
        settings |= {"max_completion_length": row["tokens"] - prompt_tokens}
        classes = {"ceu": (CEUGRPOConfig, CEUGRPOTrainer), "stock": (GRPOConfig, GRPOTrainer)}
        given = {"reward_funcs": alternating, "rollout_func": completed}

    def arm(config: Any, trainer_class: Any) -> Callable[[], float]:
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        args = config(str(folder / "run"), **settings)
        names = {"processing_class": AutoTokenizer.from_pretrained(model), "train_dataset": Dataset.from_list(rows)}
        trainer = trainer_class(policy, args=args, **names, **given)
        trainer.remove_callback(PrinterCallback)

        def turn() -> float:
            clock = Clock(device)
            trainer.add_callback(clock)
            trainer.train()
            trainer.remove_callback(clock)
            return clock.seconds

        return turn

    return {name: arm(*each) for name, each in classes.items()}


# The loss of unlearning, forward and backward from hidden states


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


def losses(row: Mapping[str, Any], device: str, folder: Path) -> Arms:
    torch.manual_seed(SEED)
    shape: dict[str, Any] = {"device": device, "dtype": getattr(torch, row["dtype"])}
    hidden = torch.randn(row["tokens"], row["hidden_size"], **shape).requires_grad_()
    weight = torch.randn(row["vocabulary"], row["hidden_size"], **shape).mul_(row["hidden_size"] ** -0.5)
    weight.requires_grad_()
    labels = torch.randint(0, row["vocabulary"], (row["tokens"],), device=device)

    def arm(loss: Callable[..., torch.Tensor]) -> Callable[[], float]:
        def work() -> float:
            hidden.grad = weight.grad = None
            start = now(device)
            value = loss(hidden, weight, labels)
            if value.requires_grad:
                value.backward()
            seconds = now(device) - start
            hidden.grad = weight.grad = None
            return seconds

        return work

    arms: dict[str, Callable[..., torch.Tensor]] = {one.__name__: one for one in (fused, logits, peer, trl, products)}
    for size in row.get("chunks", []):
        arms[f"fused, chunks of {size}"] = functools.partial(fused_linear_unlearning_loss, chunk_size=size)
    if device == "cuda":
        arms["fused, exact"] = functools.partial(fused_linear_unlearning_loss, exact=True)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            arms["liger, cross entropy"] = lambda h, w, y: LigerFusedLinearCrossEntropyLoss()(w, h, y)
        if importlib.util.find_spec("cut_cross_entropy"):
            from cut_cross_entropy import linear_cross_entropy

            arms["cut cross entropy"] = linear_cross_entropy
    return {name: arm(loss) for name, loss in arms.items() if name in row.get("arms", arms)}


Subject = Callable[[Mapping[str, Any], str, Path], Arms]
SUBJECTS: dict[str, Subject] = {"dpo": training, "grpo": training, "fused": losses}


def _is_of(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(row.get(name) == found.get(name) for name in (*row, "rule"))


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--device", choices=list(ROWS), default="cpu")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if args.row:
        found = measure(args.row)
        if os.environ["RANK"] == "0":
            write_json(args.output, found)
        return
    command = f"python -m tests.benchmarks.measure {args.output}"
    if args.device != "cpu":
        command += f" --device {args.device}"
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for row in ROWS[args.device]:
        if row["subject"] in args.subject:
            found = {**measure(row, args.device), **environment(), **describe_device(args.device, 1)}
            print(json.dumps(found), flush=True)
            rows = [each for each in rows if not _is_of(row, each)] + [found]
            rows = [each for known in ROWS[args.device] for each in rows if _is_of(known, each)]
            write_json(args.output, {"command": command, "seed": SEED, "rows": rows})


if __name__ == "__main__":
    main()
