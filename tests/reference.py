"""What losses and trainers are compared with: 60-digit arithmetic, and the rule in float64 on plain logits."""

import copy
import math

import mpmath
import torch

mpmath.mp.dps = 60
OTHERS = [0.3, -1.2, 0.9, -0.4]  # logits of the tokens that are not the label
# Label probabilities 1e-30, 1e-10, 1e-3, 1/2, 1 - 1e-3, 1 - 1e-10, 1 - 1e-26
LOG_ODDS = [math.log(odds) for odds in (1e-30, 1e-10, 1e-3, 1, 1e3, 1e10, 1e26)]


def logits_with(log_odds, dtype):
    """Logits whose label, at index 2, has these log-odds, as exactly as the type allows."""
    normalizer = torch.tensor(OTHERS, dtype=torch.float64).logsumexp(0).item()
    return torch.tensor([*OTHERS[:2], normalizer + log_odds, *OTHERS[2:]], dtype=dtype)


def exact(logits, label, unlearn=True):
    """Value and gradient with 60 digits, from the very numbers in `logits`: -sum q_i log p_i, or -log p_y."""
    e = [mpmath.exp(mpmath.mpf(value)) for value in logits.tolist()]
    p = [value / mpmath.fsum(e) for value in e]
    target = [mpmath.mpf(i == label) for i in range(len(e))]
    if unlearn:
        rest = mpmath.fsum(value for i, value in enumerate(e) if i != label)
        target = [mpmath.mpf(0) if i == label else value / rest for i, value in enumerate(e)]
    value = -mpmath.fsum(t * mpmath.log(p_i) for t, p_i in zip(target, p, strict=True))
    return value, [p_i - t for t, p_i in zip(target, p, strict=True)]


def worst_relative_error(found, truth):
    return max(abs((mpmath.mpf(f) - t) / t) for f, t in zip(found, truth, strict=True))


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
