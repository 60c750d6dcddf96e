"""CE-U GRPO against the imported `trl.GRPOTrainer`, and against float64 gradients from plain logits."""

import copy
import math
import random
from pathlib import Path

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from trl import GRPOTrainer

from ceu_rl import CEUGRPOConfig, CEUGRPOTrainer
from ceu_rl.rollouts import ReloadingVLLMGeneration, RolloutError

from .reference import assert_gradients_follow, distance, keep_log_probs, routed_gradients
from .stand_in_engine import StandInClient, StandInEngine
from .trainers import GRPO, build, log_prob_gradient, losses, same, save_model, trained, weights

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
SETTINGS = {
    **{loss: {"loss_type": loss} for loss in LOSS_TYPES},
    "sequence ratio": {"importance_sampling_level": "sequence"},
    "KL": {"beta": 0.2},
    "iterations": {"num_iterations": 3},
    "steps per generation": {"steps_per_generation": 2},
    "entropy mask": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "temperature": {"temperature": 0.7},
    "delta": {"delta": 1.5, "num_iterations": 2},
    "no upper bound": {"delta": math.inf, "epsilon_high": math.inf, "max_grad_norm": math.inf, "num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
}


def digits(completions, **kwargs):
    """A reward that differs inside a group from the first step on."""
    return [float(sum(character.isdigit() for character in text)) for text in completions]


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    # A folder: with beta > 0 TRL loads the reference model from where the policy came
    model = save_model(tiny_model(1), tokenizer, tmp_path / "model")
    prompts = datasets.Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])
    default = {**GRPO, "model": model, "reward_funcs": digits, "train_dataset": prompts}

    def make(trainer_class, **given):
        return build(trainer_class, tmp_path, **{**default, **copy.deepcopy(given)})

    return make


@pytest.mark.parametrize(
    "brings", [{"no_repeat_ngram_size": 1}, {"num_beams": 2}, {"suppress_tokens": [11]}, "an end"], ids=str
)
def test_what_a_model_brings_to_its_rollouts_is_named(make_trainer, tiny_model, tokenizer, brings, caplog):
    """Its generation config, which vLLM does not take, or an end that its tokenizer adds to prompts; stock has both."""
    adding = copy.deepcopy(tokenizer)
    if brings == "an end":
        end = ("<|eos|>", tokenizer.eos_token_id)
        adding.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|eos|>", special_tokens=[end])

    def run(trainer_class, **settings):
        model = tiny_model(1)
        if brings != "an end":
            model.generation_config.update(**brings)
        return trained(make_trainer(trainer_class, model=model, processing_class=adding, **settings))

    stock = run(GRPOTrainer)
    with caplog.at_level("INFO", "ceu_rl"):
        assert same(stock, run(CEUGRPOTrainer, ceu_coef=0.0))
    assert ("end token" if brings == "an end" else next(iter(brings))) in caplog.text


def test_what_moves_no_rollout_is_not_named(make_trainer, tiny_model, tokenizer, tmp_path, caplog):
    """A field that transformers does not know, and those that a saved model has."""
    model = tiny_model(1)
    model.generation_config.update(house_style=1, num_beams=1, output_attentions=False, cache_implementation="static")
    model.save_pretrained(tmp_path)
    for given in (model, str(tmp_path)):
        with caplog.at_level("INFO", "ceu_rl"):
            make_trainer(CEUGRPOTrainer, model=given, processing_class=tokenizer)
    assert "generation_config" not in caplog.text


def rollouts(trainer):
    """A batch of the trainer's own, each prompt four times."""
    rows = [trainer.train_dataset[i // 4] for i in range(8 * trainer.args.steps_per_generation)]
    return trainer._prepare_inputs(rows)


def sequences(batch):
    """Token ids and attention mask of prompts and completions together."""
    return (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))


@torch.no_grad()
def log_probs_of(trainer, batch):
    """The policy's log-probabilities of the completions, (B, T)."""
    width = batch["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, *sequences(batch), width)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_coef_zero_equals_stock_bit_for_bit_and_the_default_does_not(make_trainer, name):
    # Constructed one by one: it seeds the rollouts
    stock = trained(make_trainer(GRPOTrainer, **SETTINGS[name]))
    ours = trained(make_trainer(CEUGRPOTrainer, ceu_coef=0.0, **SETTINGS[name]))
    routed = trained(make_trainer(CEUGRPOTrainer, **SETTINGS[name]))
    assert same(stock, ours)
    assert not same(stock, routed)
    # The first rollouts are the same, and so is the first loss
    assert routed.state.log_history[0]["loss"] == stock.state.log_history[0]["loss"]
    log = routed.state.log_history[0]
    assert 0 < log["ceu/descending_fraction"] < 1 and 0 < log["ceu/weight_mean"]


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    "name", [*sorted({*SETTINGS} - {"bf16", "checkpointing", "entropy bonus", "LoRA"}), "tool mask", "vLLM correction"]
)
def test_loss_equals_stock_and_gradient_follows_the_rule(make_trainer, name, off_policy):
    """One batch of the stock trainer, on-policy or with ratios from far below to far above the clipping range."""
    stock, ours = (make_trainer(c, **SETTINGS.get(name, {})) for c in (GRPOTrainer, CEUGRPOTrainer))
    batch = rollouts(stock)
    if off_policy:
        log_probs = log_probs_of(stock, batch)
        torch.manual_seed(0)
        batch["old_per_token_logps"] = log_probs + 0.4 * torch.randn_like(log_probs)
    if name == "tool mask":
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 2:4] = 0
    if name == "vLLM correction":
        batch["importance_sampling_ratio"] = torch.rand(batch["completion_ids"].shape) + 0.5
        stock.use_vllm = ours.use_vllm = True  # the loss alone looks at it from here on
    stock_loss, expected, descending = stock_and_routed(stock, batch, lambda p: 0.5 + 0.5 * p)
    our_loss = ours.compute_loss(ours.model, copy.deepcopy(batch))
    our_loss.backward()
    assert descending > 0
    assert torch.equal(our_loss, stock_loss)
    assert_gradients_follow(ours.model, expected)
    assert distance(stock.model, expected) > 0.01


def stock_and_routed(stock, batch, weight):
    """Stock's loss, the gradients of the rule worked out from its own, and how many tokens descend."""
    kept = keep_log_probs(stock)
    loss = stock.compute_loss(stock.model, copy.deepcopy(batch))
    loss.backward()
    return loss, *routed_gradients(stock, kept, *sequences(batch), weight, stock.temperature)


RATIOS = {
    "anchored": lambda ratio, mask: ratio.clamp(max=1),
    "token_ratio": lambda ratio, mask: 2 * ratio / (1 + ratio),
    "sequence_ratio": lambda ratio, mask: torch.where(mask, ratio, 1).prod(1, keepdim=True).clamp(max=1),
}


@pytest.mark.parametrize("known", ["old", "vLLM", "vLLM uncorrected", "cut distribution"])
@pytest.mark.parametrize("rule", RATIOS)
def test_an_anchored_rule_takes_the_place_of_trls_importance_weight(make_trainer, rule, known):
    """Descending tokens have the rule's weight, ascending ones 1, and what TRL clips has no gradient with either."""
    stock, ours = (
        make_trainer(trainer_class, steps_per_generation=2, **settings)
        for trainer_class, settings in (
            (GRPOTrainer, {}),
            (CEUGRPOTrainer, {"descent_rule": rule, "ceu_coef": 1.0, "top_k": 5 if known == "cut distribution" else 0}),
        )
    )
    batch = rollouts(stock)
    log_probs = log_probs_of(stock, batch)
    torch.manual_seed(0)
    batch["advantages"] = torch.tensor([1.0, -1.0] * (len(batch["advantages"]) // 2))
    batch["old_per_token_logps"] = anchor = log_probs + 0.1 * torch.randn_like(log_probs)
    if known != "old":
        anchor = anchor + 0.5 * torch.randn_like(log_probs)
        batch["sampling_per_token_logps"] = anchor
        batch["importance_sampling_ratio"] = (batch["old_per_token_logps"] - anchor).exp().clamp(max=1.5)
        correction = known != "vLLM uncorrected"
        for trainer in (stock, ours):
            trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, correction
        ours.args.use_vllm, ours.args.vllm_importance_sampling_correction = True, correction
        if known == "cut distribution":
            anchor = batch["old_per_token_logps"]
    g, p = log_prob_gradient(stock, batch)
    weighed, _ = log_prob_gradient(ours, batch)
    mask = batch["completion_mask"].bool()
    trl_weight = (p - batch["old_per_token_logps"]).exp()
    if known in ("vLLM", "cut distribution"):
        trl_weight = trl_weight * batch["importance_sampling_ratio"]
    ratio = (p - anchor).exp()
    expected = g / trl_weight * torch.where(g > 0, RATIOS[rule](ratio, mask), 1.0)
    assert (g > 0).any() and (g < 0).any()
    torch.testing.assert_close(weighed * mask, expected * mask, rtol=1e-4, atol=1e-7)


def test_a_missing_anchor_is_said_once_or_refused(make_trainer, caplog):
    with pytest.raises(ValueError, match=r"descent_rule 'anchored'.*use_vllm"):
        make_trainer(CEUGRPOTrainer, descent_rule="anchored")
    for name, value in (("beta", 0.1), ("loss_type", "cispo"), ("importance_sampling_level", "sequence")):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            make_trainer(CEUGRPOTrainer, descent_rule="anchored", steps_per_generation=2, **{name: value})
    trainer = make_trainer(CEUGRPOTrainer, descent_rule="anchored", steps_per_generation=2)
    batch = rollouts(trainer)
    batch.pop("old_per_token_logps")
    with caplog.at_level("INFO", "ceu_rl"):
        for _ in range(2):
            trainer.compute_loss(trainer.model, copy.deepcopy(batch)).backward()
    assert sum("not known" in record.message for record in caplog.records) <= 1
    assert trainer.descent_route.pop_metrics()["ceu/weight_mean"] == 1
    batch["sampling_per_token_logps"] = torch.zeros(16, 3)
    with pytest.raises(RolloutError, match="shape"):
        trainer.compute_loss(trainer.model, batch)


def test_clipped_tokens_are_not_descended(make_trainer):
    """A negative advantage with a ratio below the clipping range sends no gradient, and is not counted."""
    trainer = make_trainer(CEUGRPOTrainer)
    batch = rollouts(trainer)
    batch["advantages"] = -torch.ones_like(batch["advantages"])
    log_probs = log_probs_of(trainer, batch)
    for shift, fraction in ((0.0, 1.0), (1.0, 0.0)):
        batch["old_per_token_logps"] = log_probs + shift
        trainer.compute_loss(trainer.model, batch).backward()
        assert trainer.descent_route.pop_metrics()["ceu/descending_fraction"] == fraction


@pytest.mark.parametrize("by", ["launcher", "args"])
def test_an_adapter_under_fsdp_is_refused_with_vllm(make_trainer, monkeypatch, by):
    monkeypatch.setattr("ceu_rl.grpo.is_asked_for", lambda engine: by == "launcher" and engine == "FSDP")
    with pytest.raises(ValueError, match="use_vllm with an adapter under FSDP"):
        make_trainer(CEUGRPOTrainer, use_vllm=True, fsdp=by == "args", peft_config=LoraConfig())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "raised TypeError"),
        ([1.0], "raised ValueError: .*returned 1 rewards, but 8"),
        (["high"] * 8, "raised ValueError"),
        ([*[0.0] * 7, 1e300], "returned an infinite number"),  # in float32
    ],
)
def test_a_reward_that_cannot_be_used_is_named(make_trainer, returned, message):
    async def judge(prompts, **kwargs):
        return returned

    trainer = make_trainer(CEUGRPOTrainer, reward_funcs=judge)
    with pytest.raises(RolloutError, match=f"The reward function judge {message}.*; return a finite number"):
        trainer._calculate_rewards([{}] * 8, ["1+2="] * 8, ["3"] * 8, [[3]] * 8)


class Echo:
    """An environment that owns the data and the reward."""

    def reset(self, **kwargs):
        return f"Say {kwargs.get('word', 'yes')}."

    async def get_reward(self):
        return random.Random(id(self)).random()


WORDS = datasets.Dataset.from_list([{"word": word} for word in ("yes", "no", "maybe", "never")])
ASKED = WORDS.map(lambda row: {"prompt": [{"role": "user", "content": "Now: "}]})


@pytest.mark.parametrize("rows", [None, WORDS, ASKED, WORDS.to_iterable_dataset()])
def test_an_environment_may_own_the_prompts(make_trainer, tokenizer, rows):
    able = copy.deepcopy(tokenizer)  # to call tools
    able.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    settings = {"reward_funcs": None, "train_dataset": rows, "environment_factory": Echo, "processing_class": able}
    trainer = make_trainer(CEUGRPOTrainer, **settings, max_steps=2, remove_unused_columns=False)
    trainer.train()
    assert trainer.state.global_step == 2 and "rewards/Echo/mean" in trainer.state.log_history[0]


@pytest.fixture
def engine(monkeypatch, tiny_model):
    """vLLM's place is taken by a copy of the policy that lags behind as an engine does."""
    pytest.importorskip("vllm", reason="vLLM is not installed (make install)")
    from trl.generation import vllm_generation

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for vLLM
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(StandInEngine, "policy", tiny_model(1))
    monkeypatch.setattr(vllm_generation, "LLM", StandInEngine)
    monkeypatch.setattr(vllm_generation, "VLLMClient", StandInClient)


STALE = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 8}


def train_with_lag(make_trainer, trainer_class=CEUGRPOTrainer, checkpoint=None, **settings):
    trainer = make_trainer(trainer_class, **{**STALE, **settings})
    if trainer_class is GRPOTrainer and trainer.vllm_mode == "colocate":  # whose own sync does not work on a CPU
        trainer.vllm_generation.__class__ = ReloadingVLLMGeneration
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, losses(trainer)


def is_stale(log):
    """Of each step whether what generated its rollouts differs from what learns from them."""
    return [entry["sampling/sampling_logp_difference/mean"] > 1e-4 for entry in log]


def engine_of(trainer):
    return trainer.vllm_generation.llm if trainer.vllm_mode == "colocate" else trainer.vllm_generation.vllm_client


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_sync_at_every_step_is_stock_bit_for_bit(make_trainer, engine, mode):
    stock, _ = train_with_lag(make_trainer, GRPOTrainer, vllm_mode=mode)
    ours, log = train_with_lag(make_trainer, ceu_coef=0.0, vllm_mode=mode)
    assert same(stock, ours)
    assert len(engine_of(ours).syncs) == len(engine_of(stock).syncs) == 8
    assert is_stale(log) == [False] * 8
    ours.close()
    assert engine_of(ours).is_shut == (mode == "colocate")  # a server is not ours to end


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_weights_stay_for_as_many_steps_as_set(make_trainer, engine, mode):
    trainer, log = train_with_lag(make_trainer, weight_sync_steps=3, vllm_mode=mode)
    assert is_stale(log) == [False, True, True, False, True, True, False, True]
    assert len(engine_of(trainer).syncs) == 3
    ratios = [entry["sampling/importance_sampling_ratio/mean"] for entry in log]  # which TRL corrects by
    assert [abs(ratio - 1) > 1e-4 for ratio in ratios] == is_stale(log)


def test_an_evaluation_scores_the_weights_of_its_own_step(make_trainer, engine):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "max_steps": 4}
    rows = datasets.Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}])
    trainer = make_trainer(CEUGRPOTrainer, eval_dataset=rows, weight_sync_steps=3, **{**STALE, **settings})
    trainer.train()
    assert is_stale(losses(trainer)) == [False, True, False, True]
    last = trainer.vllm_generation.llm.syncs[-1]
    assert all(torch.equal(value, last[name]) for name, value in weights(trainer).items())


def test_a_resumed_run_syncs_at_its_own_steps(make_trainer, engine):
    first, _ = train_with_lag(make_trainer, weight_sync_steps=4, save_strategy="steps", save_steps=3)
    resumed, log = train_with_lag(make_trainer, checkpoint=f"{first.args.output_dir}/checkpoint-3", weight_sync_steps=4)
    # The engine starts with the weights of the checkpoint: step 3
    assert is_stale(log)[-5:] == [False, True, True, True, False]
    assert len(resumed.vllm_generation.llm.syncs) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_sync_steps": 0, "use_vllm": True}, "weight_sync_steps is 0; use a whole number from 1"),
        ({"weight_sync_steps": -3}, "weight_sync_steps is -3; use"),
        ({"weight_sync_steps": 2.5, "use_vllm": True}, r"weight_sync_steps is 2\.5; use"),
        ({"weight_sync_steps": True}, "weight_sync_steps is True; use"),
        ({"weight_sync_steps": 16}, "weight_sync_steps is 16 with use_vllm False"),
        ({"weight_sync_steps": 2, "use_vllm": True, "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode True"),
    ],
)
def test_a_lag_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CEUGRPOConfig("out", use_cpu=True, bf16=False, **settings)


def test_the_old_name_of_positives_only_warns():
    with pytest.warns(FutureWarning, match="drop_descending is deprecated"):
        config = CEUGRPOConfig("out", use_cpu=True, bf16=False, drop_descending=True)
    assert (config.descent_rule, config.constant_weight, config.ceu_coef) == ("constant", 0.0, 1.0)
