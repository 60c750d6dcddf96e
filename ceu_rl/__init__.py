"""CE-U for TRL: a bounded term instead of the gradient ascent of DPO and GRPO (arXiv 2503.01224)."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported lazily: `ceu_rl.losses` needs torch alone, and TRL takes seconds to import
_PUBLIC = {
    "CEUAsyncGRPOConfig": "async_grpo",
    "CEUAsyncGRPOTrainer": "async_grpo",
    "CEUDPOConfig": "dpo",
    "CEUDPOTrainer": "dpo",
    "CEUGRPOConfig": "grpo",
    "CEUGRPOTrainer": "grpo",
    "OfflineGRPOTrainer": "offline_grpo",
    "UnlearnConfig": "unlearn",
    "UnlearnTrainer": "unlearn",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
