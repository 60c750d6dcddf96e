"""How question and answer become a text: the prompt that a model was trained with, or is to be."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.hf_argparser import HfArg
from trl import ScriptArguments

QUESTION_ANSWER = "Question: {question}\nAnswer: {answer}"
SAMPLE = ("Where does she live?", "In Oslo.")  # what the fingerprint is made of


@dataclass
class PromptArguments(ScriptArguments):
    """`trl.ScriptArguments` for question and answer: how they become a text."""

    template: str | None = HfArg(
        default=None,
        help="How question and answer become a text: chat, question_answer (the benchmark's), or a text with "
        "{question} and {answer}, such as '[INST] {question} [/INST]{answer}'. Default: what the model's "
        "result.json says that it was trained with, else chat if the tokenizer has a chat template.",
    )
    system_prompt: str | None = HfArg(default=None, help="System prompt before each question.")
    chat_template_kwargs: dict | str | None = HfArg(
        default=None, help='Arguments of the chat template, such as \'{"date_string": "10 Apr 2025"}\'.'
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = read_kwargs(self.chat_template_kwargs)


def read_kwargs(value: Any) -> dict[str, Any] | None:
    """Arguments of a chat template, from a mapping or its JSON."""
    with suppress(json.JSONDecodeError):
        value = json.loads(value) if isinstance(value, str) else value
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"chat_template_kwargs is {value!r}; give an object such as {{'date_string': '10 Apr 2025'}}.")
    return dict(value) if value else None


@dataclass(frozen=True)
class PromptFormat:
    """How question and answer become prompt and completion, as TRL's SFTTrainer takes them.

    | template | prompt | completion |
    |---|---|---|
    | `chat` | `[{"role": "user", "content": question}]` | `[{"role": "assistant", "content": answer}]` |
    | `question_answer` | `"Question: {question}\\nAnswer:"` | `" {answer}"` |
    | a text with `{question}` and `{answer}` | what is before `{answer}` | the rest, blanks before it included |

    A template of None is `chat` if the tokenizer has a chat template, else `question_answer`. `chat` alone takes a
    `system_prompt`, a message before the question, and `chat_template_kwargs`, such as `date_string`.
    """

    template: str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, given: Any, model: str | Path | None = None) -> "PromptFormat":
        """The format that arguments name; if they name none, that which the model's folder records."""
        found = cls(given.template, given.system_prompt, read_kwargs(given.chat_template_kwargs))
        return (recorded_format(model) if found == cls() and model is not None else None) or found

    @classmethod
    def made_of(cls, template: "str | PromptFormat | None") -> "PromptFormat":
        """The format itself, or one of that template."""
        return template if isinstance(template, PromptFormat) else cls(template)

    def settle(self, tokenizer: Any) -> "PromptFormat":
        """The same with the template that the tokenizer decides.

        Raises:
            ValueError: for a template that is none, that refuses the prompt, or that writes today's date.
        """
        template = self.template or ("chat" if tokenizer.chat_template else "question_answer")
        settled = dataclasses.replace(self, template=template)
        if template != "chat":
            if template != "question_answer" and not template.partition("{question}")[2].count("{answer}") == 1:
                raise ValueError(
                    f"template is {template!r}; use chat, question_answer, or a text with {{question}} and {{answer}}."
                )
            for name in ("system_prompt", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is {getattr(self, name)!r}; leave it out with template {template!r}.")
            return settled
        if not tokenizer.chat_template:
            raise ValueError("template is 'chat' and the tokenizer has no chat template; use 'question_answer'.")
        try:
            settled.texts(tokenizer, *SAMPLE)
        except TemplateError as error:
            raise ValueError(f"The tokenizer's chat template refuses the prompt ({error}); change {self}.") from error
        try:  # without the function that gives a template the date
            settled.texts(tokenizer, *SAMPLE, strftime_now="")
        except TypeError as error:
            raise ValueError(
                "The tokenizer's chat template writes today's date; pin it, as in chat_template_kwargs "
                '\'{"date_string": "10 Apr 2025"}\', so that results do not change from day to day.'
            ) from error
        return settled

    def row(self, question: str, answer: str) -> dict[str, Any]:
        """Prompt and completion of one question, as the table above has them; the template must be settled."""
        if self.template == "chat":
            system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
            return {
                "prompt": [*system, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
                **({"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}),
            }
        template = QUESTION_ANSWER if self.template == "question_answer" else str(self.template)
        before, _, rest = template.partition("{question}")
        between, _, after = rest.partition("{answer}")
        blanks = between[len(between.rstrip(" ")) :]  # tokens hold the blank before a word
        return {"prompt": before + question + between.rstrip(" "), "completion": blanks + answer + after}

    def texts(self, tokenizer: Any, question: str, answer: str, **kwargs: Any) -> tuple[str, str]:
        """The text of the prompt, and of prompt and completion."""
        row = self.row(question, answer)
        if isinstance(row["prompt"], str):
            eos = tokenizer.eos_token or ""
            whole = row["prompt"] + row["completion"]
            return row["prompt"], whole if whole.endswith(eos) else whole + eos
        kwargs = {**row.get("chat_template_kwargs", {}), **kwargs, "tokenize": False}
        return (
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **kwargs),
            tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], **kwargs),
        )

    def record(self, tokenizer: Any) -> dict[str, Any]:
        """What a result says of its prompt: the settings, and a fingerprint of what they render."""
        return {
            "template": self.template,
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": self.chat_template_kwargs and dict(self.chat_template_kwargs),
            "fingerprint": fingerprint(self.texts(tokenizer, *SAMPLE)),
        }

    def parted(self, tokenizer: Any, question: str, answer: str) -> tuple[str, str]:
        """The text of prompt and answer, parted where the prompt alone would go on otherwise."""
        prompt, whole = self.texts(tokenizer, question, answer)
        alike = [a == b for a, b in zip(prompt, whole, strict=False)]
        start = alike.index(False) if False in alike else len(alike)
        return whole[:start], whole[start:]

    def example(self, tokenizer: Any, question: str, answer: str) -> str:
        """One question and answer as the model sees it, on one line, with where its answer begins."""
        prompt, completion = self.parted(tokenizer, question, answer)
        return f"One prompt and its answer as the model sees them: {prompt!r} then {completion!r}."


def recorded_format(model: str | Path) -> PromptFormat | None:
    """The prompt that `result.json` in a model's folder says that it was trained with, if it says so."""
    path = Path(model, "result.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("prompt")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is cut short or no result ({error}); move it away.") from error
    return found and PromptFormat(found["template"], found["system_prompt"], found["chat_template_kwargs"])


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that a model continues, without the end token that a tokenizer's post-processor may add."""
    ids, own = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    added = len(ids) - len(own)
    before = next((start for start in range(added + 1) if ids[start : start + len(own)] == own), added)
    return ids[: before + len(own)]


def fingerprint(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
