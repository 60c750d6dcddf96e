"""What the tests of trainers share: runs of seconds on a CPU, and what became of their weights."""

import copy
import inspect
import sys

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

SETTINGS = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
}
GRPO = {"max_steps": 5, "num_generations": 4, "max_completion_length": 8, "learning_rate": 1e-2}


def build(trainer_class, folder, **given):
    """A trainer that writes into a new folder: `given` are arguments of its constructor and fields of its config."""
    config_class = getattr(trainer_class, "config_class", None)
    if config_class is None:  # TRL's own
        name = trainer_class.__name__.replace("Trainer", "Config")
        config_class = getattr(sys.modules[trainer_class.__module__], name)
    names = {*inspect.signature(trainer_class).parameters, *inspect.signature(SFTTrainer).parameters}
    arguments = {key: given.pop(key) for key in list(given) if key in names}
    output_dir = folder / f"run{len(list(folder.iterdir()))}"
    output_dir.mkdir()
    return trainer_class(args=config_class(str(output_dir), **{**SETTINGS, **given}), **arguments)


def save_model(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same(first, second):
    """Whether two trainers have the same weights, bit for bit."""
    other = weights(second)
    return all(torch.equal(value, other[name]) for name, value in weights(first).items())


def trained(trainer):
    """The trainer after training, which has moved its weights."""
    start = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items())
    return trainer


class KeepGradients(TrainerCallback):
    """Keeps the gradient of every parameter that reaches the optimizer, step by step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = ((name.removeprefix("_orig_mod."), p.grad) for name, p in model.named_parameters())
        self.steps.append({name: grad.clone() for name, grad in named if grad is not None})


def gradients_of(trainer):
    """Of each parameter at each step of a training run."""
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.steps


def assert_close_gradients(first, second, rtol=1e-4):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        scale = max(value.abs().max().item() for value in one.values())
        assert scale > 0
        for name, value in one.items():
            torch.testing.assert_close(value.double(), other[name].double(), rtol=rtol, atol=1e-5 * scale)


def losses(trainer):
    """The log entries of its steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def log_prob_gradient(trainer, batch):
    """What one loss sends into the policy's log-probabilities of the completions, of shape (B, T), and these."""
    seen = {}

    def see(module, args, outputs):
        seen["log_probs"] = outputs.log_probs.detach()
        outputs.log_probs.register_hook(lambda grad: seen.update(grad=grad))

    handle = trainer.model.register_forward_hook(see)
    trainer.compute_loss(trainer.model, copy.deepcopy(batch)).backward()
    handle.remove()
    width = batch["completion_ids"].size(1)
    return seen["grad"][:, -width:], seen["log_probs"][:, -width:]
