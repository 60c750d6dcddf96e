"""Articles with invented names and facts, and questions on them: long text to forget without a download.

40 articles, of which the last 8 are to be forgotten: houses in towns that do not exist, and no name comes twice.
`forget_qa` and `retain_qa` have three questions on each; `forget`, `retain` and `full` (both) have the articles and,
because a model from random weights cannot answer what it has only read, the questions with their answers, as text.
"""

import json
from pathlib import Path
from typing import Any

from ceu_rl.data.prompts import QUESTION_ANSWER

NAME = "builtin:articles"
FORGET = 8
CONFIGS = ("full", "forget", "retain", "forget_qa", "retain_qa")
ARTICLES = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text().splitlines()]


def make_rows(config: str) -> list[dict[str, Any]]:
    """The rows of one of `CONFIGS`: text, or question and answer."""
    part = config.removesuffix("_qa")
    chosen = {"forget": ARTICLES[-FORGET:], "retain": ARTICLES[:-FORGET], "full": ARTICLES}[part]
    asked = [row for article in chosen for row in article["questions"]]
    if config != part:
        return asked
    texts = [article["text"] for article in chosen] + [QUESTION_ANSWER.format(**row) for row in asked]
    return [{"text": text} for text in texts]
