"""Where an answer begins and ends, whatever fields a template writes it from: all that the message says."""

import pytest
from datasets import Dataset

from ceu_rl import UnlearnConfig, UnlearnTrainer
from ceu_rl.models import build_model

from .conftest import TINY, user
from .templates import CHATML, GEMMA, LLAMA3, QWEN3, with_template

REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content or m.thinking %}<think>"
    "{{ m.reasoning_content or m.thinking }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "({{ c.function.arguments | tojson }})]{% endfor %}{% if not m.tool_calls %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"tool_calls": [{"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}]}
TWICE = [{"function": {"name": "f", "arguments": {"n": 1}}}] * 2
CASES = [
    (REASONS, {"content": "In Oslo."}, "In Oslo."),
    (REASONS, {"content": "In Oslo.", "reasoning_content": "North."}, "<think>North.</think>In Oslo."),
    (REASONS, {"content": "In Oslo.", "thinking": "In Rome?"}, "<think>In Rome?</think>In Oslo."),
    (REASONS, {"content": "", "reasoning_content": "North."}, "<think>North.</think>"),
    (CALLS, {"content": "", **CALL}, '[add({"a": 1, "b": "2"})]'),
    (CALLS, {"content": "I add.", **CALL}, '[add({"a": 1, "b": "2"})]'),
    (CALLS, {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, '[f("{}")]'),
    (CALLS, {"content": None, "tool_calls": TWICE}, '[f({"n": 1})]' * 2),
]


@pytest.fixture
def unlearned(tmp_path):
    """The text of each row that is unlearned, token for token."""

    def texts(tokenizer, rows, skipped=0, ends=()):
        model = build_model(tokenizer, **TINY)
        if ends:
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
        args = UnlearnConfig(str(tmp_path), use_cpu=True, bf16=False, ignore_first_n_answer_tokens=skipped)
        trainer = UnlearnTrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer)
        labels = ([label for label in row if label != -100] for row in trainer.train_dataset["labels"])
        return ["".join(map(tokenizer.decode, row)) for row in labels]

    return texts


@pytest.mark.parametrize(("template", "said", "expected"), CASES)
def test_reasoning_and_tool_calls_are_the_answer(unlearned, template, said, expected):
    rows = [{"prompt": user("Where?"), "completion": [{"role": "assistant", **said}]}]
    assert unlearned(with_template([], template, "<|im_end|>"), rows) == [f"{expected}<|im_end|>"]


ASKED = [("Who is Zoë?", "A poet."), ("And Bo?", "0 or Z, says he."), ("And Al?", "Zed")]


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize(
    ("template", "eos", "ends", "kwargs", "end"),
    [
        (CHATML, "<|im_end|>", [], {}, "<|im_end|>"),
        (GEMMA, "<|eos|>", ["<|eos|>", "<end_of_turn>"], {}, "<end_of_turn>"),
        (QWEN3, "<|im_end|>", ["<|im_end|>", "<|eos|>"], {}, "<|im_end|>"),
        (QWEN3, "<|im_end|>", [], {"enable_thinking": False}, "<|im_end|>"),
        (LLAMA3, "<|eos|>", ["<|eot_id|>", "<|eos|>"], {"date_string": "10 Apr 2025"}, "<|eot_id|>"),
    ],
)
def test_what_is_unlearned_is_the_answer_and_one_end_token(unlearned, template, eos, ends, kwargs, end, skipped):
    tokenizer = with_template([], template, eos)  # a token is a byte
    more = {"chat_template_kwargs": kwargs} if kwargs else {}
    rows = [{"prompt": user(q), "completion": [{"role": "assistant", "content": a}], **more} for q, a in ASKED]
    assert unlearned(tokenizer, rows, skipped, ends) == [answer[skipped:] + end for _, answer in ASKED]


def test_texts_and_several_turns_keep_their_tokens(unlearned):
    tokenizer = with_template([], QWEN3, "<|im_end|>")
    assert unlearned(tokenizer, [{"text": "Once <|im_end|> upon"}]) == ["Once <|im_end|> upon<|im_end|>"]
    assert unlearned(tokenizer, [{"prompt": "Q:", "completion": " one"}], 1) == ["one<|im_end|>"]
    turns = [{"role": role, "content": text} for role, text in (("assistant", "A"), ("user", "B"), ("assistant", "C"))]
    (found,) = unlearned(tokenizer, [{"prompt": user("Q"), "completion": turns}])
    assert found.startswith("A<|im_end|>") and found.endswith("C<|im_end|>")
