"""The numbers of a comparison: what its runs left as tidy frames, measures of a run, and intervals that pair runs.

    values      run, arm, setting, seed, step, metric, value           what was logged, and the scores
    held_out    run, arm, setting, seed, step, row, column of a score  one line for each held-out row and evaluation

A run is read once, from its folder. What a folder holds may be cut, empty or of another form: a file that cannot be
used is named, and costs no other run. Log-probabilities, entropies and divergences are in nats.

Of a held-out pair, with sums of log-probabilities over a response, of the policy and of the reference (ref):

    margin   = beta ((chosen - ref_chosen) - (rejected - ref_rejected))
    accuracy = 1 if margin > 0, 1/2 if margin = 0, else 0
    loss     = -log sigmoid(margin)                                    DPO (Rafailov et al. 2023, arXiv 2305.18290)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .runs import Run, is_number, rate

KEEP = 0.95  # share of the base's score that is kept
RESAMPLES, CONFIDENCE = 2000, 0.95
WINDOW, WARM_UP = 50, 5  # steps that a running median looks back, and that it needs
START = ("model_name_or_path", "dataset_name", "dataset_config", "dataset_test_split")
ENTROPIES = ("eval_sampled_entropy", "eval_entropy", "entropy")
STEP_MEANS = {
    "ceu/descending_below_0.01": "share of descending tokens below 0.01",
    "ceu/descending_above_0.99": "share of descending tokens above 0.99",
    "ceu/gradient_descending": "share of the gradient on descending tokens",
    "ceu/gradient_below_0.01": "share of the gradient below 0.01",
    "ceu/gradient_above_0.99": "share of the gradient above 0.99",
    "rollout/ratio_positive": "importance ratio, positive advantage",
    "rollout/ratio_negative": "importance ratio, negative advantage",
    "rollout/mismatch_positive": "mismatch with rollouts in nats, positive advantage",
    "rollout/mismatch_negative": "mismatch with rollouts in nats, negative advantage",
}
PAIR = ("chosen", "rejected", "ref_chosen", "ref_rejected")

Interval = tuple[float, float]


# Measures of a series: a list of numbers in the order of the steps


def spikes(values: Sequence[float], factor: float = 10.0, window: int = WINDOW) -> list[int]:
    """Positions of the values above `factor` times the median of the up to `window` finite values before them.

    The measure for gradient norms. The first `WARM_UP` values are never spikes.
    """
    return _outliers(values, window, lambda before: factor * float(np.median(before)))


def loss_spikes(values: Sequence[float], factor: float = 10.0, window: int = WINDOW) -> list[int]:
    """Positions of the values above m + `factor` * d of the up to `window` finite values before them.

    m is their median and d their median absolute deviation, at least 1e-3.
    """

    def limit(before: np.ndarray) -> float:
        middle = float(np.median(before))
        return middle + factor * max(float(np.median(np.abs(before - middle))), 1e-3)

    return _outliers(values, window, limit)


def _outliers(values: Sequence[float], window: int, limit: Callable[[np.ndarray], float]) -> list[int]:
    found: list[int] = []
    before: list[float] = []
    for place, value in enumerate(values):
        if math.isfinite(value):
            if len(before) >= WARM_UP and value > limit(np.array(before[-window:])):
                found.append(place)
            before.append(value)
    return found


def drawdown(scores: Sequence[float]) -> float:
    """The largest fall of the score from its best so far: max over s < t of score_s - score_t, at least 0."""
    values = np.asarray(scores, dtype=float)
    return float(np.max(np.maximum.accumulate(values) - values))


def collapse_step(steps: Sequence[int], scores: Sequence[float], share: float = 0.5) -> int | None:
    """The step from whose evaluation on the score stays below `share` of its best so far; None: no collapse.

    A score whose best is not above 0, such as a reward of penalties, does not collapse.
    """
    collapsed, best = None, -math.inf
    for step, score in zip(steps, scores, strict=True):
        best = max(best, score)
        collapsed = None if best <= 0 or score >= share * best else step if collapsed is None else collapsed
    return collapsed


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one coordinate and matches in the other; higher is better."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any((a, b) != (x, y) and a >= x and b >= y for a, b in points)
    ]


# Held-out rows and paired intervals


def preference_scores(rows: Mapping[str, Any], beta: float) -> dict[str, np.ndarray]:
    """Margin, accuracy and DPO loss of held-out pairs; see the formulas of the module.

    Args:
        rows: `chosen`, `rejected`, `ref_chosen` and `ref_rejected`, each (pairs,) in nats.
        beta: Of DPO.
    """
    chosen, rejected, ref_chosen, ref_rejected = (np.asarray(rows[name], dtype=np.float64) for name in PAIR)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    accuracy = np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))
    return {"margin": margin, "accuracy": accuracy, "loss": np.logaddexp(0.0, -margin)}


def paired_bootstrap(differences: Any, resamples: int = RESAMPLES) -> Interval | None:
    """Percentile bootstrap interval (95 %) of the mean of paired differences, over seeds and rows.

    Each resample draws seeds and rows with replacement, independently, so both count as random. With one seed it draws
    rows alone, with one row seeds alone.

    Args:
        differences: (seeds, rows); NaN where a pair is not there.
        resamples: How many resamples.

    Returns:
        The interval; None for fewer than two seeds and rows.
    """
    found = np.asarray(differences, dtype=np.float64)
    known = np.isfinite(found)
    if known.sum() < 2:
        return None
    drawing = np.random.default_rng(0)
    seeds, rows = (drawing.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float) for n in found.shape)
    total = ((seeds @ np.where(known, found, 0.0)) * rows).sum(axis=1)
    count = ((seeds @ known.astype(float)) * rows).sum(axis=1)
    low, high = np.quantile(total[count > 0] / count[count > 0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


# The frames


@dataclass(frozen=True)
class Score:
    """A score of a run.

    Args:
        name: What it is, as in "the base's greedy accuracy".
        key: Where it is logged.
        column: Of the held-out rows, from which it is taken where they are recorded.
        kept: Whether a share of the base's value says something.
        lower: Whether lower is better.
        of: The score from what is logged.
    """

    name: str
    key: str
    column: str | None = None
    kept: bool = True
    lower: bool = False
    of: Callable[[float], float] = lambda value: value


ACCURACIES = tuple(Score(f"{name} accuracy", f"eval_{name}_accuracy", name) for name in ("greedy", "sampled"))
REWARD = Score("held-out reward", "eval_reward")
CHOSEN = Score("probability per token of chosen responses", "chosen", of=lambda value: math.exp(min(value, 700.0)))
PREFERENCE = Score("preference accuracy", "eval_rewards/accuracies", "accuracy", kept=False)
DPO_LOSS = Score("DPO loss", "", "loss", kept=False, lower=True)
KNOWN = (
    Score("world-facts probability", "eval_world_facts_probability"),
    Score("real-authors probability", "eval_real_authors_probability"),
    Score("probability per token of solutions", "eval_solutions_nll", of=lambda value: math.exp(min(-value, 700.0))),
)


ABOUT = ("arm", "setting", "seed", "rate")  # of a run


class Table:
    """The frames of a comparison.

    Attributes:
        runs: The runs, the baseline's arm first.
        values: The frame of what was logged.
        held_out: The frame of held-out rows.
        scores: The scores that there are.
        ends: One line for each run and score: base (the value at step 0) and final (the last value of a finished run).
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.labels = [setting_name(run.setting) for run in self.runs]
        self.tokens = self._response_tokens()
        self.held_out = self._read_held_out()
        self.values = self._read_values()
        self.scores = self._add_scores()
        self.ends = self._read_ends()

    def _columns(self, place: int) -> dict[str, Any]:
        run = self.runs[place]
        return {"run": place, "arm": run.arm, "setting": self.labels[place], "seed": run.seed, "rate": run.rate}

    def _response_tokens(self) -> list[dict[str, float] | None]:
        """Mean tokens of held-out responses of each run; one without a result has those of a run with the same rows."""
        own = [run.outcome.get("eval_tokens") for run in self.runs]
        own = [each if each and all(is_number(v) and v > 0 for v in each.values()) else None for each in own]
        rows = [
            str([run.settings.get(name) for name in (*START, "max_length", "truncation_mode")]) for run in self.runs
        ]
        known = {key: tokens for key, tokens in zip(rows, own, strict=True) if tokens}
        return [tokens or known.get(key) for key, tokens in zip(rows, own, strict=True)]

    def _read_values(self) -> pd.DataFrame:
        lines = [
            (place, entry["step"], metric, float(value) if not is_huge(value) else math.inf)
            for place, run in enumerate(self.runs)
            for entry in run.log
            for metric, value in entry.items()
            if metric != "step" and is_number(value)
        ]
        frame = pd.DataFrame(lines, columns=["run", "step", "metric", "value"])
        frame = frame.drop_duplicates(["run", "step", "metric"], keep="last")
        parts = [frame]
        for name in ("chosen", "rejected"):
            own = frame[frame.metric == f"eval_logps/{name}"]
            if any(self.tokens):  # no curve in another unit
                own = own[own.run.map(lambda run: self.tokens[run] is not None).astype(bool)]
            tokens = [(self.tokens[run] or {}).get(name, 1.0) for run in own.run]
            parts.append(own.assign(metric=name, value=own.value / tokens))
        entropy = next((key for key in ENTROPIES if (frame.metric == key).any()), None)
        parts.append(frame[frame.metric == entropy].assign(metric="entropy at evaluations"))
        return self._with_run_columns(pd.concat(parts, ignore_index=True))

    def _with_run_columns(self, frame: pd.DataFrame) -> pd.DataFrame:
        about = pd.DataFrame([self._columns(place) for place in range(len(self.runs))], columns=["run", *ABOUT])
        kinds = {name: kind for name, kind in (("run", int), ("value", float)) if name in frame}
        return frame.astype(kinds).merge(about.astype({"run": int}), on="run", how="left")

    def _read_held_out(self) -> pd.DataFrame:
        frames = []
        for place, run in enumerate(self.runs):
            if not run.held_out:
                continue
            rows = pd.DataFrame(run.held_out).assign(run=place)
            rows["row"] = [f"{line.get('dataset', 'eval')}:{line['row']}" for line in run.held_out]
            if set(PAIR) <= set(rows):
                beta = run.settings.get("beta")
                rows = rows.assign(**preference_scores(rows, beta if beta and is_number(beta) else 0.1))
            frames.append(rows)
        if not frames:
            return pd.DataFrame(columns=["run", "step", "row", *ABOUT])
        found = pd.concat(frames, ignore_index=True)
        return self._with_run_columns(found.drop_duplicates(["run", "step", "row"], keep="last"))

    def _add_scores(self) -> list[Score]:
        """Put each score into the frame of values, under its name, from held-out rows where they are there."""
        logged = set(self.values.metric)
        task = [score for score in ACCURACIES if score.key in logged or score.column in self.held_out]
        task = task or [score for score in (REWARD,) if score.key in logged] or [CHOSEN]
        found = []
        for score in (*task, PREFERENCE, DPO_LOSS, *KNOWN):
            series = self._series_of(score)
            if len(series):
                found.append(score)
                self.values = pd.concat([self.values, self._with_run_columns(series.assign(metric=score.name))])
        return found

    def _series_of(self, score: Score) -> pd.DataFrame:
        series = self.values[self.values.metric == score.key][["run", "step", "value"]].copy()
        series["value"] = [score.of(value) for value in series.value]
        if score == PREFERENCE:  # the policy is its reference at step 0, and TRL counts a tie as wrong
            series = series[(series.step > 0) | (series.value > 0)]
        if score.column in self.held_out:
            rows = self.held_out.dropna(subset=[score.column])
            means = rows.groupby(["run", "step"], as_index=False)[score.column].mean()
            means = means.rename(columns={score.column: "value"})
            series = pd.concat([series[~series.run.isin(means.run)], means])
        return series

    def bases(self, score: Score) -> dict[int, float]:
        """The score at step 0 of each run: the median over the runs that start from the same model and rows."""
        first = self.values[(self.values.metric == score.name) & (self.values.step == 0)]
        own = dict(zip(first.run, first.value, strict=True))
        starts = [
            str([*({**run.settings, **run.setting}.get(name) for name in START), self.tokens[place]])
            for place, run in enumerate(self.runs)
        ]
        known = pd.Series({place: value for place, value in own.items() if math.isfinite(value)}, dtype=float)
        medians = known.groupby([starts[place] for place in known.index]).median() if len(known) else known
        arms: dict[str, float] = {self.runs[p].arm: medians[starts[p]] for p in known.index}
        found = {
            place: medians[start] if start in medians.index else arms.get(self.runs[place].arm)
            for place, start in enumerate(starts)
        }
        return {place: float(value) for place, value in found.items() if value is not None}

    def _read_ends(self) -> pd.DataFrame:
        lines = []
        for score in self.scores:
            bases = self.bases(score)
            series = self.values[self.values.metric == score.name].sort_values("step").groupby("run").value.last()
            for place, run in enumerate(self.runs):
                ended = run.status == "finished" and place in series.index
                final = series[place] if ended else math.nan
                lines.append({**self._columns(place), "status": run.status, "score": score.name, "final": final})
                lines[-1]["base"] = bases.get(place, math.nan)
        columns = ["run", *ABOUT, "status", "score", "final", "base"]
        return pd.DataFrame(lines, columns=columns)

    def ends_of(self, runs: Sequence[int], score: Score) -> pd.DataFrame:
        """The lines of some runs and one score."""
        return self.ends[(self.ends.score == score.name) & self.ends.run.isin(runs)]

    def series(self, run: int, metric: str) -> pd.Series:
        """What a run logged under a metric, by step."""
        found = self.values[(self.values.run == run) & (self.values.metric == metric)]
        return found.sort_values("step").set_index("step").value

    def rows(self, run: int, score: Score, last: bool = True) -> pd.Series | None:
        """A score of each held-out row of a run at its last step, or at step 0; None if it recorded none."""
        if score.column not in self.held_out:
            return None
        found = self.held_out[self.held_out.run == run].dropna(subset=[score.column])
        step = (found.step.max() if last else 0) if len(found) else 0
        found = found[found.step == step].set_index("row")[score.column]
        return found if len(found) else None

    def difference(self, ours: Sequence[int], theirs: Sequence[int], score: Score) -> dict[str, Any]:
        """Final score of the first runs less the second's, paired by seed, and by held-out row where they are there."""
        return self._paired([(self._cell(a, score), self._cell(b, score)) for a, b in self._by_seed(ours, theirs)])

    def loss(self, runs: Sequence[int], score: Score) -> dict[str, Any]:
        """Final score less `KEEP` of the base's, for each run: `kept` if the interval lies above 0, or below."""
        ended = [place for place in runs if self.runs[place].status == "finished"]
        bases = self.bases(score)
        cells = [(self._cell(p, score), self._cell(p, score, bases.get(p, math.nan)) * KEEP) for p in ended]
        found = self._paired(cells)
        interval = found["interval"]
        sure = True if interval and interval[0] >= 0 else False if interval and interval[1] < 0 else None
        diverged = any(self.runs[place].status == "diverged" for place in runs)
        return {**found, "kept": None if not score.kept else False if diverged else sure}

    def _by_seed(self, ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
        seeds = [
            {self.runs[place].seed: place for place in group if self.runs[place].status == "finished"}
            for group in (ours, theirs)
        ]
        return [(seeds[0][seed], seeds[1][seed]) for seed in sorted(seeds[0].keys() & seeds[1].keys())]

    def _cell(self, place: int, score: Score, base: float | None = None) -> pd.Series:
        rows = self.rows(place, score, last=base is None)
        if rows is not None:
            return rows
        return pd.Series({"": self.ends_of([place], score).final.iloc[0] if base is None else base})

    @staticmethod
    def _paired(cells: Sequence[tuple[pd.Series, pd.Series]]) -> dict[str, Any]:
        if not all("" not in ours.index and "" not in theirs.index for ours, theirs in cells):
            cells = [(pd.Series({"": a.mean()}), pd.Series({"": b.mean()})) for a, b in cells]
        gaps = pd.DataFrame([(a - b).dropna() for a, b in cells])
        gaps = gaps.dropna(how="all")
        if gaps.empty:
            return {"difference": None, "interval": None, "seeds": 0, "rows": None}
        rows = None if list(gaps) == [""] else int(gaps.shape[1])
        interval = paired_bootstrap(gaps.to_numpy())
        return {
            "difference": float(np.nanmean(gaps.to_numpy())),
            "interval": list(interval) if interval else None,
            "seeds": len(gaps),
            "rows": rows,
        }


def is_huge(value: float) -> bool:
    """Whether a whole number is too large for a float."""
    return isinstance(value, int) and abs(value) > 1e308


# For people


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: three significant digits, without an exponent where it is readable so; none for None."""
    if value is None or math.isnan(value):
        return "none"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        shown = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return f"{float(shown):g}" if abs(value) < 1000 else shown
    return f"{value:.2g}"


def setting_name(setting: Mapping[str, Any]) -> str:
    """A setting in words, such as "learning rate 3e-5, beta 0.5"."""
    told = (f"{name.replace('_', ' ')} {_value(name, value)}" for name, value in setting.items())
    return ", ".join(told) or "as in the recipe"


def _value(name: str, value: Any) -> str:
    return rate(value) if name == "learning_rate" and is_number(value) else str(value)


def unique(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
