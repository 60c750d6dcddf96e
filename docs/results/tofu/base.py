"""`ceu-rl sft` with the loss on the logits of the labelled tokens, for the two base models of the TOFU study.

    python docs/results/tofu/base.py --config recipes/tofu/tiny/full.yaml --dataset_name FOLDER

TRL's fused head scores every position, prompt and padding included; here only labelled ones are. The loss is the same
but for rounding; data, order, optimizer and schedule are those of the recipe.
"""

import json
import shlex
import sys
from pathlib import Path

import yaml
from torch.nn import functional as F
from trl import SFTTrainer

from ceu_rl.cli import main


def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    hidden = model.base_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[kept]), labels[kept], reduction="sum") / num_items_in_batch


if __name__ == "__main__":
    SFTTrainer.compute_loss = compute_loss
    status = main(["sft", *sys.argv[1:]])
    if status == 0:
        recipe = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
        path = Path(recipe["output_dir"], "result.json")
        result = json.loads(path.read_text())
        result["command"] = shlex.join(["python", "docs/results/tofu/base.py", *sys.argv[1:]])
        path.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(status)
