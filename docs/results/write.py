"""Write the pages and the figures of the results from the JSON beside them.

    make results        (python docs/results/write.py)

A page is `<question>.md.jinja`: its words, and calls of [`Page`] that name a file and its columns. Numbers come from
the files alone; the Markdown and the SVG are never edited by hand.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pairs
import pandas as pd
import seaborn as sns
from scipy.stats import ks_2samp

RESULTS = Path(__file__).parent
QUESTIONS = ("dpo", "dpo-anchor", "dpo-real-model", "grpo", "unlearning", "speed")
KEPT = 0.95  # the share of the base's accuracy that a stable run keeps
FORGOTTEN, USEFUL = 0.05, 0.9  # the aim on TOFU: forget quality, share of the base's utility

# Today's names of arms that the files recorded under other ones
ARMS = {"paper": "ceu-published", "drop-descending": "positives"}
ARMS_OF = {"dpo": "ceu-1", "dpo-real-model": "ceu-1", "grpo": "ceu-0.5", "unlearning": "ceu"}  # of `ceu`
MEDIANS = ("ks_distance", "model_utility")
SETTINGS = ("weight_sync_steps", "num_iterations", "retain_weight", "learning_rate")


def main() -> None:
    for path, text in written().items():
        path.write_text(text)


def written() -> dict[Path, str]:
    """Every page and figure by its path."""
    options = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True, "trim_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(RESULTS), **options)
    found, answers = {}, {}
    for question in QUESTIONS:
        page = Page(question)
        text = environment.get_template(f"{question}.md.jinja").render(page=page, pairs=pairs, markdown=markdown)
        found |= {RESULTS / f"{question}.md": text, **page.drawn}
        answers[question] = re.findall(r"\A# (.+)\n\n((?:.+\n)+)", text)[0]
    readme = environment.get_template("README.md.jinja").render(answers=answers)
    return found | {RESULTS / "README.md": readme} | pictures()


@cache
def read(file: str) -> Any:
    """A file, with what many of its runs have in common (`origins`) put into each."""
    text = (RESULTS / f"{file}.json").read_text()
    origins = json.loads(text).get("origins")
    return json.loads(text, object_hook=lambda part: part | (origins[part["origin"]] if "origin" in part else {}))


def renamed(file: str, arm: str) -> str:
    return ARMS_OF[file.split("/")[0]] if arm == "ceu" else ARMS.get(arm, arm)


@cache
def runs(file: str) -> pd.DataFrame:
    """One row a run: arm, seed, its settings, its scores at the end. With `curves` this alone knows the formats."""
    found, rows = read(file), []
    for run in found["runs"]:
        ends = {key.removeprefix("eval_"): values[-1] for key, values in run["curves"].items()}
        rows.append({**ends, **run["final"], **run["measures"], **run["setting"], "seed": run["seed"]})
        rows[-1]["arm"] = renamed(file, run["arm"])
    frame = pd.DataFrame(rows).dropna(axis=1, how="all")
    for kind in ("greedy_accuracy", "sampled_accuracy"):
        if base := found["base"].get(kind.replace("_", " ")):
            frame[f"kept {kind}"] = frame[kind] >= KEPT * base
    if tofu := found.get("tofu"):
        frame["ks_distance"] = frame.forget_quality.map(distances(40 if "smollm2" in file else 400))
        useful = frame.model_utility >= USEFUL * tofu["base"]["model_utility"]
        frame["reached"] = frame["kept reached"] = (frame.forget_quality > FORGOTTEN) & useful
    return frame


@cache
def distances(answers: int) -> dict[float, float]:
    """The KS distance by the forget quality, its p-value (to six digits, as files have it)."""
    rows = np.arange(answers)
    qualities = [ks_2samp(rows, rows + by - 0.5).pvalue for by in range(1, int(0.45 * answers))]
    return {float(f"{quality:.6g}"): by / answers for by, quality in enumerate(qualities, start=1)}


@cache
def curves(file: str) -> pd.DataFrame:
    """One row an evaluation: arm, seed, the settings, step and scores. Of a folder, the logs of its runs."""
    logs = sorted((RESULTS / file).glob("*/metrics.jsonl"))
    parts = [pd.read_json(log, lines=True).assign(arm=renamed(file, log.parent.name), seed=0) for log in logs]
    for run in [] if logs else read(file)["runs"]:
        setting = {**run["setting"], "arm": renamed(file, run["arm"]), "seed": run["seed"]}
        parts.append(pd.DataFrame(run["curves"]).assign(**setting))
    frame = pd.concat(parts)
    frame = frame.drop(columns=[each for each in frame if f"eval_{each}" in frame])  # what training logs beside it
    return frame.rename(columns=lambda name: name.removeprefix("eval_"))


def chosen(frame: pd.DataFrame, only: Mapping[str, Any]) -> pd.DataFrame:
    for key, values in only.items():
        frame = frame[frame[key].isin([values] if isinstance(values, str) else values)]
    return frame


class Page:
    """What the template of one question can call. `files` are the names of one or several, with spaces between."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.drawn: dict[Path, str] = {}

    def base(self, file: str) -> str:
        """The scores before training."""
        return ", ".join(f"{score} {value:.3f}" for score, value in read(file)["base"].items())

    def stable(self, file: str, arm: str, score: str = "greedy_accuracy") -> str:
        """The largest learning rate at which every seed of an arm keeps 95 % of the base's score."""
        kept = chosen(runs(file), {"arm": arm}).groupby("learning_rate")[f"kept {score}"].all()
        return max(kept[kept].index, key=float, default=f"less than {min(kept.index, key=float)}")

    def table(self, files: str, *columns: str, apart: bool = False, studies: bool = False, **only: Any) -> str:
        """Each arm over its seeds, with a column for each setting, or where none varies for each score.

        A cell has the mean (on TOFU the median); with `apart`, where each score has rows of its own, and where no
        setting varies also least and most. Bold: every seed keeps 95 % of the base's accuracy, or reaches the aim.
        With `studies` the files are not put together, and each has its rows.
        """
        parts = {file.split("/")[1]: chosen(runs(file), only) for file in files.split()}
        frame = pd.concat([each.assign(arm=each.arm + f", {file}" * studies) for file, each in parts.items()])
        varied = [key for key in SETTINGS if key in frame and frame[key].nunique() > 1]
        frame["at"] = [", ".join(filter(None, each)) for each in frame.reindex(columns=varied).fillna("").values]
        groups, arms = frame.groupby(["arm", "at"]), list(dict.fromkeys(frame.arm))
        spread = apart or not varied
        cells = pd.DataFrame({each: groups.apply(lambda group, c=each: cell(group, c, spread)) for each in columns})
        if not varied:
            return markdown(["arm", *map(name, columns)], [[arm, *cells.loc[(arm, "")]] for arm in arms], files)
        cells = cells.stack() if apart else cells.agg(" / ".join, axis=1)
        cells = cells.unstack("at").fillna("")
        cells = cells[sorted(cells, key=lambda at: [float(each) for each in at.split(", ")])]
        scores, by = " / ".join(map(name, columns)), ", ".join(map(name, varied))
        rows = {f"{name(each)}: {arm}": (arm, each) for each in columns for arm in arms}
        rows = rows if apart else dict(zip(arms, arms, strict=True))
        lines = [[title, *cells.loc[row]] for title, row in rows.items()]
        return markdown([f"by {by}" if apart else f"{scores} by {by}", *cells], lines, files)

    def against(self, file: str, *columns: str) -> str:
        """By how much an arm ends above the first one, seed by seed: mean, least to most."""
        frame, lines = runs(file), []
        first, *others = dict.fromkeys(frame.arm)
        for arm in others:
            tables = [frame.pivot(index="seed", columns="arm", values=column) for column in columns]
            gaps = [(seeds[arm] - seeds[first]).dropna() for seeds in tables]
            lines.append([arm, *(f"{gap.mean():+.3f} ({gap.min():+.3f} to {gap.max():+.3f})" for gap in gaps)])
        return markdown([f"less {first} of the same seed", *map(name, columns)], lines, file)

    def records(self, files: str, columns: Mapping[str, str], at: str = "", **only: Any) -> str:
        """A line for each record at a place in a file: `columns` gives each title its field and format.

        An object there is one record, or with a `*` at the end of `at` holds one by each `key`.
        """
        lines = []
        for file in files.split():
            found = read(file)
            for part in at.split("."):
                found = found if part in ("", "*") else found[int(part) if part.isdigit() else part]
            if at.endswith("*"):
                found = [{"key": k, **(v if isinstance(v, dict) else {"value": v})} for k, v in found.items()]
            key = renamed(file, file.removesuffix("/result").split("/")[-1])
            for record in chosen(pd.json_normalize(found), only).to_dict("records"):
                fields = [field.partition(":") for field in columns.values()]
                values = [(({"key": key} | record).get(field), form) for field, _, form in fields]
                lines.append(["" if v in (None, "") or v != v else format(v, form) for v, form in values])
        return markdown(list(columns), lines, files)

    def figure(self, drawn: plt.Figure, file: str, alt: str) -> str:
        self.drawn[RESULTS / self.question / file] = svg(drawn)
        return f"![{alt}]({self.question}/{file})"

    def by_rate(self, studies: Sequence[str], *columns: str, **only: Any) -> str:
        """Scores at the end against the learning rate: a row for each study, a column for each score."""
        rows, width = len(studies), len(columns)
        drawn, axes = plt.subplots(rows, width, figsize=(4.6 * width, 2.5 * rows), squeeze=False)
        for row, files in zip(axes, studies, strict=True):
            frame = chosen(pd.concat([runs(file) for file in files.split()]), only).copy()
            frame["learning rate"] = frame.learning_rate.astype(float)
            study = files.split()[0]
            for ax, column in zip(row, columns, strict=True):
                arms(ax, frame, "learning rate", column, err_style="bars")
                ax.set(xscale="log", title=f"{study.split('/')[1]}: {name(column)}", ylabel="")
                if base := read(study)["base"].get(column.replace("_", " ")):
                    ax.axhline(base, color="grey", ls=":", label="before training")
                    ax.axhline(KEPT * base, color="grey", ls="--", lw=1, label="95 % of it")
        return self.figure(drawn, "final.svg", f"{', '.join(map(name, columns))} against the learning rate")

    def over_steps(self, file: str, *columns: str, **only: Any) -> str:
        """Scores over the steps of a study, two in a row."""
        drawn, axes = plt.subplots(2, len(columns) // 2, figsize=(9, 5))
        for ax, column in zip(axes.flat, columns, strict=True):
            arms(ax, chosen(curves(file), only).dropna(subset=[column]), "step", column)
            ax.set(title=name(column), ylabel="")
        study = file.split("/")[1]
        return self.figure(drawn, f"{study}.svg", f"{study}: {', '.join(map(name, columns))} over steps")

    def plane(self, *files: str) -> str:
        """Forget quality against utility, a point for each run."""
        drawn, axes = plt.subplots(1, len(files), figsize=(4.6 * len(files), 3.4), sharey=True, squeeze=False)
        for ax, file in zip(axes[0], files, strict=True):
            frame = runs(file).assign(arm=lambda frame: frame.arm + ", " + frame.learning_rate)
            axes_of = {"x": "model_utility", "y": "forget_quality", "hue": "arm", "style": "arm"}
            sns.scatterplot(frame, **axes_of, s=60, palette="Paired", ax=ax)
            ax.set(yscale="log", xlabel="model utility", ylabel="forget quality", title=file.split("/")[1])
            ax.axhline(FORGOTTEN, color="grey", ls="--", lw=1, label="the aim: above, and to the right")
            ax.axvline(USEFUL * read(file)["tofu"]["base"]["model_utility"], color="grey", ls="--", lw=1)
        return self.figure(drawn, "plane.svg", "forget quality against model utility")

    def bars(self, values: Mapping[str, str], at: str) -> str:
        """A field of the rows of each file, of those that a query selects."""
        drawn, axes = plt.subplots(1, len(values), figsize=(4.4 * len(values), 2.2))
        for ax, (file, value) in zip(axes, values.items(), strict=True):
            sns.barplot(pd.DataFrame(read(file)["rows"]).query(at), x=value, y="method", ax=ax, color="C0")
            ax.bar_label(ax.containers[0], fmt="%.3g", padding=3)
            ax.set(xlabel=name(value), ylabel="", xmargin=0.18)
        return self.figure(drawn, "fused.svg", "peak memory and time of the loss")


def cell(group: pd.DataFrame, column: str, spread: bool) -> str:
    """A score over the seeds of a group."""
    values = group.get(column, pd.Series(dtype=float)).dropna()
    if column == "reached":
        text = f"{values.sum()} of {len(values)}"
    elif values.empty:
        return "none"
    else:
        text = f"{values.median() if column in MEDIANS else values.mean():.3f}"
        text += f" ({values.min():.3f} to {values.max():.3f})" if spread and values.min() < values.max() else ""
    kept = group.get(f"kept {column}", pd.Series([False]))
    return f"**{text}**" if kept.eq(True).all() else text


def name(column: str) -> str:
    return column.removesuffix("_accuracy").replace("_", " ")


def markdown(header: Sequence[str], lines: Any, files: str) -> str:
    rows = [header, ["---"] * len(header), *lines]
    sources = ", ".join(f"`docs/results/{file}.json`" for file in files.split())
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + f"\n\nFrom {sources}."


def arms(ax: plt.Axes, frame: pd.DataFrame, x: str, y: str, **more: Any) -> None:
    """A line for each arm, the mean over seeds, with least and most."""
    order = [arm for arm in pairs.DRAWN if arm in set(frame.arm)]
    style = {"hue": "arm", "style": "arm", "hue_order": order, "style_order": order, "palette": pairs.COLOURS}
    sns.lineplot(frame, x=x, y=y, errorbar=("pi", 100), markers=True, dashes=False, ax=ax, **style, **more)


def svg(drawn: plt.Figure) -> str:
    """With one legend for all axes, and words as text."""
    handles: dict[str, Any] = {}
    for ax in drawn.axes:
        ax.grid(alpha=0.3)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if ax.get_legend():
            ax.get_legend().remove()
    drawn.tight_layout()
    if handles:
        drawn.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=6, frameon=False)
    out = io.StringIO()
    drawn.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(drawn)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M)


def pictures() -> dict[Path, str]:
    """The pictures of docs/reading-metrics.md that no page has, from committed runs."""
    page, scores = Page("reading"), ("greedy_accuracy", "sampled_accuracy", "sampled_entropy", "kl")
    page.over_steps("dpo/addition", *scores, learning_rate="1e-4", arm=("stock", "ceu-1", "ceu-published"))
    page.over_steps("grpo/maze", *scores, learning_rate="3e-4", num_iterations="1", arm=("stock", "ceu-0.5", "ceu-1"))
    return page.drawn


matplotlib.use("Agg")
plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ceu_rl", "font.size": 9, "savefig.facecolor": "white"}

if __name__ == "__main__":
    main()
