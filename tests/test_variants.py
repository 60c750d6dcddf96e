"""The variants of the descent rule in `docs/results`, held against plain float64 references."""

import copy
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from trl import GRPOConfig, GRPOTrainer

from ceu_rl import CEUGRPOConfig

from .reference import assert_gradients_follow, distance, keep_log_probs, routed_gradients

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SCRIPT, DPO_SCRIPT = RESULTS / "grpo" / "variants.py", RESULTS / "dpo-real-model" / "variants.py"
CISPO = {"loss_type": "cispo", "epsilon_high": 5.0}


def load(path):
    spec = importlib.util.spec_from_file_location("variants", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    module = load(SCRIPT)
    # A run of one variant leaves its class, head and trainer in their places
    for owner, name in ((module.ceu_rl.grpo, "CEUGRPOTrainer"), (module.grpo_trainer, "add_fused_lm_head")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return module


def digits(completions, **kwargs):
    return [float(sum(character.isdigit() for character in text)) for text in completions]


def weights_by_hand(variant, coef, p, collisions, drift, advantages, descending, g):
    """Token by token, from the formulas of the script's table."""
    found = torch.ones_like(p)
    for place in descending.nonzero():
        at = tuple(place.tolist())
        r, a = drift[at].exp().item(), advantages[at[0]].item()
        if variant == "anchor":
            found[at] = 1 / (1 + a * a * (1 - r)) if r < 1 else 1.0
        elif variant == "collision":
            found[at] = (1 - coef) + coef / (collisions[at].item() / p[at].item() + 1)
        else:
            found[at] = (1 - coef) + coef * p[at].item()  # with s = M = 1
    if variant == "mass":
        found[descending] /= found[descending].mean()
    if variant == "size":
        norms = g * (1 - p)
        found[descending] *= norms[descending].sum() / (norms * found)[descending].sum()
    return found


@pytest.mark.parametrize(
    ("variant", "coef"), [("anchor", 0.0), ("collision", 1.0), ("collision", 0.5), ("mass", 1.0), ("size", 1.0)]
)
def test_a_variant_weighs_by_its_formula(script, variant, coef, tiny_model, tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)])

    def make(trainer_class, config_class, **settings):
        args = config_class(
            str(tmp_path / trainer_class.__name__),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **CISPO,
            **settings,
        )
        model = tiny_model(1).eval()
        with torch.no_grad():  # a model that is surer than a random one, so that the formulas differ
            model.lm_head.weight *= 30
        return trainer_class(model, digits, args, train_dataset=rows, processing_class=tokenizer)

    stock = make(GRPOTrainer, GRPOConfig)
    script.VariantTrainer.variant = variant
    if variant == "collision":
        script.grpo_trainer.add_fused_lm_head = script.head_with_collisions
    ours = make(script.VariantTrainer, CEUGRPOConfig, ceu_coef=coef)

    batch = stock._prepare_inputs([rows[i // 4] for i in range(8)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        log_probs, _, _ = stock._get_per_token_logps_and_entropies(
            stock.model, ids, mask, batch["completion_ids"].shape[1]
        )
    torch.manual_seed(0)
    drift = 0.8 * torch.randn_like(log_probs)  # ratios on both sides of 1
    batch["old_per_token_logps"] = log_probs - drift
    kept = keep_log_probs(stock)
    stock_loss = stock.compute_loss(stock.model, copy.deepcopy(batch))
    stock_loss.backward()

    plain = copy.deepcopy(stock.model).double()
    del plain.forward
    with torch.no_grad():
        p = plain(input_ids=ids, attention_mask=mask).logits[:, :-1].softmax(-1)
    chosen, collisions = p.gather(-1, ids[:, 1:, None])[..., 0], p.square().sum(-1)
    descending = (kept["log_probs"].grad > 0) & kept["label_mask"]
    assert 0 < descending.sum() < kept["label_mask"].sum()
    before = torch.zeros(len(ids), chosen.shape[1] - drift.shape[1])
    moved = torch.cat([before, drift], 1).double()
    g = kept["log_probs"].grad.double()
    weight = weights_by_hand(variant, coef, chosen, collisions, moved, batch["advantages"], descending, g)
    assert weight[descending].std() > 0.05  # they differ from each other, and so from a change of the rate

    expected, _ = routed_gradients(stock, kept, ids, mask, lambda p: weight)
    our_loss = ours.compute_loss(ours.model, copy.deepcopy(batch))
    our_loss.backward()
    assert torch.equal(our_loss, stock_loss)
    assert_gradients_follow(ours.model, expected)
    lowered = batch["completion_mask"].bool() & (batch["advantages"] < 0)[:, None]
    least = chosen[:, -drift.shape[1] :][lowered].min().item()
    assert ours._metrics["train"]["descending_least"] == [pytest.approx(least, rel=1e-4)]
    assert distance(stock.model, expected) > 0.01


def test_the_anchor_is_that_of_nft(script):
    """With pass rate q and A^2 = q / (1 - q): the gradient of -log((1 - q r) / (1 - q)), by NFT's weight 1 / |A|."""
    q, r = (
        torch.rand(50, dtype=torch.float64, generator=torch.manual_seed(0)) * 0.98 + 0.01,
        torch.linspace(0.01, 1, 50, dtype=torch.float64),
    )
    log_r = r.log().requires_grad_()
    negative = -torch.log((1 - q * log_r.exp()) / (1 - q))
    (gradient,) = torch.autograd.grad(negative.sum(), log_r)
    size = (q / (1 - q)).sqrt()
    torch.testing.assert_close(size * r * script.anchor_weight(r.log(), -size), gradient / size, rtol=1e-9, atol=0)


def test_balanced_gives_ascending_tokens_the_mean_of_the_weight():
    random = torch.Generator().manual_seed(0)
    p = torch.rand(4, 6, dtype=torch.float64, generator=random)
    grad, mask = torch.randn(4, 6, dtype=torch.float64, generator=random), torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    grad = grad * mask
    module = load(DPO_SCRIPT)
    found = module.weigh_both(module.DescentRoute(1.0, 1.0, 1.0), grad, p.log(), mask)
    mean = p[grad > 0].mean()  # with s = M = 1 the weight is p
    torch.testing.assert_close(found, torch.where(grad > 0, grad * p, grad * mean), rtol=1e-6, atol=1e-9)
    rising = -grad.abs()
    assert torch.equal(module.weigh_both(module.DescentRoute(1.0, 1.0, 1.0), rising, p.log(), mask), rising)


@pytest.fixture
def task(tiny_model, tokenizer, tmp_path):
    """A function that writes a recipe of column addition, for a tiny model, into a folder of its own."""
    tiny_model(1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task").mkdir()

    def write(name, **settings):
        recipe = {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset_name": "builtin:addition",
            "output_dir": "unused",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "eval_strategy": "steps",
            **settings,
        }
        (tmp_path / "task" / name).write_text(yaml.safe_dump(recipe))

    return write


@pytest.mark.slow
def test_a_study_of_dpo_trains_each_arm_by_its_rule(task, tmp_path):
    task("ceu.yaml", ceu_coef=1, max_steps=3, learning_rate=1e-2, eval_steps=3)
    arms = ["ceu-1", "balanced", "scale-10"]
    command = [sys.executable, DPO_SCRIPT, f"study:{','.join(arms)}", "task/ceu.yaml", "--seed", "0"]
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    assert "3 done earlier and kept, 0 to do" in result.stdout
    folder = tmp_path / "runs" / "dpo-variants-task"
    results = [json.loads(next((folder / arm).rglob("result.json")).read_text()) for arm in arms]
    assert [found["variant"] for found in results] == ["plain", "balanced", "plain"]
    assert [found["settings"].get("ceu_scale") for found in results] == [None, None, 10]
    assert len({found["metrics"]["eval_loss"] for found in results}) == 3
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == "python docs/results/dpo-real-model/variants.py " + shlex.join(command[2:])


@pytest.mark.slow
def test_a_study_runs_its_arms_and_goes_on(task, tmp_path):
    task(
        "recipe.yaml",
        reward_funcs=["ceu_rl.tasks.addition.accuracy"],
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        eval_steps=2,
        num_generations_eval=1,
    )
    command = [sys.executable, SCRIPT, "study", "anchor", "task/recipe.yaml", "--seed", "0", "--num_iterations", "2"]
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    assert "3 runs in" in result.stdout and "3 done earlier and kept, 0 to do" in result.stdout
    folder = tmp_path / "runs" / "grpo-variants-anchor-task"
    for arm, variant in (("cispo", "plain"), ("anchor", "anchor"), ("stock", "plain")):
        found = json.loads((folder / arm / "num_iterations=2" / "0" / "result.json").read_text())
        assert found["variant"] == variant and found["settings"]["num_iterations"] == 2
        log = [json.loads(line) for line in (folder / arm / "num_iterations=2" / "0" / "metrics.jsonl").open()]
        assert [entry["step"] for entry in log if "eval_pass@16" in entry] == [2]
    report = json.loads((folder / "report.json").read_text())
    assert report["arms"] == ["cispo", "anchor", "stock"]
    assert all("descending_least" in run for run in report["runs"])
    assert report["command"] == "python docs/results/grpo/variants.py " + shlex.join(command[2:])
    command[3] = "anchor:stock,anchor"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 runs in" in result.stdout and "2 done earlier and kept, 0 to do" in result.stdout
    assert json.loads((folder / "report.json").read_text())["arms"] == ["stock", "anchor"]
    command[3] = "anchor:ceu"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode and "the study anchor has no arm 'ceu'; use some of cispo, anchor" in result.stderr


def test_the_least_probability_is_that_of_the_whole_run(script, tmp_path):
    entries = [{"loss": 1.0}, {"descending_least": 0.2}, {"descending_least": 0.01}, {"descending_least": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert script.least(tmp_path / "metrics.jsonl") == 0.01
    assert script.least(tmp_path / "none.jsonl") is None
