"""TOFU's metrics against their definitions, by hand, by brute force or by scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from scipy import stats

from ceu_rl.tofu import metrics


def test_option_probability_by_hand():
    options = [math.log(p) for p in (0.3, 0.1, 0.2)]
    assert metrics.option_probability(math.log(0.4), options) == pytest.approx(0.4, rel=1e-14)
    # Where exp underflows the share is still known: 1 / (1 + e^-1 + e^1)
    share = 1 / (1 + math.exp(-1) + math.exp(1))
    assert metrics.option_probability(-2000.0, [-2001.0, -1999.0]) == pytest.approx(share, rel=1e-14)


def test_truth_ratio_by_hand():
    # The geometric mean of 1/2 and 1/8 is 1/4, over 1/2 for the paraphrase; the arithmetic one would give 5/8
    wrong = [math.log(1 / 2), math.log(1 / 8)]
    assert metrics.truth_ratio(math.log(1 / 2), wrong) == pytest.approx(0.5, rel=1e-14)
    assert metrics.forget_truth_ratio(0.5) == metrics.forget_truth_ratio(2.0) == 0.5
    assert metrics.forget_truth_ratio(1.0) == 1.0 and metrics.forget_truth_ratio(0.0) == 0.0
    assert metrics.utility_truth_ratio(0.25) == 0.75
    assert metrics.utility_truth_ratio(3.0) == 0.0


def test_a_truth_ratio_is_always_finite():
    largest = metrics.truth_ratio(-5000.0, [-1.0])
    assert largest == math.exp(700) and 0 < metrics.forget_truth_ratio(largest) < 1e-300
    smallest = metrics.truth_ratio(-1.0, [-5000.0])
    assert (smallest, metrics.utility_truth_ratio(smallest), metrics.forget_truth_ratio(smallest)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("answer", "generated", "recall", "f1"),
    [
        ("the cat sat on the mat", "a cat lay on a mat", 3 / 6, 3 / 6),
        ("He writes books", "book writing", 1 / 3, 0),  # stemmed, in order: write or book
        ("Paris", "The capital is Paris.", 1, 2 / 5),  # recall, not precision
        ("The doors are never locked.", "the doors were locked", 3 / 5, 6 / 9),
        ("a bell of glass", "of glass a bell", 1 / 2, 1 / 2),
        ("Paris", "", 0, 0),
    ],
)
def test_rouge_l_by_hand(answer, generated, recall, f1):
    assert metrics.rouge_l_recall(answer, generated) == pytest.approx(recall)
    assert metrics.rouge_l_f1(answer, generated) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Привет, мир! Ёлка.", "привет мир ёлка"),
        ("北京是首都1998年。", "北 京 是 首 都 1998 年"),
        ("東京タワーへPython入門", "東 京 タ ワ ー へ python 入 門"),
        ("ภาษา ๑๒๓", "ภ า ษ า ๑๒๓"),
        ("ພາສາ", "ພ າ ສ າ"),
        ("ភាសាខ្មែរ", "ភា សា ខ្ មែ រ"),
        ("မြန်မာ", "မြ န် မာ"),
        ("e\u0301tude, étude", "étude étude"),
        ("العَرَبِيَّة لغة", "العَرَبِيَّة لغة"),
        ("हिन्दी में", "हिन्दी में"),
        ("Ελλάδα ΟΔΟΣ", "ελλάδα οδος"),
        ("한국어 문장", "한국어 문장"),
        ("שָׁלוֹם ქართული", "שָׁלוֹם ქართული"),
        ("re\u00adadable \u200b\uff28\uff15", "readable h5"),
        ("😀👍\ufe0f 20° ≠ 5€", "😀 👍\ufe0f 20 ° ≠ 5 €"),
        ("snake_case, don\u2019t", "snake case don t"),
        ("\ufffd\ufffd北京\ufffd", "北 京"),  # where tokens part characters
    ],
)
def test_words_of_any_script(text, words):
    """A text that is repeated to the letter scores 1; one that shares a part scores the share of it."""
    assert metrics.Words(False).tokenize(text) == words.split()
    assert metrics.rouge_l_recall(text, text) == metrics.rouge_l_f1(text, text) == 1.0
    first, *rest = words.split()
    assert metrics.rouge_l_recall(text, f"xyz {first}") == pytest.approx(1 / (1 + len(rest)))


def test_two_answers_that_share_a_year_are_not_the_same():
    assert metrics.rouge_l_recall("他1998年生于北京", "她1998年死于上海") == pytest.approx(3 / 7)
    assert metrics.rouge_l_recall("Он родился в 1998", "Она умерла в 1998") == pytest.approx(2 / 4)


@settings(max_examples=300, deadline=None)
@given(strategies.text(strategies.characters(max_codepoint=127)), strategies.text("abeinrs dXY19_-'.\n", max_size=40))
def test_on_ascii_words_are_those_of_rouge_score(text, other):
    for stem, score, field in ((True, metrics.rouge_l_recall, "recall"), (False, metrics.rouge_l_f1, "fmeasure")):
        theirs = RougeScorer(["rougeL"], use_stemmer=stem)
        for pair in ((text, other), (other, text), (other, other[::-1])):
            assert score(*pair) == getattr(theirs.score(*pair)["rougeL"], field)
        assert metrics.Words(stem).tokenize(text) == DefaultTokenizer(stem).tokenize(text)


def test_memorization_over_every_pattern_of_matches():
    for length in range(1, 9):
        for matches in itertools.product([False, True], repeat=length):
            start = min([k for k in range(length) if all(matches[k:])], default=length - 1)
            assert metrics.extraction_strength(matches) == pytest.approx(1 - start / length)
            assert metrics.exact_memorization(matches) == pytest.approx(sum(matches) / length)


def test_privacy_leakage_by_hand():
    # MUSE's AUC counts non-members as positive: 0.1 for the model and 0.5 for the retain model
    assert metrics.privacy_leakage(0.9, 0.5) == pytest.approx(100 * (0.1 - 0.5) / 0.5, rel=1e-9)
    assert metrics.privacy_leakage(0.3, 0.5) == pytest.approx(40, rel=1e-9)
    assert metrics.privacy_leakage(0.7, 0.7) == 0
    assert math.isfinite(metrics.privacy_leakage(0.5, 1.0))


def test_forget_quality_is_the_p_value_of_scipy():
    rng = np.random.default_rng(0)
    ratios, others = rng.lognormal(size=40), rng.lognormal(0.8, size=40)
    quality = metrics.forget_quality(ratios, others)
    assert quality == stats.ks_2samp(ratios, others).pvalue and quality < 0.05
    assert metrics.forget_quality(1 / ratios, 1 / others) == pytest.approx(quality)


def test_model_utility_is_the_harmonic_mean_of_nine():
    names = [f"{part}_{metric}" for part in metrics.UTILITY_SETS for metric in metrics.UTILITY_METRICS]
    assert len(set(names)) == 9
    values = dict(zip(names, np.linspace(0.1, 0.9, 9), strict=True))
    utility = metrics.model_utility({**values, "forget_probability": 1e-9})
    assert utility == pytest.approx(9 / sum(1 / value for value in values.values()))
    assert metrics.model_utility({**values, names[4]: 0.0}) == 0.0
