"""The figures of a report, drawn by seaborn from the frames of a table, as SVG that stands inside an HTML page."""

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
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .runs import rate
from .table import KEEP, Score, Table, number

# The baseline in grey, then Okabe and Ito, then Tol's wine and olive: safe for colour blindness
COLOURS = ("#404040", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS, SYMBOLS = "osD^vPX<>", "●■◆▲▼✚✖◀▶"
GREY = "#808080"
BINS = 60  # points of a curve that was logged at every step
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ceu_rl",
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "grid.color": "#e4e4e4",
}
CURVES = (  # the metrics that are drawn over steps, by the names that runs and tables give them
    *("greedy accuracy", "sampled accuracy", "eval_reward", "reward", "preference accuracy", "DPO loss"),
    *("chosen", "rejected", "eval_world_facts_probability", "eval_real_authors_probability", "eval_solutions_nll"),
    *("eval_solutions_kl", "grad_norm", "loss", "forget_loss", "retain_loss", "eval_kl", "eval_sampled_entropy"),
    *("eval_entropy", "ceu/descending_below_0.01", "ceu/descending_above_0.99", "ceu/gradient_descending"),
    *("ceu/gradient_below_0.01", "ceu/gradient_above_0.99", "rollout/ratio_positive", "rollout/ratio_negative"),
    *("rollout/mismatch_positive", "rollout/mismatch_negative"),
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


def finals(table: Table, arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each score its final values by learning rate, a cross below for a run that diverged."""
    found: list[dict[str, Any]] = []
    for score in table.scores:
        ends = table.ends_of(range(len(table.runs)), score).sort_values("rate", kind="stable")
        ends["learning rate"] = ["" if math.isnan(each) else rate(each) for each in ends.rate]
        known, diverged = ends.dropna(subset=["final"]), ends[ends.status == "diverged"]
        if known.empty:
            continue

        def draw(axes: Axes, condition: str, score: Score = score, diverged: pd.DataFrame = diverged) -> None:
            for base in table.ends_of(range(len(table.runs)), score).base.dropna().unique():
                axes.axhline(base, color=GREY, lw=1, ls=":", zorder=1)
                if score.kept and base > 0:
                    axes.axhline(KEEP * base, color=GREY, lw=1, ls="--", zorder=1)
            if "accuracy" in score.name:
                axes.set_ylim(-0.04, 1.04)
            for run in diverged[diverged.condition == condition].to_dict("records"):
                look: Any = {"color": arms[run["arm"]].colour, "transform": axes.get_xaxis_transform()}
                axes.plot([run["learning rate"]], 0.03, "x", ms=8, mew=2, zorder=4, **look)

        means = known.groupby(["arm", "setting"], sort=False).final.mean()
        spoken = ", ".join(f"{arm} {number(mean)} at {at}" for (arm, at), mean in means.items())
        drawn = _strip(known, "learning rate", "final", "condition", arms, draw, f"final{len(found)}", spoken)
        found.append({"title": score.name, **drawn})
    return found


def curves(table: Table, arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each metric of `CURVES` its values over the steps."""
    found: list[dict[str, Any]] = []
    values = table.values[np.isfinite(table.values.value)]
    for metric in CURVES:
        logarithmic = metric == "grad_norm" or "ratio_" in metric
        own = values[(values.metric == metric) & ((values.value > 0) | (not logarithmic))]
        if own.empty:
            continue

        def draw(axes: Axes, setting: str, logarithmic: bool = logarithmic) -> None:
            if logarithmic:
                _log_axis(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

        title = f"log-probability of {metric}, nats per token" if metric in ("chosen", "rejected") else metric
        spoken = f"over steps: {', '.join(own.arm.unique())}"
        drawn = _strip(_binned(own), "step", "value", "setting", arms, draw, f"curve{len(found)}", spoken)
        found.append({"title": title, **drawn})
    return found


def _strip(
    frame: pd.DataFrame, x: str, y: str, column: str, arms: Mapping[str, Look], draw: Any, name: str, alt: str
) -> dict[str, Any]:
    """Panels side by side: means over seeds, with their range."""
    style = _styled(arms) | ({"markers": False} if frame[x].nunique() > 12 else {})
    style |= {"err_style": "bars"} if y == "final" else {}
    with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
        grid = sns.relplot(frame, kind="line", x=x, y=y, col=column, height=2.5, aspect=1.3, **style)
        grid.set_titles("{col_name}" if grid.axes.size > 1 else "").set(ylabel="")
        for panel, axes in grid.axes_dict.items():
            axes.grid(True)
            draw(axes, panel)
        svg = _svg(grid.figure, name, alt)
        plt.close(grid.figure)
    return {"svg": svg, "panels": grid.axes.size}


def _binned(frame: pd.DataFrame) -> pd.DataFrame:
    """Curves with many points: the median of each run in each of `BINS` bins of steps."""
    if frame.step.nunique() <= 2 * BINS:
        return frame
    width = (frame.step.max() - frame.step.min()) / BINS
    middle = ((frame.step - frame.step.min()) // width + 0.5) * width + frame.step.min()
    keys = ["run", "arm", "setting", "seed", "step"]
    return frame.assign(step=middle).groupby(keys, as_index=False, sort=False).value.median()


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def plane(found: Mapping[str, Any], arms: Mapping[str, Look], name: str) -> str:
    """Two coordinates of each arm at each setting, with its seeds; a line joins the settings of an arm."""
    points = found["points"]
    with sns.axes_style("whitegrid", STYLE), matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.subplots()
        if found["logarithmic"]:
            _log_axis(axes)
        for level, line in ((found.get("x_line"), axes.axvline), (found.get("y_line"), axes.axhline)):
            if level is not None:
                line(level, color=GREY, ls="--", lw=1)
        for arm, look in arms.items():
            own = [point for point in points if point["arm"] == arm]
            seeds = np.array([seed for point in own for seed in point["seeds"]]).reshape(-1, 2)
            style: Any = {"color": look.colour, "marker": look.marker}
            axes.plot(*seeds.T, ls="", ms=3.5, alpha=0.4, **style)
            axes.plot([point["x"] for point in own], [point["y"] for point in own], lw=0.9, ms=7, **style)
            for point in own:
                where: Any = {"xytext": (6, -9), "textcoords": "offset points", "fontsize": 7.5, "color": look.colour}
                axes.annotate(rate(point["rate"]) if point["rate"] else "", (point["x"], point["y"]), **where)
                if point["lost"]:
                    axes.plot(point["x"], point["y"], "x", color="black", ms=8, mew=1.6, zorder=5)
        for label, at in found["around"].items():
            axes.plot(*at, "*", color="black", ms=11, zorder=5)
            axes.annotate(label, at, (0, 8), textcoords="offset points", fontsize=8, ha="center")
        axes.set(xlabel=found["x"], ylabel=found["y"])
        axes.margins(0.12)
        spoken = [f"{point['arm']} {number(point['x'])}, {number(point['y'])}" for point in points]
        return _svg(figure, name, f"{found['y']} against {found['x']}: {'; '.join(spoken)}.")


def _svg(figure: Figure, name: str, alt: str) -> str:
    """An `<svg>` that scales with its box, and whose ids begin with the name."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', body)[1]  # type: ignore[index]
    tag = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = re.sub(r"<svg[^>]*>", lambda _: tag, body[body.index("<svg") :], count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', lambda start: f"{start[1]}{name}-", body)
