"""Answers of a model to prompts of tokens, for every measurement: tasks, TOFU, MUSE, pass@k, divergence.

A measurement decodes plainly: greedy, or at temperature 1. Nothing of a model's own `generation_config` but its end
tokens has a part in it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ceu_rl.models import end_token_ids, seeded_rng

Tokens = Sequence[int]
Part = TypeVar("Part")
Found = TypeVar("Found")
CPU_BYTES = 2 * 2**30  # for one batch; on a GPU it is an eighth of its memory, whatever else lies there
MOST = 512  # rows in one batch


def decoding_config(
    model: Any, tokenizer: Any, max_new_tokens: int | None = None, sample: bool = False
) -> GenerationConfig:
    """The whole generation config of a measurement: greedy, or samples from p itself, up to an end token.

    What is not set here has no effect in transformers, unless a model's own config fills it in: see [`decode_by`].
    """
    ends = end_token_ids(model, tokenizer)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None),
        use_cache=True,
        **(drawn if sample else {"do_sample": False}),
    )


def recorded_decoding(*given: Any, **settings: Any) -> dict[str, Any]:
    """What a result says of its decoding: the fields that [`decoding_config`] sets; all others have no effect."""
    fields = decoding_config(*given, **settings).to_diff_dict()
    return {name: value for name, value in fields.items() if name != "transformers_version"}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout in the block, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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


# batches by bytes, shared among the ranks


def plan_batches(
    lengths: Sequence[int], row_bytes: Callable[[int], int], device: torch.device, most: int = MOST
) -> list[list[int]]:
    """The places of rows in batches of at most `most`, the longest first, each within the memory for one.

    `row_bytes` is what one row takes in a batch whose longest row has that many tokens.
    """
    budget = CPU_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 8
    left = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while left:
        count = max(1, min(budget // row_bytes(lengths[left[0]]), most))
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


def plan_forwards(model: Any, lengths: Sequence[int], most: int | None = None, models: int = 1) -> list[list[int]]:
    """[`plan_batches`] for a forward pass of that many models like this one."""
    each = models * forward_bytes(model)
    return plan_batches(lengths, lambda length: length * each, model.device, most or MOST)


def world_size() -> int:
    """How many ranks take part: 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(parts: Sequence[Part], work: Callable[[Part], Found]) -> list[Found]:
    """`work` of each part, shared among the ranks of a distributed run: every rank must call, and gets all of it.

    Each rank works as often as the others, since a sharded model needs them all in each of its forwards. A ValueError
    on one is raised on every rank.
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


def in_batches(plan: Sequence[list[int]], work: Callable[[list[int]], list[Found]]) -> list[Found]:
    """What `work` finds of each row, in the order of the rows; see [`plan_batches`] and [`share`]."""
    found: dict[int, Found] = {}
    for places, results in zip(plan, share(plan, work), strict=True):
        found |= dict(zip(places, results, strict=True))
    return [found[place] for place in sorted(found)]


# forward passes


def answer_logits(model: Any, rows: Sequence[tuple[Tokens, Tokens]], device: torch.device) -> list[torch.Tensor]:
    """Of each prompt and answer what predicts the answer's tokens, (tokens, vocabulary), from one forward pass."""
    # The last token predicts nothing that is asked for
    ids, mask = _padded([[*prompt, *answer][:-1] for prompt, answer in rows], 0, "right", device)
    first = min(len(prompt) for prompt, _ in rows) - 1
    kept = ids.shape[1] - first
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
    starts = [len(prompt) - 1 - first for prompt, _ in rows]
    return [logits[row, start : start + len(rows[row][1])] for row, start in enumerate(starts)]


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
) -> list[list[list[int]]]:
    """Answers to each prompt up to their first end token, greedy or drawn at temperature 1: see [`decoding_config`].

    Each prompt is read once for all its `samples`; `seed` draws each batch, whatever rank it is on. Random state and
    training mode are as before. In a distributed run every rank must call.
    """
    config = decoding_config(model, tokenizer, max_new_tokens, sample)
    each_token, logits = cache_bytes(model), 16 * model.config.get_text_config().vocab_size

    def generate(places: list[int]) -> list[list[list[int]]]:
        asked = [prompts[place] for place in places]
        ids, mask = _padded(asked, config.pad_token_id, "left", model.device)
        copies = (each.repeat_interleave(samples, dim=0) for each in (ids, mask))
        inputs = dict(zip(("input_ids", "attention_mask"), copies, strict=True))
        if samples > 1:
            inputs["past_key_values"] = _read_prompts(model, ids, mask, samples)
        number = random.Random(f"{seed} {places[0]}").getrandbits(63)
        with seeded_rng(number, model.device), decode_by(model, config):
            # A rank that is done takes part in the forwards of the others
            tokens = model.generate(**inputs, generation_config=config, synced_gpus=world_size() > 1)
        answers = [_until_end(each, config.eos_token_id or ()) for each in tokens[:, ids.shape[1] :].tolist()]
        return [answers[start : start + samples] for start in range(0, len(answers), samples)]

    def row_bytes(length: int) -> int:
        return samples * (each_token * (length + max_new_tokens) + logits)

    plan = plan_batches(list(map(len, prompts)), row_bytes, model.device, max(1, (batch_size or MOST) // samples))
    with evaluating(model):
        return in_batches(plan, generate)


def answer_texts(model: Any, tokenizer: Any, answers: Sequence[Tokens]) -> list[str]:
    """What answers say, without the tokens that end them."""
    ends = end_token_ids(model, tokenizer)
    said = [[token for token in ids if token not in ends] for ids in answers]
    return tokenizer.batch_decode(said, skip_special_tokens=True)


def _padded(rows: Sequence[Tokens], pad: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad, side).to(device), pad_sequence(mask, True, 0, side).to(device)


def _read_prompts(model: Any, prompts: torch.Tensor, mask: torch.Tensor, samples: int) -> Any:
    """What the model keeps of each prompt but for its last token, once for every sample."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    given = {"input_ids": prompts, "attention_mask": mask, "position_ids": positions}
    past = model(**{name: each[:, :-1] for name, each in given.items()}, use_cache=True, logits_to_keep=1)
    past.past_key_values.batch_repeat_interleave(samples)
    return past.past_key_values


def _until_end(ids: list[int], ends: Tokens) -> list[int]:
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]
