"""`ceu-rl gsm8k`: preference pairs out of the model solutions that come with GSM8K.

Source: Cobbe et al. 2021, arXiv 2110.14168.

    ceu-rl gsm8k example_model_solutions.jsonl gsm8k-pairs.jsonl

The file, of github.com/openai/grade-school-math (MIT), has four model solutions to each test problem, judged right or
wrong, and a human one. Every wrong one is rejected once; chosen is the first right one of a model or, where no model
was right, the human one. The problems are GSM8K's test set: do not train on these pairs
where test accuracy is claimed.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ceu_rl.data.load import open_dataset
from ceu_rl.tasks.protocol import conversation

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def make_pairs(number: int, problem: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The pairs of one problem, in TRL's conversational format, with its number and who wrote what is chosen."""
    judged = [problem[model] for model in MODELS]
    if wrong := [each["is_correct"] for each in judged if not isinstance(each["is_correct"], bool)]:
        raise TypeError(f"is_correct is {wrong[0]!r}")
    right = [each["solution"] for each in judged if each["is_correct"]]
    chosen, writer = (right[0], "model") if right else (problem["ground_truth"], "human")
    for each in judged:
        if not each["is_correct"]:
            row = conversation("preference", problem["question"], chosen, each["solution"])
            yield {**row, "problem": number, "chosen_by": writer}


def main(argv: Sequence[str]) -> int:
    """Read the published file, write the pairs; a ValueError or OSError for files that cannot be."""
    parser = argparse.ArgumentParser(
        "ceu-rl gsm8k", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("solutions", type=Path, help="grade_school_math/data/example_model_solutions.jsonl")
    parser.add_argument("pairs", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    if args.pairs.exists():
        raise ValueError(f"{args.pairs} exists; choose another name, or move it away.")
    solutions = open_dataset(str(args.solutions), None, field="solutions")["train"]
    try:
        pairs = [pair for number, problem in enumerate(solutions) for pair in make_pairs(number, problem)]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{args.solutions} is not as published ({error!r}); take example_model_solutions.jsonl."
        ) from error
    if not pairs:
        raise ValueError(f"{args.solutions} has no wrong solution to reject; take example_model_solutions.jsonl.")
    args.pairs.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs of {len({pair['problem'] for pair in pairs})} problems are in {args.pairs}.")
    return 0
