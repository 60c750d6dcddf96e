"""`ceu-rl COMMAND`: one recipe in, one finished run out.

    ceu-rl sft|dpo|grpo|unlearn --config RECIPE.yaml [--any_field value ...]
    ceu-rl compare RECIPE.yaml ... [--learning_rate a b ...] [--seed 0 1 ...] [--any_field v1 v2 ...] [--jobs N]
    ceu-rl tofu-eval --model DIR --dataset NAME --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl env

The same under accelerate: `accelerate launch -m ceu_rl.cli dpo --config RECIPE.yaml`. Parsing, script arguments, model
and PEFT helpers are TRL's. A run leaves the model in `output_dir`, its log in `metrics.jsonl`, and its result with
provenance in `result.json`.
"""

import importlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .provenance import environment, peak_memory_gib, recipe_settings, write_json

BUILTIN_MODEL = "builtin:llama"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a run that was stopped, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "sft": lambda rest: train("sft", rest),
        "dpo": lambda rest: train("dpo", rest),
        "grpo": lambda rest: train("grpo", rest),
        "unlearn": lambda rest: train("unlearn", rest),
        "compare": compare,
        "tofu-eval": tofu_eval,
        "env": lambda rest: print_environment(),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in commands:
        return _fail("ceu-rl", ValueError(f"unknown command {command!r}; use one of {', '.join(commands)}."), 2)
    return commands[command](rest)


def train(method: str, argv: list[str]) -> int:
    """Train by one recipe: parse, load, train, evaluate, save.

    Input that cannot work ends here in one sentence, before the first step. `CEU_RL_TRACEBACK=1` keeps tracebacks.
    """
    import torch
    import yaml

    from .checks import RolloutError

    start, provenance = time.perf_counter(), environment()
    try:
        script, args, model_config, mixture = _parse(method, argv)
        args.resume_from_checkpoint = _resume_from(args.output_dir, args.resume_from_checkpoint)
        trainer = _build_trainer(method, script, args, model_config, mixture)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, yaml.YAMLError) as error:
        return _fail(f"ceu-rl {method}", error, 2)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except (FloatingPointError, RolloutError) as error:
        return _fail(f"ceu-rl {method}", error, 1)
    trainer.save_model(args.output_dir)
    step, log = trainer.state.global_step, trainer.state.log_history
    if trainer.eval_dataset is not None and not any("eval_loss" in entry and entry["step"] == step for entry in log):
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        final = {key: value for entry in log if entry["step"] == step for key, value in entry.items()}
        result = {
            "command": shlex.join(["ceu-rl", method, *argv]),
            "settings": recipe_settings(argv),
            "seed": args.seed,
            "steps": step,
            "processes": trainer.accelerator.num_processes,
            "metrics": {key: value for key, value in final.items() if key not in ("step", "epoch")},
            **_response_lengths(trainer.eval_dataset),
            "wall_time_s": round(time.perf_counter() - start, 1),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            **provenance,
        }
        write_json(Path(args.output_dir, "result.json"), result)
        print(f"The model, metrics.jsonl and result.json are in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _response_lengths(dataset: Any) -> dict[str, dict[str, float]]:
    """Mean tokens of the held-out responses, which turn log-probabilities of responses into nats per token."""
    from datasets import Dataset

    columns = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
    if not isinstance(dataset, Dataset) or not set(columns.values()) <= set(dataset.column_names):
        return {}
    return {"eval_tokens": {name: sum(map(len, dataset[ids])) / len(dataset) for name, ids in columns.items()}}


def parser_for(method: str) -> Any:
    """TRL's parser for the recipes of one method."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    script, config, _ = _classes(method)
    return TrlParser(
        (script, config, ModelConfig, DatasetMixtureConfig),  # type: ignore[arg-type]
        prog=f"ceu-rl {method}",
        usage=f"ceu-rl {method} --config RECIPE.yaml [--any_field value ...]",
    )


def _classes(method: str) -> tuple[Any, Any, Any]:
    """Script arguments, config and trainer of a method. GRPO's bring vLLM, which takes seconds to import."""
    from trl import ScriptArguments, SFTConfig, SFTTrainer

    match method:
        case "dpo":
            from .dpo import CEUDPOConfig, CEUDPOTrainer

            return ScriptArguments, CEUDPOConfig, CEUDPOTrainer
        case "grpo":
            from trl.scripts.grpo import GRPOScriptArguments

            from .grpo import CEUGRPOConfig, CEUGRPOTrainer

            return GRPOScriptArguments, CEUGRPOConfig, CEUGRPOTrainer
        case "unlearn":
            from .unlearn import UnlearnConfig, UnlearnScriptArguments, UnlearnTrainer

            return UnlearnScriptArguments, UnlearnConfig, UnlearnTrainer
    return ScriptArguments, SFTConfig, SFTTrainer


def _parse(method: str, argv: list[str]) -> tuple[Any, Any, Any, Any]:
    script, args, model_config, mixture = parser_for(method).parse_args_and_config(argv)
    if not model_config.model_name_or_path:
        raise ValueError(f"model_name_or_path is missing; give a Hub name, a folder, or {BUILTIN_MODEL} for sft.")
    if not script.dataset_name and not mixture.datasets:
        raise ValueError("dataset_name is missing; give a Hub name, a folder, or builtin:addition.")
    return script, args, model_config, mixture


def _resume_from(output_dir: str, checkpoint: str | None) -> str | None:
    """Resolve `resume_from_checkpoint`, and refuse to write over what an earlier run saved."""
    from .checks import saved_checkpoints

    folder = Path(output_dir)
    if checkpoint is None or str(checkpoint).lower() == "false":
        checkpoints = [path for _, path in saved_checkpoints(folder)]
        saved = [*checkpoints, *folder.glob("result.json"), *folder.glob("*.safetensors")]
        if saved:
            raise ValueError(
                f"output_dir {output_dir} holds an earlier run ({saved[0].name}); choose another, move it away, or "
                "continue it with --resume_from_checkpoint true."
            )
        return None
    if str(checkpoint).lower() == "true":
        if not saved_checkpoints(folder):
            raise ValueError(f"There is no checkpoint in {output_dir} to resume; leave resume_from_checkpoint out.")
        return str(saved_checkpoints(folder)[-1][1])
    if not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint {checkpoint} is no checkpoint; name a checkpoint-N folder, or true.")
    return checkpoint


def _build_trainer(method: str, script: Any, args: Any, model_config: Any, mixture: Any) -> Any:
    from transformers import AutoTokenizer, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from .models import build_bpe_tokenizer, build_model, build_tokenizer
    from .callbacks import MetricsFile, Progress, TaskScore
    from .tofu.data import has_questions, load_tofu, to_prompt_completion

    datasets, task = _load_dataset(method, script, mixture, evaluates=args.eval_strategy != "no" or args.eval_on_start)
    asks = method in ("sft", "unlearn") and any(has_questions(dataset) for dataset in datasets.values())

    given: dict[str, Any]
    if model_config.model_name_or_path == BUILTIN_MODEL:
        if method != "sft":
            raise ValueError(f"{BUILTIN_MODEL} has random weights; train it with `ceu-rl sft` and name that folder.")
        tokenizer: Any = build_tokenizer()
        if asks:  # one tokenizer for all the models of a dataset
            full = load_tofu(script.dataset_name, "full")
            tokenizer = build_bpe_tokenizer([*full["question"], *full["answer"]])
        model = build_model(tokenizer, seed=args.seed, **(args.model_init_kwargs or {}))
        args.model_init_kwargs = None
        given = {"model": model, "processing_class": tokenizer}
    else:
        args.model_init_kwargs = {
            "revision": model_config.model_revision,
            "trust_remote_code": args.trust_remote_code,
            "attn_implementation": model_config.attn_implementation,
            "dtype": model_config.dtype,
            **(args.model_init_kwargs or {}),
        }
        given = {
            "model": model_config.model_name_or_path,
            "quantization_config": get_quantization_config(model_config),
        }
    if asks:
        tokenizer = given.get("processing_class") or AutoTokenizer.from_pretrained(
            model_config.model_name_or_path, trust_remote_code=args.trust_remote_code
        )
        template = getattr(script, "template", None)
        datasets = {
            name: to_prompt_completion(dataset, tokenizer, template) if has_questions(dataset) else dataset
            for name, dataset in datasets.items()
        }
    if method == "grpo":
        given["reward_funcs"] = _load_rewards(script)
    _, _, trainer_class = _classes(method)
    trainer = trainer_class(
        args=args,
        peft_config=get_peft_config(model_config),
        **{f"{name}_dataset": dataset for name, dataset in datasets.items()},
        **given,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    trainer.add_callback(MetricsFile)
    if task is not None and "eval" in datasets:
        start = None if method == "sft" else model_config.model_name_or_path
        trainer.add_callback(TaskScore(trainer, task, datasets["eval"]["prompt"], start))
    return trainer


def _load_dataset(method: str, script: Any, mixture: Any, evaluates: bool) -> tuple[dict[str, Any], Any]:
    """The datasets of the trainer by their name there (train and eval, or forget and retain), and the built-in task."""
    from datasets import concatenate_datasets, load_dataset
    from trl import get_dataset

    from .tasks import get_task, load_task_dataset
    from .tofu.data import is_tofu, load_tofu

    name, config, task = script.dataset_name, script.dataset_config, None
    if method == "unlearn":
        sets = {"forget": script.forget, **({"retain": script.retain} if script.retain else {})}
        if config is None:
            return {role: load_tofu(name, one) for role, one in sets.items()}, None
        splits = load_dataset(name, name=config)
        return {role: _split(splits, one) for role, one in sets.items()}, None
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif is_tofu(name):
        if config is None:
            raise ValueError(
                f"dataset_config is missing; give a config of {name}, such as full, or several joined by +."
            )
        parts = [load_tofu(name, one).select_columns(["question", "answer"]) for one in config.split("+")]
        dataset = {script.dataset_train_split: concatenate_datasets(parts)}
    elif name.startswith("builtin:"):
        task = get_task(name)
        kind = {"sft": "sft", "dpo": "preference", "grpo": "prompt"}[method]
        dataset = load_task_dataset(name, kind, config)
    else:
        dataset = load_dataset(name, name=config, streaming=script.dataset_streaming)
    datasets = {"train": _split(dataset, script.dataset_train_split)}
    if evaluates:
        datasets["eval"] = _split(dataset, script.dataset_test_split)
    return datasets, task


def _load_rewards(script: Any) -> list[Any]:
    """The reward model and functions of a recipe: the names that TRL's own script takes, or dotted paths."""
    import trl.rewards

    rewards: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for path in script.reward_funcs or []:
        module, _, name = path.rpartition(".")
        if module and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            rewards.append(getattr(importlib.import_module(module) if module else trl.rewards, name))
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"reward_funcs names {path!r}, which does not resolve ({error}); give module.function."
            ) from error
    if not rewards:
        raise ValueError("reward_funcs is missing; give a dotted path such as ceu_rl.tasks.addition.accuracy.")
    return rewards


def _split(dataset: Any, split: str) -> Any:
    if split not in dataset:
        raise ValueError(
            f"The dataset has no split {split!r} but {sorted(dataset)}; set dataset_train_split and dataset_test_split."
        )
    return dataset[split]


def compare(argv: list[str]) -> int:
    """Run several recipes and report them side by side; see `ceu_rl.stability.compare`."""
    from .stability.compare import main as compare_main

    return compare_main(argv)


def tofu_eval(argv: list[str]) -> int:
    """Evaluate a model on TOFU; see `ceu_rl.tofu.evaluate`."""
    from .tofu.evaluate import main as tofu_eval_main

    return tofu_eval_main(argv)


def print_environment() -> int:
    """Print versions, device, and whether vLLM works here."""
    from rich.console import Console
    from rich.table import Table

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


def _fail(command: str, error: Exception, status: int) -> int:
    if os.environ.get("CEU_RL_TRACEBACK"):
        raise error
    print(f"{command}: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
