"""What a run shows and records while it trains."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, ProgressCallback, TrainerCallback

from ..tasks import Task, evaluate_accuracy, evaluate_samples
from . import progress


class Progress(ProgressCallback):
    """A progress bar with the last loss and gradient norm; the full log goes to `MetricsFile`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            shown = {key: f"{float(logs[key]):.3g}" for key in ("loss", "grad_norm") if key in logs}
            self.training_bar.set_postfix(shown)


class ProgressLines(TrainerCallback):
    """The same without a terminal: a line for each 5 % with the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = progress.Progress("training", state.max_steps, done=state.global_step)
        self.progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.advance(state.global_step - self.progress.done)


class MetricsFile(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` at once, so that a run that dies keeps its curves."""

    begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run starts from the log of its checkpoint; one that fails before leaves the file as it was
        entries, mode = (state.log_history[-1:], "a") if self.begun else (state.log_history, "w")
        self.begun = True
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with open(Path(args.output_dir, "metrics.jsonl"), mode) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)


class Pace(TrainerCallback):
    """Measures tokens per second of the training steps, rollouts and the optimizer included, evaluations not."""

    def __init__(self) -> None:
        self.seconds = self.timed = 0.0
        self.tokens = self.before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = state.num_input_tokens_seen  # GRPO's count goes on where a checkpoint left it

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "num_tokens" in (logs or {}):
            self.tokens, self.timed = int(logs["num_tokens"]), self.seconds

    def result(self) -> dict[str, float]:
        """`tokens_per_second`, up to the last log; empty for a trainer that counts none."""
        tokens = self.tokens - self.before
        return {"tokens_per_second": round(tokens / self.timed, 1)} if tokens > 0 and self.timed else {}


def log_scores(trainer: Any, scores: Mapping[str, float], metrics: dict[str, float] | None) -> None:
    """Log what a callback scored at an evaluation, and add it to the metrics of that, by which a model may be best."""
    found = {f"eval_{name}": value for name, value in scores.items()}
    trainer.log(found)
    if metrics is not None:
        metrics |= found


class TaskScore(TrainerCallback):
    """Logs greedy and sampled accuracy on a task, and pass@k, at every evaluation.

    With a `reference`, the name of the model at the start and how it is loaded, also divergence from it and entropy of
    the samples.
    """

    def __init__(self, trainer: Any, task: Task, rows: Any, reference: str | None = None, **loaded_as: Any) -> None:
        self.trainer, self.task, self.rows = trainer, task, list(rows)
        self.reference = reference and AutoModelForCausalLM.from_pretrained(reference, **loaded_as).eval()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # Every process generates the same answers: sharded models need all of them to take part
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        given = (model, self.trainer.processing_class, self.task, self.rows)
        reference = self.reference and self.reference.to(model.device)
        with self.trainer.accelerator.autocast():  # the reference in the precision of the model
            scores = {"greedy_accuracy": evaluate_accuracy(*given)}
            scores |= evaluate_samples(*given, seed=args.seed, reference=reference)
        log_scores(self.trainer, scores, metrics)
