"""`ceu-rl tofu-eval`: every metric of TOFU for one model, from one pass over each split and one greedy generation.

    ceu-rl tofu-eval --model DIR --dataset locuslab/TOFU --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl tofu-eval --results DIR/tofu_eval.json --retain DIR/tofu_eval.json

The result is `tofu_eval.json`: a summary, the values of each row, and provenance. Forget quality and privacy leakage
need the result of a retain model, now or later. A model whose utility is below a tenth of its base's has collapsed, and
its forget quality says nothing.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptFormat, fingerprint, recorded_run
from ..models import end_token_ids
from ..run.provenance import write_json
from ..tasks.generate import decide_vllm, recorded_decoding
from . import command, metrics, open_unlearning
from .answer_cache import AnswerCache, weights_fingerprint
from .data import REAL_AUTHORS, RETAIN_PERTURBED, WORLD_FACTS, get_split, load_tofu, tofu_configs
from .robustness import check_quantizer, load_quantized, load_to_relearn, relearn
from .scoring import Answer, check_context, check_counts, make_answers, measure

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
    use_vllm: bool | None = None,
    model_path: str | None = None,
    retain: str | Path | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on TOFU and return what `tofu_eval.json` holds, but for the command and provenance.

    Args:
        model: A causal language model, or a PEFT model of one; its training mode is restored.
        tokenizer: Its tokenizer.
        dataset_name: As for [`ceu_rl.tofu.load_tofu`].
        split: The forget set: `forget01`, `forget05` or `forget10`.
        template: How questions are asked, see [`ceu_rl.data.prompts.PromptFormat`], whose `template` a text is.
        batch_size: Answers in one forward pass; None is as many as fit into the memory for a batch.
        max_new_tokens: Most tokens to generate for ROUGE.
        limit: Only the first rows of each config, for a quick look; a retain model's result needs the same.
        use_vllm: Generate through vLLM. None: where it is installed, faster, and `model_path` is a full model's; see
            [`ceu_rl.tasks.generate.decide_vllm`].
        model_path: What vLLM loads.
        retain: Result file of the retain model, ours or open-unlearning's, for forget quality and privacy leakage; see
            [`add_retain`].
        base: Result file of the model before unlearning, to say whether it collapsed; see [`add_base`].
        seed: vLLM's; decoding is greedy, and nothing else is random.
        keep: A file for finished parts, from which the same evaluation continues; the caller removes it.

    Raises:
        ValueError: for a split, template, dataset or retain model's result that does not fit, rows that the model's
            context cuts off, and logits that are not finite, with the row.
        OSError: if `keep` cannot be written.
    """
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit)
    prompt = (template if isinstance(template, PromptFormat) else PromptFormat(template)).settle(tokenizer)
    others = [(add_retain, "retain model", retain), (add_base, "base model", base)]
    compared = [(add, which, read_result(path), str(path)) for add, which, path in others if path]
    asked, (datasets, non_members) = _asked(split), _load(dataset_name, split, limit)
    tokens = sum(len(datasets[config]) for config in asked) * max_new_tokens
    use_vllm = decide_vllm(use_vllm, model_path, model, tokens)
    settings = {
        "dataset": dataset_name,
        "split": split,
        "data": fingerprint(sorted(json.dumps(row, sort_keys=True) for row in datasets[asked[0]])),
        "template": prompt.template,
        "prompt": prompt.record(tokenizer),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "non_members": non_members,
        "limit": limit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "generation": "vLLM" if use_vllm else "transformers",
        "decoding": recorded_decoding(model, tokenizer, max_new_tokens),
        "seed": seed,
        "rows": {config: len(dataset) for config, dataset in datasets.items()},
    }
    for _, which, other, name in compared:
        _check_same(settings, other, name, which)
    answers = make_answers(datasets, tokenizer, prompt, end_token_ids(model, tokenizer))
    prompts = [answer for answer in answers if answer.kind == "answer" and answer.config in asked]
    check_context(model, answers)
    check_context(model, prompts, max_new_tokens, "max_new_tokens")
    texts = fingerprint([[answer.key, answer.text] for answer in answers])
    cache = AnswerCache(keep, {**settings, "weights": weights_fingerprint(model), "texts": texts})
    first = datasets[asked[0]][0]
    print(prompt.example(tokenizer, first["question"], first["answer"]), file=sys.stderr)
    vllm_path = str(model_path) if use_vllm else None
    measure(model, tokenizer, answers, [(prompts, max_new_tokens)], cache, batch_size, vllm_path, seed)
    items = _items(answers, cache.generations)
    result = {
        "model": model_path or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        **settings,
        "summary": summarize(items, split, non_members),
        "items": items,
    }
    for add, _, other, name in compared:
        add(result, other, name)
    return result


def _asked(split: str) -> tuple[str, ...]:
    """The configs whose questions the model answers, the forget set first."""
    return (get_split(split).perturbed, RETAIN_PERTURBED, REAL_AUTHORS, WORLD_FACTS)


def _load(name: str, split: str, limit: int | None) -> tuple[dict[str, Dataset], str]:
    """The datasets of a split by config, and what stands for non-members."""
    configs, present = list(_asked(split)), tofu_configs(name)
    holdout = next((config for config in get_split(split).holdout if config in present), None)
    datasets = {config: load_tofu(name, config) for config in [*configs, *([holdout] if holdout else [])]}
    if limit is not None:
        datasets = {config: each.select(range(min(limit, len(each)))) for config, each in datasets.items()}
    return datasets, holdout or f"perturbed answers of {configs[0]}"


def _items(answers: Iterable[Answer], generations: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The values of each row, by config."""
    items: dict[str, list[dict[str, Any]]] = {}
    for (config, _), row in groupby(answers, key=lambda answer: (answer.config, answer.row)):
        items.setdefault(config, []).append(_item(list(row), generations))
    return items


def _item(answers: Sequence[Answer], generations: Mapping[str, str]) -> dict[str, Any]:
    answer, *others = answers
    perturbed = [each for each in others if each.kind == "perturbed"]
    item: dict[str, Any] = {**answer.scores, "probability": metrics.probability(answer.log_prob)}
    if perturbed:
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
    forget, *others = _asked(split)
    summary = {f"forget_{name}": _mean(items[forget], name) for name in ("probability", "rouge_l_recall")}
    summary["forget_truth_ratio"] = _mean(items[forget], "truth_ratio", metrics.forget_truth_ratio)
    for name in ("extraction_strength", "exact_memorization"):
        summary[f"forget_{name}"] = _mean(items[forget], name)
    for name, config in zip(metrics.UTILITY_SETS, others, strict=True):
        kind = "probability" if name == "retain" else "option_probability"
        summary[f"{name}_probability"] = _mean(items[config], kind)
        summary[f"{name}_rouge_l_recall"] = _mean(items[config], "rouge_l_recall")
        summary[f"{name}_truth_ratio"] = _mean(items[config], "truth_ratio", metrics.utility_truth_ratio)
    summary["model_utility"] = metrics.model_utility(summary)
    outside = items.get(non_members) or [wrong for item in items[forget] for wrong in item["perturbed"]]
    for attack in ATTACKS:
        scores = [[row[attack] for row in rows] for rows in (items[forget], outside)]
        summary[f"membership_auc_{attack}"] = metrics.membership_auc(*scores)
    return summary


def _mean(rows: Sequence[Mapping[str, Any]], name: str, apply: Any = float) -> float:
    return float(np.mean([apply(row[name]) for row in rows]))


def add_retain(result: dict[str, Any], retain: Mapping[str, Any], name: str) -> None:
    """Add forget quality and privacy leakage to the summary of a result.

    Args:
        result: What [`evaluate`] returned, or a result file holds; it is changed.
        retain: The same of a model that was trained on the retain set alone.
        name: The file of `retain`, for messages and for the record.

    Raises:
        ValueError: if `retain` is of another split, dataset, tokenizer, template or kind of non-members.
    """
    _check_same(result, retain, name, "retain model")
    forget = _asked(result["split"])[0]
    (ratios, auc), (retain_ratios, retain_auc) = (
        open_unlearning.ratios_and_auc(each, forget) for each in (result, retain)
    )
    result["summary"]["forget_quality"] = metrics.forget_quality(ratios, retain_ratios)
    result["summary"]["ks_distance"] = metrics.ks_distance(ratios, retain_ratios)
    # open-unlearning's non-members are the holdout set
    comparable = not open_unlearning.is_peer(retain) or result["non_members"] in result["items"]
    if retain_auc is not None and auc is not None and comparable:
        result["summary"]["privacy_leakage"] = metrics.privacy_leakage(auc, retain_auc)
    result["retain"] = name


def add_base(result: dict[str, Any], base: Mapping[str, Any], name: str) -> None:
    """Say in a result whether the model is destroyed: see [`ceu_rl.tofu.metrics.is_collapsed`].

    Args:
        result: What [`evaluate`] returned, or a result file holds; it is changed.
        base: The same of the model before unlearning.
        name: The file of `base`, for messages and for the record.

    Raises:
        ValueError: if `base` is of another split, dataset, tokenizer, prompt or kind of non-members.
    """
    _check_same(result, base, name, "base model")
    utility, before = (each["summary"]["model_utility"] for each in (result, base))
    result["base"] = {"result": name, "model_utility": before}
    result["collapsed"] = metrics.is_collapsed(utility, before)


def find_base(model: str) -> str | None:
    """The result of the model that one was unlearned from, if its `result.json` names that and it was evaluated."""
    run = recorded_run(model)
    settings = run.get("settings")
    base = settings.get("model_name_or_path") if isinstance(settings, Mapping) else None
    found = Path(base or "", RESULT)
    return str(found) if run.get("method") in ("unlearn", "dpo") and found.is_file() else None


def _check_same(run: Mapping[str, Any], other: Mapping[str, Any], name: str, which: str) -> None:
    """Raise a ValueError unless another model was evaluated in the same way."""
    if open_unlearning.is_peer(other):
        forget = _asked(run["split"])[0]
        ours, theirs = run["rows"][forget], len(open_unlearning.ratios_and_auc(other, forget)[0])
        if which == "base model" or ours != theirs:
            raise ValueError(
                f"The {which}'s result {name} is open-unlearning's, with {theirs} rows to forget where this has "
                f"{ours}; give one of {run['split']} as --retain, or evaluate the {which} here."
            )
        return
    for field in COMPARED:
        found, needed = other.get(field), run.get(field)
        # Other settings may render the same prompt
        alike = [each["prompt"]["fingerprint"] if field == "prompt" else each.get(field) for each in (other, run)]
        if alike[0] != alike[1]:
            raise ValueError(
                f"The {which}'s result {name} has another {field} ({found!r}) than this model's ({needed!r}); evaluate "
                f"the {which} in the same way."
            )


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file, of `ceu-rl tofu-eval` or, for a retain model, of open-unlearning.

    Raises:
        ValueError: for a file that is neither.
        OSError: if it cannot be read.
    """
    try:
        result = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or no JSON ({error}); run ceu-rl tofu-eval for it again.") from error
    if open_unlearning.is_peer(result):
        return result
    for field in (*COMPARED, "rows", "summary", "items"):
        if not isinstance(result, dict) or (field not in result and field != "limit"):
            raise ValueError(f"{path} has no {field!r}; give a {RESULT} that this version of ceu-rl tofu-eval wrote.")
    try:  # all that a comparison takes from it, before a model is scored
        float(result["summary"]["model_utility"])
        np.array(open_unlearning.ratios_and_auc(result, next(iter(result["items"]), ""))[0], dtype=float)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole result ({error!r}); run ceu-rl tofu-eval for it again.") from error
    return result


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of what decides tokens and prompts: vocabulary and chat template."""
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def main(argv: Sequence[str]) -> int:
    """`ceu-rl tofu-eval`: returns 0, or raises for bad input as [`evaluate`] does."""
    args = _parser().parse_args(argv)
    if args.results:
        path, result = Path(args.results), read_result(args.results)
        if not args.retain and not args.base:
            raise ValueError("--results needs --retain or --base, the result of a model to compare with.")
        if open_unlearning.is_peer(result):
            raise ValueError(f"--results {path} is open-unlearning's; give it as --retain, or a {RESULT} of ours.")
        for add, other in ((add_retain, args.retain), (add_base, args.base)):
            if other:
                add(result, read_result(other), other)
    else:
        if args.relearn < 0 or not 0 < args.relearn_learning_rate < math.inf:
            raise ValueError(
                f"--relearn is {args.relearn} and --relearn_learning_rate {args.relearn_learning_rate}; use a number "
                "of steps and a finite rate above 0."
            )
        if args.quantize:
            check_quantizer(args.quantize)
        path, result = command.run(["tofu-eval", *argv], args, RESULT, functools.partial(_evaluate, args))
        if not args.base:
            try:
                if found := find_base(args.model_name_or_path):
                    add_base(result, read_result(found), found)
            except ValueError as error:  # nobody asked for it
                print(f"Whether the model collapsed is not said: {error}", file=sys.stderr)
    command.save(path, result)
    if args.format:
        peer = open_unlearning.to_peer(result, _asked(result["split"]))
        write_json(path.with_name(open_unlearning.FILE), peer, allow_nan=False)
    _print_summary(result)
    print(f"The values of each row are in {path}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser("tofu-eval", __doc__, RESULT, "locuslab/TOFU")
    option = parser.add_argument
    option("--split", default="forget10", help="forget01, forget05 or forget10 (%(default)s)")
    option(
        "--retain",
        help=f"the retain model's {RESULT} or open-unlearning's {open_unlearning.FILE}, for forget quality and privacy "
        "leakage",
    )
    option(
        "--base",
        help=f"{RESULT} of the model before unlearning, to say whether this one collapsed; default: that of the folder "
        "from which result.json says that it was unlearned, if there is one",
    )
    option("--results", help=f"{RESULT} to add --retain or --base to; no model is needed")
    option("--max_new_tokens", type=int, default=200, help="most tokens of a generation (%(default)s)")
    option("--use_vllm", choices=("true", "false"), help="generate through vLLM; default: if installed and faster")
    option(
        "--format",
        choices=("open-unlearning",),
        help=f"write {open_unlearning.FILE} too, as open-unlearning has it, beside {RESULT}",
    )
    option("--quantize", help="int8 or int4: evaluate once more with weights rounded by torchao")
    option("--relearn", type=int, default=0, help="evaluate once more after N steps on the forget set (%(default)s)")
    option("--relearn_learning_rate", type=float, default=1e-5, help="of these steps (%(default)s)")
    return parser


def _evaluate(args: argparse.Namespace, model: Any, tokenizer: Any, keep: Path) -> dict[str, Any]:
    """Evaluate the model, rounded and relearned too; what can fail comes before the scores of an hour."""
    name = args.model_name_or_path
    prompt, changed, about = PromptFormat.of(args, name), {}, {}
    if args.quantize:
        changed["quantized"] = load_quantized(name, args.quantize, model.dtype).to(model.device)
        changed["quantized"](input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
        about["quantized"] = {"to": args.quantize}
    if args.relearn:
        again = load_to_relearn(name)
        trained_dtype = str(again.dtype).removeprefix("torch.")
        rows = load_tofu(args.dataset_name, get_split(args.split).perturbed)
        relearn(again, tokenizer, rows, prompt, args.relearn, args.relearn_learning_rate)
        changed["relearned"] = again.to("cpu", model.dtype)
        about["relearned"] = {
            "steps": args.relearn,
            "learning_rate": args.relearn_learning_rate,
            "trained_dtype": trained_dtype,
        }
    given: dict[str, Any] = {each: getattr(args, each) for each in ("batch_size", "max_new_tokens", "limit", "retain")}
    given |= {"dataset_name": args.dataset_name, "split": args.split, "template": prompt, "model_path": name}
    use_vllm = {"true": True, "false": False, None: None}[args.use_vllm]
    result = evaluate(model, tokenizer, use_vllm=use_vllm, base=args.base, keep=keep, **given)
    for kind, other in changed.items():  # vLLM would load the folder again
        found = evaluate(other.to(model.device), tokenizer, use_vllm=False, **given)
        result[kind] = {**about[kind], "summary": found["summary"]}
    return result


def _print_summary(result: Mapping[str, Any]) -> None:
    after = {name: result[name]["summary"] for name in ("quantized", "relearned") if name in result}
    table = Table("metric", "value", *after, title=f"{result['model']} on {result['split']} of {result['dataset']}")
    for name, value in result["summary"].items():
        table.add_row(name, *(f"{each:.4g}" for each in (value, *(summary[name] for summary in after.values()))))
    if "forget_quality" not in result["summary"]:
        table.add_row("forget_quality, privacy_leakage", "need --retain")
    console = Console()
    console.print(table)
    console.print(f"Non-members of the membership attacks: {result['non_members']}.")
    if result.get("collapsed"):
        before = result["base"]["model_utility"]
        print(f"Collapsed: the utility is below a tenth of the base's {before:.4g}; the forget quality says nothing.")
