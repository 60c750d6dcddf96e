"""What a run shows and records while it trains."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from ..tasks import Task, evaluate_task
from ..tasks.generate import recorded_decoding
from .checks import check_reference_is_loaded
from .progress import progress


class ProgressBar(ProgressCallback):
    """The progress of the training steps, with the last loss and gradient norm; the full log goes to `MetricsFile`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar: Any = progress("training", state.max_steps, state.global_step)
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            shown = {key: f"{float(logs[key]):.3g}" for key in ("loss", "grad_norm") if key in logs}
            self.training_bar.set_postfix(shown, refresh=False)


class MetricsFile(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` at once, so that a run that dies keeps its curves."""

    mode = "w"

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run starts from the log of its checkpoint; one that fails before leaves the file as it was
        entries = state.log_history[-1:] if self.mode == "a" else state.log_history
        if state.is_world_process_zero:
            with open(Path(args.output_dir, "metrics.jsonl"), self.mode) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.mode = "a"


class HeldOutFile(TrainerCallback):
    """Appends the rows of each evaluation to `held_out.jsonl`, so that runs are compared row by row.

    They are pairs (sums of log-probabilities in nats, see `dpo.PAIR`) and questions of a task (shares, 0 to 1).
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, trainer.held_out = trainer, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir, "held_out.jsonl")
        if state.is_world_process_zero and path.is_file():  # a resumed run evaluates again what came after its step
            rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in rows if json.loads(line)["step"] <= state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held_out, self.trainer.held_out = self.trainer.held_out, {}
        if state.is_world_process_zero and held_out:
            with open(Path(args.output_dir, "held_out.jsonl"), "a") as file:
                for name, rows in held_out.items():
                    for number, row in enumerate(rows):
                        entry = {"step": state.global_step, "dataset": name, "row": number, **row}
                        file.write(json.dumps(entry) + "\n")


class Pace(TrainerCallback):
    """Measures tokens per second of the training steps, rollouts and the optimizer included, evaluations not."""

    def __init__(self, processes: int = 1) -> None:
        self.processes, self.seconds, self.timed = processes, 0.0, 0.0
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
        """Tokens per second of all processes and of one, up to the last log; empty for a trainer that counts none."""
        tokens = self.tokens - self.before
        if tokens <= 0 or not self.timed:
            return {}
        pace = tokens / self.timed
        return {"tokens_per_second": round(pace, 1), "tokens_per_second_per_process": round(pace / self.processes, 1)}


def log_scores(trainer: Any, scores: Mapping[str, float], metrics: dict[str, float] | None) -> None:
    """Log what a callback scored at an evaluation, and add it to the metrics of that, by which a model may be best."""
    found = {f"eval_{name}": value for name, value in scores.items()}
    trainer.log(found)
    if metrics is not None:
        metrics |= found


class StartModel:
    """The model before training, which evaluations compare the policy with.

    Where the trainer keeps it as its reference, or the policy is it without the adapter, nothing is loaded. Else it is
    loaded as TRL loads a reference; between evaluations it is sharded (FSDP, ZeRO-3) or lies in the host's memory.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.model, self.moves = trainer, trainer.ref_model, False
        policy, args = trainer.model, trainer.args
        if isinstance(policy, PeftModel) or (self.model is not None and not args.sync_ref_model):
            return
        check_reference_is_loaded(needs_reference=True)
        given = {
            "dtype": policy.dtype,
            "attn_implementation": policy.config._attn_implementation,
            "trust_remote_code": args.trust_remote_code,
            **(args.model_init_kwargs or {}),
            "device_map": None,
        }
        self.model = create_model_from_path(get_config_model_id(policy.config), **given).eval()
        if trainer.is_fsdp_enabled:
            self.model = prepare_fsdp(self.model, trainer.accelerator)
        elif trainer.is_deepspeed_enabled:  # which casts it as it casts the policy
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        self.moves = not trainer.is_fsdp_enabled and not is_deepspeed_zero3_enabled()
        if self.moves:
            self.model.to("cpu")

    @contextmanager
    def __call__(self) -> Iterator[Callable[..., Any]]:
        """The forward pass of the model, on the device of the policy."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)

        def without_adapter(**inputs: Any) -> Any:
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):  # as TRL's reference does
                return policy(**inputs)

        if isinstance(policy, PeftModel):
            yield without_adapter
        elif self.moves:
            try:
                yield self.model.to(policy.device)
            finally:
                self.model.to("cpu")
        else:
            yield self.model


class TaskScore(TrainerCallback):
    """Logs greedy and sampled accuracy on a task, and pass@k, at every evaluation; `held_out` gets each question.

    With the model at the `start` also divergence from it and entropy of the samples.
    """

    def __init__(self, trainer: Any, task: Task, rows: Any, start: StartModel | None = None) -> None:
        self.trainer, self.task, self.rows, self.start = trainer, task, list(rows), start or nullcontext

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # Every process takes part, and gets the scores of all
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        given = (model, self.trainer.processing_class, self.task, self.rows)
        with self.trainer.accelerator.autocast(), self.start() as reference:  # both in the same precision
            scores, questions = evaluate_task(*given, seed=args.seed, reference=reference)
        self.trainer.held_out = {**getattr(self.trainer, "held_out", {}), "questions": questions}
        log_scores(self.trainer, scores, metrics)

    def result(self) -> dict[str, Any]:
        """`decoding`, how the greedy and the sampled answers were generated."""
        given = (self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class)
        kinds = {"greedy": False, "sampled": True}
        return {"decoding": {kind: recorded_decoding(*given, sample=sample) for kind, sample in kinds.items()}}
