"""Preference pairs out of the model solutions that come with GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

Reads example_model_solutions.jsonl of github.com/openai/grade-school-math (MIT), with four model solutions to each test
problem, judged right or wrong, and a human one; writes gsm8k-pairs.jsonl. Every wrong solution is rejected once; chosen
is the first right one of a model or, where no model was right, the human one. The problems are GSM8K's test set: do not
train on these pairs where test accuracy is claimed.
"""

import json
from pathlib import Path

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def message(role, content):
    return [{"role": role, "content": content}]


with Path("gsm8k-pairs.jsonl").open("x", encoding="utf-8") as pairs:
    for number, line in enumerate(Path("example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()):
        problem = json.loads(line)
        judged = [problem[model] for model in MODELS]
        right = [each["solution"] for each in judged if each["is_correct"]]
        row = {
            "prompt": message("user", problem["question"]),
            "chosen": message("assistant", right[0] if right else problem["ground_truth"]),
            "problem": number,
            "chosen_by": "model" if right else "human",
        }
        for each in judged:
            if not each["is_correct"]:
                pairs.write(json.dumps({**row, "rejected": message("assistant", each["solution"])}) + "\n")
