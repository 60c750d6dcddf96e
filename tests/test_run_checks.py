"""Bad input: one sentence that names the value and the way out, before any step; and the stop of a run gone wrong."""

import contextlib
import hashlib
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset, load_from_disk
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration
from trl import SFTConfig

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.run.checks import check_shared_cache

ROW = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}
CHAT = {
    "prompt": [{"role": "user", "content": "1+2="}],
    "chosen": [{"role": "assistant", "content": "3"}],
    "rejected": [{"role": "assistant", "content": "4"}],
}


@pytest.fixture
def construct(tiny_model, tokenizer, tmp_path):
    def make(rows, model=None, **settings):
        dataset = rows if not isinstance(rows, list) else Dataset.from_list(rows)
        defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1}
        args = CEUDPOConfig(
            **{"output_dir": str(tmp_path / "run"), **defaults, **settings},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        model = tiny_model(1) if model is None else model
        return CEUDPOTrainer(model, tiny_model(0), args=args, train_dataset=dataset, processing_class=tokenizer)

    return make


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "choosen": "b", "rejected": "c"}], r"no column 'chosen'.*rename 'choosen' to 'chosen'"),
        ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'"),
        ([{"question": "a", "answer": "b"}], r"no column 'chosen' among \['answer', 'question'\]; add 'chosen'"),
        ([ROW, {**ROW, "chosen": ""}], "Row 1 of the train dataset has an empty 'chosen'"),
        ([ROW, ROW, {**ROW, "rejected": " \n"}], "Row 2 of the train dataset has an empty 'rejected'"),
        ([ROW, {**ROW, "rejected": None}], "Row 1 of the train dataset has an empty 'rejected'"),
        ([CHAT, {**CHAT, "chosen": []}], r"Row 1 of the train dataset has an empty 'chosen' \(\[\]\)"),
        ([CHAT, {**CHAT, "rejected": [{"role": "assistant", "content": ""}]}], "Row 1 .* has an empty 'rejected'"),
        ([{**ROW, "prompt": "1" * 60}], r"Every prompt of the train dataset has max_length \(50\) tokens or more"),
    ],
)
def test_bad_rows_are_named(construct, rows, message):
    with pytest.raises(ValueError, match=message):
        construct(rows, max_length=50)


@pytest.mark.parametrize("dataset", [Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})])
def test_a_dataset_without_rows(construct, dataset):
    with pytest.raises(ValueError, match="The train dataset has no rows"):
        construct(dataset)


def test_good_rows_pass(construct):
    construct([ROW, CHAT | ROW]).train()
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}]
    construct([{**CHAT, "chosen": call}])


def test_an_eval_dataset_is_checked_too(construct):
    trainer = construct([ROW, ROW])
    with pytest.raises(ValueError, match="Row 0 of the eval dataset has an empty 'chosen'"):
        trainer.evaluate(Dataset.from_list([{**ROW, "chosen": ""}]))


def test_a_streamed_row_is_named_when_it_comes(construct):
    rows = [ROW, ROW, ROW, {**ROW, "chosen": ""}]
    trainer = construct(IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(ValueError, match="Row 3 of the train dataset has an empty 'chosen'"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ceu_coef": 1.01}, "ceu_coef is 1.01"),
        ({"ceu_coef": float("nan")}, "ceu_coef is nan"),
        ({"ceu_scale": 0.0}, "ceu_scale is 0.0"),
        ({"ceu_scale": float("nan")}, "ceu_scale is nan"),
        ({"ceu_max_weight": 0.0}, "ceu_max_weight is 0.0"),
        ({"ceu_max_weight": float("nan")}, "ceu_max_weight is nan"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True.*leave it out"),
    ],
)
def test_bad_settings_are_refused_by_the_config(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CEUDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_config_of_another_trainer_is_refused(tiny_model, tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args is a SFTConfig; give a CEUDPOConfig"):
        CEUDPOTrainer(tiny_model(), args=args, train_dataset=Dataset.from_list([ROW]), processing_class=tokenizer)


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0"])
def test_another_trl_version_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=f"trl is {version}"):
        CEUDPOConfig(str(tmp_path), use_cpu=True, bf16=False)


def classifier():
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=103, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def encoder_decoder():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=103, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("make", [classifier, encoder_decoder, lambda: torch.nn.Linear(2, 2)])
def test_a_model_that_fits_no_fused_head_is_refused(construct, make):
    with pytest.raises(ValueError, match="is not a decoder with a language-model head"):
        construct([ROW], model=make())


@pytest.mark.parametrize("make", [classifier, encoder_decoder])
def test_a_saved_model_that_fits_no_fused_head_is_refused_before_it_is_loaded(construct, tmp_path, make):
    make().save_pretrained(tmp_path / "model")
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
def test_an_adapter_on_the_head_that_the_fused_head_would_not_read(
    tiny_model, tokenizer, tmp_path, tied, adapter, message
):
    """TRL scores without it: what LoRA learns there would be nothing, without a word."""
    args = CEUDPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, disable_tqdm=True, save_strategy="no")
    given = {"args": args, "train_dataset": Dataset.from_list([ROW] * 8), "processing_class": tokenizer}
    given["peft_config"] = LoraConfig(**{"target_modules": ["q_proj"], **adapter})
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        CEUDPOTrainer(tiny_model(tie_word_embeddings=tied), **given).train()


def test_processes_that_cannot_share_a_cache_are_refused(tmp_path):
    dataset = Dataset.from_list([ROW])
    check_shared_cache(dataset, 1)
    with pytest.raises(ValueError, match="precompute_ref_log_probs is True with 2 processes and a dataset in memory"):
        check_shared_cache(dataset, 2)
    dataset.save_to_disk(tmp_path / "rows")
    check_shared_cache(load_from_disk(tmp_path / "rows"), 2)


def digest(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
        seen.append((inputs, {name: p.detach().clone() for name, p in model.named_parameters()}, digest(tmp_path)))
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
    assert f"The last good checkpoint is {tmp_path / 'run'}/checkpoint-2" in message
    inputs, before, files = seen[0]
    rows = [
        number
        for number, row in enumerate(trainer.train_dataset)
        for ids in inputs["input_ids"][:2]
        if ids.tolist()[: len(row["prompt_ids"] + row["chosen_ids"])] == row["prompt_ids"] + row["chosen_ids"]
    ]
    assert len(rows) == 2 and all(f"row {number} (" in message for number in rows)
    assert digest(tmp_path) == files
    assert all(torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items())


def test_a_run_that_fails_at_once_has_no_checkpoint_to_name(construct):
    trainer = construct([ROW, ROW])
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"Step 1 met a non-finite loss \(nan\).*There is no earlier checkpoint"
    ):
        trainer.train()
