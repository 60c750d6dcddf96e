"""Folders of runs as training leaves them, made in no time."""

import json
import re
from pathlib import Path

import filelock

from ceu_rl.stability.runs import Run

ORIGIN = {"commit": "0" * 40, "versions": {"torch": "2.13.0"}, "device": "CPU"}
HELD: list[filelock.BaseFileLock] = []


def make_run(root, arm, setting=None, seed=0, log=(), end="finished", method="dpo", held=(), settings=None, **result):
    """One run in its folder under `root`: `log` and `held` are lists of entries, `end` is its status."""
    name = re.sub(r"[^\w=.,-]", "_", ",".join(f"{key}={value}" for key, value in (setting or {}).items()) or "recipe")
    made = Run(arm, setting or {}, seed, Path(root, arm.replace("/", "_"), name, str(seed)))
    made.folder.mkdir(parents=True)
    for file, lines in (("metrics.jsonl", log), ("held_out.jsonl", held)):
        if lines:
            (made.folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    fields = {"ceu_coef": 0 if arm == "stock" else 1, "max_steps": 100, **(setting or {}), **(settings or {})}
    record = {"arm": arm, "seed": seed, "method": method, "recipe": f"recipes/{arm}.yaml", "settings": fields}
    (made.folder / "run.json").write_text(json.dumps(record))
    outcome = {"command": f"ceu-rl {method} --config {arm}.yaml", "date": "2026-11-24T10:00:00+00:00", **ORIGIN}
    outcome |= {"method": method, "settings": fields, **result}
    if end == "finished":
        (made.folder / "result.json").write_text(json.dumps({"steps": 100, **outcome}))
    elif end in ("diverged", "failed"):
        # The words of an error decided it before
        failure = {"reason": "it met a non-finite loss, or it did not", "log_tail": ["last <line>"]}
        (made.folder / "failure.json").write_text(json.dumps(outcome | failure | {"diverged": end == "diverged"}))
    elif end == "running":  # for as long as the tests
        HELD.append(filelock.FileLock(made.folder.with_name(f"{seed}.lock")))
        HELD[-1].acquire()
    return made


def scored(*values, key="eval_greedy_accuracy", **more):
    """A log with evaluations at the steps 0, 50, 100 and so on."""
    return [{"step": 50 * place, key: value, **more} for place, value in enumerate(values)]


def pair(step, row, margin, tokens=10):
    """A held-out pair whose margin is that many nats: the chosen response gained them."""
    sums = {"chosen": -20.0 + margin, "rejected": -30.0, "ref_chosen": -20.0, "ref_rejected": -30.0}
    return {"step": step, "dataset": "eval", "row": row, **sums, "chosen_tokens": tokens, "rejected_tokens": tokens}


def question(step, row, greedy):
    return {"step": step, "dataset": "questions", "row": row, "greedy": greedy}
