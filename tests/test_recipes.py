"""Every recipe parses, opens with its command, differs from its stock twin in few lines, and runs on a stand-in."""

import json
import re
import runpy
import shlex
from pathlib import Path

import datasets
import pytest
import yaml

from ceu_rl.cli import main
from ceu_rl.run.config import build_configs, read_arguments, recipe_method

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def name(path):
    return str(path.relative_to(ROOT))


def header(path):
    return [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


def method_of(path):
    """The command of the last line of the header that runs this recipe."""
    commands = [line for line in header(path) if name(path) in line]
    assert commands, "the header does not say how to run it"
    words = shlex.split(commands[-1])
    assert words[-2:] == ["--config", name(path)]
    if "accelerate" in words:  # which without a config takes every GPU, and makes the batch as many times larger
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    return words[-3]


def settings(path):
    return yaml.safe_load(path.read_text())


def lines(path):
    return {line for line in path.read_text().splitlines() if line and not line.startswith("#")}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_it_parses_and_says_how_to_run_it(path):
    assert any(line.startswith("Hardware: ") for line in header(path))
    # bf16 is refused at parsing on a machine without it, which is not what is asked here
    argv = ["--config", str(path), "--use_cpu", "true"]
    method = method_of(path)
    script, args, model, *rest = build_configs(method, read_arguments(method, argv))
    assert script.dataset_name and model.model_name_or_path and args.output_dir.startswith("runs/")
    fields = settings(path)
    fields.pop("env", None)
    assert fields.pop("method") == method == recipe_method(path)
    if "accelerate/fsdp2.yaml" in path.read_text():  # every process loads it whole; what trains is float32 all the same
        assert fields["dtype"] == "bfloat16" and any("of host memory" in line for line in header(path))
    for key, value in fields.items():
        found = next(getattr(part, key) for part in (args, script, model, *rest) if hasattr(part, key))
        assert found is not None or value is None


def test_every_wrong_solution_of_gsm8k_makes_a_pair_with_a_right_one_or_the_human_one(tmp_path, monkeypatch):
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    with (tmp_path / "example_model_solutions.jsonl").open("w") as file:
        for right in (models[1:3], (), models):
            judged = {model: {"is_correct": model in right, "solution": model} for model in models}
            file.write(json.dumps({"question": "?", "ground_truth": "human", **judged}) + "\n")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "recipes/dpo/smollm2-gsm8k/make_pairs.py"))
    pairs = [json.loads(line) for line in (tmp_path / "gsm8k-pairs.jsonl").read_text().splitlines()]
    said = [(pair["problem"], *(pair[side][0]["content"] for side in ("chosen", "rejected"))) for pair in pairs]
    assert said == [*((0, models[1], models[place]) for place in (0, 3)), *((1, "human", model) for model in models)]


STOCK = [path for path in RECIPES if path.stem.startswith("stock") and path.stem != "stock-sft"]


@pytest.mark.parametrize("path", STOCK, ids=name)
def test_stock_and_ce_u_differ_in_a_few_lines(path):
    assert settings(path)["ceu_coef"] == 0
    arms = ("ceu-0.5", "ceu-1", "ceu-published", "positives", "anchored", "constant-0.75", "gate", "token-ratio")
    twins = [twin for arm in arms if (twin := path.with_name(path.name.replace("stock", arm))).is_file()]
    assert twins
    for twin in twins:
        assert 2 <= len(lines(twin) - lines(path)) <= 4 and len(lines(path) - lines(twin)) <= 3


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "stock-sft"], ids=name)
def test_the_remedy_against_displacement_is_stock_with_its_loss_alone(path):
    remedy, stock = settings(path), settings(path.with_name("stock.yaml"))
    assert remedy.pop("loss_type") == ["sigmoid", "sft"] and remedy.pop("output_dir") != stock.pop("output_dir")
    assert remedy == stock


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory, tokenizer):
    """A tiny model, and 16 conversational pairs with an implicit prompt, in the place of what the Hub has."""
    from ceu_rl.models import build_model

    from .conftest import TINY

    folder = tmp_path_factory.mktemp("stand_in")
    build_model(tokenizer, **TINY).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def said(role, content):
        return [{"role": role, "content": content}]

    asked = [said("user", f"{i}+1") for i in range(16)]
    answers = [{name: [*turn, *said("assistant", name)] for name in ("chosen", "rejected")} for turn in asked]
    maths = [{"prompt": turn, "solution": f"${i + 1}$"} for i, turn in enumerate(asked)]
    for name, rows in (("data/train", answers), ("data/test", answers), ("maths/train", maths)):
        (folder / name).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_json(folder / f"{name}.jsonl")
    return folder


IN_THE_PLACE_OF = {
    "dpo": {"eval_steps": 1},
    "grpo": {"use_vllm": "false", "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4},
    "sft": {"dataset_name": "builtin:authors", "model_name_or_path": "builtin:llama"},
    "unlearn": {"dataset_name": "builtin:authors"},
    "smollm2-chain-sum": {
        "dataset_name": "reasoning_gym:chain_sum",
        "dataset_config": "min_terms=2, max_terms=2, max_digits=3, size=16",
    },
    "smollm2-gsm8k": {"dataset_test_split": "test"},
    "spell-backward": {
        "dataset_name": "reasoning_gym:spell_backward",
        "dataset_config": "min_word_len=3, max_word_len=7, size=16",
    },
    "articles": {"dataset_name": "builtin:articles", "max_length": 512},  # one character of it is one token
}


# Arms of one folder differ in a few settings, which tests of their own train with: most of them run with `-m slow`
FAST = ("stock", "ceu-0.5", "base", "full", "ceu_retain")
STAND_INS = [path for path in RECIPES if not path.parent.name.startswith("addition")]
STAND_INS = [pytest.param(p, id=name(p), marks=[] if p.stem in FAST else [pytest.mark.slow]) for p in STAND_INS]


@pytest.mark.parametrize("path", STAND_INS)
def test_it_runs_on_a_stand_in(path, stand_in, tmp_path):
    """The recipe as it is, with a tiny model and data, for one step on the CPU."""
    method = method_of(path)
    overrides = {
        "model_name_or_path": stand_in / "model",
        "dataset_name": stand_in / ("data" if method == "dpo" else "maths"),
        **IN_THE_PLACE_OF[method],
        **({"dataset_name": "builtin:authors"} if "tofu" in path.parts else {}),
        **IN_THE_PLACE_OF.get(path.parent.name, {}),
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    argv = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    assert main([method, "--config", str(path), *argv]) == 0
    assert (tmp_path / "out" / "result.json").is_file()


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= (1 if path.stem == "single" else 2)
    assert any(re.match(rf"accelerate launch --config_file {name(path)} ", line) for line in header(path))
    fsdp = settings(path).get("fsdp_config")
    assert fsdp is None or fsdp["fsdp_cpu_ram_efficient_loading"] is False
