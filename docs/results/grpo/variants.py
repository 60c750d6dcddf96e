"""Variants of the descent rule that were tried in GRPO: `ceu-rl grpo` with another weight on each token's gradient.

    python docs/results/grpo-variants/variants.py VARIANT --config recipes/grpo/maze/ceu.yaml [--any_field value ...]

With A the advantage, w the descent weight of the token, and a node all completions of one prompt that share the tokens
up to and including this one (so that their gradients there add up, on-policy, to the node's summed advantage):

| variant | weight on the token's gradient |
|---|---|
| plain | w where the gradient lowers the log-probability, as shipped |
| cancel | w where the gradient lowers it and the node's summed advantage is negative |
| cancel_net | w, for either sign, where the node's summed advantage is negative |
| drift | min(1, w(p) / w(p when sampled)) where the gradient lowers it: 1 on-policy |
| both | w for either sign: with ceu_scale = ceu_max_weight = 1 the advantage reweighting of arXiv 2505.12929 |
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

import ceu_rl.grpo
from ceu_rl import cli
from ceu_rl.losses import descent_weight

VARIANTS = ("plain", "cancel", "cancel_net", "drift", "both")


class Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, descending, either):
        ctx.save_for_backward(descending, either)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, grad):
        descending, either = ctx.saved_tensors
        return grad * torch.where(grad > 0, descending, either), None, None


def summed_advantages(inputs):
    """(B, T): the advantages of the completions that share prompt and tokens up to here, summed."""
    prompts = inputs["prompt_ids"].tolist()
    nodes, keys = defaultdict(float), []
    for prompt, ids, mask, advantage in zip(
        prompts,
        inputs["completion_ids"].tolist(),
        inputs["completion_mask"].tolist(),
        inputs["advantages"].tolist(),
        strict=True,
    ):
        row = [(tuple(prompt), tuple(ids[: place + 1])) for place in range(len(ids))]
        keys.append(row)
        for key, kept in zip(row, mask, strict=True):
            nodes[key] += advantage * kept
    return torch.tensor([[nodes[key] for key in row] for row in keys])


class VariantTrainer(ceu_rl.grpo.CEUGRPOTrainer):
    variant: str

    def attach_route(self, **kwargs):
        super().attach_route(**kwargs)
        if self.variant != "plain":  # the route stays for its record; its weight is 1
            self.coefficients = (self.args.ceu_coef, self.args.ceu_scale, self.args.ceu_max_weight)
            self.descent_route.coefficients = (0.0, 1.0, 1.0)

    def _compute_loss(self, model, inputs):
        self.current = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.current = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = getattr(self, "current", None)
        if self.variant == "plain" or inputs is None or not torch.is_grad_enabled():
            return (log_probs, *rest)
        weight = descent_weight(log_probs, *self.coefficients)
        one = torch.ones_like(weight)
        if self.variant == "both":
            descending = either = weight
        elif self.variant == "drift":
            old = inputs.get("old_per_token_logps", log_probs)
            descending, either = (weight / descent_weight(old, *self.coefficients)).clamp(max=1), one
        else:
            negative = summed_advantages(inputs) < -1e-6
            descending = torch.where(negative, weight, one)
            either = descending if self.variant == "cancel_net" else one
        return (Weigh.apply(log_probs, descending, either), *rest)


if __name__ == "__main__":
    VariantTrainer.variant, *rest = sys.argv[1:]
    if VariantTrainer.variant not in VARIANTS:
        sys.exit(f"unknown variant {VariantTrainer.variant!r}; use one of {', '.join(VARIANTS)}.")
    ceu_rl.grpo.CEUGRPOTrainer = VariantTrainer
    status = cli.main(["grpo", *rest])
    path = Path(rest[rest.index("--output_dir") + 1], "result.json")
    if status == 0:
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "variant": VariantTrainer.variant}, indent=2) + "\n"
        )
    sys.exit(status)
