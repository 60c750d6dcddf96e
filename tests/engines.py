"""Five steps of each trainer with one global batch, on one process or two: what `test_engines.py` launches.

    python -m tests.engines FOLDER ENGINE CASE[@STEP][+STEP] ...

FOLDER/model is the model; FOLDER/ENGINE/CASE gets the weights and `log.json`. `case+3` ends after step 3 with a
checkpoint there; `case@FOLDER` continues from that checkpoint.
"""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, training_args

from ceu_rl import CEUDPOConfig, CEUDPOTrainer, CEUGRPOConfig, CEUGRPOTrainer, UnlearnConfig, UnlearnTrainer
from ceu_rl.run.callbacks import StartModel, TaskScore
from ceu_rl.run.engines import check_engine, engines_on_cpu, save_whole
from ceu_rl.tasks.protocol import Task

from .conftest import user
from .trainers import SETTINGS

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# One epoch: five steps of two micro-batches of four rows, but for the last micro-batch, which has one row
ROWS = 37


def filled(rows):
    """What accelerate makes of an odd last batch on several processes: it takes the first rows again."""
    return Dataset.from_list(rows if PROCESSES > 1 else rows + rows[:3])


def sums(first):
    return [(a, b) for a in range(first, first + 6) for b in range(7)][:ROWS]


def answered(pairs):
    said = [{"role": "assistant", "content": f"{a + b} is{' it' * (b % 3)}"} for a, b in pairs]
    return [{"prompt": user(f"{a}+{b}="), "completion": [each]} for (a, b), each in zip(pairs, said, strict=True)]


def settings(output_dir, **given):
    return {
        **SETTINGS,
        "output_dir": output_dir,
        "max_steps": 5,
        "per_device_train_batch_size": 4 // PROCESSES,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        "use_cpu": os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        **given,
    }


def lora():
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")


def held_out(rows, given):
    return Dataset.from_list(rows[:8]) if "eval_strategy" in given else None


def dpo(model, output_dir, peft_config=None, **given):
    rows = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b}{b}"[: 1 + b % 3]} for a, b in sums(0)]
    args, sets = CEUDPOConfig(**settings(output_dir, **given)), (filled(rows), held_out(rows, given))
    trainer = CEUDPOTrainer(model, None, args, None, *sets, peft_config=peft_config)
    trainer.add_callback(LogsAlone(trainer))
    return trainer


class LogsAlone(TrainerCallback):
    """Logs in the first process alone, as a stock trainer allows."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.trainer.is_world_process_zero():
            due = control.should_log
            self.trainer.log({"alone": state.global_step})
            control.should_log = due  # the other processes log this step too


def dpo_long(model, output_dir, **given):
    """Responses of some eighty tokens, whose log-probabilities sum to some -370 nats."""
    rows = [{"prompt": f"{a}+{b}=", "chosen": f"{a}{b}" * 40, "rejected": f"{b}{a + b}" * 40} for a, b in sums(0)]
    args = CEUDPOConfig(**settings(output_dir, **given))
    return CEUDPOTrainer(model, args=args, train_dataset=filled(rows))


def unlearn(model, output_dir, peft_config=None, **given):
    args = UnlearnConfig(**settings(output_dir, **given))
    # as many rows to retain on one process as on two: their order is drawn from their number
    forget, retain = filled(answered(sums(0))), Dataset.from_list(answered(sums(10)))
    return UnlearnTrainer(model, args, forget, retain, peft_config=peft_config)


def grpo(model, output_dir, peft_config=None, rollout_func=None, **given):
    batch = {"per_device_train_batch_size": 8 // PROCESSES, "num_generations": 4, "shuffle_dataset": False}
    args = CEUGRPOConfig(**settings(output_dir, **{**batch, "max_completion_length": 4, "top_k": 1, **given}))
    rows = [{"prompt": f"{a}+{b}="} for a, b in sums(0)]
    sets = (Dataset.from_list(rows), held_out(rows, given))
    return CEUGRPOTrainer(model, in_turn, args, *sets, peft_config=peft_config, rollout_func=rollout_func)


def grpo_old(*given, **more):
    """Each rollout serves two steps, and each step logs how far the policy has moved from it, as the loss sees that."""
    trainer = grpo(*given, rollout_func=written, num_iterations=2, **more)
    score, compute, found = trainer._get_per_token_logps_and_entropies, trainer._compute_loss, []

    def scored(*args, **kwargs):
        found.append(score(*args, **kwargs))
        return found[-1]

    def computed(model, inputs):
        found.clear()
        loss, mask = compute(model, inputs), inputs["completion_mask"]
        drift = ((found[0][0] - inputs["old_per_token_logps"]).abs() * mask).sum() / mask.sum()
        trainer._metrics["train"]["drift"].append(trainer.accelerator.gather(drift).mean().item())
        return loss

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = scored, computed
    return trainer


def in_turn(completions, **kwargs):
    """A reward for the place in the group: greedy completions are all the same."""
    return [float(place % 4) ** 2 for place in range(len(completions))]


def written(prompts, trainer):
    """Completions that depend on the prompt and the place in its group alone."""
    tokenizer = trainer.processing_class
    texts = [f"{(len(prompt) + 3 * place % 4) % 7}{'1' * (place % 4)}" for place, prompt in enumerate(prompts)]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [tokenizer(text)["input_ids"] for text in texts],
        "logprobs": None,
    }


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}
EVALUATED |= {"per_device_eval_batch_size": 8 // PROCESSES}


def from_start(trainer):
    """Log at each evaluation how far the model is from the one at the start."""
    rows = [{"prompt": [{"role": "user", "content": f"{a}+1="}]} for a in range(4)]
    task = Task("none", rows=lambda *given: rows, score=lambda row, answer: 0.0, max_new_tokens=4)
    trainer.add_callback(TaskScore(trainer, task, rows, StartModel(trainer)))
    return trainer


CASES = {
    "dpo-start": lambda *given, **more: from_start(dpo(*given, **EVALUATED, **more)),
    "dpo-lora-start": lambda *given, **more: from_start(dpo(*given, peft_config=lora(), **EVALUATED, **more)),
    "grpo-start": lambda *given, **more: from_start(grpo(*given, rollout_func=written, **EVALUATED, **more)),
    "dpo-long": dpo_long,
    "grpo-old": grpo_old,
    "dpo": lambda *given, **more: dpo(*given, **more),
    "dpo-lora": lambda *given, **more: dpo(*given, peft_config=lora(), **more),
    "unlearn-ceu": lambda *given, **more: unlearn(*given, **more),
    "unlearn-npo": lambda *given, **more: unlearn(*given, loss_type="npo", **more),
    "unlearn-undial": lambda *given, **more: unlearn(*given, loss_type="undial", retain_loss_type="kl", **more),
    "unlearn-lora": lambda *given, **more: unlearn(*given, peft_config=lora(), **more),
    "unlearn-npo-lora": lambda *given, **more: unlearn(*given, loss_type="npo", peft_config=lora(), **more),
    "grpo": lambda *given, **more: grpo(*given, rollout_func=written, beta=0.1, **more),
    "grpo-generate": lambda *given, **more: grpo(*given, **more),
    "grpo-lora": lambda *given, **more: grpo(*given, rollout_func=written, beta=0.1, peft_config=lora(), **more),
}


def main(folder, engine, *names):
    engines_on_cpu()
    # transformers would refuse bfloat16 on a device that it takes for a GPU, as DeepSpeed on a CPU needs it
    training_args.is_torch_bf16_gpu_available = lambda: True
    for name in names:
        case, _, rest = name.partition("@")
        case, _, last = case.partition("+")
        given = {"save_strategy": "steps", "save_steps": 3, "max_steps": int(last)} if last else {}
        output_dir = Path(folder, engine, name.replace("/", "-"))
        try:
            trainer = CASES[case](f"{folder}/model", str(output_dir), **given)
            check_engine(trainer.accelerator)
            trainer.train(resume_from_checkpoint=f"{folder}/{rest}/checkpoint-3" if rest else None)
            save_whole(trainer.accelerator)
            trainer.save_model()
        except ValueError as error:
            print(f"{engine} {name}: {error}", file=sys.stderr, flush=True)
            continue
        if trainer.is_world_process_zero():
            parameters = trainer.model_wrapped.parameters()
            facts = {
                "processes": trainer.accelerator.num_processes,
                "sharded": any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in parameters),
                "log": trainer.state.log_history,
            }
            (output_dir / "log.json").write_text(json.dumps(facts))
    sys.stdout.flush()
    os._exit(0)  # under load a thread of gloo can abort the interpreter at its exit


if __name__ == "__main__":
    main(*sys.argv[1:])
