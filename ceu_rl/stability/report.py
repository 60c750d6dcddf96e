"""The report of a comparison: `report.html` to read, `report.json` with every number, and a table in the terminal.

[`write_report`] reads the folders of the runs and nothing else, so that calling it again rebuilds the report.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich import box, markup
from rich.console import Console
from rich.table import Table

from . import figures, measures
from .runs import STATUSES, Run
from .summary import (
    ORIGIN,
    STEP_MEANS,
    TOFU,
    WorstKept,
    arms,
    by_setting,
    condition,
    conditions,
    finals,
    find_scores,
    grouped,
    methods,
    passes,
    summarize,
)
from .verdict import number, rate, setting_name, verdict

__all__ = ["Run", "table_rows", "write_report"]

RATIO = "Mean over the steps of the importance ratio of the policy to what generated, before clipping, on tokens of"
MISMATCH = "Mean over the steps of |log-probability of the policy less that of what generated|, in nats, on tokens of"
CARRIED = "Mean over the steps of the share of the gradient's L1 norm on the logits that is carried by"

# Heading, key of a group, definition
COLUMNS: tuple[tuple[str, str, Callable[..., Any] | str], ...] = (
    ("model utility", "model_utility", "Of TOFU: harmonic mean of nine scores off the forget set."),
    ("forget quality", "forget_quality", "Of TOFU: p-value that the model cannot be told from the retain model."),
    ("forget probability", "forget_probability", "Of TOFU: probability per token of the answers to forget."),
    ("gradient norm, median", "grad_norm_median", "Median over the steps of the norm before clipping."),
    ("gradient norm, largest", "grad_norm_largest", "The largest of all steps and seeds."),
    ("gradient spikes", "grad_norm_spikes", measures.spikes),
    ("loss spikes", "loss_spikes", measures.loss_spikes),
    ("displacement of chosen", "displacement", measures.displacement),
    ("depth of rejected", "depth", measures.depth),
    ("KL", "kl", "Divergence from the model before training on sampled answers at the end, in nats per token."),
    (
        "KL on solutions",
        "solutions_kl",
        "Divergence from the model before training on the tokens of the solutions at the end, in nats per token.",
    ),
    ("entropy change", "entropy_change", measures.change),
    (
        "descending below 0.01",
        "descending_rare",
        "Share of the descending tokens whose probability is below 0.01, mean over the steps.",
    ),
    (
        "descending above 0.99",
        "descending_sure",
        "Share of the descending tokens whose probability is above 0.99, mean over the steps.",
    ),
    ("gradient of descending", "gradient_descending", f"{CARRIED} descending tokens."),
    ("gradient below 0.01", "gradient_rare", f"{CARRIED} descending tokens whose probability is below 0.01."),
    ("gradient above 0.99", "gradient_sure", f"{CARRIED} descending tokens whose probability is above 0.99."),
    ("ratio, positive", "ratio_positive", f"{RATIO} positive advantage."),
    ("ratio, negative", "ratio_negative", f"{RATIO} negative advantage."),
    ("mismatch, positive", "mismatch_positive", f"{MISMATCH} positive advantage."),
    ("mismatch, negative", "mismatch_negative", f"{MISMATCH} negative advantage."),
    ("drawdown", "drawdown", measures.drawdown),
    ("collapse", "collapse_step", measures.collapse_step),
    ("steps not finite", "non_finite_steps", "Steps whose loss or gradient norm is not finite."),
    (
        "time",
        "seconds_per_step_ratio",
        "Seconds per step with the evaluations, over the baseline's at the same setting.",
    ),
    ("memory", "peak_memory_gib_ratio", "Peak memory over the baseline's at the same setting."),
)
ABSENT = "—"
NOT_MISSED = (*TOFU, *STEP_MEANS, "solutions_kl")  # columns of some comparisons, not named where they are absent
COUNTS = ("grad_norm_spikes", "loss_spikes", "non_finite_steps")

# Row, key: shown as first -> last
ROWS = (
    ("greedy accuracy", "eval_greedy_accuracy"),
    ("sampled accuracy", "eval_sampled_accuracy"),
    ("chosen log-prob", "eval_logps/chosen"),
    ("rejected log-prob", "eval_logps/rejected"),
    ("world-facts probability", "eval_world_facts_probability"),
    ("real-authors probability", "eval_real_authors_probability"),
    ("NLL of solutions", "eval_solutions_nll"),
)


def write_report(folder: Path, runs: Sequence[Run], console: Console, command: str) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a folder, and print the verdict and a table.

    Args:
        folder: Where to write; it is made if it is not there.
        runs: The runs of the comparison, the baseline's arm first. They may have failed or be missing.
        console: Where to print.
        command: The command that made the comparison, for the report.

    Returns:
        What `report.json` holds: `command`, `verdict`, `arms`, `base`, of each arm `bases` and `tokens`, `differ` (what
        the arms do not share), `frontier`, `ranges`, `differences`, `best`, `tofu`, `groups` (each arm at each
        setting), `runs`, `provenance`. Numbers that are not finite are None.
    """
    summary = summarize(runs, command)
    report = _clean({"command": command, "verdict": verdict(summary), **summary})
    _print(runs, report, console)
    _write_whole(
        {folder / "report.json": _json(report), folder / "report.html": _html(folder.resolve().name, runs, report)}
    )
    files = f"Report: {folder / 'report.html'}, numbers: {folder / 'report.json'}"
    console.print(files, markup=False, soft_wrap=True)
    return report


def _write_whole(files: Mapping[Path, str]) -> None:
    """Write all of the files, or leave all of them as they were."""
    parts = {path: path.with_name(f"{path.name}.part") for path in files}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(files[path], encoding="utf-8")
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def table_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells of a table with a column for each run, the header first; metrics are shown as first → last.

    A metric that no run has is left out, such as the accuracies where the dataset is no task.
    """
    rows = [(label, key) for label, key in ROWS if any(run.values(key) for run in runs)]
    labels = ["", "learning rate", *(label for label, _ in rows), "max gradient norm", "time (s)"]
    columns = (_column(run, [key for _, key in rows]) for run in runs)
    return [list(row) for row in zip(labels, *columns, strict=True)]


def _column(run: Run, keys: Sequence[str]) -> list[str]:
    cells = [run.arm, "none" if run.learning_rate is None else f"{run.learning_rate:.3g}"]
    for key in keys:
        values = run.values(key)
        cells.append(f"{values[0]:.3f} → {values[-1]:.3f}" if values else "none")
    norms = run.values("grad_norm")
    cells.append(f"{max(norms):.2f}" if norms else "none")
    seconds = (run.result or {}).get("wall_time_s")
    cells.append(run.status if seconds is None else f"{seconds:.0f}")
    return cells


def _clean(value: Any) -> Any:
    """The same with None for numbers that are not finite, six significant digits for the others, and plain keys."""
    if isinstance(value, Mapping):
        return {str(key): _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _json(report: Mapping[str, Any]) -> str:
    """JSON with a line for each item of a list at the top, such as a run."""

    def dump(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {dump(value)}" for key, value in report.items()) + "\n}\n"


def _print(runs: Sequence[Run], report: Mapping[str, Any], console: Console) -> None:
    first, *rest = report["verdict"]
    console.print(first, style="bold", markup=False, highlight=False)
    for sentence in rest:
        console.print(f"- {sentence}", markup=False, highlight=False)
    few = len(runs) <= 4 and len(grouped(runs)) == len(runs) and not report["tofu"]
    console.print(_first_to_last(runs) if few else _overview(report))


def _first_to_last(runs: Sequence[Run]) -> Table:
    header, *rows = table_rows(runs)
    table = Table(*map(markup.escape, header), title="First evaluation → last")
    for row in rows:
        table.add_row(*row)
    return table


def _overview(report: Mapping[str, Any]) -> Table:
    headings = [name if len(name) < 25 else name.split(" of ")[0] for name in report["base"]]
    columns = {name.replace("_", " "): name for name in TOFU}
    if report["frontier"]:
        columns |= {"KL": "kl", **{name: name for name in list(report["frontier"][0]["points"][0]["passes"])[-1:]}}
    columns |= {"max grad norm": "grad_norm_largest", "displacement": "displacement"}
    columns = {n: key for n, key in columns.items() if any(group.get(key) is not None for group in report["groups"])}
    table = Table("arm", "setting", *headings, *columns, "status", box=box.SIMPLE_HEAD)
    for group in report["groups"]:
        seeds = group["seeds"]
        short = setting_name(group["setting"]).replace("learning rate", "lr")
        table.add_row(
            markup.escape(group["arm"]),
            markup.escape(short),
            *(_fixed(score and score["mean"]) for score in group["final"].values()),
            *(_cell(group, key) for key in columns.values()),
            ", ".join(f"{count} {status}" for status, count in seeds.items() if count),
        )
    return table


def _html(title: str, runs: Sequence[Run], report: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["unbroken"] = _unbroken
    looks, compared, scores = figures.styles(report["arms"], arms(runs)), methods(runs), find_scores(runs)
    tried = [(name, name, f"Share of prompts of which one in {name[5:]} samples is right.") for name in passes(runs)]
    columns = [
        column for column in [*tried, *COLUMNS] if any(group.get(column[1]) is not None for group in report["groups"])
    ]
    return environment.get_template("report.html.jinja").render(
        title=title,
        report=report,
        looks=looks,
        finals=_final_figures(compared, report, looks),
        plane=figures.tofu_plane(report["tofu"], looks, "tofu")
        if report["tofu"] and report["tofu"]["points"]
        else None,
        frontiers=[
            {
                "title": f"{found['score']} against divergence"
                + (f", {setting_name(found['setting'])}" if found["setting"] else ""),
                "svg": figures.frontier_plot(found, looks, f"frontier{place}"),
            }
            for place, found in enumerate(report["frontier"])
        ],
        curves=_curve_figures(compared, looks),
        columns=columns,
        table=_table(report, columns, [score.name for score in scores if score.kept]),
        absent=[column[0] for column in COLUMNS if column not in columns and column[1] not in NOT_MISSED],
        definitions=[
            *((score.name, _definition(WorstKept)) for score in scores if isinstance(score, WorstKept)),
            *((heading, _definition(text)) for heading, _, text in columns),
        ],
        of_runs={name for run in report["runs"] for name in run["measures"]},
        broken=[run for run in runs if run.status != "finished"],
        log_problems=[run.log_problem for run in runs if run.log_problem],
        table_header=[f"final {name}" for name in report["base"]] + [column[0] for column in columns],
        differ=[name for name in ORIGIN if any(e[name] != report["provenance"][0][name] for e in report["provenance"])],
        setting_name=setting_name,
        number=number,
    )


def _unbroken(sentence: str) -> Markup:
    """A sentence whose learning rates are not broken at their minus."""
    return Markup(re.sub(r"\d[\d.]*e-\d+", r'<span class="unbroken">\g<0></span>', str(escape(sentence))))


def _final_figures(
    runs: Sequence[Run], report: Mapping[str, Any], looks: Mapping[str, figures.Style]
) -> list[dict[str, str]]:
    """One figure for each score and setting beside the learning rate."""
    found = []
    for place, score in enumerate(find_scores(runs)):
        for number_, rest in enumerate(conditions(runs)):
            members = [run for run in runs if condition(run) == rest]
            if not any(score.final(run) is not None for run in members):
                continue
            several = any(len(finals([run for run in members if run.arm == arm], score)) > 1 for arm in arms(members))
            draw = figures.range_plot if several else figures.final_plot
            svg = draw(members, score, score.bases(members), looks, f"final{place}x{number_}")
            found.append({"title": score.name + (f", {setting_name(rest)}" if rest else ""), "svg": svg})
    return found


def _curve_figures(runs: Sequence[Run], looks: Mapping[str, figures.Style]) -> list[dict[str, Any]]:
    """For each metric a strip of panels for each condition, a panel for each learning rate, all on one scale.

    With one setting there is one strip of all metrics.
    """
    settings: dict[str, list[list[Run]]] = {}
    for members in by_setting(runs):
        settings.setdefault(str(condition(members[0])), []).append(members)
    single = len(by_setting(runs)) == 1
    size = (4.2, 2.7) if single else (3.1, 2.4)
    rows: list[dict[str, Any]] = []
    for panel in figures.panels(runs):
        limits = figures.shared_limits(runs, panel)
        strips: list[list[str]] = []
        for strip in settings.values():
            titles = [panel.title if single else setting_name(members[0].setting) for members in strip]
            names = [f"curve{len(rows)}x{len(strips)}x{place}" for place in range(len(strip))]
            drawn = zip(strip, names, titles, strict=True)
            strips.append([figures.curve(each, panel, looks, name, title, limits, size) for each, name, title in drawn])
        rows.append({"title": panel.title, "strips": strips, "note": _outside(limits, figures.extent(runs, panel))})
    if not single or not rows:
        return rows
    notes = " ".join(f"{row['title']}: {row['note']}" for row in rows if row["note"])
    return [{"title": None, "strips": [[row["strips"][0][0] for row in rows]], "note": notes}]


def _outside(limits: tuple[float, float], extent: tuple[float, float]) -> str:
    if limits[0] <= extent[0] and extent[1] <= limits[1]:
        return ""
    return f"The axis leaves out the outermost values, which go from {number(extent[0])} to {number(extent[1])}."


def _table(
    report: Mapping[str, Any], columns: Sequence[Sequence[Any]], kept: Collection[str]
) -> list[list[dict[str, Any]]]:
    """The rows of each setting, an arm each; what is set beside the learning rate is in the first of its rows.

    Args:
        report: As in `report.json`.
        columns: Of [`COLUMNS`], those that are shown.
        kept: The scores of which 95 % of the base's is asked for.
    """
    settings: dict[str, list[dict[str, Any]]] = {}
    for group in report["groups"]:
        cells = []
        for name, score in group["final"].items():
            base = group["base"][name]
            lost = score and base and base > 0 and name in kept and score["min"] < measures.KEEP * base
            cells.append(
                {"text": _fixed(score and score["mean"]), "more": _least_to_largest(score), "lost": bool(lost)}
            )
        for _, key, _ in columns:
            dead = _seeds_of(group["dead"], group["seeds"]) if key == "model_utility" and group["dead"] else ""
            lost = bool(dead) or (key in COUNTS and bool(group[key]))
            cells.append({"text": _cell(group, key), "more": dead, "lost": lost})
        given = ABSENT if group["learning_rate"] is None else rate(group["learning_rate"])
        row = {"arm": group["arm"], "rate": given, "seeds": _seeds(group["seeds"]), "cells": cells}
        row["beside"] = setting_name({k: v for k, v in group["setting"].items() if k != "learning_rate"}, none="")
        settings.setdefault(str(group["setting"]), []).append(row)
    return list(settings.values())


def _seeds(seeds: Mapping[str, int]) -> str:
    """The number that finished, and the others if there are any."""
    others = [f"{seeds[status]} {status}" for status in STATUSES[1:] if seeds[status]]
    return ", ".join([str(seeds["finished"]), *others])


def _seeds_of(dead: int, seeds: Mapping[str, int]) -> str:
    return "collapsed" if sum(seeds.values()) == 1 else f"{dead} collapsed"


def _fixed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _least_to_largest(score: Mapping[str, Any] | None) -> str:
    return f"{score['min']:.3f} to {score['max']:.3f}" if score and score["seeds"] > 1 else ""


def _cell(group: Mapping[str, Any], key: str) -> str:
    value = group.get(key)
    if key == "collapse_step":
        absent = ABSENT if group["drawdown"] is None else "no"
        return absent if value is None else f"{group['collapsed']} from step {value}"
    if key.endswith("_ratio") and value is not None:
        return f"{value:.2f}"
    return ABSENT if value is None else number(value)


def _definition(text: Callable[..., Any] | str) -> str:
    """A sentence, or the first paragraph of a function's docstring without its marks."""
    if callable(text):
        text = " ".join((inspect.getdoc(text) or "").split("\n\n")[0].split())
    return text.replace("`", "")
