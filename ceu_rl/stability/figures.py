"""The figures of a report, drawn by seaborn from the frames of a table, as SVG that stands inside an HTML page."""

import hashlib
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .runs import rate
from .table import KEEP, Table

# The baseline in grey, then Okabe and Ito, then Tol's wine and olive: safe for colour blindness
COLOURS = ("#404040", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS, SYMBOLS = "osD^vPX<>", "●■◆▲▼✚✖◀▶"
GREY = "#808080"
PANEL: Any = {"height": 2.5, "aspect": 1.3}
WIDTH = 0.4  # of the arms at one rate, beside each other
POINTS = 120  # at most in a curve, the last one among them
STYLE: Any = {
    **sns.axes_style("ticks"),
    "svg.fonttype": "none",
    "svg.hashsalt": "ceu_rl",
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
}
CURVES = (  # the metrics that are drawn over steps, by the names that runs and tables give them
    *("greedy accuracy", "sampled accuracy", "eval_reward", "reward", "preference accuracy", "DPO loss"),
    *("chosen", "rejected", "eval_world_facts_probability", "eval_real_authors_probability", "eval_solutions_nll"),
    *("eval_solutions_kl", "grad_norm", "loss", "forget_loss", "retain_loss", "eval_kl", "eval_sampled_entropy"),
    *("eval_entropy", "ceu/descending_fraction", "ceu/weight_mean"),
)


class Look(NamedTuple):
    """How an arm is drawn, the same in every figure."""

    colour: str
    marker: str
    symbol: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """The look of each arm, the first of which is the baseline."""
    colours = itertools.chain(COLOURS[:1], itertools.cycle(COLOURS[1:]))
    found = map(Look, colours, itertools.cycle(MARKERS), itertools.cycle(SYMBOLS))
    return dict(zip(arms, found, strict=False))


@matplotlib.rc_context(STYLE)
def finals(table: Table, arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each score its final values by learning rate, a cross below for a run that diverged."""
    found = []
    for score in table.scores:
        ends = table.ends_of(range(len(table.runs)), score).sort_values("rate", kind="stable")
        ends["learning rate"] = ["" if math.isnan(each) else rate(each) for each in ends.rate]
        if ends.final.isna().all():
            continue
        known, order = ends.dropna(subset=["final"]), [*ends["learning rate"].unique()]
        shifts = dict(zip(arms, np.linspace(-WIDTH / 2, WIDTH / 2, len(arms)), strict=True))
        grid = sns.catplot(
            known, kind="point", x="learning rate", y="final", col="condition", hue="arm", errorbar=("pi", 100),
            order=order, hue_order=[*arms], palette=[look.colour for look in arms.values()], legend=False, lw=1.2, ms=5,
            markers=[look.marker for look in arms.values()], dodge=WIDTH if len(arms) > 1 else False, **PANEL,
        )  # fmt: skip
        _headed(grid)
        for condition, axes in grid.axes_dict.items():
            for base in ends.base.dropna().unique():
                axes.axhline(base, color=GREY, lw=1, ls=":", zorder=1)
                if score.kept and base > 0:
                    axes.axhline(KEEP * base, color=GREY, lw=1, ls="--", zorder=1)
            if "accuracy" in score.name:
                axes.set_ylim(-0.04, 1.04)
            for arm, own in ends[(ends.status == "diverged") & (ends.condition == condition)].groupby("arm"):
                low: Any = {"color": arms[arm].colour, "transform": axes.get_xaxis_transform()}
                at = [order.index(each) + shifts[arm] for each in own["learning rate"]]
                axes.plot(at, [0.03] * len(own), "x", ms=8, mew=2, zorder=4, **low)
        found.append({"title": score.name, "panels": grid.axes.size, "svg": _svg(grid.figure)})
    return found


@matplotlib.rc_context(STYLE)
def curves(table: Table, arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each metric of `CURVES` its values over the steps."""
    found = []
    values = table.values[np.isfinite(table.values.value)]
    for metric in CURVES:
        own = values[(values.metric == metric) & ((values.value > 0) | (metric != "grad_norm"))]
        if own.empty:
            continue
        steps = np.sort(own.step.unique())[::-1]
        own = own[own.step.isin(steps[:: len(steps) // POINTS + 1])]
        style = _styled(arms) | ({"markers": False} if own.step.nunique() > 12 else {})
        grid = _headed(sns.relplot(own, kind="line", x="step", y="value", col="setting", **PANEL, **style))
        for axes in grid.axes.flat:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if metric == "grad_norm":
                _log_axis(axes)
        title = f"log-probability of {metric}, nats per token" if metric in ("chosen", "rejected") else metric
        found.append({"title": title, "panels": grid.axes.size, "svg": _svg(grid.figure)})
    return found


def _headed(grid: sns.FacetGrid) -> sns.FacetGrid:
    return grid.set_titles("{col_name}" if grid.axes.size > 1 else "").set(ylabel="")


def _styled(arms: Mapping[str, Look]) -> dict[str, Any]:
    """What seaborn takes: an arm's colour and marker, and the range of the seeds around their mean."""
    return {
        "hue": "arm",
        "palette": {arm: look.colour for arm, look in arms.items()},
        "style": "arm",
        "markers": {arm: look.marker for arm, look in arms.items()},
        "dashes": False,
        "errorbar": ("pi", 100),
        "legend": False,
    }


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


@matplotlib.rc_context(STYLE)
def plane(frame: pd.DataFrame, arms: Mapping[str, Look], useful: float | None, forgotten: float) -> str:
    """Forget quality and utility of each run, small, and medians of a setting; a line joins the settings of an arm."""
    x, y = "model_utility", "forget_quality"
    known = frame.dropna(subset=[x, y])
    medians = known.groupby(["arm", "group"], sort=False)[[x, y, "rate"]].median().reset_index()
    lost = set(frame.group[frame.status == "diverged"])
    figure, axes = plt.subplots(figsize=(6.2, 4.2), layout="constrained")
    sns.lineplot(medians, x=x, y=y, ax=axes, estimator=None, sort=False, lw=0.9, ms=7, **_styled(arms))
    for arm, own in known.groupby("arm"):
        axes.plot(own[x], own[y], arms[arm].marker, color=arms[arm].colour, ms=3.5, alpha=0.4)
    for point in medians.to_dict("records"):
        at, said = (point[x], point[y]), "" if math.isnan(point["rate"]) else rate(point["rate"])
        text: Any = {"color": arms[point["arm"]].colour, "textcoords": "offset points", "fontsize": 7.5}
        axes.annotate(said, at, (6, -9), **text)
        if point["group"] in lost:
            axes.plot(*at, "x", color="black", ms=8, mew=1.6, zorder=5)
    axes.axhline(forgotten, color=GREY, ls="--", lw=1)
    if useful is not None:
        axes.axvline(useful, color=GREY, ls="--", lw=1)
    _log_axis(axes)
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    axes.margins(0.12)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """An `<svg>` that scales with its box."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    body = file.getvalue()
    name = hashlib.sha256(body.encode()).hexdigest()[:8]  # ids are of the whole page
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body[body.index("<svg") :])
