"""The report of a comparison: `report.html` to read, `report.json` with every number, and a table in the terminal.

[`write_report`] reads the folders of the runs and nothing else. `report.json` is one mapping, which a plain reader
understands; numbers that are not finite are None:

    format       2
    command, verdict                       the command that made it, and the sentences
    arms         name, method, recipe, differs (the fields in which its recipe is not the first arm's)
    scores       the names of the scores
    groups       each arm at each setting: arm, setting, rate, seeds (by status), scores (mean, min, max, base, and
                 whether 95 % of the base's are `kept`, with the interval of score - 0.95 base), measures
    comparisons  each arm against the first: score, both settings and finals, the paired difference and its interval
    planes       points of forget quality and model utility, or of reward and divergence
    provenance   commit, versions, device, first and last date, number of runs
    runs         arm, setting, seed, method, status, reason, final scores, metrics (the last logged), curves (step, and
                 a list for each metric), held_out (columns of the rows at the last step), eval_tokens, wall_time_s,
                 peak_memory_gib, measures, summary (of TOFU or MUSE), place of its provenance
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from rich import box, markup
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from . import figures
from .runs import RECORD, STATUSES, Run, key_of, rate, write_whole
from .table import (
    REWARD,
    STEP_MEANS,
    Score,
    Table,
    collapse_step,
    drawdown,
    loss_spikes,
    number,
    pareto_front,
    setting_name,
    spikes,
    unique,
)

FORGET_QUALITY = 0.05  # p-value above which an unlearned model cannot be told from the retain model
KEEP_UTILITY, COLLAPSED = 0.9, 0.1  # shares of the base's model utility: to be kept, and below which nothing is left
ORIGIN = ("commit", "device", "versions")
TOFU = ("model_utility", "forget_quality", "ks_distance", "forget_probability")
# The measures in the table: heading, definition
SHOWN = {
    "model_utility": ("model utility", "Of TOFU: harmonic mean of nine scores off the forget set."),
    "forget_quality": ("forget quality", "Of TOFU: p-value that the model cannot be told from the retain model."),
    "ks_distance": ("KS distance", "Of TOFU: the Kolmogorov-Smirnov distance behind the forget quality, 0 to 1."),
    "forget_probability": ("forget probability", "Of TOFU: probability per token of the answers to forget."),
    "kl": ("KL", "Divergence from the model before training at the end, in nats per token."),
    "displacement": ("displacement", "Change of the chosen responses' log-probability (2410.08847)."),
    "grad_norm_largest": ("largest gradient norm", "Before clipping, of all steps and seeds."),
    "seconds_per_step": ("seconds per step", "Of training with its evaluations."),
}
COUNTS = ("grad_norm_spikes", "loss_spikes", "non_finite_steps")
AT_END = ("kl", "displacement", "depth", "solutions_kl", "entropy_change", "pass")  # nothing, of a run that diverged


def write_report(folder: Path, runs: Sequence[Run], console: Console, command: str) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a folder, and print the verdict and the table.

    Args:
        folder: Where to write; it is made if it is not there.
        runs: The runs of the comparison, the baseline's arm first. They may have failed or be missing.
        console: Where to print.
        command: The command that made the comparison, for the report.

    Returns:
        What `report.json` holds.
    """
    table = Table(runs)
    report = summarize(table, command)
    _print(report, console)
    plain = _clean(report)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plain.items()]
    files = {"report.html": _html(folder, table, report), "report.json": "{\n" + ",\n".join(lines) + "\n}\n"}
    write_whole({folder / name: text for name, text in files.items()})
    console.print(f"Report: {folder / 'report.html'}, numbers: {folder / 'report.json'}", markup=False, soft_wrap=True)
    return plain


def _clean(value: Any) -> Any:
    """The same with None for numbers that are not finite, six significant digits for the others, and plain keys."""
    if isinstance(value, Mapping):
        return {str(key): _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


# The numbers


def summarize(table: Table, command: str) -> dict[str, Any]:
    """Everything that the report says, in numbers; not finite ones may be in it."""
    runs, compared, provenance = table.runs, _compared(table.runs), _provenance(table.runs)
    measured = [measure(table, place) for place in range(len(runs))]
    groups = _groups(table, measured)
    report: dict[str, Any] = {
        "format": 2,
        "command": command,
        "verdict": [],
        "arms": _arms([*(runs[p] for p in compared), *(run for p, run in enumerate(runs) if p not in compared)]),
        "scores": [score.name for score in table.scores],
        "rows": {score.name: _rows(table, score) for score in table.scores},
        "groups": groups,
        "comparisons": _comparisons(table, compared),
        "planes": _tofu_plane(runs, compared, groups) or _frontiers(table, compared, groups),
        "provenance": [{name: value for name, value in entry.items() if name != "of"} for entry in provenance],
        "runs": [_record(table, place, measured[place], provenance) for place in range(len(runs))],
    }
    report["verdict"] = verdict(report)
    return report


def _compared(runs: Sequence[Run]) -> list[int]:
    """On TOFU the model before unlearning and the one trained without the forget set stand beside the methods."""
    on_tofu = any("model_utility" in run.summary for run in runs)
    return [place for place, run in enumerate(runs) if not (on_tofu and run.method == "sft")]


def _arms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each arm, and the fields in which its recipe is not the first arm's."""
    first = {run.arm: run for run in reversed(runs)}
    varied = {name for run in runs for name in run.setting} | {"seed", "output_dir", "run_name"}
    base, found = runs[0].settings if runs else {}, []
    for arm in unique(run.arm for run in runs):
        run, settings = first[arm], first[arm].settings
        names = [name for name in {**settings, **base} if name not in varied and settings.get(name) != base.get(name)]
        recipe = (run.record(RECORD) or run.planned).get("recipe")
        differs = {name: settings.get(name) for name in names} if settings else {}
        found.append({"name": arm, "method": run.method, "recipe": recipe, "differs": differs})
    return found


def _rows(table: Table, score: Score) -> int | None:
    """How many held-out rows a score is of, where all runs agree."""
    cells = table.cells[(table.cells.score == score.name) & (table.cells.row != "")]
    counts = set(map(int, cells.groupby("run").size()))
    counts = counts or {run.outcome["eval_rows"] for run in table.runs if run.outcome.get("eval_rows") is not None}
    return counts.pop() if len(counts) == 1 else None


def measure(table: Table, place: int) -> dict[str, Any]:
    """The measures of one run by their names; without those whose series it did not log."""
    run = table.runs[place]

    def of(metric: str, function: Callable[[Any], Any], finite: bool = True) -> Any:
        series = table.series(place, metric)
        series = series[np.isfinite(series)] if finite else series
        return function(series) if len(series) else None

    def last(series: Any) -> float:
        return series.iloc[-1]

    def change(series: Any) -> float:
        return float(series.iloc[-1] - series.iloc[0])

    losses = [table.series(place, key) for key in ("loss", "grad_norm")]
    bad = {step for series in losses for step in series.index[~np.isfinite(series)]}
    result, first = run.outcome, table.scores[0].name if table.scores else ""
    seconds, steps = (result.get("metrics") or {}).get("train_runtime"), result.get("steps")
    found = {
        **{name: run.summary.get(name) for name in TOFU},
        **{key.removeprefix("eval_"): of(key, last) for key in _passes(table)},
        "kl": of("eval_kl" if len(table.series(place, "eval_kl")) else "kl", last, False),
        "displacement": of("chosen", change, False),
        "depth": of("rejected", lambda s: -last(s), False),
        "solutions_kl": of("eval_solutions_kl", last, False),
        "entropy_change": of("entropy at evaluations", change, False),
        "grad_norm_largest": of("grad_norm", max),
        "grad_norm_median": of("grad_norm", np.median),
        "grad_norm_spikes": of("grad_norm", lambda s: len(spikes(list(s))), False),
        "loss_spikes": of("loss", lambda s: len(loss_spikes(list(s))), False),
        "non_finite_steps": len(bad) if any(len(series) for series in losses) else None,
        "drawdown": of(first, drawdown),
        "collapse_step": of(first, lambda s: collapse_step(list(s.index), list(s))),
        # the clock of a resumed run started again
        "seconds_per_step": seconds / steps if seconds and steps and not result.get("resumed") else None,
        "peak_memory_gib": result.get("peak_memory_gib"),
        **{key: of(key, np.mean) for key in STEP_MEANS},
    }
    return {name: value for name, value in found.items() if value is not None}


def _passes(table: Table) -> list[str]:
    keys = [key for key in table.values.metric.unique() if re.fullmatch(r"eval_pass@\d+", key)]
    return sorted(keys, key=lambda key: int(key.removeprefix("eval_pass@")))


def _groups(table: Table, measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm at each setting over its seeds, by condition, then learning rate, then arm."""
    runs, groups = table.runs, []
    arms, conditions = unique(run.arm for run in runs), unique(run.condition for run in runs)
    rates = [np.nan_to_num(run.rate) if "learning_rate" in run.setting else 0.0 for run in runs]
    keys = [(conditions.index(r.condition), each, arms.index(r.arm)) for r, each in zip(runs, rates, strict=True)]
    for key in sorted(set(keys)):
        members = [place for place, each in enumerate(keys) if each == key]
        first, status = runs[members[0]], [runs[place].status for place in members]
        scores = {}
        for score in table.scores:
            ends, loss = table.ends_of(members, score), table.loss(members, score)
            finals = ends.final[np.isfinite(ends.final)]
            scores[score.name] = {
                **finals.agg(["mean", "min", "max"]),
                **{"base": ends.base.median(), "seeds": len(finals)},
                **{name: loss[name] for name in ("rows", "interval", "kept")},
            }
        counted = [  # of a run that diverged, what is measured at the end says nothing
            {n: v for n, v in measured[p].items() if runs[p].status == "finished" or n.split("@")[0] not in AT_END}
            for p in members
            if runs[p].status in ("finished", "diverged")
        ]
        group = {
            "arm": first.arm,
            "setting": dict(first.setting),
            "rate": first.rate if math.isfinite(first.rate) else None,
            "runs": members,
            "seeds": {each: status.count(each) for each in STATUSES},
            "scores": scores,
            "measures": _over_seeds(counted),
        }
        groups.append(group)
    return groups


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Largest gradient norm, sums of counts, earliest collapse, medians of the rest."""
    rules = {"grad_norm_largest": "max", "collapse_step": "min", **dict.fromkeys(COUNTS, "sum")}
    frame = pd.DataFrame(found).astype(float)
    frame = frame.where(np.isfinite(frame)).dropna(axis=1, how="all")
    return {name: float(frame[name].agg(rules.get(name, "median"))) for name in frame}


def _comparisons(table: Table, compared: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm against the first, at the setting that both have, or each at its own best learning rate."""
    runs, found = table.runs, []
    arms = unique(runs[place].arm for place in compared)
    conditions = unique(runs[place].condition for place in compared)
    for score, condition in itertools.product(table.scores, conditions):
        own = {arm: [p for p in compared if runs[p].arm == arm and runs[p].condition == condition] for arm in arms}
        best = {arm: _best(table, places, score) for arm, places in own.items()}
        for arm in arms[1:]:
            groups = best[arm], best[arms[0]]
            if all(groups):
                about = {
                    **{"score": score.name, "lower": score.lower, "arm": arm, "baseline": arms[0]},
                    "settings": [dict(runs[group[0]].setting) for group in groups],
                    "best_of": max(len({runs[p].rate for p in own[each]}) for each in (arm, arms[0])),
                    "finals": [table.ends_of(group, score).final.mean() for group in groups],
                    "diverged": [sum(runs[p].status == "diverged" for p in group) for group in groups],
                }
                found.append(about | table.difference(*groups, score))
    return found


def _best(table: Table, places: Sequence[int], score: Score) -> list[int]:
    """The runs of an arm at its best setting, of those at which every seed finished; all of them if it has one."""
    ends = table.ends_of(places, score)
    groups = [group for _, group in ends.groupby("setting", sort=False)]
    whole = [group for group in groups if len(groups) == 1 or (group.status == "finished").all()]
    means = [(group.final.mean() * (-1 if score.lower else 1), list(group.run)) for group in whole]
    return max((each for each in means if not math.isnan(each[0])), default=(0.0, []))[1]


def _tofu_plane(runs: Sequence[Run], compared: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Forget quality and model utility: medians over seeds, and the Pareto front."""
    if not any("model_utility" in run.summary for run in runs):
        return []
    evaluated = [p for p in compared if {"model_utility", "forget_quality"} <= set(runs[p].summary)]
    retains = unique(str((runs[p].record("tofu_eval.json") or {}).get("retain")) for p in evaluated)
    (base, around), points = _around(runs), []
    for group in groups:
        members = [runs[p].summary for p in group["runs"] if p in evaluated]
        seeds = [(summary["model_utility"], summary["forget_quality"]) for summary in members]
        if not seeds:
            continue
        collapsed = sum(base is not None and utility < COLLAPSED * base for utility, _ in seeds)
        diverged, reached = group["seeds"]["diverged"], None
        if base is not None:
            reached = not diverged and all(q > FORGET_QUALITY and u >= KEEP_UTILITY * base for u, q in seeds)
        point = _point(group, seeds, np.median, bool(collapsed or diverged))
        points.append({**point, "collapsed": collapsed, "reached": reached})
    alive = [point for point in points if not point["lost"] and len(retains) == 1]
    for place in pareto_front([(point["x"], point["y"]) for point in alive]):
        alive[place]["front"] = True
    plane = {
        **{"kind": "tofu", "x": "model utility", "y": "forget quality (p-value)", "logarithmic": True, "setting": {}},
        **{"x_line": KEEP_UTILITY * base if base is not None else None, "y_line": FORGET_QUALITY},
        **{"base": base, "around": around, "retains": retains, "points": points},
        "missing": unique(runs[p].arm for p in compared if runs[p].status == "finished" and p not in evaluated),
    }
    return [plane]


def _around(runs: Sequence[Run]) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """The model utility before unlearning, and what stands on the plane beside the methods."""
    results = [run.record("tofu_eval.json") or {} for run in runs]
    recorded = {result.get("base", {}).get("model_utility") for result in results} - {None}

    def summary(arms: tuple[str, ...], folders: Iterable[Path]) -> Mapping[str, float]:
        there = [run for run in runs if run.method == "sft" and run.arm.startswith(arms)]
        there += [Run("", {}, 0, folder) for folder in unique(folders)]
        return next((run.summary for run in there if "model_utility" in run.summary), {})

    starts = (Path(str(run.settings.get("model_name_or_path"))) for run in runs if run.method != "sft")
    base = summary(("base", "full"), starts)
    retain = summary(("retain",), (Path(result["retain"]).parent for result in results if result.get("retain")))
    around: dict[str, Any] = {"before unlearning": (base.get("model_utility"), base.get("forget_quality"))}
    around["retain model"] = (retain.get("model_utility"), 1.0)
    utility = base.get("model_utility", recorded.pop() if len(recorded) == 1 else None)
    return utility, {name: at for name, at in around.items() if None not in at}


def _point(group: Mapping[str, Any], seeds: Sequence[Any], middle: Callable[..., Any], lost: bool) -> dict[str, Any]:
    x, y = (float(middle([seed[place] for seed in seeds])) for place in (0, 1))
    about = {name: group[name] for name in ("arm", "setting", "rate")}
    return {**about, "x": x, "y": y, "seeds": [list(map(float, seed)) for seed in seeds], "lost": lost, "front": False}


def _frontiers(table: Table, compared: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reward against divergence from the start for each condition: what a run gets, and how far it went for it."""
    task = [score for score in table.scores if score.kept and (score == REWARD or "accuracy" in score.name)]
    if not task or not any(table.runs[p].method == "grpo" for p in compared):
        return []
    planes: dict[str, dict[str, Any]] = {}
    for group in groups:
        condition, ways = table.runs[group["runs"][0]].condition, []
        for p in (p for p in group["runs"] if table.runs[p].status == "finished"):
            axes = [table.series(p, "eval_kl"), table.series(p, task[-1].name)]
            ways.append(pd.concat(axes, axis=1, keys=["x", "y"], join="inner"))
        ways = [way for way in ways if len(way)]
        if ways:
            about: dict[str, Any] = {"kind": "frontier", "logarithmic": False, "around": {}, "setting": condition}
            about |= {"x": "divergence from the start, nats per token", "y": task[-1].name, "points": []}
            path = sum(ways[1:], ways[0]).dropna() / len(ways)  # the steps that all have
            ends = [way.iloc[-1].tolist() for way in ways]
            point = _point(group, ends, np.mean, group["seeds"]["diverged"] > 0)
            plane = planes.setdefault(str(condition), about)
            plane["points"].append({**point, "path": path.to_numpy().tolist()})
    return list(planes.values())


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where the runs come from, each origin once: its runs (`of`), their number, the first and last date."""
    found: dict[str, dict[str, Any]] = {}
    for place, outcome in enumerate(run.outcome for run in runs):
        if outcome.get("versions"):
            origin = {name: outcome.get(name) for name in ORIGIN}
            entry = found.setdefault(key_of(origin), {**origin, "first": None, "last": None, "runs": 0, "of": []})
            entry["of"].append(place)
            dates = [date for date in (entry["first"], entry["last"], outcome.get("date")) if date]
            entry |= {"first": min(dates, default=None), "last": max(dates, default=None), "runs": len(entry["of"])}
    return list(found.values())


def _record(table: Table, place: int, measures: Mapping[str, Any], provenance: Sequence[Any]) -> dict[str, Any]:
    run, outcome = table.runs[place], table.runs[place].outcome
    own = table.values[(table.values.run == place) & table.values.metric.str.startswith("eval_")]
    curves = own.pivot_table(index="step", columns="metric", values="value", dropna=False)
    ends = table.ends[table.ends.run == place]
    rows = table.held_out[table.held_out.run == place].drop(columns=["run", "dataset"], errors="ignore")
    rows = rows[rows.step == rows.step.max()].dropna(axis=1, how="all")
    return {
        **{name: getattr(run, name) for name in ("arm", "setting", "seed", "rate")},
        **{name: getattr(run, name) for name in ("method", "status", "reason", "log_problem")},
        **{name: outcome.get(name) for name in ("steps", "resumed", "eval_tokens", "wall_time_s", "peak_memory_gib")},
        **{name: outcome.get(name) for name in ("command", "date", "metrics")},
        "final": dict(zip(ends.score, ends.final, strict=True)),
        "measures": dict(measures),
        "summary": run.summary,
        "curves": {"step": list(curves.index), **curves.to_dict("list")} if len(own) else {},
        "held_out": {"step": int(rows.pop("step").iloc[0]), **rows.to_dict("list")} if len(rows) else {},
        "provenance": next((number for number, entry in enumerate(provenance) if place in entry["of"]), None),
    }


# The verdict


def verdict(report: Mapping[str, Any]) -> list[str]:
    """What the numbers carry, in sentences: a difference is told only where a paired interval carries it."""
    runs = report["runs"]
    finished = [run for run in runs if run["status"] == "finished"]
    open_ = [run for run in runs if run["status"] in ("running", "waiting", "interrupted")]
    head = []
    if open_:
        going = [run for run in open_ if run["status"] == "running"]
        now = "".join(f"; {run['arm']}{_at(run['setting'])} is running: {run['reason']}" for run in going[:3])
        head = [f"{len(finished)} of {len(runs)} runs finished{now}".rstrip(".") + "."]
    told = [each for plane in report["planes"] if plane["kind"] == "tofu" for each in _tofu_sentences(plane)]
    told += _kept(report) + _told(report["comparisons"])
    if not finished and not open_:
        told = ["No run has finished, so there is nothing to compare." if runs else "There are no runs to compare."]
    elif finished and not report["scores"] and not report["planes"]:
        told.append("No run logged an evaluation, so there is no score: set eval_strategy and eval_on_start.")
    elif finished and not told and not open_:
        name = report["scores"][0]
        ends = [f"{_name(group)} {number(group['scores'][name]['mean'])}" for group in report["groups"]]
        told.append(f"No difference between the arms is told apart: {name} at the end: {', '.join(ends)}.")
    return head + told + _left_out(runs)


def _at(setting: Mapping[str, Any]) -> str:
    return f" ({setting_name(setting)})" if setting else ""


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['arm']}{_at(entry['setting'])}"


def _told(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each score and setting of the first arm; first those in which a difference is told apart."""
    told: dict[str, list[str]] = {}
    sure = set()
    for entry in comparisons:
        low, high = entry["interval"] or (math.nan, math.nan)
        seeds = f"{entry['seeds']} seed{'s' if entry['seeds'] != 1 else ''}"
        over = f"95 % interval over {seeds}" + (f" and {entry['rows']} rows" if entry["rows"] else "")
        by = f"by {number(entry['difference'])}, {over} {number(low)} to {number(high)}"
        best = ", each arm at its own best rate on these rows" if entry["best_of"] > 1 else ""
        score = entry["score"][0].upper() + entry["score"][1:]
        head = f"{score}, {entry['baseline']}{_at(entry['settings'][1])} {number(entry['finals'][1])}{best}"
        if entry["interval"] is None:
            outcome = "has no interval (one seed, no rows)"
        elif low <= 0 <= high:
            outcome = f"is not told apart ({by})"
        else:
            outcome = f"is {'higher' if low > 0 else 'lower'} ({by})"
            sure.add(head)
        lost = zip((entry["arm"], entry["baseline"]), entry["diverged"], strict=True)
        outcome += "".join(f", {count} of {name}'s seeds diverged" for name, count in lost if count)
        arm = f"{entry['arm']}{_at(entry['settings'][0])} {number(entry['finals'][0])}"
        told.setdefault(head, []).append(f"{arm} {outcome}")
    return [f"{head}: {'; '.join(told[head])}." for head in sorted(told, key=lambda head: head not in sure)]


def _kept(report: Mapping[str, Any]) -> list[str]:
    """At which learning rates each arm keeps 95 % of the base's score."""
    kept: dict[str, dict[str, dict[float, bool | None]]] = {}  # by score and condition, arm and rate
    for score, group in itertools.product(report["scores"], report["groups"]):
        if group["rate"]:
            setting = {name: value for name, value in group["setting"].items() if name != "learning_rate"}
            by_rate = kept.setdefault(f"{score}{_at(setting)}", {}).setdefault(group["arm"], {})
            by_rate[group["rate"]] = group["scores"][score]["kept"]
    found = []
    for score, arms in kept.items():
        said = [f"{arm} {_rates(each)}" for arm, each in arms.items() if len(each) > 1 and {*each.values()} != {None}]
        found += [f"Keeps 95 % of the base's {score}: {'; '.join(said)}."] * bool(said)
    return found


def _rates(kept: Mapping[float, bool | None]) -> str:
    sure, unsure = (", ".join(rate(each) for each, is_kept in kept.items() if is_kept is of) for of in (True, None))
    return f"at {sure or 'none'}" + (f" (undecided at {unsure})" if unsure else "")


def _tofu_sentences(plane: Mapping[str, Any]) -> list[str]:
    base, points, retains, found = plane["base"], plane["points"], plane["retains"], []
    quality = plane["around"].get("before unlearning", (0.0, 0.0))[1]
    reached, front, collapsed = (
        ", ".join(_name(point) for point in points if point[name]) for name in ("reached", "front", "collapsed")
    )
    if base is None:
        found.append("The model utility before unlearning is not known: evaluate the start with ceu-rl tofu-eval.")
    elif len(retains) > 1:
        found.append(
            f"The retain models differ ({', '.join(retains)}), so forget qualities do not compare; give --retain."
        )
    elif points:
        aim = f"A forget quality above {FORGET_QUALITY} with at least 90 % of the base's model utility {number(base)}"
        found.append(f"{aim}, on every seed: {reached or 'no arm at any setting tried'}.")
    if points and quality > FORGET_QUALITY / 10:
        found.append(f"The base has a forget quality of {number(quality)} already: read the KS distance beside it.")
    if front:
        found.append(f"On the Pareto front of forget quality and model utility: {front}.")
    if collapsed:
        found.append(f"Collapsed below a tenth of the base's utility, where forgetting says nothing: {collapsed}.")
    if plane["missing"]:
        found.append(f"Without a forget quality, for want of an evaluation or --retain: {', '.join(plane['missing'])}.")
    return found


def _left_out(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that do not count, or count as lost, each kind by its number in each arm."""
    kinds = {
        status: [run for run in runs if run["status"] == status] for status in ("diverged", "failed", "interrupted")
    }
    for score in unique(name for run in runs for name in run["final"]):
        finished = [run for run in runs if run["status"] == "finished"]
        kinds[f"finished without a {score}"] = [run for run in finished if math.isnan(run["final"][score])]
    kinds["have log lines that could not be read"] = [run for run in runs if run["log_problem"]]
    counts = {kind: Counter(run["arm"] for run in members) for kind, members in kinds.items() if members}
    return [
        f"{by_arm.total()} of {len(runs)} runs {kind}: {', '.join(f'{n} of {arm}' for arm, n in by_arm.items())}."
        for kind, by_arm in counts.items()
    ]


# The table, in the terminal and on the page


def table_of(report: Mapping[str, Any], spread: bool = True) -> pd.DataFrame:
    """A row for each arm at each setting: its seeds, scores (with their spread) and measures of `SHOWN`, as text."""
    varied = {name for group in report["groups"] for name in group["setting"]}
    alone = varied == {"learning_rate"}
    measures = _shown(report)
    rows = []
    for group in report["groups"]:
        seeds = ", ".join(f"{count} {status}" for status, count in group["seeds"].items() if count)
        row = {"arm": group["arm"]}
        if varied:
            setting = setting_name(group["setting"])
            row |= {"learning rate": setting.removeprefix("learning rate ")} if alone else {"setting": setting}
        row["seeds"] = seeds.replace(" finished", "")
        for name, score in group["scores"].items():
            count = report["rows"][name]
            text = f"{score['mean']:.3f}" if score["seeds"] else "—"
            text += f" ({score['min']:.3f} to {score['max']:.3f})" if spread and score["seeds"] > 1 else ""
            row[f"{name} (n = {count})" if count else name] = text + " ↓" * (score["kept"] is False)
        values = {name: group["measures"].get(name) for name in measures}
        row |= {heading: "—" if values[name] is None else number(values[name]) for name, heading in measures.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _shown(report: Mapping[str, Any]) -> dict[str, str]:
    """The measures in the table with their headings, of those that a run has; `report.json` has all."""
    there = dict.fromkeys(name for group in report["groups"] for name in group["measures"])
    passes = {name: name for name in there if name.startswith("pass@")}
    return {name: SHOWN[name][0] for name in SHOWN if name in there} | dict([*passes.items()][-1:])


def _print(report: Mapping[str, Any], console: Console) -> None:
    first, *rest = report["verdict"]
    console.print(first, style="bold", markup=False, highlight=False)
    for sentence in rest:
        console.print(f"- {sentence}", markup=False, highlight=False)
    for line in arm_lines(report).values():
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    frame = table_of(report, spread=False)
    # A narrow terminal folds what it has no room for, and cuts nothing
    columns = [Column(markup.escape(head), overflow="fold", no_wrap=head == "arm") for head in frame]
    grid = Grid(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in frame.itertuples(index=False):
        grid.add_row(*map(markup.escape, row))
    console.print(grid)


def arm_lines(report: Mapping[str, Any]) -> dict[str, str]:
    """What each arm is, in one line: the first by its recipe, the others by what differs from it."""
    found = {}
    for place, arm in enumerate(report["arms"]):
        differs = ", ".join(f"{name} {json.dumps(value)}" for name, value in arm["differs"].items())
        what = differs if place else f"{arm['method'] or 'unknown method'}, {arm['recipe'] or 'no recipe recorded'}"
        found[arm["name"]] = f"{arm['name']}: {what or 'the same settings as the first'}"
    return found


def _html(folder: Path, table: Table, report: Mapping[str, Any]) -> str:
    strict: Any = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **strict)
    environment.filters["unbroken"] = _unbroken
    compared, origins, frame = _compared(table.runs), report["provenance"], table_of(report)
    looks = figures.looks(unique(table.runs[p].arm for p in compared), [arm["name"] for arm in report["arms"]])
    return environment.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        report=report,
        looks=looks,
        lines=arm_lines(report),
        table=Markup(frame.to_html(index=False, border=0, escape=False, formatters=[_unbroken] * frame.shape[1])),
        definitions=[SHOWN[name] for name in _shown(report) if name in SHOWN],
        planes=[
            {**plane, "title": plane["y"] + _at(plane["setting"]), "svg": figures.plane(plane, looks, f"plane{place}")}
            for place, plane in enumerate(report["planes"])
            if plane["points"]
        ],
        finals=_final_figures(table, compared, looks),
        curves=figures.curves(table, compared, looks),
        runs=table.runs,
        differ=[name for name in ORIGIN if any(entry[name] != origins[0][name] for entry in origins)],
        going=any(run["status"] in ("running", "waiting") for run in report["runs"]),
        now=datetime.now().strftime("%H:%M"),
        unit="token" if any(table.tokens) else "response",
        setting_name=setting_name,
        number=number,
    )


def _final_figures(table: Table, compared: Sequence[int], looks: Mapping[str, figures.Look]) -> list[dict[str, str]]:
    """One figure for each score and condition."""
    found: list[dict[str, str]] = []
    conditions = unique(table.runs[place].condition for place in compared)
    for score, condition in itertools.product(table.scores, conditions):
        ends = table.ends_of([place for place in compared if table.runs[place].condition == condition], score)
        if ends.status.isin(("finished", "diverged")).any():
            svg = figures.final_plot(ends, score, looks, f"final{len(found)}")
            found.append({"title": score.name + _at(condition), "svg": svg})
    return found


def _unbroken(sentence: str) -> Markup:
    """A sentence whose learning rates are not broken at their minus."""
    return Markup(re.sub(r"\d[\d.]*e-\d+", r'<span class="unbroken">\g<0></span>', str(escape(sentence))))
