"""Engines for several processes: what accelerate was asked for and what it made of it, and FSDP2 and ZeRO on a CPU.

accelerate 1.15 chooses the engine by the device. On a CPU it makes plain data parallelism of FSDP, and of DeepSpeed
processes that each train alone. `engines_on_cpu` changes the answer that it gets when it asks for the device.
"""

import dataclasses
import os
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, str_to_bool

from .errors import note


def engines_on_cpu() -> None:
    """Let accelerate shard on a CPU, by FSDP2 or DeepSpeed as `accelerate launch` asks for them, over gloo.

    Call it before the config is made. It changes nothing in a run of one process, or where there is another device.
    """
    if torch.accelerator.is_available() or "RANK" not in os.environ:
        return
    # Of a device named cpu:0, as accelerate calls it, torch cannot load an optimizer
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if is_asked_for("FSDP"):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        # It takes FSDP up under the name of any device but the CPU
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    elif is_asked_for("DEEPSPEED"):
        prepare = PartialState._prepare_backend

        def prepare_backend(self: PartialState, cpu: bool = False, *args: Any) -> Any:
            return prepare(self, cpu, *args) if cpu else ("gloo", DistributedType.NO)

        PartialState._prepare_backend = prepare_backend


def check_processes(args: Any) -> None:
    """Raise a ValueError for several processes that would each train alone, and for one that sees several GPUs.

    Call it before anything sets an address.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > args.world_size:
        raise ValueError(f"{started} processes were started and each would train alone; on a CPU set use_cpu to true.")
    if args.n_gpu > 1 and "device_map" not in (args.model_init_kwargs or {}):
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process; set CUDA_VISIBLE_DEVICES=0, or start one each: accelerate "
            f"launch --config_file recipes/accelerate/ddp.yaml --num_processes {args.n_gpu} -m ceu_rl.cli ..."
        )


def note_batch(args: Any) -> None:
    """Say how many rows, in GRPO completions, make a step: it grows with the number of processes."""
    rows, processes, parts = args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps
    what = "completions" if hasattr(args, "num_generations") else "rows"
    note(
        f"Each step takes {rows * processes * parts} {what}: {rows} (per_device_train_batch_size) on {processes} "
        f"process{'es' * (processes > 1)}, {parts} times (gradient_accumulation_steps)."
    )


def check_engine(accelerator: Any) -> None:
    """Raise a ValueError for an engine that `accelerate launch` was asked for and that is not used."""
    for name in ("FSDP", "DEEPSPEED"):
        if is_asked_for(name) and accelerator.distributed_type != DistributedType[name]:
            way_out = "set use_cpu to false" if name == "DEEPSPEED" else "call ceu_rl.run.engines.engines_on_cpu first"
            raise ValueError(
                f"accelerate was asked for {name} and uses {accelerator.distributed_type.value}, as it does on a CPU; "
                f"{way_out}, or take recipes/accelerate/ddp_cpu.yaml."
            )


class Float32Outputs:
    """Trainer mixin: FSDP2 in mixed precision returns what the model computed, and sums gradients in float32.

    accelerate rounds what a sharded model returns to bfloat16, where the sum of a response's log-probabilities falls on
    a grid of two nats from -256 nats down. The reference is sharded after this, by the same policy.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)  # type: ignore[attr-defined]
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )


def save_whole(accelerator: Any) -> None:
    """Let what is saved from here on be a whole model, where FSDP saved shards in the checkpoints."""
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


def is_asked_for(engine: str) -> bool:
    """Whether `accelerate launch` was asked for FSDP or DEEPSPEED."""
    return bool(str_to_bool(os.environ.get(f"ACCELERATE_USE_{engine}", "false")))
