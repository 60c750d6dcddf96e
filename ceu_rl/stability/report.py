"""The report of a comparison: a table, curves, and the commands and provenance behind them."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

# Title, metric, logarithmic: the curves of the plot
PANELS = (
    ("chosen log-probability (nats, held out)", "eval_logps/chosen", False),
    ("rejected log-probability (nats, held out)", "eval_logps/rejected", False),
    ("gradient norm before clipping", "grad_norm", True),
    ("greedy accuracy", "eval_greedy_accuracy", False),
    ("sampled accuracy", "eval_sampled_accuracy", False),
    ("loss", "loss", False),
)
# Row, metric: shown as first -> last
ROWS = (
    ("greedy accuracy", "eval_greedy_accuracy"),
    ("sampled accuracy", "eval_sampled_accuracy"),
    ("chosen log-prob", "eval_logps/chosen"),
    ("rejected log-prob", "eval_logps/rejected"),
)


def write_report(folder: Path, arms: list[str], failed: dict[str, str], console: Console) -> None:
    """Print the table and write `report.md` and `report.png` into the folder of the comparison.

    Args:
        folder: The comparison; each arm has a folder in it with `metrics.jsonl` and, if it finished, `result.json`.
        arms: Their names, in the order to show.
        failed: The reason for each arm that did not finish; it is shown in the place of its time.
        console: Where the table is printed.
    """
    header, *rows = table_rows(folder, arms, failed)
    table = Table(*header, title=f"{folder}: first evaluation → last")
    for row in rows:
        table.add_row(*row)
    console.print(table)

    _plot({arm: _read_curves(folder / arm) for arm in arms}, folder / "report.png")
    lines = [
        f"# {folder.name}",
        "",
        "First evaluation → last, on held-out rows. Log-probabilities are sums over a response, in nats. One learning",
        "rate and one seed show what can happen, not which method is better: compare each at its own best rate.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)),
        "",
        "![curves of every arm](report.png)",
        "",
        "## How it was made",
        "",
    ]
    for arm in arms:
        if result := _read_result(folder / arm):
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            lines.append(
                f"- {arm}: `{result['command']}`, seed {result['seed']}, {result['date']}, commit {result['commit']}, "
                f"{result['device']}, {result['peak_memory_gib']} GiB at the peak; {versions}."
            )
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    console.print(f"Report: {folder / 'report.md'}, curves: {folder / 'report.png'}")


def table_rows(folder: Path, arms: list[str], failed: dict[str, str]) -> list[list[str]]:
    """The cells of the table, a column for each arm, the header first; see `write_report`."""
    columns = [_column(arm, _read_curves(folder / arm), _read_result(folder / arm), failed.get(arm)) for arm in arms]
    labels = ["", "learning rate", *(label for label, _ in ROWS), "max gradient norm", "time (s)"]
    return [list(row) for row in zip(labels, *columns, strict=True)]


def _read_result(run: Path) -> dict[str, Any] | None:
    path = run / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric as (step, value) pairs."""
    path = run / "metrics.jsonl"
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        entry = json.loads(line)
        for key, value in entry.items():
            if isinstance(value, int | float):
                curves.setdefault(key, []).append((entry["step"], value))
    return curves


def _column(arm: str, curves: dict[str, Any], result: dict[str, Any] | None, failure: str | None) -> list[str]:
    rates = [value for _, value in curves.get("learning_rate", [])]
    cells = [arm, f"{max(rates):.3g}" if rates else "none"]
    for _, metric in ROWS:
        values = [value for _, value in curves.get(metric, [])]
        cells.append(f"{values[0]:.3f} → {values[-1]:.3f}" if values else "none")
    norms = [value for _, value in curves.get("grad_norm", [])]
    cells.append(f"{max(norms):.2f}" if norms else "none")
    cells.append(f"{result['wall_time_s']:.0f}" if result else failure or "not finished")
    return cells


def _plot(curves: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, metric, logarithmic) in zip(axes.flat, PANELS, strict=True):
        for number, (arm, values) in enumerate(curves.items()):
            points = values.get(metric, [])
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=arm, color=f"C{number}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
        if "accuracy" in metric:
            axis.set_ylim(-0.02, 1.02)
    axes.flat[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
