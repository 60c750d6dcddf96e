"""Stability of training in numbers: pure functions of what a run logged.

A series is a list of numbers in the order of the steps. Log-probabilities, entropies and divergences are in nats.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

WINDOW = 50  # steps that a running median looks back
WARM_UP = 5  # steps that it needs before it can tell a spike
CONFIDENCE = 0.95
KEEP = 0.95  # share of the base's score that a stable run keeps

Interval = tuple[float, float]


def spikes(values: Sequence[float], factor: float = 10.0, window: int = WINDOW) -> list[int]:
    """Positions of the values above `factor` times the median of the up to `window` finite values before them.

    The measure for gradient norms. The first `WARM_UP` values are never spikes; values that are not finite are counted
    by [`non_finite`], not here.
    """
    return _outliers(values, window, lambda before: factor * float(np.median(before)))


def loss_spikes(values: Sequence[float], factor: float = 10.0, window: int = WINDOW) -> list[int]:
    """Positions of the values above m + `factor` * d of the up to `window` finite values before them.

    m is their median and d their median absolute deviation, at least 1e-3. A loss may be near zero or negative, where a
    multiple of the median says nothing.
    """

    def limit(before: np.ndarray) -> float:
        middle = float(np.median(before))
        return middle + factor * max(float(np.median(np.abs(before - middle))), 1e-3)

    return _outliers(values, window, limit)


def _outliers(values: Sequence[float], window: int, limit: Callable[[np.ndarray], float]) -> list[int]:
    found: list[int] = []
    before: list[float] = []
    for place, value in enumerate(values):
        if not math.isfinite(value):
            continue
        if len(before) >= WARM_UP and value > limit(np.array(before[-window:])):
            found.append(place)
        before.append(value)
    return found


def non_finite(values: Sequence[float]) -> list[int]:
    """Positions of the values that are not finite."""
    return [place for place, value in enumerate(values) if not math.isfinite(value)]


def displacement(log_probs: Sequence[float], tokens: float) -> float:
    """Change of a response's log-probability from the first value to the last, in nats per token; below 0 it fell.

    Chosen responses whose log-probability falls are the likelihood displacement of Razin et al. (arXiv 2410.08847).

    Args:
        log_probs: Mean sum of a response's log-probability at each evaluation.
        tokens: Mean number of tokens in a response.
    """
    return (log_probs[-1] - log_probs[0]) / tokens


def depth(log_probs: Sequence[float], tokens: float) -> float:
    """How far a response has been pushed down: minus its last log-probability, in nats per token."""
    return -log_probs[-1] / tokens


def change(values: Sequence[float]) -> float:
    """The last value minus the first, as for the entropy."""
    return values[-1] - values[0]


def drawdown(scores: Sequence[float]) -> float:
    """The largest fall of the score from its best so far: max over s < t of score_s - score_t, at least 0."""
    best, largest = -math.inf, 0.0
    for score in scores:
        best = max(best, score)
        largest = max(largest, best - score)
    return largest


def collapse_step(steps: Sequence[int], scores: Sequence[float], share: float = 0.5) -> int | None:
    """The step from whose evaluation on the score stays below `share` of its best so far; None: no collapse.

    Of a score whose best is not above 0, such as a reward of penalties, a share says nothing: it does not collapse.
    """
    collapsed, best = None, -math.inf
    for step, score in zip(steps, scores, strict=True):
        best = max(best, score)
        if best <= 0 or score >= share * best:
            collapsed = None
        elif collapsed is None:
            collapsed = step
    return collapsed


def stable_range(scores: Mapping[float, Sequence[float]], base: float, keep: float = KEEP) -> float | None:
    """The largest learning rate of a grid at which every seed ends with at least `keep` of the base's score.

    Args:
        scores: For each learning rate the last score of each seed; NaN for a run that met non-finite values.
        base: The score before training.

    Returns:
        The rate, or None if there is none in the grid.
    """
    stable = [rate for rate, finals in scores.items() if len(finals) and min(_or_worst(finals)) >= keep * base]
    return max(stable, default=None)


def lost_below(scores: Mapping[float, Sequence[float]], base: float, keep: float = KEEP) -> list[float]:
    """The rates below [`stable_range`] at which a seed ends with less than `keep` of the base's score."""
    reach = stable_range(scores, base, keep)
    below = sorted(rate for rate in scores if reach is not None and rate < reach)
    return [rate for rate in below if stable_range({rate: scores[rate]}, base, keep) is None]


def _or_worst(values: Sequence[float]) -> list[float]:
    return [-math.inf if math.isnan(value) else value for value in values]


def range_ratio(
    ours: Mapping[float, Sequence[float]], stock: Mapping[float, Sequence[float]], base: float, keep: float = KEEP
) -> float:
    """How many times as large our [`stable_range`] is as stock's.

    An arm that is stable at no rate counts as if it were at its lowest. The ratio is then a bound, as it is where an
    arm is stable at the highest rate that was tried.
    """
    ranges = [stable_range(scores, base, keep) or min(scores) for scores in (ours, stock)]
    return ranges[0] / ranges[1]


def range_ratio_interval(
    ours: Mapping[float, Sequence[float]], stock: Mapping[float, Sequence[float]], base: float, keep: float = KEEP
) -> Interval | None:
    """Bootstrap interval of [`range_ratio`] over the seeds, which are drawn with replacement, the same for both arms.

    A range asks for every seed, so a resample without the worst one can only widen it: with few seeds the interval says
    how much the result hangs on one of them, and no more. None with fewer than two seeds.
    """
    grids = [{rate: np.array(scores) for rate, scores in grid.items()} for grid in (ours, stock)]
    counts = {len(scores) for grid in grids for scores in grid.values()}
    if len(counts) != 1:
        raise ValueError(
            f"The arms have {sorted(counts)} seeds at their learning rates; give each rate the same seeds."
        )

    def ratio(seeds: np.ndarray) -> float:
        ours, stock = ({rate: scores[seeds] for rate, scores in grid.items()} for grid in grids)
        return range_ratio(ours, stock, base, keep)

    return bootstrap_interval(range(counts.pop()), ratio)


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[[np.ndarray], float] = np.mean, resamples: int = 2000
) -> Interval | None:
    """Percentile bootstrap interval (95 %) of a statistic over the seeds' values; None with fewer than two.

    With three seeds there are ten different resamples, so that it is coarse.
    """
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (np.asarray(values),),
        lambda sample: statistic(sample),
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def median_ratio(ours: Sequence[float], stock: Sequence[float]) -> float:
    """Ratio of the medians, as of seconds per step or of peak memory."""
    return float(np.median(ours) / np.median(stock))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one coordinate and matches in the other; higher is better."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    return [index for index, point in enumerate(points) if not dominated(point)]
