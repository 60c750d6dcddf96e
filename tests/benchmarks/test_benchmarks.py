"""No ratio of `docs/results/speed/ratios.json` has grown by more than a tenth; CE-U takes no memory beyond stock's."""

import json
from pathlib import Path

import pytest

from .measure import ROWS, SUBJECTS, TINY, _is_of, measure

BASELINE = Path(__file__).parents[2] / "docs" / "results" / "speed" / "ratios.json"
MEASURED = ("seconds", "peak_gib", "ratios", "date", "commit", "versions", "device")


def rows():
    """Of what is still measured."""
    return [row for row in json.loads(BASELINE.read_text())["rows"] if row["subject"] in SUBJECTS]


def named(row):
    keys = ("subject", "rule", "model", "tokens", "vocabulary", "ranks")
    return "-".join(str(row[key]) for key in keys if key in row)


def settings(row):
    return {key: value for key, value in row.items() if key not in MEASURED}


def test_the_baseline_holds_what_is_measured():
    assert len(rows()) > 5 and all(settings(row) in ROWS["cpu"] for row in rows())


def grown(found, baseline):
    return [
        f"{other}, {kind}: {found[other][kind]} after {before[kind]}"
        for other, before in baseline.items()
        for kind in ("time", "memory")
        if kind in before and found[other][kind] > 1.1 * before[kind]
    ]


def test_what_counts_as_grown():
    before = {"stock": {"time": 1.0, "memory": 0.5}}
    assert grown({"stock": {"time": 1.09, "memory": 0.54}}, before) == []
    assert grown({"stock": {"time": 1.11, "memory": 0.54}}, before) == ["stock, time: 1.11 after 1.0"]
    assert grown({"stock": {"time": 0.9, "memory": 0.56}}, before) == ["stock, memory: 0.56 after 0.5"]


def test_rows_are_told_apart_by_their_rule():
    """A row without one is of the default rule, and is replaced by itself alone."""
    assert all([_is_of(row, {**each, "ratios": {}}) for each in ROWS["cpu"]].count(True) == 1 for row in ROWS["cpu"])
    plain, anchored = {"subject": "dpo", "tokens": 128}, {"subject": "dpo", "tokens": 128, "rule": "anchored"}
    assert not _is_of(plain, anchored) and not _is_of(anchored, plain)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", rows(), ids=named)
def test_no_ratio_has_grown_by_more_than_a_tenth(row):
    """What was noise is gone at the second measurement."""
    if grown(measure(settings(row))["ratios"], row["ratios"]):
        assert grown(measure(settings(row))["ratios"], row["ratios"]) == []


@pytest.mark.parametrize("subject", [{"subject": "dpo"}, {"subject": "dpo", "rule": "anchored"}, {"subject": "grpo"}])
def test_ce_u_takes_as_much_memory_as_stock(subject):
    found = measure({**subject, "sequences": 4, "tokens": 16, **TINY, "steps": 1, "rounds": 2})
    assert found["peak_gib"]["stock"] > 0.001
    assert found["ratios"]["stock"]["memory"] <= 1.01
