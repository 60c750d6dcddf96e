"""Makes the pairs of the study: a folder of train.jsonl and test.jsonl, parted by a column, of at most 208 tokens.

    python docs/results/dpo-anchor/pairs.py ROWS.jsonl FOLDER --by COLUMN [--every 5]

ROWS has `prompt`, `chosen` and `rejected` as messages, and an integer COLUMN: rows whose value is a multiple of 5 are
for tests (of 3 for the solutions to problems, which are fewer), of which 200 are drawn. Pairs whose prompt and longer
answer have more than 208 tokens in SmolLM2's template, and pairs of two equal answers, are left out.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from ceu_rl.models import smollm2_folder

LONGEST, TESTS = 208, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--by", required=True)
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for row in load_dataset("json", data_files=str(args.rows), split="train"):
        pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        texts = [pair["prompt"] + pair[name] for name in ("chosen", "rejected")]
        ids = [tokenizer.apply_chat_template(text, return_dict=True)["input_ids"] for text in texts]
        if max(map(len, ids)) <= LONGEST and ids[0] != ids[1]:
            parts["test" if row[args.by] % args.every == 0 else "train"].append(pair)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        random.Random(7).shuffle(rows)
        kept = rows[:TESTS] if name == "test" else rows
        Dataset.from_list(kept).to_json(args.folder / f"{name}.jsonl")
        print(f"{name}: {len(kept)} of {len(rows)} pairs")


if __name__ == "__main__":
    main()
