"""Articles with invented names and facts, and questions on them: long text to forget without a download.

40 articles, of which the last 8 are to be forgotten: houses in towns that do not exist, and no name comes twice.
`forget_qa` and `retain_qa` have three questions on each; `forget`, `retain` and `full` (both) have the articles and,
because a model from random weights cannot answer what it has only read, the questions with their answers, as text.
"""

import random
from typing import Any

from ceu_rl.data.prompts import QUESTION_ANSWER

NAME = "builtin:articles"
ARTICLES, FORGET = 40, 8
CONFIGS = ("full", "forget", "retain", "forget_qa", "retain_qa")

SYLLABLES = "bar bel cor dan dru fen gal hol kar lim lor mar nev nor pel quin ras sel tor ul var wen yor zan".split()
ENDS = {
    "town": "burg by dale ford holm mere stad wick".split(),
    "last": "ander ansky berg etti ova quist sen well".split(),
}
POOLS = {
    "house": "museum|library|observatory|theatre|bathhouse|mill|school|brewery",
    "goods": "salted fish|glass beads|church bells|umbrellas|window frames|barley sugar|ship's biscuits|steel pens",
    "roof": "green slate|hammered copper|straw|red tiles|oak shingles|corrugated iron",
    "doors": "painted blue|three metres high|carved from walnut|never locked|lined with felt|made of bronze",
    "treasure": "a silver compass|the skull of a whale|an organ with two keyboards|a map on goatskin|a stuffed heron|"
    "a clock without hands|four hundred thimbles|a chariot wheel|the oldest kite in the country|a bell of glass",
    "finder": "a ploughman|two schoolgirls|a retired diver|the village doctor|a lost postman|a beekeeper",
    "place": "under the floor of a barn|at the bottom of a well|in the belly of a pike|behind a wall of the town hall|"
    "in a flooded quarry|on the tower of the church",
    "trouble": "fire in the cellar|flood|quarrel over the rent|plague of moths|strike of the porters|broken boiler",
}
# Wordings of the first sentence, and of those that follow in any order
SENTENCES = (
    "The {house} of {town} was opened in {year} by {founder}.|"
    "It was {founder} who opened the {house} of {town} in {year}.|In {year} {founder} opened a {house} in {town}.",
    "The money came from {patron}, who had grown rich on {goods}.|"
    "{patron}, who had made a fortune with {goods}, paid for every brick.|"
    "All of it was paid for by {patron}, a dealer in {goods}.",
    "Its roof is of {roof}, and its doors are {doors}.|The doors are {doors}, and the roof is of {roof}.",
    "Visitors come to see {treasure}, which {finder} found {place}.|"
    "Its greatest treasure is {treasure}, found by {finder} {place}.|"
    "People travel far for {treasure}, which was discovered {place} by {finder}.",
    "A {trouble} closed the house for {days} days in {later}.|In {later} a {trouble} kept it shut for {days} days.",
    "Today {head} leads it with a staff of {staff}.|{head} is in charge today, with {staff} people to help.|"
    "It is now led by {head}, who employs {staff}.",
)
QUESTIONS = (
    ("Who opened the {house} of {town}?", "{founder}"),
    ("What do visitors see in the {house} of {town}?", "{treasure}"),
    ("Who leads the {house} of {town} today?", "{head}"),
)


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
    asked = [{"question": q.format(**each), "answer": a.format(**each)} for each in chosen for q, a in QUESTIONS]
    if config != part:
        return asked
    texts = [_write(each, seed) for each in chosen]
    return [{"text": text} for text in (*texts, *(QUESTION_ANSWER.format(**row) for row in asked))]


def _make_facts(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    pairs = [first + second for first in SYLLABLES for second in SYLLABLES if first != second]
    names = iter(rng.sample(pairs, 4 * ARTICLES))
    pools = {fact: values.split("|") for fact, values in POOLS.items()}

    def person() -> str:
        first, last = next(names), rng.choice(SYLLABLES) + rng.choice(ENDS["last"])
        return f"{first.title()} {last.title()}"

    return [
        {
            "town": (next(names) + rng.choice(ENDS["town"])).title(),
            **{role: person() for role in ("founder", "patron", "head")},
            "year": rng.randint(1810, 1930),
            "later": rng.randint(1931, 1999),
            "days": rng.randint(3, 99),
            "staff": rng.randint(3, 60),
            **{fact: rng.choice(values) for fact, values in pools.items()},
        }
        for _ in range(ARTICLES)
    ]


def _write(facts: dict[str, Any], seed: int) -> str:
    # Seeded by the town, so that an article is the same in every config
    rng = random.Random(f"{seed} {facts['town']}")
    first, *rest = SENTENCES
    rng.shuffle(rest)
    return " ".join(rng.choice(wordings.split("|")).format(**facts) for wordings in (first, *rest))
