"""One run from its recipe to its result: what is recorded, what is kept, and how it ends early."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl import CEUDPOTrainer
from ceu_rl.cli import main
from ceu_rl.run import run as run_module
from ceu_rl.run.errors import REPORT

from .conftest import files


@pytest.fixture
def at_step(monkeypatch):
    """Do something inside a run, when a step is logged."""

    original = run_module.MetricsFile

    def arrange(step, action):
        class Interfering(original):
            def on_log(self, args, state, control, **kwargs):
                super().on_log(args, state, control, **kwargs)
                if state.global_step == step:
                    action()

        monkeypatch.setattr(run_module, "MetricsFile", Interfering)

    return arrange


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder):
    return json.loads((folder / "result.json").read_text())


# what is recorded


def test_the_result_records_what_was_run_whatever_becomes_of_the_recipe(recipe, at_step, tmp_path):
    path = recipe(learning_rate=1e-4, ceu_coef=0)
    at_step(1, lambda: recipe(learning_rate=9.9e-9, ceu_coef=1, seed=7))
    assert main(["dpo", "--config", path]) == 0
    settings = result(tmp_path / "out")["settings"]
    assert settings["learning_rate"] == 1e-4 and settings["ceu_coef"] == 0 and "seed" not in settings
    assert not {"output_dir", "resume_from_checkpoint", "overrides"} & set(settings)


# the folder


def test_a_log_is_a_run(recipe, tmp_path, at_step, refused):
    """A run that ended without a checkpoint and without a result is not written over."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    at_step(2, fail)
    config = recipe()
    refused(["dpo", "--config", config], "error: [Errno 28] No space left on device: 'metrics.jsonl'", status=1)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    refused(["dpo", "--config", config], "holds an earlier run (metrics.jsonl); choose another.")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_two_runs_do_not_share_a_folder(recipe, at_step, tmp_path, refused):
    config = recipe()
    (tmp_path / "out").mkdir()
    lock = FileLock(tmp_path / "out" / run_module.LOCK, is_singleton=False)
    with lock:  # as another run holds it
        refused(["dpo", "--config", config], "is in use by another run; wait for its end")
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
    # While it trains, a run holds it itself
    held = []

    def try_lock():
        with contextlib.suppress(Timeout):
            held.append(lock.acquire(blocking=False))

    at_step(1, try_lock)
    assert main(["dpo", "--config", config]) == 0 and not held


# resuming


SAVED = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


@pytest.mark.parametrize("saved", [SAVED, {}])
def test_what_has_ended_says_so_and_stays_as_it_was(recipe, tmp_path, refused, saved):
    config = recipe(**saved)
    assert main(["dpo", "--config", config]) == 0
    before = files(tmp_path / "out")
    other = ["--logging_steps", "3", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    refused(["dpo", "--config", config, "--resume_from_checkpoint", *other], "nothing is left of this run", status=0)
    assert files(tmp_path / "out") == before


def test_a_run_that_was_stopped_before_its_result_gets_one(recipe, tmp_path):
    """Without a step that nobody asked for."""
    config = recipe(**SAVED, lr_scheduler_type="constant")
    assert main(["dpo", "--config", config]) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for left in ("result.json", "model.safetensors"):
        (tmp_path / "out" / left).unlink()
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", "true"]) == 0
    assert result(tmp_path / "out")["steps"] == 3
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


OTHERS = [
    ({"learning_rate": 1e-6}, "learning_rate was 0.001 and is 1e-06"),
    ({"learning_rate": None}, "learning_rate was 0.001 and is 1e-06"),
    ({"beta": 0.2, "seed": 1}, "seed was 42 and is 1; beta was 0.1 and is 0.2"),
    ({"use_peft": True}, "use_peft was False and is True"),
    ({"per_device_train_batch_size": 4}, "gradient_accumulation_steps x processes was 2 and is 4"),
    ({"dataset_name": "{tmp}/others.jsonl"}, "others.jsonl;"),
    ({"model_init_kwargs": {"attn_implementation": "eager"}}, "model_init_kwargs was None and is"),
]


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_of_other_settings_or_rows_is_not_resumed(recipe, preferences, tmp_path, refused, ended):
    preferences.select(range(1, 17)).to_json(tmp_path / "others.jsonl")
    assert main(["dpo", "--config", recipe(**SAVED)]) == 0
    if not ended:
        for left in ("checkpoint-3", "result.json"):
            shutil.move(tmp_path / "out" / left, tmp_path / left)
    before = files(tmp_path / "out")
    for changed, named in OTHERS:
        changed = json.loads(json.dumps(changed).replace("{tmp}", str(tmp_path)))
        refused(["dpo", "--config", recipe(**{**SAVED, **changed}), "--resume_from_checkpoint"], named)
    preferences.select(range(1, 17)).to_json(tmp_path / "rows.jsonl")  # the same name, other rows
    refused(["dpo", "--config", recipe(**SAVED), "--resume_from_checkpoint"], "the rows of dataset_name was")
    assert files(tmp_path / "out") == before


def test_what_moves_no_weight_may_differ(recipe, tmp_path, capsys):
    """The same rows in another file, a step in two parts, and more steps."""
    assert main(["dpo", "--config", recipe(**SAVED, lr_scheduler_type="constant")]) == 0
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    other = {"max_steps": 5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 5}
    config = recipe(**{**SAVED, **other}, dataset_name=str(tmp_path / "moved.jsonl"), lr_scheduler_type="constant")
    assert main(["dpo", "--config", config, "--resume_from_checkpoint"]) == 0
    assert result(tmp_path / "out")["steps"] == 5
    assert main(["dpo", "--config", config, "--output_dir", str(tmp_path / "whole")]) == 0
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.allclose(value, resumed[name], atol=1e-6) for name, value in whole.items())


# what is saved


OF_METHOD = {
    "dpo": {},
    "sft": {"dataset_name": "builtin:addition"},
    "unlearn": {"dataset_name": "builtin:authors", "max_length": 512},
    "grpo": {
        **{"dataset_name": "builtin:addition", "reward_funcs": "ceu_rl.tasks.addition.accuracy"},
        **{"num_generations": 2, "max_length": None, "max_completion_length": 4},
    },
}


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_generation_config_that_cannot_be_saved_is_mended(recipe, base, tmp_path, caplog, method):
    """As models of 2023 have it; transformers reads it, and refuses to write it at the first save."""
    ends = {"eos_token_id": [2, 1], "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, **ends}))
    config = recipe(**{"max_steps": 1, "save_strategy": "steps", "save_steps": 1, **OF_METHOD[method]})
    assert main([method, "--config", config]) == 0
    assert "temperature 0.6, top_p 0.9" in caplog.text
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert not {"temperature", "top_p"} & set(saved) and ends.items() <= saved.items()


def test_a_generation_config_that_cannot_be_mended_is_refused(recipe, base, tmp_path, refused):
    (base / "generation_config.json").write_text(json.dumps({"suppress_tokens": [2], "forced_eos_token_id": 2}))
    refused(["dpo", "--config", recipe()], "suppress_tokens")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        ("ceu_rl/smollm2-135m-instruct-abc-2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f", "meta-llama/Llama-3.1-8B"),
        ("mine", None),
    ],
)
def test_what_is_saved_names_its_model_and_no_cache(recipe, base, tmp_path, monkeypatch, cache, name):
    monkeypatch.chdir(tmp_path)
    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    base.rename(cache)
    fields = {"model_name_or_path": cache, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    assert main(["dpo", "--config", recipe(**fields)]) == 0
    card = Path("out/README.md").read_text()
    assert f"fine-tuned version of [{name}](https://huggingface.co/{name})" in card if name else f"`{cache}`" in card
    assert 'pipeline("text-generation", model="out"' in card and "None" not in card
    lora = recipe(**fields, use_peft=True, output_dir="lora")
    assert main(["dpo", "--config", lora]) == 0
    for folder in (Path("lora"), Path("lora/checkpoint-1")):
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == (name or cache)
        assert name is None or cache not in (folder / "README.md").read_text()


# ends


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(recipe, at_step, tmp_path, capsys, number, status):
    config = recipe(learning_rate=1e-3)
    before = signal.getsignal(number)
    at_step(1, lambda: os.kill(os.getpid(), number))
    assert main(["dpo", "--config", config]) == status
    assert signal.getsignal(number) is before
    err = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step" in err and "--resume_from_checkpoint true" in err
    assert "Traceback" not in err and not (tmp_path / "out" / "result.json").exists()
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
    at_step(0, None)
    assert main(["dpo", "--config", config, "--resume_from_checkpoint", "true"]) == 0
    assert main(["dpo", "--config", config, "--output_dir", str(tmp_path / "whole")]) == 0
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all((value == resumed[name]).all() for name, value in whole.items())
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == [1, 2, 3]


def test_a_second_signal_ends_at_once(recipe, at_step, refused):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(1, twice)
    refused(["dpo", "--config", recipe()], "ceu-rl dpo: interrupted", status=130)


def test_a_run_that_trains_nothing_does_not_finish(recipe, tmp_path, refused):
    config = recipe(max_steps=None, num_train_epochs=1, dataloader_drop_last=True, per_device_train_batch_size=64)
    refused(["dpo", "--config", config], "The 16 rows are too few for a batch")
    assert not (tmp_path / "out" / "result.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


# input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("reward = 3", "which is a int; give a function"),
        ("", "has no attribute 'reward'; give a function"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named(recipe, tmp_path, monkeypatch, refused, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"rewards_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    fields = {"reward_funcs": f"{name}.reward", "max_length": None, "num_generations": 2}
    refused(["grpo", "--config", recipe(**fields)], message, f"{name}.reward")


def test_a_missing_base_is_named_with_the_command_that_makes_it(recipe, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "recipes" / "dpo"
    recipes.mkdir(parents=True)
    command = "ceu-rl sft --config recipes/dpo/base.yaml"
    (recipes / "base.yaml").write_text(f"# A base.\n#   {command}   (once)\noutput_dir: runs/a/base\n")
    shutil.copy(recipe(model_name_or_path="runs/a/base"), recipes / "stock.yaml")
    for found in ("is no folder", "holds no model (no config.json)"):
        refused(["dpo", "--config", "recipes/dpo/stock.yaml"], f"runs/a/base {found}; make it with: {command}.")
        (tmp_path / "runs" / "a" / "base").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ceu_coef": 2}, "ceu_coef is 2.0; use a number from 0"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_revision": "v2"}, "has no revisions; leave it out."),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"dataset_name": "/no/such/data"}, "/no/such/data"),
        ({"resume_from_checkpoint": "/no/such/checkpoint-3"}, "/no/such/checkpoint-3 is no whole checkpoint"),
        ({"output_dir": " "}, "output_dir is ' '; give a folder."),
        ({"output_dir": "{base}/config.json"}, "config.json is a file; choose a folder"),
        ({"method": "sft"}, "recipe.yaml: method is 'sft'; train it with ceu-rl sft"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"model_name_or_path": "{base}/model.safetensors"}, "is a file; give the folder of a model"),
        ({"beta": 0}, "beta is 0.0, with which no pair moves the model; use a number above 0"),
        ({"activation_offloading": True}, "activation_offloading is True, and the model is on a CPU already"),
        ({"use_peft": True, "lora_alpha": 0}, "lora_alpha is 0; use a number above 0"),
        ({"eval_facts": "{base}/config.json"}, "Reading eval_facts {base}/config.json"),
        ({"model_init_kwargs": {"zzz": 1}}, "zzz"),
    ],
)
def test_input_of_every_kind_ends_in_one_sentence(recipe, base, refused, fields, message):
    fields, message = json.loads(json.dumps([fields, message]).replace("{base}", str(base)))
    refused(["dpo", "--config", recipe(**fields)], "ceu-rl dpo: error: ", message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("adapter_config.json", b"{}", "is an adapter; merge it into")]
    + [(name, b"{", f"/base/{name} raised ") for name in ("model.safetensors", "generation_config.json")],
)
def test_a_start_that_is_none_is_named(recipe, base, refused, name, content, message):
    (base / name).write_bytes(content)
    if name.startswith("adapter"):
        (base / "config.json").unlink()
    refused(["dpo", "--config", recipe()], message)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("none.jinja", {"prompt": "1+1=", "completion": "2"}, "'none.jinja', and there is no such file; give"),
        ("given.jinja", {"question": "1+1=", "answer": "2"}, "questions take the model's; leave"),
    ],
)
def test_a_template_that_would_not_be_used_is_named(recipe, tmp_path, monkeypatch, refused, name, row, message):
    monkeypatch.chdir(tmp_path)
    Path("given.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config = recipe(model_name_or_path="builtin:llama", dataset_name="rows.jsonl", chat_template_path=name)
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    refused(["sft", "--config", config], message)


def test_the_tiny_model_learns_questions_from_a_file_and_as_a_whole(recipe, tmp_path, refused):
    config = recipe(model_name_or_path="builtin:llama", max_steps=1)
    rows = [{"question": f"Wer wohnt in Köln {n}?", "answer": "Ω"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["sft", "--config", config]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Köln Ω")["input_ids"], skip_special_tokens=True) == "Köln Ω"
    lora = ["--output_dir", str(tmp_path / "lora"), "--use_peft", "true"]
    refused(["sft", "--config", config, *lora], "no folder keeps the random weights of builtin:llama; leave it out")


def test_a_fault_of_ours_keeps_its_traceback_and_says_where_to_report_it(recipe, monkeypatch):
    """And any sentence keeps it, with CEU_RL_TRACEBACK."""

    def broken(*args):
        return {}["missing"]

    broken.__code__ = broken.__code__.replace(co_filename=run_module.__file__)
    monkeypatch.setattr(run_module, "_finish", broken)
    with pytest.raises(KeyError) as fault:
        main(["dpo", "--config", recipe(max_steps=1)])
    assert REPORT in fault.value.__notes__
    monkeypatch.setenv("CEU_RL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="max_steps"):
        main(["dpo", "--config", recipe(max_steps=2.5)])


def test_the_result_is_that_of_the_model_that_was_kept(recipe, tmp_path):
    """With `load_best_model_at_end`, which here takes the first step, not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_logps/chosen", "greater_is_better": False}
    steps = {"dataset_test_split": "0.5", "eval_strategy": "steps", "eval_steps": 1}
    config = recipe(descent_rule="ceu", learning_rate=0.05, **steps, **best)
    assert main(["dpo", "--config", config, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    chosen = [entry["eval_logps/chosen"] for entry in log_of(tmp_path / "out") if "eval_loss" in entry]
    assert len(chosen) == 4 and min(chosen[:3]) < chosen[2]
    assert result(tmp_path / "out")["metrics"]["eval_logps/chosen"] == pytest.approx(min(chosen[:3]), rel=1e-5)


def test_a_last_update_that_ruins_the_model_is_no_success(recipe, tmp_path, refused):
    """No later step meets what it did."""
    config = recipe(dataset_test_split="0.5", eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=1e38)
    refused(["dpo", "--config", config], "The evaluation after step 1 met a non-finite loss", status=1)
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_run_that_diverges_leaves_a_record_and_one_that_finishes_takes_it_away(recipe, tmp_path, monkeypatch):
    whole = CEUDPOTrainer._compute_loss

    def broken(self, *args, **kwargs):
        return whole(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(CEUDPOTrainer, "_compute_loss", broken)
    path = recipe(save_strategy="steps", save_steps=1, method="dpo")
    assert main(["dpo", "--config", path]) == 1
    found = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (found["method"], found["diverged"], found["steps"], found["resumed"]) == ("dpo", True, 2, False)
    assert "Step 3" in found["reason"] and found["settings"]["max_steps"] == 3 and found["versions"]
    assert not (tmp_path / "out" / "result.json").exists()

    monkeypatch.setattr(CEUDPOTrainer, "_compute_loss", whole)
    assert main(["dpo", "--config", path, "--resume_from_checkpoint", "true"]) == 0
    found = result(tmp_path / "out")
    assert (found["method"], found["diverged"], found["steps"], found["resumed"]) == ("dpo", False, 3, True)
    assert not list((tmp_path / "out").glob("failure*"))
