"""Tiny models and data that every test can afford; the machine has no network, and none is needed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch

from ceu_rl.models import build_model, build_tokenizer

torch.set_num_threads(1)
datasets.disable_progress_bars()

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    """A factory of tiny random Llamas: the same seed gives the same weights."""

    def make(seed=0, **overrides):
        return build_model(tokenizer, seed=seed, **{**TINY, **overrides})

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
