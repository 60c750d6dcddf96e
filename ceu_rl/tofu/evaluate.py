"""`ceu-rl tofu-eval`: every metric of TOFU for one model, from one pass over each split and one greedy generation.

    ceu-rl tofu-eval --model DIR --dataset locuslab/TOFU --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl tofu-eval --results DIR/tofu_eval.json --retain DIR/tofu_eval.json

The result is `tofu_eval.json`: a summary, the values of each row, and provenance. Forget quality and privacy leakage
need the result of a retain model, now or later. Where the utility is near 0 the model is destroyed, and its forget
quality says nothing.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptFormat, fingerprint
from ..models import end_token_ids
from ..tasks.generate import recorded_decoding
from . import command, metrics, open_unlearning
from .data import REAL_AUTHORS, RETAIN_PERTURBED, SPLITS, WORLD_FACTS, load_tofu, tofu_configs
from .robustness import load_quantized, load_to_relearn, relearn
from .scoring import Answer, check_counts, make_answers, measure

RESULT = "tofu_eval.json"
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
COMPARED = ("split", "limit", "data", "tokenizer", "template", "prompt", "non_members")  # of two results


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset_name: str,
    split: str,
    *,
    template: str | PromptFormat | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 200,
    limit: int | None = None,
    retain: str | Path | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on TOFU and return what `tofu_eval.json` holds, but for model, command and provenance.

    Args:
        model: A causal language model, or a PEFT model of one; its training mode is restored.
        tokenizer: Its tokenizer.
        dataset_name: As for [`ceu_rl.tofu.load_tofu`].
        split: The forget set: `forget01`, `forget05` or `forget10`.
        template: How questions are asked, a [`ceu_rl.data.prompts.PromptFormat`] or its `template`.
        batch_size: Answers in one forward pass; None is as many as fit into the memory for a batch.
        max_new_tokens: Most tokens to generate for ROUGE.
        limit: Only the first rows of each config; a retain model's result needs the same.
        retain: Result file of the retain model, see [`add_retain`].
        keep: A file for finished parts, from which the same evaluation continues; the caller removes it.

    Raises:
        ValueError: for a setting, dataset or retain model's result that does not fit, and with the row for one that the
            model's context cuts off or whose logits are not finite.
        OSError: if `keep` cannot be written.
    """
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit)
    prompt = PromptFormat.made_of(template).settle(tokenizer)
    asked, present = _asked(split), tofu_configs(dataset_name)
    holdout = [config for config in SPLITS[split].holdout if config in present][:1]
    datasets = {config: load_tofu(dataset_name, config) for config in (*asked, *holdout)}
    if limit is not None:
        datasets = {config: each.select(range(min(limit, len(each)))) for config, each in datasets.items()}
    non_members = holdout[0] if holdout else f"perturbed answers of {asked[0]}"
    settings = {
        "dataset": dataset_name,
        "split": split,
        "data": fingerprint(sorted(json.dumps(row, sort_keys=True) for row in datasets[asked[0]])),
        "template": prompt.template,
        "prompt": prompt.record(tokenizer),
        "tokenizer": fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]),
        "non_members": non_members,
        "limit": limit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "generation": "transformers",
        "decoding": recorded_decoding(model, tokenizer, max_new_tokens),
        "seed": 0,  # nothing is drawn
        "rows": {config: len(dataset) for config, dataset in datasets.items()},
    }
    retained = read_result(retain) if retain else None
    if retained:
        _check_same(settings, retained, str(retain))
    answers = make_answers(datasets, tokenizer, prompt, end_token_ids(model, tokenizer))
    first = datasets[asked[0]][0]
    print(prompt.example(tokenizer, first["question"], first["answer"]), file=sys.stderr)
    prompts = [answer for answer in answers if answer.kind == "answer" and answer.config in asked]
    generated = [(prompts, max_new_tokens, "max_new_tokens")]
    generations = measure(model, tokenizer, settings, answers, generated, batch_size, keep)
    items: dict[str, list[dict[str, Any]]] = {}
    for (config, _), row in groupby(answers, key=lambda answer: (answer.config, answer.row)):
        items.setdefault(config, []).append(_item(list(row), generations))
    result = {**settings, "summary": summarize(items, split, non_members), "items": items}
    if retained:
        add_retain(result, retained, str(retain))
    return result


def _asked(split: str) -> tuple[str, ...]:
    """The configs whose questions the model answers, the forget set first."""
    return (SPLITS[split].perturbed, RETAIN_PERTURBED, REAL_AUTHORS, WORLD_FACTS)


def _item(answers: Sequence[Answer], generations: Mapping[str, str]) -> dict[str, Any]:
    """The values of one row."""
    answer, *others = answers
    item: dict[str, Any] = {**answer.scores, "probability": math.exp(answer.log_prob)}
    if perturbed := [each for each in others if each.kind == "perturbed"]:
        wrong = [each.log_prob for each in perturbed]
        correct = next((each for each in others if each.kind == "paraphrase"), answer).log_prob
        item |= {
            "correct_log_prob": correct,
            "perturbed_log_probs": wrong,
            "option_probability": metrics.option_probability(answer.log_prob, wrong),
            "truth_ratio": metrics.truth_ratio(correct, wrong),
            "perturbed": [{attack: each.scores[attack] for attack in ATTACKS} for each in perturbed],
        }
    if answer.key in generations:
        item["generation"] = generations[answer.key]
        item["rouge_l_recall"] = metrics.rouge_l_recall(answer.text, item["generation"])
    return item


def summarize(items: Mapping[str, list[dict[str, Any]]], split: str, non_members: str) -> dict[str, float]:
    """The summary of a result from the values of its rows; forget quality and privacy leakage come with `add_retain`.

    Means over rows: `{set}_probability` (among the options for real authors and world facts), `{set}_rouge_l_recall`,
    `{set}_truth_ratio` (min(R, 1/R) on the forget set, max(0, 1 - R) elsewhere), and on the forget set extraction
    strength and exact memorization. `model_utility`, and `membership_auc_{attack}` against the non-members.
    """
    configs, summary = _asked(split), {}
    forget = items[configs[0]]
    for name, config in zip(("forget", *metrics.UTILITY_SETS), configs, strict=True):
        kind = "probability" if name in ("forget", "retain") else "option_probability"
        ratio = metrics.forget_truth_ratio if name == "forget" else metrics.utility_truth_ratio
        summary[f"{name}_probability"] = _mean(row[kind] for row in items[config])
        summary[f"{name}_rouge_l_recall"] = _mean(row["rouge_l_recall"] for row in items[config])
        summary[f"{name}_truth_ratio"] = _mean(ratio(row["truth_ratio"]) for row in items[config])
    for name in ("extraction_strength", "exact_memorization"):
        summary[f"forget_{name}"] = _mean(row[name] for row in forget)
    summary["model_utility"] = metrics.model_utility(summary)
    outside = items.get(non_members) or [wrong for item in forget for wrong in item["perturbed"]]
    for attack in ATTACKS:
        scores = [[row[attack] for row in rows] for rows in (forget, outside)]
        summary[f"membership_auc_{attack}"] = metrics.membership_auc(*scores)
    return summary


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def add_retain(result: dict[str, Any], retain: Mapping[str, Any], name: str) -> None:
    """Add forget quality and privacy leakage to the summary of a result, which is changed.

    Args:
        result: What [`evaluate`] returned, or a result file holds.
        retain: The same of a model that was trained on the retain set alone.
        name: The file of `retain`, for messages and for the record.

    Raises:
        ValueError: if `retain` is of another split, dataset, tokenizer, template or kind of non-members.
    """
    _check_same(result, retain, name)
    forget = _asked(result["split"])[0]
    (ratios, auc), (retain_ratios, retain_auc) = (
        open_unlearning.ratios_and_auc(each, forget) for each in (result, retain)
    )
    result["summary"]["forget_quality"] = metrics.forget_quality(ratios, retain_ratios)
    result["summary"]["ks_distance"] = float(stats.ks_2samp(ratios, retain_ratios).statistic)
    # open-unlearning's non-members are the holdout set
    comparable = not open_unlearning.is_peer(retain) or result["non_members"] in result["items"]
    if retain_auc is not None and auc is not None and comparable:
        result["summary"]["privacy_leakage"] = metrics.privacy_leakage(auc, retain_auc)
    result["retain"] = name


def _check_same(run: Mapping[str, Any], retain: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless the retain model was evaluated in the same way."""
    if open_unlearning.is_peer(retain):
        forget = _asked(run["split"])[0]
        ours, theirs = run["rows"][forget], len(open_unlearning.ratios_and_auc(retain, forget)[0])
        if ours != theirs:
            raise ValueError(
                f"The retain model's result {name} is open-unlearning's, with {theirs} rows to forget where this has "
                f"{ours}; give one of {run['split']}."
            )
        return
    for field in COMPARED:
        found, needed = retain.get(field), run.get(field)
        # Other settings may render the same prompt
        alike = [each["prompt"]["fingerprint"] if field == "prompt" else each.get(field) for each in (retain, run)]
        if alike[0] != alike[1]:
            raise ValueError(
                f"The retain model's result {name} has another {field} ({found!r}) than this model's ({needed!r}); "
                "evaluate the retain model in the same way."
            )


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file, of `ceu-rl tofu-eval` or, for a retain model, of open-unlearning; a ValueError for others."""
    try:
        result = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or no JSON ({error}); run ceu-rl tofu-eval for it again.") from error
    if open_unlearning.is_peer(result):
        return result
    for field in (*COMPARED, "rows", "summary", "items"):
        if not isinstance(result, dict) or (field not in result and field != "limit"):
            raise ValueError(f"{path} has no {field!r}; give a {RESULT} that this version of ceu-rl tofu-eval wrote.")
    return result


def main(argv: Sequence[str]) -> int:
    """`ceu-rl tofu-eval`: returns 0, or raises for bad input as [`evaluate`] does."""
    args = _parser().parse_args(argv)
    check_counts(relearn=args.relearn)
    if not args.results:
        path, result = command.run(["tofu-eval", *argv], args, RESULT, _evaluate)
    elif args.retain:
        path, result = Path(args.results), read_result(args.results)
        add_retain(result, read_result(args.retain), args.retain)
    else:
        raise ValueError("--results needs --retain, the result of a model to compare with.")
    command.save(path, result, ("quantized", "relearned"))
    if "forget_quality" not in result["summary"]:
        print("forget_quality and privacy_leakage need --retain.")
    print(f"Non-members of the membership attacks: {result['non_members']}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser("tofu-eval", __doc__, RESULT, "locuslab/TOFU")
    option = parser.add_argument
    option("--split", default="forget10", choices=tuple(SPLITS), help="the forget set (%(default)s)")
    option(
        "--retain",
        help=f"the retain model's {RESULT} or open-unlearning's TOFU_EVAL.json, for forget quality and privacy leakage",
    )
    option("--results", help=f"{RESULT} to add --retain to; no model is needed")
    option("--max_new_tokens", type=int, default=200, help="most tokens of a generation (%(default)s)")
    option("--quantize", choices=("int8", "int4"), help="evaluate once more with weights rounded by torchao")
    option("--relearn", type=int, help="evaluate once more after N steps on the forget set")
    option("--relearn_learning_rate", type=float, default=1e-5, help="of these steps (%(default)s)")
    return parser


def _evaluate(args: argparse.Namespace, model: Any, tokenizer: Any, keep: Path) -> dict[str, Any]:
    """Evaluate the model, rounded and relearned too; what can fail comes before the scores of an hour."""
    name, prompt = args.model_name_or_path, PromptFormat.of(args, args.model_name_or_path)
    changed: dict[str, tuple[Any, dict[str, Any]]] = {}
    if args.quantize:
        rounded = load_quantized(name, args.quantize, model.dtype).to(model.device)
        rounded(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
        changed["quantized"] = rounded, {"to": args.quantize}
    if args.relearn:
        again = load_to_relearn(name)
        about = {"steps": args.relearn, "learning_rate": args.relearn_learning_rate}
        about["trained_dtype"] = str(again.dtype).removeprefix("torch.")
        rows = load_tofu(args.dataset_name, SPLITS[args.split].perturbed)
        relearn(again, tokenizer, rows, prompt, args.relearn, args.relearn_learning_rate)
        changed["relearned"] = again.to("cpu", model.dtype), about
    given: dict[str, Any] = {each: getattr(args, each) for each in ("batch_size", "max_new_tokens", "limit", "retain")}
    given |= {"dataset_name": args.dataset_name, "split": args.split, "template": prompt}
    result = evaluate(model, tokenizer, keep=keep, **given)
    for kind, (other, about) in changed.items():
        result[kind] = {**about, "summary": evaluate(other.to(model.device), tokenizer, **given)["summary"]}
    return result
