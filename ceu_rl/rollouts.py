"""vLLM rollouts for GRPO: a weight sync that works on CPU as well as on GPU.

TRL's colocated vLLM pushes each parameter with `model.load_weights`. On CPU this fails: vLLM repacks the weights for
the CPU kernels when it loads them, and the repacked parameters take no new ones. vLLM's own `reload_weights` undoes
the packing, loads from an iterator, and packs again.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

from .run.checks import RolloutError
from .run.errors import NameCause


class ReloadingVLLMGeneration(VLLMGeneration):
    """TRL's vLLM generation, which on CPU syncs weights through `reload_weights`, and sends a server its own dtype.

    TRL calls `sync_weights` where the step has changed since its last call. With `period` above 1 the weights then stay
    until they are that many steps old. An evaluation always gets the weights of its own step.

    Raises:
        RolloutError: when the engine or its server fails or dies, as on a prompt that fills its context.
    """

    period: int = 1
    clock: Callable[[], int] = staticmethod(lambda: 0)  # the trainer's step
    engine_step: int | None = None  # the step of the weights that the engine has; None before the first sync
    server_dtype: torch.dtype | None = None  # of the server's weights; known where they are sent from

    def sync_weights(self) -> None:
        step = self.clock()
        if self.model.training and self.engine_step is not None and 0 < step - self.engine_step < self.period:
            return
        with _vllm_named("taking the new weights"):
            if self.mode != "colocate" or self.accelerator.device.type != "cpu":
                super().sync_weights()
            else:
                parameters = self._iter_named_params()
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": parameters})
                # With PEFT the adapters are merged while the iterator runs: go to its end, so that they are unmerged
                for _ in parameters:
                    pass
                self.llm.reset_prefix_cache()
        self.engine_step = step

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.mode == "server" and self.server_dtype is None and self.accelerator.is_main_process:
            name = self.vllm_client.get_server_info()["model_config"]["dtype"]  # such as torch.bfloat16
            self.server_dtype = getattr(torch, name.removeprefix("torch."))
        for name, parameter in super()._iter_named_params():
            yield name, parameter if self.server_dtype is None else parameter.to(self.server_dtype)

    def shutdown(self) -> None:
        """End the colocated engine once every process has come here; calling it twice is no error.

        vLLM takes its groups of processes out of torch's, and the default one with them. Where torch's are destroyed
        first, vLLM fails on them at the exit of Python. Every process must call it, and one that has failed waits for
        no other, so that its launcher can end them all.
        """
        if self.mode == "colocate":
            if sys.exc_info()[0] is None:
                self.accelerator.wait_for_everyone()
            self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        with _vllm_named("generating completions"):
            return super().generate(prompts, *args, **kwargs)


def _vllm_named(doing: str) -> NameCause:
    remedy = "what was saved is intact: start again with --resume_from_checkpoint true."
    return NameCause(f"vLLM, while {doing},", remedy, RolloutError)
