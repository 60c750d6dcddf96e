"""Generation for measurements: plain decoding whatever a model's own config says, batches by bytes, shared by ranks."""

import copy
import dataclasses
import itertools
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.tasks import evaluate_task, get_task
from ceu_rl.tasks.generate import (
    cache_bytes,
    decode_by,
    decoding_config,
    forward_bytes,
    generate_tokens,
    plan_batches,
    recorded_decoding,
    share,
)
from ceu_rl.tofu.scoring import Answer, score_answers

from .conftest import TINY, generate_answers, user

PROMPTS = [user(text) for text in ("1+2=", "123+567=", "99+1=")]
# Each moves a sample or its length, greedy or drawn
FOREIGN = {
    **{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "stop_strings": ["1"], "min_p": 0.9, "top_k": 2},
    **{"top_p": 0.1, "typical_p": 0.1, "temperature": 0.1, "bad_words_ids": [[50], [60]], "max_length": 3},
    **{"suppress_tokens": list(range(20, 80)), "begin_suppress_tokens": list(range(20, 80)), "max_time": 0.0},
    **{"forced_bos_token_id": 50, "forced_eos_token_id": 50, "min_length": 40, "min_new_tokens": 12},
    **{"sequence_bias": [[[50], 10.0]], "exponential_decay_length_penalty": [1, 9.0], "guidance_scale": 3.0},
    **{"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "num_beams": 3, "num_return_sequences": 2},
    **{"watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0}, "prompt_lookup_num_tokens": 2},
    **{"return_dict_in_generate": True, "token_healing": True, "renormalize_logits": True, "use_cache": False},
    **{"cache_implementation": "static", "penalty_alpha": 0.6, "dola_layers": "low"},
}


@pytest.mark.parametrize("field", FOREIGN)
def test_a_models_own_generation_config_moves_nothing_but_its_ends(tokenizer, model, field):
    other = copy.deepcopy(model)
    own = other.generation_config
    setattr(own, field, FOREIGN[field])
    adapted = get_peft_model(copy.deepcopy(other), LoraConfig(r=2, target_modules=["q_proj"]))
    for sample, each in ((False, other), (True, other), (True, adapted)):
        found = [generate_answers(one, tokenizer, PROMPTS, 12, sample=sample, seed=1) for one in (model, each)]
        assert found[0] == found[1]
    assert other.generation_config is own and getattr(own, field) == FOREIGN[field]


def test_the_config_of_a_compiled_model_is_replaced_too(model):
    own, config = model.generation_config, decoding_config(model, build_tokenizer())
    with decode_by(torch.compile(model, backend="eager"), config):
        assert model.generation_config is config
    assert model.generation_config is own


def test_what_is_decoded_with_is_recorded(tokenizer, model):
    greedy, drawn = (recorded_decoding(model, tokenizer, 8, sample) for sample in (False, True))
    ends = {"max_new_tokens": 8, "eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    assert greedy == {**ends, "do_sample": False, "use_cache": True}
    assert drawn == {**ends, "do_sample": True, "use_cache": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


# batches by bytes


def test_the_bytes_of_a_token_are_those_that_a_model_keeps(tokenizer):
    for dtype, heads in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = build_model(tokenizer, **TINY, num_key_value_heads=heads).to(dtype)
        past = model(torch.tensor([[1, 2, 3, 4, 5]])).past_key_values
        kept = sum(tensor.nbytes for layer in past.layers for tensor in (layer.keys, layer.values))
        assert cache_bytes(model) == kept / 5


def test_batches_keep_to_the_memory_of_the_device_and_are_not_of_one_row(monkeypatch):
    """An 8B model with 128k tokens: 512 rows of 700 tokens would take 47 GB, and one prompt a forward wastes a GPU."""
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    model = types.SimpleNamespace(config=config, dtype=torch.bfloat16)
    memory = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    device, lengths = torch.device("cuda"), [200 + place % 500 for place in range(512)]
    for row_bytes in (lambda n: cache_bytes(model) * (n + 512), lambda n: forward_bytes(model) * n):
        plan = plan_batches(lengths, row_bytes, device)
        assert sorted(itertools.chain(*plan)) == list(range(512))
        assert all(len(batch) * row_bytes(max(lengths[place] for place in batch)) <= 10 * 2**30 for batch in plan)
        assert min(map(len, plan[:-1])) > 15
    assert max(map(len, plan_batches(lengths, lambda length: 1, device))) == 512
    assert [len(batch) for batch in plan_batches([5, 9, 1], lambda length: 2**60, device)] == [1, 1, 1]
    assert plan_batches([5, 9, 1], lambda length: 1, device, most=2) == [[1, 0], [2]]


# ranks


def measure(tokenizer, model, reference):
    task = dataclasses.replace(get_task("builtin:addition"), score=lambda row, text: float("1" in text), samples=2)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    prompts = tokenizer.apply_chat_template(PROMPTS, add_generation_prompt=True, return_dict=False)
    drawn = generate_tokens(model, tokenizer, prompts, 9, sample=True, seed=2, batch_size=1)
    answers = [Answer("set", n, "answer", 0, "text", ids[:2], [], ids[2:], 1) for n, ids in enumerate(prompts)]
    score_answers(model, answers, 1)
    scored = evaluate_task(model, tokenizer, task, rows, seed=0, reference=reference)
    return scored, drawn, [each.scores for each in answers]


def work(rank, folder):
    tokenizer = build_tokenizer()
    model, reference = build_model(tokenizer), build_model(tokenizer, seed=1)
    forwards = []
    model.register_forward_hook(lambda *given: forwards.append(1))
    alone, before = measure(tokenizer, model, reference), len(forwards)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    together, count = measure(tokenizer, model, reference), len(forwards) - before
    assert together == alone
    counts = [None, None]
    dist.all_gather_object(counts, count)
    assert counts[0] == counts[1] < before

    def fail(part):
        if part == 1:
            raise ValueError("row 1 is not finite")
        return part

    with pytest.raises(ValueError, match="row 1 is not finite"):
        share([0, 1, 2], fail)
    assert share([0, 2, 4], fail) == [0, 2, 4]
    dist.destroy_process_group()


def test_ranks_share_the_work_make_the_same_number_of_forwards_and_all_get_all_of_it(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
