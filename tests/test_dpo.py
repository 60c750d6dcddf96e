"""CE-U DPO against the imported `trl.DPOTrainer`, and against float64 gradients from plain logits."""

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, KTOConfig
from trl.trainer.dpo_trainer import use_adapter

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.run import checks

from .reference import assert_gradients_follow, distance, keep_log_probs, routed_gradients
from .trainers import assert_close_gradients, build, gradients_of, losses, same, trained

LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
SETTINGS = {
    **{loss: {"loss_type": loss} for loss in LOSS_TYPES},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "beta": {"beta": 0.5},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.fixture
def make_trainer(tiny_model, tokenizer, preferences, tmp_path):
    def make(trainer_class, **given):
        default = {"model": tiny_model(1), "train_dataset": preferences, "processing_class": tokenizer}
        default |= {"max_steps": 10, "learning_rate": 1e-3}
        if not given.get("peft_config"):
            default["ref_model"] = tiny_model(0)
        if trainer_class is CEUDPOTrainer:
            default["descent_rule"] = "ceu"  # the weight that the references are written for
        return build(trainer_class, tmp_path, **{**default, **given})

    return make


def train_three(make, **settings):
    """Stock, ours with `ceu_coef` 0, which trains the same weights, and the rule, which does not."""
    stock = trained(make(DPOTrainer, **settings))
    ours = trained(make(CEUDPOTrainer, ceu_coef=0.0, **settings))
    routed = trained(make(CEUDPOTrainer, **settings))
    assert same(stock, ours) and not same(stock, routed)
    return stock, ours, routed


@pytest.mark.parametrize("name", SETTINGS)
def test_coef_zero_equals_stock_bit_for_bit(make_trainer, name):
    stock = trained(make_trainer(DPOTrainer, **SETTINGS[name]))
    ours = trained(make_trainer(CEUDPOTrainer, ceu_coef=0.0, **SETTINGS[name]))
    assert same(stock, ours) and losses(stock) == losses(ours)


def first_batch(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._prepare_inputs(batch)


@pytest.mark.parametrize(
    ("name", "coefficients", "weight"),
    [
        *[(name, {}, lambda p: p) for name in SETTINGS if name not in ("precomputed", "checkpointing", "bf16")],
        ("sigmoid", {"ceu_max_weight": float("inf")}, lambda p: p / (1 - p)),
        ("sigmoid", {"ceu_coef": 0.5, "ceu_scale": 10.0}, lambda p: 0.5 + 0.5 / ((1 - p) / (10 * p) + 1)),
    ],
)
def test_loss_equals_stock_and_gradient_follows_the_rule(make_trainer, name, coefficients, weight):
    stock = make_trainer(DPOTrainer, **SETTINGS[name])
    ours = make_trainer(CEUDPOTrainer, **SETTINGS[name], **coefficients)
    batch = first_batch(stock)
    kept = keep_log_probs(stock)
    stock_loss = stock.compute_loss(stock.model, batch)
    stock_loss.backward()
    expected, descending = routed_gradients(stock, kept, batch["input_ids"], batch["attention_mask"], weight)
    our_loss = ours.compute_loss(ours.model, batch)
    our_loss.backward()
    assert torch.equal(our_loss, stock_loss)
    assert_gradients_follow(ours.model, expected)
    # The check can fail: the stock gradients are far from the reference wherever a token descends
    assert (descending > 0) == (distance(stock.model, expected) > 0.01)


def reference_probabilities(trainer, batch):
    """p of each label under the reference, in float64 from its plain logits."""
    plain = copy.deepcopy(trainer.ref_model).double()
    del plain.forward
    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.softmax(-1).gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1).detach()


ANCHORS = ("sigmoid", "two losses", "ipo", "forward_kl", "ld_alpha", "wpo", "precomputed", "checkpointing")


@pytest.mark.parametrize("rule", ["anchored", "token_ratio"])
@pytest.mark.parametrize("name", [*ANCHORS, "cut at the start", "cut at the end", "precomputed and cut"])
def test_the_anchor_is_the_references_probability_of_the_same_token(make_trainer, name, rule):
    cut = {"max_length": 8, "truncation_mode": "keep_start" if "start" in name else "keep_end"}
    settings = {**SETTINGS.get(name, {}), **(cut if "cut" in name else {})}
    settings |= {"precompute_ref_log_probs": True} if "precomputed" in name else {}
    stock = make_trainer(DPOTrainer, **{**settings, "precompute_ref_log_probs": False})
    ours = make_trainer(CEUDPOTrainer, descent_rule=rule, **settings)
    batch, ours_batch = first_batch(stock), first_batch(ours)
    kept = keep_log_probs(stock)
    stock_loss = stock.compute_loss(stock.model, batch)
    stock_loss.backward()
    anchor = reference_probabilities(stock, batch)

    def weight(p):
        return (p / anchor).clamp(max=1) if rule == "anchored" else 2 * p / (p + anchor)

    expected, descending = routed_gradients(stock, kept, batch["input_ids"], batch["attention_mask"], weight)
    our_loss = ours.compute_loss(ours.model, ours_batch)
    our_loss.backward()
    assert descending and torch.equal(our_loss, stock_loss)
    assert_gradients_follow(ours.model, expected)
    assert distance(stock.model, expected) > 0.01


def test_at_the_start_an_anchored_step_is_stocks(make_trainer, tiny_model):
    stock = make_trainer(DPOTrainer, model=tiny_model(0), max_steps=1)
    ours = make_trainer(CEUDPOTrainer, model=tiny_model(0), max_steps=1, descent_rule="anchored")
    assert same(trained(stock), trained(ours))


@pytest.mark.parametrize("kind", ["a new adapter", "an adapter of before", "prompt tuning"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_anchor_of_an_adapted_policy_is_the_model_without_it(make_trainer, tiny_model, kind, precompute):
    """Or with the adapter that it began with, which TRL copies: the first step is then stock's again."""
    lora = dataclasses.replace(LORA, init_lora_weights=False)
    given = {"peft_config": copy.deepcopy(PROMPT) if kind == "prompt tuning" else lora}
    if kind == "an adapter of before":
        given = {"model": get_peft_model(tiny_model(0), lora, autocast_adapter_dtype=False), "ref_model": None}
    ours = make_trainer(CEUDPOTrainer, precompute_ref_log_probs=precompute, descent_rule="anchored", **given)
    batch = first_batch(ours)
    ours.compute_loss(ours.model, batch).backward()
    with torch.no_grad(), use_adapter(ours.model, "ref" if kind == "an adapter of before" else None):
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = ours.model(**inputs, labels=labels, fused_lm_head=True).log_probs
    policy = ours.model(**inputs, labels=labels, fused_lm_head=True)
    width = expected.size(1)
    p, mask = policy.log_probs[:, -width:].detach(), policy.label_mask[:, -width:]
    weights = ours.descent_route.pop_metrics()
    half = len(p) // 2  # the rejected responses descend
    expected = (p - expected).clamp(max=0).exp()[half:][mask[half:]]
    assert weights["ceu/weight_mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert (expected.mean() < 0.999) == (kind != "an adapter of before")


def test_an_anchor_adds_no_forward(make_trainer):
    calls = {}
    for rule in ("ceu", "anchored"):
        trainer = make_trainer(CEUDPOTrainer, descent_rule=rule, max_steps=2)
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            model.register_forward_hook(lambda *_, key=(rule, name): calls.update({key: calls.get(key, 0) + 1}))
        trainer.train()
    assert set(calls.values()) == {2} and len(calls) == 4


def test_each_held_out_pair_is_kept(make_trainer, preferences):
    """Also of a last batch that is smaller than the others, with the sums that TRL averages over."""
    held_out = preferences.select(range(11))
    for settings in ({"ceu_coef": 0.0}, {"descent_rule": "anchored"}, {"precompute_ref_log_probs": True}):
        trainer = make_trainer(CEUDPOTrainer, eval_dataset=held_out, per_device_eval_batch_size=4, **settings)
        found = trainer.evaluate()
        rows = trainer.held_out["eval"]
        assert len(rows) == 11
        one = make_trainer(DPOTrainer, eval_dataset=held_out, per_device_eval_batch_size=1)
        expected = one.evaluate()  # its mean over batches is the mean over pairs
        for name in ("chosen", "rejected"):
            mean = sum(row[name] for row in rows) / len(rows)
            assert mean == pytest.approx(expected[f"eval_logps/{name}"], rel=1e-4)
        margins = [row["chosen"] - row["ref_chosen"] - row["rejected"] + row["ref_rejected"] for row in rows]
        assert 0.1 * sum(margins) / 11 == pytest.approx(expected["eval_rewards/margins"], rel=1e-3)
        assert sum(m > 0 for m in margins) / 11 == pytest.approx(expected["eval_rewards/accuracies"])
        assert found["eval_loss"] is not None and all(row["chosen_tokens"] >= 1 for row in rows)


@pytest.mark.parametrize("trainer_class", [DPOTrainer, CEUDPOTrainer])
def test_without_args_it_writes_where_stock_does(trainer_class, tiny_model, preferences, tokenizer, monkeypatch):
    for config_class in (DPOConfig, CEUDPOConfig):  # by default TRL asks for a GPU
        made = functools.partialmethod(config_class.__init__, use_cpu=True, bf16=False)
        monkeypatch.setattr(config_class, "__init__", made)
    model = tiny_model()
    model.config._name_or_path = "someone/small"
    trainer = trainer_class(model, tiny_model(), train_dataset=preferences, processing_class=tokenizer)
    assert trainer.args.output_dir == "small-DPO"


@pytest.mark.parametrize("config_class", [KTOConfig, DPOConfig, dict])
def test_args_of_another_kind_are_refused_by_the_name_of_ours(tiny_model, preferences, tokenizer, config_class):
    args = {} if config_class is dict else config_class("x", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"args is a {config_class.__name__}; give a CEUDPOConfig"):
        CEUDPOTrainer(tiny_model(), args=args, train_dataset=preferences, processing_class=tokenizer)


def test_a_rule_that_cannot_be_honoured_is_refused_by_the_config(tmp_path):
    anchored, constant = {"descent_rule": "anchored", "ceu_scale": 2.0}, {"descent_rule": "constant"}
    for name, settings in {"ceu_scale": anchored, "constant_weight": constant, "ceu_coef": {"ceu_coef": 1.5}}.items():
        with pytest.raises(ValueError, match=f"{name} is"):
            CEUDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_the_model_card_cites_both_papers(make_trainer):
    trainer = make_trainer(CEUDPOTrainer)
    trainer.create_model_card("mine")
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "Cite CE-U DPO as:" in card and "trained with CE-U DPO." in card
    assert "@article{yang2025ceu," in card and "@inproceedings{rafailov2023direct," in card
    assert "a method introduced in" not in card  # neither paper has this trainer


def test_sync_ref_model(make_trainer, tiny_model):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 5}
    for trainer in train_three(make_trainer, **settings):
        assert not torch.equal(tiny_model(0).lm_head.weight, trainer.ref_model.lm_head.weight)


@pytest.mark.parametrize("peft_config", [LORA, PROMPT], ids=["lora", "prompt tuning"])
def test_peft(make_trainer, tiny_model, peft_config):
    def make(trainer_class, **settings):
        return make_trainer(trainer_class, peft_config=copy.deepcopy(peft_config), **settings)

    _, _, routed = train_three(make)
    frozen = {name.replace(".base_layer", ""): p for name, p in routed.model.get_base_model().named_parameters()}
    assert all(torch.equal(value, frozen[name]) for name, value in tiny_model(1).named_parameters())
    assert routed.state.log_history[0]["ceu/descending_fraction"] > 0


def test_mixture_of_experts(make_trainer, mixture):
    def make(trainer_class, **settings):
        return make_trainer(trainer_class, model=mixture(), ref_model=mixture(), **settings)

    stock, _, routed = train_three(make, max_steps=3, router_aux_loss_coef=0.1)
    assert routed.state.log_history[0]["aux_loss"] == stock.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},  # which counts each token once, although its layers run twice
        {"precompute_ref_log_probs": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_the_same_gradients_come_another_way(make_trainer, settings):
    plain, other = make_trainer(CEUDPOTrainer, max_steps=2), make_trainer(CEUDPOTrainer, max_steps=2, **settings)
    assert_close_gradients(gradients_of(plain), gradients_of(other))
    for key in ("ceu/descending_fraction", "ceu/weight_mean"):
        assert other.state.log_history[0][key] == pytest.approx(plain.state.log_history[0][key], rel=1e-4)


def test_fsdp_without_reference_weights_is_refused(make_trainer, monkeypatch):
    """Under `accelerate launch`: test_engines.py."""
    monkeypatch.setattr(checks, "is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading is true"):
        make_trainer(CEUDPOTrainer)


# rows

PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


def test_pairs_whose_answers_are_the_same_are_left_out_and_counted(make_trainer, caplog):
    """Stock learns nothing from them; weighed on one side they would train on the answer."""
    rows = [
        PAIR,
        {**PAIR, "rejected": "3"},
        {**PAIR, "chosen": "5" * 30 + "1", "rejected": "5" * 30 + "2"},  # the same by truncation
        {**PAIR, "prompt": "1" * 40},
        {**PAIR, "chosen": "5" * 30, "rejected": "6"},
    ]
    with caplog.at_level("INFO", "ceu_rl"):
        trainer = make_trainer(CEUDPOTrainer, train_dataset=Dataset.from_list(rows), max_length=20)
    assert [row["chosen"].rstrip("<|eos>") for row in trainer.train_dataset] == ["3", "5" * 30]
    assert "1 of 5 rows dropped: prompt fills max_length (20)" in caplog.text
    assert "3 answers cut at max_length (20); 2 pairs left out" in caplog.text
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    stream = make_trainer(CEUDPOTrainer, train_dataset=streamed, max_length=20)
    assert list(stream.train_dataset) == list(trainer.train_dataset)


def test_stock_keeps_pairs_whose_answers_are_the_same(make_trainer):
    rows = Dataset.from_list([PAIR, {**PAIR, "rejected": "3"}] * 8)
    stock = trained(make_trainer(DPOTrainer, train_dataset=rows, max_steps=3))
    assert same(stock, trained(make_trainer(CEUDPOTrainer, ceu_coef=0.0, train_dataset=rows, max_steps=3)))


def test_a_dataset_of_ties_alone_is_refused(make_trainer):
    with pytest.raises(ValueError, match="The train dataset: the answers are the same in all 2 pairs"):
        make_trainer(CEUDPOTrainer, train_dataset=Dataset.from_list([{**PAIR, "rejected": "3"}] * 2))


def test_an_evaluation_keeps_the_ties_that_training_leaves_out(make_trainer, preferences):
    rows = preferences.select(range(16)).to_list()
    tied = Dataset.from_list([*rows[:8], *({**row, "rejected": row["chosen"]} for row in rows[8:])])
    found = {}
    for trainer_class in (DPOTrainer, CEUDPOTrainer):
        trainer = make_trainer(trainer_class, train_dataset=tied)
        rows = trainer._prepare_dataset(tied, trainer.processing_class, trainer.args, "eval")
        found[trainer_class] = trainer.evaluate(rows)
    assert len(trainer.train_dataset) == 8
    keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    assert [found[CEUDPOTrainer][key] for key in keys] == [found[DPOTrainer][key] for key in keys]


@pytest.mark.parametrize("later", [DPOTrainer, CEUDPOTrainer])
def test_trainers_of_one_model_leave_each_other_alone(make_trainer, tiny_model, later):
    """A later trainer of stock's is stock, and does not see the rule of the first, which still has its own."""
    model, settings = tiny_model(1), {} if later is DPOTrainer else {"descent_rule": "constant", "constant_weight": 0.2}
    first, second = make_trainer(CEUDPOTrainer, model=model), make_trainer(later, model=model, **settings)
    for trainer, alone in ((first, make_trainer(CEUDPOTrainer)), (second, make_trainer(later, **settings))):
        batch = first_batch(alone)
        for each in (trainer, alone):
            each.model.zero_grad()
            each.compute_loss(each.model, batch).backward()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter.grad, alone.model.get_parameter(name).grad)
    first.train()
