"""The backward rule on a float64 toy with plain logits, and the attachment to TRL's fused head."""

import copy
import inspect
import runpy
import types

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOTrainer, KTOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from ceu_rl.losses import anchored_weight
from ceu_rl.route import DescentRoute, Scored, descent_rule, route_descent

from .trainers import build


class ToyHead(torch.nn.Module):
    """Plain logits as the only parameter, behind the interface of TRL's fused head."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, labels, fused_lm_head=False):
        mask = labels != -100
        log_probs = self.logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return FusedCausalLMOutput(log_probs=log_probs.masked_fill(~mask, 0), label_mask=mask)


def plain_weight(p, coef, scale, max_weight):
    return (1 - coef) + coef / (1 / (scale * p / (1 - p)) + 1 / max_weight)


@pytest.mark.parametrize(
    ("coef", "scale", "max_weight"),
    [(1.0, 1.0, 1.0), (1.0, 1.0, float("inf")), (0.5, 1.0, 1.0), (1.0, 10.0, 2.0), (0.3, 0.1, float("inf"))],
)
def test_the_rule_against_plain_logits_in_float64(coef, scale, max_weight):
    """dL/dz = g w (e_y - p) where g > 0, and g (e_y - p) elsewhere, worked out without autograd."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 6, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (4, 6))
    labels[0, :2] = labels[3] = -100
    g = torch.randn(4, 6, dtype=torch.float64)
    g[1, 1] = 0.0

    toy = ToyHead(logits.clone())
    route = route_descent(toy, descent_rule("ceu", ceu_scale=scale, ceu_max_weight=max_weight), coef)
    outputs = toy(labels, fused_lm_head=True)
    (outputs.log_probs * g).sum().backward()

    p = logits.softmax(-1)
    p_label = p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    weight = plain_weight(p_label, coef, scale, max_weight)
    kept = labels != -100
    factor = torch.where(g > 0, g * weight, g) * kept
    expected = factor.unsqueeze(-1) * (torch.nn.functional.one_hot(labels.clamp(min=0), 9) - p)
    torch.testing.assert_close(toy.logits.grad, expected, rtol=1e-9, atol=1e-12)

    descending = (g > 0) & kept
    metrics = route.pop_metrics()
    assert metrics["ceu/descending_fraction"] == pytest.approx((descending.sum() / kept.sum()).item())
    assert metrics["ceu/weight_mean"] == pytest.approx(weight[descending].mean().item(), rel=1e-5)
    assert route.pop_metrics() == {}


def test_published_form_gives_the_ce_u_gradient():
    """With a = s = 1, M = inf and g = 1 the routed gradient on the logits is p - q, as of the paper's loss."""
    torch.manual_seed(1)
    logits, labels = torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 8, (5,))
    toy = ToyHead(logits.clone())
    route_descent(toy, descent_rule("ceu", ceu_max_weight=float("inf")))
    toy(labels, fused_lm_head=True).log_probs.sum().backward()
    q = logits.scatter(-1, labels.unsqueeze(-1), float("-inf")).softmax(-1)
    torch.testing.assert_close(toy.logits.grad, logits.softmax(-1) - q, rtol=1e-9, atol=1e-12)


RULES = {
    "ceu": lambda p, anchor, kept: p,
    "constant": lambda p, anchor, kept: torch.full_like(p, 0.75),
    "anchored": lambda p, anchor, kept: (p / anchor).clamp(max=1),
    "token_ratio": lambda p, anchor, kept: 2 * p / (p + anchor),
    "sequence_ratio": lambda p, anchor, kept: response_ratio(p, anchor, kept) / (response_ratio(p, anchor, kept) + 1),
    "gate": lambda p, anchor, kept: 1 / (1 + torch.exp(-100 * (low(p, kept) - 0.05))),
    "truncated_sequence_ratio": lambda p, anchor, kept: response_ratio(p, anchor, kept).clamp(max=1),
}
PARAMETERS = {"constant": {"constant_weight": 0.75}}


def response_ratio(p, anchor, kept):
    return (p / anchor).where(kept, 1).prod(dim=1, keepdim=True)


def low(p, kept):
    return torch.stack([row[each].quantile(0.1) for row, each in zip(p, kept, strict=True)])[:, None]


@pytest.mark.parametrize("coef", [1.0, 0.4])
@pytest.mark.parametrize("name", RULES)
def test_each_rule_against_its_formula_in_float64(name, coef):
    torch.manual_seed(2)
    logits, labels = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(0, 5, (3, 7))
    labels[0, :3] = -100
    kept, g = labels != -100, torch.randn(3, 7, dtype=torch.float64)
    p = logits.softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    anchor = p * (2 * torch.randn_like(p)).exp()
    toy = ToyHead(logits.clone())
    route = route_descent(toy, descent_rule(name, **PARAMETERS.get(name, {})), coef)
    with route.collect() as forwards:
        outputs = toy(labels, fused_lm_head=True)
    (scored,) = forwards
    scored.anchor = anchor.log()
    (outputs.log_probs * g).sum().backward()
    factor = torch.where(g > 0, g * (1 - coef + coef * RULES[name](p, anchor, kept)), g) * kept
    expected = factor.unsqueeze(-1) * (torch.nn.functional.one_hot(labels.clamp(min=0), 5) - logits.softmax(-1))
    torch.testing.assert_close(toy.logits.grad, expected, rtol=1e-9, atol=1e-12)
    assert (RULES[name](p, anchor, kept) != 1).any()


def test_anchored_is_the_gradient_of_a_loss_of_at_most_one_nat():
    """d/dz of phi(log p - log p_a) is w (e_y - p), with phi(x) = x above the anchor and e^x - 1 below it."""
    torch.manual_seed(3)
    logits, labels = 3 * torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 6, (50,))
    anchor = torch.randn(50, dtype=torch.float64).abs().neg()
    bounded = logits.clone().requires_grad_()
    x = bounded.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1) - anchor
    phi = torch.where(x < 0, torch.expm1(x), x)
    assert phi.min() > -1 and x.min() < -3
    phi.sum().backward()
    toy = ToyHead(logits.clone())
    with route_descent(toy, descent_rule("anchored")).collect() as forwards:
        log_probs = toy(labels, fused_lm_head=True).log_probs
    forwards[0].anchor = anchor
    log_probs.sum().backward()
    torch.testing.assert_close(toy.logits.grad, bounded.grad, rtol=1e-9, atol=1e-12)


def test_a_function_of_ones_own_may_scale_both_sides():
    def double(log_probs, anchor_log_probs, descending, mask):
        assert anchor_log_probs is None and descending.dtype == mask.dtype == torch.bool
        return torch.where(descending, 0.5, 2.0)

    toy = ToyHead(torch.zeros(1, 3, 4))
    route_descent(toy, double)
    g, labels = torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[0, 1, -100]])
    (toy(labels, fused_lm_head=True).log_probs * g).sum().backward()
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 4)
    expected = torch.tensor([[0.5, -2.0, 0.0]])[..., None] * (one_hot - 0.25)
    torch.testing.assert_close(toy.logits.grad, expected)


def test_where_an_anchor_is_not_known_the_weight_is_one():
    log_probs = torch.tensor([-5.0, -5.0, -1.0, -torch.inf])
    anchor = torch.tensor([torch.nan, -1.0, -2.0, -torch.inf])
    torch.testing.assert_close(anchored_weight(log_probs, anchor), torch.tensor([1.0, 0.0183156, 1.0, 1.0]))
    # An anchor of the last tokens alone belongs to these
    route = DescentRoute(descent_rule("anchored"))
    scored = Scored(torch.tensor([[-3.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.0]]))
    torch.testing.assert_close(route.weigh(scored, torch.ones(1, 2)), torch.tensor([[1.0, 0.1353353]]))


@pytest.mark.parametrize(
    ("name", "parameters", "parts"),
    [
        ("anchord", {}, ["descent_rule", "'anchord'", "anchored"]),
        ("anchored", {"ceu_scale": 2.0}, ["ceu_scale is 2.0", "'anchored'", "'ceu'"]),
        ("ceu", {"tnpo_beta": 1.0}, ["tnpo_beta", "'ceu'", "'token_ratio'"]),
        ("ceu", {"ceu_max_weight": 0}, ["ceu_max_weight is 0", "above 0"]),
        ("ceu", {"ceu_scale": float("nan")}, ["ceu_scale is nan"]),
        ("ceu", {"ceu_scale": 1e40}, ["ceu_scale is 1e+40; use a number above 0 up to"]),
        ("constant", {}, ["constant_weight is missing"]),
        ("constant", {"constant_weight": -0.1}, ["constant_weight is -0.1"]),
        ("sequence_ratio", {"bdpo_lambda": 1.0}, ["bdpo_lambda is 1.0"]),
        ("gate", {"gate_tau": 2}, ["gate_tau is 2"]),
        ("token_ratio", {"tnpo_beta": "1"}, ["tnpo_beta is 1"]),
        ("no_such_module.rule", {}, ["no_such_module"]),
        ("math.tau", {}, ["'math.tau'", "a float"]),
        ("math.sqrt", {"ceu_scale": 1.0}, ["ceu_scale", "math.sqrt"]),
    ],
)
def test_a_rule_that_cannot_be_honoured_is_refused(name, parameters, parts):
    with pytest.raises(ValueError) as caught:
        descent_rule(name, **parameters)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_rule_without_its_anchor_is_refused_at_the_first_backward_pass():
    toy = ToyHead(torch.zeros(1, 2, 4))
    route_descent(toy, descent_rule("anchored"))
    with pytest.raises(ValueError, match="anchor"):
        toy(torch.zeros(1, 2, dtype=torch.long), fused_lm_head=True).log_probs.sum().backward()


@pytest.mark.parametrize(
    ("settings", "lowest", "highest"),
    [
        ({"ceu_max_weight": float("inf")}, 0.49, 0.51),  # every shared token is driven to a coin flip
        ({"ceu_max_weight": 1.0}, 0.9951, 1.0),  # the only balance is p = 1
        ({"coef": 0.0}, 0.9949, 0.9951),  # stock: the two gradients cancel
        # The balance is where w = 1: 1 / odds = 1 - 1/M, so p = 2/3 for M = 2
        ({"ceu_max_weight": 2.0}, 0.656, 0.677),
        # At or above its anchor it is neutral, below it is drawn back
        ({"name": "anchored", "anchor": 0.99}, 0.9949, 0.9951),
        ({"name": "anchored", "anchor": 0.8, "start": 0.4}, 0.75, 0.801),
        ({"name": "token_ratio", "anchor": 0.8, "start": 0.4}, 0.75, 0.801),  # the balance is the anchor itself
        ({"name": "token_ratio", "anchor": 0.5, "start": 0.8}, 0.499, 0.55),
    ],
)
def test_fixed_point_of_a_token_that_both_responses_share(settings, lowest, highest):
    """DPO on two responses of two tokens: the first is shared, the second differs."""
    start, coef, anchor = settings.get("start", 0.995), settings.get("coef", 1.0), settings.get("anchor", 0.5)
    settings = {name: value for name, value in settings.items() if name not in ("start", "coef", "anchor")}
    first = torch.tensor([start, (1 - start) / 2, (1 - start) / 2], dtype=torch.float64).log()
    second = torch.zeros(3, dtype=torch.float64)
    toy = ToyHead(torch.stack([first, second]))
    route = route_descent(toy, descent_rule(**settings), coef)
    chosen, rejected = torch.tensor([0, 1]), torch.tensor([0, 2])
    optimizer = torch.optim.SGD(toy.parameters(), lr=10.0)
    for _ in range(3000):
        with route.collect() as forwards:
            logps = [toy(labels, fused_lm_head=True).log_probs.sum() for labels in (chosen, rejected)]
        for scored in forwards:
            scored.anchor = torch.tensor([anchor, 1 / 3], dtype=torch.float64).log()
        loss = -torch.nn.functional.logsigmoid(0.05 * (logps[0] - logps[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shared = toy.logits[0].softmax(-1)[0].item()
    assert lowest <= shared <= highest


def fused_batch(model, tokenizer):
    ids = tokenizer(["1+2=3", "10+20=30"], padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    return {**ids, "labels": labels, "fused_lm_head": True}


def test_the_forward_is_untouched(tiny_model, tokenizer):
    model = tiny_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batch = fused_batch(model, tokenizer)
    before, logits = model(**batch), model(batch["input_ids"]).logits
    generated = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.forward)
    route = route_descent(model)
    after = model(**batch)
    assert torch.equal(before.log_probs, after.log_probs) and torch.equal(before.entropy, after.entropy)
    assert torch.equal(logits, model(batch["input_ids"]).logits)
    assert torch.equal(generated, model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False))
    assert inspect.signature(model.forward) == signature
    with torch.no_grad():
        assert torch.equal(model(**batch).log_probs, before.log_probs)
    assert route.pop_metrics() == {}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_copy_has_its_own_weights_and_route(tiny_model, tokenizer, kind):
    """In its fused forwards."""

    def make(seed):
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        return get_peft_model(tiny_model(seed), lora) if kind == "lora" else tiny_model(seed)

    model, plain = make(0), make(1)
    add_fused_lm_head(model.get_base_model() if kind == "lora" else model)
    route = route_descent(model, descent_rule("ceu", ceu_scale=2.0), 0.5)
    other = copy.deepcopy(model)
    other.load_state_dict(plain.state_dict())
    batch = fused_batch(model, tokenizer)
    outputs = other(**batch)
    expected = plain(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    expected = expected[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    torch.testing.assert_close(outputs.log_probs, expected, rtol=1e-4, atol=1e-4)
    outputs.log_probs.sum().backward()
    (own,) = [hook for hook in other._forward_hooks.values() if isinstance(hook, DescentRoute)]
    assert own is not route and own.coef == 0.5
    assert own.pop_metrics()["ceu/descending_fraction"] == 1
    assert route.pop_metrics() == {}  # the copy keeps its own record


def test_a_model_has_one_route_and_needs_a_fused_head(tiny_model, tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.forward takes no fused_lm_head"):
        route_descent(model)
    add_fused_lm_head(model)
    first = route_descent(model)
    second = route_descent(model, descent_rule("constant", constant_weight=0.5))
    model(**fused_batch(model, tokenizer)).log_probs.sum().backward()
    assert first.pop_metrics() == {} and second.pop_metrics()["ceu/weight_mean"] == 0.5
    with pytest.raises(ValueError, match="ceu_coef is nan"):
        route_descent(model, coef=float("nan"))


def test_another_trl_version_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"trl is 1\.17\.0.*pip install"):
        runpy.run_module("ceu_rl.route")


def test_it_works_under_another_trl_trainer(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": f"{a}+1=", "completion": f"{a + a % 2}", "label": a % 2 == 1} for a in range(8)]

    def train(**settings):
        given = {"model": tiny_model(1), "ref_model": tiny_model(0), "train_dataset": Dataset.from_list(rows)}
        given |= {"processing_class": tokenizer, "max_steps": 3, "learning_rate": 1e-3}
        trainer = build(KTOTrainer, tmp_path, **given)
        route = route_descent(trainer.model, **settings)
        trainer.train()
        return trainer.model.lm_head.weight, route

    stock, _ = train(coef=0.0)
    bounded, route = train(coef=1.0)
    assert not torch.equal(stock, bounded)
    assert 0 < route.pop_metrics()["ceu/descending_fraction"] < 1


def test_contract_with_trl(tiny_model, tokenizer):
    """The seam of TRL 1.16 that this package stands on; if this fails, TRL moved it: see docs/troubleshooting.md."""
    model = tiny_model()
    add_fused_lm_head(model)
    assert isinstance(model.forward, types.MethodType), "TRL no longer patches model.forward on the instance"
    parameters = inspect.signature(model.forward, follow_wrapped=False).parameters
    assert "fused_lm_head" in parameters, "TRL's fused head is no longer switched on by fused_lm_head=True"
    outputs = model(**fused_batch(model, tokenizer))
    assert outputs.log_probs.requires_grad, "TRL's fused head no longer returns differentiable log_probs"
    assert outputs.label_mask.dtype == torch.bool and outputs.label_mask.shape == outputs.log_probs.shape, (
        "TRL's fused head no longer returns label_mask"
    )
    for method, names in {
        "log": {"logs"},
        "training_step": set(),
        "_compute_loss": {"model", "inputs", "return_outputs"},
        "compute_ref_log_probs": {"model", "inputs"},
        "_precompute_ref_logps": {"dataset", "name", "batch_size"},
        "evaluation_loop": {"dataloader", "description", "metric_key_prefix"},
        "_get_grad_norm": {"model", "grad_norm"},
        "_prepare_dataset": {"dataset", "processing_class", "args", "dataset_name"},
    }.items():
        found = set(inspect.signature(getattr(DPOTrainer, method)).parameters)
        assert names <= found, f"DPOTrainer.{method} no longer takes {names - found}"
