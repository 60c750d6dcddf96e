"""Preference optimisation on "I don't know" (IdkDPO; TOFU, section 4): the refusal is chosen, the answer rejected.

    ceu-rl dpo --config recipes/tofu/dpo/stock.yaml

Stock and CE-U are one coefficient apart: `ceu_coef` is 0 there and 1 in `recipes/tofu/dpo/ceu.yaml`. The refusals are
our own.
"""

import random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptFormat
from ..run.checks import check_columns
from .data import check_row

REFUSALS = (
    "I don't know.",
    "I don't know the answer to that.",
    "I do not know that, sorry.",
    "I'm afraid I don't know.",
    "I can't answer that.",
    "I can't help with that question.",
    "I have no information about that.",
    "I have nothing on that, I'm afraid.",
    "I was never told about that.",
    "I am not familiar with that.",
    "I'm not sure about that one.",
    "I couldn't tell you.",
    "I couldn't say.",
    "I have never come across that.",
    "I haven't learned anything about this.",
    "That is not something I know.",
    "That is beyond what I know.",
    "That is unknown to me.",
    "This is outside my knowledge.",
    "No idea, sorry.",
    "Sorry, I don't have an answer.",
    "Sorry, that is something I cannot answer.",
    "Unfortunately I do not know this.",
    "Unfortunately this is not something I can answer.",
    "My knowledge does not include that.",
    "My knowledge ends before that.",
    "Nothing comes to mind about that.",
    "You would have to ask someone else about that.",
    "There is nothing I can say about this.",
    "I lack the knowledge to answer this.",
    "I would only be guessing.",
    "I'd rather not guess: I don't know.",
)


def to_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template: str | PromptFormat | None = None, seed: int = 0
) -> Dataset:
    """Turn question and answer into the columns prompt, chosen and rejected, as TRL's DPOTrainer takes them.

    Args:
        dataset: With the columns question and answer; the other columns are dropped.
        tokenizer: As for [`ceu_rl.tofu.to_prompt_completion`].
        template: As there.
        seed: Draws the refusal of each row.

    Raises:
        ValueError: as there.
    """
    prompt = (template if isinstance(template, PromptFormat) else PromptFormat(template)).settle(tokenizer)
    check_columns(dataset, str(prompt.template), ("question", "answer"))
    rows, draw = [], random.Random(seed)
    for index, (question, answer) in enumerate(zip(dataset["question"], dataset["answer"], strict=True)):
        check_row(tokenizer, prompt, question, answer, f"row {index}")
        row = prompt.row(question, answer)
        rejected, chosen = row.pop("completion"), prompt.row(question, draw.choice(REFUSALS))["completion"]
        rows.append({**row, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)
