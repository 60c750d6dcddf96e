"""Rules that the study tries beside those of the package: functions for `descent_rule`, on its one seam.

    PYTHONPATH=docs/results/dpo-anchor ceu-rl dpo --config recipes/dpo/smollm2-hh/anchored.yaml \\
        --descent_rule rules.balanced

Each takes (log_probs, anchor_log_probs, descending, mask), of shape (B, T), the chosen responses in the first half of
the batch and the rejected ones in the second, and gives the weights of the tokens.
"""

import torch

from ceu_rl.losses import anchor_log_ratio, anchored_weight

BETA = 0.1  # of DPO


def wider(nats, log_probs, anchor, descending, mask):
    """min(1, e^d p / p_a): the push fades d nats below the anchor."""
    weights = (anchor_log_ratio(log_probs, anchor) + nats).clamp(max=0).exp()
    return torch.where(descending, weights, 1.0)


def wider_1(*given):
    return wider(1.0, *given)


def wider_2(*given):
    return wider(2.0, *given)


def mean_of_falling(weights, descending):
    """The mean weight (B / 2, 1) of the falling tokens of each pair's rejected response, 1 without any."""
    falls = descending.chunk(2)[1]
    total = (weights.chunk(2)[1] * falls).sum(dim=1, keepdim=True)
    return torch.where(falls.any(dim=1, keepdim=True), total / falls.sum(dim=1, keepdim=True).clamp(min=1), 1.0)


def balanced(log_probs, anchor, descending, mask):
    """Anchored, and the chosen response by the mean weight of its pair's rejected one: both sides as in stock."""
    weights = anchored_weight(log_probs, anchor)
    mean = mean_of_falling(weights, descending)
    return torch.where(descending, weights, torch.cat([mean, torch.ones_like(mean)]))


def pair(log_probs, anchor, descending, mask):
    """One weight for a rejected response: the mean of its tokens' anchored weights."""
    mean = mean_of_falling(anchored_weight(log_probs, anchor), descending)
    return torch.where(descending, torch.cat([torch.ones_like(mean), mean]), 1.0)


def rare(log_probs, anchor, descending, mask):
    """Anchored at tokens whose anchor is below 0.1; the others are stock's."""
    weights = torch.where(anchor < torch.tensor(0.1).log(), anchored_weight(log_probs, anchor), 1.0)
    return torch.where(descending, weights, 1.0)


def bounded(log_probs, anchor, descending, mask):
    """Anchored, with the bounded loss in the margin too: sigmoid(-b m_phi) / sigmoid(-b m) on both sides."""
    x = anchor_log_ratio(log_probs, anchor) * mask
    phi = torch.where(x < 0, torch.expm1(x), x)
    (chosen, rejected), (_, bound) = x.sum(dim=1).chunk(2), phi.sum(dim=1).chunk(2)
    scale = torch.sigmoid(-BETA * (chosen - bound)) / torch.sigmoid(-BETA * (chosen - rejected))
    weights = torch.where(descending, anchored_weight(log_probs, anchor), 1.0)
    return weights * torch.cat([scale, scale])[:, None]
