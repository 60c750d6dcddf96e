"""The backward rule on a float64 toy with plain logits, and the attachment to TRL's fused head."""

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from ceu_rl.route import route_descent


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
    route = route_descent(toy, coef, scale, max_weight)
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
    assert metrics["ceu/weight_max"] == pytest.approx(weight[descending].max().item(), rel=1e-5)
    assert route.pop_metrics() == {}


def test_published_form_gives_the_ce_u_gradient():
    """With a = s = 1, M = inf and g = 1 the routed gradient on the logits is p - q, that of the paper's loss."""
    torch.manual_seed(1)
    logits, labels = torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 8, (5,))
    toy = ToyHead(logits.clone())
    route_descent(toy, 1.0, 1.0, float("inf"))
    toy(labels, fused_lm_head=True).log_probs.sum().backward()
    q = logits.scatter(-1, labels.unsqueeze(-1), float("-inf")).softmax(-1)
    torch.testing.assert_close(toy.logits.grad, logits.softmax(-1) - q, rtol=1e-9, atol=1e-12)


def test_metrics_add_up_over_backward_passes():
    toy = ToyHead(torch.zeros(1, 2, 4, dtype=torch.float64))
    route = route_descent(toy)
    for g in ([1.0, -1.0], [1.0, 1.0]):
        (toy(torch.zeros(1, 2, dtype=torch.long), fused_lm_head=True).log_probs * torch.tensor([g])).sum().backward()
    metrics = route.pop_metrics()
    assert metrics["ceu/descending_fraction"] == 3 / 4
    assert metrics["ceu/weight_mean"] == metrics["ceu/weight_max"] == pytest.approx(0.25)
    assert metrics["ceu/descending_below_0.01"] == metrics["ceu/descending_above_0.99"] == 0


@pytest.mark.parametrize("settings", [{"coef": 0.0, "observe": True}, {"coef": 0.5}, {}, {"max_weight": float("inf")}])
def test_metrics_tell_rare_and_sure_tokens_apart(settings):
    """Their shares of the gradient are those of its L1 norm on the logits, which are the toy's parameters."""
    p = torch.tensor([0.001, 0.009, 0.02, 0.5, 0.98, 0.995, 0.9999, 0.001], dtype=torch.float64)
    toy = ToyHead(torch.stack([p, 0.7 * (1 - p), 0.3 * (1 - p)], dim=-1).log())
    route = route_descent(toy, **settings)
    g = torch.tensor([1.0, 2, 1, 1, 1, 3, 1, -1])
    (toy(torch.zeros(8, dtype=torch.long), fused_lm_head=True).log_probs * g).sum().backward()
    metrics = route.pop_metrics()
    assert metrics["ceu/descending_below_0.01"] == pytest.approx(2 / 7)
    assert metrics["ceu/descending_above_0.99"] == pytest.approx(2 / 7)
    norms = toy.logits.grad.abs().sum(-1)
    assert norms[:7].sum() < 0.999 * norms.sum()
    for name, group in {"below_0.01": norms[:2], "above_0.99": norms[5:7], "descending": norms[:7]}.items():
        assert metrics[f"ceu/gradient_{name}"] == pytest.approx((group.sum() / norms.sum()).item(), rel=1e-5)


def test_a_route_that_observes_returns_the_gradient_itself():
    torch.manual_seed(0)
    logits, labels, g = 3 * torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6)), torch.randn(4, 6)
    labels[0, :2] = -100
    plain, observed = ToyHead(logits.clone()), ToyHead(logits.clone())
    route = route_descent(observed, coef=0.0, observe=True)
    for toy in (plain, observed):
        (toy(labels, fused_lm_head=True).log_probs * g).sum().backward()
    assert torch.equal(plain.logits.grad, observed.logits.grad)
    assert route.weigh(g, g, labels != -100) is g
    metrics = route.pop_metrics()
    assert metrics["ceu/weight_mean"] == metrics["ceu/weight_max"] == 1
    assert 0 < metrics["ceu/gradient_descending"] < 1


def test_a_batch_without_labels_passes():
    toy = ToyHead(torch.randn(2, 3, 5))
    route = route_descent(toy)
    toy(torch.full((2, 3), -100), fused_lm_head=True).log_probs.sum().backward()
    assert (toy.logits.grad == 0).all()
    assert route.pop_metrics()["ceu/descending_fraction"] == 0


@pytest.mark.parametrize(
    ("settings", "lowest", "highest"),
    [
        ({"max_weight": float("inf")}, 0.49, 0.51),  # every shared token is driven to a coin flip
        ({"max_weight": 1.0}, 0.9951, 1.0),  # the only balance is p = 1
        ({"coef": 0.0}, 0.9949, 0.9951),  # stock: the two gradients cancel
        # The balance is where w = 1: 1 / odds = 1 - 1/M, so p = 2/3 for M = 2
        ({"max_weight": 2.0}, 0.656, 0.677),
    ],
)
def test_fixed_point_of_a_token_that_both_responses_share(settings, lowest, highest):
    """DPO on two responses of two tokens: the first is shared, the second differs."""
    first = torch.tensor([0.995, 0.0025, 0.0025], dtype=torch.float64).log()
    second = torch.zeros(3, dtype=torch.float64)
    toy = ToyHead(torch.stack([first, second]))
    route_descent(toy, **settings)
    chosen, rejected = torch.tensor([0, 1]), torch.tensor([0, 2])
    optimizer = torch.optim.SGD(toy.parameters(), lr=10.0)
    for _ in range(3000):
        logps = [toy(labels, fused_lm_head=True).log_probs.sum() for labels in (chosen, rejected)]
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


def test_coef_zero_attaches_nothing(tiny_model):
    model = tiny_model()
    add_fused_lm_head(model)
    forward = model.forward
    assert route_descent(model, coef=0.0).pop_metrics() == {}
    assert model.forward == forward


def test_a_peft_model_is_routed_at_its_base(tiny_model, tokenizer):
    base = tiny_model()
    add_fused_lm_head(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    route = route_descent(model)
    model(**fused_batch(model, tokenizer)).log_probs.sum().backward()
    assert route.pop_metrics()["ceu/descending_fraction"] == 1


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "moving average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "a copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
    "moved": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize("kind", ["full", "lora", "a second trainer's"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_its_own_weights_head_and_route(tiny_model, tokenizer, how, kind):
    model = tiny_model()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    if kind == "a second trainer's":
        route_descent(model, coef=0.1)
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    elif kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    route = route_descent(model, 0.5, 2.0, 3.0)
    other = COPIES[how](model)
    plain = tiny_model(1)
    plain = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])) if kind == "lora" else plain
    other.load_state_dict(plain.state_dict())

    batch = fused_batch(model, tokenizer)
    logits = plain(batch["input_ids"]).logits
    assert torch.equal(other(batch["input_ids"]).logits, logits)
    assert not torch.equal(model(batch["input_ids"]).logits, logits)
    outputs = other(**batch)
    expected = (plain(batch["input_ids"], batch["attention_mask"]).logits / 0.7).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    expected = expected[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    torch.testing.assert_close(outputs.log_probs, expected, rtol=1e-4, atol=1e-4)
    assert outputs.entropy is not None
    outputs.log_probs.sum().backward()
    base = other.get_base_model() if kind == "lora" else other
    assert base._descent_route.coefficients == (0.5, 2.0, 3.0)
    assert base._descent_route.pop_metrics()["ceu/descending_fraction"] == 1
    assert route.pop_metrics() == {}  # the copy keeps its own record
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"])) if kind == "full" else other
    adapted(**batch).log_probs.sum().backward()
    assert base._descent_route.pop_metrics()["ceu/descending_fraction"] == 1


@pytest.fixture
def bf16_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainers that ran before in this process
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_copy_of_a_model_in_mixed_precision_has_its_own_weights(tiny_model, tokenizer, bf16_accelerator):
    model = tiny_model()
    add_fused_lm_head(model)
    route_descent(model)
    model = bf16_accelerator.prepare_model(model)
    other, batch = copy.deepcopy(model), fused_batch(model, tokenizer)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.load_state_dict(tiny_model(1).state_dict())
        assert not torch.equal(copied(batch["input_ids"]).logits, model(batch["input_ids"]).logits)
        copied(**batch).log_probs.sum().backward()
        assert copied._descent_route.pop_metrics()["ceu/descending_fraction"] == 1
    assert torch.equal(other(batch["input_ids"]).logits, model(batch["input_ids"]).logits)


def test_attaching_twice_or_without_a_fused_head_is_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.forward takes no fused_lm_head"):
        route_descent(model)
    add_fused_lm_head(model)
    route_descent(model)
    with pytest.raises(ValueError, match="has a descent route already"):
        route_descent(model)


def test_another_trl_version_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"trl is 1\.17\.0.*pip install"):
        route_descent(ToyHead(torch.zeros(1, 2)))


def test_it_works_under_another_trl_trainer(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": f"{a}+1=", "completion": f"{a + a % 2}", "label": a % 2 == 1} for a in range(8)]

    def train(**settings):
        args = KTOConfig(
            str(tmp_path / str(settings)),
            max_steps=3,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = KTOTrainer(
            tiny_model(1), tiny_model(0), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
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
    closure = inspect.getclosurevars(model.forward.__func__).nonlocals
    settings = {*inspect.signature(add_fused_lm_head).parameters} - {"model"}
    assert {"original_forward", *settings} <= set(closure), "TRL's fused head no longer keeps what a copy needs"
    assert "fused_lm_head" in parameters, "TRL's fused head is no longer switched on by fused_lm_head=True"
    outputs = model(**fused_batch(model, tokenizer))
    assert outputs.log_probs.requires_grad, "TRL's fused head no longer returns differentiable log_probs"
    assert outputs.label_mask.dtype == torch.bool and outputs.label_mask.shape == outputs.log_probs.shape, (
        "TRL's fused head no longer returns label_mask"
    )
    for method, names in {
        "log": {"logs"},
        "training_step": set(),
        "_get_grad_norm": {"model", "grad_norm"},
        "_prepare_dataset": {"dataset", "processing_class", "args", "dataset_name"},
    }.items():
        found = set(inspect.signature(getattr(DPOTrainer, method)).parameters)
        assert names <= found, f"DPOTrainer.{method} no longer takes {names - found}"
