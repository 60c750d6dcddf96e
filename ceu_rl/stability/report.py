"""The report of a comparison: `report.html` to read, `report.json` (see `docs/recipes.md`), a table in the terminal."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from rich.console import Console

from ..run.errors import write_whole
from . import figures
from .runs import RECORD, STATUSES, Run, key_of, rate
from .table import Score, Table, number, setting_name

FORGET_QUALITY = 0.05  # p-value above which an unlearned model cannot be told from the retain model
KEEP_UTILITY = 0.9  # share of the base's model utility
ORIGIN = ("commit", "device", "versions")
DESCRIBED = ("arm", "setting", "seed", "rate", "method", "status", "reason", "log_problem", "summary")  # of a Run
RECORDED = ("steps", "resumed", "wall_time_s", "peak_memory_gib", "command", "date", "metrics")
# The measures in the table: heading, definition
SHOWN = {
    "model_utility": ("model utility", "Of TOFU: harmonic mean of nine scores off the forget set."),
    "forget_quality": ("forget quality", "Of TOFU: p-value that the model cannot be told from the retain model."),
    "ks_distance": ("KS distance", "Of TOFU: the Kolmogorov-Smirnov distance behind the forget quality, 0 to 1."),
    "forget_probability": ("forget probability", "Of TOFU: probability per token of the answers to forget."),
    "kl": ("KL", "Divergence from the model before training at the end, in nats per token."),
    "displacement": ("displacement", "Change of the chosen responses' log-probability (2410.08847)."),
    "grad_norm_largest": ("largest gradient norm", "Before clipping, of all steps and seeds."),
}
TOFU = ("model_utility", "forget_quality")
OF_GROUP = {"grad_norm_largest": "max", "drawdown": "max", "reached": "min"}  # the others are medians


def write_report(folder: Path, runs: Sequence[Run], console: Console, command: str) -> dict[str, Any]:
    """Write `report.html` and `report.json` of runs, the first arm's the baseline; return what the JSON holds."""
    table = Table(runs)
    report = summarize(table, command)
    _print(report, console)
    plain = _clean(report)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plain.items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.html", _html(folder, table, report))
    write_whole(folder / "report.json", "{\n" + ",\n".join(lines) + "\n}\n")
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
    start = Run("", {}, 0, Path(str(table.runs[0].settings.get("model_name_or_path")))).summary if table.runs else {}
    measures = measure(table, start)
    report: dict[str, Any] = {
        **{"format": 3, "command": command, "verdict": []},
        "arms": _arms(table.runs),
        "scores": [score.name for score in table.scores],
        "groups": _groups(table, measures),
        "comparisons": _comparisons(table),
        "tofu": {name: start[name] for name in TOFU if start.get(name) is not None},
        "provenance": _provenance(table.runs),
        "runs": [_record(table, place, measures.loc[place]) for place in range(len(table.runs))],
    }
    report["verdict"] = verdict(report)
    return report


def _arms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each arm, and the fields in which its recipe is not the first arm's."""
    varied = {name for run in runs for name in run.setting} | {"seed", "output_dir", "run_name"}
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        base, own = runs[0].settings, run.settings
        names = [name for name in {**own, **base} if name not in varied and own.get(name) != base.get(name)]
        recipe = (run.record(RECORD) or run.planned).get("recipe")
        differs = {name: own.get(name) for name in names} if own else {}
        found.setdefault(run.arm, {"name": run.arm, "method": run.method, "recipe": recipe, "differs": differs})
    return list(found.values())


def measure(table: Table, start: Mapping[str, float]) -> pd.DataFrame:
    """The measures of each run: NaN where it did not log one, or did not finish and it is measured at the end."""
    runs, names = range(len(table.runs)), ["grad_norm", "kl", "eval_kl", "chosen"]
    logged = table.values[np.isfinite(table.values.value)].sort_values("step", kind="stable")
    by_run = logged.groupby(["run", "metric"]).value
    first, last, largest = (
        found.unstack().reindex(index=runs, columns=names) for found in (by_run.first(), by_run.last(), by_run.max())
    )
    at_end = pd.DataFrame([run.summary for run in table.runs], runs, [*SHOWN], dtype=float)
    at_end["kl"] = last.eval_kl.fillna(last.kl)  # of evaluations, where both are logged
    at_end["displacement"] = last.chosen - first.chosen
    found = at_end[(table.about.status == "finished").to_numpy()].reindex(runs)
    found["grad_norm_largest"] = largest.grad_norm
    if table.scores:  # the largest fall of the first score from its best so far: max over s < t of score_s - score_t
        series = logged[logged.metric == table.scores[0].name].groupby("run").value
        found["drawdown"] = series.agg(lambda values: (values.cummax() - values).max())
    if found.forget_quality.notna().any():  # the aim of unlearning on TOFU, which a run that diverged has missed
        is_useful = found.model_utility >= KEEP_UTILITY * start.get("model_utility", math.nan)
        reached = (is_useful & (found.forget_quality > FORGET_QUALITY)).astype(float)
        found["reached"] = reached.where(table.about.status.isin(["finished", "diverged"]))
    return found


def _groups(table: Table, measures: pd.DataFrame) -> list[dict[str, Any]]:
    """Each arm at each setting over its seeds, by condition, then learning rate, then arm."""
    found = []
    for _, members in table.about.groupby("group"):
        run, counts, scores = table.runs[members.run.iloc[0]], Counter(members.status), {}
        for score in table.scores:
            ends, loss = table.ends_of(members.run, score), table.loss(members.run, score)
            finals = ends.final[np.isfinite(ends.final)]
            scores[score.name] = {
                **finals.agg(["mean", "min", "max"]),
                **{"base": ends.base.median(), "seeds": len(finals)},
                **{name: loss[name] for name in ("rows", "interval", "kept")},
            }
        own = measures.loc[members.run[members.status.isin(["finished", "diverged"])]].dropna(axis=1, how="all")
        group = {
            "arm": run.arm,
            "setting": dict(run.setting),
            "rate": run.rate if math.isfinite(run.rate) else None,
            "runs": list(members.run),
            "seeds": {status: counts[status] for status in STATUSES},
            "scores": scores,
            "measures": {name: own[name].agg(OF_GROUP.get(name, "median")) for name in own},
        }
        found.append(group)
    return found


def _comparisons(table: Table) -> list[dict[str, Any]]:
    """Each arm against the first, at the setting that both have, or each at its own best learning rate."""
    found, about = [], table.about
    arms = list(about.arm.unique())
    for score, condition, arm in itertools.product(table.scores, about.condition.unique(), arms[1:]):
        own = [about[(about.arm == each) & (about.condition == condition)] for each in (arm, arms[0])]
        best = [_best(table, list(each.run), score) for each in own]
        if all(best):
            entry = {
                **{"score": score.name, "lower": score.lower, "arm": arm, "baseline": arms[0]},
                "settings": [dict(table.runs[runs[0]].setting) for runs in best],
                "best_of": max(each.rate.nunique() for each in own),
                "finals": [table.ends_of(runs, score).final.mean() for runs in best],
            }
            found.append(entry | table.difference(best[0], best[1], score))
    return found


def _best(table: Table, places: Sequence[int], score: Score) -> list[int]:
    """The runs of an arm at its best setting, of those at which every seed finished; all of them if it has one."""
    groups = [group for _, group in table.ends_of(places, score).groupby("group")]
    whole = [group for group in groups if len(groups) == 1 or (group.status == "finished").all()]
    means = [(group.final.mean() * (-1 if score.lower else 1), list(group.run)) for group in whole]
    return max((each for each in means if not math.isnan(each[0])), default=(0.0, []))[1]


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each origin of the runs once, with their dates and places."""
    found: dict[str, dict[str, Any]] = {}
    for place, outcome in enumerate(run.outcome for run in runs):
        if outcome.get("versions"):
            origin = {name: outcome.get(name) for name in ORIGIN}
            entry = found.setdefault(key_of(origin), {**origin, "dates": [], "runs": []})
            entry["dates"].append(outcome.get("date") or "")
            entry["runs"].append(place)
    return list(found.values())


def _record(table: Table, place: int, measures: pd.Series) -> dict[str, Any]:
    run, ends = table.runs[place], table.ends[table.ends.run == place]
    own = table.values[(table.values.run == place) & table.values.metric.str.startswith("eval_")]
    curves = own.pivot_table(index="step", columns="metric", values="value", dropna=False)
    rows = table.held_out[table.held_out.run == place].drop(columns=["run", "dataset"], errors="ignore")
    rows = rows[rows.step == rows.step.max()].dropna(axis=1, how="all")
    return {
        **{name: getattr(run, name) for name in DESCRIBED},
        **{name: run.outcome.get(name) for name in RECORDED},
        "final": dict(zip(ends.score, ends.final, strict=True)),
        "measures": measures.dropna().to_dict(),
        "curves": {"step": list(curves.index), **curves.to_dict("list")} if len(own) else {},
        "held_out": {"step": int(rows.pop("step").iloc[0]), **rows.to_dict("list")} if len(rows) else {},
    }


# The verdict


def verdict(report: Mapping[str, Any]) -> list[str]:
    """What the numbers carry, in sentences: a difference is told only where a paired interval carries it."""
    runs, head = report["runs"], []
    statuses, running = Counter(run["status"] for run in runs), [run for run in runs if run["status"] == "running"]
    is_open = statuses["running"] + statuses["waiting"] + statuses["interrupted"] > 0
    if is_open:
        now = (f"{_name(run)} is running: {run['reason'].rstrip('.')}" for run in running[:3])
        head = ["; ".join([f"{statuses['finished']} of {len(runs)} runs finished", *now]) + "."]
    told = [*_tofu_sentences(report["groups"], report["tofu"]), *_kept(report), *_told(report["comparisons"])]
    if not statuses["finished"]:
        told = [] if is_open else ["No run has finished, so there is nothing to compare."]
    elif not report["scores"] and not told:
        told.append("No run logged an evaluation, so there is no score: set eval_strategy and eval_on_start.")
    elif not told and not is_open:
        told = ["No difference between arms is told: there is one arm, or no setting that two have."]
    return head + told + _left_out(runs) + [run["log_problem"] for run in runs if run["log_problem"]]


def _at(setting: Mapping[str, Any]) -> str:
    return f" ({setting_name(setting)})" if setting else ""


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['arm']}{_at(entry['setting'])}"


def _told(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each score and setting of the first arm; first those in which a difference is told apart."""
    told: dict[str, list[str]] = {}
    sure = set()
    for entry in comparisons:
        best = ", each arm at its own best rate on these rows" if entry["best_of"] > 1 else ""
        score = entry["score"][0].upper() + entry["score"][1:]
        head = f"{score}, {entry['baseline']}{_at(entry['settings'][1])} {number(entry['finals'][1])}{best}"
        outcome = "has no interval (one seed, no rows)"
        if entry["interval"]:
            low, high = entry["interval"]
            apart = not low <= 0 <= high
            over = f"{entry['seeds']} seed{'s' if entry['seeds'] != 1 else ''}"
            over += f" and {entry['rows']} rows" if entry["rows"] else ""
            way = f"is {'higher' if low > 0 else 'lower'}" if apart else "is not told apart"
            numbers = f"95 % interval over {over} {number(low)} to {number(high)}"
            outcome = f"{way} (by {number(entry['difference'])}, {numbers})"
            sure |= {head} if apart else set()
        arm = f"{entry['arm']}{_at(entry['settings'][0])} {number(entry['finals'][0])}"
        told.setdefault(head, []).append(f"{arm} {outcome}")
    return [f"{head}: {'; '.join(told[head])}." for head in sorted(told, key=lambda head: head not in sure)]


def _kept(report: Mapping[str, Any]) -> list[str]:
    """At which learning rates each arm keeps 95 % of the base's score."""
    kept: dict[str, dict[str, dict[bool | None, list[str]]]] = {}  # by score and condition, arm, and whether
    for score, group in itertools.product(report["scores"], report["groups"]):
        if group["rate"]:
            setting = {name: value for name, value in group["setting"].items() if name != "learning_rate"}
            rates = kept.setdefault(f"{score}{_at(setting)}", {}).setdefault(group["arm"], {})
            rates.setdefault(group["scores"][score]["kept"], []).append(rate(group["rate"]))
    found = []
    for score, arms in kept.items():
        said = []
        for arm, rates in arms.items():
            if {*rates} != {None} and sum(map(len, rates.values())) > 1:
                undecided = f" (undecided at {', '.join(rates[None])})" if None in rates else ""
                said.append(f"{arm} at {', '.join(rates.get(True, ['none']))}{undecided}")
        found += [f"Keeps 95 % of the base's {score}: {'; '.join(said)}."] if said else []
    return found


def _tofu_sentences(groups: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> Iterator[str]:
    if not any("model_utility" in group["measures"] for group in groups):
        return
    tried = [group for group in groups if "reached" in group["measures"]]
    if not tried:
        yield "No run has a forget quality: give --retain."
    elif "model_utility" not in start:
        yield "The model utility before unlearning is not known: evaluate the start with ceu-rl tofu-eval."
    else:
        reached = ", ".join(_name(group) for group in tried if group["measures"]["reached"])
        aim = f"A forget quality above {FORGET_QUALITY} with at least 90 % of the base's model utility"
        yield f"{aim} {number(start['model_utility'])}, on every seed: {reached or 'no arm at any setting tried'}."
    if tried and (quality := start.get("forget_quality", 0.0)) > FORGET_QUALITY / 10:
        yield f"The base has a forget quality of {number(quality)} already: read the KS distance beside it."


def _left_out(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that do not count, or count as lost, by arm."""
    found: Counter[tuple[str, str]] = Counter()
    for run in runs:
        finals = run["final"].items() if run["status"] == "finished" else ()
        kinds = [run["status"]] if run["status"] in ("diverged", "failed", "interrupted") else []
        kinds += [f"finished without a {name}" for name, final in finals if math.isnan(final)]
        found.update((run["arm"], kind) for kind in kinds)
    arms = Counter(run["arm"] for run in runs)
    return [f"{arm}: {count} of {arms[arm]} runs {kind}." for (arm, kind), count in found.items()]


# The table, in the terminal and on the page


def table_of(report: Mapping[str, Any], spread: bool = True) -> pd.DataFrame:
    """A row for each arm at each setting: its seeds, scores (with their spread) and measures of `SHOWN`, as text."""
    varied = {name for group in report["groups"] for name in group["setting"]}
    shown, rows = _shown(report), []
    for group in report["groups"]:
        row = {"arm": group["arm"]}
        if varied:
            heading = "learning rate" if varied == {"learning_rate"} else "setting"
            row[heading] = setting_name(group["setting"]).removeprefix(f"{heading} ")
        seeds = ", ".join(f"{count} {status}" for status, count in group["seeds"].items() if count)
        row["seeds"] = seeds.replace(" finished", "")
        for name, score in group["scores"].items():
            text = f"{score['mean']:.3f}" if score["seeds"] else "—"
            text += f" ({score['min']:.3f} to {score['max']:.3f})" if spread and score["seeds"] > 1 else ""
            rows_of = {each["scores"][name]["rows"] for each in report["groups"]} - {None}
            heading = f"{name} (n = {max(rows_of)})" if rows_of else name
            row[heading] = text + " ↓" * (score["kept"] is False)
        values = group["measures"]
        row |= {heading: number(values[name]) if name in values else "—" for name, (heading, _) in shown.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _shown(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    there = {name for group in report["groups"] for name in group["measures"]}
    return {name: told for name, told in SHOWN.items() if name in there}


def _print(report: Mapping[str, Any], console: Console) -> None:
    first, *rest = report["verdict"]
    console.print(first, style="bold", markup=False, highlight=False)
    for line in [*(f"- {sentence}" for sentence in rest), *(f"  {line}" for line in arm_lines(report).values())]:
        console.print(line, markup=False, highlight=False)
    frame = table_of(report, spread=False)
    frame = frame.set_index([name for name in ("arm", "learning rate", "setting") if name in frame])
    # In a narrow terminal several tables, each with the arms: a folded number reads as two
    text = frame.to_string(line_width=console.width, sparsify=False)
    console.print(f"\n{text}\n", markup=False, highlight=False, soft_wrap=True)


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
    looks = figures.looks([arm["name"] for arm in report["arms"]])
    return environment.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        report=report,
        looks=looks,
        lines=arm_lines(report),
        table=Markup(table_of(report).to_html(index=False, border=0)),
        definitions=list(_shown(report).values()),
        plane=_plane(table, report, looks),
        finals=figures.finals(table, looks),
        curves=figures.curves(table, looks),
        runs=table.runs,
        left=sum(run["status"] in ("running", "interrupted", "waiting") for run in report["runs"]),
        now=datetime.now().strftime("%H:%M"),
        setting_name=setting_name,
        number=number,
    )


def _plane(table: Table, report: Mapping[str, Any], looks: Mapping[str, figures.Look]) -> str:
    """Forget quality against model utility, where runs have both."""
    frame = table.about.join(pd.DataFrame([run["measures"] for run in report["runs"]], columns=[*SHOWN]))
    if not frame[[*TOFU]].notna().all(axis=1).any():
        return ""
    base = report["tofu"].get("model_utility")
    return figures.plane(frame, looks, base and KEEP_UTILITY * base, FORGET_QUALITY)
