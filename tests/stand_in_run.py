"""Stands for the command line of a run: it trains for two seconds, or as long as a file `hold` is there, with a
checkpoint at each step, and goes on from the last one. Asked to end it takes a moment, as a step and saving do."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
settings = yaml.safe_load((folder / "recipe.yaml").read_text())
settings.pop("method")


def save(number, frame):
    time.sleep(60 if Path("slow").exists() else 0.3)
    (folder / "saved").touch()
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, save)
step = max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)
with open(folder.with_name(f"{folder.name}.started"), "a") as file:
    file.write(f"{os.getpid()} {step} {' '.join(sys.argv)}\n")
while step < 20 or Path("hold").exists():
    time.sleep(0.1)
    step += 1
    (folder / f"checkpoint-{step}").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (folder / f"checkpoint-{step}" / name).write_text("{}")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 0.5}) + "\n")
(folder / "result.json").write_text(json.dumps({"settings": settings, "steps": step}))
