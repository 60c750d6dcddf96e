"""How long the answers of `ceu-rl tofu-eval` take through transformers and through vLLM: SmolLM2 on TOFU's questions.

    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=2 python docs/results/unlearning/generation.py TOFU QUESTIONS OUTPUT.json

Seconds are those of the clock, to the first answers and to the last, vLLM's with the start of its engine.
"""

import os
import shlex
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ceu_rl.data.prompts import PromptFormat
from ceu_rl.models import end_token_ids, resolve_model
from ceu_rl.run.provenance import environment, write_json
from ceu_rl.tasks.generate import generate_with_vllm
from ceu_rl.tofu import load_tofu
from ceu_rl.tofu.scoring import generate_texts, make_answers, said

SPLIT, BATCH, NEW_TOKENS, SEED = "forget10_perturbed", 32, 200, 0


def main(folder, questions, output):
    started = environment()
    path = str(resolve_model("builtin:smollm2"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ends = end_token_ids(model, tokenizer)
    rows = load_tofu(folder, SPLIT)
    rows = rows.select(range(0, len(rows), len(rows) // int(questions)))
    answers = make_answers({SPLIT: rows}, tokenizer, PromptFormat(None, None, None).settle(tokenizer), ends)
    prompts = [answer for answer in answers if answer.kind == "answer"]
    found, seconds = {"transformers": {}, "vllm": {}}, {}

    def keep(way):
        def kept(batch, texts):
            seconds.setdefault(f"{way}_first", time.perf_counter() - start)
            found[way].update({answer.key: text for answer, text in zip(batch, texts, strict=True)})

        return kept

    start = time.perf_counter()
    generate_texts(model, tokenizer, prompts, NEW_TOKENS, BATCH, keep("transformers"))
    seconds["transformers"] = time.perf_counter() - start
    start = time.perf_counter()
    kept = keep("vllm")

    def when_done(places, ids):
        batch = [prompts[place] for place in places]
        kept(batch, [said(tokenizer, *each, ends) for each in zip(batch, ids, strict=True)])

    generate_with_vllm(path, model.dtype, [each.question_ids for each in prompts], ends, NEW_TOKENS, SEED, when_done)
    seconds["vllm"] = time.perf_counter() - start
    lengths = [len(tokenizer(text)["input_ids"]) for text in found["transformers"].values()]
    record = {
        "command": shlex.join(["python", "docs/results/unlearning/generation.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "kv_cache_gib": os.environ.get("VLLM_CPU_KVCACHE_SPACE"),
        "questions": len(prompts),
        "most_new_tokens": NEW_TOKENS,
        "mean_answer_tokens": round(sum(lengths) / len(lengths), 1),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "equal_answers": sum(found["vllm"][key] == text for key, text in found["transformers"].items()),
        "seed": SEED,
        **started,
    }
    write_json(Path(output), record)


if __name__ == "__main__":
    main(*sys.argv[1:])
