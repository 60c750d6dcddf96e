"""The numbers of a comparison: what its runs left as tidy frames, measures of a run, and intervals that pair runs.

    about       run, arm, setting, condition, seed, rate, status, group      a line for each run
    values      run, arm, setting, seed, step, metric, value ...             what was logged, and the scores
    ends        run, arm, setting, seed, status ..., score, final, base      a line for each run and score
    held_out    run, step, row, column of a score                            a line for each held-out row and evaluation

A condition is a setting without its learning rate, and a group the runs that differ in the seed alone.
Log-probabilities and divergences are in nats. Of a held-out pair, with sums of log-probabilities over a response, of
the policy and of the reference (ref):

    margin   = beta ((chosen - ref_chosen) - (rejected - ref_rejected))
    accuracy = 1 if margin > 0, 1/2 if margin = 0, else 0
    loss     = -log sigmoid(margin)                                    DPO (Rafailov et al. 2023, arXiv 2305.18290)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .runs import Run, is_number, rate

KEEP = 0.95  # share of the base's score that is kept
RESAMPLES, CONFIDENCE = 2000, 0.95
# Runs with the same of these start from the same model and rows
START = ("model_name_or_path", "dataset_name", "dataset_config", "dataset_test_split", "max_length", "truncation_mode")
PAIR, TOKENS = ["chosen", "rejected", "ref_chosen", "ref_rejected"], ["chosen_tokens", "rejected_tokens"]


# Held-out rows and paired intervals


def preference_scores(rows: Mapping[str, Any], beta: float) -> dict[str, np.ndarray]:
    """Margin, accuracy and loss of held-out pairs, as the module defines them, each (pairs,).

    `rows` has `chosen`, `rejected`, `ref_chosen`, `ref_rejected`: sums of log-probabilities in nats. `beta` is DPO's.
    """
    chosen, rejected, ref_chosen, ref_rejected = (np.asarray(rows[name], dtype=np.float64) for name in PAIR)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    accuracy = np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))
    with np.errstate(invalid="ignore"):  # a frame also has rows that are no pairs
        return {"margin": margin, "accuracy": accuracy, "loss": np.logaddexp(0.0, -margin)}


def paired_bootstrap(differences: Any, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Percentile bootstrap interval (95 %) of the mean of paired differences (seeds, rows); NaN: a missing pair.

    Each resample draws seeds and rows with replacement, independently, so both count as random. With one seed it draws
    rows alone, with one row seeds alone. None for fewer than two seeds and rows.
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
    """A score of a run: `key` in the log, or `column` in the held-out rows, which count where they are there.

    `kept` says whether a share of the base's value means something, and `lower` whether lower is better. `of` makes the
    score from what is logged.
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
ALWAYS = (
    Score("preference accuracy", "", "accuracy", kept=False),
    Score("DPO loss", "", "loss", kept=False, lower=True),
    Score("world-facts probability", "eval_world_facts_probability"),
    Score("real-authors probability", "eval_real_authors_probability"),
    Score("probability per token of solutions", "eval_solutions_nll", of=lambda value: math.exp(min(-value, 700.0))),
)


class Table:
    """The frames of a comparison.

    Attributes:
        runs: The runs, the baseline's arm first; a frame names one by its place among them.
        about, values, ends, held_out: The frames of the module. base is the value at step 0, final the last one
            of a run that finished.
        scores: The scores that there are.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.about = self._describe_runs()
        self.held_out = self._read_held_out()
        logged = self._read_log()
        cells = {score: self._cells_of(score, logged) for score in self._scores_of({*logged.metric, *self.held_out})}
        self.scores = [score for score, own in cells.items() if len(own)]
        self._cells = pd.concat([cells[score] for score in self.scores] or [*cells.values()])
        means = self._cells.groupby(["run", "step", "metric"], as_index=False).value.mean()
        columns = {"run": int, "step": int, "metric": object, "value": float}
        self.values = pd.concat([logged, means])[list(columns)].astype(columns).merge(self.about, on="run")
        self.ends = self._read_ends()

    def _describe_runs(self) -> pd.DataFrame:
        lines = []
        for place, run in enumerate(self.runs):
            condition = {name: value for name, value in run.setting.items() if name != "learning_rate"}
            names = setting_name(run.setting), setting_name(condition) if condition else ""
            lines.append((place, run.arm, *names, run.seed, run.rate, run.status))
        about = pd.DataFrame(lines, columns=["run", "arm", "setting", "condition", "seed", "rate", "status"])
        varied = [run.setting.get("learning_rate", 0.0) for run in self.runs]
        order = [pd.factorize(about.condition)[0], pd.Series(varied, dtype=float), pd.factorize(about.arm)[0]]
        return about.assign(group=about.groupby(order).ngroup() if self.runs else [])

    def _read_log(self) -> pd.DataFrame:
        lines = [
            (place, entry["step"], metric, float(value))
            for place, run in enumerate(self.runs)
            for entry in run.log
            for metric, value in entry.items()
            if metric != "step" and is_number(value)
        ]
        frame = pd.DataFrame(lines, columns=["run", "step", "metric", "value"])
        frame = frame.drop_duplicates(["run", "step", "metric"], keep="last")
        parts = [frame]
        if set(TOKENS) <= set(self.held_out):
            sums = self.held_out.groupby(["run", "step"])[[*PAIR[:2], *TOKENS]].sum()
            for name in PAIR[:2]:  # in nats per token
                value = (sums[name] / sums[f"{name}_tokens"]).dropna()
                parts.append(value.rename("value").reset_index().assign(metric=name))
        return pd.concat(parts, ignore_index=True)

    def _read_held_out(self) -> pd.DataFrame:
        frames = [pd.DataFrame(columns=["run", "step", "row"])]
        for place, run in enumerate(self.runs):
            rows = pd.DataFrame(run.held_out).assign(run=place)
            if len(rows):
                rows["row"] = [f"{line.get('dataset', 'eval')}:{line['row']}" for line in run.held_out]
                if set(PAIR) <= set(rows):
                    beta = run.settings.get("beta")
                    rows[PAIR] = rows[PAIR].apply(pd.to_numeric, errors="coerce")
                    rows = rows.assign(**preference_scores(rows, beta if beta and is_number(beta) else 0.1))
                frames.append(rows)
        found = pd.concat(frames[1:] or frames, ignore_index=True)
        return found.drop_duplicates(["run", "step", "row"], keep="last")

    def _scores_of(self, there: set[str]) -> list[Score]:
        tries = max((int(key[10:]) for key in there if key.startswith("eval_pass@")), default=0)
        task = [*ACCURACIES, Score(f"pass@{tries}", f"eval_pass@{tries}", f"pass@{tries}")]
        task = [score for score in task if {score.key, score.column} & there]
        return [*(task or [REWARD if REWARD.key in there else CHOSEN]), *ALWAYS]

    def _cells_of(self, score: Score, logged: pd.DataFrame) -> pd.DataFrame:
        """A score by run, step and held-out row; by run and step where rows are not recorded."""
        found = logged[logged.metric == score.key].assign(row="")
        found["value"] = found.value.map(score.of)
        if score.column in self.held_out:
            rows = self.held_out.assign(value=self.held_out[score.column]).dropna(subset=["value"])
            found = pd.concat([found[~found.run.isin(rows.run)], rows])
        return found.assign(metric=score.name)[["run", "step", "row", "metric", "value"]]

    def _read_ends(self) -> pd.DataFrame:
        """The base of a run is the median over those that start from the same model and rows, else another's of its
        arm."""
        settings = [{**run.settings, **run.setting} for run in self.runs]
        start = pd.Series([str([each.get(name) for name in START]) for each in settings], dtype=object)
        ends = [self.about.iloc[:0].assign(score=[], final=[], base=[])]
        for score in self.scores:
            series = self.values[self.values.metric == score.name].sort_values("step")
            final = series.groupby("run").value.last().reindex(self.about.index)
            first = series[(series.step == 0) & np.isfinite(series.value)].set_index("run").value
            base = start.map(first.groupby(start.reindex(first.index)).median())
            base = base.fillna(base.groupby(self.about.arm).transform("last"))
            final = final.where(self.about.status == "finished")
            ends.append(self.about.assign(score=score.name, final=final, base=base))
        return pd.concat(ends[1:] or ends, ignore_index=True)

    def ends_of(self, runs: Sequence[int], score: Score) -> pd.DataFrame:
        """The lines of some runs and one score."""
        return self.ends[(self.ends.score == score.name) & self.ends.run.isin(runs)]

    def difference(self, ours: Sequence[int], theirs: Sequence[int], score: Score) -> dict[str, Any]:
        """Final score of the first runs less the second's, paired by seed, and by held-out row where they are there."""
        return _paired(self._by("seed", ours, score), self._by("seed", theirs, score))

    def loss(self, runs: Sequence[int], score: Score) -> dict[str, Any]:
        """Final score less `KEEP` of the base's, for each run: `kept` if the interval lies above 0, or below."""
        final, base = self._by("run", runs, score), self._by("run", runs, score, at_start=True)
        known = self.ends_of(runs, score).set_index("run").base  # for a row that was not evaluated at the start
        found = _paired(final, KEEP * base.reindex_like(final).T.fillna(known).T)
        interval = found["interval"]
        sure = True if interval and interval[0] >= 0 else False if interval and interval[1] < 0 else None
        diverged = any(self.runs[place].status == "diverged" for place in runs)
        return {**found, "kept": None if not score.kept else False if diverged else sure}

    def _by(self, index: str, runs: Sequence[int], score: Score, at_start: bool = False) -> pd.DataFrame:
        """(seeds or runs, rows) of what finished; one column without a name where rows are not recorded."""
        finished = self.about[self.about.run.isin(runs) & (self.about.status == "finished")]
        own = self._cells[self._cells.metric == score.name].merge(finished[["run", "seed"]], on="run")
        own = own[own.step == (0 if at_start else own.groupby("run").step.transform("max"))].astype({"value": float})
        return own.pivot_table(index=index, columns="row", values="value", aggfunc="last", sort=False)


def _paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Any]:
    """The mean of differences and its interval, by seed and row; by seed alone where rows are not recorded."""
    if "" in ours or "" in theirs:
        ours, theirs = (each.mean(axis=1).to_frame("") for each in (ours, theirs))
    gaps = (ours - theirs).dropna(how="all").dropna(axis=1, how="all")
    return {
        "difference": float(np.nanmean(gaps.to_numpy())) if gaps.size else None,
        "interval": paired_bootstrap(gaps),
        "seeds": len(gaps),
        "rows": None if "" in gaps else gaps.shape[1] or None,
    }


# For people


def number(value: float | None) -> str:
    """A number for people: three significant digits, without an exponent where it is readable so; none for None."""
    if value is None or math.isnan(value):
        return "none"
    if 1e3 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{float(f'{value:.3g}'):g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def setting_name(setting: Mapping[str, Any]) -> str:
    """A setting in words, such as "learning rate 3e-5, beta 0.5"."""
    rates = {name: rate(value) for name, value in setting.items() if name == "learning_rate" and is_number(value)}
    told = (f"{name.replace('_', ' ')} {value}" for name, value in {**setting, **rates}.items())
    return ", ".join(told) or "as in the recipe"
