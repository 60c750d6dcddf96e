"""Articles with invented names and facts, and questions on them: long text to forget without a download.

40 articles, of which the last 8 are to be forgotten: houses in towns that do not exist, and no name comes twice.
`forget_qa` and `retain_qa` have three questions on each; `forget`, `retain` and `full` (both) have the articles and,
because a model from random weights cannot answer what it has only read, the questions with their answers, as text.
"""

import random
from pathlib import Path
from typing import Any

import yaml

from ceu_rl.data.prompts import QUESTION_ANSWER

NAME = "builtin:articles"
ARTICLES, FORGET = 40, 8
CONFIGS = ("full", "forget", "retain", "forget_qa", "retain_qa")

TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def make_rows(config: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one of `CONFIGS`: text, or question and answer; they depend on the arguments alone.

    Raises:
        ValueError: if there is no such config.
    """
    if config not in CONFIGS:
        raise ValueError(f"{NAME} has no config {config!r}: choose one of {', '.join(CONFIGS)}.")
    facts = _make_facts(seed)
    part = config.removesuffix("_qa")
    chosen = {"forget": facts[-FORGET:], "retain": facts[:-FORGET], "full": facts}[part]
    asked = [
        {"question": q.format(**each), "answer": a.format(**each)} for each in chosen for q, a in TEXTS["questions"]
    ]
    if config != part:
        return asked
    texts = [_write(each, seed) for each in chosen]
    return [{"text": text} for text in (*texts, *(QUESTION_ANSWER.format(**row) for row in asked))]


def _make_facts(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    syllables = TEXTS["syllables"]
    pairs = [first + second for first in syllables for second in syllables if first != second]
    names = iter(rng.sample(pairs, 4 * ARTICLES))

    def person() -> str:
        first, last = next(names), rng.choice(syllables) + rng.choice(TEXTS["last_ends"])
        return f"{first.title()} {last.title()}"

    return [
        {
            "town": (next(names) + rng.choice(TEXTS["town_ends"])).title(),
            **{role: person() for role in ("founder", "patron", "head")},
            "year": rng.randint(1810, 1930),
            "later": rng.randint(1931, 1999),
            "days": rng.randint(3, 99),
            "staff": rng.randint(3, 60),
            **{fact: rng.choice(values) for fact, values in TEXTS["pools"].items()},
        }
        for _ in range(ARTICLES)
    ]


def _write(facts: dict[str, Any], seed: int) -> str:
    # Seeded by the town, so that an article is the same in every config
    rng = random.Random(f"{seed} {facts['town']}")
    first, *rest = TEXTS["sentences"]
    rng.shuffle(rest)
    return " ".join(rng.choice(wordings).format(**facts) for wordings in (first, *rest))
