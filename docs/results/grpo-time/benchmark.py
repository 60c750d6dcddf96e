"""Time per GRPO step: vLLM against `model.generate`, and CE-U against stock, interleaved in one process.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=2 python docs/results/grpo-time/benchmark.py SIZE OUTPUT.json

SIZE is `tiny` (the built-in Llama, 64 completions of 34 tokens) or `small` (a Llama of 10 M parameters, 32 completions
of 128 tokens). The two trainers hold models with equal weights; the four settings take turns of three steps, of which
the first is left out. A step is everything from rollouts to the optimizer; tokens per second are completion tokens over
the time of their generation, with the weight sync in it.
"""

import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

from ceu_rl import CEUGRPOConfig, CEUGRPOTrainer
from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.route import route_descent
from ceu_rl.run.provenance import environment
from ceu_rl.tasks import load_task_dataset

SIZES = {  # fields of the model, tokens per completion, completions per step, turns
    "tiny": ({}, 34, 64, 12),
    "small": ({"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}, 128, 32, 4),
}
STEPS = 3  # per turn


def digits(completions, **kwargs):
    """A reward that a random model earns in part, so that some tokens ascend and some descend."""
    return [sum(character.isdigit() for character in completion[0]["content"]) for completion in completions]


class Clock(TrainerCallback):
    def __init__(self, trainer):
        self.seconds, self.generation, self.tokens, generate = [], 0.0, 0, trainer._generate

        def timed(*args, **kwargs):
            start = time.perf_counter()
            out = generate(*args, **kwargs)
            self.generation += time.perf_counter() - start
            self.tokens += sum(map(len, out[1]))
            return out

        trainer._generate = timed

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        if state.global_step == 1:  # the first step of a turn is left out
            self.generation, self.tokens = 0.0, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def main(size, output):
    overrides, length, completions, turns = SIZES[size]
    tokenizer = build_tokenizer()
    rows = load_task_dataset("builtin:addition", "prompt")["train"]
    folder = tempfile.mkdtemp()
    model = build_model(tokenizer, **overrides)
    model.generation_config.eos_token_id = None  # so that every completion has full length
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainers, forwards = {}, {}
    for engine in ("vllm", "generate"):
        args = CEUGRPOConfig(
            f"{folder}/{engine}", ceu_coef=0.0, use_vllm=engine == "vllm", vllm_mode="colocate",
            vllm_max_model_length=32 + length, per_device_train_batch_size=completions, num_generations=8,
            max_completion_length=length, max_steps=STEPS, learning_rate=1e-5, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            generation_kwargs={"ignore_eos": True} if engine == "vllm" else {"min_new_tokens": length},
        )  # fmt: skip
        trainer = CEUGRPOTrainer(folder, digits, args, train_dataset=rows, processing_class=tokenizer)
        forwards[engine] = {"stock": trainer.model.forward}
        route_descent(trainer.model, coef=0.5)
        forwards[engine]["ceu"] = trainer.model.forward
        trainers[engine] = trainer
    seconds = {(engine, arm): [] for engine in trainers for arm in ("stock", "ceu")}
    rates = {key: [] for key in seconds}
    for turn in range(turns):
        for engine, arm in seconds:
            trainer = trainers[engine]
            trainer.model.forward = forwards[engine][arm]
            clock = Clock(trainer)
            trainer.add_callback(clock)
            trainer.train()
            trainer.remove_callback(clock)
            del trainer._generate
            if turn:  # the first turn warms up
                seconds[engine, arm] += clock.seconds
                rates[engine, arm].append(clock.tokens / clock.generation)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    median = {f"{engine}-{arm}": statistics.median(times) for (engine, arm), times in seconds.items()}
    speed = {f"{engine}-{arm}": statistics.median(found) for (engine, arm), found in rates.items()}
    result = {
        "command": shlex.join(["python", "docs/results/grpo-time/benchmark.py", *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "completions_per_step": completions,
        "tokens_per_completion": length,
        "steps_each": (turns - 1) * (STEPS - 1),
        "seed": 42,
        "median_step_s": {key: round(value, 4) for key, value in median.items()},
        "median_tokens_per_s": {key: round(value) for key, value in speed.items()},
        "step_time_vllm_over_generate": round(median["vllm-ceu"] / median["generate-ceu"], 3),
        "step_time_ceu_over_stock_vllm": round(median["vllm-ceu"] / median["vllm-stock"], 3),
        "step_time_ceu_over_stock_generate": round(median["generate-ceu"] / median["generate-stock"], 3),
        **environment(),
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
