"""The numbers of a comparison: measures of each run, of each arm at each setting, and of the arms against the first.

The first arm is the baseline. A score is what a run should keep; the base is the model before training, step 0.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import measures
from .runs import STATUSES, Run

FORGET_QUALITY = 0.05  # p-value above which an unlearned model cannot be told from the retain model
KEEP_UTILITY = 0.9  # share of the base's model utility
PLANE = ("model_utility", "forget_quality")
ENTROPIES = ("eval_sampled_entropy", "eval_entropy", "entropy")
CURVES = (
    "eval_greedy_accuracy",
    "eval_sampled_accuracy",
    "eval_reward",
    "eval_rewards/accuracies",
    "eval_logps/chosen",
    "eval_logps/rejected",
    "eval_kl",
    "eval_entropy",
    "eval_sampled_entropy",
)


@dataclass(frozen=True)
class Score:
    """A score of a run, higher is better.

    Args:
        name: What it is, as in "the base's greedy accuracy".
        key: Where it is logged.
        tokens: If set, what is logged is the log-probability of that many tokens, and the score is its geometric mean.
        kept: Whether a share of the base's value says something.
    """

    name: str
    key: str
    tokens: float | None = None
    kept: bool = True

    def series(self, run: Run) -> list[tuple[int, float]]:
        return [(step, self.of(value)) for step, value in run.series(self.key)]

    def of(self, logged: float) -> float:
        return logged if self.tokens is None else math.exp(logged / self.tokens)

    def base(self, runs: Iterable[Run]) -> float | None:
        """The median over runs of the value at step 0."""
        first = [value for run in runs for step, value in self.series(run)[:1] if step == 0 and math.isfinite(value)]
        return statistics.median(first) if first else None

    def final(self, run: Run) -> float | None:
        """The last value of a finished run, NaN for a diverged one, else None."""
        if run.status == "diverged":
            return math.nan
        if run.status != "finished":
            return None
        series = self.series(run)
        if series:
            return series[-1][1]
        last = (run.result or {}).get("metrics", {}).get(self.key)
        return None if last is None else self.of(float(last))


def find_scores(runs: Sequence[Run]) -> list[Score]:
    """The scores that there are: accuracy of a task, else reward, else how probable the chosen responses are."""

    def logged(key: str) -> bool:
        return any(run.values(key) or key in (run.result or {}).get("metrics", {}) for run in runs)

    accuracies = [Score(f"{name} accuracy", f"eval_{name}_accuracy") for name in ("greedy", "sampled")]
    if found := [score for score in accuracies if logged(score.key)]:
        return found
    if logged("eval_reward"):
        return [Score("held-out reward", "eval_reward")]
    tokens = response_tokens(runs)
    probability = Score(
        "probability per token of held-out chosen responses" if tokens else "probability of held-out chosen responses",
        "eval_logps/chosen",
        tokens.get("chosen", 1.0),
    )
    preference = Score("held-out preference accuracy", "eval_rewards/accuracies", kept=False)
    return [score for score in (probability, preference) if logged(score.key)]


def response_tokens(runs: Sequence[Run]) -> dict[str, float]:
    """Mean tokens of the held-out chosen and rejected responses; empty if no run recorded them."""
    return next((run.result["eval_tokens"] for run in runs if run.result and run.result.get("eval_tokens")), {})


def summarize(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Everything that the report says, in numbers; not finite ones may be in it."""
    scores, tokens = find_scores(runs), response_tokens(runs)
    bases = {score.name: score.base(runs) for score in scores}
    provenance = _provenance(runs)
    records = [_record(run, scores, tokens) for run in runs]
    for record, run in zip(records, runs, strict=True):
        record["provenance"] = next((i for i, entry in enumerate(provenance) if _same_origin(entry, run)), None)
    groups = _groups(runs, records, scores)
    return {
        "command": command,
        "arms": arms(methods(runs)),
        "base": bases,
        "tokens": tokens,
        "ranges": [entry for score in scores for entry in _ranges(methods(runs), score, bases[score.name])],
        "differences": [entry for score in scores for entry in _differences(methods(runs), score)],
        "best": [entry for score in scores for entry in _best(groups, score)],
        "tofu": _tofu(runs),
        "groups": groups,
        "runs": records,
        "provenance": provenance,
    }


def conditions(runs: Iterable[Run]) -> list[dict[str, str]]:
    """The settings without the learning rate, each once."""
    return _unique(condition(run) for run in runs)


def condition(run: Run) -> dict[str, str]:
    return {name: value for name, value in run.setting.items() if name != "learning_rate"}


def arms(runs: Iterable[Run]) -> list[str]:
    return _unique(run.arm for run in runs)


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each arm at each setting: by condition, then learning rate, then arm."""
    names, rests = arms(runs), conditions(runs)

    def key(run: Run) -> tuple[Any, ...]:
        rate = float(run.setting["learning_rate"]) if "learning_rate" in run.setting else 0.0
        return rests.index(condition(run)), rate, names.index(run.arm)

    keys = sorted({key(run) for run in runs})
    return [[run for run in runs if key(run) == each] for each in keys]


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of all arms at each setting, in the order of [`grouped`]."""
    settings = _unique(dict(members[0].setting) for members in grouped(runs))
    return [[run for run in runs if run.setting == setting] for setting in settings]


def _unique(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _record(run: Run, scores: Sequence[Score], tokens: Mapping[str, float]) -> dict[str, Any]:
    outcome = run.result or run.failure or {}
    return {
        "arm": run.arm,
        "setting": dict(run.setting),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "command": outcome.get("command"),
        "date": outcome.get("date"),
        "final": {score.name: score.final(run) for score in scores},
        "measures": measure(run, scores, tokens),
        "curves": _curves(run),
    }


def measure(run: Run, scores: Sequence[Score], tokens: Mapping[str, float]) -> dict[str, Any]:
    """The measures of one run; None for each whose series it did not log."""

    def of(series: Sequence[float], function: Callable[..., Any], *arguments: Any) -> Any:
        return function(series, *arguments) if series else None

    norms, losses = run.values("grad_norm"), run.values("loss")
    finite = [norm for norm in norms if math.isfinite(norm)]
    chosen, rejected = run.values("eval_logps/chosen"), run.values("eval_logps/rejected")
    entropy = next((values for key in ENTROPIES if (values := run.values(key))), [])
    score = scores[0].series(run) if scores else []
    bad = {step for key in ("loss", "grad_norm") for step, value in run.series(key) if not math.isfinite(value)}
    return {
        "grad_norm_median": of(finite, statistics.median),
        "grad_norm_largest": of(finite, max),
        "grad_norm_spikes": of(norms, lambda values: len(measures.spikes(values))),
        "loss_spikes": of(losses, lambda values: len(measures.loss_spikes(values))),
        "displacement": of(chosen, measures.displacement, tokens.get("chosen", 1.0)),
        "depth": of(rejected, measures.depth, tokens.get("rejected", 1.0)),
        "kl": of(run.values("eval_kl"), lambda values: values[-1]),
        "entropy_change": of(entropy, measures.change),
        "drawdown": of([value for _, value in score], measures.drawdown),
        "collapse_step": of(
            [v for _, v in score], lambda values: measures.collapse_step([t for t, _ in score], values)
        ),
        "non_finite_steps": len(bad) if norms or losses else None,
        **{name: (run.tofu or {}).get(name) for name in PLANE},
        "seconds_per_step": _seconds_per_step(run),
        "peak_memory_gib": (run.result or {}).get("peak_memory_gib"),
    }


def _seconds_per_step(run: Run) -> float | None:
    """Of training with its evaluations; None for a run that was resumed, whose clock started again."""
    result = run.result or {}
    seconds, steps = result.get("metrics", {}).get("train_runtime"), result.get("steps")
    if not seconds or not steps or "--resume_from_checkpoint" in result.get("command", ""):
        return None
    return seconds / steps


def _curves(run: Run) -> dict[str, list[Any]]:
    """The evaluations by step; None where one key was not logged at a step."""
    series = {key: dict(run.series(key)) for key in CURVES}
    steps = sorted({step for values in series.values() for step in values})
    found = {key: [values.get(step) for step in steps] for key, values in series.items() if values}
    return {"step": steps, **found} if steps else {}


def _groups(runs: Sequence[Run], records: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Each arm at each setting over its seeds, with time and memory as ratios to the baseline at the same setting."""
    groups, of_run = [], {id(run): record for run, record in zip(runs, records, strict=True)}
    for members in grouped(runs):
        found = [of_run[id(run)] for run in members]
        groups.append(
            {
                "arm": members[0].arm,
                "setting": dict(members[0].setting),
                "learning_rate": known_rate(members),
                "seeds": {status: sum(r["status"] == status for r in found) for status in STATUSES},
                "final": {score.name: _spread(r["final"][score.name] for r in found) for score in scores},
                **_over_seeds([r["measures"] for r in found]),
            }
        )
    baseline = arms(methods(runs))[:1]
    stock = {str(group["setting"]): group for group in groups if group["arm"] in baseline}
    for group in groups:
        for name in ("seconds_per_step", "peak_memory_gib"):
            ours, theirs = group[name], stock.get(str(group["setting"]), {}).get(name)
            group[f"{name}_ratio"] = ours / theirs if ours and theirs else None
    return groups


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Largest gradient norm, sums of counts, earliest collapse, medians of the rest."""
    combine: dict[str, Callable[[list[Any]], Any]] = {
        "grad_norm_largest": max,
        "grad_norm_spikes": sum,
        "loss_spikes": sum,
        "non_finite_steps": sum,
        "collapse_step": min,
    }
    over = {}
    for name in found[0]:
        values = [each[name] for each in found if each[name] is not None and math.isfinite(each[name])]
        over[name] = combine.get(name, statistics.median)(values) if values else None
    over["collapsed"] = sum(each["collapse_step"] is not None for each in found)
    return over


def _spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, least and largest of the finite values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return {"mean": statistics.fmean(finite), "min": min(finite), "max": max(finite), "seeds": len(finite)}


def finals(runs: Sequence[Run], score: Score) -> dict[float, dict[int, float]]:
    """For each learning rate of one arm the final score of each seed, without runs that failed or are missing.

    A rate that no run of a setting tells is 0.
    """
    grid: dict[float, dict[int, float]] = {}
    for members in grouped(runs):
        ends = {run.seed: value for run in members if (value := score.final(run)) is not None}
        grid.setdefault(known_rate(members) or 0.0, {}).update(ends)
    return grid


def known_rate(members: Iterable[Run]) -> float | None:
    """The learning rate of runs of one setting; those that failed early do not tell."""
    return next((run.learning_rate for run in members if run.learning_rate is not None), None)


def _ranges(runs: Sequence[Run], score: Score, base: float | None) -> list[dict[str, Any]]:
    """The stable learning-rate range of each arm, and its ratio to the baseline's; see [`measures.range_ratio`].

    Only the seeds that every rate of both arms has are used.
    """
    if not score.kept or base is None or base <= 0:
        return []
    found = []
    for rest in conditions(runs):
        names = arms(runs)
        grids = {name: finals([r for r in runs if r.arm == name and condition(r) == rest], score) for name in names}
        for name in names:
            if max(len(grids[name]), len(grids[names[0]])) > 1 and grids[name]:
                found.append({"score": score.name, "arm": name, "setting": rest, **_range(grids, name, names[0], base)})
    return found


def _range(grids: Mapping[str, Mapping[float, Mapping[int, float]]], arm: str, baseline: str, base: float) -> dict:
    pair = [grids[arm], grids[baseline]]
    seeds = sorted(set.intersection(*(set(finals) for grid in pair for finals in grid.values())))
    ours, stock = ({rate: [finals[seed] for seed in seeds] for rate, finals in grid.items()} for grid in pair)
    reach = measures.stable_range(ours, base) if seeds else None
    against = measures.stable_range(stock, base) if seeds else None
    compared = bool(seeds) and arm != baseline and bool(stock)
    return {
        "rates": sorted(ours),
        "seeds": seeds,
        "range": reach,
        "at_most_tried": reach == max(ours),
        "below_lowest": bool(seeds) and reach is None,
        "baseline_range": against,
        "baseline_rates": sorted(stock),
        "ratio": measures.range_ratio(ours, stock, base) if compared else None,
        "interval": measures.range_ratio_interval(ours, stock, base) if compared else None,
    }


def _differences(runs: Sequence[Run], score: Score) -> list[dict[str, Any]]:
    """Where an arm has one learning rate: its final score less the baseline's, over the seeds that finished in both."""
    found, names = [], arms(runs)
    for rest in conditions(runs):
        ends = {name: finals([r for r in runs if r.arm == name and condition(r) == rest], score) for name in names}
        for name in names:
            if max(len(ends[name]), len(ends[names[0]])) > 1 or not ends[name]:
                continue
            ours, stock = ({**next(iter(ends[each].values()), {})} for each in (name, names[0]))
            pairs = [(ours[seed], stock[seed]) for seed in sorted(ours.keys() & stock.keys())]
            finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
            gaps = [a - b for a, b in finite] if name != names[0] else []
            found.append(
                {
                    "score": score.name,
                    "arm": name,
                    "setting": rest,
                    "learning_rate": next(iter(ends[name])) or None,
                    "seeds": len(finite),
                    "diverged": [sum(math.isnan(value) for value in each.values()) for each in (ours, stock)],
                    "final": _mean(a for a, _ in finite) if finite else _mean(ours.values()),
                    "baseline_final": _mean(b for _, b in finite) if finite else _mean(stock.values()),
                    "difference": _mean(gaps),
                    "interval": measures.bootstrap_interval(gaps) if gaps else None,
                }
            )
    return found


def _mean(values: Iterable[float]) -> float | None:
    return (_spread(values) or {}).get("mean")


def _best(groups: Sequence[Mapping[str, Any]], score: Score) -> list[dict[str, Any]]:
    """For each arm, the setting at which its mean final score is highest, among those where every seed finished."""
    found = []
    for arm in _unique(group["arm"] for group in groups):
        whole = [
            group
            for group in groups
            if group["arm"] == arm
            and group["final"][score.name]
            and sum(group["seeds"].values()) == group["seeds"]["finished"]
        ]
        if whole:
            best = max(whole, key=lambda group: group["final"][score.name]["mean"])
            entry = {name: best[name] for name in ("arm", "setting", "learning_rate")}
            found.append({"score": score.name, **entry, **best["final"][score.name], "settings": len(whole)})
    return found


def _tofu(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Forget quality and model utility of each arm at each setting: medians over seeds, and the Pareto front."""
    if not any(run.tofu for run in runs):
        return None
    base, retain = _tofu_base(runs), _tofu_retain(runs)
    utility = base and base.get("model_utility")
    points: list[dict[str, Any]] = []
    for members in grouped([run for run in methods(runs) if run.tofu]):
        seeds = [tuple(_plane(run).values()) for run in members if _placed(run)]
        if not seeds:
            continue
        points.append(
            {
                "arm": members[0].arm,
                "setting": dict(members[0].setting),
                "learning_rate": known_rate(members),
                "seeds": seeds,
                "model_utility": statistics.median(u for u, _ in seeds),
                "forget_quality": statistics.median(q for _, q in seeds),
                "reached": all(q > FORGET_QUALITY and u >= KEEP_UTILITY * utility for u, q in seeds)
                if utility
                else None,
            }
        )
    front = measures.pareto_front([(point["model_utility"], point["forget_quality"]) for point in points])
    for number, point in enumerate(points):
        point["front"] = number in front
    unplaced = _unique(run.arm for run in methods(runs) if run.status == "finished" and not _placed(run))
    return {"base": base, "retain": retain, "points": points, "not_placed": unplaced}


def _placed(run: Run) -> bool:
    return run.tofu is not None and all(run.tofu.get(name) is not None for name in PLANE)


def methods(runs: Sequence[Run]) -> list[Run]:
    """The runs without those which, in a comparison on TOFU, are no method: the model before unlearning (base or full)
    and one trained without the forget set (retain, as in retain90)."""
    on_tofu = any(run.tofu for run in runs)
    return [run for run in runs if not (on_tofu and (_is_base(run.arm) or run.arm.startswith("retain")))]


def _is_base(arm: str) -> bool:
    return arm == "base" or arm.startswith("full")


def _tofu_base(runs: Sequence[Run]) -> dict[str, float] | None:
    """The model before unlearning: an arm of the comparison, else what was evaluated where the runs started from."""
    for run in runs:
        if run.tofu and _is_base(run.arm):
            return _plane(run)
    starts = _unique(str(run.settings["model_name_or_path"]) for run in runs if "model_name_or_path" in run.settings)
    found = [run for start in starts if (run := Run("base", {}, 0, Path(start))).tofu]
    return _plane(found[0]) if len(found) == 1 else None


def _tofu_retain(runs: Sequence[Run]) -> dict[str, float] | None:
    """The model trained without the forget set, whose forget quality is 1: it is compared with itself."""
    arms = [run for run in runs if run.tofu and run.arm.startswith("retain")]
    files = [Run("retain", {}, 0, Path(run.retain).parent) for run in runs if run.retain]
    return next(({**_plane(run), "forget_quality": 1.0} for run in [*arms, *files] if run.tofu), None)


def _plane(run: Run) -> dict[str, float]:
    return {name: run.tofu[name] for name in PLANE if run.tofu and name in run.tofu}


ORIGIN = ("commit", "device", "versions")


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where the runs come from, each origin once, with the first and last date and the number of its runs."""
    outcomes = [outcome for run in runs if (outcome := run.result or run.failure) and "versions" in outcome]
    found = _unique({name: outcome.get(name) for name in ORIGIN} for outcome in outcomes)
    for entry in found:
        same = [outcome for outcome in outcomes if all(outcome.get(name) == entry[name] for name in ORIGIN)]
        dates = sorted(outcome["date"] for outcome in same if outcome.get("date"))
        entry.update(first=dates[0] if dates else None, last=dates[-1] if dates else None, runs=len(same))
    return found


def _same_origin(entry: Mapping[str, Any], run: Run) -> bool:
    outcome = run.result or run.failure or {}
    return "versions" in outcome and all(outcome.get(name) == entry[name] for name in ORIGIN)
