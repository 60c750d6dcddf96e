"""The numbers of a comparison: measures of each run, of each arm at each setting, and of the arms against the first.

The first arm is the baseline. A score is what a run should keep; the base is the model before training, step 0.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import measures
from .runs import STATUSES, Run, as_number, has_setting, setting_of, to_float

FORGET_QUALITY = 0.05  # p-value above which an unlearned model cannot be told from the retain model
KEEP_UTILITY = 0.9  # share of the base's model utility
COLLAPSED = 0.1  # share of the base's model utility below which a model is destroyed: it has forgotten everything
PLANE = ("model_utility", "forget_quality")
TOFU = (*PLANE, "forget_probability")
ENTROPIES = ("eval_sampled_entropy", "eval_entropy", "entropy")
DEFAULT_MAX_LENGTH = 1024  # of TRL's DPO
STEP_MEANS = {
    "descending": "ceu/descending_fraction",
    "descending_rare": "ceu/descending_below_0.01",
    "descending_sure": "ceu/descending_above_0.99",
    "gradient_descending": "ceu/gradient_descending",
    "gradient_rare": "ceu/gradient_below_0.01",
    "gradient_sure": "ceu/gradient_above_0.99",
    "ratio_positive": "rollout/ratio_positive",
    "ratio_negative": "rollout/ratio_negative",
    "mismatch_positive": "rollout/mismatch_positive",
    "mismatch_negative": "rollout/mismatch_negative",
}
START = ("model_name_or_path", "dataset_name", "dataset_config", "dataset_test_split")
ROWS = (*START, "max_length", "truncation_mode")
SHARED = (*ROWS, "max_steps", "num_train_epochs")  # what arms that are compared should have in common
AT_END = ("displacement", "depth", "kl", "solutions_kl", "entropy_change")  # measures of how a run ends, and pass@k
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
    "eval_world_facts_probability",
    "eval_real_authors_probability",
    "eval_solutions_nll",
    "eval_solutions_kl",
)


@dataclass(frozen=True)
class Score:
    """A score of a run, higher is better.

    Args:
        name: What it is, as in "the base's greedy accuracy".
        key: Where it is logged.
        tokens: If set, what is logged is the log-probability of that many tokens of the run in that folder, and the
            score is its geometric mean; runs that are not in it have no such score.
        kept: Whether a share of the base's value says something.
    """

    name: str
    key: str
    tokens: Mapping[Path, float] | None = None
    kept: bool = True

    def series(self, run: Run) -> list[tuple[int, float]]:
        found = ((step, self.of(run, value)) for step, value in run.series(self.key))
        return [(step, value) for step, value in found if value is not None]

    def of(self, run: Run, logged: float) -> float | None:
        if self.tokens is None:
            return logged
        count = self.tokens.get(run.folder)
        return None if count is None else math.exp(min(logged / count, 700.0))

    def base(self, runs: Iterable[Run]) -> float | None:
        """The median over runs of the value at step 0."""
        first = [value for run in runs for step, value in self.series(run)[:1] if step == 0 and math.isfinite(value)]
        return statistics.median(first) if first else None

    def bases(self, runs: Sequence[Run]) -> dict[str, float]:
        """The base of each arm in runs of one condition: that of the runs which start from the same model and are
        evaluated on the same rows, or where the arms cut the responses at different lengths, of its own alone."""
        names = arms(runs)
        own = {name: [run for run in runs if run.arm == name] for name in names}
        cut = self.tokens is not None and len(set(self.tokens.values())) > 1
        starts = {name: {_start(run) for run in own[name]} for name in names}
        like = {name: [run for run in runs if _start(run) in starts[name]] for name in names}
        found = {name: self.base(own[name] if cut else like[name]) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def final(self, run: Run) -> float | None:
        """The last value of a finished run, NaN for a diverged one, else None."""
        if run.status == "diverged":
            return math.nan
        if run.status != "finished":
            return None
        series = self.series(run)
        if series:
            return series[-1][1]
        last = as_number(((run.result or {}).get("metrics") or {}).get(self.key))
        return None if last is None else self.of(run, last)


@dataclass(frozen=True)
class WorstKept(Score):
    """The least share of its own base that a run has left of any of the scores that should be kept, 1 before training.

    Args:
        parts: Those scores, each with the base of each run by its folder.
    """

    name: str = "worst-kept score"
    key: str = "worst_kept"
    parts: Sequence[tuple[Score, Mapping[Path, float]]] = ()

    def series(self, run: Run) -> list[tuple[int, float]]:
        held = [(score, base) for score, bases in self.parts if (base := bases.get(run.folder, 0.0)) > 0]
        shares = [{step: value / base for step, value in score.series(run)} for score, base in held]
        steps = sorted(set.intersection(*map(set, shares))) if shares else []
        return [(step, float(np.min([share[step] for share in shares]))) for step in steps]


GREEDY, SAMPLED = (Score(f"{name} accuracy", f"eval_{name}_accuracy") for name in ("greedy", "sampled"))
PREFERENCE = Score("held-out preference accuracy", "eval_rewards/accuracies", kept=False)
KNOWN = tuple(
    Score(f"{name} probability", f"eval_{name.replace('-', '_')}_probability")
    for name in ("world-facts", "real-authors")
)


def find_scores(runs: Sequence[Run]) -> list[Score]:
    """The scores that there are: what was trained for, then what the model knew before.

    Where both are there and the runs learned preferences, the one of them that is kept least stands in front.
    """
    found, known = task_scores(runs), _known_scores(runs)
    if known and _logged(runs, PREFERENCE.key):
        parts = [(score, _bases_by_run(score, runs)) for score in (*found, *known) if score.kept]
        return [WorstKept(parts=parts), *found, *known]
    return [*found, *known]


def _bases_by_run(score: Score, runs: Sequence[Run]) -> dict[Path, float]:
    found: dict[Path, float] = {}
    for members in _by_condition(runs):
        bases = score.bases(members)
        found |= {run.folder: bases[run.arm] for run in members if run.arm in bases}
    return found


def _start(run: Run) -> tuple[str, ...]:
    """The model that a run starts from and the rows that it is evaluated on."""
    given = {**{name: setting_of(run.settings, name) for name in START}, **run.setting}
    return tuple(str(given[name]) for name in START)


def _logged(runs: Sequence[Run], key: str) -> bool:
    return any(run.values(key) or key in ((run.result or {}).get("metrics") or {}) for run in runs)


def _known_scores(runs: Sequence[Run]) -> list[Score]:
    """Of what `eval_facts` and `eval_solutions` name, of solutions the geometric mean of a token's probability."""
    likelihood = dict.fromkeys((run.folder for run in runs), -1.0)  # that of one token is minus the logged NLL
    solutions = Score("probability per token of solutions", "eval_solutions_nll", likelihood)
    return [score for score in (*KNOWN, solutions) if _logged(runs, score.key)]


def task_scores(runs: Sequence[Run]) -> list[Score]:
    """What was trained for: accuracy of a task, else reward, else how probable the chosen responses are."""
    if found := [score for score in (GREEDY, SAMPLED) if _logged(runs, score.key)]:
        return found
    if _logged(runs, "eval_reward"):
        return [Score("held-out reward", "eval_reward")]
    tokens = response_tokens(runs)
    probability = Score(
        "probability per token of held-out chosen responses" if tokens else "probability of held-out chosen responses",
        "eval_logps/chosen",
        {folder: counts["chosen"] for folder, counts in tokens.items()} or {run.folder: 1.0 for run in runs},
    )
    return [score for score in (probability, PREFERENCE) if _logged(runs, score.key)]


def response_tokens(runs: Sequence[Run]) -> dict[Path, dict[str, float]]:
    """Mean tokens, as the loss counts them, of the held-out chosen and rejected responses, by the folder of a run.

    A run without a result has those of a run with the same rows; empty if no run recorded any.
    """
    known = {run.folder: counts for run in runs if (counts := _counts(run))}
    counted = [run for run in runs if run.folder in known]
    for run in runs:
        if run.folder not in known and (like := next((o for o in counted if _same_rows(run, o)), None)):
            known[run.folder] = known[like.folder]
    return known


def _counts(run: Run) -> dict[str, float] | None:
    """What a run recorded; earlier versions counted before truncation, which a count above `max_length` shows."""
    recorded = (run.result or {}).get("eval_tokens") or {}
    counts = {name: as_number(recorded.get(name)) for name in ("chosen", "rejected")}
    limit = setting_of(run.settings, "max_length") if has_setting(run.settings, "max_length") else DEFAULT_MAX_LENGTH
    most = math.inf if (known := to_float(limit)) is None else known
    whole = {name: count for name, count in counts.items() if count and 0 < count <= most}
    return whole if len(whole) == len(counts) else None


def _same_rows(run: Run, other: Run) -> bool:
    if (run.arm, condition(run)) == (other.arm, condition(other)):
        return True
    both = run.settings, other.settings
    return all(both) and all(setting_of(both[0], name) == setting_of(both[1], name) for name in ROWS)


def summarize(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Everything that the report says, in numbers; not finite ones may be in it."""
    scores, tokens = find_scores(runs), response_tokens(runs)
    compared = methods(runs)
    provenance = _provenance(runs)
    records = [_record(run, scores, tokens) for run in runs]
    utility = (_tofu_base(runs) or {}).get("model_utility")
    for record, run in zip(records, runs, strict=True):
        if run.tofu:
            record["collapsed"] = _has_collapsed(run.tofu.get("model_utility"), utility)
        record["provenance"] = next((i for i, entry in enumerate(provenance) if _same_origin(entry, run)), None)
    groups = _groups(runs, records, scores)
    one_start = len({_start(run) for run in runs if run.settings}) <= 1
    return {
        "command": command,
        "arms": arms(methods(runs)),
        # None where the runs have no one base
        "base": {score.name: score.base(runs) if one_start else None for score in scores},
        "bases": {score.name: score.bases(runs) for score in scores},
        "differ": _differ(compared),
        "tokens": {run.arm: tokens[run.folder] for run in reversed(runs) if run.folder in tokens},
        "frontier": _frontiers(compared, task_scores(runs)) if is_grpo(compared) else [],
        "ranges": [entry for score in scores for entry in _ranges(compared, score)],
        "differences": [entry for score in scores for entry in _differences(compared, score)],
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


def _by_condition(runs: Sequence[Run]) -> list[list[Run]]:
    return [[run for run in runs if condition(run) == rest] for rest in conditions(runs)]


def _differ(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What arms that are compared do not share of model, data and length of training, with the value of each."""
    varied = {name for run in runs for name in run.setting}
    first = {arm: next((run for run in runs if run.arm == arm and run.settings), None) for arm in arms(runs)}
    found = {}
    for name in (field for field in SHARED if field not in varied):
        values = {arm: setting_of(run.settings, name) for arm, run in first.items() if run is not None}
        if len(_unique(values.values())) > 1:
            found[name] = values
    return found


def _unique(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _record(run: Run, scores: Sequence[Score], tokens: Mapping[Path, Mapping[str, float]]) -> dict[str, Any]:
    outcome = run.result or run.failure or {}
    return {
        "arm": run.arm,
        "setting": dict(run.setting),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "log_problem": run.log_problem,
        "command": outcome.get("command"),
        "date": outcome.get("date"),
        "final": {score.name: score.final(run) for score in scores},
        "measures": measure(run, scores, tokens),
        "curves": _curves(run),
    }


def measure(run: Run, scores: Sequence[Score], tokens: Mapping[Path, Mapping[str, float]]) -> dict[str, Any]:
    """The measures of one run; None for each whose series it did not log.

    Args:
        run: The run.
        scores: Of the comparison.
        tokens: What [`response_tokens`] returned for the comparison.
    """

    def of(series: Sequence[float], function: Callable[..., Any], *arguments: Any) -> Any:
        return function(series, *arguments) if series else None

    norms, losses = run.values("grad_norm"), run.values("loss")
    finite = [norm for norm in norms if math.isfinite(norm)]
    counts = tokens.get(run.folder) if tokens else {"chosen": 1.0, "rejected": 1.0}
    chosen, rejected = (run.values(f"eval_logps/{name}") if counts else [] for name in ("chosen", "rejected"))
    counts = counts or {}
    entropy = _entropy(run)
    score = scores[0].series(run) if scores else []
    bad = {step for key in ("loss", "grad_norm") for step, value in run.series(key) if not math.isfinite(value)}
    return {
        "grad_norm_median": of(finite, statistics.median),
        "grad_norm_largest": of(finite, max),
        "grad_norm_spikes": of(norms, lambda values: len(measures.spikes(values))),
        "loss_spikes": of(losses, lambda values: len(measures.loss_spikes(values))),
        "displacement": of(chosen, measures.displacement, counts.get("chosen")),
        "depth": of(rejected, measures.depth, counts.get("rejected")),
        "kl": of(run.values("eval_kl"), lambda values: values[-1]),
        "solutions_kl": of(run.values("eval_solutions_kl"), lambda values: values[-1]),
        "entropy_change": of(entropy, measures.change),
        **{name: of(run.values(key), lambda values: values[-1]) for name, key in passes([run]).items()},
        **{name: of(_finite(run.values(key)), statistics.fmean) for name, key in STEP_MEANS.items()},
        "drawdown": of([value for _, value in score], measures.drawdown),
        "collapse_step": of(
            [v for _, v in score], lambda values: measures.collapse_step([t for t, _ in score], values)
        ),
        "non_finite_steps": len(bad) if norms or losses else None,
        **{name: (run.tofu or {}).get(name) for name in TOFU},
        "seconds_per_step": _seconds_per_step(run),
        "peak_memory_gib": (run.result or {}).get("peak_memory_gib"),
    }


def _entropy(run: Run) -> list[float]:
    return next((values for key in ENTROPIES if (values := run.values(key))), [])


def passes(runs: Iterable[Run]) -> dict[str, str]:
    """The pass@k that were logged and their keys, by k."""
    keys = {key for run in runs for entry in run.log for key in entry if re.fullmatch(r"eval_pass@\d+", key)}
    return {key.removeprefix("eval_"): key for key in sorted(keys, key=lambda key: int(key.split("@")[1]))}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _seconds_per_step(run: Run) -> float | None:
    """Of training with its evaluations; None for a run that was resumed, whose clock started again."""
    result = run.result or {}
    seconds, steps = (result.get("metrics") or {}).get("train_runtime"), result.get("steps")
    if not seconds or not steps or "--resume_from_checkpoint" in (result.get("command") or ""):
        return None
    return seconds / steps


def _curves(run: Run) -> dict[str, list[Any]]:
    """The evaluations by step; None where one key was not logged at a step."""
    series = {key: dict(run.series(key)) for key in (*CURVES, *passes([run]).values())}
    steps = sorted({step for values in series.values() for step in values})
    found = {key: [values.get(step) for step in steps] for key, values in series.items() if values}
    return {"step": steps, **found} if steps else {}


def _groups(runs: Sequence[Run], records: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Each arm at each setting over its seeds, with time and memory as ratios to the baseline at the same setting."""
    groups, of_run = [], {id(run): record for run, record in zip(runs, records, strict=True)}
    bases = {score.name: _bases_by_run(score, runs) for score in scores}
    for members in grouped(runs):
        found = [of_run[id(run)] for run in members]
        groups.append(
            {
                "arm": members[0].arm,
                "setting": dict(members[0].setting),
                "learning_rate": known_rate(members),
                "seeds": {status: sum(r["status"] == status for r in found) for status in STATUSES},
                "final": {score.name: _spread(r["final"][score.name] for r in found) for score in scores},
                "base": {score.name: bases[score.name].get(members[0].folder) for score in scores},
                "dead": sum(bool(r.get("collapsed")) for r in found),
                **_over_seeds([_counted(r) for r in found]),
            }
        )
    baseline = arms(methods(runs))[:1]
    stock = {str(group["setting"]): group for group in groups if group["arm"] in baseline}
    for group in groups:
        for name in ("seconds_per_step", "peak_memory_gib"):
            ours, theirs = group[name], stock.get(str(group["setting"]), {}).get(name)
            group[f"{name}_ratio"] = ours / theirs if ours and theirs else None
    return groups


def _counted(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of the measures of a run counts in its group: nothing of one that failed or still trains, whose log is cut
    short, and of one that diverged nothing of how it ended, as of its scores."""
    measured = record["measures"]
    if record["status"] == "finished":
        return dict(measured)
    if record["status"] != "diverged":
        return dict.fromkeys(measured)
    return {name: None if name in AT_END or name.startswith("pass@") else each for name, each in measured.items()}


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
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each[name] for each in found if each.get(name) is not None and math.isfinite(each[name])]
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


def _ranges(runs: Sequence[Run], score: Score) -> list[dict[str, Any]]:
    """The stable learning-rate range of each arm, and its ratio to the baseline's; see [`measures.range_ratio`].

    Only the seeds that every rate of both arms has are used, and each arm is held against its own base.
    """
    found: list[dict[str, Any]] = []
    if not score.kept:
        return found
    for members in _by_condition(runs):
        names, rest, bases = arms(runs), condition(members[0]), score.bases(members)
        if not bases or min(bases.values()) <= 0:
            continue
        grids: dict[str, dict[float, dict[int, float]]] = {name: {} for name in names}
        for name in bases:
            ends = finals([run for run in members if run.arm == name], score)
            grids[name] = {r: {seed: end / bases[name] for seed, end in each.items()} for r, each in ends.items()}
        for name in names:
            if max(len(grids[name]), len(grids[names[0]])) > 1 and grids[name]:
                found.append({"score": score.name, "arm": name, "setting": rest, **_range(grids, name, names[0])})
    return found


def _range(grids: Mapping[str, Mapping[float, Mapping[int, float]]], arm: str, baseline: str) -> dict[str, Any]:
    """Of scores as shares of the base."""
    base = 1.0
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
        "lost_below": measures.lost_below(ours, base) if seeds else [],
        "below_lowest": bool(seeds) and reach is None,
        "baseline_range": against,
        "baseline_lost_below": measures.lost_below(stock, base) if seeds else [],
        "baseline_rates": sorted(stock),
        "ratio": measures.range_ratio(ours, stock, base) if compared else None,
        "interval": measures.range_ratio_interval(ours, stock, base) if compared else None,
    }


def is_grpo(runs: Iterable[Run]) -> bool:
    """Whether a reward is what the runs were trained for."""
    return any(run.method == "grpo" or run.values("reward") for run in runs)


def _frontiers(runs: Sequence[Run], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Reward against divergence from the start for each condition: what a run gets, and how far it went for it."""
    reward = next(
        (score for score in reversed(scores) if score.kept), None
    )  # sampled as the rollouts are, if it is there
    if reward is None:
        return []
    found = []
    for rest in conditions(runs):
        members = [run for run in runs if condition(run) == rest]
        points = [point for each in grouped(members) if (point := _frontier_point(each, reward))]
        if points:
            base = reward.base(members)
            whole = [point for point in points if not point["diverged"]]
            found.append(
                {
                    "score": reward.name,
                    "setting": rest,
                    "base": base,
                    "points": points,
                    "equal": _at_equal_reward(whole, arms(runs), base),
                }
            )
    return found


def _frontier_point(members: Sequence[Run], reward: Score) -> dict[str, Any] | None:
    """One arm at one setting: means over the seeds that finished with intervals at the end, and on the way there."""
    diverged = sum(run.status == "diverged" for run in members)
    members = [run for run in members if run.status == "finished"]
    ends: dict[int, tuple[float, float]] = {}
    paths: list[dict[int, tuple[float, float]]] = []
    for run in members:
        divergence, score = dict(divergences(run)), dict(reward.series(run))
        path = {step: (divergence[step], score[step]) for step in sorted(divergence.keys() & score.keys())}
        if path and all(map(math.isfinite, (last := path[max(path)]))):
            ends[run.seed] = last
            paths.append(path)
    if not ends:
        return None
    steps = sorted(set.intersection(*(set(path) for path in paths)))
    columns = [[end[place] for end in ends.values()] for place in (0, 1)]
    means = [statistics.fmean(column) for column in columns]
    intervals = [measures.bootstrap_interval(column) for column in columns]
    return {
        "arm": members[0].arm,
        "setting": dict(members[0].setting),
        "learning_rate": known_rate(members),
        "divergence": means[0],
        "divergence_interval": intervals[0],
        "reward": means[1],
        "reward_interval": intervals[1],
        "seeds": {str(seed): list(end) for seed, end in ends.items()},
        "diverged": diverged,
        "entropy_change": _mean(measures.change(values) for run in members if (values := _entropy(run))),
        "passes": {
            name: _mean(values[-1] for run in members if (values := run.values(key)))
            for name, key in passes(members).items()
        },
        "path": [
            [step, *(statistics.fmean(path[step][place] for path in paths) for place in (0, 1))]
            for step in steps
            if all(math.isfinite(value) for path in paths for value in path[step])
        ],
    }


def divergences(run: Run) -> list[tuple[int, float]]:
    """Divergence from the model at the start by step, in nats per token: of the evaluations, else of training."""
    return run.series("eval_kl") or run.series("kl")


def _at_equal_reward(
    points: Sequence[Mapping[str, Any]], names: Sequence[str], base: float | None
) -> list[dict[str, Any]]:
    """Each arm against the first: the divergence at which each has the reward that both reach.

    That reward is the lower of the two arms' best, and an arm's divergence the least of its settings that end with at
    least that much. The interval draws the seeds with replacement, the same for both arms and all settings, and looks
    for reward and settings anew in each resample.
    """
    found = []
    for name in names[1:]:
        pair = [[point for point in points if point["arm"] == arm] for arm in (name, names[0])]
        if not all(pair):
            continue
        seeds = sorted(set.intersection(*(set(point["seeds"]) for each in pair for point in each)))
        if not seeds:
            continue
        grids = [np.array([[point["seeds"][seed] for seed in seeds] for point in each]) for each in pair]
        target, places, ends = _cheapest(grids)
        compared = (base is None or target > base) and min(ends) > 0

        def ratio(drawn: np.ndarray, grids: Sequence[np.ndarray] = grids) -> float:
            _, _, (ours, stock) = _cheapest([grid[:, drawn] for grid in grids])
            return ours / stock if stock > 0 else math.inf

        found.append(
            {
                "arm": name,
                "reward": target,
                "seeds": len(seeds),
                "divergence": ends[0],
                "baseline_divergence": ends[1],
                "setting": pair[0][places[0]]["setting"],
                "baseline_setting": pair[1][places[1]]["setting"],
                "ratio": ends[0] / ends[1] if compared else None,
                "interval": measures.bootstrap_interval(range(len(seeds)), ratio) if compared else None,
            }
        )
    return found


def _cheapest(grids: Sequence[np.ndarray]) -> tuple[float, list[int], list[float]]:
    """The reward that both arms reach, and for each the place and the divergence of its setting that has it for least.

    Args:
        grids: For each arm (settings, seeds, 2): divergence and reward.
    """
    means = [grid.mean(axis=1) for grid in grids]
    target = min(float(mean[:, 1].max()) for mean in means)
    places = [int(np.where(mean[:, 1] >= target, mean[:, 0], np.inf).argmin()) for mean in means]
    return target, places, [float(mean[place, 0]) for mean, place in zip(means, places, strict=True)]


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
    utility = (base or {}).get("model_utility")
    points: list[dict[str, Any]] = []
    retains = _unique(run.retain for run in methods(runs) if _placed(run))
    for members in grouped(methods(runs)):
        seeds = [tuple(_plane(run).values()) for run in members if _placed(run)]
        if not seeds:
            continue
        diverged = sum(run.status == "diverged" for run in members)
        points.append(
            {
                "arm": members[0].arm,
                "setting": dict(members[0].setting),
                "learning_rate": known_rate(members),
                "seeds": seeds,
                "model_utility": statistics.median(u for u, _ in seeds),
                "forget_quality": statistics.median(q for _, q in seeds),
                "collapsed": sum(_has_collapsed(u, utility) for u, _ in seeds),
                "diverged": diverged,
                "reached": not diverged and all(q > FORGET_QUALITY and u >= KEEP_UTILITY * utility for u, q in seeds)
                if utility
                else None,
            }
        )
    # Forget qualities against different retain models are no coordinates of one plane
    alive = [point for point in points if not point["collapsed"] and not point["diverged"] and len(retains) == 1]
    front = measures.pareto_front([(point["model_utility"], point["forget_quality"]) for point in alive])
    for point in points:
        point["front"] = any(point is alive[number] for number in front)
    unplaced = _unique(run.arm for run in methods(runs) if run.status == "finished" and not _placed(run))
    return {"base": base, "retain": retain, "retains": retains, "points": points, "not_placed": unplaced}


def _has_collapsed(utility: float | None, base: float | None) -> bool:
    """Whether a model's utility is below a tenth of the base's: what it scores of forgetting then says nothing."""
    return utility is not None and base is not None and utility < COLLAPSED * base


def _placed(run: Run) -> bool:
    return run.tofu is not None and all(run.tofu.get(name) is not None for name in PLANE)


def methods(runs: Sequence[Run]) -> list[Run]:
    """The runs without those which, in a comparison on TOFU, are no method: the model before unlearning (base or full)
    and one trained without the forget set (retain, as in retain90)."""
    on_tofu = any(run.tofu for run in runs)
    return [run for run in runs if not (on_tofu and (_is_base(run) or _is_retain(run)))]


def _is_base(run: Run) -> bool:
    return (run.arm == "base" or run.arm.startswith("full")) and run.method in (None, "sft")


def _is_retain(run: Run) -> bool:
    return run.arm.startswith("retain") and run.method in (None, "sft")


def _tofu_base(runs: Sequence[Run]) -> dict[str, float] | None:
    """The model before unlearning: an arm of the comparison, else what was evaluated where the runs started from, else
    what the evaluations recorded of it."""
    for run in runs:
        if run.tofu and _is_base(run):
            return _around(run)
    starts = _unique(str(run.settings["model_name_or_path"]) for run in runs if "model_name_or_path" in run.settings)
    found = [run for start in starts if (run := Run("base", {}, 0, Path(start))).tofu]
    if len(found) == 1:
        return _around(found[0])
    known = {utility for run in runs if (utility := run.base_utility) is not None}
    return {"model_utility": known.pop()} if len(known) == 1 else None


def _tofu_retain(runs: Sequence[Run]) -> dict[str, float] | None:
    """The model trained without the forget set, whose forget quality is 1: it is compared with itself."""
    arms = [run for run in runs if run.tofu and _is_retain(run)]
    files = [Run("retain", {}, 0, Path(run.retain).parent) for run in runs if run.retain]
    return next(({**_around(run), "forget_quality": 1.0} for run in [*arms, *files] if run.tofu), None)


def _plane(run: Run) -> dict[str, float]:
    return {name: run.tofu[name] for name in PLANE if run.tofu and name in run.tofu}


def _around(run: Run) -> dict[str, float]:
    """Of a model that the methods are held against."""
    return {name: run.tofu[name] for name in TOFU if run.tofu and name in run.tofu}


ORIGIN = ("commit", "device", "versions")


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where the runs come from, each origin once, with the first and last date and the number of its runs."""
    outcomes = [outcome for run in runs if (outcome := run.result or run.failure) and outcome.get("versions")]
    found = _unique({name: outcome.get(name) for name in ORIGIN} for outcome in outcomes)
    for entry in found:
        same = [outcome for outcome in outcomes if all(outcome.get(name) == entry[name] for name in ORIGIN)]
        dates = sorted(outcome["date"] for outcome in same if outcome.get("date"))
        entry.update(first=dates[0] if dates else None, last=dates[-1] if dates else None, runs=len(same))
    return found


def _same_origin(entry: Mapping[str, Any], run: Run) -> bool:
    outcome = run.result or run.failure or {}
    return bool(outcome.get("versions")) and all(outcome.get(name) == entry[name] for name in ORIGIN)
