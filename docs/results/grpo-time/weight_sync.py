"""What syncing vLLM's weights every 16 steps saves of a GRPO step, against every step, interleaved in one process.

    VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 python docs/results/grpo-time/weight_sync.py OUTPUT.json

Each turn trains 16 steps, of which the first always syncs; the first turn of each setting is left out. Seconds are
those of the process on its cores, which other processes do not stretch.
"""

import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

from ceu_rl import CEUGRPOConfig, CEUGRPOTrainer
from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.run.provenance import environment, write_json
from ceu_rl.tasks import load_task_dataset

PERIODS = (1, 16)
STEPS = 16
SIZES = {  # fields of the model, tokens per completion, completions per step, turns
    "tiny": ({}, 34, 64, 3),
    "small": ({"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}, 128, 32, 2),
}


def digits(completions, **kwargs):
    """A reward that a random model earns in part, so that some tokens ascend and some descend."""
    return [sum(character.isdigit() for character in completion[0]["content"]) for completion in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def measure(size):
    overrides, length, completions, turns = SIZES[size]
    tokenizer = build_tokenizer()
    rows = load_task_dataset("builtin:addition", "prompt")["train"]
    folder = tempfile.mkdtemp()
    model = build_model(tokenizer, **overrides)
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # every completion has full length
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = CEUGRPOConfig(
        f"{folder}/run", use_vllm=True, vllm_mode="colocate", vllm_max_model_length=32 + length,
        per_device_train_batch_size=completions, num_generations=8, max_completion_length=length, max_steps=STEPS,
        learning_rate=1e-5, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        report_to="none", disable_tqdm=True, generation_kwargs={"ignore_eos": True},
    )  # fmt: skip
    trainer = CEUGRPOTrainer(folder, digits, args, train_dataset=rows, processing_class=tokenizer)
    engine, syncs, sync = trainer.vllm_generation, [], trainer.vllm_generation.sync_weights

    def timed():
        start, before = time.process_time(), engine.engine_step
        sync()
        if engine.engine_step != before:
            syncs.append(time.process_time() - start)

    engine.sync_weights = timed
    seconds = {period: [] for period in PERIODS}
    for turn in range(turns + 1):
        for period in PERIODS:
            engine.period, engine.engine_step = period, None
            clock = Clock()
            trainer.add_callback(clock)
            trainer.train()
            trainer.remove_callback(clock)
            if turn:
                seconds[period].append(statistics.fmean(clock.seconds))
        print(f"{size}: turn {turn + 1} of {turns + 1}", file=sys.stderr)
    trainer.close()
    every, sixteenth = (statistics.median(seconds[period]) for period in PERIODS)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "completions_per_step": completions,
        "tokens_per_completion": length,
        "steps_each": turns * STEPS,
        "sync_s": round(statistics.median(syncs), 4),
        "step_s": {"weight_sync_steps 1": round(every, 4), "weight_sync_steps 16": round(sixteenth, 4)},
        "step_time_16_over_1": round(sixteenth / every, 3),
    }


def main(output):
    sizes = {}
    for size in SIZES:
        sizes[size] = measure(size)
        command = shlex.join(["python", "docs/results/grpo-time/weight_sync.py", *sys.argv[1:]])
        write_json(Path(output), {"command": command, "seed": 42, "sizes": sizes, **environment()})


if __name__ == "__main__":
    main(*sys.argv[1:])
