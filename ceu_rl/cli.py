"""`ceu-rl COMMAND`: one recipe in, one finished run out.

    ceu-rl sft|dpo|grpo|unlearn --config RECIPE.yaml [--any_field value ...]
    ceu-rl compare RECIPE.yaml ... [--learning_rate a b ...] [--seed 0 1 ...] [--any_field v1 v2 ...] [--jobs N]
    ceu-rl tofu-eval --model DIR --dataset NAME --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl muse-eval --model DIR --dataset NAME
    ceu-rl recipes [NAME [DEST]]
    ceu-rl env

`ceu-rl COMMAND --help` shows a command's options; `--help-all` all that TRL has for it. The same under accelerate:
`accelerate launch -m ceu_rl.cli dpo --config RECIPE.yaml`. Parsing, script arguments, model and PEFT helpers are TRL's.
A run leaves the model in `output_dir`, its log in `metrics.jsonl`, and its result with provenance in `result.json`.

Exit status: 0; 1 for a run that was stopped or failed; 2 for bad input, before the first step; 130 for Ctrl-C and 143
for SIGTERM, with a checkpoint to go on from. `CEU_RL_TRACEBACK=1` keeps the traceback of every error.
"""

import importlib
import logging
import subprocess
import sys
from collections.abc import Sequence

from .run.errors import Boundary

TRAINING = ("sft", "dpo", "grpo", "unlearn")
OTHERS = {"compare": "stability.grid", "tofu-eval": "tofu.evaluate", "muse-eval": "tofu.muse", "recipes": "run.recipes"}
COMMANDS = (*TRAINING, *OTHERS, "env")


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
        if command in TRAINING:
            boundary.status = _train(command, rest, boundary)
        elif command == "env":
            boundary.status = _print_environment(rest)
        else:
            boundary.status = importlib.import_module(f".{OTHERS[command]}", __package__).main(rest)
    return boundary.status


def _train(method: str, argv: list[str], boundary: Boundary) -> int:
    from .run.config import set_variables

    set_variables(argv)
    from .run.run import run

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ceu_rl").setLevel(logging.INFO)
    return run(method, argv, boundary)


def _print_environment(argv: list[str]) -> int:
    """Print versions and device, and whether they work here: exit status 1 if the trainers do not."""
    import torch

    from .run.provenance import describe_device, environment

    if argv:
        print("usage: ceu-rl env\n\nPrint versions and device, and whether the trainers and vLLM work here.")
        return 0 if argv[0] in ("-h", "--help") else 2
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    found = environment() | describe_device(device, torch.accelerator.device_count())
    works = True
    for name, value in {**found.pop("versions"), **found}.items():
        print(f"{name:<16} {value}")
    vllm = "from vllm import LLM; from vllm.platforms import current_platform as p; print(p.device_type)"
    for name, code in (("the route works", "from ceu_rl.cli import try_route as t; print(t())"), ("vLLM works", vllm)):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        last = (ran.stderr if ran.returncode else ran.stdout).strip().rpartition("\n")[2]
        print(f"{name:<16} {'no: ' if ran.returncode else 'yes, on '}{last}")
        works = works and (not ran.returncode or code == vllm)
    return 0 if works else 1


def try_route() -> str:
    """One forward and backward of a tiny model through TRL's fused head and the route; returns the device."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from .models import build_model, build_tokenizer
    from .route import route_descent

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = build_model(build_tokenizer(), hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model.to(device)  # type: ignore[arg-type]
    add_fused_lm_head(model)
    route_descent(model)
    ids = torch.arange(8, 24, device=device)[None]
    model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    if not 0 < norm < torch.inf:
        raise FloatingPointError(f"the gradient's norm is {norm.item()}")
    return str(device)


if __name__ == "__main__":
    sys.exit(main())
