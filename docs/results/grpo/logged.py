"""Logged completions for offline GRPO: samples of a model on additions, each with its reward.

    python docs/results/grpo/logged.py runs/addition/base logged

`logged/known` also has the log-probabilities of the tokens under the model, `logged/unknown` has none. Each folder is a
train.jsonl of 2,048 questions with 8 completions, and a test.jsonl of the 500 held-out questions.

To decide, written down before it ran: positives only is the advice for logged completions. It is refuted if `clip` or
`anchored`, which know the probabilities, or `ceu-1`, ends above it in held-out reward on every seed. The
same holds for a base that is mostly wrong (`base.yaml` with `--max_steps 300`).
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl.tasks import load_task_dataset
from ceu_rl.tasks.addition import accuracy
from ceu_rl.tasks.generate import answer_logits, answer_texts, generate_tokens

QUESTIONS, SAMPLES, LENGTH = 2048, 8, 34


def main(model_path: str, folder: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    questions = load_task_dataset("builtin:addition", "prompt")
    rows = list(questions["train"].select(range(QUESTIONS)))
    asked = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    written = generate_tokens(model, tokenizer, asked, LENGTH, sample=True, samples=SAMPLES)
    for row, ids, completions in zip(rows, asked, written, strict=True):
        said = [[{"role": "assistant", "content": text}] for text in answer_texts(model, tokenizer, completions)]
        row |= {"completions": completions, "rewards": accuracy([row["prompt"]] * SAMPLES, said)}
        with torch.no_grad():
            logits = answer_logits(model, [(ids, completion) for completion in completions], model.device)
        chosen = (each.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
                  for each, completion in zip(logits, completions, strict=True))  # fmt: skip
        row["log_probs"] = list(chosen)
    for name in ("known", "unknown"):
        path = Path(folder, name)
        path.mkdir(parents=True, exist_ok=True)
        train = Dataset.from_list(rows)
        (train if name == "known" else train.remove_columns("log_probs")).to_json(path / "train.jsonl")
        questions["test"].to_json(path / "test.jsonl")
    rewards = [reward for row in rows for reward in row["rewards"]]
    print(f"{len(rows)} questions, {SAMPLES} completions each, {sum(rewards) / len(rewards):.3f} of them right")


if __name__ == "__main__":
    main(*sys.argv[1:])
