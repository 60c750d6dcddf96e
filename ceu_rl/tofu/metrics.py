"""TOFU's metrics and their neighbours, on plain numbers.

Symbols: x is the question, y = y_1 ... y_n the tokens of an answer, the end token included, l_t = log p(y_t | x, y_<t)
in nats, and l(y) = mean_t l_t, so that exp(l(y)) = p(y | x)^(1/n) is TOFU's length-normalised probability. What has no
end token (n' = n - 1 tokens, usually) is called the text of the answer.

They agree with those of open-unlearning (arXiv 2506.12618), but for the 1e-10 that it adds to the denominators of the
truth ratio and of the option probability. Without it, as in the papers, the forget quality of a destroyed model can lie
above any bar: look at the utility beside it.
"""

import math
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from scipy import special, stats

Values = Sequence[float] | np.ndarray  # of numbers or truth values, of shape (n,)
LARGEST_EXPONENT = 700.0  # of a float64, with room; ratios beyond are cut there, and stay finite in JSON
MIN_K = 0.4  # the share of tokens that min-k and min-k++ look at, as in open-unlearning's TOFU configuration


def option_probability(correct: float, wrong: Values) -> float:
    """Probability of the correct answer among the options (TOFU, section 2.2.1, real authors and world facts).

        P = exp(l(a)) / (exp(l(a)) + sum_i exp(l(a_i)))

    The paper has P(a | q) of the whole answer; its code and open-unlearning normalise it by length, as here. `correct`
    is l(a), `wrong` the l(a_i).
    """
    return float(special.softmax([correct, *wrong])[0])


def truth_ratio(correct: float, wrong: Values) -> float:
    """Truth ratio (TOFU, equation 1), with the geometric mean over the wrong answers.

        R = exp(mean_i l(a_i)) / exp(l(a~))

    The paper's equation has the arithmetic mean of exp(l(a_i)); its code and open-unlearning average l(a_i), as here.
    `correct` is l(a~) of the paraphrase, or of the answer itself where there is none, `wrong` the l(a_i) of the
    perturbed answers. Below 1 the model prefers the correct answer. R is cut at exp(700).
    """
    return math.exp(min(float(np.mean(wrong)) - correct, LARGEST_EXPONENT))


def forget_truth_ratio(ratio: float) -> float:
    """min(R, 1/R): 1 if true and false answers are equally likely; the mean over the forget set is a summary alone."""
    return min(ratio, 1.0 / ratio) if ratio > 0 else 0.0


def utility_truth_ratio(ratio: float) -> float:
    """max(0, 1 - R), the truth ratio as part of the model utility (TOFU, section 2.2.1); higher is better."""
    return max(0.0, 1.0 - ratio)


# Scripts without spaces between words: a character, with its marks, stands for one. Line break class SA is Thai, Lao,
# Khmer, Myanmar and their neighbours
_SPACELESS = r"[\p{lb=SA}\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Yiii}]"
_WORD = regex.compile(
    rf"[{_SPACELESS}&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}]--{_SPACELESS}][[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}&&\p{{L}}]]*"
    r"|[\p{S}--[\p{ASCII}\uFFFD]]\p{M}*",  # but for half a character, which tokens may be
    regex.V1,
)


class Words(Tokenizer):
    """The words of a text in any script, for ROUGE; on ASCII exactly rouge-score's own, `[a-z0-9]+` in lower case.

    rouge-score drops every other character. Here a word is a run of letters and digits with their combining marks, a
    character of a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese), or a symbol beyond ASCII, such
    as an emoji. Texts are compared in NFKC. `use_stemmer` stems words of more than three ASCII letters (Porter's).
    """

    def __init__(self, use_stemmer: bool) -> None:
        self.stemmer = PorterStemmer() if use_stemmer else None

    def tokenize(self, text: str) -> list[str]:
        text = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFKC", text).lower())  # joiners stand inside words
        words = _WORD.findall(text)
        if self.stemmer is None:
            return words
        return [self.stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@cache
def _rouge(use_stemmer: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=Words(use_stemmer))


def rouge_l_recall(answer: str, generated: str) -> float:
    """ROUGE-L recall (Lin 2004; TOFU, section 2.2.1): |longest common subsequence| / |answer|, in stemmed [`Words`]."""
    return float(_rouge(True).score(answer, generated)["rougeL"].recall)


def rouge_l_f1(answer: str, generated: str) -> float:
    """F1 of ROUGE-L (Lin 2004; MUSE): 2 P R / (P + R), from the longest common subsequence in [`Words`], unstemmed."""
    return float(_rouge(False).score(answer, generated)["rougeL"].fmeasure)


def exact_memorization(matches: Values) -> float:
    """Share of tokens that the model gets right (Tirumala et al. 2022, arXiv 2205.10770).

        EM = (1/n') sum_t [argmax p(. | x, y_<t) = y_t]

    `matches` has the brackets of each token of the answer's text.
    """
    return float(np.mean(matches))


def extraction_strength(matches: Values) -> float:
    """Share of the answer that the model completes by itself (Carlini et al. 2021, arXiv 2012.07805).

        ES = 1 - min{k : the greedy continuation of (x, y_<=k) is the rest of y} / n'

    Greedy decoding follows y as long as every most likely token is the true one, so one forward pass tells. As in
    open-unlearning k runs to n' - 1, so that the smallest value is 1/n', not 0. `matches`: see [`exact_memorization`].
    """
    wrong = np.flatnonzero(~np.asarray(matches, dtype=bool))
    start = 0 if len(wrong) == 0 else wrong[-1] + 1
    return 1.0 - min(int(start), len(matches) - 1) / len(matches)


# Membership attacks: every score is low for members


def zlib_score(log_prob: float, answer: str) -> float:
    """zlib attack (Carlini et al. 2021, arXiv 2012.07805): -l(y) over the bytes that zlib needs for the answer."""
    return -log_prob / len(zlib.compress(answer.encode()))


def min_k_score(log_probs: Values, k: float = MIN_K) -> float:
    """Min-k attack (Shi et al. 2023, arXiv 2310.16789): minus the mean of the lowest floor(k n') l_t, at least one."""
    return -float(np.mean(np.sort(log_probs)[: max(1, int(len(log_probs) * k))]))


def min_k_plus_plus_score(log_probs: Values, means: Values, variances: Values, k: float = MIN_K) -> float:
    """Min-k++ attack (Zhang et al. 2024, arXiv 2404.02936): min-k of z_t = (l_t - mu_t) / sigma_t.

    mu_t and sigma_t^2 are mean and variance of log p(v | x, y_<t) for v drawn from that distribution; the variance is
    taken as at least 1e-6, as in open-unlearning.
    """
    deviations = np.sqrt(np.maximum(variances, 1e-6))
    return min_k_score((np.asarray(log_probs) - np.asarray(means)) / deviations, k)


def membership_auc(members: Values, non_members: Values) -> float:
    """Area under the ROC curve of an attack: P(s(member) < s(non-member)), a tie counting half.

    1 if every member has a lower score than every non-member, 0.5 if the attack cannot tell them apart. It is the
    Mann-Whitney U statistic over its largest value.
    """
    return float(stats.mannwhitneyu(non_members, members).statistic / (len(members) * len(non_members)))


def privacy_leakage(auc: float, retain_auc: float) -> float:
    """Privacy leakage in percent (MUSE, Shi et al. 2024, arXiv 2407.06460, equation 3).

        PrivLeak = 100 * ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain)

    where AUC is that of [`membership_auc`] for the min-k attack (MUSE counts non-members as positive, hence 1 - AUC).
    0 is the model that never saw the forget set; below is under-unlearning, above over-unlearning. 1e-10 is added to
    the denominator, as in open-unlearning, for a retain model whose AUC is 1.
    """
    return 100.0 * (retain_auc - auc) / (1.0 - retain_auc + 1e-10)


def forget_quality(ratios: Values, retain_ratios: Values) -> float:
    """Forget quality (TOFU, section 2.2.2): p-value of the two-sample Kolmogorov-Smirnov test on the truth ratios.

    High if nothing tells the model from one that never saw the forget set. `ratios` has R of each row of the forget
    set, `retain_ratios` the same under the retain model. The order of the values alone counts, so R and 1/R give the
    same.
    """
    return float(stats.ks_2samp(ratios, retain_ratios).pvalue)


UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_METRICS = ("probability", "rouge_l_recall", "truth_ratio")


def model_utility(summary: Mapping[str, float]) -> float:
    """Model utility (TOFU, section 2.2.1): harmonic mean of `{set}_{metric}` for three metrics on three sets.

    The truth ratio is the mean of [`utility_truth_ratio`]; the probability is among the options but for retain.
    """
    return float(stats.hmean([summary[f"{name}_{metric}"] for name in UTILITY_SETS for metric in UTILITY_METRICS]))
