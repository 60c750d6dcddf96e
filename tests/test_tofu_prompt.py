"""The prompt of a question: templates, ends and dates, from the rows to an evaluation."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from ceu_rl.cli import main
from ceu_rl.data.prompts import PromptArguments, PromptFormat
from ceu_rl.models import build_model
from ceu_rl.tofu import load_tofu, to_prompt_completion
from ceu_rl.tofu.evaluate import evaluate
from ceu_rl.tofu.scoring import make_answers

from .conftest import CONFIGS, TINY
from .templates import CHATML, GEMMA, LLAMA3, QWEN3, with_template
from .trainers import save_model

DATE = {"date_string": "10 Apr 2025"}
TEXTS = [text for row in load_tofu("builtin:authors", "forget01") for text in (row["question"], row["answer"])]

# name: template, eos_token, further ends, arguments, what is before the content, what ends it
KINDS = {
    "chatml": (CHATML, "<|im_end|>", [], {}, "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "gemma": (
        *(GEMMA, "<|eos|>", ["<end_of_turn>"], {}),
        "<|bos|><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "qwen3": (
        *(QWEN3, "<|im_end|>", ["<|eos|>"], {}),
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3": (
        *(LLAMA3, "<|eos|>", ["<|eot_id|>"], {"chat_template_kwargs": DATE, "system_prompt": "Help."}),
        "<|bos|>system: Today: 10 Apr 2025\nHelp.<|eot_id|>user: {}<|eot_id|>assistant: ",
        "<|eot_id|>",
    ),
    "tags of its own": (
        *(CHATML, "<|eos|>", ["<|eot_id|>"], {"template": "Q: {question}\nA:\n{answer}<|eot_id|>"}, "Q: {}\nA:\n"),
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scored_is_the_answer_and_one_end_token(folder, kind):
    template, eos, others, arguments, before, end = KINDS[kind]
    tokenizer, rows = with_template(TEXTS, template, eos), load_tofu(str(folder), CONFIGS[0])
    ends, prompt = tokenizer.convert_tokens_to_ids([eos, *others]), PromptFormat(**arguments).settle(tokenizer)
    for answer in make_answers({CONFIGS[0]: rows}, tokenizer, prompt, ends):
        whole = tokenizer.decode([*answer.prompt_ids, *answer.completion_ids])
        assert whole == before.format(rows[answer.row]["question"]) + answer.text + end
        assert tokenizer.decode(answer.completion_ids[: answer.text_length]).strip() == answer.text
        assert len(answer.completion_ids) == answer.text_length + 1 and answer.completion_ids[-1] in ends


@pytest.mark.parametrize(
    ("template", "eos", "others", "said"),
    [
        (GEMMA, "<|eos|>", ["<|eot_id|>", "<end_of_turn>"], "Xyz<end_of_turn>\n<|eot_id|> was born<|eos|>"),
        (CHATML, "<|im_end|>", [], "Xyz<|im_end|>\n was born in the city"),
        # The think block that the template writes is said by the model too
        (QWEN3, "<|im_end|>", ["<|eos|>"], "<think>\n\n</think>\n\nXyz<|im_end|>\n was born in the city"),
    ],
)
def test_a_generation_ends_at_every_end_of_the_model(folder, template, eos, others, said):
    tokenizer = with_template(TEXTS, template, eos)
    model = build_model(tokenizer, **TINY)
    ends = tokenizer.convert_tokens_to_ids([eos, *others])
    model.generation_config.eos_token_id = ends if others else ends[0]
    ids = tokenizer(said).input_ids

    def generate(input_ids, generation_config, **settings):
        end = next(place for place, token in enumerate(ids) if token in generation_config.eos_token_id)
        return torch.cat([input_ids, torch.tensor([ids[: end + 1]] * len(input_ids))], dim=1)

    model.generate = generate
    found = evaluate(model, tokenizer, str(folder), "forget01", max_new_tokens=12)
    assert {item["generation"] for config in CONFIGS for item in found["items"][config]} == {"Xyz"}


# What is recorded and refused


@pytest.mark.parametrize(
    ("template", "given", "message"),
    [
        (CHATML, {"template": "qa"}, "template is 'qa'; use chat, question_answer, or a text with {question}"),
        (CHATML, {"template": "{answer} {question}"}, "template is '{answer} {question}'; use"),
        (CHATML, {"template": "{question} {answer} {answer}"}, "template is '{question} {answer} {answer}'; use"),
        (CHATML, {"template": "question_answer", "system_prompt": "Help."}, "system_prompt is 'Help.'; leave it out"),
        (CHATML, {"template": "{question}{answer}", "chat_template_kwargs": DATE}, "chat_template_kwargs is {'date_"),
        (GEMMA, {"system_prompt": "Help."}, "chat template refuses the prompt (System role not supported); change"),
        (LLAMA3, {"system_prompt": "Help."}, "template writes today's date"),
        (None, {"template": "chat"}, "the tokenizer has no chat template; use 'question_answer'"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(template, given, message):
    tokenizer = with_template(TEXTS, template, "<|eos|>")
    with pytest.raises(ValueError, match=re.escape(message)):
        rows = Dataset.from_list([{"question": "Who?", "answer": "She."}])
        to_prompt_completion(rows, tokenizer, PromptFormat(**given))


@pytest.mark.parametrize("wrong", ["{", "[1]", "3"])
def test_arguments_of_a_template_are_an_object(wrong):
    with pytest.raises(ValueError, match="chat_template_kwargs is "):
        PromptArguments(dataset_name="x", chat_template_kwargs=wrong)


def test_the_prompt_goes_from_training_to_unlearning_to_evaluation(folder, recipe, refused, tmp_path, caplog):
    """The template writes the date, which the recipe of the first run pins."""
    tokenizer = with_template(TEXTS, LLAMA3, "<|eot_id|>")
    model = save_model(build_model(tokenizer, **TINY), tokenizer, tmp_path / "llama")
    for name, config in {"full": CONFIGS[0], "forget": CONFIGS[0], "retain": CONFIGS[1]}.items():
        load_tofu(str(folder), config).select_columns(["question", "answer"]).to_json(tmp_path / f"{name}.json")
    trained, unlearned = (str(tmp_path / name) for name in ("trained", "unlearned"))
    shared, prompt = {"max_steps": 1, "max_length": 512}, {"chat_template_kwargs": DATE, "system_prompt": "Help."}
    sft = {"model_name_or_path": model, "dataset_name": str(tmp_path / "full.json"), "output_dir": trained, **shared}
    refused(["sft", "--config", recipe(**sft)], "template writes today's date")
    assert main(["sft", "--config", recipe(**sft, **prompt)]) == 0
    assert "One prompt and its answer as the model sees them: '<|bos|>system: Today: 10 Apr" in caplog.text
    given = {"model_name_or_path": trained, "dataset_name": str(tmp_path), "retain": "retain", "output_dir": unlearned}
    assert main(["unlearn", "--config", recipe(**given, **shared)]) == 0
    words = ["tofu-eval", "--model", unlearned, "--dataset", str(folder), "--split=forget01", "--max_new_tokens=2"]
    assert main(words) == 0
    paths = (f"{trained}/result.json", f"{unlearned}/result.json", f"{unlearned}/tofu_eval.json")
    prompts = [json.loads(Path(path).read_text())["prompt"] for path in paths]
    assert prompts[0] == prompts[1] == prompts[2] == PromptFormat("chat", "Help.", DATE).record(tokenizer)
    named = ["--output_dir", str(tmp_path / "named"), "--chat_template_kwargs", json.dumps(DATE)]
    assert main([*words, *named]) == 0
    assert json.loads((tmp_path / "named" / "tofu_eval.json").read_text())["prompt"]["system_prompt"] is None


def test_a_prompt_beside_rows_that_are_no_questions_is_refused(recipe, refused):
    config = recipe(model_name_or_path="builtin:llama", dataset_name="builtin:addition", system_prompt="Add.")
    refused(["sft", "--config", config], "system_prompt='Add.'")
