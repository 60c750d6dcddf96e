"""Where an answer begins and ends, whatever fields a template writes it from: all that the message says."""

import pytest
from datasets import Dataset

from ceu_rl import UnlearnConfig, UnlearnTrainer

from .templates import CHATML, QWEN3, with_template

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
CASES = [
    (CHATML, {"content": "In Oslo."}, "In Oslo."),
    (QWEN3, {"content": "In Oslo."}, "In Oslo."),
    (REASONS, {"content": "In Oslo."}, "In Oslo."),
    (REASONS, {"content": "In Oslo.", "reasoning_content": "North."}, "<think>North.</think>In Oslo."),
    (REASONS, {"content": "In Oslo.", "thinking": "In Rome?"}, "<think>In Rome?</think>In Oslo."),
    (REASONS, {"content": "", "reasoning_content": "North."}, "<think>North.</think>"),
    (CALLS, {"content": "", **CALL}, '[add({"a": 1, "b": "2"})]'),
    (CALLS, {"content": "I add.", **CALL}, '[add({"a": 1, "b": "2"})]'),
    (CALLS, {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, '[f("{}")]'),
    (
        CALLS,
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}] * 2},
        '[f({"n": 1})]' * 2,
    ),
]


@pytest.mark.parametrize(("template", "said", "expected"), CASES)
def test_what_is_unlearned_is_the_answer_and_its_end(tiny_model, tmp_path, template, said, expected):
    tokenizer = with_template([], template, "<|im_end|>")
    row = {"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", **said}]}
    args = UnlearnConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", ignore_first_n_answer_tokens=0)
    trainer = UnlearnTrainer(
        tiny_model(vocab_size=len(tokenizer)), args, Dataset.from_list([row]), processing_class=tokenizer
    )
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == f"{expected}<|im_end|>"
