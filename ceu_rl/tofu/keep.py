"""The finished parts of an evaluation, so that one that was killed goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.prompts import fingerprint


class Kept:
    """Scores and generations by their key, in JSON lines under a first line that says of which evaluation.

    Args:
        path: The file; None keeps them in memory alone.
        settings: What must be the same for an evaluation to go on.

    Raises:
        ValueError: for a file of an evaluation with other settings.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {"scores": {}, "generations": {}}
        if path is None:
            return
        if path.exists():
            self._read(path, json.loads(json.dumps(settings)))
        else:
            self._write(settings)

    def add(self, kind: str, found: Mapping[str, Any]) -> None:
        """Keep what was found, by its keys; `kind` is scores or generations."""
        self.parts[kind].update(found)
        if self.path is not None:
            self._write({kind: found})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
        first, *rest = whole.split("\n")
        found = json.loads(first) if first else {}
        for name, value in settings.items():
            if first and found.get(name) != value:
                raise ValueError(
                    f"{path} holds a part of an evaluation with another {name} ({found.get(name)!r}) than this one "
                    f"({value!r}); choose another folder with --output_dir, or remove it."
                )
        for line in rest:
            for kind, one in json.loads(line).items():
                self.parts[kind].update(one)
        if cut or not first:  # killed in the middle of a line
            path.write_text(whole + "\n" if first else json.dumps(settings) + "\n", encoding="utf-8")


def weights_fingerprint(model: Any) -> str:
    """A short hash of a thousand values of each parameter: another checkpoint has another."""
    sums = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // 1000)].to(torch.float64).cpu()
        sums.append([name, list(parameter.shape), some.sum().item(), some.abs().sum().item()])
    return fingerprint(sums)
