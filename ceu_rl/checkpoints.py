"""A checkpoint is whole or it is none, and is resumed by the engine that saved it.

transformers writes `trainer_state.json` last, so its presence says that a checkpoint is whole. `WholeCheckpoints` makes
that true where it is not: with several processes, on a checkpoint that is written again, and on a disk that is full.
"""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# What only this kind of engine leaves in a checkpoint
_MARKS = {
    DistributedType.FSDP: ("pytorch_model_fsdp*",),
    DistributedType.DEEPSPEED: ("global_step*",),
}
_LEAST_FREE = 2**20
TRAINER_STATE_NAME = "trainer_state.json"


def saved_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint in `output_dir`, first to last, without those whose saving was cut short."""
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    return sorted((int(path.parent.name.rsplit("-", 1)[1]), path.parent) for path in states if _is_json(path))


def _is_json(path: Path) -> bool:
    """Whether the file was written to its end: a disk that is full can cut it off."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def check_resumes(checkpoint: str | Path, engine: DistributedType) -> None:
    """Raise a ValueError if another kind of engine saved the checkpoint, whose optimizer this one cannot read.

    One process and data parallel are of one kind, and FSDP and DeepSpeed of one each, with any number of processes for
    FSDP. The weights alone can be read by every engine.
    """
    found = {kind for kind, marks in _MARKS.items() for mark in marks if any(Path(checkpoint).glob(mark))}
    if found != {engine} & set(_MARKS):
        names = ", ".join(kind.value for kind in found) or "neither FSDP nor DeepSpeed"
        raise ValueError(
            f"{checkpoint} was saved under {names} and this run is under {engine.value}, which cannot read its "
            "optimizer; resume it under the same engine, or start a new run with it as model_name_or_path."
        )


class WholeCheckpoints:
    """Trainer mixin: `trainer_state.json` of a checkpoint is there only once every process has written its part.

    Raises:
        OSError: where the disk has no room for a checkpoint; those before it are intact.
        ValueError: for a checkpoint of another kind of engine.
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # transformers starts with a new optimizer, and says nothing, where it finds none that it can read
        if checkpoint is not None:
            check_resumes(checkpoint, self.accelerator.distributed_type)  # type: ignore[attr-defined]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
