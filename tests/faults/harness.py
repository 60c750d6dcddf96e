"""Kills runs and holds what they come to, once they are resumed, against a run that nobody killed.

    python -m tests.faults.harness FOLDER METHOD ... [--tries N] [--seed N] [--output FILE]

METHOD is dpo, unlearn, grpo (with vLLM) or compare. A run is a fork of this process, which has imported everything
already, so that a try takes the seconds of its steps. Half of the kills fall between two steps, the others while a
checkpoint is being written. What is lost, and what is left behind, is counted.
"""

import argparse
import filecmp
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ceu_rl.cli import main as ceu_rl
from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.run.checkpoints import saved_checkpoints
from ceu_rl.run.provenance import environment, write_json

from ..conftest import TINY
from ..trainers import SETTINGS, save_model

ROOT = Path(__file__).parents[2]
STEPS = 12
MARK = "CEU_RL_FAULTS"  # in the environment of every process that a try starts
ROWS = [(a, b) for a in range(8) for b in range(6)]
NOTHING = {"tries": 0, "killed": 0, "half_written_skipped": 0, "lost": 0, "processes_left_behind": 0}
SAVED = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
SAVED |= {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "seed": 0}
OWN = {
    "dpo": {"dataset_name": "preferences"},
    "unlearn": {"dataset_name": "questions", "forget": "forget", "retain": "retain", "loss_type": "ceu"},
    "grpo": {
        "dataset_name": "prompts",
        "reward_funcs": ["tests.faults.harness.digits"],
        "num_generations": 4,
        "max_completion_length": 6,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
    },
}


def digits(completions, **kwargs):
    return [sum(character.isdigit() for character in completion) / 6 for completion in completions]


def make(folder):
    """A tiny model, its data and a recipe for each method, in a folder."""
    tokenizer = build_tokenizer()
    head_dim = 32  # the least that vLLM's attention for CPU takes
    save_model(build_model(tokenizer, seed=1, **TINY, head_dim=head_dim), tokenizer, folder / "model")
    answers = [{"question": f"{a}+{b}?", "answer": f"{a + b} it is"} for a, b in ROWS]
    prompts = [{"prompt": f"{a}+{b}="} for a, b in ROWS]
    pairs = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b}{b}"[: 1 + b % 3]} for a, b in ROWS]
    rows = {"preferences/train": pairs, "prompts/train": prompts}
    rows |= {"questions/forget": answers[:24], "questions/retain": answers[24:]}
    for name, content in rows.items():
        path = folder / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    for method, own in OWN.items():
        recipe = {"model_name_or_path": str(folder / "model"), **SETTINGS, **SAVED, **own, "method": method}
        recipe["dataset_name"] = str(folder / "data" / own["dataset_name"])
        path = recipe_of(folder, method)
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(recipe))


def recipe_of(folder, method):
    return folder / method / "recipe.yaml"


class Run:
    """`ceu-rl` with these arguments, in a fork of this process and a session of its own."""

    def __init__(self, arguments, log, mark):
        self.log = log
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(arguments, mark))
        self.process.start()

    def run(self, arguments, mark):
        os.setsid()
        os.environ[MARK] = mark
        with open(self.log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.exit(ceu_rl([str(word) for word in arguments]))

    def wait(self, until=lambda: False, limit=1800):
        """The exit status, negative for a signal, or None where `until` came first."""
        end = time.monotonic() + limit
        while self.process.exitcode is None and not until():
            assert time.monotonic() < end, f"{self.log} did not end within {limit} s"
            time.sleep(0.001)
        return self.process.exitcode

    def kill(self):
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()


def left_behind(mark, at_once=False):
    """The processes of a try that are there and, unless they are wanted at once, stay there for ten seconds."""
    end = time.monotonic() + (0 if at_once else 10)
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    left.append(process.pid)
            except psutil.Error:
                continue
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def start(folder, method, out):
    """A run, or a comparison of two, from the beginning or from its last checkpoint."""
    if method == "compare":
        words = ["compare", recipe_of(folder, "dpo"), "--output_dir", out, "--learning_rate", "1e-3", "2e-3"]
        return Run([*words, "--jobs", "2"], out.with_name(f"{out.name}.log"), str(out))
    resume = ["--resume_from_checkpoint", "true"] if saved_checkpoints(out) else []
    if not resume:  # killed before its first checkpoint: what there is is moved away, and the run starts again
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    words = [method, "--config", recipe_of(folder, method), "--output_dir", out, *resume]
    return Run(words, out.with_name(f"{out.name}.log"), str(out))


def steps_of(out):
    return sum(path.read_text().count('"loss"') for path in out.rglob("metrics.jsonl"))


def folders_of(out):
    return set(out.rglob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def same_weights(one, other):
    first, second = (next(Path(folder).glob("*.safetensors"), None) for folder in (one, other))
    return None not in (first, second) and filecmp.cmp(first, second, shallow=False)


def kill_at_random(folder, method, out, chance):
    """Kill a run, or a comparison and in every other try its runs too, and start it again; says what became of it."""
    run, compares = start(folder, method, out), method == "compare"
    step, other = chance.randrange(1, STEPS * (1 + compares)), chance.random() < 0.5
    run.wait(lambda: steps_of(out) >= step)
    if other and not compares:  # in a checkpoint
        before = folders_of(out)
        run.wait(lambda: folders_of(out) - before)
    time.sleep(chance.uniform(0, 0.05))
    killed = run.kill() == -signal.SIGKILL
    if other and compares:
        for pid in left_behind(str(out), at_once=True):
            os.kill(pid, signal.SIGKILL)
    found = {"killed": killed, "step": steps_of(out), "half_written": 0, "left_behind": 0, "status": 0}
    if not compares:
        found["half_written"] = len(folders_of(out) - {path for _, path in saved_checkpoints(out)})
        found["left_behind"] = len(left_behind(str(out)))
    if killed:
        found["status"] = start(folder, method, out).wait()
        found["left_behind"] += len(left_behind(str(out)))
    return found


def try_method(folder, method, tries, seed):
    """Count over the tries: kills, half-written checkpoints that were skipped, and what was lost or left behind."""
    whole = folder / f"{method}-whole"
    shutil.rmtree(whole, ignore_errors=True)
    run = start(folder, method, whole)
    assert run.wait() == 0, run.log
    models = [path.parent for path in whole.rglob("model.safetensors") if PREFIX_CHECKPOINT_DIR not in path.parent.name]
    expected = {path.relative_to(whole): path for path in models}
    assert len(expected) == (2 if method == "compare" else 1)
    count = {**NOTHING, "steps": []}
    for number in range(tries):
        out, chance = folder / f"{method}-{number}", random.Random(f"{method} {seed} {number}")
        shutil.rmtree(out, ignore_errors=True)
        found = kill_at_random(folder, method, out, chance)
        kept = found["status"] == 0 and all(same_weights(out / at, path) for at, path in expected.items())
        count["tries"] += 1
        count["killed"] += found["killed"]
        count["half_written_skipped"] += found["half_written"]
        count["lost"] += not kept
        count["processes_left_behind"] += found["left_behind"]
        count["steps"].append(found["step"])
        print(method, number, found, "kept" if kept else "LOST", flush=True)
    return count


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="+", choices=(*OWN, "compare"))
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").exists():
        maker = multiprocessing.get_context("fork").Process(target=make, args=(args.folder,))
        maker.start()  # in a process of its own: what it starts would be in the way of later forks
        maker.join()
        assert maker.exitcode == 0
    for module in ("dpo", "run.run", "unlearn", *(["grpo"] if "grpo" in args.methods else [])):
        importlib.import_module(f"ceu_rl.{module}")  # once, before the forks
    found, failures = {}, 0
    for method in args.methods:
        count = try_method(args.folder, method, args.tries, args.seed)
        command = f"python -m tests.faults.harness FOLDER {method} --tries {args.tries}"
        found[method] = {**count, "command": command, **environment()}
        if args.output:
            write_json(args.output, {"sigkill": found})
        failures += count["lost"] + count["processes_left_behind"]
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main()))
