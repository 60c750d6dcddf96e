"""TRL's `SFTTrainer`, for the models that the other methods start from."""

from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from .run.checkpoints import WholeCheckpoints
from .run.engines import Float32Outputs
from .run.errors import note


class WholeSFTTrainer(WholeCheckpoints, Float32Outputs, SFTTrainer):
    """`trl.SFTTrainer` whose checkpoints are whole or none, and which says what it leaves out; it trains the same."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(prepared, Dataset) and isinstance(dataset, Dataset) and not packing:
            if len(prepared) == 0:
                raise ValueError(
                    f"Every prompt of the {dataset_name} dataset has max_length ({args.max_length}) tokens or more, "
                    "which leaves no completion to learn from; raise max_length."
                )
            if dropped := len(dataset) - len(prepared):
                note(
                    f"The {dataset_name} dataset has {len(dataset)} rows: {dropped} dropped, whose prompt fills "
                    f"max_length ({args.max_length})."
                )
        return prepared
