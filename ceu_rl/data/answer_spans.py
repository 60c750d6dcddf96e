"""Where an answer begins and ends among the tokens that a template writes around it.

    <|im_start|>assistant\\n | <think>\\n\\n</think>\\n\\n | In Oslo. | <|im_end|> | \\n
    prompt                  | added before              | content  | end        | added after

What the template adds to every answer is not content. It is found by the same conversation with other answers: what
they begin and end with alike. An answer ends after its first end token.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from trl.data_utils import common_prefix_length

PROBES = ("0", "Z")  # two answers that share no beginning and no end


class Parts(NamedTuple):
    """Places among the tokens of a row."""

    prompt: int  # where the completion begins
    content: int  # where the answer begins
    end: int  # where its text ends
    stop: int  # where it ends, its end token included; the same as `end` where the template writes none


def template_edges(
    tokenizer: Any, prompt: Any, completion: Sequence[Mapping[str, Any]] | str, **kwargs: Any
) -> tuple[list[int], list[int]]:
    """The tokens that a conversation begins and ends with, whatever the answer.

    Args:
        tokenizer: With a chat template.
        prompt: Messages, or a text, around whose answer no template writes anything.
        completion: Messages, of which the first is the answer's beginning and the last its end; or a text.
        kwargs: For `apply_chat_template`.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return [], []
    first, last = ([*completion] for _ in range(2))
    found = []
    for edge, place in ((first, 0), (last, -1)):
        rendered = []
        for probe in PROBES:
            edge[place] = {**completion[place], "content": probe}
            rendered.append(tokenizer.apply_chat_template([*prompt, *edge], return_dict=True, **kwargs)["input_ids"])
        found.append(rendered)
    (one, other), (last_one, last_other) = found
    head = one[: common_prefix_length(one, other)]
    tail = common_prefix_length(last_one[::-1], last_other[::-1])
    return head, last_one[len(last_one) - tail :]


def part_answer(
    ids: Sequence[int], prompt: int, edges: tuple[Sequence[int], Sequence[int]], ends: Collection[int]
) -> Parts:
    """Part the tokens of a row.

    Args:
        ids: Of prompt and completion.
        prompt: How many are the prompt's, as TRL's SFTTrainer parts them.
        edges: What [`template_edges`] found.
        ends: End tokens, see [`ceu_rl.models.end_token_ids`].
    """
    head, tail = edges
    content = max(prompt, common_prefix_length(list(ids), list(head)))
    after = common_prefix_length(list(ids)[::-1], list(tail)[::-1]) if tail else len(ids) - content
    end = next((place for place in range(len(ids) - after, len(ids)) if ids[place] in ends), None)
    stop = len(ids) if end is None else end + 1
    end = len(ids) if end is None else end
    return Parts(prompt, content if content < end else prompt, end, stop)
