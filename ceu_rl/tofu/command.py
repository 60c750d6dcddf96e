"""What `ceu-rl tofu-eval` and `ceu-rl muse-eval` share: options, the model, and a result that can be continued."""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from ..data.prompts import PromptArguments
from ..models import load_model, model_dtype, resolve_model
from ..run.errors import NameCause
from ..run.provenance import environment, peak_memory, write_json


def make_parser(command: str, description: str | None, result: str, dataset: str | None) -> argparse.ArgumentParser:
    """The options of both commands, to which each adds its own; `dataset` is the default, None if there is none."""
    parser = argparse.ArgumentParser(
        prog=f"ceu-rl {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model_name_or_path", "--model", help="folder or Hub name of the model, with its tokenizer")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    option("--dtype", choices=dtypes, help="auto: as it is stored; default: bfloat16 on a GPU, float32 on a CPU")
    names = ("--dataset_name", "--dataset")
    option(*names, default=dataset, required=dataset is None, help="Hub name, folder or built-in set (%(default)s)")
    option(
        "--output_dir",
        help=f"where {result} is written, and what is finished until then, from which the same command continues; "
        "default: the folder of the model",
    )
    prompt = {field.name: field.metadata["help"] for field in dataclasses.fields(PromptArguments) if field.metadata}
    for name in ("template", "system_prompt", "chat_template_kwargs"):
        option(f"--{name}", help=prompt[name].replace("%", "%%"))
    option("--batch_size", type=int, help="answers in one forward pass; default: as many as fit in memory")
    option("--limit", type=int, help="only the first N rows of each set, for a quick look")
    return parser


def run(
    argv: Sequence[str],
    args: argparse.Namespace,
    result: str,
    evaluate: Callable[[argparse.Namespace, Any, Any, Path], dict[str, Any]],
) -> tuple[Path, dict[str, Any]]:
    """The path of a result, and what `evaluate(args, model, tokenizer, part)` returns with provenance; see [`save`].

    A model or folder that cannot be used ends in a ValueError before anything is loaded.
    """
    path = _check_output(args.model_name_or_path, args.output_dir, result)
    start, provenance, part = time.perf_counter(), environment(), _part(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model(args.model_name_or_path)
    with NameCause(f"Reading --model_name_or_path {args.model_name_or_path}", "give a model with its tokenizer."):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = load_model(source, model_dtype(args.dtype, device)).to(device)
    try:
        found = evaluate(args, model, tokenizer, part)
    except KeyboardInterrupt:
        if part.exists():
            print(f"What is finished is in {part}; the same command continues from there.", file=sys.stderr)
        raise
    found |= {"model": args.model_name_or_path, "command": shlex.join(["ceu-rl", *argv])}
    times = {"wall_time_s": round(time.perf_counter() - start, 1), **peak_memory(device)}
    return path, {**found, **times, **provenance}


def save(path: Path, result: dict[str, Any], others: Sequence[str] = ()) -> None:
    """Write a result, print its summary beside those of `others` in it, and remove what was kept until then."""
    write_json(path, result, allow_nan=False)
    _part(path).unlink(missing_ok=True)
    columns = {"value": result["summary"], **{name: result[name]["summary"] for name in others if name in result}}
    table = Table("metric", *columns, title=f"{result['model']} on {result['dataset']}")
    for metric in result["summary"]:
        table.add_row(metric, *(f"{summary[metric]:.4g}" for summary in columns.values()))
    Console().print(table)
    print(f"The values of each row are in {path}.")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.stem}.part.jsonl")


def _check_output(model: str | None, output_dir: str | None, name: str) -> Path:
    """The path of a result, which must be new, in a folder that there is then."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; start an evaluation alone, without a launcher.")
    if not model:
        raise ValueError("--model_name_or_path is missing; give a folder or a Hub name.")
    if not output_dir and not Path(model).is_dir():
        raise ValueError(
            f"--model_name_or_path {model} is no folder to write to; check its name, or give --output_dir."
        )
    path = Path(output_dir or model, name)
    if path.exists():
        raise ValueError(f"{path} exists; choose another folder with --output_dir, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
