"""Bad input: one sentence that names the value and the way out, before any step; and the stop of a run gone wrong."""

import contextlib
import math
import re

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.run.checks import BOUNDS, check_numbers

from .conftest import TINY, files
from .trainers import build

ROW = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


@pytest.fixture
def construct(tiny_model, tokenizer, tmp_path):
    def make(rows, **given):
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        given = {"model": tiny_model(1), "train_dataset": rows, "processing_class": tokenizer, **given}
        given |= {} if "peft_config" in given else {"ref_model": tiny_model(0)}
        return build(CEUDPOTrainer, tmp_path, **given)

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "0; use a number above 0, or -1"),
        ({"max_steps": -2}, "-2; use a number above 0, or -1"),
        ({"num_train_epochs": 0.0}, "0.0; use a number above 0"),
        ({"top_k": -2}, "-2; use a number above 0, or 0"),
        *(({name: -0.1}, "-0.1; use a number from 0") for name in ("beta", "weight_decay", "epsilon", "logging_steps")),
        *(({name: 0}, "0; use a number above 0.") for name in ("max_length", "ref_model_sync_steps", "discopop_tau")),
        *(({name: -1}, "-1; use a number above 0.") for name in ("per_device_train_batch_size", "eval_steps")),
        *(({name: 1.5}, "1.5; use a number from 0 to 1.") for name in ("label_smoothing", "ld_alpha", "lora_dropout")),
        ({"ref_model_mixup_alpha": 7}, "7; use a number from 0 to 1."),
        *(({name: math.nan}, "nan; use a finite number.") for name in ("weight_decay", "max_grad_norm", "delta")),
        ({"learning_rate": math.inf}, "inf; use a finite number."),
        ({"max_grad_norm": -math.inf}, "-inf; use a finite number."),
        ({"loss_weights": [1.0, math.nan]}, "nan; use a finite number."),
    ],
)
def test_a_number_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(settings))} is {message}")):
        check_numbers(settings)


def test_an_upper_bound_may_be_infinite():
    check_numbers(dict.fromkeys(BOUNDS, math.inf) | {"max_steps": -1, "num_train_epochs": 1.0, "top_k": -1})


T5 = {"vocab_size": 103, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS = {
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=103, **TINY)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "module": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_fits_no_fused_head_is_refused(construct, tmp_path, name):
    """Of a saved one before its weights are loaded."""
    model = MODELS[name]()
    with pytest.raises(ValueError, match="is not a decoder with a language-model head"):
        construct([ROW], model=model)
    if name != "module":
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="is not a decoder with a language-model head"):
            construct([ROW], model=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("tied", "adapter", "message"),
    [
        (True, {"trainable_token_indices": [5, 6]}, "trainable_token_indices .* tied"),
        (True, {"trainable_token_indices": {"embed_tokens": [5]}, "r": 2}, "trainable_token_indices .* tied"),
        (False, {"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        (False, {"trainable_token_indices": [5, 6]}, None),
        (False, {"modules_to_save": ["lm_head"]}, None),
    ],
)
def test_an_adapter_on_the_head_that_the_fused_head_would_not_read(construct, tiny_model, tied, adapter, message):
    """TRL scores without it: what LoRA learns there would be nothing, without a word."""
    lora = LoraConfig(**{"target_modules": ["q_proj"], **adapter})
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        construct([ROW] * 8, model=tiny_model(tie_word_embeddings=tied), peft_config=lora, max_steps=1).train()


def test_rows_in_memory_share_no_precomputed_log_probabilities(construct, preferences, tmp_path, monkeypatch):
    monkeypatch.setattr(CEUDPOConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="precompute_ref_log_probs is True with 2 processes and a dataset in memory"):
        construct(preferences, precompute_ref_log_probs=True)
    preferences.save_to_disk(tmp_path / "rows")
    construct(load_from_disk(tmp_path / "rows"), precompute_ref_log_probs=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run(construct, preferences, tmp_path, what):
    """Poison the fourth step: the weights stay, the checkpoints stay, and the message says where to go on from."""
    trainer = construct(preferences, max_steps=6, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    compute_loss = trainer.compute_loss
    seen = []

    def poisoned(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if trainer.state.global_step < 3:
            return loss
        seen.append(({name: p.detach().clone() for name, p in model.named_parameters()}, files(tmp_path)))
        if what == "loss":
            return loss * float("nan")
        model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
        return loss

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert f"Step 4 met a non-finite {what}" in message
    # Checkpoint 3 holds the weights whose step failed
    assert f"The last good checkpoint is {trainer.args.output_dir}/checkpoint-2" in message
    before, saved = seen[0]
    assert files(tmp_path) == saved
    assert all(torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items())
