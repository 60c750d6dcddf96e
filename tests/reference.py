"""The backward rule worked out in float64 from plain logits: what the trainers are compared with."""

import copy

import torch


def keep_log_probs(trainer):
    """Return a dict that will hold the `log_probs` with gradient that the trainer's policy last returned."""
    kept = {}
    forward = trainer.model.forward

    def keep(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.log_probs.requires_grad:
            kept.update(log_probs=outputs.log_probs, label_mask=outputs.label_mask)
            outputs.log_probs.retain_grad()
        return outputs

    trainer.model.forward = keep
    return kept


def routed_gradients(trainer, kept, input_ids, attention_mask, weight, temperature=1.0):
    """Gradients of the rule by parameter name, and the number of tokens that descend.

    g is the gradient that the stock loss sends into the log-probabilities; each token gets g * weight(p) where g > 0,
    and g elsewhere. `trainer` is the stock one, after its backward pass.
    """
    plain = copy.deepcopy(trainer.model).double()
    del plain.forward  # the model's own forward, without any fused head
    logits = plain(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1] / temperature
    log_p = logits.log_softmax(-1).gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    g = kept["log_probs"].grad.double() * kept["label_mask"]
    factor = torch.where(g > 0, g * weight(log_p.detach().exp()), g)
    parameters = dict(plain.named_parameters())
    gradients = torch.autograd.grad((factor * log_p).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True)), (g > 0).sum().item()


def assert_gradients_follow(model, expected):
    """Compare the gradients of a float32 model with the reference's."""
    scale = max(value.abs().max() for value in expected.values()).item()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-3, atol=2e-6 * scale)


def distance(model, expected):
    """Largest difference between the gradients of a model and the reference, relative to the largest of these."""
    scale = max(value.abs().max() for value in expected.values())
    differences = [(p.grad.double() - expected[name]).abs().max() for name, p in model.named_parameters()]
    return (max(differences) / scale).item()
