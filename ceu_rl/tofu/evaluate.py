"""`ceu-rl tofu-eval`: every metric of TOFU for one model, from one pass over each split and one greedy generation.

    ceu-rl tofu-eval --model DIR --dataset locuslab/TOFU --split forget10 [--retain DIR/tofu_eval.json]
    ceu-rl tofu-eval --results DIR/tofu_eval.json --retain DIR/tofu_eval.json

The result is `tofu_eval.json`: a summary, the values of each row, and provenance. Forget quality and privacy leakage
need the result of a retain model, now or later.
"""

import argparse
import hashlib
import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..provenance import environment, peak_memory_gib, write_json
from . import metrics
from .data import (
    REAL_AUTHORS,
    RETAIN_PERTURBED,
    WORLD_FACTS,
    check_row,
    default_template,
    get_split,
    get_template,
    load_tofu,
    tofu_configs,
    tokenize,
)

RESULT = "tofu_eval.json"
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


@dataclass
class Answer:
    """One answer to score: where it stands, its tokens, and after the pass what the model makes of each of them."""

    config: str
    row: int
    kind: str  # answer, paraphrase or perturbed
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]
    text_length: int  # tokens before the end token
    log_probs: np.ndarray | None = None  # log p of each token, the end token included
    means: np.ndarray | None = None  # of log p under the model's own distribution there
    variances: np.ndarray | None = None
    matches: np.ndarray | None = None  # whether the token is the most likely one

    @property
    def log_prob(self) -> float:
        """l(y), the mean log-probability of a token."""
        assert self.log_probs is not None
        return float(self.log_probs.mean())

    def attack_scores(self) -> dict[str, float]:
        assert self.log_probs is not None and self.means is not None and self.variances is not None
        text = slice(self.text_length)
        return {
            "loss": metrics.loss_score(self.log_prob),
            "zlib": metrics.zlib_score(self.log_prob, self.text),
            "min_k": metrics.min_k_score(self.log_probs[text]),
            "min_k_plus_plus": metrics.min_k_plus_plus_score(
                self.log_probs[text], self.means[text], self.variances[text]
            ),
        }


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset_name: str,
    split: str,
    *,
    template: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    use_vllm: bool | None = None,
    model_path: str | None = None,
    retain: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model on TOFU and return what `tofu_eval.json` holds, without the command.

    Args:
        model: A causal language model, or a PEFT model of one; its training mode is restored.
        tokenizer: Its tokenizer.
        dataset_name: As for [`ceu_rl.tofu.load_tofu`].
        split: The forget set: `forget01`, `forget05` or `forget10`.
        template: As for [`ceu_rl.tofu.to_prompt_completion`].
        batch_size: Answers in one forward pass.
        max_new_tokens: Most tokens to generate for ROUGE.
        use_vllm: Generate through vLLM. None: where vLLM is installed, there is a CUDA device, and `model_path` is
            a folder with a full model.
        model_path: What vLLM loads.
        retain: Result file of the retain model, for forget quality and privacy leakage; see [`add_retain`].
        seed: vLLM's; decoding is greedy, and nothing else is random.

    Raises:
        ValueError: for a split, template, dataset or retain model's result that does not fit, rows that the model's
            context cuts off, and logits that are not finite, with the row.
    """
    start, provenance = time.perf_counter(), environment()
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} and max_new_tokens {max_new_tokens}; use at least 1 for both.")
    template = template or default_template(tokenizer)
    use_vllm = _decide_vllm(use_vllm, model_path)
    retain_result = read_result(retain) if retain else None
    datasets, non_members = _load(dataset_name, split)
    settings = {
        "dataset": dataset_name,
        "split": split,
        "data": _fingerprint(sorted(json.dumps(row, sort_keys=True) for row in datasets[_asked(split)[0]])),
        "template": template,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "non_members": non_members,
        "max_new_tokens": max_new_tokens,
        "generation": "vLLM" if use_vllm else "transformers",
        "seed": seed,
        "rows": {config: len(dataset) for config, dataset in datasets.items()},
    }
    if retain_result is not None:
        _check_retain(settings, retain_result, str(retain))
    answers = _make_answers(datasets, tokenizer, template)
    prompts = [answer for answer in answers if answer.kind == "answer" and answer.config in _asked(split)]
    _check_context(model, answers, prompts, max_new_tokens)
    was_training = model.training
    model.eval()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("log-probabilities", total=len(answers))
            score_answers(model, answers, batch_size, progress, task)
            task = progress.add_task("generation", total=len(prompts))
            if use_vllm:
                generations = _generate_with_vllm(str(model_path), tokenizer, prompts, max_new_tokens, seed)
                progress.advance(task, len(prompts))
            else:
                generations = _generate(model, tokenizer, prompts, batch_size, max_new_tokens, progress, task)
    finally:
        model.train(was_training)
    items = _items(answers, dict(zip(((p.config, p.row) for p in prompts), generations, strict=True)))
    result = {
        "model": model_path or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        **settings,
        "summary": summarize(items, split, non_members),
        "items": items,
        "wall_time_s": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        **provenance,
    }
    if retain_result is not None:
        add_retain(result, retain_result, str(retain))
    return result


def _asked(split: str) -> tuple[str, ...]:
    """The configs whose questions the model answers, the forget set first."""
    return (get_split(split).perturbed, RETAIN_PERTURBED, REAL_AUTHORS, WORLD_FACTS)


def _load(name: str, split: str) -> tuple[dict[str, Dataset], str]:
    """The datasets of a split by config, and what stands for non-members."""
    configs, present = list(_asked(split)), tofu_configs(name)
    holdout = next((config for config in get_split(split).holdout if config in present), None)
    datasets = {config: load_tofu(name, config) for config in [*configs, *([holdout] if holdout else [])]}
    return datasets, holdout or f"perturbed answers of {configs[0]}"


def _make_answers(datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, template: str) -> list[Answer]:
    apply, made = get_template(tokenizer, template), []
    for config, dataset in datasets.items():
        for index, row in enumerate(dataset):
            texts = [("answer", row["answer"])]
            if row.get("paraphrased_answer") is not None:
                texts.append(("paraphrase", row["paraphrased_answer"]))
            perturbed = row.get("perturbed_answer", [])
            if config.endswith("_perturbed") and not perturbed:
                raise ValueError(f"Row {index} of {config} has no perturbed_answer; give it a list of wrong answers.")
            texts += [("perturbed", wrong) for wrong in perturbed]
            for kind, text in texts:
                pair = apply(row["question"], text)
                check_row(tokenizer, pair, row["question"], text, f"row {index} of {config}")
                prompt, completion = tokenize(tokenizer, pair)
                ends = [place for place, token in enumerate(completion) if token == tokenizer.eos_token_id]
                length = ends[0] if ends else len(completion)
                made.append(Answer(config, index, kind, text, prompt, completion, max(length, 1)))
    return made


def _check_context(model: Any, answers: Iterable[Answer], prompts: Iterable[Answer], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    longest = max(answers, key=lambda answer: len(answer.prompt_ids) + len(answer.completion_ids))
    length = len(longest.prompt_ids) + len(longest.completion_ids)
    if length > context:
        raise ValueError(
            f"Row {longest.row} of {longest.config} has {length} tokens and the model's context {context}, which would "
            "cut its answer off; use a model with a longer context."
        )
    prompt = max(prompts, key=lambda answer: len(answer.prompt_ids))
    if len(prompt.prompt_ids) + max_new_tokens > context:
        raise ValueError(
            f"The question of row {prompt.row} of {prompt.config} has {len(prompt.prompt_ids)} tokens, so that "
            f"max_new_tokens {max_new_tokens} goes beyond the model's context of {context}; lower max_new_tokens."
        )


@torch.no_grad()
def score_answers(
    model: Any, answers: Sequence[Answer], batch_size: int = 32, progress: Progress | None = None, task: Any = None
) -> None:
    """Fill in what the model makes of every token of every answer, in one pass of batches sorted by length.

    Raises:
        ValueError: for logits that are not finite, with the row.
    """
    ordered = sorted(answers, key=lambda a: len(a.prompt_ids) + len(a.completion_ids), reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        logits, first = _answer_logits(model, batch)
        for answer, row in zip(batch, logits, strict=True):
            at = len(answer.prompt_ids) - 1 - first
            _score(answer, row[at : at + len(answer.completion_ids)])
        if progress is not None:
            progress.advance(task, len(batch))


def _answer_logits(model: Any, batch: Sequence[Answer]) -> tuple[torch.Tensor, int]:
    """Logits of a right-padded batch from the position before its first answer token on, and that position."""
    width = max(len(answer.prompt_ids) + len(answer.completion_ids) for answer in batch) - 1
    first = min(len(answer.prompt_ids) for answer in batch) - 1
    # The last token predicts nothing that is asked for
    rows = [(answer.prompt_ids + answer.completion_ids)[:-1] for answer in batch]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return model(input_ids=ids, attention_mask=mask).logits[:, first:], first
    kept = torch.arange(first, width, device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits, first


def _score(answer: Answer, logits: torch.Tensor) -> None:
    """Fill in one answer from its logits of shape (tokens, vocabulary)."""
    labels = torch.tensor(answer.completion_ids, device=logits.device)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_probs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    if not torch.isfinite(log_probs).all():
        raise ValueError(
            f"The model's logits are not finite in row {answer.row} of {answer.config}, where it gives the "
            f"{answer.kind} {answer.text[:80]!r} a log-probability of {log_probs.sum().item()}; take an earlier "
            "checkpoint, or train with a lower learning rate."
        )
    # Where p is 0 its logarithm counts for nothing, not even if it is infinite, as of tokens that a model rules out
    p, log_p = log_p.exp(), log_p.clamp(min=-1e4)
    means = (p * log_p).sum(dim=-1)
    variances = (p * (log_p - means[:, None]).square()).sum(dim=-1)
    answer.log_probs, answer.means, answer.variances = (
        values.double().cpu().numpy() for values in (log_probs, means, variances)
    )
    answer.matches = (logits.argmax(dim=-1) == labels).cpu().numpy()


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Answer],
    batch_size: int,
    max_new_tokens: int,
    progress: Progress,
    task: TaskID,
) -> list[str]:
    """The greedy answer to each prompt, through `model.generate`."""
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prompt_ids), reverse=True)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [prompts[i].prompt_ids for i in chosen]
        width = len(rows[0])
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )
        for i, text in zip(chosen, tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
        progress.advance(task, len(chosen))
    return texts


def _decide_vllm(use_vllm: bool | None, model_path: str | None) -> bool:
    full_model = model_path is not None and Path(model_path, "config.json").is_file()
    if use_vllm is None:
        return full_model and torch.cuda.is_available() and find_spec("vllm") is not None
    if use_vllm:
        from ..rollouts import check_vllm

        check_vllm()
        if not full_model:
            raise ValueError(
                f"use_vllm is True and {model_path} is no folder with a full model, which vLLM loads; merge an adapter "
                "into its model, or set use_vllm to false."
            )
    return use_vllm


def _generate_with_vllm(
    path: str, tokenizer: Any, prompts: Sequence[Answer], max_new_tokens: int, seed: int
) -> list[str]:
    """The same through vLLM, in what memory the scored model leaves."""
    from vllm import LLM, SamplingParams

    from ..rollouts import _NameCause

    settings: dict[str, Any] = {"max_model_len": max(len(p.prompt_ids) for p in prompts) + max_new_tokens}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = 0.9 * free / total
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=stop)
    with _NameCause("vLLM, while generating answers,", "mend that, or set use_vllm to false."):
        engine: Any = LLM(model=path, seed=seed, disable_log_stats=True, **settings)
        outputs = engine.generate([{"prompt_token_ids": p.prompt_ids} for p in prompts], sampling, use_tqdm=False)
    return [tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True).strip() for output in outputs]


def _items(answers: Iterable[Answer], generations: Mapping[tuple[str, int], str]) -> dict[str, list[dict[str, Any]]]:
    """The values of each row, by config."""
    rows: dict[str, dict[int, dict[str, list[Answer]]]] = {}
    for answer in answers:
        rows.setdefault(answer.config, {}).setdefault(answer.row, {}).setdefault(answer.kind, []).append(answer)
    return {
        config: [_item(kinds, generations.get((config, row))) for row, kinds in sorted(by_row.items())]
        for config, by_row in rows.items()
    }


def _item(kinds: Mapping[str, list[Answer]], generation: str | None) -> dict[str, Any]:
    (answer,) = kinds["answer"]
    assert answer.matches is not None
    matches = answer.matches[: answer.text_length]
    item: dict[str, Any] = {
        "log_prob": answer.log_prob,
        "probability": metrics.probability(answer.log_prob),
        "exact_memorization": metrics.exact_memorization(matches),
        "extraction_strength": metrics.extraction_strength(matches),
        **answer.attack_scores(),
    }
    if wrong := [perturbed.log_prob for perturbed in kinds.get("perturbed", [])]:
        correct = kinds.get("paraphrase", kinds["answer"])[0].log_prob
        item["correct_log_prob"] = correct
        item["perturbed_log_probs"] = wrong
        item["option_probability"] = metrics.option_probability(answer.log_prob, wrong)
        item["truth_ratio"] = metrics.truth_ratio(correct, wrong)
        item["perturbed"] = [perturbed.attack_scores() for perturbed in kinds["perturbed"]]
    if generation is not None:
        item["generation"] = generation
        item["rouge_l_recall"] = metrics.rouge_l_recall(answer.text, generation)
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
    _check_retain(result, retain, name)
    forget = _asked(result["split"])[0]
    ratios = [[row["truth_ratio"] for row in each["items"][forget]] for each in (result, retain)]
    aucs = [each["summary"]["membership_auc_min_k"] for each in (result, retain)]
    result["summary"]["forget_quality"] = metrics.forget_quality(*ratios)
    result["summary"]["privacy_leakage"] = metrics.privacy_leakage(*aucs)
    result["retain"] = name


def _check_retain(run: Mapping[str, Any], retain: Mapping[str, Any], name: str) -> None:
    for field in ("split", "data", "tokenizer", "template", "non_members"):
        if retain[field] != run[field]:
            raise ValueError(
                f"The retain model's result {name} has another {field} ({retain[field]!r}) than this model's "
                f"({run[field]!r}); evaluate the retain model in the same way."
            )


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: for a file that is no result of `ceu-rl tofu-eval`, or one that was cut short.
        OSError: if it cannot be read.
    """
    try:
        result = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is cut short or no JSON ({error}); run ceu-rl tofu-eval for it again.") from error
    needed = ("split", "data", "tokenizer", "template", "non_members", "rows", "summary", "items")
    missing = [field for field in needed if not isinstance(result, dict) or field not in result]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}; give a {RESULT} that ceu-rl tofu-eval wrote.")
    for config, count in result["rows"].items():
        if len(result["items"].get(config, ())) != count:
            raise ValueError(
                f"{path} is cut short: it has {len(result['items'].get(config, ()))} of {count} rows of {config}; run "
                "ceu-rl tofu-eval for it again."
            )
    return result


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of what decides tokens and prompts: vocabulary and chat template."""
    return _fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def main(argv: Sequence[str]) -> int:
    """`ceu-rl tofu-eval`: returns 0, or 2 for bad input, with one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        if args.results:
            if not args.retain:
                raise ValueError("--results needs --retain, the result of the retain model to compare with.")
            path, result = Path(args.results), read_result(args.results)
            add_retain(result, read_result(args.retain), args.retain)
        else:
            path = _output(args)
            result = _evaluate_path(args)
            result["command"] = shlex.join(["ceu-rl", "tofu-eval", *argv])
        write_json(path, result, allow_nan=False)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("CEU_RL_TRACEBACK"):
            raise
        print(f"ceu-rl tofu-eval: error: {error}", file=sys.stderr)
        return 2
    _print_summary(result)
    print(f"The values of each row are in {path}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceu-rl tofu-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub name of the model, with its tokenizer")
    parser.add_argument("--dataset", default="locuslab/TOFU", help="Hub name, folder, or builtin:authors")
    parser.add_argument("--split", default="forget10", help="forget01, forget05 or forget10")
    parser.add_argument("--retain", help=f"{RESULT} of the retain model")
    parser.add_argument("--results", help=f"{RESULT} to add --retain to; no model is needed")
    parser.add_argument("--output_dir", help="default: the folder of the model")
    parser.add_argument("--template", help="chat or question_answer; default: chat if the tokenizer has a template")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--use_vllm", choices=("true", "false"), help="default: if it is installed and there is a GPU")
    return parser


def _output(args: argparse.Namespace) -> Path:
    if not args.model:
        raise ValueError("--model is missing; give a folder or a Hub name, or --results with --retain.")
    if not args.output_dir and not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model} is no folder to write to; check its name, or give --output_dir.")
    path = Path(args.output_dir or args.model, RESULT)
    if path.exists():
        raise ValueError(f"{path} exists; choose another folder with --output_dir, or move it away.")
    return path


def _evaluate_path(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {args.model} holds no model with its tokenizer ({first}).") from error
    return evaluate(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        args.dataset,
        args.split,
        template=args.template,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        use_vllm={"true": True, "false": False, None: None}[args.use_vllm],
        model_path=args.model,
        retain=args.retain,
    )


def _print_summary(result: Mapping[str, Any]) -> None:
    table = Table("metric", "value", title=f"{result['model']} on {result['split']} of {result['dataset']}")
    for name, value in result["summary"].items():
        table.add_row(name, f"{value:.4g}")
    if "forget_quality" not in result["summary"]:
        table.add_row("forget_quality, privacy_leakage", "need --retain")
    console = Console()
    console.print(table)
    console.print(f"Non-members of the membership attacks: {result['non_members']}.")
