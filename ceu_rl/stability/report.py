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

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from rich import box, markup
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from . import figures
from .runs import RECORD, STATUSES, Run, rate, write_whole
from .table import (
    ABOUT,
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
# Name of a measure, heading, definition
MEASURES = {
    "model_utility": ("model utility", "Of TOFU: harmonic mean of nine scores off the forget set."),
    "forget_quality": ("forget quality", "Of TOFU: p-value that the model cannot be told from the retain model."),
    "ks_distance": ("KS distance", "Of TOFU: the Kolmogorov-Smirnov distance behind the forget quality, 0 to 1."),
    "forget_probability": ("forget probability", "Of TOFU: probability per token of the answers to forget."),
    "kl": ("KL", "Divergence from the model before training at the end, in nats per token."),
    "displacement": (
        "displacement",
        "Change of the chosen responses' log-probability (2410.08847).",
    ),
    "grad_norm_largest": ("largest gradient norm", "Before clipping, of all steps and seeds."),
    "seconds_per_step": ("seconds per step", "Of training with its evaluations."),
    "depth": ("depth of rejected", "Minus the rejected responses' last log-probability."),
    "solutions_kl": ("KL on solutions", "Divergence on the tokens of the solutions at the end, in nats per token."),
    "entropy_change": ("entropy change", "Last entropy less the first, in nats per token."),
    "grad_norm_median": ("median gradient norm", "Over the steps, before clipping."),
    "grad_norm_spikes": ("gradient spikes", "Steps above ten times the median of the 50 steps before."),
    "loss_spikes": ("loss spikes", "Steps above the median of the 50 steps before by ten median deviations."),
    "non_finite_steps": ("steps not finite", "Steps whose loss or gradient norm is not finite."),
    "drawdown": ("drawdown", "The largest fall of the first score from its best so far."),
    "collapse_step": ("collapse", "The step from which the first score stays below half of its best."),
    "peak_memory_gib": ("peak memory (GiB)", "Of the process, or of the GPU."),
    **{key: (name, "Mean over the steps.") for key, name in STEP_MEANS.items()},
}
COUNTS = ("grad_norm_spikes", "loss_spikes", "non_finite_steps")
AT_END = (
    "kl",
    "displacement",
    "depth",
    "solutions_kl",
    "entropy_change",
    "pass",
)  # of a run that diverged they say nothing


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
    plain = _clean({name: value for name, value in report.items() if name != "about"})
    write_whole({folder / "report.json": _json(plain), folder / "report.html": _html(folder, table, report)})
    files = f"Report: {folder / 'report.html'}, numbers: {folder / 'report.json'}"
    console.print(files, markup=False, soft_wrap=True)
    return plain


# The numbers


def summarize(table: Table, command: str) -> dict[str, Any]:
    """Everything that the report says, in numbers; not finite ones may be in it."""
    runs = table.runs
    on_tofu = any("model_utility" in run.summary for run in runs)
    # Beside the methods stand the model before unlearning and the one trained without the forget set
    beside = [place for place, run in enumerate(runs) if on_tofu and run.method == "sft"]
    compared = [place for place in range(len(runs)) if place not in beside]
    measured = [measure(table, place) for place in range(len(runs))]
    groups = _groups(table, measured)
    report: dict[str, Any] = {
        "format": 2,
        "command": command,
        "verdict": [],
        "arms": _arms(runs, compared + beside),
        "scores": [score.name for score in table.scores],
        "rows": {score.name: _rows(table, score) for score in table.scores},
        "groups": groups,
        "comparisons": _comparisons(table, compared) if compared else [],
        "planes": _tofu_plane(table, compared, groups) if on_tofu else _frontiers(table, compared),
        "provenance": _provenance(runs),
        "runs": [],
    }
    report["runs"] = [_record(table, place, measured[place], report["provenance"]) for place in range(len(runs))]
    report["verdict"] = verdict(report)
    return report


def _arms(runs: Sequence[Run], order: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm, and the fields in which its recipe is not the first arm's."""
    first = {arm: next(r for r in runs if r.arm == arm) for arm in unique(runs[place].arm for place in order)}
    varied = {name for run in runs for name in run.setting} | {"seed", "output_dir", "run_name"}
    base: Mapping[str, Any] = next(iter(first.values())).settings if first else {}
    found = []
    for arm, run in first.items():
        names = [name for name in dict.fromkeys([*run.settings, *base]) if name not in varied]
        differs = {n: run.settings.get(n) for n in names if run.settings.get(n) != base.get(n)} if run.settings else {}
        recipe = (run.record(RECORD) or run.planned).get("recipe")
        found.append({"name": arm, "method": run.method, "recipe": recipe, "differs": differs})
    return found


def _rows(table: Table, score: Score) -> int | None:
    """How many held-out rows a score is of, where all runs agree."""
    counts = {len(rows) for p in range(len(table.runs)) if (rows := table.rows(p, score)) is not None}
    counts = counts or {run.outcome.get("eval_rows") for run in table.runs} - {None}  # type: ignore[assignment]
    return counts.pop() if len(counts) == 1 else None


def measure(table: Table, place: int) -> dict[str, Any]:
    """The measures of one run by their names; without those whose series it did not log."""
    run = table.runs[place]

    def of(metric: str, function: Callable[[Any], Any], finite: bool = True) -> Any:
        series = table.series(place, metric)
        series = series[np.isfinite(series)] if finite else series
        return function(series) if len(series) else None

    def change(series: Any) -> float:
        return float(series.iloc[-1] - series.iloc[0])

    losses = [table.series(place, key) for key in ("loss", "grad_norm")]
    bad = {step for series in losses for step in series.index[~np.isfinite(series)]}
    result, first = run.outcome, table.scores[0].name if table.scores else ""
    seconds, steps = (result.get("metrics") or {}).get("train_runtime"), result.get("steps")
    found = {
        **{name: run.summary.get(name) for name in TOFU},
        **{f"pass@{k}": of(f"eval_pass@{k}", lambda s: s.iloc[-1]) for k in _passes(table)},
        "kl": of("eval_kl" if len(table.series(place, "eval_kl")) else "kl", lambda s: s.iloc[-1], False),
        "displacement": of("chosen", change, False),
        "depth": of("rejected", lambda s: -s.iloc[-1], False),
        "solutions_kl": of("eval_solutions_kl", lambda s: s.iloc[-1], False),
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


def _passes(table: Table) -> list[int]:
    keys = table.values.metric.unique()
    return sorted(int(key.removeprefix("eval_pass@")) for key in keys if re.fullmatch(r"eval_pass@\d+", key))


def _groups(table: Table, measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm at each setting over its seeds, by condition, then learning rate, then arm."""
    runs, groups = table.runs, []
    arms, conditions = unique(run.arm for run in runs), unique(run.condition for run in runs)

    def place(run: Run) -> tuple[Any, ...]:
        return conditions.index(run.condition), run.setting.get("learning_rate", 0.0), arms.index(run.arm)

    for key in sorted({place(run) for run in runs}):
        members = [p for p, run in enumerate(runs) if place(run) == key]
        first, rates = runs[members[0]], [runs[p].rate for p in members if not math.isnan(runs[p].rate)]
        counts = {status: sum(runs[p].status == status for p in members) for status in STATUSES}
        scores = {}
        for score in table.scores:
            ends = table.ends_of(members, score)
            finals = ends.final[np.isfinite(ends.final)]
            loss = table.loss(members, score)
            scores[score.name] = {
                **{name: getattr(finals, name)() if len(finals) else None for name in ("mean", "min", "max")},
                "base": ends.base.median() if len(ends) else None,
                "seeds": len(finals),
                **{name: loss[name] for name in ("rows", "interval", "kept")},
            }
        counted = [
            {n: v for n, v in measured[p].items() if runs[p].status == "finished" or n.split("@")[0] not in AT_END}
            for p in members
            if runs[p].status in ("finished", "diverged")
        ]
        about = {"arm": first.arm, "setting": dict(first.setting), "rate": rates[0] if rates else None}
        groups.append({**about, "runs": members, "seeds": counts, "scores": scores, "measures": _over_seeds(counted)})
    return groups


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Largest gradient norm, sums of counts, earliest collapse, medians of the rest."""
    combine: dict[str, Callable[[list[Any]], Any]] = {"grad_norm_largest": max, "collapse_step": min}
    combine |= dict.fromkeys(COUNTS, sum)
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [each[name] for each in found if math.isfinite(each.get(name, math.nan))] for name in names}
    return {name: combine.get(name, np.median)(each) for name, each in values.items() if each}


def _comparisons(table: Table, compared: Sequence[int]) -> list[dict[str, Any]]:
    """Each arm against the first, at the setting that both have, or each at its own best learning rate."""
    runs, found = table.runs, []
    arms = unique(runs[place].arm for place in compared)
    for score in table.scores:
        for condition in unique(runs[place].condition for place in compared):
            own = {arm: [p for p in compared if runs[p].arm == arm and runs[p].condition == condition] for arm in arms}
            best = {arm: _best(table, places, score) for arm, places in own.items()}
            stock = best.pop(arms[0])
            for arm, ours in best.items():
                if not ours or not stock:
                    continue
                gap = table.difference(ours, stock, score)
                groups = (ours, stock)
                about = {"score": score.name, "lower": score.lower, "arm": arm, "baseline": arms[0]}
                about["settings"] = [dict(runs[group[0]].setting) for group in groups]
                about["best_of"] = max(len({runs[p].rate for p in own[each]}) for each in (arm, arms[0]))
                about["finals"] = [table.ends_of(group, score).final.mean() for group in groups]
                about["diverged"] = [sum(runs[p].status == "diverged" for p in group) for group in groups]
                found.append({**about, **gap})
    return found


def _best(table: Table, places: Sequence[int], score: Score) -> list[int]:
    """The runs of an arm at its best setting, of those at which every seed finished; all of them if it has one."""
    labels = unique(table.labels[p] for p in places)
    groups = [[p for p in places if table.labels[p] == label] for label in labels]
    if len(groups) > 1:
        groups = [group for group in groups if all(table.runs[p].status == "finished" for p in group)]
    means = [(table.ends_of(group, score).final.mean() * (-1 if score.lower else 1), group) for group in groups]
    return max((each for each in means if not math.isnan(each[0])), default=(0.0, []))[1]


def _tofu_plane(table: Table, compared: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Forget quality and model utility: medians over seeds, and the Pareto front."""
    runs = table.runs
    evaluated = [runs[p] for p in compared if {"model_utility", "forget_quality"} <= set(runs[p].summary)]
    base, around = _around(runs)
    retains = unique(str((run.record("tofu_eval.json") or {}).get("retain")) for run in evaluated)
    points = []
    for group in groups:
        members = [runs[p] for p in group["runs"] if p in compared and runs[p] in evaluated]
        if not members:
            continue
        seeds = [(run.summary["model_utility"], run.summary["forget_quality"]) for run in members]
        collapsed = sum(base is not None and u < COLLAPSED * base for u, _ in seeds)
        point = _point(group, seeds, np.median, bool(collapsed or group["seeds"]["diverged"]))
        reached = None
        if base is not None:
            reached = not group["seeds"]["diverged"] and all(
                q > FORGET_QUALITY and u >= KEEP_UTILITY * base for u, q in seeds
            )
        points.append({**point, "collapsed": collapsed, "reached": reached})
    alive = [point for point in points if not point["lost"] and len(retains) == 1]
    for place in pareto_front([(point["x"], point["y"]) for point in alive]):
        alive[place]["front"] = True
    missing = unique(runs[p].arm for p in compared if runs[p].status == "finished" and runs[p] not in evaluated)
    lines = {"x_line": KEEP_UTILITY * base if base is not None else None, "y_line": FORGET_QUALITY}
    about = {"kind": "tofu", "x": "model utility", "y": "forget quality (p-value)", "logarithmic": True, "setting": {}}
    return [
        {**about, **lines, "base": base, "around": around, "retains": retains, "points": points, "missing": missing}
    ]


def _around(runs: Sequence[Run]) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """The model utility before unlearning, and what stands on the plane beside the methods."""
    starts = [Path(str(run.settings.get("model_name_or_path"))) for run in runs if run.method != "sft"]
    bases = [run for run in runs if run.method == "sft" and run.arm.startswith(("base", "full"))]
    bases += [Run("base", {}, 0, start) for start in unique(starts)]
    known = [run.summary for run in bases if "model_utility" in run.summary]
    recorded = {(run.record("tofu_eval.json") or {}).get("base", {}).get("model_utility") for run in runs} - {None}
    utility = known[0]["model_utility"] if known else recorded.pop() if len(recorded) == 1 else None
    around = {}
    if known and "forget_quality" in known[0]:
        around["before unlearning"] = (known[0]["model_utility"], known[0]["forget_quality"])
    retains = [run for run in runs if run.method == "sft" and run.arm.startswith("retain")]
    files = [(run.record("tofu_eval.json") or {}).get("retain") for run in runs]
    retains += [Run("retain", {}, 0, Path(file).parent) for file in filter(None, files)]
    if found := next((run.summary for run in retains if "model_utility" in run.summary), None):
        around["retain model"] = (found["model_utility"], 1.0)
    return utility, around


def _point(group: Mapping[str, Any], seeds: Sequence[Any], middle: Callable[..., Any], lost: bool) -> dict[str, Any]:
    x, y = (float(middle([seed[place] for seed in seeds])) for place in (0, 1))
    about = {name: group[name] for name in ("arm", "setting", "rate")}
    return {**about, "x": x, "y": y, "seeds": [list(map(float, seed)) for seed in seeds], "lost": lost, "front": False}


def _frontiers(table: Table, compared: Sequence[int]) -> list[dict[str, Any]]:
    """Reward against divergence from the start for each condition: what a run gets, and how far it went for it."""
    if not any(table.runs[p].method == "grpo" for p in compared):
        return []
    task = [score for score in table.scores if score.kept and (score == REWARD or "accuracy" in score.name)]
    found = []
    for condition in unique(table.runs[p].condition for p in compared) if task else []:
        points = []
        for group in _groups(table, [{}] * len(table.runs)):
            members = [p for p in group["runs"] if table.runs[p].condition == condition and p in compared]
            ways = []
            for p in members:
                divergence = table.series(p, "eval_kl")
                both = divergence.index.intersection(table.series(p, task[-1].name).index)
                if table.runs[p].status == "finished" and len(both):
                    way = np.stack([divergence[both], table.series(p, task[-1].name)[both]], axis=1)
                    ways.append(dict(zip(both, way.tolist(), strict=True)))
            if ways:
                ends = [way[max(way)] for way in ways]
                steps = sorted(set.intersection(*map(set, ways)))
                path = [np.mean([way[step] for way in ways], axis=0).tolist() for step in steps]
                points.append({**_point(group, ends, np.mean, group["seeds"]["diverged"] > 0), "path": path})
        if points:
            about = {"kind": "frontier", "x": "divergence from the start, nats per token", "y": task[-1].name}
            found.append({**about, "logarithmic": False, "around": {}, "setting": condition, "points": points})
    return found


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where the runs come from, each origin once, with the first and last date and the number of its runs."""
    outcomes = [run.outcome for run in runs if run.outcome.get("versions")]
    found = unique({name: outcome.get(name) for name in ORIGIN} for outcome in outcomes)
    for entry in found:
        same = [outcome for outcome in outcomes if _from(outcome, entry)]
        dates = sorted(outcome["date"] for outcome in same if outcome.get("date"))
        entry |= {"first": dates[0] if dates else None, "last": dates[-1] if dates else None, "runs": len(same)}
    return found


def _from(outcome: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return all(outcome.get(name) == entry[name] for name in ORIGIN)


def _record(table: Table, place: int, measures: Mapping[str, Any], provenance: Sequence[Any]) -> dict[str, Any]:
    run, outcome = table.runs[place], table.runs[place].outcome
    own = table.values[(table.values.run == place) & table.values.metric.str.startswith("eval_")]
    curves = own.pivot_table(index="step", columns="metric", values="value", dropna=False) if len(own) else None
    ends = table.ends[table.ends.run == place]
    return {
        "arm": run.arm,
        "setting": dict(run.setting),
        "seed": run.seed,
        "rate": run.rate,
        **{name: getattr(run, name) for name in ("method", "status", "reason", "log_problem")},
        **{name: outcome.get(name) for name in ("steps", "resumed", "eval_tokens", "wall_time_s", "peak_memory_gib")},
        **{name: outcome.get(name) for name in ("command", "date", "metrics")},
        "final": dict(zip(ends.score, ends.final, strict=True)),
        "measures": dict(measures),
        "summary": run.summary,
        "curves": {} if curves is None else {"step": list(curves.index), **curves.to_dict("list")},
        "held_out": _held_out_columns(table, place),
        "provenance": next((n for n, entry in enumerate(provenance) if _from(outcome, entry)), None),
    }


def _held_out_columns(table: Table, place: int) -> dict[str, Any]:
    rows = table.held_out[table.held_out.run == place]
    if rows.empty:
        return {}
    last = rows[rows.step == rows.step.max()].drop(columns=["run", *ABOUT, "dataset"], errors="ignore")
    last = last.dropna(axis=1, how="all")
    return {"step": int(last.pop("step").iloc[0]), **last.to_dict("list")}


# The verdict


def verdict(report: Mapping[str, Any]) -> list[str]:
    """What the numbers carry, in sentences: a difference is told only where a paired interval carries it."""
    runs = report["runs"]
    finished = [run for run in runs if run["status"] == "finished"]
    going = [run for run in runs if run["status"] == "running"]
    open_ = [run for run in runs if run["status"] in ("running", "waiting", "interrupted")]
    head = []
    if open_:
        now = "".join(f"; {run['arm']}{_at(run['setting'])} is running: {run['reason']}" for run in going[:3])
        head = [f"{len(finished)} of {len(runs)} runs finished{now}".rstrip(".") + "."]
    sentences = [_tofu_sentences(plane) for plane in report["planes"] if plane["kind"] == "tofu"]
    told = [each for group in sentences for each in group] + _kept(report) + _told(report["comparisons"])
    if not finished and not open_:
        told = ["No run has finished, so there is nothing to compare."] if runs else ["There are no runs to compare."]
    elif finished and not report["scores"] and not report["planes"]:
        told.append("No run logged an evaluation, so there is no score: set eval_strategy and eval_on_start.")
    elif finished and not told and not open_:
        told.append("No difference between the arms is told apart: " + _ends(report) + ".")
    return head + told + _left_out(runs)


def _at(setting: Mapping[str, Any]) -> str:
    return f" ({setting_name(setting)})" if setting else ""


def _ends(report: Mapping[str, Any]) -> str:
    name = report["scores"][0] if report["scores"] else ""
    ends = [f"{g['arm']}{_at(g['setting'])} {number(g['scores'][name]['mean'])}" for g in report["groups"] if name]
    return f"{name} at the end: {', '.join(ends)}" if ends else "there is no score"


def _told(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    told, untold, alone = [], {}, {}  # type: ignore[var-annotated]
    for entry in comparisons:
        gap, interval, arm, score = entry["difference"], entry["interval"], entry["arm"], entry["score"]
        ends = f"{arm}{_at(entry['settings'][0])} {number(entry['finals'][0])}, "
        ends += f"{entry['baseline']}{_at(entry['settings'][1])} {number(entry['finals'][1])}"
        lost = [
            f"; {count} of {name}'s seeds diverged"
            for name, count in zip((arm, entry["baseline"]), entry["diverged"], strict=True)
            if count
        ]
        if interval is None:
            alone.setdefault(score, []).append(ends + "".join(lost))
        elif interval[0] <= 0 <= interval[1]:
            untold.setdefault(score, []).append(f"{arm} ({number(gap)}; {_interval(entry)})")
        else:
            word = "higher" if gap > 0 else "lower"
            best = ", each at its own best rate on these rows" if entry["best_of"] > 1 else ""
            told.append(
                f"{score[0].upper()}{score[1:]}: {ends}: {arm} is {number(abs(gap))} {word} ({_interval(entry)}{best})"
                f"{''.join(lost)}."
            )
    told += [f"Not told apart from {comparisons[0]['baseline']} in {s}: {', '.join(e)}." for s, e in untold.items()]
    return told + [
        f"{s[0].upper()}{s[1:]}, without an interval (one seed, no rows): {'; '.join(e)}." for s, e in alone.items()
    ]


def _interval(entry: Mapping[str, Any]) -> str:
    over = f"{entry['seeds']} seed{'s' if entry['seeds'] != 1 else ''}"
    over += f" and {entry['rows']} rows" if entry["rows"] else ""
    return f"95 % interval over {over} {number(entry['interval'][0])} to {number(entry['interval'][1])}"


def _kept(report: Mapping[str, Any]) -> list[str]:
    """Up to which learning rate each arm keeps 95 % of the base's score."""
    found = []
    for score in report["scores"]:
        for condition in unique(
            {n: v for n, v in g["setting"].items() if n != "learning_rate"} for g in report["groups"]
        ):
            said = []
            for arm in report["arms"]:
                groups = [
                    g
                    for g in report["groups"]
                    if g["arm"] == arm["name"] and condition.items() <= g["setting"].items() and g["rate"]
                ]
                kept = {g["rate"]: g["scores"][score]["kept"] for g in groups if len(groups) > 1}
                if any(each is not None for each in kept.values()):
                    said.append(f"{arm['name']} {_reach(kept)}")
            if said:
                found.append(f"Keeps 95 % of the base's {score}{_at(condition)}: {'; '.join(said)}.")
    return found


def _reach(kept: Mapping[float, bool | None]) -> str:
    sure = [each for each, is_kept in kept.items() if is_kept]
    if not sure:
        undecided = [each for each, is_kept in kept.items() if is_kept is None]
        return "at none tried" + (f" (undecided at {', '.join(map(rate, undecided))})" if undecided else "")
    below = [each for each, is_kept in kept.items() if not is_kept and each < max(sure)]
    largest = " (the largest tried)" if max(sure) == max(kept) else ""
    return f"up to {rate(max(sure))}{largest}" + (f", but not at {', '.join(map(rate, below))}" if below else "")


def _tofu_sentences(plane: Mapping[str, Any]) -> list[str]:
    base, points = plane["base"], plane["points"]
    found = []

    def name(point: Mapping[str, Any]) -> str:
        return f"{point['arm']}{_at(point['setting'])}"

    if base is None:
        found.append(
            "The model utility before unlearning is not known: evaluate the model that the runs start from with "
            "ceu-rl tofu-eval."
        )
    elif len(plane["retains"]) > 1:
        found.append(
            f"The forget qualities do not compare, since the retain models differ ({', '.join(plane['retains'])}); "
            "--retain takes one for all."
        )
    elif points:
        there = ", ".join(name(point) for point in points if point["reached"]) or "no arm at any setting tried"
        found.append(
            f"A forget quality above {FORGET_QUALITY} with a model utility within 10 % of the base's {number(base)}, "
            f"on every seed: {there}."
        )
    quality = plane["around"].get("before unlearning", (0.0, 0.0))[1]
    if points and quality > FORGET_QUALITY / 10:
        found.append(
            f"The model before unlearning has a forget quality of {number(quality)} already, so it hardly tells models "
            "apart; the KS distance and the forget probability say more."
        )
    if front := [name(point) for point in points if point["front"]]:
        found.append(f"On the Pareto front of forget quality and model utility: {', '.join(front)}.")
    if dead := [name(point) for point in points if point["collapsed"]]:
        found.append(
            f"Collapsed, with a model utility below a tenth of the base's, so their forget quality says nothing: "
            f"{', '.join(dead)}."
        )
    if plane["missing"]:
        found.append(
            f"Without a forget quality, for want of an evaluation or a retain model: {', '.join(plane['missing'])}."
        )
    return found


def _left_out(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that do not count, or count as lost, each kind by its number in each arm."""
    kinds = {"diverged": "have lost their scores", "failed": "are left out", "interrupted": "are left out"}
    groups = {f"{status} and {what}": [r for r in runs if r["status"] == status] for status, what in kinds.items()}
    for score in unique(name for run in runs for name in run["final"]):
        without = [r for r in runs if r["status"] == "finished" and math.isnan(r["final"].get(score, math.nan))]
        groups[f"finished without a {score} and are left out of it"] = without
    groups["have log lines that could not be read"] = [r for r in runs if r["log_problem"]]
    found = []
    for what, members in groups.items():
        if members:
            arms = [run["arm"] for run in members]
            counts = ", ".join(f"{arms.count(arm)} of {arm}" for arm in unique(arms))
            found.append(f"{len(members)} of {len(runs)} runs {what}: {counts}.")
    return found


# The table, in the terminal and on the page


def cells(report: Mapping[str, Any], names: Sequence[str]) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Headings and rows of a table: arm, setting, seeds, the scores and some measures; a row for each group."""
    counts = {name: f" (n = {count})" if (count := report["rows"][name]) else "" for name in report["scores"]}
    varied = {name for group in report["groups"] for name in group["setting"]}
    heads = ["arm", *["learning rate" if varied == {"learning_rate"} else "setting"] * bool(varied), "seeds"]
    heads += [f"{name}{counts[name]}" for name in report["scores"]]
    heads += [MEASURES[name][0] if name in MEASURES else name for name in names]
    rows = []
    for group in report["groups"]:
        seeds = [f"{count} {status}" for status, count in group["seeds"].items() if count and status != "finished"]
        seeds = [str(group["seeds"]["finished"]), *seeds] if group["seeds"]["finished"] or not seeds else seeds
        setting = setting_name(group["setting"])
        setting = setting.removeprefix("learning rate ") if varied == {"learning_rate"} else setting
        words = [group["arm"], *[setting] * bool(varied), ", ".join(seeds)]
        found: list[dict[str, Any]] = [{**_cell(text), "words": True} for text in words]
        for score in group["scores"].values():
            spread = f"{score['min']:.3f} to {score['max']:.3f}" if score["seeds"] > 1 else ""
            text = "—" if score["mean"] is None else f"{score['mean']:.3f}"
            found.append(_cell(text, spread, score["kept"] is False))
        for name in names:
            value = group["measures"].get(name)
            found.append(_cell("—" if value is None else number(value), lost=name in COUNTS and bool(value)))
        rows.append(found)
    return heads, rows


def _cell(text: str, small: str = "", lost: bool = False) -> dict[str, Any]:
    return {"text": text, "small": small, "lost": lost, "words": False}


def shown_measures(report: Mapping[str, Any], few: bool) -> list[str]:
    """The measures that a run has: all, or the few that stand in the first table."""
    there = dict.fromkeys(name for group in report["groups"] for name in group["measures"])
    passes = [name for name in there if name.startswith("pass@")]
    if few:
        wanted = (*TOFU, *passes[-1:], "kl", "displacement", "grad_norm_largest", "seconds_per_step")
        return [name for name in wanted if name in there]
    return [*passes, *(name for name in MEASURES if name in there)]


def _print(report: Mapping[str, Any], console: Console) -> None:
    first, *rest = report["verdict"]
    console.print(first, style="bold", markup=False, highlight=False)
    for sentence in rest:
        console.print(f"- {sentence}", markup=False, highlight=False)
    for line in arm_lines(report):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    heads, rows = cells(report, shown_measures(report, few=True))
    # A narrow terminal folds what it has no room for, and cuts nothing
    columns = [Column(head, overflow="fold", no_wrap=not place) for place, head in enumerate(heads)]
    grid = Grid(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        grid.add_row(*(markup.escape(cell["text"]) for cell in row))
    console.print(grid)


def arm_lines(report: Mapping[str, Any]) -> list[str]:
    """What each arm is, in one line: the first by its recipe, the others by what differs from it."""
    found = []
    for place, arm in enumerate(report["arms"]):
        differs = ", ".join(f"{name} {json.dumps(value)}" for name, value in arm["differs"].items())
        what = f"{arm['method'] or 'unknown method'}, {arm['recipe'] or 'no recipe recorded'}" if not place else differs
        found.append(f"{arm['name']}: {what or 'the same settings as the first'}")
    return found


def _html(folder: Path, table: Table, report: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["unbroken"] = _unbroken
    compared = [place for place, run in enumerate(table.runs) if run.arm in {a["name"] for a in report["arms"]}]
    on_tofu = any(plane["kind"] == "tofu" for plane in report["planes"])
    compared = [place for place in compared if not on_tofu or table.runs[place].method != "sft"]
    names = [arm["name"] for arm in report["arms"]]
    looks = figures.looks([n for n in names if any(table.runs[p].arm == n for p in compared)], names)
    every = shown_measures(report, few=False)
    return environment.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        report=report,
        looks=looks,
        lines=arm_lines(report),
        planes=[
            {
                "title": plane["y"] + _at(plane["setting"]),
                "svg": figures.plane(plane["points"], plane, looks, f"plane{n}"),
            }
            for n, plane in enumerate(report["planes"])
            if plane["points"]
        ],
        on_tofu=on_tofu,
        finals=_final_figures(table, compared, looks),
        curves=figures.curves(table, compared, looks),
        few=cells(report, shown_measures(report, few=True)),
        every=cells(report, every) if len(every) > len(shown_measures(report, few=True)) else None,
        definitions=[MEASURES[name] for name in every if name in MEASURES],
        runs=table.runs,
        differ=[name for name in ORIGIN if any(e[name] != report["provenance"][0][name] for e in report["provenance"])],
        going=any(run["status"] in ("running", "waiting") for run in report["runs"]),
        now=datetime.now().strftime("%H:%M"),
        unit="token" if any(table.tokens) else "response",
        setting_name=setting_name,
        number=number,
    )


def _final_figures(table: Table, compared: Sequence[int], looks: Mapping[str, figures.Look]) -> list[dict[str, str]]:
    """One figure for each score and condition."""
    found: list[dict[str, str]] = []
    for score in table.scores:
        for condition in unique(table.runs[place].condition for place in compared):
            members = [place for place in compared if table.runs[place].condition == condition]
            ends = table.ends_of(members, score)
            if ends.status.isin(("finished", "diverged")).any():
                svg = figures.final_plot(ends, score, looks, f"final{len(found)}")
                found.append({"title": score.name + _at(condition), "svg": svg})
    return found


def _unbroken(sentence: str) -> Markup:
    """A sentence whose learning rates are not broken at their minus."""
    return Markup(re.sub(r"\d[\d.]*e-\d+", r'<span class="unbroken">\g<0></span>', str(escape(sentence))))


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


def _json(report: Mapping[str, Any]) -> str:
    """JSON with a line for each item of a list at the top, such as a run."""

    def dump(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {dump(value)}" for key, value in report.items()) + "\n}\n"
