"""TRL's `SFTTrainer`, for the models that the other methods start from."""

from typing import Any

from trl import SFTTrainer

from .data.rows import check_prepared
from .run.checkpoints import WholeCheckpoints
from .run.engines import Float32Outputs


class WholeSFTTrainer(WholeCheckpoints, Float32Outputs, SFTTrainer):
    """`trl.SFTTrainer` whose checkpoints are whole or none, and which says what it leaves out; it trains the same."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if not packing:
            check_prepared(prepared, dataset, dataset_name, args)
        return prepared
