"""TRL's `SFTTrainer`, for the models that the other methods start from."""

from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from .run.checkpoints import WholeCheckpoints
from .run.engines import Float32Outputs
from .run.errors import note


class WholeSFTTrainer(WholeCheckpoints, Float32Outputs, SFTTrainer):
    """`trl.SFTTrainer` whose checkpoints are whole or none, and which says what it leaves out; it trains the same."""

    _tokenized: Dataset | None = None  # a train dataset that brings its tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._tokenized is not None:
            _check_tokens(self._tokenized, self.model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if dataset_name == "train" and isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            self._tokenized = dataset
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


def _check_tokens(dataset: Dataset, model: Any) -> None:
    known = model.get_input_embeddings().num_embeddings
    for index, row in enumerate(dataset.with_format(None)):
        if (largest := max(row["input_ids"])) >= known:
            raise ValueError(
                f"Row {index} of the train dataset has the token id {largest}, and the model has {known} tokens; use "
                "the tokenizer of the model."
            )
        if row.get("labels") is not None and len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(
                f"Row {index} of the train dataset has {len(row['labels'])} 'labels' for {len(row['input_ids'])} "
                "'input_ids'; give one for each."
            )
