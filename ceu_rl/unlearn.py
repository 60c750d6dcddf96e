"""Unlearning: CE-U (arXiv 2503.01224) and its baselines on TRL's `SFTTrainer`.

    loss = forget_weight * forget term, the mean over the tokens or the sequences of the forget set
         + retain_weight * retain term, the mean over the tokens of as many rows of the retain set

The formulas are in `losses.py`. Means are over the whole optimizer step: gradient accumulation and several processes
give the gradient of one large batch.
"""

import copy
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, maybe_gather_lm_head_ctx

from .data.answer_spans import part_answer, template_edges
from .data.prompts import PromptArguments
from .data.rows import check_layout
from .fused import fused_linear_unlearning_loss, lm_head_options
from .losses import kl_loss, log_ratio, npo_loss, satimp_loss, simnpo_loss, undial_loss, weighted_gradient_ascent_loss
from .models import end_token_ids
from .route import CITATION, own_config
from .run.checkpoints import WholeCheckpoints
from .run.checks import StopAtNonFinite, check_choices, check_language_model, check_numbers, check_reference_is_loaded
from .run.engines import Float32Outputs


class Method(NamedTuple):
    """What the trainer must know of a forget loss, and the defaults of its paper or of open-unlearning."""

    unit: str = "tokens"  # what its mean is over
    needs_reference: bool = False
    beta: float | None = None  # None: it has no beta
    ignore_first_n_answer_tokens: int = 0


METHODS = {
    "ceu": Method(ignore_first_n_answer_tokens=1),
    "grad_ascent": Method(),
    "grad_diff": Method(),
    "npo": Method("sequences", needs_reference=True, beta=0.1),
    "tnpo": Method(needs_reference=True, beta=1.0),
    "simnpo": Method("sequences", beta=4.5),
    "wga": Method(beta=1.0),
    "satimp": Method(beta=5.0),
    "undial": Method(needs_reference=True, beta=10.0),
}
COLUMNS = ["input_ids", "labels"]


@dataclass
class UnlearnScriptArguments(PromptArguments):
    """The script arguments of `ceu-rl unlearn`: what of the dataset to forget and to retain.

    Both are configs of a dataset in TOFU's layout; with a `dataset_config` they are splits of that config.
    """

    forget: str = HfArg(
        default="", help="Config (or split) to forget. Default: forget10, or forget in a folder of its own files."
    )
    retain: str | None = HfArg(default=None, help="Config (or split) to retain. Default: none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forget:
            files = {path.stem for path in Path(self.dataset_name or "").glob("forget*.*")}
            self.forget = "forget" if "forget" in files and "forget10" not in files else "forget10"


@dataclass
class UnlearnConfig(SFTConfig):
    """`trl.SFTConfig` with the forget and the retain term.

    Raises:
        ValueError: for a field out of its range, or a setting of `SFTConfig` that unlearning does not honour.
    """

    loss_type: str = HfArg(default="ceu", help=f"The forget term, one of {', '.join(METHODS)}; see ceu_rl.losses.")
    beta: float | None = HfArg(
        default=None, help="The beta of npo (default 0.1), tnpo (1), simnpo (4.5), wga (1), satimp (5) and undial (10)."
    )
    beta2: float = HfArg(default=1.0, help="The second exponent of satimp.")
    margin: float = HfArg(default=0.0, help="The reward margin (gamma) of simnpo.")
    ignore_first_n_answer_tokens: int | None = HfArg(
        default=None,
        help="Tokens at the start of each answer to forget that are not unlearned, what a chat template writes "
        "there not counted: they seldom carry what is to be forgotten. Default: 1 for ceu (footnote of its paper), "
        "0 for the others, as their authors have it.",
    )
    retain_loss_type: str = HfArg(default="nll", help="The retain term: nll, or kl to the model before unlearning.")
    forget_weight: float = HfArg(default=1.0, help="Weight of the forget term.")
    retain_weight: float = HfArg(default=1.0, help="Weight of the retain term.")
    chunk: bool = HfArg(default=False, help="Cut long rows of text into rows of max_length, instead of refusing them.")

    def __post_init__(self) -> None:
        check_choices(self, {"loss_type": tuple(METHODS), "retain_loss_type": ("nll", "kl")})
        check_numbers(vars(self))
        if self.chunk and self.max_length is None:
            raise ValueError("chunk is True and max_length None; set the tokens of a piece.")
        if self.beta is not None and METHODS[self.loss_type].beta is None:
            raise ValueError(f"beta is {self.beta}, and loss_type {self.loss_type!r} has none; leave it out.")
        if self.beta == 0:
            raise ValueError(f"beta is {self.beta}; use a number above 0.")
        unsupported = ("packing", "padding_free", "use_liger_kernel", "label_smoothing_factor")
        for name in (*unsupported, "dataloader_persistent_workers"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, which unlearning does not support; leave it out.")
        self.logging_nan_inf_filter = False  # waits for the device at each batch; `StopAtNonFinite` ends such a run
        super().__post_init__()

    @property
    def method(self) -> Method:
        """The method with the settings of this run: its own defaults where a field is None."""
        given = {name: getattr(self, name) for name in ("beta", "ignore_first_n_answer_tokens")}
        return METHODS[self.loss_type]._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares with the model as it was before unlearning."""
        return self.method.needs_reference or self.retain_loss_type != "nll"


class UnlearnTrainer(StopAtNonFinite, WholeCheckpoints, Float32Outputs, SFTTrainer):
    """`trl.SFTTrainer` that unlearns `forget_dataset`; the forget and the retain term take the place of its loss.

    Of a conversation the answer alone is unlearned, up to its first end token, and not what the chat template writes
    around every answer. An evaluation is that of `SFTTrainer`: likelihood and accuracy of the `eval_dataset`. Logs
    `forget_loss` and `retain_loss`, each the mean of its term.

    Args:
        model: A model, or its path.
        args: The settings; None gives those of `UnlearnConfig()`, and `<model>-Unlearn` as their output.
        forget_dataset: What to unlearn, in one of the formats of `SFTTrainer`: prompt and completion, or text.
        retain_dataset: What to keep. Each row of the forget set comes with one of these: all of them in turn, in an
            order drawn from `args.seed`, going on where the last epoch ended.
        ref_model: The reference of `npo`, `tnpo`, `undial` and the retain term `kl`. By default the model before
            unlearning: a copy, or with a `peft_config` the model without its adapter.
        kwargs: All else that `SFTTrainer` takes: `eval_dataset`, `processing_class`, `peft_config`, `callbacks`, ...

    Raises:
        ValueError: before any step, for a forget set that is empty or shares rows with the retain set, an answer that
            the chat template swallows, that `max_length` would cut off or of which `ignore_first_n_answer_tokens`
            leaves nothing, a reference that is missing or not needed, or a model without a language-model head.
        FloatingPointError: at the step whose loss or gradient is not finite.
    """

    args: UnlearnConfig
    _tag_names = ["trl", "unlearn", "ceu"]
    _name = "CE-U unlearning"

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig,
        forget_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = own_config(args, UnlearnConfig, model)
        for name in ("train_dataset", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is given, which UnlearnTrainer sets itself; give forget_dataset alone.")
        _check_sets(forget_dataset, retain_dataset, args)
        check_language_model(model, args.trust_remote_code)
        adapts = kwargs.get("peft_config") is not None
        check_reference_is_loaded(needs_reference=args.needs_reference and not adapts)
        reference = _make_reference(model, args, ref_model, adapts)

        method, args.loss_type = args.loss_type, "nll"  # the loss of an evaluation
        try:
            super().__init__(model=model, args=args, train_dataset=forget_dataset, **kwargs)
        finally:
            args.loss_type = method
        check_language_model(self.model)
        for name, setting, instead in (
            ("parallelism_config", self.accelerator.parallelism_config, "leave it out"),
            ("router_aux_loss_coef", self.router_aux_loss_coef if self.aux_loss_enabled else None, "set it to 0"),
        ):
            if setting is not None:
                raise ValueError(f"{name} is {setting}, which unlearning does not support; {instead}.")
        if method == "ceu":
            self._paper = {"title": "CE-U: Cross Entropy Unlearning", "id": "2503.01224", "citation": CITATION}
        else:
            self._name = f"{method} unlearning"
        self.model_accepts_loss_kwargs = True  # the loss is divided by the units of the whole step, see `compute_loss`
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_unlearning_head(base)
        spared = functools.partial(
            _spared_row, skipped=args.method.ignore_first_n_answer_tokens, tokenizer=self._tokenizer,
            template=self.chat_template, ends=end_token_ids(base, self._tokenizer),
        )  # fmt: skip
        forget: Any = self.train_dataset
        self.train_dataset = forget.map(spared, with_indices=True)
        self.data_collator = functools.partial(_collate_pairs, self.data_collator)
        if retain_dataset is not None:
            retain = self._prepare_dataset(
                retain_dataset, self.processing_class, args, False, kwargs.get("formatting_func"), "retain"
            )
            self.train_dataset = PairedDataset(self.train_dataset, retain, args.seed)
            self.add_callback(self.train_dataset)
        self.ref_model = self._place_reference(reference)
        self._terms: Any = 0.0  # of this optimizer step, so far
        self._units: Any = None

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        name = "forget" if dataset_name == "train" else dataset_name
        if formatting_func is None:
            dataset = check_layout(dataset, name, "sft", args.dataset_num_proc, args.dataset_text_field)
        whole = copy.copy(args)  # each row in full, to see which would be cut
        whole.max_length, whole.shuffle_dataset = None, False
        prepared = super()._prepare_dataset(dataset, processing_class, whole, packing, formatting_func, dataset_name)
        if args.chunk and "prompt" not in prepared.column_names:
            bos = self._tokenizer.bos_token_id
            cut = functools.partial(_chunks, length=args.max_length, bos=bos)
            prepared = prepared.map(cut, batched=True, remove_columns=prepared.column_names)
        check = functools.partial(_check_row, name=name, max_length=args.max_length, tokenizer=self._tokenizer)
        prepared.map(check, with_indices=True)
        return prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*columns, *({"retain"} - set(columns))]

    def _place_reference(self, reference: PreTrainedModel | None) -> Any:
        if reference is None:
            return None
        reference.eval()  # a copy of a model that was just trained would drop out, at random
        add_fused_lm_head(reference)
        add_unlearning_head(reference)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Over all micro-batches and processes of this optimizer step, and never read on the host
        none = torch.zeros(4, dtype=torch.long, device=device)
        counts = sum((_count_units(batch).to(device) for batch in samples), none)
        tokens, sequences, retain, seen = self.accelerator.reduce(counts, reduction="sum")
        forget = tokens if self.args.method.unit == "tokens" else sequences
        # Gradients are averaged over the processes, and so are the logs
        self._units = torch.stack([forget, retain]).clamp(min=1) / self.accelerator.num_processes
        self._total_train_tokens = self._total_train_tokens + seen
        return samples, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        forget = {key: value for key, value in inputs.items() if not key.startswith("retain_")}
        retain = {key.removeprefix("retain_"): value for key, value in inputs.items() if key.startswith("retain_")}
        terms = [self._forget_loss(model, forget, self._units[0])]
        loss = self.args.forget_weight * terms[0]
        if retain:
            terms.append(self._retain_loss(model, retain) / self._units[1])
            loss = loss + self.args.retain_weight * terms[1]
        self._terms = torch.stack([term.detach().float() for term in terms]) + self._terms
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # here every process comes by, and a log may be written by one alone
            terms, self._terms = self.accelerator.reduce(self._terms, reduction="mean"), 0.0
            for name, term in zip(("forget_loss", "retain_loss"), terms, strict=False):
                self._metrics["train"][name].append(term)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
        super().log(logs, *args, **kwargs)

    def _forget_loss(self, model: Any, batch: dict[str, Any], units: torch.Tensor) -> torch.Tensor:
        """The forget term: its sum over the batch, divided by the units of the step."""
        args, beta, labelled = self.args, cast(float, self.args.method.beta), batch["labels"][:, 1:] != -100
        if args.loss_type == "ceu":  # which forms its gradient with its value
            return model(**batch, inside=ceu_loss, num_items_in_batch=units)
        if args.loss_type == "undial":
            return undial_loss(*self._logits_of_both(model, batch), beta).sum() / units
        log_probs = self._log_probs(model, batch)  # zero where a token is not unlearned
        if args.loss_type in ("npo", "tnpo"):
            with torch.no_grad(), self._reference() as reference:
                ref_log_probs = self._log_probs(reference, batch)
            ratios = log_ratio(log_probs, ref_log_probs)
        match args.loss_type:
            case "npo":
                losses = npo_loss(ratios.sum(dim=1), beta)
            case "tnpo":
                losses = npo_loss(ratios, beta) * labelled
            case "simnpo":
                losses = simnpo_loss(log_probs.sum(dim=1) / labelled.sum(dim=1), beta, args.margin)
            case "wga":
                losses = weighted_gradient_ascent_loss(log_probs, beta)
            case "satimp":
                losses = satimp_loss(log_probs, beta, args.beta2)
            case _:  # gradient ascent on the likelihood (Jang et al. 2023, arXiv 2210.01504, eq. 2)
                losses = log_probs
        return losses.sum() / units

    def _retain_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The retain term, summed over its units."""
        if self.args.retain_loss_type == "nll":
            return -self._log_probs(model, batch).sum()
        logits, ref_logits, _ = self._logits_of_both(model, batch)
        return kl_loss(logits, ref_logits).sum()

    def _log_probs(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return model(**batch, fused_lm_head=True, use_cache=False).log_probs

    def _logits_of_both(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the model and of the reference where there is a label, (N, V) each, and the labels, (N,)."""
        labels = batch["labels"][:, 1:].flatten()
        rows = (labels != -100).nonzero().squeeze(1)
        given = {key: value for key, value in batch.items() if key != "labels"}
        given |= {"inside": logits_of_rows, "rows": rows, "tokens": batch["labels"].shape[1]}
        with torch.no_grad(), self._reference() as reference:
            ref_logits = reference(**given)
        return model(**given), ref_logits, labels[rows]

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        training = policy.training
        with policy.disable_adapter():
            policy.eval()
            yield self.model
        policy.train(training)


class PairedDataset(torch.utils.data.Dataset, TrainerCallback):
    """The rows of the forget set, each with one of the retain set: all of them in turn, in an order drawn from a seed.

    Which one depends on the row and the epoch alone, so that a resumed run takes the same pairs. It hears of the epoch
    as a callback: accelerate's `set_epoch` does not reach a dataset in each case (sharded, resumed).
    """

    def __init__(self, forget: Dataset, retain: Dataset, seed: int) -> None:
        kept = {tuple(ids) for ids in retain["input_ids"]}
        if shared := [number for number, ids in enumerate(forget["input_ids"]) if tuple(ids) in kept]:
            raise ValueError(
                f"{len(shared)} rows of the forget dataset are in the retain dataset too, the first is row "
                f"{shared[0]}; take them out of one of the two."
            )
        self.forget, self.retain = forget.select_columns(COLUMNS), retain.select_columns(COLUMNS)
        self.order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch + 1e-6)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = (self.epoch * len(self.forget) + index) % len(self.order)
        return {**self.forget[index], "retain": self.retain[self.order[place]]}


def _collate_pairs(collate: Callable[..., dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator of `SFTTrainer` on both rows of a pair; the batch of the retain rows has the prefix `retain_`."""
    batch = collate([{key: row[key] for key in row if key != "retain"} for row in rows])
    if "retain" in rows[0]:
        batch |= {f"retain_{key}": value for key, value in collate([row["retain"] for row in rows]).items()}
    return batch


def add_unlearning_head(model: PreTrainedModel) -> None:
    """Make `model(**inputs, inside=f)` return `f(model, **inputs)`.

    Like TRL's fused head it is a `forward` of this model, inside which FSDP and ZeRO-3 have the parameters at hand.
    """
    plain = model.forward
    # A function of the model, so that a copy computes with its own weights
    bound = isinstance(plain, types.MethodType) and plain.__self__ is model
    function: Callable[..., Any] = plain.__func__ if bound else lambda self, *args, **kwargs: plain(*args, **kwargs)  # type: ignore[attr-defined]

    @functools.wraps(type(model).forward)  # `generate` and `Trainer` read its signature
    def forward(self: Any, *args: Any, inside: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) if inside is None else inside(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def ceu_loss(
    model: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, **inputs: Any
) -> torch.Tensor:
    """The mean CE-U loss of `fused.py` over the labels (batch, tokens) that are not -100."""
    hidden, head = model.base_model(**inputs, use_cache=False).last_hidden_state, model.get_output_embeddings()
    hidden, labels = (each.to(head.weight.device) for each in (hidden[:, :-1], labels[:, 1:]))
    options = {"bias": head.bias, "num_items_in_batch": num_items_in_batch, **lm_head_options(model)}
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        return fused_linear_unlearning_loss(hidden, head.weight, labels, **options)


def logits_of_rows(model: Any, rows: torch.Tensor, tokens: int, **inputs: Any) -> torch.Tensor:
    """The logits (N, V) at `rows` (N,) of all positions but the last of each sequence, counted through the batch."""
    hidden, head = model.base_model(**inputs, use_cache=False).last_hidden_state, model.get_output_embeddings()
    # Prompt-learning PEFT puts virtual tokens before the sequence
    kept = hidden[:, -tokens:-1].flatten(0, 1)[rows].to(head.weight.device)
    options = lm_head_options(model)
    logits: torch.Tensor = head(kept) * options["logit_scale"]
    cap = options["softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _make_reference(model: Any, args: UnlearnConfig, ref_model: Any, adapts: bool) -> PreTrainedModel | None:
    """The reference as its own model, before TRL wraps the policy; None where none is needed or an adapter is off."""
    if ref_model is not None and not args.needs_reference:
        raise ValueError(
            f"ref_model is given, and neither loss_type {args.loss_type!r} nor retain_loss_type "
            f"{args.retain_loss_type!r} compares with a reference; leave it out."
        )
    if ref_model is model:
        raise ValueError("ref_model is the model itself, which changes; leave it out, or give a copy.")
    if ref_model is not None or not args.needs_reference or adapts:
        return ref_model
    if isinstance(model, str):
        settings: Any = args.model_init_kwargs or {}
        return create_model_from_path(model, **{"trust_remote_code": args.trust_remote_code, **settings})
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model has an adapter, and {args.loss_type} needs the model before unlearning with that adapter on; "
            "merge it into the model (merge_and_unload), or give ref_model."
        )
    return copy.deepcopy(model)


def _check_sets(forget: Any, retain: Any, args: UnlearnConfig) -> None:
    kind = args.retain_loss_type
    if retain is None and (args.loss_type == "grad_diff" or kind != "nll"):
        raise ValueError(
            f"loss_type is {args.loss_type!r} with retain_loss_type {kind!r}, and retain_dataset is None; give what to "
            "retain."
        )
    for name, dataset in (("forget", forget), ("retain", retain)):
        if not isinstance(dataset, Dataset) and (name, dataset) != ("retain", None):
            raise ValueError(f"{name}_dataset is a {type(dataset).__name__}; give a datasets.Dataset.")
        if dataset is not None and len(dataset) == 0:
            raise ValueError(f"The {name} dataset has no rows; give it at least one.")


def _chunks(rows: Mapping[str, list[Any]], length: int, bos: int | None) -> dict[str, list[list[int]]]:
    """Pieces of texts, in which every token but the first is predicted once.

    Each begins with the beginning token, if the text does, else with the last token of the piece before, its context.
    """
    pieces: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        opens = ids[0] == bos
        for start in range(0, max(len(ids) - 1, 1), length - 1):
            piece, kept = ids[start + 1 : start + length], labels[start + 1 : start + length]
            alone = len(piece) < 2  # the end token
            if not start or (any(label != -100 for label in kept) and not alone):
                pieces["input_ids"].append([ids[0] if opens else ids[start], *piece])
                pieces["labels"].append([-100 if start else labels[0], *kept])
    return pieces


def _check_row(row: Mapping[str, Any], index: int, name: str, max_length: int | None, tokenizer: Any) -> None:
    """Raise a ValueError for a row that `max_length` cuts or that has no answer."""
    length = len(row["input_ids"])
    if max_length is not None and length > max_length:
        raise ValueError(
            f"Row {index} of the {name} dataset has {length} tokens, and max_length {max_length} would cut its "
            "answer off; raise max_length, or shorten the row."
        )
    # The first token of a row is not predicted
    answer = [label for label in row["labels"][1:] if label != -100]
    if not tokenizer.decode(answer, skip_special_tokens=True).strip():
        raise ValueError(
            f"Row {index} of the {name} dataset has no answer left after tokenization; give it a completion, and use a "
            "chat template that keeps the assistant's turn."
        )


def _spared_row(
    row: Mapping[str, Any], index: int, skipped: int, tokenizer: Any, template: str | None, ends: list[int]
) -> dict[str, Any]:
    """The labels of a forget row without what the template adds to its answer, and without the first of its tokens."""
    labels = list(row["labels"])
    if row.get("prompt") is not None and row.get("completion") is not None:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"chat_template": template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
        edges = template_edges(tokenizer, row["prompt"], row["completion"], **kwargs)
        first = next(place for place, label in enumerate(labels) if label != -100)
        parts = part_answer(row["input_ids"], first, edges, ends)
        added = range(first, parts.content) if first else ()  # with `completion_only_loss` off the prompt counts too
        for place in (*added, *range(parts.stop, len(labels))):
            labels[place] = -100
    answer = [place for place, label in enumerate(labels) if place and label != -100]
    if len(answer) <= skipped:
        raise ValueError(
            f"Row {index} of the forget dataset has {len(answer)} answer tokens and ignore_first_n_answer_tokens is "
            f"{skipped}, which leaves none to unlearn; lower it, or remove the row."
        )
    for place in answer[:skipped]:
        labels[place] = -100
    return {"labels": labels}


def _count_units(batch: Mapping[str, Any]) -> torch.Tensor:
    """Tokens and sequences of the forget rows, tokens of the retain rows, and tokens that are read: shape (4,)."""
    labels = batch["labels"]
    forget, retain = ((batch.get(key, labels[:, :0])[:, 1:] != -100).sum() for key in ("labels", "retain_labels"))
    seen = sum(value.sum() for key, value in batch.items() if key.endswith("attention_mask"))
    return torch.stack([forget, torch.full_like(forget, len(labels)), retain, torch.as_tensor(seen)])
