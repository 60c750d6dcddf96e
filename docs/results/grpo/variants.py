"""Variants of the descent rule that are tried in GRPO: `ceu-rl grpo` with another weight on each token's gradient.

    python docs/results/grpo/variants.py VARIANT --config recipes/grpo/maze/ceu.yaml [--any_field value ...]
    python docs/results/grpo/variants.py study STUDY recipes/grpo/addition/ceu-0.5.yaml --seed 0 1 2 3 4 [--any_field v ...]

The second is `ceu-rl compare` over the arms of a study, each the recipe with other settings; calling it again goes on.
STUDY:ARM,ARM is a study with these of its arms alone, the first of which is the baseline.

With A the advantage, r the importance ratio, p the probability of the token, w its descent weight, and a node all
completions of one prompt that share the tokens up to and including this one (so that their gradients there add up,
on-policy, to the node's summed advantage):

| variant | weight on the token's gradient |
|---|---|
| plain | w where the gradient lowers the log-probability, as shipped |
| cancel | w where the gradient lowers it and the node's summed advantage is negative |
| cancel_net | w, for either sign, where the node's summed advantage is negative |
| drift | min(1, w(p) / w(p when sampled)) where the gradient lowers it: 1 on-policy |
| both | w for either sign: with ceu_scale = ceu_max_weight = 1 the advantage reweighting of arXiv 2505.12929 |
| anchor | 1 / (1 + A^2 (1 - r)) where the gradient lowers it and r < 1: over the abs(A) r of CISPO, NFT (2505.18116) |
| collision | w with p / sum p^2 in the place of the odds, where the gradient lowers it |
| mass | w / mean(w) where the gradient lowers it; the mean is over those tokens of one backward pass |
| size | the same with each token counting by its gradient's norm without w, so that their sum is that of stock |

| study | question |
|---|---|
| anchor | is NFT's anchor better than CISPO, each rollout used 4, 8 and 16 times? |
| on-policy | does CE-U reach the reward of stock at a smaller divergence, with more answers in 16 tries? |
| sequence | a ratio for each sequence, rollouts used 8 times: is the weight of each token of use beside the clip of |
|        | GSPO (2507.18071, `narrow`) and a ratio for each token? |
| stale | weights synced every 4, 16 and 64 steps, the age of rollouts unknown: is CE-U anywhere above positives only? |
| weight | on-policy and on rollouts up to 16 steps old of unknown age: is the collision weight faster than the whole |
|        | weight, is the whole weight at the size of stock's, and is either better than training on positives only? |
"""

import json
import shlex
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head

import ceu_rl.grpo
from ceu_rl.losses import descent_weight
from ceu_rl.route import wrap_forward
from ceu_rl.run import callbacks
from ceu_rl.tasks import evaluate_samples

sys.path.insert(0, str(Path(__file__).parents[1]))
import study

VARIANTS = ("plain", "cancel", "cancel_net", "drift", "both", "anchor", "collision", "mass", "size")
CISPO = {"ceu_coef": 0, "loss_type": "cispo", "epsilon_high": 5.0}
UNKNOWN = {"vllm_importance_sampling_correction": False}
SEQUENCE = {"importance_sampling_level": "sequence"}
SAMPLES = 16  # answers to each question, for pass@16
# Of each study the grid, and the arms: a variant and what differs from the recipe, the baseline first
STUDIES = {
    "anchor": (
        {"num_iterations": ("4", "8", "16")},
        {"cispo": ("plain", CISPO), "anchor": ("anchor", CISPO), "stock": ("plain", {"ceu_coef": 0})},
    ),
    "on-policy": (
        {"learning_rate": ("3e-5", "1e-4", "3e-4", "1e-3")},
        {
            "stock": ("plain", {"ceu_coef": 0}),
            "ceu-0.3": ("plain", {"ceu_coef": 0.3}),
            "ceu-0.5": ("plain", {"ceu_coef": 0.5}),
            "ceu-0.7": ("plain", {"ceu_coef": 0.7}),
        },
    ),
    "sequence": (
        {"num_iterations": ("8",)},
        {
            "stock": ("plain", {"ceu_coef": 0, **SEQUENCE}),
            "ceu-0.5": ("plain", {"ceu_coef": 0.5, **SEQUENCE}),
            "ceu-1": ("plain", {"ceu_coef": 1, **SEQUENCE}),
            "narrow": ("plain", {"ceu_coef": 0, **SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4}),
            "token": ("plain", {"ceu_coef": 0}),
        },
    ),
    "stale": (
        {"weight_sync_steps": ("4", "16", "64")},
        {
            "stock": ("plain", {"ceu_coef": 0, **UNKNOWN}),
            "ceu-0.5": ("plain", {"ceu_coef": 0.5, **UNKNOWN}),
            "ceu-1": ("plain", {"ceu_coef": 1, **UNKNOWN}),
            "drop-descending": ("plain", {"drop_descending": True, **UNKNOWN}),
        },
    ),
    "weight": (
        {"weight_sync_steps": ("1", "16")},
        {
            "stock": ("plain", {"ceu_coef": 0, **UNKNOWN}),
            "ceu-1": ("plain", {"ceu_coef": 1, **UNKNOWN}),
            "collision": ("collision", {"ceu_coef": 1, **UNKNOWN}),
            "mass": ("mass", {"ceu_coef": 1, **UNKNOWN}),
            "size": ("size", {"ceu_coef": 1, **UNKNOWN}),
            "drop-descending": ("plain", {"drop_descending": True, **UNKNOWN}),
        },
    ),
}


def anchor_weight(log_ratio, advantages):
    """1 / (1 + A^2 (1 - r)) for r < 1, else 1, which it is at r = 1."""
    return 1 / (1 + advantages.square() * (-torch.expm1(log_ratio)).clamp(min=0))


def collision_weight(log_probs, log_sum_sq_probs, coef, scale, max_weight):
    """`descent_weight` with x = p / sum p^2 in the place of the odds."""
    return (1 - coef) + coef / ((log_sum_sq_probs - log_probs).exp() / scale + 1 / max_weight)


class Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, descending, either, preserved=None):
        ctx.save_for_backward(log_probs, descending, either)
        ctx.preserved = preserved
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, grad):
        log_probs, descending, either = ctx.saved_tensors
        lowers = grad > 0
        if ctx.preserved and lowers.any():
            each = torch.ones_like(grad) if ctx.preserved == "mass" else grad * -torch.expm1(log_probs)
            whole, weighed = each[lowers].sum(), (each * descending)[lowers].sum()
            descending = descending * whole / weighed.clamp(min=torch.finfo(grad.dtype).tiny)
        return grad * torch.where(lowers, descending, either), None, None, None


def keep_collisions(forward, self, *args, **kwargs):
    outputs = forward(self, *args, **kwargs)
    self.log_sum_sq_probs = getattr(outputs, "log_sum_sq_probs", None)
    return outputs


def head_with_collisions(model, **settings):
    add_fused_lm_head(model, **{**settings, "outputs": ("log_probs", "entropy", "log_sum_sq_probs")})


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
        if self.variant == "collision":
            wrap_forward(self.model, keep_collisions)
        if self.variant != "plain":  # the route stays for its record; its weight is 1
            self.coefficients = (self.args.ceu_coef, self.args.ceu_scale, self.args.ceu_max_weight)
            self.descent_route.coefficients = (0.0, 1.0, 1.0)

    def _compute_loss(self, model, inputs):
        self.current = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.current = None

    def keep_least(self, log_probs, inputs):
        """Log the probability of the least likely token of the completions with a negative advantage."""
        lowered = inputs["completion_mask"].bool() & (inputs["advantages"] < 0).unsqueeze(1)
        if lowered.any():
            self._metrics["train"]["descending_least"].append(log_probs[lowered].min().exp().item())

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = getattr(self, "current", None)
        if inputs is None or not torch.is_grad_enabled():
            return (log_probs, *rest)
        self.keep_least(log_probs.detach(), inputs)
        if self.variant == "plain":
            return (log_probs, *rest)
        weight = descent_weight(log_probs, *self.coefficients)
        one = torch.ones_like(weight)
        either, preserved = one, None
        if self.variant == "both":
            descending = either = weight
        elif self.variant in ("mass", "size"):
            descending, preserved = weight, self.variant
        elif self.variant == "collision":
            collisions = self.model.log_sum_sq_probs.detach()[:, -log_probs.shape[1] :]
            descending = collision_weight(log_probs.detach(), collisions, *self.coefficients)
        elif self.variant == "anchor":
            ratio = log_probs.detach() - inputs.get("old_per_token_logps", log_probs.detach())
            descending = anchor_weight(ratio, inputs["advantages"].unsqueeze(1))
        elif self.variant == "drift":
            old = inputs.get("old_per_token_logps", log_probs)
            descending = (weight / descent_weight(old, *self.coefficients)).clamp(max=1)
        else:
            negative = summed_advantages(inputs) < -1e-6
            descending = torch.where(negative, weight, one)
            either = descending if self.variant == "cancel_net" else one
        return (Weigh.apply(log_probs, descending, either, preserved), *rest)


def more_samples(model, tokenizer, task, rows, **settings):
    return evaluate_samples(model, tokenizer, replace(task, samples=SAMPLES), rows, **settings)


def train(variant, words):
    """One run: `ceu-rl grpo` with the variant, and pass@16 at each evaluation."""
    VariantTrainer.variant = variant
    callbacks.evaluate_samples = more_samples
    ceu_rl.grpo.CEUGRPOTrainer = VariantTrainer
    if variant == "collision":
        grpo_trainer.add_fused_lm_head = head_with_collisions
    return study.train("grpo", variant, words)


def compare_arms(name, recipe, words):
    """`ceu-rl compare` over the arms of a study, whose runs are those of [`train`]."""
    command = shlex.join(["python", "docs/results/grpo/variants.py", "study", name, str(recipe), *words])
    name, _, chosen = name.partition(":")
    grid, arms = STUDIES[name]
    chosen = chosen.split(",") if chosen else list(arms)
    if unknown := [arm for arm in chosen if arm not in arms]:
        sys.exit(f"the study {name} has no arm {unknown[0]!r}; use some of {', '.join(arms)}.")
    values = [word for field, given in grid.items() if f"--{field}" not in words for word in (f"--{field}", *given)]
    folder = Path("runs", f"grpo-variants-{name}-{recipe.resolve().parent.name}")
    arms = {arm: arms[arm] for arm in chosen}
    return study.study("grpo", folder, recipe, arms, __file__, command, [*values, *words], add_least)


def add_least(run):
    arguments = (run["command"] or "").split()  # none where a run was interrupted
    run["descending_least"] = least(Path(arguments[-1], "metrics.jsonl")) if arguments else None


def least(path):
    """The least probability of a token of a completion with a negative advantage, over a run."""
    entries = map(json.loads, path.open()) if path.exists() else ()
    return min((entry["descending_least"] for entry in entries if "descending_least" in entry), default=None)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "study" and rest and rest[0].partition(":")[0] in STUDIES:
        sys.exit(compare_arms(rest[0], Path(rest[1]), rest[2:]))
    if what not in VARIANTS:
        sys.exit(f"unknown variant {what!r}; use one of {', '.join(VARIANTS)}, or study with {' or '.join(STUDIES)}.")
    sys.exit(train(what, rest[2:] if rest[:1] == ["ceu_rl.cli"] else rest))  # the former as a comparison calls it
