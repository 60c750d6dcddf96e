"""open-unlearning's `TOFU_EVAL.json`: read as the result of a retain model, and written from one of ours.

It holds the metrics by name, each with its mean (`agg_value`) and mostly the values of the rows (`value_by_index`), and
says nothing of prompt, tokenizer or split. What differs in the numbers is in `docs/migrating.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

FILE = "TOFU_EVAL.json"
SETS = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def is_peer(result: Any) -> bool:
    """Whether a result is one of open-unlearning."""
    return isinstance(result, Mapping) and "value_by_index" in (result.get("forget_truth_ratio") or ())


def ratios_and_auc(result: Mapping[str, Any], config: str) -> tuple[list[float], float | None]:
    """The truth ratios of the forget set, and the AUC of min-k, of a result of ours or of open-unlearning.

    Args:
        result: One of the two.
        config: The config of the forget set in a result of ours.
    """
    if not is_peer(result):
        return [row["truth_ratio"] for row in result["items"][config]], result["summary"]["membership_auc_min_k"]
    ratios = [row["score"] for row in result["forget_truth_ratio"]["value_by_index"].values()]
    return ratios, (result.get("mia_min_k") or {}).get("agg_value")


def to_peer(result: Mapping[str, Any], configs: Sequence[str]) -> dict[str, Any]:
    """A result of ours as open-unlearning writes it.

    Args:
        result: What `tofu_eval.json` holds.
        configs: Its configs, in the order of `SETS`.
    """
    summary = result["summary"]
    logs: dict[str, Any] = {}

    def put(name: str, value: float, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        values = {} if rows is None else {"value_by_index": {str(place): dict(row) for place, row in enumerate(rows)}}
        logs[name] = {"agg_value": value, **values}

    for (ours, theirs), config in zip(SETS.items(), configs, strict=True):
        rows = result["items"][config]
        options = theirs in ("ra", "wf")
        kind = "option_probability" if options else "probability"
        put(
            f"{theirs}_Q_A_Prob{'_normalised' if options else ''}",
            summary[f"{ours}_probability"],
            [{"prob": row[kind]} if options else {"prob": row[kind], "avg_loss": row["loss"]} for row in rows],
        )
        put(
            f"{theirs}_Q_A_ROUGE",
            summary[f"{ours}_rouge_l_recall"],
            [{"rougeL_recall": row["rouge_l_recall"], "generation": row["generation"]} for row in rows],
        )
        put(
            "forget_truth_ratio" if ours == "forget" else f"{theirs}_Truth_Ratio",
            summary[f"{ours}_truth_ratio"],
            [{"score": row["truth_ratio"]} for row in rows],
        )
    forget = result["items"][configs[0]]
    for name in ("extraction_strength", "exact_memorization"):
        put(name, summary[f"forget_{name}"], [{"score": row[name]} for row in forget])
    for ours, theirs in (
        ("model_utility", "model_utility"),
        ("forget_quality", "forget_quality"),
        ("privacy_leakage", "privleak"),
        *((f"membership_auc_{attack}", f"mia_{attack}") for attack in ("loss", "zlib", "min_k", "min_k_plus_plus")),
    ):
        if ours in summary:
            put(theirs, summary[ours])
    return logs
