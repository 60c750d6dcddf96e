"""One run of a comparison, as it lies in its folder.

What a folder holds may be cut, empty or of another form: a file that cannot be used is named, and takes nothing else
with it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

STATUSES = ("finished", "diverged", "failed", "missing")
RESULT, FAILURE, LOG, TOFU_RESULT = "result.json", "failure.json", "metrics.jsonl", "tofu_eval.json"
RECIPE = "recipe.yaml"  # the settings that a comparison gave to the run

# What is read of an outcome, and of what type it has to be where it is there
NUMBER, NUMBERS = "a number", "numbers by name"
OUTCOME: dict[str, type | str] = {
    "settings": dict,
    "metrics": NUMBERS,
    "eval_tokens": NUMBERS,
    "steps": int,
    "wall_time_s": NUMBER,
    "peak_memory_gib": NUMBER,
    "command": str,
    "date": str,
    "versions": dict,
    "device": str,
    "reason": str,
    "diverged": bool,
    "log_tail": list,
}
READ = {"loss", "grad_norm", "learning_rate", "reward", "train_runtime", "chosen", "rejected"}
READ |= {"model_utility", "forget_quality", "forget_probability"}
LOST = ("eval_loss", "eval_logps/chosen", "eval_logps/rejected", "eval_reward", "eval_kl", "eval_solutions_nll")
WORDS = {dict: "a mapping", int: "a whole number", str: "text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Args:
        arm: The stem of its recipe, such as stock or ceu.
        setting: The overrides of the grid as given, such as `{"learning_rate": "3e-5"}`; empty if there are none.
        seed: Its seed.
        folder: Where it left `metrics.jsonl` and `result.json`, or `failure.json`, and for TOFU `tofu_eval.json`.
    """

    arm: str
    setting: Mapping[str, str]
    seed: int
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        return self._outcome(RESULT)

    @property
    def failure(self) -> dict[str, Any] | None:
        return self._outcome(FAILURE)

    @property
    def tofu(self) -> dict[str, float] | None:
        """The summary of its evaluation on TOFU."""
        return (self._outcome(TOFU_RESULT) or {}).get("summary")

    @property
    def retain(self) -> str | None:
        """The result file of the retain model that it was evaluated against."""
        found = (self._outcome(TOFU_RESULT) or {}).get("retain")
        return found if isinstance(found, str) else None

    @property
    def base_utility(self) -> float | None:
        """The model utility before unlearning, where its evaluation knew it."""
        found = (self._outcome(TOFU_RESULT) or {}).get("base")
        return as_number(found.get("model_utility")) if isinstance(found, dict) else None

    @property
    def unusable(self) -> list[str]:
        """One sentence for each of its outcomes that cannot be used."""
        return [content for content in self._outcomes.values() if isinstance(content, str)]

    @cached_property
    def _outcomes(self) -> dict[str, dict[str, Any] | str | None]:
        found = {name: read_outcome(self.folder / name) for name in (RESULT, FAILURE, TOFU_RESULT)}
        if isinstance(evaluation := found[TOFU_RESULT], dict):
            found[TOFU_RESULT] = {name: evaluation.get(name) for name in ("summary", "retain", "base")}  # without rows
        return found

    def _outcome(self, name: str) -> dict[str, Any] | None:
        content = self._outcomes.get(name)
        return content if isinstance(content, dict) else None

    @property
    def log(self) -> list[dict[str, Any]]:
        """The entries of `metrics.jsonl`; a last line that was cut short by a kill is left out."""
        return self._log[0]

    @property
    def log_problem(self) -> str | None:
        """What of `metrics.jsonl` is left out, and why."""
        return self._log[1]

    @cached_property
    def _log(self) -> tuple[list[dict[str, Any]], str | None]:
        path = self.folder / LOG
        try:
            *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return [], None
        except OSError as error:
            return [], f"{path} cannot be read ({error.strerror})."
        entries, bad = [], []
        for number, line in enumerate(lines, 1):
            entry = _entry(line)
            if isinstance(entry, dict):
                entries.append(entry)
            elif line.strip():
                bad.append((number, entry))
        if isinstance(cut := _entry(last), dict):
            entries.append(cut)
        if not bad:
            return entries, None
        which = f"line {bad[0][0]}" if len(bad) == 1 else f"{len(bad)} lines, the first of them line {bad[0][0]}"
        return entries, f"{path} is read without {which}: {bad[0][1]}."

    @cached_property
    def status(self) -> str:
        """finished, diverged (stopped at a loss or gradient that is not finite), failed, or missing (no outcome)."""
        if self.unusable:
            return "failed"
        if self.failure:  # of the training, or of the evaluation after it
            return "diverged" if self.failure.get("diverged") else "failed"
        if self.result:
            return "failed" if self.result.get("steps") == 0 else "diverged" if self._not_finite else "finished"
        return "finished" if self.tofu else "missing"

    @property
    def _not_finite(self) -> str | None:
        """What of the final evaluation is not finite; the last update, which no later step meets, can do that."""
        metrics = (self.result or {}).get("metrics") or {}
        final = {key: as_number(metrics.get(key)) for key in LOST}
        return next((f"{key} ({value})" for key, value in final.items() if not math.isfinite(value or 0.0)), None)

    @property
    def reason(self) -> str | None:
        """Why there is no result; None if there is."""
        if self.status == "finished":
            return None
        if self.unusable:
            return " ".join(self.unusable)
        if self.failure:
            return str(self.failure.get("reason") or f"exit status {self.failure.get('status')}")
        if self._not_finite:
            return f"Its last evaluation met a non-finite {self._not_finite}."
        if self.result:
            return "It ended after 0 steps, so that nothing was trained."
        steps = [entry["step"] for entry in self.log]
        if steps:
            return f"no result; the log ends at step {max(steps)}"
        return "no result and no log; it has not started, or ended before the first step"

    @cached_property
    def learning_rate(self) -> float | None:
        """Its override, else that of its settings, else its trainer's default; the largest logged if none is known."""
        for given in (self.setting.get("learning_rate"), setting_of(self.settings, "learning_rate")):
            if given is not None:
                return to_float(given)
        if self.settings and (default := _default_rate(self.method)) is not None:
            return default
        return max((value for value in self.values("learning_rate") if math.isfinite(value)), default=None)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The fields of its recipe and what was changed of them; in results of earlier versions that is `overrides`."""
        return (self.result or self.failure or {}).get("settings") or {}

    @property
    def method(self) -> str | None:
        """The command that trained it."""
        words = ((self.result or self.failure or {}).get("command") or "").split()
        return next((word for word in words if word in ("sft", "dpo", "grpo", "unlearn")), None)

    def series(self, key: str) -> list[tuple[int, float]]:
        """What was logged under a key, as (step, value); values need not be finite."""
        return [(entry["step"], value) for entry in self.log if (value := as_number(entry.get(key))) is not None]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key)]


def as_number(value: Any) -> float | None:
    """A number of a JSON file, or None for what is none; one too large for a float is infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def setting_of(settings: Mapping[str, Any], name: str) -> Any:
    """A field of recorded settings; those of earlier versions keep the words of the command line in `overrides`."""
    words, found = settings.get("overrides"), settings.get(name)
    for word, following in _pairs(words if isinstance(words, list) else []):
        option, _, value = word.partition("=")
        if option.replace("-", "_") == f"__{name}":
            found = value or following
    return found


def has_setting(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a field was set, be it to null."""
    return name in settings or setting_of(settings, name) is not None


def _pairs(words: list[Any]) -> Iterator[tuple[str, str | None]]:
    texts = [str(word) for word in words]
    return zip(texts, [*texts[1:], None], strict=False)


def _default_rate(method: str | None) -> float | None:
    if method is None:
        return None
    from ..run.config import classes_of

    return to_float(classes_of(method)[1].__dataclass_fields__["learning_rate"].default)


def to_float(value: Any) -> float | None:
    """A number, also one that is written as text, or None."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _entry(line: str) -> dict[str, Any] | str:
    """An entry of a log, or what is wrong with the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return "it is no JSON"
    if not isinstance(entry, dict):
        return f"it is {_short(entry)}, no entry"
    step = as_number(entry.get("step"))
    if step is None or not abs(step) < 2**53 or step != int(step):
        return f"its step is {_short(entry.get('step'))}"
    wrong = [key for key in entry if _is_read(key) and entry[key] is not None and as_number(entry[key]) is None]
    if wrong:
        return f"its {wrong[0]} is {_short(entry[wrong[0]])}, no number"
    return {**entry, "step": int(step)}


def _is_read(key: str) -> bool:
    return key in READ or key.startswith(("eval_", "ceu/"))


def read_outcome(path: Path) -> dict[str, Any] | str | None:
    """An outcome, None where there is none, or a sentence that says why it cannot be used."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    except (ValueError, RecursionError) as error:
        what = "is empty" if not path.stat().st_size else f"is cut short or no JSON ({error})"
        return f"{path} {what}."
    if not isinstance(found, dict):
        return f"{path} holds {_short(found)}, no mapping."
    wrong = _wrong(found, {"summary": NUMBERS} if path.name == TOFU_RESULT else OUTCOME)
    return f"{path}: {wrong}." if wrong else found


def _wrong(found: Mapping[str, Any], kinds: Mapping[str, type | str]) -> str | None:
    for name, kind in kinds.items():
        value = found.get(name)
        if value is None:
            continue
        if kind == NUMBERS and isinstance(value, dict):
            for key, each in value.items():
                if _is_read(key) and each is not None and as_number(each) is None:
                    return f"{name}.{key} is {_short(each)}, not a number"
        elif not (as_number(value) is not None if kind == NUMBER else isinstance(kind, type) and type(value) is kind):
            return f"{name} is {_short(value)}, not {WORDS[kind] if isinstance(kind, type) else kind}"
    return None


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
