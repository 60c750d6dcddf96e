"""Reading a recipe and a command line: what is understood, and the one sentence for what is not."""

import os
import subprocess
import sys

import pytest
import torch

from ceu_rl.run.config import build_configs, read_arguments, read_recipe, settings_of


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def read_settings(method, argv):
    return settings_of(read_arguments(method, argv))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),  # which YAML 1.1 reads as text
        ("max_steps: 0100", {"max_steps": 100}),  # which it reads as 64
        ("max_steps: 1_000\nlearning_rate: +.5E-3", {"max_steps": 1000, "learning_rate": 5e-4}),
        ("run_name: 2026-02-30", {"run_name": "2026-02-30"}),
        ("learning-rate: 1.0e-4\nmax-steps: 3", {"learning_rate": 1e-4, "max_steps": 3}),
        ("max_length: null\npad_to_multiple_of: 8", {"max_length": None, "pad_to_multiple_of": 8}),
        ("include_num_input_tokens_seen: all", {"include_num_input_tokens_seen": "all"}),
        ("trackio_static_space_id: false\nreport_to: [a]", {"trackio_static_space_id": False, "report_to": ["a"]}),
        ("lora_target_modules: all-linear", {"lora_target_modules": ["all-linear"]}),
        ("loss_type: [ipo, sft]\nloss_weights: [1, 0.5]", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
        ("model_init_kwargs: {num_hidden_layers: 2}", {"model_init_kwargs": {"num_hidden_layers": 2}}),
        ("report_to: none\nsave_strategy: no", {"report_to": "none", "save_strategy": "no"}),
        ("dataset_name: 3", {"dataset_name": "3"}),
        ("env: {CEU_RL_X: 1}\nseed: 3", {"env": {"CEU_RL_X": 1}, "seed": 3}),
        ("ceu_max_weight: .inf", {"ceu_max_weight": float("inf")}),
        (b"\xef\xbb\xbfseed: 3", {"seed": 3}),
        ("output_dir: here\nresume_from_checkpoint: true\nseed: 3", {"seed": 3}),
    ],
)
def test_fields_are_typed(recipe, text, settings):
    found = read_settings("dpo", ["--config", str(recipe(text))])
    assert found == settings and {type(v) for v in found.values()} == {type(v) for v in settings.values()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 2.5", "--max_steps/--max-steps: invalid int value: '2.5'"),
        ("model_init_kwargs: {? [1, 2] : 3}", "is no valid recipe .line 1"),
        ("seed: " + "[" * 3000, "is nested too deeply"),
        ("env: {A: [2]}", r"env is \{'A': \[2\]\}; give NAME: value lines"),
        ("max_steps: null", "max_steps is None; give a value of type int"),
        ("learning_rate: [1e-5]", "learning_rate is .*; give a value of type float"),
        ("learning_rat: 1", "no field 'learning_rat'; did you mean learning_rate"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("max_steps: 1\nmax-steps: 2", "gives max_steps twice"),
        ("model_init_kwargs: {a: 1, a: 2}", "a is given twice"),
        ("a: [1", "is no valid recipe .line 1"),
        ("seed: 1\n\tx: 2", "is no valid recipe .line"),
        ("", "holds nothing"),
        ("- seed", r"holds \['seed'\]"),
        ("seed: 1".encode("utf-16"), "is not UTF-8"),
        ("seed: !!python/object:os.system x", "is no valid recipe"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_field(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_recipe("dpo", path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config"], "--config has no value"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times"),
        (["--config", "/no/such.yaml"], "/no/such.yaml is no file"),
        (["R.yaml"], "R.yaml is no option; write --config R.yaml"),
        (["--ceu_cof", "1"], "no field 'ceu_cof'; did you mean ceu_coef"),
        (["--lr", "1"], "no field 'lr'; did you mean learning_rate"),
        (["--batch-size", "1"], "no field 'batch-size'; did you mean per_device_train_batch_size"),
        (["--data", "a"], "no field 'data'; did you mean dataset_name"),
        (["--datasets", "a"], "no field 'datasets'; did you mean dataset_name"),
        (["--max_steps", "1", "2"], "no field '2'; ceu-rl dpo --help-all"),
    ],
)
def test_words_that_are_no_option_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        read_arguments("dpo", argv)


def test_a_field_of_other_methods_is_not_its_own_hint():
    with pytest.raises(ValueError, match=r"no field 'max_length'; did you mean (?!max_length)"):
        read_arguments("grpo", ["--max_length", "8"])


def test_the_command_line_goes_before_the_recipe_whatever_its_form(recipe):
    path = recipe("learning_rate: 1\nseed: 3\noutput_dir: a")
    for config in (["--config", str(path)], [f"--config={path}"]):
        for rate in (["--learning-rate", "1e-4"], ["--learning_rate=1e-4"], ["--learning_rate", "0.0001"]):
            for argv in (config + rate, rate + config):
                assert read_settings("dpo", argv) == {"learning_rate": 1e-4, "seed": 3}
    words = ["--loss_type", "sigmoid", "sft", "--gradient_checkpointing", "--output_dir", "b"]
    assert read_arguments("dpo", words)["loss_type"] == ["sigmoid", "sft"]
    assert read_settings("dpo", ["--gradient_checkpointing"]) == {"gradient_checkpointing": True}


def test_a_reward_function_may_stand_alone(recipe):
    assert read_recipe("grpo", recipe("reward_funcs: a.b"))["reward_funcs"] == ["a.b"]
    assert read_recipe("grpo", recipe("scale_rewards: false")) == {"scale_rewards": False}
    assert read_recipe("grpo", recipe("scale_rewards: batch")) == {"scale_rewards": "batch"}


def test_variables_are_set_before_torch_is_imported(recipe, tmp_path):
    """CUDA reads CUDA_VISIBLE_DEVICES when it starts, torch reads others when it is imported."""
    path = recipe("env: {CUDA_VISIBLE_DEVICES: 7, OMP_NUM_THREADS: 1}\nmodel_name_or_path: ./none\ndataset_name: x")
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("torch finds", os.environ.get("CUDA_VISIBLE_DEVICES"))
sys.meta_path.insert(0, Watch())
from ceu_rl.cli import main
main(["dpo", "--config", {str(path)!r}])
import torch
print("initialized", torch.cuda.is_initialized())
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines()[:2] == ["torch finds 7", "initialized False"], ran.stderr


@pytest.mark.parametrize(
    ("given", "use_cpu", "bf16"),
    [({}, True, False), ({"bf16": True}, True, True), ({"use_cpu": True, "bf16": False}, True, False)],
)
def test_without_a_gpu_a_run_is_on_the_cpu(tmp_path, caplog, given, use_cpu, bf16):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    caplog.set_level("INFO")
    _, args, *_ = build_configs("dpo", {"output_dir": str(tmp_path), **given})
    assert (args.use_cpu, args.bf16) == (use_cpu, bf16)
    assert ("use_cpu is true" in caplog.text) == ("use_cpu" not in given)


@pytest.mark.parametrize("method", ["sft", "dpo", "unlearn", "grpo"])
def test_short_names_and_the_latest_checkpoint(recipe, method):
    words = ["--model", "m", "--dataset=d", "--resume_from_checkpoint"]
    expected = {"model_name_or_path": "m", "dataset_name": "d", "resume_from_checkpoint": "true"}
    assert read_arguments(method, words) == read_arguments(method, [words[3], *words[:3]]) == expected
    del expected["resume_from_checkpoint"]
    assert read_recipe(method, recipe("model: m\ndataset: d")) == expected
    with pytest.raises(ValueError, match="gives model_name_or_path twice"):
        read_recipe(method, recipe("model: m\nmodel_name_or_path: n"))


@pytest.mark.parametrize(
    ("method", "own", "trls"),
    [
        ("sft", "--model_name_or_path", "--packing"),
        ("dpo", "--ceu_coef", "--beta"),
        ("grpo", "--weight_sync_steps", "--num_generations"),
        ("unlearn", "--retain_weight", "--max_length"),
    ],
)
def test_help_opens_with_what_is_used(method, own, trls, capsys):
    for asked, most in (("--help", 150), ("--help-all", None)):
        with pytest.raises(SystemExit, match="0"):
            read_arguments(method, [asked])
        out = capsys.readouterr().out
        assert f"usage: ceu-rl {method} --config" in out and own in out and trls in out and "--dataset" in out
        assert ("--adam_beta1" in out) == (most is None) and (most is None or len(out.splitlines()) < most)
        assert most is None or out.index(own) < out.index("--learning_rate") < out.index("--eval_facts")


def test_a_token_of_the_hub_is_not_recorded():
    assert read_settings("dpo", ["--hub_token", "hf_secret", "--seed", "1"]) == {"seed": 1}
