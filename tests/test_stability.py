"""The comparison: arms run through the ordinary command line, finished ones kept, failed ones named."""

import json
import os
import shutil

import pytest
import yaml

from ceu_rl.cli import main


@pytest.fixture
def recipes(tmp_path, tiny_model, tokenizer, preferences, monkeypatch):
    """Write DPO recipes into a folder named dpo, as `ceu-rl compare` wants them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for folder in ("rows", "dpo"):
        os.mkdir(tmp_path / folder)
    for split in ("train", "test"):
        preferences.select(range(16)).to_json(tmp_path / "rows" / f"{split}.jsonl")

    def write(arm, **fields):
        settings = {
            "model_name_or_path": str(tmp_path / "base"),
            "dataset_name": str(tmp_path / "rows"),
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **fields,
        }
        path = tmp_path / "dpo" / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def test_compare_runs_keeps_and_names(recipes, tmp_path, capsys):
    out = tmp_path / "runs"
    good, bad = recipes("stock", ceu_coef=0), recipes("broken", max_length=1)
    assert main(["compare", good, bad, "--output_dir", str(out)]) == 1
    report = (out / "report.md").read_text()
    assert "|  | stock | broken |" in report and "| learning rate | 0.001 | none |" in report
    assert "failed: exit status 2 |" in report
    assert json.loads((out / "stock" / "result.json").read_text())["command"] in report
    assert (out / "report.png").stat().st_size > 10_000

    first = (out / "stock" / "result.json").read_bytes()
    fixed = recipes("broken")
    assert main(["compare", good, fixed, "--output_dir", str(out)]) == 0
    assert "stock: finished earlier, kept" in capsys.readouterr().out
    assert (out / "stock" / "result.json").read_bytes() == first
    assert "failed" not in (out / "report.md").read_text()

    assert main(["compare", recipes("stock", ceu_coef=0.5), "--output_dir", str(out)]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert (out / "stock" / "result.json").read_bytes() == first


def test_compare_goes_on_with_an_interrupted_arm(recipes, tmp_path, capsys):
    arm = tmp_path / "runs" / "ceu"
    command = ["compare", recipes("ceu", max_steps=3, save_steps=2), "--output_dir", str(tmp_path / "runs")]
    assert main(command) == 0
    whole = json.loads((arm / "result.json").read_text())
    # What a kill between the steps 2 and 3 leaves
    shutil.rmtree(arm / "checkpoint-3")
    for name in ("result.json", "model.safetensors"):
        (arm / name).unlink()
    assert main(command) == 0
    resumed = json.loads((arm / "result.json").read_text())
    assert resumed["command"].endswith("--resume_from_checkpoint true")
    assert resumed["metrics"]["eval_loss"] == whole["metrics"]["eval_loss"]
    assert main(command) == 0
    assert "ceu: finished earlier, kept" in capsys.readouterr().out


def test_a_recipe_in_no_methods_folder_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("{}")
    assert main(["compare", str(tmp_path / "a.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "is in no folder named dpo or grpo" in capsys.readouterr().err
