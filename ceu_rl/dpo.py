"""DPO whose push on rejected responses fades as their tokens fall."""

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from .data.rows import Rows, check_dataset, check_layout, leave_ties_out
from .route import DescentConfig, DescentTrainer, Scored
from .run.checkpoints import WholeCheckpoints
from .run.checks import StopAtNonFinite, check_reference_is_loaded
from .run.engines import Float32Outputs

# What is kept of a held-out pair: sums of log-probabilities in nats, of the policy and of the reference, and tokens
PAIR = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
_INHERITED = DescentConfig.__dataclass_fields__


@dataclass
class CEUDPOConfig(DescentConfig, DPOConfig):
    """`trl.DPOConfig` and the rule of the descending tokens, by default `anchored` alone: w = min(1, p / p_ref).

    On human preferences it ended with a lower held-out loss than half of CE-U's weight, the default before, and nearer
    to the model at the start (docs/results/dpo-anchor.md).

    Raises:
        ValueError: for an unknown rule, a parameter out of range or one that the rule does not read, or
            `use_liger_kernel`.
    """

    descent_rule: str = field(default="anchored", metadata=_INHERITED["descent_rule"].metadata)
    ceu_coef: float = field(default=1.0, metadata=_INHERITED["ceu_coef"].metadata)


class CEUDPOTrainer(DescentTrainer, StopAtNonFinite, WholeCheckpoints, Float32Outputs, DPOTrainer):
    """`trl.DPOTrainer` whose descending tokens get the weight of a rule; nothing else changes (arXiv 2503.01224).

    It takes the same arguments, and a `CEUDPOConfig`. After TRL's constructor it attaches the rule to the policy
    (`route.route_descent`). The anchor of a rule is the reference's probability of the same token, from the forward
    that TRL makes anyway, or kept beside the sums with `precompute_ref_log_probs`. With `ceu_coef` 0 it trains the same
    weights as `trl.DPOTrainer`, bit for bit. It logs what `route.descent_metrics` names, and `held_out` keeps each
    pair of the last evaluation.

    Raises:
        ValueError: before any step, for a dataset without rows, a column that is missing, an empty completion, rows
            whose prompt alone fills `max_length`, or a model without a language-model head.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: CEUDPOConfig
    stock, config_class = DPOTrainer, CEUDPOConfig
    held_out: dict[str, list[dict[str, float]]]  # by evaluation ("eval"): sums of log-probabilities of each pair
    _pairs: list[torch.Tensor] | None = None  # of the evaluation that runs

    def check_given(self, given: dict[str, Any]) -> None:
        config, dataset = given["args"], given.get("train_dataset")
        if dataset is not None:
            check_dataset(dataset, "train", "preference")
        shares = config.precompute_ref_log_probs and config.world_size > 1
        if shares and isinstance(dataset, Dataset) and not dataset.cache_files:  # TRL's first process writes for all
            raise ValueError(
                f"precompute_ref_log_probs is True with {config.world_size} processes and a dataset in memory, which "
                "have no cache in common; save it with save_to_disk and load it again, or leave precompute out."
            )
        if config.beta == 0 and config.loss_type != ["sft"]:
            raise ValueError(f"beta is {config.beta}, with which no pair moves the model; use a number above 0.")
        adapts = given.get("peft_config") is not None or isinstance(given["model"], PeftModel)
        check_reference_is_loaded(needs_reference=not adapts)
        self.held_out = {}

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        anchor = None
        if self.precompute_ref_logps and self.args.needs_anchor:
            inputs, anchor = self._part_reference(inputs)
        with self.descent_route.collect() as forwards:
            loss = super()._compute_loss(model, inputs, return_outputs)
        policy, *references = forwards
        policy.anchor = references[0].log_probs if anchor is None and references else anchor
        if policy.anchor is None and self.args.needs_anchor:
            raise RuntimeError("The reference's forward did not reach the route; build this trainer again.")
        if self._pairs is not None:
            self._pairs.append(self._scores(policy, inputs))
        return loss

    def _scores(self, policy: Scored, inputs: Any) -> torch.Tensor:
        """One row (6,) for each pair of a batch, of all processes: see [`PAIR`]."""
        if policy.anchor is not None:
            reference = policy.anchor.float().sum(dim=1)
        else:
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        each = (policy.log_probs.float().sum(dim=1), reference, policy.mask.sum(dim=1).float())
        scores: torch.Tensor = torch.stack([half for values in each for half in values.chunk(2)], dim=1)
        return self.accelerator.gather_for_metrics(scores).cpu()

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        self._pairs = []
        try:
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        finally:
            pairs, self._pairs = self._pairs, None
        rows = torch.cat(pairs).tolist() if pairs else []
        self.held_out[kwargs.get("metric_key_prefix", "eval")] = [dict(zip(PAIR, row, strict=True)) for row in rows]
        return output

    # Beside the sums of a reference, an anchor needs its tokens: TRL's gather, cache, columns and collator carry both

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.needs_anchor and isinstance(dataset, Dataset):
            longest = max(len(ids) for column in ("chosen_ids", "rejected_ids") for ids in dataset[column])
            self._width = min(longest, self.args.max_length or longest)
            if not isinstance(self._precompute_model_hash, tuple):  # stock's cache file has the sums alone
                self._precompute_model_hash: Any = (self._precompute_model_hash, "tokens")
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        if not self.args.needs_anchor:
            return super().compute_ref_log_probs(model, inputs)
        kept: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda _, args, outputs: kept.append(outputs.log_probs), prepend=True)
        try:
            sums = super().compute_ref_log_probs(model, inputs)
        finally:
            hook.remove()
        mask = inputs["completion_mask"][:, 1:].bool()
        tokens = kept[0].new_zeros(len(mask), self._width)
        tokens = tokens.masked_scatter(_first(mask.sum(dim=1), self._width), kept[0][:, -mask.size(1) :][mask])
        return torch.cat([torch.cat(sums)[:, None], tokens], dim=1).chunk(2)

    @staticmethod
    def _part_reference(inputs: Any) -> tuple[dict[str, Any], torch.Tensor]:
        """The inputs as TRL has them, and the reference's log-probabilities at the tokens of the batch."""
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        tokens = torch.cat([inputs[column] for column in columns])[:, 1:]
        mask = inputs["completion_mask"][:, 1:].bool()
        anchor = tokens.new_zeros(mask.shape)
        anchor = anchor.masked_scatter(mask, tokens[_first(mask.sum(dim=1), tokens.size(1))])
        return {**inputs, **{column: inputs[column][:, 0] for column in columns}}, anchor

    def _prepare_dataset(self, dataset: Rows, processing_class: Any, args: Any, dataset_name: str) -> Rows:
        dataset = check_layout(dataset, dataset_name, "preference", args.dataset_num_proc)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        # On equal answers stock's two gradients cancel; weighed on one side they would train on the answer. Nothing is
        # trained in an evaluation, which scores the same rows as stock's
        leaves_out = dataset_name == "train" and args.ceu_coef > 0
        return leave_ties_out(prepared, dataset, dataset_name, args, leaves_out)


def _first(counts: torch.Tensor, width: int) -> torch.Tensor:
    """A mask (B, width) of the first tokens of each row."""
    return torch.arange(width, device=counts.device) < counts[:, None]
