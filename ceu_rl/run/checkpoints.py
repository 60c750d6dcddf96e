"""A checkpoint is whole or it is none, and is resumed by the run and the engine that saved it.

transformers writes `trainer_state.json` last, so its presence says that a checkpoint is whole. `WholeCheckpoints` makes
that true where it is not: with several processes, on a checkpoint that is written again, and on a disk that is full.

`run.json` of a checkpoint says which run saved it: its settings, the number of rows in a step, and what its rows are.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..models import public_name
from .errors import NameCause, note
from .provenance import write_json

# What a kind of engine leaves in a checkpoint, and resumes from
_STATES = {
    DistributedType.NO: ("optimizer.pt", "scheduler.pt"),  # and data parallel
    DistributedType.FSDP: ("pytorch_model_fsdp*",),
    DistributedType.DEEPSPEED: ("global_step*",),
}
TRAINER_STATE_NAME = "trainer_state.json"
RUN_NAME = "run.json"
STREAMED = 1000  # rows of a stream that stand for all of it
_BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes"
# What may differ where a run is resumed: no weight depends on it
_FREE = re.compile(
    r"env|use_cpu|run_name|report_to|project|disable_tqdm|push_to_hub|load_best_model_at_end|metric_for_best_model|"
    r"greater_is_better|per_device_(train|eval)_batch_size|gradient_accumulation_steps|gradient_checkpointing\w*|"
    r"dataloader_(?!drop_last)\w+|(log|logging|save|eval|hub|ddp|fsdp|trackio|vllm_server)_\w+|deepspeed|"
    r"vllm_(gpu_memory_utilization|tensor_parallel_size)"
)
_DATA = re.compile(r"forget|retain|dataset_(name|config|train_split|test_split|num_proc)")
LENGTH = ("max_steps", "num_train_epochs")


def saved_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint in `output_dir`, first to last, without those whose saving was cut short."""
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    found = {path.parent: path.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in states}
    return sorted(  # what people copied under a name of their own has no step
        (int(step), path)
        for path, step in found.items()
        if step.isascii() and step.isdecimal() and is_json(path / TRAINER_STATE_NAME)
    )


def traces(folder: Path) -> list[Path]:
    """What training leaves in a folder, a checkpoint that was cut short too: it is never written over."""
    names = (f"{PREFIX_CHECKPOINT_DIR}-*", "result.json", "*.safetensors", "metrics.jsonl")
    return [path for name in names for path in sorted(folder.glob(name))]


def is_json(path: Path) -> bool:
    """Whether the file was written to its end: a disk that is full can cut it off."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def resumed_by(checkpoint: str | Path) -> list[DistributedType]:
    """The kinds of engine that can resume a checkpoint; none for one that was saved with `save_only_model`."""
    return [kind for kind, names in _STATES.items() if all(any(Path(checkpoint).glob(name)) for name in names)]


def check_resumes(checkpoint: str | Path, engine: DistributedType) -> None:
    """Raise a ValueError for a checkpoint without the optimizer of this engine: transformers would start a new one."""
    kind = engine if engine in _STATES else DistributedType.NO
    if kind not in resumed_by(checkpoint):
        raise ValueError(
            f"{checkpoint} lacks {' or '.join(_STATES[kind])}, from which a run under {engine.value} resumes; take the "
            "engine that saved it, or start a new run with it as model_name_or_path."
        )


def fingerprint(dataset: Any) -> str:
    """What a dataset holds, as a checksum of its rows in their order; of a stream the first ones."""
    digest = hashlib.sha256()
    if isinstance(dataset, Dataset):
        rows: Any = (batch.to_pydict() for batch in dataset.with_format("arrow").iter(1000))
    else:
        rows = itertools.islice(dataset, STREAMED)
    for each in rows:
        digest.update(repr(each).encode())
    return digest.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two runs as `run.json` has them: as it was, and as it is now.

    Data are judged by their rows where both runs know them, else by what names them.
    """
    old, new = ({**run["settings"], _BATCH: run.get("batch", now["batch"])} for run in (then, now))
    for settings in (old, new):
        settings["model_name_or_path"] = os.path.realpath(settings["model_name_or_path"])
    found = {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
    named = {name for name in found if _DATA.fullmatch(name)}
    if "rows" in then and "rows" in now:
        if then["rows"] == now["rows"]:
            return {name: values for name, values in found.items() if name not in named}
        if not named:
            found["the rows of dataset_name"] = (then["rows"], now["rows"])
    return found


def moving(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on which a weight may depend, as JSON has them."""
    return {
        name: value
        for name, value in json.loads(json.dumps(settings, default=str)).items()
        if not _FREE.fullmatch(name)
    }


class WholeCheckpoints:
    """Trainer mixin: `trainer_state.json` of a checkpoint is there only once every process has written its part.

    What is saved names the model that it was made from, and no path of a cache.

    Raises:
        ValueError: for a checkpoint of another kind of engine, or without the state of its optimizer.
    """

    run_record: Mapping[str, Any] | None = None  # what `run.json` of a checkpoint says

    def train(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model  # type: ignore[attr-defined]
        mend_generation_config(model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        named = [(base, "name_or_path"), (base.config, "_name_or_path")]
        named += [(each, "base_model_name_or_path") for each in getattr(model, "peft_config", {}).values()]
        for config, field in named:
            if path := getattr(config, field, None):
                setattr(config, field, public_name(path))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        card = Path(trainer.args.output_dir, "README.md")
        if trainer.is_world_process_zero() and card.is_file():
            settings = (self.run_record or {}).get("settings", {})
            name = settings.get("model_name_or_path") or trainer.model.config._name_or_path or "a model in memory"
            name = Path(name).name if Path(name).is_absolute() else name
            # TRL names no model that is a folder, or was made in memory, and none that is not on the Hub
            text = card.read_text().replace("[None](https://huggingface.co/None)", f"`{name}`")
            card.write_text(text.replace('model="None"', f'model="{card.resolve().parent.name}"'))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        folder = Path(trainer.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        if trainer.args.should_save:  # a run that goes on from an earlier checkpoint writes a later one again
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:  # transformers would train one step more
            trainer.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.run_record is not None and self.args.should_save:  # type: ignore[attr-defined]
            write_json(Path(output_dir, RUN_NAME), self.run_record)
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        check_resumes(checkpoint, self.accelerator.distributed_type)  # type: ignore[attr-defined]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def mend_generation_config(model: Any) -> None:
    """Take out of the model's generation config what transformers ignores, and refuses to save."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        default, ignored = type(config)(), re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        shown = ", ".join(f"{name} {getattr(config, name)}" for name in ignored)
        for name in ignored:
            setattr(config, name, getattr(default, name))
        with NameCause("Saving the model's generation config", "mend its generation_config.json, or delete it."):
            config.validate(strict=True)
        note(f"The model is saved without {shown} of its generation config, which generation without samples ignores.")
