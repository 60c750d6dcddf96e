"""The embedded tokenizers and the tiny model."""

import copy

import pytest
import torch
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from ceu_rl.models import build_bpe_tokenizer, build_model, build_tokenizer, end_token_ids
from ceu_rl.tasks import load_task_dataset


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer)


@pytest.fixture(scope="module")
def preference():
    return load_task_dataset("builtin:addition", "preference")


def user(text):
    return [{"role": "user", "content": text}]


# tokenizer


def test_every_character_survives_a_round_trip(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n\n  two  spaces , 'tis n't ! \n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_foreign_character_is_one_unknown_token(tokenizer):
    assert tokenizer("aé").input_ids == [*tokenizer("a").input_ids, tokenizer.unk_token_id]


def test_tokenizer_and_model_load_from_one_folder(tokenizer, model, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [*user("1+2="), {"role": "assistant", "content": " a  b\n"}]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left"
    rendered = [each.apply_chat_template(chat, tokenize=False) for each in (loaded, tokenizer)]
    assert rendered[0] == rendered[1]
    assert loaded.decode(loaded(" a  b\n").input_ids) == " a  b\n"
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_prompt_is_a_prefix_in_text_and_tokens(tokenizer, preference):
    for row in preference["test"].select(range(20)):
        for key in ("chosen", "rejected"):
            for tokenize in (False, True):
                kwargs = {"tokenize": tokenize, "return_dict": False}
                prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **kwargs)
                full = tokenizer.apply_chat_template(row["prompt"] + row[key], **kwargs)
                assert full[: len(prompt)] == prompt
            assert tokenizer.decode(full[len(prompt) :]) == row[key][0]["content"] + tokenizer.eos_token


def test_the_prefix_property_holds_over_several_turns(tokenizer):
    chat = [
        {"role": "system", "content": "be brief"},
        *user("hi"),
        {"role": "assistant", "content": "yo"},
        *user("bye"),
        {"role": "assistant", "content": "bye"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = "<|bos|><|system|>be brief<|user|>hi<|assistant|>yo<|eos|><|user|>bye<|assistant|>bye<|eos|>"
    assert text == expected
    for turn in (2, 4):
        prompt = tokenizer.apply_chat_template(chat[:turn], add_generation_prompt=True, tokenize=False)
        assert text.startswith(prompt)


def test_the_assistant_mask_covers_the_answer_and_its_end(tokenizer):
    assert has_generation_markers(tokenizer.chat_template)
    assert is_chat_template_stop_token_trained(tokenizer)
    chat = [*user("1+2="), {"role": "assistant", "content": "so 3"}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    masked = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(masked) == "so 3<|eos|>"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="Unknown role tool: use system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


TEXTS = ["The author was born in Oslo, and wrote poems.", "The author lives in Quito; she wrote novels."] * 20


def test_bpe_learns_words_and_loses_no_text(tmp_path):
    bpe = build_bpe_tokenizer(TEXTS, vocab_size=300)
    assert len(bpe) == 300
    assert len(bpe("The author wrote").input_ids) < 8
    bpe.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", " ", "naïve Skármeta 北京 🎉\n\n  two  spaces , 'tis n't !", "\x00\t\r\n", TEXTS[0]):
        for each in (bpe, loaded):
            ids = each(text).input_ids
            assert each.decode(ids) == text
            assert each.unk_token_id not in ids


def test_bpe_is_the_character_tokenizer_in_all_but_its_text_tokens(tokenizer):
    bpe = build_bpe_tokenizer(TEXTS)
    assert bpe.convert_ids_to_tokens(range(7)) == tokenizer.convert_ids_to_tokens(range(7))
    assert (bpe.chat_template, bpe.padding_side) == (tokenizer.chat_template, "left")
    chat = [*user("hi there"), {"role": "assistant", "content": "so 3"}]
    prompt = bpe.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    full = bpe.apply_chat_template(chat, return_dict=False)
    assert full[: len(prompt)] == prompt
    assert bpe.decode(full[len(prompt) :]) == "so 3<|eos|>"
    assert full.count(bpe.eos_token_id) == 1


def test_bpe_depends_on_its_arguments_alone():
    first, second, other = (build_bpe_tokenizer(texts, 300) for texts in (TEXTS, iter(TEXTS), TEXTS[:1]))
    assert first.get_vocab() == second.get_vocab() != other.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [(TEXTS, 262, "vocab_size is 262; use at least 263"), ([""], 300, "no text among the 1")],
)
def test_bpe_refuses_what_it_cannot_learn(texts, size, message):
    with pytest.raises(ValueError, match=message):
        build_bpe_tokenizer(texts, size)


# model


def test_model_is_tiny_and_knows_the_special_tokens(tokenizer, model):
    assert 400_000 < model.num_parameters() < 600_000
    for config in (model.config, model.generation_config):
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_model_depends_on_its_seed_alone_and_leaves_the_random_state(tokenizer, model):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = build_model(tokenizer), build_model(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_model_takes_overrides(tokenizer):
    small = build_model(tokenizer, hidden_size=32, num_hidden_layers=1)
    assert (small.config.hidden_size, len(small.model.layers)) == (32, 1)


@pytest.mark.parametrize(
    ("named", "ends"), [(None, [2]), (2, [2]), (7, [2, 7]), ([2, 7], [2, 7]), ([7, 2, 7], [2, 7]), ([7, 8], [2, 7, 8])]
)
def test_every_end_of_the_generation_config_ends_an_answer(tiny_model, tokenizer, named, ends):
    model = tiny_model()
    model.generation_config.eos_token_id = named
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert tokenizer.eos_token_id == 2
    for given in (model, adapted, model.generation_config):
        assert end_token_ids(given, tokenizer) == ends
    assert end_token_ids(None, tokenizer) == [2]


def test_a_tokenizer_without_an_end_leaves_those_of_the_model(tiny_model):
    endless, model = build_tokenizer(), tiny_model()
    endless.eos_token = None
    assert end_token_ids(model, endless) == [2] and end_token_ids(None, endless) == []


# content in parts


def test_the_text_of_content_parts_is_the_content(tokenizer):
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    for role in ("system", "user", "assistant"):
        flat, parted = (
            tokenizer.apply_chat_template([{"role": role, "content": content}], tokenize=False)
            for content in ("yes", parts)
        )
        assert parted == flat and "yes" in parted


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_content_that_is_no_text_is_refused_by_name(tokenizer, kind):
    with pytest.raises(TemplateError, match=f"Unknown content of type {kind}: use text"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": kind}]}], tokenize=False)
