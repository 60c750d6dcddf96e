"""Forget quality against model utility for every cell of the TOFU study.

python docs/results/tofu/plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
MARKS = {
    "ceu": "C3o",
    "ceu_retain": "C3s",
    "ceu_retain_seed1": "C3*",
    "grad_ascent": "C0o",
    "grad_diff": "C0s",
    "npo": "C2^",
    "simnpo": "C4v",
    "wga": "C1D",
    "satimp": "C5P",
    "undial": "C6X",
}
FLOOR = 1e-30


def main() -> None:
    found = {path.stem: json.loads(path.read_text())["evaluation"]["summary"] for path in FOLDER.glob("*.json")}
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    for name, mark in MARKS.items():
        cells = sorted(
            (float(stem.removeprefix(f"{name}-")), summary)
            for stem, summary in found.items()
            if stem.startswith(f"{name}-")
        )
        x = [summary["model_utility"] for _, summary in cells]
        y = [max(summary["forget_quality"], FLOOR) for _, summary in cells]
        axes.plot(x, y, marker=mark[2], color=mark[:2], lw=0.6, alpha=0.85, label=name)
        for at, (rate, _) in zip(zip(x, y, strict=True), cells, strict=True):
            axes.annotate(f"{rate:.0e}".replace("e-0", "e-"), at, fontsize=6, xytext=(3, 3), textcoords="offset points")
    full = found["full"]["model_utility"]
    axes.plot(full, max(found["full"]["forget_quality"], FLOOR), "k*", ms=11, label="full")
    axes.plot(found["retain90"]["model_utility"], 1.0, "k+", ms=11, label="retain90")
    axes.axhline(0.05, color="grey", ls=":", lw=1)
    axes.axvline(0.9 * full, color="grey", ls=":", lw=1)
    axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (KS p-value, log scale)")
    axes.set_title("forget10: the aim is above and to the right of the dotted lines", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(FOLDER / "report.png", dpi=110)


if __name__ == "__main__":
    main()
