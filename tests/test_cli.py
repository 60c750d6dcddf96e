"""`ceu-rl` end to end on tiny models, and the one-sentence errors of bad input."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl.cli import main

from .conftest import files


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_dpo_leaves_a_model_a_log_and_a_result(recipe, tmp_path, base):
    config = recipe(eval_strategy="steps", eval_steps=1, dataset_test_split="0.25", learning_rate=1e-3, max_steps=2)
    assert main(["dpo", "--config", config, "--max_steps", "3"]) == 0
    out = tmp_path / "out"
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, out))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    log = read(out, "metrics.jsonl")
    assert [entry["step"] for entry in log if "ceu/weight_mean" in entry] == [1, 2, 3]
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 3 and result["seed"] == 42
    assert result["settings"]["max_steps"] == 3 and result["settings"]["learning_rate"] == 1e-3
    assert "output_dir" not in result["settings"]
    assert result["metrics"]["eval_logps/chosen"] == log[-2]["eval_logps/chosen"]
    assert result["versions"]["trl"].startswith("1.16") and result["device"].startswith("CPU")
    assert result["command"] == f"ceu-rl dpo --config {config} --max_steps 3"


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["q_proj"], {"q_proj"}),
        ([r".*\.(k|v)_proj"], {"k_proj", "v_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_through_the_recipe(recipe, tmp_path, targets, adapted):
    config = recipe(use_peft=True, lora_r=2, lora_target_modules=targets, learning_rate=1e-3)
    assert main(["dpo", "--config", config]) == 0
    weights = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in weights} == adapted


def test_sft_and_dpo_on_the_builtin_task(recipe, tmp_path):
    """The task is scored at evaluations, and its scores may tell which model is best."""
    shared = {"dataset_name": "builtin:addition", "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    shared |= {"metric_for_best_model": "sampled_accuracy", "load_best_model_at_end": True, "save_strategy": "steps"}
    for method, base in (("sft", "builtin:llama"), ("dpo", str(tmp_path / "sft"))):
        config = recipe(model_name_or_path=base, output_dir=str(tmp_path / method), **shared)
        assert main([method, "--config", config]) == 0
        result = json.loads((tmp_path / method / "result.json").read_text())
        metrics, decoding = result["metrics"], result["decoding"]
        assert not decoding["greedy"]["do_sample"] and decoding["sampled"]["top_k"] == 0
        assert metrics["eval_greedy_accuracy"] == metrics["eval_sampled_accuracy"] == 0
        state = json.loads((tmp_path / method / "trainer_state.json").read_text())
        assert state["best_global_step"] == 3 and state["best_metric"] == 0


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([{"prompt": "1" * 30, "completion": "2"}] * 2, 2, "Every prompt of the train dataset fills max_length (20)"),
        ([{"prompt": "1" * n, "completion": "2"} for n in (2, 40)], 0, "1 of 2 rows dropped: prompt fills max_length"),
        ([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], 0, ""),
    ],
)
def test_sft_says_what_it_leaves_out_and_what_it_cannot_learn(recipe, tmp_path, capsys, caplog, rows, status, said):
    config = recipe(max_steps=1, max_length=20)
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    assert main(["sft", "--config", config]) == status
    assert said in capsys.readouterr().err + caplog.text


def test_help_and_env(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "ceu-rl sft|dpo|grpo|unlearn --config RECIPE.yaml" in capsys.readouterr().out
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "vLLM works" in out and re.search(r"the route works +yes, on", out)


def test_env_says_what_does_not_work(capsys, monkeypatch):
    def probe(command, **kwargs):
        return subprocess.CompletedProcess(command, int("try_route" in command[-1]), stdout="cpu", stderr="it broke")

    monkeypatch.setattr(subprocess, "run", probe)
    assert main(["env"]) == 1
    assert "no: it broke" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["dpoo"], ["dpo", "--config", "{broken}"]])
def test_what_cannot_be_read_ends_with_2(tmp_path, capsys, words):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert main([word.format(broken=tmp_path / "broken.yaml") for word in words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "error: " in err


# folders and checkpoints


SAVED = {"save_strategy": "steps", "save_steps": 1}


def test_nothing_that_was_saved_is_written_over(recipe, tmp_path, refused):
    """By the same command, and by a run that goes on from a checkpoint of another folder."""
    config = recipe(**SAVED, max_steps=2)
    assert main(["dpo", "--config", config]) == 0
    saved = files(tmp_path / "out")
    other = [f"--resume_from_checkpoint={tmp_path}/out/checkpoint-1", "--output_dir"]
    assert main(["dpo", "--config", config, *other, f"{tmp_path}/b"]) == 0
    for words in ([], [*other, f"{tmp_path}/b"]):
        refused(["dpo", "--config", config, *words], "holds an earlier run (checkpoint-")
    assert saved == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "reading .*checkpoint-1: name an earlier one with resume_from_checkpoint")
            for name in ("optimizer.pt", "model.safetensors", "rng_state.pth")
        ),
        ("trainer_state.json", "checkpoint-1 is no whole checkpoint"),
        ("-optimizer.pt", "checkpoint-1 lacks optimizer.pt or scheduler.pt"),
    ],
)
def test_a_checkpoint_that_is_cut_or_lacks_a_file_is_named_and_the_log_stays(recipe, tmp_path, capsys, name, message):
    config = recipe(**SAVED, max_steps=2)
    assert main(["dpo", "--config", config]) == 0
    file = tmp_path / "out" / "checkpoint-1" / name.removeprefix("-")
    if name.startswith("-"):
        file.unlink()
    else:
        os.truncate(file, 10)
    log = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1"]) == 2
    assert re.search(message, err := capsys.readouterr().err) and "Traceback" not in err
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == log


# what the parts of a run refuse


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_test_split": "0.1"}, "dataset_test_split is given, which unlearning does not read"),
        ({"eval_facts": "builtin:authors"}, "scored at evaluations, and this run has none; use tofu-eval"),
    ],
)
def test_unlearning_refuses_what_it_does_not_read(recipe, refused, given, message):
    refused(["unlearn", "--config", recipe(dataset_name="builtin:authors", **given)], message)


def test_a_model_whose_weights_are_not_all_there_is_refused(recipe, base, tmp_path, refused):
    """transformers draws the rest at random, and only logs it, as the head of a reward model that has none."""
    reward = {"model_name_or_path": str(base), "reward_model_name_or_path": str(base), "max_length": None}
    reward["num_generations"] = 2
    refused(["grpo", "--config", recipe(**reward)], "lack 1 of the model's tensors, the first of them score.weight")
    path = Path(base, "model.safetensors")
    weights = safetensors.torch.load_file(path)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        del weights[name]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    for words in (["dpo", "--config", recipe()], ["tofu-eval", "--model", str(base), "--dataset", "builtin:authors"]):
        refused(words, "base lack 2 of the model's tensors, the first of them lm_head.weight")
