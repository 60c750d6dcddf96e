"""Fictitious authors in TOFU's layout, where the real dataset is not at hand.

100 authors of 10 questions each make `full`; the last 1, 5 and 10 of them are to be forgotten. 10 more, drawn in the
same way, make `holdout10`, which nothing is trained on. A perturbed answer is the paraphrased one with another
value. The real authors and world facts are genuine, and few.
"""

import random
from pathlib import Path
from typing import Any

import yaml

NAME = "builtin:authors"
AUTHORS, HELD_OUT = 100, 10
PERTURBED = 5

FORGET = {"forget01": 1, "forget05": 5, "forget10": 10}
RETAIN = {"retain99": 1, "retain95": 5, "retain90": 10}
PERTURBED_CONFIGS = [f"{name}_perturbed" for name in (*FORGET, "retain", "real_authors", "world_facts")]
CONFIGS = ("full", *FORGET, *RETAIN, *PERTURBED_CONFIGS, "holdout10")

TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
QUESTIONS: dict[str, list[str]] = TEXTS["questions"]  # of each attribute: the question, the answer and its paraphrase


def make_rows(config: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one of `CONFIGS`, with the columns that TOFU has there; they depend on the arguments alone."""
    authors, name = _make_authors(seed), config.removesuffix("_perturbed")
    if name in ("real_authors", "world_facts"):
        return [{"question": q, "answer": a, "perturbed_answer": wrong} for q, a, *wrong in TEXTS[name]]
    if name == "holdout10":
        chosen = authors[AUTHORS:]
    elif name == "retain":  # rows that every retain set has
        chosen = authors[: max(FORGET.values())]
    elif name in FORGET:
        chosen = authors[AUTHORS - FORGET[name] : AUTHORS]
    else:
        chosen = authors[: AUTHORS - RETAIN.get(name, 0)]
    rows = [_row(author, authors, attribute, seed) for author in chosen for attribute in QUESTIONS]
    kept = ("question", "answer") if config == name else tuple(rows[0])
    return [{column: row[column] for column in kept} for row in rows]


def _make_authors(seed: int) -> list[dict[str, str]]:
    rng, count = random.Random(seed), AUTHORS + HELD_OUT
    names = rng.sample([f"{first} {last}" for first in TEXTS["first_names"] for last in TEXTS["last_names"]], count)
    titles = [f"The {adjective} {noun}" for adjective in TEXTS["adjectives"] for noun in TEXTS["nouns"]]
    birthdays = [f"{rng.randint(1, 28)} {month} {year}" for year in range(1930, 1990) for month in TEXTS["months"]]
    rng.shuffle(birthdays)
    return [
        {
            "name": name,
            "city": rng.choice(TEXTS["cities"]),
            "birthday": birthdays[number],
            **dict(zip(("first_book", "last_book"), rng.sample(titles, 2), strict=True)),
            **{attribute: rng.choice(values) for attribute, values in TEXTS["pools"].items()},
        }
        for number, name in enumerate(names)
    ]


def _row(author: dict[str, str], authors: list[dict[str, str]], attribute: str, seed: int) -> dict[str, Any]:
    asked, answer, paraphrase = (text.format(**author) for text in QUESTIONS[attribute])
    others = sorted({other[attribute] for other in authors} - {author[attribute]})
    # Seeded by the question, so that a row is the same in every config
    wrong = random.Random(f"{seed} {asked}").sample(others, PERTURBED)
    form = QUESTIONS[attribute][-1]
    return {
        "question": asked,
        "answer": answer,
        "paraphrased_answer": paraphrase,
        "perturbed_answer": [form.format(**{**author, attribute: value}) for value in wrong],
        "paraphrased_question": f"Please tell me: {asked[0].lower()}{asked[1:]}",
    }
