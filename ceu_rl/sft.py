"""TRL's `SFTTrainer`, for the models that the other methods start from."""

from trl import SFTTrainer

from .checkpoints import WholeCheckpoints


class WholeSFTTrainer(WholeCheckpoints, SFTTrainer):
    """`trl.SFTTrainer` whose checkpoints are whole or none; it trains the same weights."""
