"""The TOFU study: unlearn forget10 with a method at a rate, evaluate, and keep settings and summaries.

    OMP_NUM_THREADS=1 python docs/results/tofu/study.py --dataset FOLDER --output_dir docs/results/tofu \
        --cells ceu-3e-4 npo-3e-4

Each cell is the two commands that its file names, `ceu-rl unlearn` and `ceu-rl tofu-eval`, each as a process of its
own; two cells run at a time. It starts from runs/tofu/full and runs/tofu/retain90, and skips what is done.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

ARMS = {
    "ceu": ("ceu", []),
    "ceu_retain": ("ceu", ["--retain", "retain90"]),
    "ceu_retain_seed1": ("ceu", ["--retain", "retain90", "--seed", "1"]),
    **{name: (name, []) for name in ("grad_ascent", "grad_diff", "npo", "simnpo", "wga", "satimp", "undial")},
}
RUNS = Path("runs/tofu")
EVALUATE = ["--split", "forget10", "--batch_size", "256", "--max_new_tokens", "160"]


def run(module: str, argv: list[str], log: Path) -> tuple[int, float]:
    """Run one command in a fork of this process, which has paid for the imports: its exit status and CPU seconds."""
    with log.open("a") as file:
        pid = os.fork()
        if pid == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os._exit(importlib.import_module(module).main(argv))
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def evaluate(folder: Path, dataset: str, retain: bool) -> int:
    if (folder / "tofu_eval.json").is_file():
        return 0
    compared = ["--retain", str(RUNS / "retain90" / "tofu_eval.json")] if retain else []
    argv = ["--model", str(folder), "--dataset", dataset, *EVALUATE, *compared]
    return run("ceu_rl.tofu.evaluate", argv, folder / "log.txt")[0]


def keep(folder: Path, output: Path) -> None:
    """Settings, provenance, summary and the forget set's truth ratios; the other values of each row stay behind."""
    made = json.loads((folder / "result.json").read_text())
    found = json.loads((folder / "tofu_eval.json").read_text())
    ratios = [float(f"{row['truth_ratio']:.6g}") for row in found.pop("items")["forget10_perturbed"]]
    result = json.dumps({"training": made, "evaluation": found}, indent=1)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{folder.name}.json").write_text(f'{result[:-2]},\n "forget_truth_ratios": {json.dumps(ratios)}\n}}\n')


def run_cell(name: str, rate: str, dataset: str, output: Path) -> None:
    folder = RUNS / f"{name}-{rate}"
    recipe, extra = ARMS[name]
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    if not (folder / "result.json").is_file():
        given = ["--learning_rate", rate, *extra, "--output_dir", str(folder)]
        argv = ["unlearn", "--config", f"recipes/tofu/tiny/{recipe}.yaml", "--dataset_name", dataset, *given]
        status, seconds = run("ceu_rl.cli", argv, folder / "log.txt")
        if status == 0:
            made = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**made, "cpu_time_s": round(seconds, 1)}, indent=1))
    status = status or evaluate(folder, dataset, retain=True)
    if status:
        print(f"{folder.name}: exit status {status}, see {folder}/log.txt", flush=True)
        return
    keep(folder, output)
    found = json.loads((folder / "tofu_eval.json").read_text())["summary"]
    print(folder.name, *(f"{found[key]:.3g}" for key in ("forget_quality", "model_utility")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True, metavar="ARM-RATE", help="such as ceu-3e-4")
    args = parser.parse_args()
    for module in ("ceu_rl.cli", "ceu_rl.unlearn", "ceu_rl.tofu.evaluate", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    context, running = multiprocessing.get_context("fork"), []
    for name in ("retain90", "full"):
        if evaluate(RUNS / name, args.dataset, retain=name == "full"):
            sys.exit(f"{name} could not be evaluated, see {RUNS / name}/log.txt")
        keep(RUNS / name, args.output_dir)
    for name, _, rate in (cell.partition("-") for cell in args.cells):
        if (args.output_dir / f"{name}-{rate}.json").is_file():
            continue
        while len(running := [process for process in running if process.is_alive()]) == 2:
            time.sleep(1)
        running.append(context.Process(target=run_cell, args=(name, rate, args.dataset, args.output_dir)))
        running[-1].start()
    for process in running:
        process.join()


if __name__ == "__main__":
    main()
