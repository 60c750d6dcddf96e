"""A Llama of about half a million parameters, random from a seed, small enough to train on two CPU cores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@contextmanager
def seeded_rng(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from `seed` on the CPU and on `device` in the block, then restore the caller's random state."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Build the tiny model in float32 on the CPU; `overrides` are fields of `LlamaConfig`.

    The initial weights depend on `seed` alone, and the caller's random state is left as it was.
    """
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        **ids,
    }
    with seeded_rng(seed):
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    model.generation_config.update(**ids)
    return model
