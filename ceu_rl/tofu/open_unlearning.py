"""open-unlearning's `TOFU_EVAL.json`: read as the result of a retain model, and written from one of ours.

It holds the metrics by name, each with its mean (`agg_value`) and mostly the values of the rows (`value_by_index`), and
says nothing of prompt, tokenizer or split. What differs in the numbers is in `docs/migrating.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

FILE = "TOFU_EVAL.json"
SETS = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
MEANS = {
    "model_utility": "model_utility",
    **{f"mia_{attack}": f"membership_auc_{attack}" for attack in ("loss", "zlib", "min_k", "min_k_plus_plus")},
    "forget_quality": "forget_quality",
    "privleak": "privacy_leakage",
}


def is_peer(result: Any) -> bool:
    """Whether a result is one of open-unlearning."""
    return isinstance(result, Mapping) and "value_by_index" in (result.get("forget_truth_ratio") or ())


def ratios_and_auc(result: Mapping[str, Any], config: str) -> tuple[list[float], float | None]:
    """The truth ratios of the forget set, in ours by its config, and the AUC of min-k, of a result of either code."""
    if not is_peer(result):
        return [row["truth_ratio"] for row in result["items"][config]], result["summary"]["membership_auc_min_k"]
    ratios = [row["score"] for row in result["forget_truth_ratio"]["value_by_index"].values()]
    return ratios, (result.get("mia_min_k") or {}).get("agg_value")


def to_peer(result: Mapping[str, Any], configs: Sequence[str]) -> dict[str, Any]:
    """What `tofu_eval.json` holds as open-unlearning writes it; `configs` are in the order of `SETS`."""
    summary, logs = result["summary"], {}

    def put(name: str, ours: str, config: str = "", **fields: str) -> None:
        """A mean, and of each row its fields by their name there and here."""
        logs[name] = {"agg_value": summary[ours]}
        if config:
            rows = [{theirs: row[field] for theirs, field in fields.items()} for row in result["items"][config]]
            logs[name]["value_by_index"] = {str(place): row for place, row in enumerate(rows)}

    for (ours, theirs), config in zip(SETS.items(), configs, strict=True):
        if theirs in ("ra", "wf"):
            put(f"{theirs}_Q_A_Prob_normalised", f"{ours}_probability", config, prob="option_probability")
        else:
            put(f"{theirs}_Q_A_Prob", f"{ours}_probability", config, prob="probability", avg_loss="loss")
        rouge = {"rougeL_recall": "rouge_l_recall", "generation": "generation"}
        put(f"{theirs}_Q_A_ROUGE", f"{ours}_rouge_l_recall", config, **rouge)
        ratio = "forget_truth_ratio" if ours == "forget" else f"{theirs}_Truth_Ratio"
        put(ratio, f"{ours}_truth_ratio", config, score="truth_ratio")
    for name in ("extraction_strength", "exact_memorization"):
        put(name, f"forget_{name}", configs[0], score=name)
    for theirs, ours in MEANS.items():
        if ours in summary:  # some need a retain model
            put(theirs, ours)
    return logs
