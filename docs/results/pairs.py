"""Held-out pairs of a study for its page: the JSON is the `report.json` that `ceu-rl compare` wrote.

    loss = -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected)))

An arm's rate is chosen on the even pairs of seed 0, at which every rate ran. Every number is of the odd pairs.
"""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator, NullFormatter

from ceu_rl.stability.runs import rate
from ceu_rl.stability.table import paired_bootstrap

RESULTS = Path(__file__).parent
# The arms that are drawn, in this order, each in one colour on all pages; others stand in the tables alone
DRAWN = (
    *("stock", "anchored", "stock-sft", "constant-0.75", "ceu-0.5", "ceu-1", "ceu-published", "positives"),
    *("correction-token", "ceu-0.3", "token-ratio", "sequence-ratio", "gate"),
)
COLOURS = dict(zip(DRAWN, sns.color_palette("colorblind") + sns.color_palette("dark"), strict=False))


def read_pairs(file: str) -> pd.DataFrame:
    """One row a pair and run: arm, rate, seed, pair, loss, accuracy, nats per token since the start, divergences."""
    frames = []
    for run in json.loads((RESULTS / f"{file}.json").read_text())["runs"]:
        if run["status"] != "finished":
            continue
        pairs = pd.DataFrame(run["held_out"])
        about = {"arm": run["arm"], "rate": float(run["setting"]["learning_rate"]), "seed": run["seed"]}
        about |= {name: run["metrics"][f"eval_{name}"] for name in ("foreign_kl", "solutions_nll")}
        pairs = pairs.assign(**about, pair=range(len(pairs)))
        for side in ("chosen", "rejected"):
            pairs[f"{side} gain"] = (pairs[side] - pairs[f"ref_{side}"]) / pairs[f"{side}_tokens"]
        frames.append(pairs)
    return pd.concat(frames, ignore_index=True)


def best_rates(pairs: pd.DataFrame) -> dict[str, float]:
    """The rate of each arm with the least loss on the pairs that are not reported."""
    means = pairs[(pairs.pair % 2 == 0) & (pairs.seed == 0)].groupby(["arm", "rate"], sort=False).loss.mean()
    return {arm: means[arm].idxmin() for arm in means.index.unique("arm")}


def reported(pairs: pd.DataFrame) -> pd.DataFrame:
    """The other pairs, each arm at its best rate."""
    rates = best_rates(pairs)
    return pairs[(pairs.pair % 2 == 1) & (pairs.rate == pairs.arm.map(rates))]


def difference(pairs: pd.DataFrame, ours: str, theirs: str, column: str = "loss") -> tuple[float, float, float]:
    """Mean of a column of one arm less the other's over the pairs and seeds of both, with its interval."""
    table = pairs.pivot(index=["seed", "pair"], columns="arm", values=column)
    gaps = (table[ours] - table[theirs]).dropna().unstack("pair")
    low, high = paired_bootstrap(gaps.to_numpy()) or (float("nan"),) * 2
    return float(gaps.to_numpy().mean()), low, high


def best(files: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: each arm of each study at its best rate, against stock and against `anchored`."""
    against = ("stock", "anchored")
    lines = []
    for file in files.split():
        pairs = reported(read_pairs(file))
        for arm, own in pairs.groupby("arm"):
            gaps = [
                "" if arm == other else "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(pairs, arm, other))
                for other in against
            ]
            numbers = map("{:.3f}".format, own[["loss", "accuracy", "foreign_kl"]].mean())
            lines.append([file.split("/")[1], arm, rate(own.rate.iloc[0]), str(own.seed.nunique()), *numbers, *gaps])
    titles = ["pairs", "arm", "best rate", "seeds", "loss", "accuracy", "foreign kl"]
    return [*titles, *(f"loss less {other}'s" for other in against)], lines


def by_rate(file: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: each arm at each rate, over all pairs."""
    titles = ["loss", "accuracy", "chosen gain", "rejected gain", "foreign_kl", "solutions_nll"]
    groups = read_pairs(file).groupby(["arm", "rate"])
    means, seeds = groups[titles].mean(), groups.seed.nunique()
    lines = [[*key[:1], rate(key[1]), str(seeds[key]), *map("{:.3f}".format, row)] for key, *row in means.itertuples()]
    return ["arm", "rate", "seeds", *(title.replace("_", " ") for title in titles)], lines


def frontier(files: str) -> plt.Figure:
    """Held-out loss against the divergence on foreign text: a line for each arm through its rates."""
    drawn, axes = plt.subplots(1, files.count("/"), figsize=(9.2, 3.4), squeeze=False)
    for ax, file in zip(axes[0], files.split(), strict=True):
        means = read_pairs(file).groupby(["arm", "rate"])[["foreign_kl", "loss"]].mean().reset_index()
        own = [arm for arm in DRAWN if arm in set(means.arm)]
        style = {"hue": "arm", "style": "arm", "hue_order": own, "style_order": own, "palette": COLOURS}
        sns.lineplot(
            means.sort_values("rate"), x="foreign_kl", y="loss", sort=False, markers=True, dashes=False, ax=ax, **style
        )
        ax.axhline(math.log(2), color="grey", ls=":", label="before training")
        ax.set(xscale="log", title=file.split("/")[1], xlabel="divergence on foreign text", ylabel="held-out DPO loss")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    return drawn
