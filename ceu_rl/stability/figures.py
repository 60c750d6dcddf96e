"""The figures of a report, drawn by seaborn from the frames of a table, as SVG that stands inside an HTML page."""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
TITLES = {  # of the curves, by their metric
    "greedy accuracy": "greedy accuracy",
    "sampled accuracy": "sampled accuracy",
    "eval_reward": "reward, held out",
    "reward": "reward, training",
    "preference accuracy": "preference accuracy, held out",
    "DPO loss": "DPO loss, held out",
    "chosen": "chosen log-probability, nats per {unit}",
    "rejected": "rejected log-probability, nats per {unit}",
    "eval_world_facts_probability": "probability of the right world facts",
    "eval_real_authors_probability": "probability of the right real authors",
    "eval_solutions_nll": "NLL of solutions, nats per token",
    "eval_solutions_kl": "KL from the start on solutions, nats per token",
    "grad_norm": "gradient norm before clipping",
    "loss": "loss",
    "forget_loss": "loss on the forget set",
    "retain_loss": "loss on the retain set",
    "eval_kl": "KL from the start, nats per token",
    "eval_sampled_entropy": "entropy of samples, nats per token",
    "eval_entropy": "entropy, held out, nats per token",
    "ceu/descending_below_0.01": "share of descending tokens below 0.01",
    "ceu/descending_above_0.99": "share of descending tokens above 0.99",
    "ceu/gradient_descending": "share of the gradient on descending tokens",
    "ceu/gradient_below_0.01": "share of the gradient below 0.01",
    "ceu/gradient_above_0.99": "share of the gradient above 0.99",
    "rollout/ratio_positive": "importance ratio, positive advantage",
    "rollout/ratio_negative": "importance ratio, negative advantage",
    "rollout/mismatch_positive": "mismatch with rollouts in nats, positive advantage",
    "rollout/mismatch_negative": "mismatch with rollouts in nats, negative advantage",
}


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


def finals(table: Table, arms: Mapping[str, Look]) -> list[dict[str, str]]:
    """A figure for each score and condition in which a run has ended."""
    found: list[dict[str, str]] = []
    for score, condition in itertools.product(table.scores, table.about.condition.unique()):
        ends = table.ends[(table.ends.score == score.name) & (table.ends.condition == condition)]
        if ends.status.isin(("finished", "diverged")).any():
            title = f"{score.name} ({condition})" if condition else score.name
            found.append({"title": title, "svg": _final(ends, score, arms, f"final{len(found)}")})
    return found


def _final(ends: pd.DataFrame, score: Score, arms: Mapping[str, Look], name: str) -> str:
    """Final scores at each learning rate; a cross below for a run that diverged."""
    ends = ends.assign(at=["" if math.isnan(each) else rate(each) for each in ends.rate]).sort_values("rate")
    known, diverged = ends.dropna(subset=["final"]), ends[ends.status == "diverged"]
    order, places = [arm for arm in arms if arm in set(ends.arm)], list(ends["at"].unique())

    def draw(axes: Axes) -> None:
        for base in sorted(set(ends.base.dropna())):
            axes.axhline(base, color=GREY, lw=1, ls=":", zorder=1)
            if score.kept and base > 0:
                axes.axhline(KEEP * base, color=GREY, lw=1, ls="--", zorder=1)
        style = {key: value for key, value in _styled(arms).items() if key in ("hue", "palette", "errorbar", "legend")}
        apart = {"dodge": len(order) > 1 and min(0.5, 0.08 * len(order)), "hue_order": order, "order": places}
        markers = [arms[arm].marker for arm in order]
        sns.pointplot(known, x="at", y="final", markers=markers, ms=6, lw=1.5, ax=axes, **style, **apart)
        axes.set(xlabel="learning rate" if ends.rate.notna().any() else "", ylabel="")
        if "accuracy" in score.name:
            axes.set_ylim(-0.04, 1.04)
        for run in diverged.itertuples():
            look: Any = {"color": arms[run.arm].colour, "transform": axes.get_xaxis_transform()}
            axes.plot(places.index(run.at), 0.03, "x", ms=8, mew=2, zorder=4, **look)

    means = known.groupby(["arm", "at"], sort=False).final.mean()
    spoken = [f"{arm} {number(mean)}" + (f" at {at}" if at else "") for (arm, at), mean in means.items()]
    return _drawn((5.0, 3.3), draw, name, f"Final {score.name}: {', '.join(spoken) or 'no run has finished'}.")


def curves(table: Table, arms: Mapping[str, Look]) -> list[dict[str, Any]]:
    """For each metric a strip of panels, one for each setting: means over seeds, bands over their range."""
    values, settings = table.values[np.isfinite(table.values.value)], list(table.about.setting.unique())
    found: list[dict[str, Any]] = []
    for metric, title in TITLES.items():
        logarithmic = metric == "grad_norm" or "ratio" in metric
        own = values[(values.metric == metric) & ((values.value > 0) | (not logarithmic))]
        if own.empty:
            continue
        title = title.format(unit="token" if any(table.tokens) else "response")
        panels = {"col": "setting", "col_order": [each for each in settings if each in set(own.setting)]}
        style = _styled(arms) | ({"markers": False} if own.step.nunique() > 12 else {})
        with sns.axes_style("ticks", STYLE), matplotlib.rc_context(STYLE):
            grid = sns.relplot(
                _binned(own), kind="line", x="step", y="value", height=2.5, aspect=1.3, **panels, **style
            )
            grid.set_titles("{col_name}" if len(settings) > 1 else "")
            grid.set(ylabel="")
            for axes in grid.axes.flat:
                if logarithmic:
                    _log_axis(axes)
                axes.grid(True)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            svg = _svg(grid.figure, f"curve{len(found)}", f"{title} over steps: {', '.join(own.arm.unique())}.")
            plt.close(grid.figure)
        found.append({"title": title, "svg": svg, "panels": grid.axes.size})
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
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def plane(found: Mapping[str, Any], arms: Mapping[str, Look], name: str) -> str:
    """Two coordinates of each arm at each setting, with its seeds; a line joins the settings of an arm."""
    points = found["points"]
    floor = min([y for point in points for _, y in point["seeds"] if y > 0], default=1e-3) / 3
    low = floor if found["logarithmic"] else -math.inf

    def draw(axes: Axes) -> None:
        def mark(places: Sequence[Sequence[float]], marker: str, **look: Any) -> None:
            axes.plot(*zip(*((x, max(y, low)) for x, y in places), strict=True), marker, **look)

        for level, line in ((found.get("x_line"), axes.axvline), (found.get("y_line"), axes.axhline)):
            if level is not None:
                line(level, color=GREY, ls="--", lw=1)
        for arm, look in arms.items():
            own = [point for point in points if point["arm"] == arm]
            at = [(point["x"], point["y"]) for point in own]
            if own:
                mark(at, "-", color=look.colour, lw=0.9, alpha=0.55)
                mark(
                    [seed for point in own for seed in point["seeds"]],
                    look.marker,
                    color=look.colour,
                    ms=3.5,
                    alpha=0.4,
                )
                mark(at, look.marker, color=look.colour, ms=7, zorder=4)
            for point in own:
                where: Any = {"xytext": (6, -9), "textcoords": "offset points", "fontsize": 7.5, "color": look.colour}
                axes.annotate(rate(point["rate"]) if point["rate"] else "", (point["x"], max(point["y"], low)), **where)
        if lost := [(point["x"], point["y"]) for point in points if point["lost"]]:
            mark(lost, "x", color="black", ms=8, mew=1.6, zorder=5)
        for label, (x, y) in found["around"].items():
            mark([(x, y)], "*", color="black", ms=11, zorder=5)
            axes.annotate(label, (x, max(y, low)), (0, 8), textcoords="offset points", fontsize=8, ha="center")
        if found["logarithmic"]:
            _log_axis(axes)
        axes.set(xlabel=found["x"], ylabel=found["y"])
        axes.margins(0.12)

    spoken = [f"{point['arm']} {number(point['x'])}, {number(point['y'])}" for point in points]
    return _drawn((6.2, 4.2), draw, name, f"{found['y']} against {found['x']}: {'; '.join(spoken)}.")


def _drawn(size: tuple[float, float], draw: Callable[[Axes], None], name: str, alt: str) -> str:
    with sns.axes_style("whitegrid", STYLE), matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return _svg(figure, name, alt)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """An `<svg>` that scales with its box, and whose ids begin with the name."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', body)[1]  # type: ignore[index]
    tag = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = re.sub(r"<svg[^>]*>", lambda _: tag, body[body.index("<svg") :], count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', lambda start: f"{start[1]}{name}-", body)
