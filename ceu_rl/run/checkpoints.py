"""A checkpoint is whole or it is none, and is resumed by the engine that saved it.

transformers writes `trainer_state.json` last, so its presence says that a checkpoint is whole. `WholeCheckpoints` makes
that true where it is not: with several processes, on a checkpoint that is written again, and on a disk that is full.
"""

import difflib
import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import NameCause

# What only this kind of engine leaves in a checkpoint
_MARKS = {
    DistributedType.FSDP: ("pytorch_model_fsdp*",),
    DistributedType.DEEPSPEED: ("global_step*",),
}
_LEAST_FREE = 2**20
TRAINER_STATE_NAME = "trainer_state.json"
_STATES = ("optimizer.pt", "scheduler.pt")  # of one process and of data parallel
_ASKED = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer's groups, what a run asks for


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


def missing_states(checkpoint: str | Path) -> list[str]:
    """What a checkpoint lacks to be gone on from, as one that was saved with `save_only_model`."""
    if _saved_by(checkpoint):
        return []
    return [name for name in _STATES if not Path(checkpoint, name).is_file()]


def _saved_by(checkpoint: str | Path) -> set[DistributedType]:
    """The kind of engine that saved a checkpoint; empty for one process and data parallel."""
    return {kind for kind, marks in _MARKS.items() for mark in marks if any(Path(checkpoint).glob(mark))}


def check_resumes(checkpoint: str | Path, engine: DistributedType) -> None:
    """Raise a ValueError if another kind of engine saved the checkpoint, whose optimizer this one cannot read, or none.

    One process and data parallel are of one kind, and FSDP and DeepSpeed of one each, with any number of processes for
    FSDP. The weights alone can be read by every engine.
    """
    found = _saved_by(checkpoint)
    if found != {engine} & set(_MARKS):
        names = ", ".join(kind.value for kind in found) or "neither FSDP nor DeepSpeed"
        raise ValueError(
            f"{checkpoint} was saved under {names} and this run is under {engine.value}, which cannot read its "
            "optimizer; resume it under the same engine, or start a new run with it as model_name_or_path."
        )
    if missing := missing_states(checkpoint):
        raise ValueError(
            f"{checkpoint} has no {' and no '.join(missing)}, so that it cannot be gone on from (save_only_model "
            "leaves them out); start a new run with it as model_name_or_path."
        )


class WholeCheckpoints:
    """Trainer mixin: `trainer_state.json` of a checkpoint is there only once every process has written its part.

    Raises:
        OSError: where the disk has no room for a checkpoint; those before it are intact.
        ValueError: for a checkpoint of another kind of engine, without the state of its optimizer, or that cannot be
            read.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        folder = Path(trainer.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        if trainer.args.should_save:  # a run that goes on from an earlier checkpoint writes a later one again
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            if shutil.disk_usage(trainer.args.output_dir).free >= _LEAST_FREE:
                raise
            raise OSError(
                errno.ENOSPC,
                f"No space is left for {folder.name}; the checkpoints before it are whole: make room and start again "
                "with --resume_from_checkpoint true",
                str(folder),
            ) from error

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        except KeyError as error:
            trainer: Any = self
            name = trainer.args.metric_for_best_model
            close = difflib.get_close_matches(name if name.startswith("eval_") else f"eval_{name}", metrics, n=1)
            raise ValueError(
                f"metric_for_best_model is {name!r}, which the evaluation at step {trainer.state.global_step} has not; "
                f"use {close[0] if close else 'one of ' + ', '.join(metrics)}."
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        trainer: Any = self
        # transformers starts with a new optimizer, and says nothing, where it finds none that it can read
        check_resumes(checkpoint, trainer.accelerator.distributed_type)
        groups, scheduler = getattr(trainer.optimizer, "param_groups", []), trainer.lr_scheduler
        asked = [{name: group[name] for name in _ASKED if name in group} for group in groups]
        for own, group in zip(asked, groups, strict=True):
            if "max_momentum" in group:  # where the scheduler moves them, they belong to the step
                own.pop("betas", None)
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        _ask_again(getattr(trainer.optimizer, "param_groups", []), scheduler, asked)


def _reading(checkpoint: str | None) -> NameCause:
    return NameCause(f"Reading the checkpoint {checkpoint}", "name an earlier one with resume_from_checkpoint.")


def _ask_again(groups: Sequence[dict[str, Any]], scheduler: Any, asked: Sequence[Mapping[str, Any]]) -> None:
    """Give a loaded optimizer what this run asks for; a checkpoint brings what was asked for earlier."""
    for group, own in zip(groups, asked, strict=False):
        group.update(own)
    rates = [own["initial_lr"] for own in asked if "initial_lr" in own]
    if isinstance(scheduler, LambdaLR) and rates and scheduler.base_lrs != rates:
        scheduler.base_lrs = rates
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * share for rate, share in zip(rates, shares, strict=True)]
        for group, rate in zip(groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
