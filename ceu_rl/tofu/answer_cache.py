"""The scores and generations of an evaluation that is not over, so that one that was interrupted continues."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.prompts import fingerprint


class AnswerCache:
    """Scores and generations by the key of their answer, in JSON lines behind a first line of settings.

    Args:
        path: The file; None keeps them in memory alone.
        settings: What must be the same for an evaluation to continue.

    Raises:
        ValueError: for a file of an evaluation with other settings.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[str, dict[str, float]] = {}
        self.generations: dict[str, str] = {}
        if path is None:
            return
        # Without its last line, in which the process may have been killed
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        for name, value in json.loads(json.dumps(settings)).items():
            if lines and (found := json.loads(lines[0]).get(name)) != value:
                raise ValueError(
                    f"{path} holds a part of an evaluation with another {name} ({found!r}) than this one ({value!r}); "
                    "choose another folder with --output_dir, or remove it."
                )
        for line in lines[1:]:
            for kind, found in json.loads(line).items():
                getattr(self, kind).update(found)
        path.write_text("\n".join([*(lines or [json.dumps(settings)]), ""]), encoding="utf-8")

    def add(self, kind: str, found: Mapping[str, Any]) -> None:
        """Keep what was found, by its keys; `kind` is scores or generations."""
        getattr(self, kind).update(found)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({kind: found}) + "\n")


def weights_fingerprint(model: Any) -> str:
    """A short hash of a thousand values of each parameter: another checkpoint has another."""
    sums = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // 1000)].to(torch.float64).cpu()
        sums.append([name, list(parameter.shape), some.sum().item(), some.abs().sum().item()])
    return fingerprint(sums)
