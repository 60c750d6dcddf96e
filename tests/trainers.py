"""What the tests of trainers share: runs of seconds on a CPU, and what became of their weights."""

import copy
import inspect
import sys

import torch

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
    name = trainer_class.__name__.replace("OfflineGRPO", "CEUGRPO").replace("Trainer", "Config")
    config_class = getattr(sys.modules[trainer_class.__module__], name)
    names = inspect.signature(trainer_class.__init__).parameters
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
