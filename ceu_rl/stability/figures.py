"""The figures of a report: each one panel, drawn by matplotlib, as SVG that stands inside an HTML page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .measures import KEEP
from .runs import Run
from .summary import ENTROPIES, FORGET_QUALITY, KEEP_UTILITY, STEP_MEANS, Score, arms, finals, passes, response_tokens
from .verdict import number, rate

BASELINE = "#404040"
# Okabe and Ito, then Tol's wine and olive: safe for colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = "osD^vPX<>"
SYMBOLS = "●■◆▲▼✚✖◀▶"
BINS = 60  # points of a curve that was logged at every step
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ceu_rl",
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, the same in every figure."""

    colour: str
    marker: str
    symbol: str


@dataclass(frozen=True)
class Panel:
    """A curve over steps: what it shows, where it is logged, its scale, and by what the values of a run are divided."""

    title: str
    key: str
    logarithmic: bool = False
    bounded: bool = False
    divisors: Mapping[Path, float] | None = None


def styles(compared: Sequence[str], every: Sequence[str]) -> dict[str, Style]:
    """The first of the arms that are compared is the baseline, in grey; an arm beside them is a star."""
    looks = {}
    for place, name in enumerate(compared):
        colour = COLOURS[(place - 1) % len(COLOURS)] if place else BASELINE
        looks[name] = Style(colour, MARKERS[place % len(MARKERS)], SYMBOLS[place % len(SYMBOLS)])
    beside = (name for name in every if name not in looks)
    return looks | {name: Style("#000000", "*", "☆" if name.startswith("retain") else "★") for name in beside}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which at least one run has data."""
    tokens = response_tokens(runs)
    unit = "nats per token" if tokens else "nats per response"
    entropy = next((key for key in ENTROPIES if any(run.values(key) for run in runs)), ENTROPIES[-1])
    reward = "eval_reward" if any(run.values("eval_reward") for run in runs) else "reward"
    found = (
        Panel("greedy accuracy", "eval_greedy_accuracy", bounded=True),
        Panel("sampled accuracy", "eval_sampled_accuracy", bounded=True),
        Panel("reward, held out" if reward == "eval_reward" else "reward, training", reward),
        *(Panel(f"{name}, held out", key, bounded=True) for name, key in passes(runs).items()),
        Panel("preference accuracy, held out", "eval_rewards/accuracies", bounded=True),
        *(
            Panel(
                f"{name} log-probability, {unit}",
                f"eval_logps/{name}",
                divisors={folder: counts[name] for folder, counts in tokens.items()} or None,
            )
            for name in ("chosen", "rejected")
        ),
        Panel("probability of the right world facts", "eval_world_facts_probability", bounded=True),
        Panel("probability of the right real authors", "eval_real_authors_probability", bounded=True),
        Panel("NLL of solutions, nats per token", "eval_solutions_nll"),
        Panel("KL from the start on solutions, nats per token", "eval_solutions_kl"),
        Panel("gradient norm before clipping", "grad_norm", logarithmic=True),
        Panel("loss", "loss"),
        Panel("loss on the forget set", "forget_loss"),
        Panel("loss on the retain set", "retain_loss"),
        Panel("KL from the start, nats per token", "eval_kl"),
        Panel("entropy, nats per token", entropy),
        Panel("share of descending tokens below 0.01", STEP_MEANS["descending_rare"], bounded=True),
        Panel("share of descending tokens above 0.99", STEP_MEANS["descending_sure"], bounded=True),
        Panel("their share of the gradient, below 0.01", STEP_MEANS["gradient_rare"], bounded=True),
        Panel("their share of the gradient, above 0.99", STEP_MEANS["gradient_sure"], bounded=True),
        *(
            Panel(f"{name}, {sign} advantage", STEP_MEANS[f"{key}_{sign}"], logarithmic=key == "ratio")
            for key, name in (("ratio", "importance ratio"), ("mismatch", "mismatch with rollouts, nats"))
            for sign in ("positive", "negative")
        ),
    )
    return [panel for panel in found if any(math.isfinite(value) for run in runs for _, value in scaled(run, panel))]


def range_plot(
    runs: Sequence[Run], score: Score, bases: Mapping[str, float], looks: Mapping[str, Style], name: str
) -> str:
    """Final score against learning rate: mean over seeds, whiskers from the least to the largest.

    A marker is filled where every seed keeps 95 % of the base's score, and a cross at the bottom is a diverged run.
    """
    grids = {arm: grid for arm in arms(runs) if (grid := finals([run for run in runs if run.arm == arm], score))}
    means = {arm: [(x, float(np.mean(_finite(ends)))) for x, ends in _known(grid)] for arm, grid in grids.items()}

    def draw(axes: Axes) -> None:
        crosses = []
        for place, (arm, grid) in enumerate(grids.items()):
            shift, look = 1.045 ** (place - (len(grids) - 1) / 2), looks[arm]
            axes.plot([x * shift for x, _ in means[arm]], [mean for _, mean in means[arm]], color=look.colour, zorder=3)
            for x, ends in _known(grid):
                _seeds_at(axes, x * shift, list(ends.values()), look, _limit(score, bases.get(arm)))
            crosses += [(x * shift, look.colour) for x, ends in grid.items() if len(_finite(ends)) < len(ends)]
        _reference_lines(axes.axhline, score, bases)
        _rate_axis(axes, sorted({rate for grid in grids.values() for rate in grid}))
        axes.set_xlabel("learning rate")
        if "accuracy" in score.name:
            axes.set_ylim(-0.04, 1.04)
        _diverged(axes, crosses)

    spoken = [f"{arm}: {', '.join(f'{number(mean)} at {rate(x)}' for x, mean in each)}" for arm, each in means.items()]
    return _svg(draw, (5.0, 3.3), name, f"Final {score.name} against learning rate. {'; '.join(spoken)}.")


def _known(grid: Mapping[float, Mapping[int, float]]) -> list[tuple[float, Mapping[int, float]]]:
    """The learning rates with a finite score, in order."""
    return [(x, ends) for x, ends in sorted(grid.items()) if _finite(ends)]


def _finite(ends: Mapping[int, float]) -> list[float]:
    return [end for end in ends.values() if math.isfinite(end)]


def _seeds_at(axes: Axes, x: float, ends: Sequence[float], look: Style, limit: float) -> None:
    known = [end for end in ends if math.isfinite(end)]
    mean, keeps = float(np.mean(known)), len(known) == len(ends) and min(known) >= limit
    axes.errorbar(x, mean, _error(mean, (min(known), max(known))), color=look.colour, capsize=2.5, lw=1)
    axes.plot(x, mean, look.marker, color=look.colour, mfc=look.colour if keeps else "white", ms=6, zorder=4)


def _limit(score: Score, base: float | None) -> float:
    """What a stable run ends with at least; no limit where there is no share of the base's score to keep."""
    return KEEP * base if score.kept and base is not None and base > 0 else -math.inf


def final_plot(
    runs: Sequence[Run], score: Score, bases: Mapping[str, float], looks: Mapping[str, Style], name: str
) -> str:
    """The final score of each arm where there is one learning rate: a dot for each seed, and a bar at their mean."""
    ends = {
        arm: [end for run in runs if run.arm == arm and (end := score.final(run)) is not None] for arm in arms(runs)
    }
    finite = {arm: [end for end in each if math.isfinite(end)] for arm, each in ends.items()}
    outcomes = {
        arm: number(float(np.mean(finite[arm]))) if finite[arm] else "diverged" if each else "no result"
        for arm, each in ends.items()
    }

    def draw(axes: Axes) -> None:
        for place, (arm, known) in enumerate(finite.items()):
            colour, spread = looks[arm].colour, 0.12 if len(known) > 1 else 0.0
            heights = place + np.linspace(-spread, spread, len(known))
            axes.plot(known, heights, looks[arm].marker, color=colour, alpha=0.75, ms=7, zorder=3)
            if known:
                axes.plot([np.mean(known)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2)
            else:
                axes.text(0.02, place, outcomes[arm], transform=axes.get_yaxis_transform(), va="center", color=colour)
        _reference_lines(axes.axvline, score, bases)
        axes.set_yticks(range(len(ends)), [arm if len(arm) <= 18 else f"{arm[:17]}…" for arm in ends])
        axes.set_ylim(len(ends) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        if "accuracy" in score.name:
            axes.set_xlim(-0.04, 1.04)

    alt = f"Final {score.name}: {', '.join(f'{arm} {outcome}' for arm, outcome in outcomes.items())}."
    return _svg(draw, (5.0, 1.3 + 0.45 * len(ends)), name, alt)


def curve(
    runs: Sequence[Run],
    panel: Panel,
    looks: Mapping[str, Style],
    name: str,
    title: str,
    limits: tuple[float, float],
    size: tuple[float, float],
) -> str:
    """One metric over steps: the mean over seeds, a band from least to largest, a cross where a run broke off."""
    shown = [arm for arm in arms(runs) if any(scaled(run, panel) for run in runs if run.arm == arm)]

    def draw(axes: Axes) -> None:
        for arm in shown:
            series = [scaled(run, panel) for run in runs if run.arm == arm]
            steps, middle, low, high = band(series)
            axes.fill_between(steps, low, high, color=looks[arm].colour, alpha=0.16, lw=0)
            marker = looks[arm].marker if len(steps) <= 12 else None
            axes.plot(steps, middle, color=looks[arm].colour, marker=marker, ms=3.5, zorder=3)
            for run in runs:
                ends = [(step, value) for step, value in scaled(run, panel) if math.isfinite(value)]
                if run.arm == arm and run.status != "finished" and ends:
                    axes.plot(*ends[-1], "x", color=looks[arm].colour, ms=7, mew=2, zorder=4)
        if panel.logarithmic:
            _log_axis(axes)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(*limits)
        if not shown:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#666666")
            axes.set_xticks([])

    alt = f"{panel.title} over steps{', ' + title if title != panel.title else ''}: {', '.join(shown) or 'no data'}."
    return _svg(draw, size, name, alt)


def scaled(run: Run, panel: Panel) -> list[tuple[int, float]]:
    """What is drawn of a run: nothing, where its divisor is not known."""
    if panel.divisors is not None and run.folder not in panel.divisors:
        return []
    divisor = 1.0 if panel.divisors is None else panel.divisors[run.folder]
    return [(step, value / divisor) for step, value in run.series(panel.key)]


def shared_limits(runs: Sequence[Run], panel: Panel) -> tuple[float, float]:
    """Limits of the vertical axis for all settings of a metric, so that they can be compared.

    The middle 98 % of the values, where a few others would take more than two thirds of the axis.
    """
    if panel.bounded:
        return -0.04, 1.04
    low, high = extent(runs, panel)
    if panel.logarithmic:
        return low / 1.3, high * 1.3
    middle = np.percentile([value for run in runs for _, value in scaled(run, panel) if math.isfinite(value)], (1, 99))
    if high - low > 3 * (middle[1] - middle[0]) > 0:
        low, high = float(middle[0]), float(middle[1])
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def extent(runs: Sequence[Run], panel: Panel) -> tuple[float, float]:
    """The least and the largest finite value, for a logarithmic panel of those above 0."""
    values = [value for run in runs for _, value in scaled(run, panel) if math.isfinite(value)]
    values = [value for value in values if value > 0] if panel.logarithmic else values
    return min(values, default=1.0), max(values, default=1.0)


def band(series: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean over seeds, least and largest. Curves with more than `BINS` points are put into that many bins of
    steps: the middle is then the mean over seeds of the median in a bin, and the band goes over its steps too."""
    points = [[(step, value) for step, value in one if math.isfinite(value)] for one in series]
    places = sorted({step for one in points for step, _ in one})
    if not places:
        return (np.array([]),) * 4
    edges = np.linspace(places[0], places[-1], BINS + 1) if len(places) > BINS else None

    def of(step: int) -> float:
        if edges is None:
            return step
        cell = min(int(np.searchsorted(edges, step, side="right")), BINS) - 1
        return float(edges[cell] + edges[cell + 1]) / 2

    cells: dict[float, list[list[float]]] = {}
    for seed, one in enumerate(points):
        for step, value in one:
            cells.setdefault(of(step), [[] for _ in points])[seed].append(value)
    steps = np.array(sorted(cells))
    filled = [[values for values in cells[step] if values] for step in steps]
    middle = np.array([np.mean([np.median(values) for values in each]) for each in filled])
    low, high = (np.array([edge(edge(values) for values in each) for each in filled]) for edge in (min, max))
    return steps, middle, low, high


def tofu_plane(found: Mapping[str, Any], looks: Mapping[str, Style], name: str) -> str:
    """Forget quality against model utility: medians over seeds in front of the seeds, and the Pareto front."""
    points, references = found["points"], {"before unlearning": found["base"], "retain model": found["retain"]}
    known = {label: each for label, each in references.items() if each and len(each) == 2}
    qualities = [q for p in points for _, q in p["seeds"]] + [each["forget_quality"] for each in known.values()]
    floor = min([value for value in qualities if value > 0], default=1e-3) / 3

    def draw(axes: Axes) -> None:
        axes.axhline(FORGET_QUALITY, color="#808080", ls="--", lw=1)
        if found["base"]:
            axes.axvline(KEEP_UTILITY * found["base"]["model_utility"], color="#808080", ls="--", lw=1)
        front = sorted((p["model_utility"], max(p["forget_quality"], floor)) for p in points if p["front"])
        axes.plot(
            [u for u, _ in front],
            [q for _, q in front],
            color="#b0b0b0",
            lw=4,
            alpha=0.5,
            drawstyle="steps-pre",
            zorder=1,
        )
        for arm in dict.fromkeys(point["arm"] for point in points):
            _arm_on_plane(axes, [point for point in points if point["arm"] == arm], looks[arm], floor)
        for label, each in known.items():
            place = each["model_utility"], max(each["forget_quality"], floor)
            fill = "white" if label == "retain model" else "black"
            axes.plot(*place, "*", color="black", mfc=fill, ms=12, zorder=5)
            offset = (0, 8) if label == "retain model" else (0, -15)
            axes.annotate(label, place, offset, textcoords="offset points", fontsize=8, ha="center")
        _log_axis(axes)
        decades = math.ceil(-math.log10(floor))
        axes.set_yticks([10.0**-power for power in range(0, decades + 1, max(1, round(decades / 6)))])
        axes.set_ylim(10 ** (-1.08 * decades), 10 ** (0.1 * decades))
        axes.set_xlabel("model utility")
        axes.set_ylabel("forget quality (p-value)")
        axes.margins(x=0.08)
        shown = sorted(points, key=lambda point: not point["front"])
        places = [(p["model_utility"], max(p["forget_quality"], floor), p) for p in shown]
        _name_points(axes, [(x, y, p["learning_rate"], looks[p["arm"]]) for x, y, p in places])

    spoken = [f"{p['arm']} {number(p['model_utility'])}, {number(p['forget_quality'])}" for p in points]
    alt = f"Forget quality against model utility, as utility, quality: {'; '.join(spoken)}."
    return _svg(draw, (5.0, 4.2), name, alt)


def frontier_plot(found: Mapping[str, Any], looks: Mapping[str, Style], name: str) -> str:
    """Reward against divergence from the start: the way of the means through training, and the end with its intervals.

    The axis of the divergence has its square root as scale, in which reward rises about in a line.
    """
    points = found["points"]

    def draw(axes: Axes) -> None:
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        for point in points:
            _way_and_end(axes, point, looks[point["arm"]])
        if found["base"] is not None:
            axes.axhline(found["base"], color="#808080", lw=1, ls=":", zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
        axes.set_xlabel("divergence from the start, nats per token (square-root scale)")
        axes.set_ylabel(found["score"])
        _name_points(axes, [(p["divergence"], p["reward"], p["learning_rate"], looks[p["arm"]]) for p in points])

    spoken = [f"{p['arm']} {number(p['divergence'])}, {number(p['reward'])}" for p in points]
    alt = f"{found['score']} against divergence from the start, as divergence, score: {'; '.join(spoken)}."
    return _svg(draw, (6.2, 4.2), name, alt)


def _way_and_end(axes: Axes, point: Mapping[str, Any], look: Style) -> None:
    way = [(divergence, reward) for _, divergence, reward in point["path"]]
    if len(way) > 1:
        axes.plot(*zip(*way, strict=True), color=look.colour, lw=0.9, alpha=0.55, zorder=2)
    if len(point["seeds"]) > 1:
        seeds = zip(*point["seeds"].values(), strict=True)
        axes.plot(*seeds, look.marker, color=look.colour, ms=3, alpha=0.4, lw=0)
    across, along = (_error(point[key], point[f"{key}_interval"]) for key in ("divergence", "reward"))
    end = point["divergence"], point["reward"]
    axes.errorbar(*end, xerr=across, yerr=along, color=look.colour, capsize=2.5, lw=1, zorder=3)
    axes.plot(*end, look.marker, color=look.colour, ms=7, zorder=4)
    if point.get("diverged"):
        axes.plot(*end, "x", color="black", ms=8, mew=1.6, zorder=5)


def _error(value: float, interval: Sequence[float] | None) -> list[list[float]] | None:
    if interval is None:
        return None
    # The mean of equal values can lie a rounding outside of them
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def _arm_on_plane(axes: Axes, points: Sequence[Mapping[str, Any]], look: Style, floor: float) -> None:
    xs = [point["model_utility"] for point in points]
    ys = [max(point["forget_quality"], floor) for point in points]
    axes.plot(xs, ys, color=look.colour, marker=look.marker, lw=0.9, ms=7, zorder=4)
    lost = [point for point in points if point.get("collapsed") or point.get("diverged")]
    dead = [(point["model_utility"], max(point["forget_quality"], floor)) for point in lost]
    if dead:
        axes.plot(*zip(*dead, strict=True), "x", color="black", ms=8, mew=1.6, lw=0, zorder=5)
    seeds = [(u, max(q, floor)) for point in points for u, q in point["seeds"] if len(point["seeds"]) > 1]
    if seeds:
        axes.plot(*zip(*seeds, strict=True), look.marker, color=look.colour, ms=3.5, alpha=0.35, lw=0)


def _name_points(axes: Axes, points: Sequence[tuple[float, float, float | None, Style]]) -> None:
    """Write the learning rate beside a point, where no other one stands yet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    taken: list[tuple[float, float]] = []
    for across, along, each, look in points:
        x, y = to_axes.transform((across, along))
        if each is None or any(abs(x - a) < 0.07 and abs(y - b) < 0.045 for a, b in taken):
            continue
        taken.append((x, y))
        offset = (6, -9) if x < 0.9 else (-24, -11)
        axes.annotate(rate(each), (across, along), offset, textcoords="offset points", fontsize=7.5, color=look.colour)


def _reference_lines(line: Callable[..., Any], score: Score, bases: Mapping[str, float]) -> None:
    for base in sorted(set(bases.values())):
        line(base, color="#808080", lw=1, ls=":", zorder=1)
        if math.isfinite(limit := _limit(score, base)):
            line(limit, color="#808080", lw=1, ls="--", zorder=1)


def _diverged(axes: Axes, crosses: Sequence[tuple[float, str]]) -> None:
    """A line of its own below the scores for the runs that diverged."""
    if not crosses:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (high - low), high)
    axes.axhspan(low - 0.12 * (high - low), low, color="#f0f0f0", lw=0, zorder=0)
    axes.text(0.01, 0.05, "diverged", transform=axes.transAxes, va="center", color="#555555", fontsize=8)
    for x, colour in crosses:
        axes.plot(x, 0.05, "x", color=colour, transform=axes.get_xaxis_transform(), ms=7, mew=2, zorder=4)


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    if 0 < len(rates) <= 8:
        axes.set_xticks(rates)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    if rates:
        axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else rate(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], name: str, alt: str) -> str:
    """Draw on one pair of axes; return an `<svg>` that scales with its box, and whose ids begin with the name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    body = svg[svg.index("<svg") :]
    width, height = (72 * side for side in size)
    tag = f'<svg role="img" aria-label="{_escape(alt)}" viewBox="0 0 {width:g} {height:g}" '
    opened = tag + 'xmlns:xlink="http://www.w3.org/1999/xlink">'  # in which a backslash is a backslash
    body = re.sub(r"<svg[^>]*>", lambda _: opened, body, count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', lambda start: f"{start[1]}{name}-", body)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
