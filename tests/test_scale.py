"""docs/scale.py: its formulas against models and against what was measured on a CPU, and its page against itself."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("scale", DOCS / "scale.py")
scale = importlib.util.module_from_spec(spec)
sys.modules["scale"] = scale  # dataclasses look it up
spec.loader.exec_module(scale)
MEASURED = json.loads((DOCS / "results" / "scale" / "cpu.json").read_text())["rows"]
SIZES = ("model", "sequences", "tokens", "checkpointing")
SHAPES = {
    "tiny": scale.Shape("tiny", 128, 3, 4, 4, 256, 103),
    "smollm2": scale.Shape("smollm2", 576, 30, 9, 3, 1536, 49_152, tied=True),
}


def check(row):
    """Each number of a row within 15 % of its formula. torch counts no product that is written into a buffer, of which
    the fused head has two, so its FLOP are up to 15 % fewer."""
    shape, sizes = SHAPES[row["model"]], [row[key] for key in SIZES[1:]]
    assert shape.parameters == row["parameters"]
    assert scale.peak_above_start(shape, *sizes) == pytest.approx(row["peak_bytes"], rel=0.15)
    assert scale.step_flop(shape, *sizes) == pytest.approx(row["flop"], rel=0.15)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']}-{row['tokens']}")
def test_memory_and_flop_are_those_that_were_measured(row):
    check(row)


@pytest.mark.parametrize("model", SHAPES)
def test_the_seconds_follow_from_the_flop_rate_of_another_row(model):
    """SmolLM2 without checkpointing: the row with it was measured while less else ran on the machine."""
    first, *others = [row for row in MEASURED if row["model"] == model]
    rate = scale.step_flop(SHAPES[model], *(first[key] for key in SIZES[1:])) / first["seconds"]
    compared = [row for row in others if model == "tiny" or not row["checkpointing"]]
    assert compared
    for row in compared:
        seconds = scale.step_flop(SHAPES[model], *(row[key] for key in SIZES[1:])) / rate
        assert seconds == pytest.approx(row["seconds"], rel=0.15)


def test_the_tiny_model_is_measured_again():
    check(scale.measure("tiny", 4, 256, False, rounds=1))


@pytest.mark.parametrize("shape", scale.MODELS, ids=lambda shape: shape.name)
def test_the_parameters_are_those_of_the_models(shape):
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
    config = (Qwen2Config if shape.qkv_bias else LlamaConfig)(**sizes)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == shape.parameters


def test_adam_and_gradients_are_sixteen_bytes_a_parameter_over_the_gpus():
    shape = scale.MODELS[1]
    for engine in ("FSDP2", "ZeRO-3"):
        parts = scale.memory(shape, 8, engine, "GRPO")
        held = sum(parts[part] for part in ("weights", "gradients", "Adam"))
        assert held * scale.GIB == pytest.approx(16 * shape.parameters / 8)


def test_the_cache_of_vllm_is_the_one_of_transformers():
    """Keys and values of one token of the tiny model, in bfloat16."""
    model = scale.build("tiny").to(torch.bfloat16)
    cache = model.forward.__self__.model(torch.tensor([[1]]), use_cache=True).past_key_values
    bytes_ = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
    shape = SHAPES["tiny"]
    assert bytes_ == scale.kv_cache(shape, 1, 1)


def test_the_page_is_what_the_script_writes():
    assert (DOCS / "scale.md").read_text() == scale.written(), "run python docs/scale.py"
