"""Where an answer begins and ends among the tokens that a template writes around it.

    <|im_start|>assistant\\n | <think>\\n\\n</think>\\n\\n | In Oslo. | <|im_end|> | \\n
    prompt                  | added before              | answer   | end        | added after

What the template adds to every answer is no part of it. It is found by the same conversation with other answers, their
content, reasoning and tool calls changed alike: what they begin and end with alike. An answer ends after its first end
token.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from trl.data_utils import common_prefix_length

PROBES = ("0", "Z")  # two answers that share no beginning and no end
KEPT = ("role", "type", "id", "tool_call_id")  # what of a message is no part of the answer


class Parts(NamedTuple):
    """Places among the tokens of a row."""

    prompt: int  # where the completion begins
    content: int  # where the answer begins
    end: int  # where its text ends
    stop: int  # where it ends, its end token included; the same as `end` where the template writes none


def template_edges(
    tokenizer: Any, prompt: Any, completion: Sequence[Mapping[str, Any]] | str, **kwargs: Any
) -> tuple[list[int], list[int]]:
    """The tokens that a conversation begins and ends with, whatever the answer; none around a text.

    The answer begins with the first message of the completion and ends with its last. `kwargs` are for
    `apply_chat_template`.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return [], []
    found = []
    for place in (0, len(completion) - 1):
        rendered = []
        for message in _others(completion[place]):
            messages = [*prompt, *completion[:place], message, *completion[place + 1 :]]
            rendered.append(tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"])
        found.append(rendered)
    (one, *others), (last, *last_others) = found
    head = min(common_prefix_length(one, other) for other in others)
    tail = min(common_prefix_length(last[::-1], other[::-1]) for other in last_others)
    return one[:head], last[len(last) - tail :]


def _others(message: Mapping[str, Any]) -> list[Any]:
    """Other answers in the form of this one, and a plain one: what a template writes around a call is the call's."""
    one, other = (_probed(message, probe) for probe in PROBES)
    plain = {"role": message["role"], "content": PROBES[0]}
    return [one, other] if one == plain else [one, other, plain]


def _probed(value: Any, probe: str) -> Any:
    """A message that says the probe wherever it says something: content, reasoning, names and arguments of calls."""
    if isinstance(value, Mapping):
        return {name: each if name in KEPT else _probed(each, probe) for name, each in value.items()}
    if isinstance(value, list):
        return [_probed(each, probe) for each in value]
    return probe if isinstance(value, str) and value else value


def part_answer(
    ids: Sequence[int], prompt: int, edges: tuple[Sequence[int], Sequence[int]], ends: Collection[int]
) -> Parts:
    """Part the tokens of a row into prompt and completion. The first `prompt` tokens are the prompt.

    `edges` come from [`template_edges`], `ends` from [`ceu_rl.models.end_token_ids`].
    """
    head, tail = edges
    content = max(prompt, common_prefix_length(list(ids), list(head)))
    after = common_prefix_length(list(ids)[::-1], list(tail)[::-1]) if tail else len(ids) - content
    end = next((place for place in range(len(ids) - after, len(ids)) if ids[place] in ends), None)
    stop = len(ids) if end is None else end + 1
    end = len(ids) if end is None else end
    return Parts(prompt, content if content < end else prompt, end, stop)
