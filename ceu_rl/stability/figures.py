"""The figures of a report, drawn by seaborn from the frames of a table, as SVG that stands inside an HTML page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from .runs import rate
from .table import KEEP, STEP_MEANS, Score, Table, number, unique

# The baseline in grey, then Okabe and Ito, then Tol's wine and olive: safe for colour blindness
COLOURS = ("#404040", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS, SYMBOLS = "osD^vPX<>", "●■◆▲▼✚✖◀▶"
BINS = 60  # points of a curve that was logged at every step
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ceu_rl",
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "grid.color": "#e4e4e4",
}
# Title, metric, whether the axis is logarithmic
PANELS = (
    ("greedy accuracy", "greedy accuracy", False),
    ("sampled accuracy", "sampled accuracy", False),
    ("reward, held out", "eval_reward", False),
    ("reward, training", "reward", False),
    ("preference accuracy, held out", "preference accuracy", False),
    ("DPO loss, held out", "DPO loss", False),
    ("chosen log-probability, nats per {unit}", "chosen", False),
    ("rejected log-probability, nats per {unit}", "rejected", False),
    ("probability of the right world facts", "eval_world_facts_probability", False),
    ("probability of the right real authors", "eval_real_authors_probability", False),
    ("NLL of solutions, nats per token", "eval_solutions_nll", False),
    ("KL from the start on solutions, nats per token", "eval_solutions_kl", False),
    ("gradient norm before clipping", "grad_norm", True),
    ("loss", "loss", False),
    ("loss on the forget set", "forget_loss", False),
    ("loss on the retain set", "retain_loss", False),
    ("KL from the start, nats per token", "eval_kl", False),
    ("entropy, nats per token", "entropy at evaluations", False),
    *((name, key, "ratio" in key) for key, name in STEP_MEANS.items()),
)


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    colour: str
    marker: str
    symbol: str


def looks(compared: Sequence[str], every: Sequence[str]) -> dict[str, Look]:
    """The first of the arms that are compared is the baseline; an arm beside them, such as the base, is a star."""
    found = {
        arm: Look(COLOURS[(place - 1) % 8 + 1 if place else 0], MARKERS[place % 9], SYMBOLS[place % 9])
        for place, arm in enumerate(compared)
    }
    return found | {arm: Look("#000000", "*", "★") for arm in every if arm not in found}


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


def final_plot(ends: pd.DataFrame, score: Score, arms: Mapping[str, Look], name: str) -> str:
    """Final score against learning rate, or of each arm where there is one; a cross below for a run that diverged."""
    known = ends.dropna(subset=["final"])
    diverged = ends[ends.status == "diverged"]
    several = ends.rate.nunique() > 1
    order = [arm for arm in arms if arm in set(ends.arm)]

    def draw(axes: Axes) -> None:
        line = axes.axhline if several else axes.axvline
        for base in sorted(set(ends.base.dropna())):
            line(base, color="#808080", lw=1, ls=":", zorder=1)
            if score.kept and base > 0:
                line(KEEP * base, color="#808080", lw=1, ls="--", zorder=1)
        if several:
            sns.lineplot(known, x="rate", y="final", err_style="bars", ax=axes, **_styled(arms))
            axes.set(xscale="log", xlabel="learning rate", ylabel="")
            axes.set_xticks(sorted(set(ends.rate.dropna()))[:: max(1, ends.rate.nunique() // 6)])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            for place, arm in enumerate(order):
                own, look = known[known.arm == arm].final, arms[arm]
                axes.plot(own, [place] * len(own), look.marker, color=look.colour, alpha=0.6, ms=7, zorder=3)
                if len(own):
                    axes.plot([own.mean()] * 2, [place - 0.3, place + 0.3], color=look.colour, lw=2)
            axes.set_yticks(range(len(order)), [arm if len(arm) <= 18 else f"{arm[:17]}…" for arm in order])
            axes.set_ylim(len(order) - 0.4, -0.6)
        if "accuracy" in score.name:
            (axes.set_ylim if several else axes.set_xlim)(-0.04, 1.04)
        for run in diverged.itertuples():
            at = (run.rate, 0.03) if several else (0.03, order.index(run.arm))
            transform = axes.get_xaxis_transform() if several else axes.get_yaxis_transform()
            axes.plot(*at, "x", color=arms[run.arm].colour, transform=transform, ms=8, mew=2, zorder=4)

    means = known.groupby(["arm", "rate"], sort=False, dropna=False).final.mean()
    spoken = [f"{arm} {number(mean)}" + (f" at {rate(each)}" if several else "") for (arm, each), mean in means.items()]
    figure = Figure(figsize=(5.0, 3.3 if several else 1.2 + 0.45 * len(order)), layout="constrained")
    return _drawn(figure, draw, name, f"Final {score.name}: {', '.join(spoken) or 'no run has finished'}.")


def curves(table: Table, runs: Sequence[int], arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each metric a strip of panels, one for each setting: means over seeds, bands over their range."""
    values = table.values[table.values.run.isin(runs) & np.isfinite(table.values.value)]
    settings = unique(table.labels[place] for place in runs)
    found: list[dict[str, Any]] = []
    for title, metric, logarithmic in PANELS:
        own = values[values.metric == metric]
        own = own[own.value > 0] if logarithmic else own
        if own.empty:
            continue
        title = title.format(unit="token" if any(table.tokens) else "response")
        with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
            grid = sns.relplot(
                _binned(own),
                kind="line",
                x="step",
                y="value",
                col="setting",
                col_order=[each for each in settings if each in set(own.setting)],
                height=2.5,
                aspect=1.3,
                **_styled(arms) | ({"markers": False} if own.step.nunique() > 12 else {}),
            )
            grid.set_titles("{col_name}" if len(settings) > 1 else title)
            grid.set(ylabel="")
            note = _limits(grid, own.value, logarithmic)
            for axes in grid.axes.flat:
                axes.grid(True)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            svg = _svg(grid.figure, f"curve{len(found)}", f"{title} over steps: {', '.join(unique(own.arm))}.")
            plt.close(grid.figure)
        found.append({"title": title, "svg": svg, "panels": grid.axes.size, "note": note})
    return found


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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _limits(grid: sns.FacetGrid, values: pd.Series, logarithmic: bool) -> str:
    if logarithmic:
        for axes in grid.axes.flat:
            _log_axis(axes)
        return ""
    low, high = np.percentile(values, (1, 99))
    if values.max() - values.min() <= 3 * (high - low) or high == low:
        return ""
    grid.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    return f"The axis leaves out the outermost values, from {number(values.min())} to {number(values.max())}."


def plane(points: Sequence[Mapping[str, Any]], found: Mapping[str, Any], arms: Mapping[str, Look], name: str) -> str:
    """Two coordinates of each arm at each setting, with its seeds: a plane of TOFU or of reward and divergence."""
    floor = min([each for p in points for _, each in p["seeds"] if each > 0], default=1e-3) / 3
    low = floor if found["logarithmic"] else -math.inf

    def draw(axes: Axes) -> None:
        for level, line in ((found.get("x_line"), axes.axvline), (found.get("y_line"), axes.axhline)):
            if level is not None:
                line(level, color="#808080", ls="--", lw=1)
        for point in points:
            look, seeds = arms[point["arm"]], [(x, max(y, low)) for x, y in point["seeds"]]
            if len(point.get("path", ())) > 1:
                axes.plot(*zip(*point["path"], strict=True), color=look.colour, lw=0.9, alpha=0.55)
            if len(seeds) > 1:
                axes.plot(*zip(*seeds, strict=True), look.marker, color=look.colour, ms=3.5, alpha=0.4, lw=0)
            axes.plot(point["x"], max(point["y"], low), look.marker, color=look.colour, ms=7, zorder=4)
            if point["lost"]:
                axes.plot(point["x"], max(point["y"], low), "x", color="black", ms=8, mew=1.6, zorder=5)
        front = sorted((p["x"], max(p["y"], low)) for p in points if p.get("front"))
        if front:
            axes.plot(*zip(*front, strict=True), color="#b0b0b0", lw=4, alpha=0.5, drawstyle="steps-pre", zorder=1)
        for label, (x, y) in found["around"].items():
            axes.plot(x, max(y, low), "*", color="black", ms=11, zorder=5)
            axes.annotate(label, (x, max(y, low)), (0, 8), textcoords="offset points", fontsize=8, ha="center")
        if found["logarithmic"]:
            _log_axis(axes)
        axes.set(xlabel=found["x"], ylabel=found["y"])
        axes.margins(0.12)
        for point in _apart([p for p in points if p["rate"] is not None], axes, low):
            at = point["x"], max(point["y"], low)
            label, colour = rate(point["rate"]), arms[point["arm"]].colour
            axes.annotate(label, at, (6, -9), textcoords="offset points", fontsize=7.5, color=colour)

    spoken = [f"{p['arm']} {number(p['x'])}, {number(p['y'])}" for p in points]
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    return _drawn(figure, draw, name, f"{found['y']} against {found['x']}: {'; '.join(spoken)}.")


def _apart(points: Sequence[Mapping[str, Any]], axes: Axes, low: float) -> list[Mapping[str, Any]]:
    """The points whose labels do not stand on each other."""
    to_axes, taken = axes.transData + axes.transAxes.inverted(), list[tuple[float, float]]()
    kept = []
    for point in points:
        x, y = to_axes.transform((point["x"], max(point["y"], low)))
        if not any(abs(x - a) < 0.09 and abs(y - b) < 0.05 for a, b in taken):
            taken.append((x, y))
            kept.append(point)
    return kept


def _drawn(figure: Figure, draw: Any, name: str, alt: str) -> str:
    with sns.axes_style("whitegrid", STYLE), matplotlib.rc_context(STYLE):
        draw(figure.subplots())
        return _svg(figure, name, alt)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """An `<svg>` that scales with its box, and whose ids begin with the name."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', body)[1]  # type: ignore[index]
    alt = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    tag = f'<svg role="img" aria-label="{alt}" viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = re.sub(r"<svg[^>]*>", lambda _: tag, body[body.index("<svg") :], count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', lambda start: f"{start[1]}{name}-", body)
