"""open-unlearning's `TOFU_EVAL.json`, read as the result of a retain model.

It holds the metrics by name, each with its mean (`agg_value`) and mostly the values of the rows (`value_by_index`), and
says nothing of prompt, tokenizer or split. What differs in the numbers is in `docs/migrating.md`.
"""

from collections.abc import Mapping
from typing import Any


def is_peer(result: Any) -> bool:
    """Whether a result is one of open-unlearning."""
    return isinstance(result, Mapping) and "value_by_index" in (result.get("forget_truth_ratio") or ())


def ratios_and_auc(result: Mapping[str, Any], config: str) -> tuple[list[float], float | None]:
    """The truth ratios of the forget set, in ours by its config, and the AUC of min-k, of a result of either code."""
    if not is_peer(result):
        return [row["truth_ratio"] for row in result["items"][config]], result["summary"]["membership_auc_min_k"]
    ratios = [row["score"] for row in result["forget_truth_ratio"]["value_by_index"].values()]
    return ratios, (result.get("mia_min_k") or {}).get("agg_value")
