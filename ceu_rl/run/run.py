"""One recipe, one run: build, train, evaluate, save, and the result with its provenance."""

import functools
import json
import math
import pkgutil
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback

from .. import models
from ..data.load import load
from ..data.prompts import PromptFormat
from ..data.rows import check_layout
from ..tasks import articles
from ..tofu.data import ask, has_questions, is_tofu, load_tofu, to_preferences, to_prompt_completion
from . import checkpoints
from .callbacks import HeldOutFile, MetricsFile, Pace, ProgressBar, StartModel, TaskScore
from .config import CLASSES, build_configs, read_arguments, settings_of, with_defaults
from .engines import check_engine, check_processes, engines_on_cpu, note_batch, save_whole
from .errors import Boundary, import_function, note
from .provenance import describe_run, environment, peak_memory, write_json
from .retention import TEXTS, KeptScore, load_kept

ASKING = ("sft", "dpo", "unlearn")  # methods that take rows of question and answer
RESULT, FAILURE = "result.json", "failure.json"
LOCK = "_run.lock"  # the push to the Hub leaves out what begins with an underscore


def run(method: str, argv: Sequence[str], boundary: Boundary) -> int:
    """Train by one recipe and return the exit status; `boundary` prints what goes wrong.

    What is recorded are the settings that were read before the run: the recipe may change or go while it trains.
    """
    try:
        status = _run(method, argv, boundary)
    except NothingLeft as done:
        print(f"{boundary.command}: {done}", file=sys.stderr)
        status = 0
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


def _run(method: str, argv: Sequence[str], boundary: Boundary) -> int:
    start, provenance = time.perf_counter(), environment()
    arguments = read_arguments(method, argv)
    _check_names(arguments, argv)
    engines_on_cpu()
    script, args, model_config, keeps = build_configs(method, arguments)
    check_processes(args)
    settings = settings_of(arguments)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    saved: dict[str, Any] = {"settings": checkpoints.moving(with_defaults(method, settings)), "batch": batch}
    with _hold_folder(args), ExitStack() as end:
        args.resume_from_checkpoint = checkpoint = _resume_from(method, args, saved)
        datasets, task = load(method, script, _evaluates(args))
        saved["rows"] = {name: checkpoints.fingerprint(dataset) for name, dataset in datasets.items() if name != "eval"}
        if checkpoint is not None:
            _check_is_the_run(checkpoint, saved)
        with models.whole_weights():
            trainer, prompt = _build_trainer(method, script, args, model_config, datasets, task, load_kept(keeps))
        trainer.run_record = saved
        check_engine(trainer.accelerator)
        record = {
            "method": method,
            "command": shlex.join(["ceu-rl", method, *argv]),
            "settings": settings,
            "seed": args.seed,
            "resumed": checkpoint is not None,
            **({"prompt": prompt} if prompt else {}),
            **provenance,
            **describe_run(trainer),
        }
        note_batch(args)
        if isinstance(trainer.train_dataset, Dataset) and not len(trainer.get_train_dataloader()):
            raise ValueError(
                f"The {len(trainer.train_dataset)} rows are too few for a batch; give more, or make it smaller."
            )
        if method == "grpo":
            end.callback(trainer.close)  # vLLM's groups of processes go before torch's
        if checkpoint is not None:
            boundary.remedy = f"It was reading {checkpoint}: name an earlier one with resume_from_checkpoint."
        try:
            with _Course(trainer, boundary) as course:
                trainer.train(resume_from_checkpoint=checkpoint)
            if course.stopped_by:
                print(
                    f"{boundary.command}: stopped by {course.stopped_by.name} after step {trainer.state.global_step}, "
                    f"with a checkpoint in {args.output_dir}; go on with --resume_from_checkpoint true.",
                    file=sys.stderr,
                )
                return 128 + course.stopped_by
            boundary.failure = 1
            _finish(method, trainer, args, script, record, start)
        except FloatingPointError as error:  # in each process, since the loss of one alone may be bad
            found = {**record, "diverged": True, "steps": trainer.state.global_step, "reason": str(error)}
            part = Path(args.output_dir, f"failure-{args.process_index}.json")
            write_json(part, found)
            part.replace(part.with_name(FAILURE))
            raise
    return 0


def _finish(method: str, trainer: Any, args: Any, script: Any, record: Mapping[str, Any], start: float) -> None:
    """Save the model, evaluate it once more if need be, and write the result."""
    step, log = trainer.state.global_step, trainer.state.log_history
    if step == 0:
        raise ValueError("No step was trained: the stream ended before its first batch; give more rows.")
    save_whole(trainer.accelerator)
    trainer.save_model(args.output_dir)
    evaluated = any("eval_loss" in entry and entry["step"] == step for entry in log)
    # The best model is another one than that of the last step
    if trainer.eval_dataset is not None and (args.load_best_model_at_end or not evaluated):
        trainer.evaluate()
    trainer.save_state()
    final = {key: value for entry in log if entry["step"] == step for key, value in entry.items()}
    if not math.isfinite(final.get("eval_loss", 0.0)):
        raise FloatingPointError(
            f"The evaluation after step {step} met a non-finite loss ({final['eval_loss']}); lower learning_rate."
        )
    result = {
        **record,
        "diverged": False,
        "steps": step,
        "processes": trainer.accelerator.num_processes,
        "metrics": {key: value for key, value in final.items() if key not in ("step", "epoch")},
    }
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Pace | TaskScore):
            result |= callback.result()
    if isinstance(trainer.eval_dataset, Dataset):
        result["eval_rows"] = len(trainer.eval_dataset)
    result |= {"wall_time_s": round(time.perf_counter() - start, 1), **peak_memory(args.device)}
    if trainer.is_world_process_zero():
        Path(args.output_dir, FAILURE).unlink(missing_ok=True)
        write_json(Path(args.output_dir, RESULT), result)
        print(f"The model, metrics.jsonl and result.json are in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def _check_names(arguments: Mapping[str, Any], argv: Sequence[str]) -> None:
    name = arguments.get("model_name_or_path")
    if not name:
        raise ValueError("model_name_or_path is missing; give a Hub name, a folder, or builtin:smollm2.")
    if "output_dir" in arguments and not str(arguments["output_dir"] or "").strip():
        raise ValueError(f"output_dir is {arguments['output_dir']!r}; give a folder.")
    if not arguments.get("dataset_name"):
        raise ValueError("dataset_name is missing; give a Hub name, a folder, a file, or a task (builtin:addition).")
    recipe = next((Path(word) for word in argv if Path(word).suffix in (".yaml", ".yml")), None)
    models.check_model_name(name, recipe)
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(f"model_name_or_path {name} is an adapter; merge it into its base (merge_and_unload).")
    if reward := arguments.get("reward_model_name_or_path"):
        models.check_model_name(reward, recipe, "reward_model_name_or_path")


def _evaluates(args: Any) -> bool:
    return args.eval_strategy != "no" or args.eval_on_start


# the folder of a run


def _hold_folder(args: Any) -> AbstractContextManager[Any]:
    """Hold `output_dir` for one run; the first process of a distributed run holds it for all."""
    folder = Path(args.output_dir)
    if args.process_index:
        return nullcontext()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; choose a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise ValueError(f"output_dir {folder} is in use by another run; wait for its end.") from None


class NothingLeft(Exception):
    """The run that is to be resumed has ended; its text says where."""


def _resume_from(method: str, args: Any, record: Mapping[str, Any]) -> str | None:
    """Resolve `resume_from_checkpoint`, and refuse to write over what an earlier run saved."""
    folder, checkpoint = Path(args.output_dir), args.resume_from_checkpoint
    whole = [path for _, path in checkpoints.saved_checkpoints(folder)]
    if str(checkpoint).lower() == "true":
        if whole:
            return str(whole[-1])
        result = json.loads((folder / RESULT).read_text()) if checkpoints.is_json(folder / RESULT) else {}
        ended = result and {"settings": checkpoints.moving(with_defaults(method, result["settings"]))}
        if ended and not checkpoints.differences(ended, record):
            raise NothingLeft(f"nothing is left of this run of {result['steps']} steps in {folder}.")
        raise ValueError(f"There is no checkpoint in {folder} to resume; leave resume_from_checkpoint out.")
    if str(checkpoint).lower() in ("none", "false"):
        checkpoint = None
    elif not checkpoints.is_json(Path(str(checkpoint), checkpoints.TRAINER_STATE_NAME)):
        raise ValueError(f"resume_from_checkpoint {checkpoint} is no whole checkpoint; name a checkpoint-N, or true.")
    if checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve():
        if saved := checkpoints.traces(folder):
            way = ", or continue it with --resume_from_checkpoint true" if whole else ""
            raise ValueError(f"output_dir {folder} holds an earlier run ({saved[0].name}); choose another{way}.")
    return checkpoint


def _check_is_the_run(checkpoint: str, record: Mapping[str, Any]) -> None:
    """Raise a ValueError for a checkpoint of other settings or rows, but for the length of the run."""
    path = Path(checkpoint, checkpoints.RUN_NAME)
    if not checkpoints.is_json(path):
        note(f"{checkpoint} has no {path.name}, so its settings and rows are not compared with this run's.")
        return
    found = checkpoints.differences(json.loads(path.read_text()), record)
    named = [f"{name} was {then} and is {now}" for name, (then, now) in found.items() if name not in checkpoints.LENGTH]
    if named:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(named)}; give what it had, or start a new run "
            "with it as model_name_or_path."
        )


class _Course(TrainerCallback):
    """Ends a run at Ctrl-C or SIGTERM after the step that it is in, with a checkpoint; a second signal ends it at once.

    Every process stops at the same step, whichever of them got the signal first. It tells the boundary how far the run
    got: what fails before the first step is bad input, and what was saved is kept.
    """

    def __init__(self, trainer: Any, boundary: Boundary) -> None:
        self.trainer, self.boundary, self.number = trainer, boundary, 0
        self.stopped_by: signal.Signals | None = None

    def __enter__(self) -> "_Course":
        self.trainer.add_callback(self)
        self.before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        print("Stopping after this step, with a checkpoint; once more ends at once.", file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Without a result it was stopped while it saved the model
        if state.global_step >= state.max_steps and checkpoints.is_json(Path(args.output_dir, RESULT)):
            raise NothingLeft(f"nothing is left of this run of {state.max_steps} steps in {args.output_dir}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.boundary.failure != 1:
            self.boundary.failure, self.boundary.remedy = 1, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.num_processes > 1:
            mine = torch.tensor([self.number], device=self.trainer.accelerator.device)
            self.number = int(self.trainer.accelerator.gather(mine).max())
        if self.number and state.global_step < state.max_steps:
            self.stopped_by = signal.Signals(self.number)
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.boundary.remedy = (
            f"The checkpoints in {args.output_dir} are intact; go on from the last with --resume_from_checkpoint true."
        )


# the trainer


def _build_trainer(
    method: str, script: Any, args: Any, model_config: Any, datasets: dict[str, Any], task: Any, kept: dict[str, Any]
) -> tuple[Any, Any]:
    """The trainer with its callbacks, and what the result says of the prompt, where rows are questions."""
    from trl import get_peft_config

    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError("activation_offloading is True, and the model is on a CPU already; leave it out.")
    if kept and (method == "unlearn" or not _evaluates(args)):
        remedy = "use tofu-eval" if method == "unlearn" else "set eval_strategy, as to steps"
        raise ValueError(f"eval_facts and eval_solutions are scored at evaluations, and this run has none; {remedy}.")
    asks = method in ASKING and any(has_questions(dataset) for dataset in datasets.values())
    template = getattr(args, "chat_template_path", None)
    if template and template.endswith((".jinja", ".j2")) and not Path(template).is_file():  # TRL would ask the Hub
        raise ValueError(f"chat_template_path is {template!r}, and there is no such file; give the path of a template.")
    if template and asks:  # which TRL would set after the questions were put into the old one
        raise ValueError(f"chat_template_path is {template!r}, and questions take the model's; leave it out.")
    given = _name_model(method, script, args, model_config, asks, next(iter(datasets.values())))
    prompt, form = None, PromptFormat(chat_template_kwargs=getattr(args, "chat_template_kwargs", None))
    if method in ASKING:
        form = PromptFormat.of(script, model_config.model_name_or_path)
    if asks:
        make = functools.partial(to_preferences, seed=args.seed) if method == "dpo" else to_prompt_completion
        where = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
        tokenizer = given.get("processing_class") or AutoTokenizer.from_pretrained(given["model"], **where)
        datasets, prompt = ask(datasets, tokenizer, form, make)
    elif method in ASKING and not kept and (unused := PromptFormat.of(script)) != PromptFormat():
        raise ValueError(f"{unused} is given, and the dataset has no columns question and answer for it; leave it out.")
    trainer_class = CLASSES[method][2]
    if method == "sft":  # the other trainers judge their rows themselves
        workers, field = args.dataset_num_proc, args.dataset_text_field
        datasets = {name: check_layout(one, name, "sft", workers, field) for name, one in datasets.items()}
    if method == "grpo":
        # The names that TRL's own script takes, or dotted paths
        names = [name if "." in name else f"trl.rewards.{name}" for name in script.reward_funcs or []]
        given["reward_funcs"] = [import_function(name, "reward_funcs") for name in names]
        if script.reward_model_name_or_path:
            given["reward_funcs"].insert(0, script.reward_model_name_or_path)
        if "completions" in (datasets["train"].column_names or ()):
            trainer_class = "ceu_rl.offline_grpo:OfflineGRPOTrainer"
        elif not given["reward_funcs"]:
            raise ValueError("reward_funcs is missing; give a dotted path such as ceu_rl.tasks.addition.accuracy.")
    targets = model_config.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():  # TRL unpacks a list of one, and peft reads a pattern
        model_config.lora_target_modules = [targets]
    sets = {f"{name}_dataset": dataset for name, dataset in datasets.items()}
    build = pkgutil.resolve_name(trainer_class)
    trainer = build(args=args, peft_config=get_peft_config(model_config), **sets, **given)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    trainer.add_callback(MetricsFile)
    trainer.add_callback(Pace(trainer.accelerator.num_processes))
    scored = datasets.get("eval") if task is not None else None
    compares = method != "sft" and (scored is not None or bool(set(TEXTS) & set(kept)))
    start = StartModel(trainer) if compares else None
    if scored is not None:
        trainer.add_callback(TaskScore(trainer, task, scored, start))
    trainer.add_callback(HeldOutFile(trainer))  # after what it writes
    if kept:
        trainer.add_callback(KeptScore(trainer, kept, form, start))
    return trainer, prompt


def _name_model(method: str, script: Any, args: Any, model_config: Any, asks: bool, train: Any) -> dict[str, Any]:
    """What a trainer takes for `model_name_or_path`."""
    from trl import get_quantization_config

    name, revision = model_config.model_name_or_path, model_config.model_revision
    if revision not in (None, "main") and (name.startswith("builtin:") or Path(name).is_dir()):
        raise ValueError(f"model_revision is {revision}, and {name} has no revisions; leave it out.")
    if method == "sft" and name == models.BUILTIN_MODEL:
        if model_config.use_peft:
            raise ValueError(f"use_peft is True, and no folder keeps the random weights of {name}; leave it out.")
        tokenizer = models.build_tokenizer()
        if asks:  # one tokenizer for all the models of TOFU
            full = load_tofu(script.dataset_name, "full") if is_tofu(script.dataset_name or "") else train
            tokenizer = models.build_bpe_tokenizer([*full["question"], *full["answer"]])
        elif script.dataset_name == articles.NAME:
            tokenizer = models.build_bpe_tokenizer(train["text"])
        model = models.build_model(tokenizer, seed=args.seed, **(args.model_init_kwargs or {}))
        args.model_init_kwargs = None
        return {"model": model, "processing_class": tokenizer}
    name = model_config.model_name_or_path = models.resolve_model(name)
    args.model_init_kwargs = {
        "revision": revision or "main",
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {"model": name, "quantization_config": get_quantization_config(model_config)}
