"""Other rules for DPO, between what stock learns and what the whole weight keeps: `ceu-rl compare` over them.

    python docs/results/dpo-real-model/variants.py study recipes/dpo/smollm2-chain-sum/ceu-1.yaml --learning_rate 1e-5 \\
        --seed 0 1 [--any_field value ...]

Calling it again goes on. ARM,ARM after `study:` takes these of the arms alone, the first of which is the baseline.

| arm | the weight |
|---|---|
| stock, stock-sft, ceu-0.5, ceu-0.5-sft | as in the recipes of these names |
| ceu-1 | the whole weight, as in the recipe `ceu` |
| scale-10, scale-100 | the whole weight with `ceu_scale` 10 or 100, which is half where p is a tenth or a hundredth |
| balanced | the whole weight, and its mean over the descending tokens of the batch on each ascending one |
"""

import shlex
import sys
from pathlib import Path

import torch

from ceu_rl.losses import descent_weight
from ceu_rl.route import DescentRoute

sys.path.insert(0, str(Path(__file__).parents[1]))
import study

WITH_SFT = {"loss_type": ["sigmoid", "sft"]}
ARMS = {
    "ceu-0.5": ("plain", {"ceu_coef": 0.5}),
    "scale-10": ("plain", {"ceu_coef": 1, "ceu_scale": 10}),
    "scale-100": ("plain", {"ceu_coef": 1, "ceu_scale": 100}),
    "balanced": ("balanced", {"ceu_coef": 1}),
    "ceu-0.5-sft": ("plain", {"ceu_coef": 0.5, **WITH_SFT}),
    "ceu-1": ("plain", {"ceu_coef": 1}),
    "stock-sft": ("plain", {"ceu_coef": 0, **WITH_SFT}),
    "stock": ("plain", {"ceu_coef": 0}),
}
weigh = DescentRoute.weigh


def weigh_both(route, grad, log_probs, label_mask):
    """The weight on descending tokens, its mean over them on the others; the route's record is without the latter."""
    weighed = weigh(route, grad, log_probs, label_mask)
    descending = (grad > 0) & label_mask
    if not descending.any():
        return weighed
    mean = descent_weight(log_probs, *route.coefficients)[descending].mean()
    return torch.where(descending, weighed, weighed * mean.to(weighed.dtype))


def main(what, *words):
    """A study, or one run of it with a variant, as the study calls it."""
    if what in ("plain", "balanced"):
        DescentRoute.weigh = weigh if what == "plain" else weigh_both
        return study.train("dpo", what, words[2:])
    name, _, chosen = what.partition(":")
    chosen = chosen.split(",") if chosen else list(ARMS)
    unknown = [arm for arm in chosen if arm not in ARMS]
    if name != "study" or not words or unknown:
        sys.exit(f"use study RECIPE or study:ARM,ARM RECIPE with some of {', '.join(ARMS)}; this has {what!r}.")
    recipe = Path(words[0])
    command = shlex.join(["python", "docs/results/dpo-real-model/variants.py", what, *words])
    folder = Path("runs", f"dpo-variants-{recipe.resolve().parent.name}")
    arms = {arm: ARMS[arm] for arm in chosen}
    return study.study("dpo", folder, recipe, arms, __file__, command, words[1:])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or [""]))
