"""What a model keeps: TOFU's facts and solutions, against one answer at a time."""

import itertools
import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig
from scipy.special import softmax

from ceu_rl import CEUDPOTrainer, CEUGRPOTrainer
from ceu_rl.cli import main
from ceu_rl.data.prompts import PromptFormat
from ceu_rl.run import callbacks
from ceu_rl.run import retention as keeps
from ceu_rl.run.callbacks import StartModel, TaskScore
from ceu_rl.run.retention import KeptArguments, KeptScore, load_kept
from ceu_rl.tasks.protocol import Task
from ceu_rl.tasks.score import evaluate_divergence
from ceu_rl.tofu.data import REAL_AUTHORS, WORLD_FACTS, load_tofu

from .trainers import build


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "solutions.jsonl"
    rows = [{"question": f"What is {a}+{a}?", "answer": f"{a}+{a}={2 * a}. " * (a + 1) + "Done"} for a in range(3)]
    datasets.Dataset.from_list(rows).to_json(path)
    return path


def tokens_of(tokenizer, question, answer):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return prompt, tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], return_dict=False)


def log_probs(model, tokenizer, question, answer):
    """Of the tokens of one answer with its end, alone in its batch."""
    prompt, full = tokens_of(tokenizer, question, answer)
    with torch.no_grad():
        found = model(torch.tensor([full])).logits[0].double().log_softmax(dim=-1)
    return [found[place - 1, full[place]].item() for place in range(len(prompt), len(full))]


def test_scores_are_those_of_each_answer_alone(tiny_model, tokenizer, preferences, solutions, tmp_path, monkeypatch):
    monkeypatch.setattr(keeps, "ROWS", 5)
    texts = {"eval_solutions": str(solutions), "eval_foreign": str(solutions)}
    rows = load_kept(KeptArguments(eval_facts="builtin:authors", **texts))
    assert set(rows) == {WORLD_FACTS, REAL_AUTHORS, "solutions", "foreign"}
    start = tiny_model(seed=1)
    given = {"model": tiny_model(), "ref_model": start, "processing_class": tokenizer}
    trainer = build(CEUDPOTrainer, tmp_path, train_dataset=preferences, **given)
    trainer.model.train()
    found = KeptScore(trainer, rows, PromptFormat(), StartModel(trainer)).score(trainer.model)
    assert trainer.model.training
    trainer.model.eval()
    for name, config in (("world_facts", WORLD_FACTS), ("real_authors", REAL_AUTHORS)):
        values = []
        for row in load_tofu("builtin:authors", config).select(range(5)):
            options = [row["answer"], *row["perturbed_answer"]]
            each = [log_probs(trainer.model, tokenizer, row["question"], option) for option in options]
            values.append(softmax([sum(one) / len(one) for one in each])[0])
        assert found[f"{name}_probability"] == pytest.approx(sum(values) / 5, rel=1e-4)
    tokens = [log_probs(trainer.model, tokenizer, row["question"], row["answer"]) for row in rows["solutions"]]
    assert len({len(one) for one in tokens}) == 3  # a mean over tokens is not one over answers
    nll = -math.fsum(itertools.chain(*tokens)) / sum(map(len, tokens))
    assert found["solutions_nll"] == pytest.approx(nll, rel=1e-4)
    assert found["foreign_nll"] == found["solutions_nll"] and found["foreign_kl"] == found["solutions_kl"]
    pairs = [tokens_of(tokenizer, row["question"], row["answer"]) for row in rows["solutions"]]
    pairs = [(prompt, full[len(prompt) :]) for prompt, full in pairs]
    assert found["solutions_kl"] == pytest.approx(evaluate_divergence(trainer.model, start, pairs)["kl"], rel=1e-4)


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    """A model stored in bfloat16, which TRL trains in float32."""
    tiny_model().bfloat16().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def reward(completions, **kwargs):
    return [float(place) for place in range(len(completions))]


@pytest.fixture
def make(saved, preferences, tmp_path):
    def make(trainer_class, **given):
        given = {"model": saved, "train_dataset": preferences, "max_steps": 1, **given}
        if trainer_class is CEUGRPOTrainer:
            few = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
            given |= {"train_dataset": preferences.select_columns("prompt"), "reward_funcs": reward, **few}
        return build(trainer_class, tmp_path, **given)

    return make


LORA = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}
# How the trainer comes by the model at the start, and whether it has to be loaded beside the policy
STARTS = {
    "dpo": (CEUDPOTrainer, {}, False),
    "dpo-lora": (CEUDPOTrainer, LORA, False),
    "grpo": (CEUGRPOTrainer, {}, True),
    "grpo-kl": (CEUGRPOTrainer, {"beta": 0.1}, False),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_at_step_0_the_divergence_is_0_and_then_it_is_not(make, solutions, name, bf16):
    """Whatever the dtype that the model is stored in; under autocast both are scored in one precision."""
    trainer_class, given, loads = STARTS[name]
    trainer, logged = make(trainer_class, bf16=bf16, **given), {}
    assert trainer.model.dtype == torch.float32
    start = StartModel(trainer)
    assert start.moves == loads
    kept = KeptScore(trainer, load_kept(KeptArguments(eval_solutions=str(solutions))), PromptFormat(), start)
    prompts = [{"prompt": [{"role": "user", "content": "1+1="}]}]
    task = Task("none", rows=lambda *given: [], score=lambda row, answer: 0.0, max_new_tokens=8)
    scores = (kept, TaskScore(trainer, task, prompts, start))
    trainer.model = trainer.accelerator.prepare_model(trainer.model)  # which wraps it for autocast, as training does
    trainer.log = logged.update
    for score in scores:
        score.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert logged["eval_solutions_kl"] == logged["eval_kl"] == 0.0
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, trainer.model.parameters()):
            parameter.add_(0.1)
    for score in scores:
        score.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert logged["eval_solutions_kl"] > 1e-3 and logged["eval_kl"] > 1e-3


def test_a_start_is_loaded_as_the_policy_and_leaves_its_device_after_use(saved, make, tiny_model, monkeypatch):
    asked, placed, trainer = [], [], make(CEUGRPOTrainer)

    def loaded(name, **how):
        asked.append((name, how))
        model = tiny_model()
        model.to = lambda device: placed.append(str(device)) or model
        return model

    monkeypatch.setattr(callbacks, "create_model_from_path", loaded)
    trainer.args.model_init_kwargs = {"revision": "v1", "dtype": "bfloat16"}
    start = StartModel(trainer)
    how = {"attn_implementation": "sdpa", "trust_remote_code": False, "device_map": None}
    assert asked == [(saved, {**trainer.args.model_init_kwargs, **how})]
    with start() as reference:
        assert reference is start.model and placed == ["cpu", "cpu"]
    policy = SimpleNamespace(device="cuda:1")
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda model: policy)
    with pytest.raises(KeyError), start():
        raise KeyError
    assert placed[3:] == ["cuda:1", "cpu"]


def test_a_reference_that_follows_the_policy_is_not_the_start(make):
    trainer = make(CEUDPOTrainer, sync_ref_model=True)
    assert StartModel(trainer).model is not trainer.ref_model


def test_a_run_logs_what_its_recipe_names_asked_in_its_prompt(recipe, solutions, tmp_path, capsys):
    given = {"dataset_name": "builtin:addition", "eval_solutions": str(solutions), "max_steps": 1}
    assert main(["dpo", "--config", recipe(**given)]) == 2
    assert "scored at evaluations, and this run has none; set eval_strategy" in capsys.readouterr().err
    words = ["dpo", "--config", recipe(**given, eval_strategy="steps", eval_steps=1)]
    assert main(words) == 0 == main([*words, "--system_prompt", "Hi", "--output_dir", str(tmp_path / "asked")])
    result, asked = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("out", "asked"))
    assert result["settings"]["eval_solutions"] == str(solutions)
    assert (result["dtype"], result["mixed_precision"], result["attention"]) == ("float32", "no", "sdpa")
    assert 4 < result["metrics"]["eval_solutions_nll"] < 6  # random weights over 103 tokens: log 103 = 4.6
    assert asked["metrics"]["eval_solutions_nll"] != result["metrics"]["eval_solutions_nll"]


def test_solutions_that_are_none_are_named(tmp_path):
    (tmp_path / "file.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="has the columns question; give question and answer"):
        load_kept(KeptArguments(eval_solutions=str(tmp_path / "file.jsonl")))
