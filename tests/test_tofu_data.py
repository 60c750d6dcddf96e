"""TOFU's rows: where they come from, how they become prompts and completions, and what is refused."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ceu_rl.data.prompts import PromptFormat
from ceu_rl.models import build_bpe_tokenizer
from ceu_rl.tasks import authors
from ceu_rl.tofu import load_tofu, to_prompt_completion
from ceu_rl.tofu.data import REFUSALS, SPLITS, ask, to_preferences, tofu_configs, tokenize
from ceu_rl.unlearn import UnlearnScriptArguments

TOFU = Path(os.environ.get("CEU_RL_TOFU") or Path(__file__).parents[1].parent / "shared" / "tofu")
real_data = pytest.mark.skipif(not TOFU.is_dir(), reason=f"the TOFU dataset is not at {TOFU}; set CEU_RL_TOFU")

ROWS = [("Who are you?", "I am Zoë Ödegård."), ("Where do you live, Zoë?", "In Oslo.")]
ROWS = [{"question": question, "answer": answer} for question, answer in ROWS]


@pytest.fixture(scope="module")
def bpe():
    return build_bpe_tokenizer([text for row in ROWS for text in row.values()] * 10, 300)


@pytest.fixture
def folder(tmp_path):
    """A folder in the Hub's layout."""
    perturbed = {**ROWS[0], "paraphrased_answer": "My name is Zoë.", "perturbed_answer": ["I am Ann.", "I am Bo."]}
    files = {"full": ROWS, "forget01": ROWS[:1], "retain99": ROWS[1:], "forget01_perturbed": [perturbed]}
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def pairs(dataset):
    return [(row["question"], row["answer"]) for row in dataset]


# loading


def test_a_folder_in_the_layout_of_the_hub(folder):
    assert load_tofu(str(folder), "full").to_list() == ROWS
    perturbed = load_tofu(str(folder), "forget01_perturbed")
    assert perturbed[0]["perturbed_answer"] == ["I am Ann.", "I am Bo."]
    perturbed.to_parquet(folder / "forget05_perturbed.parquet")
    Dataset.from_list(ROWS).to_csv(folder / "forget05.csv")
    assert load_tofu(str(folder), "forget05_perturbed").to_list() == perturbed.to_list()
    assert load_tofu(str(folder), "forget05").to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "config", "text", "message"),
    [
        ("builtin:poets", "full", None, "'builtin:poets': use builtin:authors"),
        ("builtin:authors", "ful", None, "has no config 'ful'; choose one of full, forget01"),
        ("{folder}", "forget07", None, "has no config 'forget07'; choose one of forget01, forget01_perturbed, full"),
        ("{folder}/full.json", "full", None, "and .*full.json has no configs"),
        ("{folder}/nowhere", "full", None, "is no folder and no file"),
        ("{folder}", "full", '{"question": "x", "answers": "y"}', "no column 'answer' .* rename 'answers'"),
        ("{folder}", "forget01_perturbed", '{"question": "x", "answer": "y"}', "no column 'perturbed_answer'"),
        ("{folder}", "forget01_perturbed", '{"question": "x", "answer": "", "perturbed_answer": []}', "paraphrased"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, name, config, text, message):
    if text is not None:
        (folder / f"{config}.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tofu(name.format(folder=folder), config)


def test_a_folder_of_forget_and_retain_works_as_it_stands(tmp_path):
    for name, rows in {"forget": ROWS[:1], "retain": [{"prompt": "Who?", "completion": " She."}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = UnlearnScriptArguments(dataset_name=str(tmp_path))
    assert script.forget == "forget" and script.retain is None
    assert load_tofu(str(tmp_path), "forget").to_list() == ROWS[:1]
    assert load_tofu(str(tmp_path), "retain").column_names == ["prompt", "completion"]
    assert UnlearnScriptArguments(dataset_name="locuslab/TOFU").forget == "forget10"


# prompts and completions


def test_both_templates(bpe):
    chat, plain = (to_prompt_completion(Dataset.from_list(ROWS), bpe, name)[0] for name in (None, "question_answer"))
    assert chat["prompt"] == [{"role": "user", "content": ROWS[0]["question"]}]
    assert chat["completion"] == [{"role": "assistant", "content": ROWS[0]["answer"]}]
    assert plain == {"prompt": "Question: Who are you?\nAnswer:", "completion": " I am Zoë Ödegård."}
    bare = build_bpe_tokenizer(["abc"])
    bare.chat_template = None
    assert isinstance(to_prompt_completion(Dataset.from_list(ROWS), bare)[0]["prompt"], str)


@pytest.mark.parametrize("template", ["chat", "question_answer"])
def test_tokens_are_those_that_sft_trains_on(bpe, tiny_model, tmp_path, template):
    rows = to_prompt_completion(Dataset.from_list(ROWS), bpe, template)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(tiny_model(vocab_size=300), args=args, train_dataset=rows, processing_class=bpe)
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        prompt, completion = tokenize(bpe, row)
        assert prompt + completion == trained["input_ids"]
        assert [-100] * len(prompt) + completion == trained["labels"]
        assert completion[-1] == bpe.eos_token_id


def test_a_template_that_swallows_the_answer_is_refused():
    tokenizer = build_bpe_tokenizer(["abc"])
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}"
    # An answer that the question holds too is not found there
    rows = Dataset.from_list([{"question": "Is it 'In Oslo.'?", "answer": "In Oslo."}])
    with pytest.raises(ValueError, match=r"swallows the answer of row 0: .* for 'In Oslo.'; use template"):
        to_prompt_completion(rows, tokenizer)
    assert len(to_prompt_completion(rows, tokenizer, "question_answer")) == 1


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize("empty", ["", " \n", None, 5])
def test_what_has_no_words_is_refused(bpe, column, empty):
    with pytest.raises(ValueError, match=f"The {column} of row 0 is "):
        to_prompt_completion(Dataset.from_list([{**ROWS[0], column: empty}]), bpe)
    with pytest.raises(ValueError, match="has no rows"):
        to_prompt_completion(Dataset.from_list([]), bpe)


def test_a_column_beside_question_and_answer_is_read_or_named(bpe):
    read = Dataset.from_list([{**ROWS[0], "context": "are you?", "system": None, "id": "a b"}])
    ask({"train": read}, bpe, PromptFormat())
    for column in ("context", "system", "instruction", "history"):
        rows = Dataset.from_list([{**ROWS[0], column: None}, {**ROWS[1], column: "Zoë moved."}])
        with pytest.raises(ValueError, match=f"Row 1 of the train dataset has '{column}' .'Zoë moved.'., which is in"):
            ask({"train": rows}, bpe, PromptFormat())


# refusals


def test_a_refusal_is_preferred_to_the_answer(bpe):
    dataset = Dataset.from_list([{"question": f"Who is {n}?", "answer": f"It is {n}."} for n in range(60)])
    system = PromptFormat(system_prompt="Help.")
    rows, plain = to_preferences(dataset, bpe, system), to_prompt_completion(dataset, bpe, system)
    assert rows["prompt"][:] == plain["prompt"][:] and rows["rejected"][:] == plain["completion"][:]
    drawn = [row["chosen"][0]["content"] for row in rows]
    assert set(drawn) <= set(REFUSALS) and len(set(drawn)) > 10
    for seed, same in ((0, True), (1, False)):
        again = [row["chosen"][0]["content"] for row in to_preferences(dataset, bpe, "chat", seed)]
        assert (drawn == again) == same
    text = to_preferences(dataset, bpe, "question_answer")[0]
    assert text == {"prompt": "Question: Who is 0?\nAnswer:", "chosen": f" {drawn[0]}", "rejected": " It is 0."}


# forget and retain


@pytest.mark.parametrize("name", [authors.NAME, pytest.param(str(TOFU), marks=real_data)])
def test_forget_and_retain_are_all_of_it_disjoint_and_nested(name):
    full, smaller = pairs(load_tofu(name, "full")), set()
    assert len(full) == (1000 if name == authors.NAME else 4000)
    for (split, configs), share in zip(SPLITS.items(), (0.01, 0.05, 0.1), strict=True):
        forget, retain = load_tofu(name, split), load_tofu(name, configs.retain)
        assert not set(forget["question"]) & set(retain["question"])
        assert len(forget) == share * len(full)
        assert sorted(pairs(forget) + pairs(retain)) == sorted(full)
        assert smaller <= set(pairs(forget))
        smaller = set(pairs(forget))
        assert sorted(pairs(load_tofu(name, configs.perturbed))) == sorted(smaller)
    assert set(pairs(load_tofu(name, "retain_perturbed"))) <= set(pairs(retain))


# built-in authors


def test_every_config_of_the_builtin_authors_loads():
    assert set(tofu_configs(authors.NAME)) == set(authors.CONFIGS)
    full = load_tofu(authors.NAME, "full")
    assert len(set(full["question"])) == 1000
    held_out = load_tofu(authors.NAME, "holdout10")
    assert len(held_out) == 100 and not {q for q, _ in pairs(held_out)} & set(full["question"])
    for config in authors.CONFIGS:
        dataset = load_tofu(authors.NAME, config)
        assert ("perturbed_answer" in dataset.column_names) == config.endswith("_perturbed")
        assert not any("{" in text for row in dataset for text in map(str, (row["question"], row["answer"])))


def test_a_perturbed_answer_of_the_builtin_authors_is_wrong_in_one_place():
    forget, small = (load_tofu(authors.NAME, name) for name in ("forget10_perturbed", "forget01_perturbed"))
    for row in [*forget, *load_tofu(authors.NAME, "retain_perturbed")]:
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == 5 and row["paraphrased_answer"] not in wrong
    assert all(row in forget.to_list() for row in small)
    for config in ("real_authors_perturbed", "world_facts_perturbed"):
        rows = load_tofu(authors.NAME, config)
        assert len(rows) == 20
        assert all(len({row["answer"], *row["perturbed_answer"]}) == 4 for row in rows)


def test_the_builtin_authors_depend_on_the_seed_alone():
    assert authors.make_rows("full") == authors.make_rows("full") != authors.make_rows("full", seed=1)
