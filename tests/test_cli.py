"""`ceu-rl` end to end on tiny models, and the one-sentence errors of bad input."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ceu_rl.cli import main

SMALL = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_length": 64,
}


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path):
    """A tiny model in a folder."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def rows(tmp_path, preferences):
    """A local dataset in the Hub's layout: a folder with a file for each split."""
    folder = tmp_path / "rows"
    folder.mkdir()
    preferences.to_json(folder / "train.jsonl")
    preferences.select(range(8)).to_json(folder / "test.jsonl")
    return str(folder)


@pytest.fixture
def recipe(tmp_path, base, rows):
    """Write a small DPO recipe; `None` takes a field out."""

    def write(**fields):
        defaults = {"model_name_or_path": base, "dataset_name": rows, "output_dir": str(tmp_path / "out"), **SMALL}
        settings = {key: value for key, value in {**defaults, **fields}.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def test_dpo_leaves_a_model_a_log_and_a_result(recipe, tmp_path, base):
    config = recipe(eval_strategy="steps", eval_steps=1, learning_rate=1e-3)
    assert main(["dpo", "--config", config, "--max_steps", "3"]) == 0
    out = tmp_path / "out"
    before = AutoModelForCausalLM.from_pretrained(base)
    after = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).decode([8, 9]) == AutoTokenizer.from_pretrained(base).decode([8, 9])
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "ceu/weight_mean" in entry] == [1, 2, 3]
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 3 and result["seed"] == 42
    assert result["settings"]["max_steps"] == 3 and result["settings"]["learning_rate"] == 1e-3
    assert "output_dir" not in result["settings"]
    assert result["metrics"]["eval_logps/chosen"] == log[-2]["eval_logps/chosen"]
    assert result["versions"]["trl"].startswith("1.16") and result["device"].startswith("CPU")
    assert result["command"] == f"ceu-rl dpo --config {config} --max_steps 3"


def test_dpo_with_coef_zero_equals_stock_trl(recipe, tmp_path, base, rows):
    """The whole path, from YAML to saved weights, against TRL's own trainer on the same folder."""
    assert main(["dpo", "--config", recipe(ceu_coef=0, learning_rate=1e-3, save_strategy="no")]) == 0
    args = DPOConfig(str(tmp_path / "stock"), learning_rate=1e-3, save_strategy="no", **SMALL)
    stock = DPOTrainer(base, args=args, train_dataset=Dataset.from_json(f"{rows}/train.jsonl"))
    stock.train()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in stock.model.state_dict().items())


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


def test_sft_and_dpo_on_the_builtin_task(tmp_path):
    shared = {**SMALL, "dataset_name": "builtin:addition", "eval_strategy": "steps", "eval_steps": 2}
    sft = {**shared, "model_name_or_path": "builtin:llama", "output_dir": str(tmp_path / "sft")}
    dpo = {**shared, "model_name_or_path": sft["output_dir"], "output_dir": str(tmp_path / "dpo")}
    for method, fields in (("sft", sft), ("dpo", dpo)):
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(fields))
        assert main([method, "--config", str(path)]) == 0
        result = json.loads(Path(fields["output_dir"], "result.json").read_text())
        metrics, decoding = result["metrics"], result["decoding"]
        assert not decoding["greedy"]["do_sample"] and decoding["sampled"]["top_k"] == 0
        assert metrics["eval_greedy_accuracy"] == metrics["eval_sampled_accuracy"] == 0


@pytest.mark.parametrize(
    ("lengths", "said"), [((30, 40), None), ((2, 40), "1 dropped, whose prompt fills max_length (20)")]
)
def test_sft_says_what_it_leaves_out(tiny_model, tokenizer, tmp_path, capsys, caplog, lengths, said):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Dataset.from_list([{"prompt": "1" * n, "completion": "2"} for n in lengths]).to_json(tmp_path / "rows.jsonl")
    fields = {**SMALL, "model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "rows.jsonl")}
    (tmp_path / "sft.yaml").write_text(
        yaml.safe_dump({**fields, "max_length": 20, "max_steps": 1, "output_dir": str(tmp_path / "out")})
    )
    assert main(["sft", "--config", str(tmp_path / "sft.yaml")]) == (0 if said else 2)
    told = capsys.readouterr().err + caplog.text
    assert (said or "Every prompt of the train dataset has max_length (20) tokens or more") in told


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 500]}], "Row 1 of the train dataset has the token id 500, and the"),
        ([{"input_ids": [1, 2], "labels": [1]}], "Row 0 of the train dataset has 1 'labels' for 2 'input_ids'"),
        ([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], None),
    ],
)
def test_tokens_that_a_dataset_brings_are_the_models(tiny_model, tokenizer, tmp_path, capsys, rows, said):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    fields = {**SMALL, "model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "rows.jsonl")}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({**fields, "max_steps": 1, "output_dir": str(tmp_path / "out")}))
    assert main(["sft", "--config", str(tmp_path / "sft.yaml")]) == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("eval_greedy_accuracy", None),
        ("sampled_accuracy", None),
        ("eval_greedy_acuracy", "eval_greedy_acuracy"),
    ],
)
def test_a_model_may_be_best_by_what_the_task_scores(tmp_path, capsys, metric, said):
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    fields = {**SMALL, **best, "dataset_name": "builtin:addition", "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"model_name_or_path": "builtin:llama", "output_dir": str(tmp_path / "out"), "max_steps": 1}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(fields))
    assert main(["sft", "--config", str(tmp_path / "sft.yaml")]) == (1 if said else 0)
    if said:
        err = capsys.readouterr().err
        assert (
            said in err and "metric_for_best_model" in err and "eval_greedy_accuracy" in err and "Traceback" not in err
        )
    else:
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["best_global_step"] == 1 and state["best_metric"] == 0


def test_help_and_env(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "ceu-rl sft|dpo|grpo|unlearn --config RECIPE.yaml" in capsys.readouterr().out
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "vLLM works" in out and re.search(r"the route works +│ yes, on", out)


@pytest.mark.parametrize(
    ("fault", "said"), [("try_route", "no: it broke"), ("trl", "1.15.0, and <1.17,>=1.16 is asked")]
)
def test_env_says_what_does_not_work(capsys, monkeypatch, fault, said):
    def probe(command, **kwargs):
        return subprocess.CompletedProcess(command, int(fault in command[-1]), stdout="cpu", stderr="it broke")

    found = importlib.metadata.version
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(subprocess, "run", probe)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.0" if name == fault else found(name))
    assert main(["env"]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "extra", "message"),
    [
        ({"ceu_coef": 2}, [], "ceu_coef is 2.0; use a number from 0"),
        ({"use_liger_kernel": True}, [], "use_liger_kernel is True"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"model_name_or_path": "builtin:llama"}, [], "builtin:llama has random weights; train it with `ceu-rl sft`"),
        ({"model_name_or_path": "/no/such/model"}, [], "/no/such/model"),
        ({"model_revision": "v2"}, [], "has no revisions; leave it out."),
        ({"dataset_name": None}, [], "dataset_name is missing"),
        ({"dataset_name": "/no/such/data"}, [], "/no/such/data"),
        ({"dataset_name": "builtin:subtraction"}, [], "Unknown built-in task 'builtin:subtraction'"),
        (
            {"dataset_train_split": "trian"},
            [],
            "dataset_train_split is 'trian', and the dataset has ['test', 'train']; name one",
        ),
        ({}, ["--config", "/no/such/recipe.yaml"], "/no/such/recipe.yaml"),
        ({}, ["--resume_from_checkpoint", "true"], "There is no checkpoint in"),
        ({}, ["--resume_from_checkpoint", "/no/such/checkpoint-3"], "/no/such/checkpoint-3 is no whole checkpoint"),
        ({"output_dir": " "}, [], "output_dir is ' '; give a folder."),
        ({"max_steps": 0}, [], "max_steps is 0; use a number above 0, or -1 for num_train_epochs."),
        ({"max_steps": -1, "num_train_epochs": 0}, [], "num_train_epochs is 0.0; use a number above 0"),
        ({"beta": -0.1}, [], "beta is -0.1; use a number from 0."),
    ],
)
def test_bad_input_is_one_sentence(recipe, tmp_path, capsys, fields, extra, message):
    argv = ["dpo", *(extra if "--config" in extra else ["--config", recipe(**fields), *extra])]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("ceu-rl dpo: error: ")]) == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_unknown_command(capsys):
    assert main(["dpoo"]) == 2
    assert "unknown command 'dpoo'; use one of" in capsys.readouterr().err


def test_broken_yaml(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1\n")
    assert main(["dpo", "--config", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_that_was_saved_is_written_over(recipe, tmp_path, capsys):
    config = recipe()
    assert main(["dpo", "--config", config]) == 0
    saved = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main(["dpo", "--config", config]) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert saved == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_run_that_goes_on_from_elsewhere_writes_over_none(recipe, tmp_path, capsys):
    config = recipe(save_steps=1)
    assert main(["dpo", "--config", config]) == main(["dpo", "--config", config, "--output_dir", f"{tmp_path}/b"]) == 0
    saved = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    argv = ["dpo", "--config", config, "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1", "--output_dir"]
    assert main([*argv, f"{tmp_path}/b"]) == 2
    assert "b holds an earlier run (checkpoint-1)" in capsys.readouterr().err
    assert saved == {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert main([*argv, f"{tmp_path}/c"]) == 0


def test_a_lower_learning_rate_counts_from_where_a_run_is_resumed(recipe, tmp_path):
    """The remedy after a loss that is not finite; a checkpoint brings the rate that it was saved with."""
    config = recipe(learning_rate=1e-3, weight_decay=0.1, max_steps=4, save_steps=2, lr_scheduler_type="linear")
    assert main(["dpo", "--config", config]) == 0
    argv = ["dpo", "--config", config, "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-2", "--output_dir"]
    again, lower = tmp_path / "again", tmp_path / "lower"
    assert main([*argv, str(again)]) == main([*argv, str(lower), "--learning_rate", "1e-6", "--weight_decay", "0"]) == 0
    whole, same, less = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "out", again, lower)
    )
    rates = [[entry["learning_rate"] for entry in log if "loss" in entry] for log in (whole, same, less)]
    assert rates[0] == rates[1] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates[2] == pytest.approx([1e-3, 7.5e-4, 5e-7, 2.5e-7])
    assert [entry["loss"] for entry in whole if "loss" in entry] == [entry["loss"] for entry in same if "loss" in entry]
    optimizer = torch.load(lower / "checkpoint-4" / "optimizer.pt")
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == [1e-6, 1e-6]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "Reading the checkpoint .* raised .*; name an earlier one with resume_from_checkpoint"),
        ("model.safetensors", "Reading the checkpoint .* raised .*; name an earlier one"),
        ("rng_state.pth", "Reading the checkpoint .* raised .*; name an earlier one"),
        ("trainer_state.json", "checkpoint-1 is no whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_cut_is_named_and_the_log_stays(recipe, tmp_path, capsys, name, message):
    config = recipe(save_steps=1)
    assert main(["dpo", "--config", config]) == 0
    os.truncate(tmp_path / "out" / "checkpoint-1" / name, 10)
    log = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1"]) == 2
    assert re.search(message, err := capsys.readouterr().err) and "Traceback" not in err
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_of_the_model_alone_is_not_gone_on_from(recipe, tmp_path, capsys, missing):
    config = recipe(save_steps=1)
    assert main(["dpo", "--config", config]) == 0
    (tmp_path / "out" / "checkpoint-2" / missing).unlink()
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", "true"]) == 2
    assert f"checkpoint-2 has no {missing}, so that it cannot be gone on from" in capsys.readouterr().err


def test_a_mixture_of_datasets_leaves_a_result(recipe, tmp_path, rows):
    """TRL's config of a mixture puts objects of its own in the place of what was given."""
    mixture = [{"path": "json", "data_files": f"{rows}/train.jsonl"}]
    assert main(["dpo", "--config", recipe(dataset_name=None, datasets=mixture)]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["datasets"] == mixture


def test_unlearning_refuses_what_it_does_not_read(tmp_path, base, capsys):
    fields = {"model_name_or_path": base, "dataset_name": "builtin:authors", **SMALL}
    for given, message in (
        ({"dataset_test_split": "0.1"}, "dataset_test_split is given, which unlearning does not read"),
        ({"dataset_name": None, "datasets": [{"path": "json"}]}, "datasets is given, which unlearning does not read"),
        ({"eval_facts": "builtin:authors"}, "and unlearning has no evaluations; use tofu-eval"),
        ({"dataset_name": "reasoning_gym:chain_sum"}, "a task, of which there is nothing to forget; name other rows"),
    ):
        settings = {key: value for key, value in {**fields, **given}.items() if value is not None}
        (tmp_path / "unlearn.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "out")}))
        assert main(["unlearn", "--config", str(tmp_path / "unlearn.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_a_model_whose_weights_are_not_all_there_is_refused(recipe, base, rows, capsys):
    """transformers draws the rest at random, and only logs it."""
    path = Path(base, "model.safetensors")
    weights = safetensors.torch.load_file(path)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        del weights[name]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    assert main(["dpo", "--config", recipe()]) == 2
    assert re.search(
        r"The weights in \S*base lack 2 of the model's tensors, the first of them lm_head.weight",
        capsys.readouterr().err,
    )
    assert main(["tofu-eval", "--model", base, "--dataset", "builtin:authors"]) == 2
    assert "lack 2 of the model's tensors" in capsys.readouterr().err


def test_a_language_model_is_no_reward_model(tmp_path, base, capsys):
    fields = {"model_name_or_path": base, "dataset_name": "builtin:addition", "output_dir": str(tmp_path / "out")}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump({**fields, "reward_model_name_or_path": base}))
    assert main(["grpo", "--config", str(tmp_path / "grpo.yaml")]) == 2
    assert (
        f"The weights in {base} lack 1 of the model's tensors, the first of them score.weight"
        in capsys.readouterr().err
    )


def test_a_killed_run_resumes_to_the_same_weights(recipe, tmp_path):
    """SIGKILL in the middle; `--resume_from_checkpoint true` ends at the weights of a run nobody killed."""
    settings = {"max_steps": 40, "save_steps": 2, "learning_rate": 1e-3}
    config = recipe(**settings)
    assert main(["dpo", "--config", config, "--output_dir", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "ceu_rl.cli", "dpo", "--config", config]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(p, resumed.get_parameter(name)) for name, p in whole.named_parameters())
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "grad_norm" in entry] == list(range(1, 41))


def test_accelerate_launch(recipe, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    result = subprocess.run(
        [*launch, "-m", "ceu_rl.cli", "dpo", "--config", recipe()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out" / "result.json").is_file()


def test_a_stopped_run_exits_with_1(recipe, tmp_path, base, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(base)
    assert main(["dpo", "--config", recipe()]) == 1
    err = capsys.readouterr().err
    assert "Step 1 met a non-finite loss (nan)" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "result.json").exists()
