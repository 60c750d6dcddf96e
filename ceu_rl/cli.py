"""`ceu-rl COMMAND`: one recipe in, one finished run out.

    ceu-rl sft|dpo|grpo|unlearn --config RECIPE.yaml [--any_field value ...]
    ceu-rl compare RECIPE.yaml ... [--learning_rate a b ...] [--seed 0 1 ...] [--any_field v1 v2 ...] [--jobs N]
    ceu-rl tofu-eval --model DIR --dataset NAME --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl muse-eval --model DIR --dataset NAME
    ceu-rl recipes [NAME [DEST]]
    ceu-rl gsm8k example_model_solutions.jsonl PAIRS.jsonl
    ceu-rl env

`ceu-rl COMMAND --help` shows the command's own options. The same under accelerate:
`accelerate launch -m ceu_rl.cli dpo --config RECIPE.yaml`. Parsing, script arguments, model and PEFT helpers are TRL's.
A run leaves the model in `output_dir`, its log in `metrics.jsonl`, and its result with provenance in `result.json`.

Exit status: 0; 1 for a run that was stopped or failed; 2 for bad input, before the first step; 130 for Ctrl-C and 143
for SIGTERM, with a checkpoint to go on from. `CEU_RL_TRACEBACK=1` keeps the traceback of every error.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence

from .run.errors import Boundary


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, rest = arguments[0], arguments[1:]
    with Boundary(f"ceu-rl {command}" if command in COMMANDS else "ceu-rl") as boundary:
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; use one of {', '.join(COMMANDS)}.")
        boundary.status = COMMANDS[command](rest, boundary)
    return boundary.status


def _train(method: str) -> Callable[[list[str], Boundary], int]:
    def command(argv: list[str], boundary: Boundary) -> int:
        from .run.run import run

        logging.basicConfig(format="%(message)s")
        logging.getLogger("ceu_rl").setLevel(logging.INFO)
        return run(method, argv, boundary)

    return command


def _compare(argv: list[str], boundary: Boundary) -> int:
    """Run several recipes and report them side by side."""
    from .stability.compare import main as compare_main

    return compare_main(argv)


def _tofu_eval(argv: list[str], boundary: Boundary) -> int:
    """Evaluate a model on TOFU."""
    from .tofu.evaluate import main as tofu_eval_main

    return tofu_eval_main(argv)


def _muse_eval(argv: list[str], boundary: Boundary) -> int:
    """Evaluate what a model remembers of long texts."""
    from .tofu.muse import main as muse_eval_main

    return muse_eval_main(argv)


def _recipes(argv: list[str], boundary: Boundary) -> int:
    """List the recipes that the package brings, or copy some."""
    from .run.recipes import main as recipes_main

    return recipes_main(argv)


def _gsm8k(argv: list[str], boundary: Boundary) -> int:
    """Make preference pairs out of the model solutions that come with GSM8K."""
    from .tasks.gsm8k import main as gsm8k_main

    return gsm8k_main(argv)


def _print_environment(argv: list[str], boundary: Boundary) -> int:
    """Print versions, device, and whether vLLM works here."""
    from rich.console import Console
    from rich.table import Table

    from .run.provenance import environment

    if argv:
        print("usage: ceu-rl env\n\nPrint versions, device, and whether vLLM works here.")
        return 0 if argv[0] in ("-h", "--help") else 2
    table = Table("item", "value")
    found = environment()
    for name, value in {**found.pop("versions"), **found}.items():
        table.add_row(name, str(value))
    probe = "from vllm import LLM; from vllm.platforms import current_platform as p; print(p.device_type)"
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines() or ["no output"]
    table.add_row("vLLM works", f"yes, on {lines[-1]}" if ran.returncode == 0 else f"no: {lines[-1]}")
    Console().print(table)
    return 0


COMMANDS: dict[str, Callable[[list[str], Boundary], int]] = {
    **{method: _train(method) for method in ("sft", "dpo", "grpo", "unlearn")},
    "compare": _compare,
    "tofu-eval": _tofu_eval,
    "muse-eval": _muse_eval,
    "recipes": _recipes,
    "gsm8k": _gsm8k,
    "env": _print_environment,
}

if __name__ == "__main__":
    sys.exit(main())
