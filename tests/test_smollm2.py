"""The trainers on a real model: few steps on SmolLM2-135M-Instruct, each of which takes minutes on 2 CPU cores."""

import json

import pytest
from transformers import AutoTokenizer

from ceu_rl.cli import main

pytestmark = pytest.mark.slow
TASK = {"dataset_name": "reasoning_gym:chain_sum", "dataset_config": "min_terms=2, max_terms=2, size=16"}
TASK["model_name_or_path"] = "builtin:smollm2"
SMALL = {"max_steps": 2, "logging_steps": 1, "use_cpu": "true", "bf16": "false", "disable_tqdm": "true"}


def run(method, folder, **fields):
    words = [word for key, value in {**TASK, **SMALL, **fields}.items() for word in (f"--{key}", str(value))]
    assert main([method, *words, "--output_dir", str(folder)]) == 0


def test_an_adapter_trains_and_is_saved_from_the_name(smollm2, tmp_path):
    run("dpo", tmp_path / "out", per_device_train_batch_size=2, use_peft="true", lora_r=4)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["model_name_or_path"] == "builtin:smollm2"
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 20e6
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


@pytest.mark.vllm
def test_what_vllm_samples_the_trainer_scores_alike(smollm2, tmp_path):
    pytest.importorskip("vllm")
    reward = {"reward_funcs": "ceu_rl.tasks.reasoning_gym.score_answer"}
    reward |= {"num_generations": 2, "max_completion_length": 8}
    vllm = {"use_vllm": "true", "vllm_mode": "colocate", "vllm_max_model_length": 128}
    small = {"per_device_train_batch_size": 4, "learning_rate": "1e-5", "gradient_checkpointing": "false"}
    run("grpo", tmp_path / "out", **reward, **vllm, **small)
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    differences = [e["sampling/sampling_logp_difference/mean"] for e in log if "loss" in e]
    assert len(differences) == 2 and max(differences) < 0.05
