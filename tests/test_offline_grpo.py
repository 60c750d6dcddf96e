"""GRPO offline, from logged completions: against what stock does with the same rollouts, and what is refused."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from ceu_rl import CEUGRPOTrainer, OfflineGRPOTrainer
from ceu_rl.cli import main
from ceu_rl.run.errors import note_once

from .trainers import GRPO, build, log_prob_gradient, losses, same

SUMS = [(a, b) for a in range(4) for b in range(4)]
TEXTS = [{"prompt": f"{a}+{b}=", "completions": [f"{a + b}", f"{a}", "", f"{b}1"]} for a, b in SUMS]
TEXTS = [{**row, "rewards": [1, 0, 0, None]} for row in TEXTS]


CHATS = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}], "rewards": [1.0, 0.0, 0.25, 0.5],
          "completions": [text or "?" for text in row["completions"]]} for row in TEXTS]  # fmt: skip


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make(rows, trainer_class=OfflineGRPOTrainer, **given):
        given.setdefault("reward_funcs", None)
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        given = {**GRPO, "model": tiny_model(1), "processing_class": tokenizer, "train_dataset": rows, **given}
        return build(trainer_class, tmp_path, **{"max_steps": 3, **given})

    return make


def with_log_probs(rows, tokenizer, end=True):
    """Each token of each text at log-probability -0.1, -0.2, ...; an empty text becomes one of a token."""
    rows = [{**row, "completions": [text or "0" for text in row["completions"]]} for row in rows]
    for row in rows:
        counts = [len(tokenizer(text)["input_ids"]) + end for text in row["completions"]]
        row["log_probs"] = [[-0.1 * (i + 1) for i in range(count)] for count in counts]
    return rows


def first_batch(trainer):
    rows = next(iter(trainer.get_train_dataloader()))
    return rows, trainer._prepare_inputs(rows)


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
def test_a_batch_holds_the_logged_tokens_with_their_end_and_the_advantages_of_rewards(make_trainer, tokenizer, rows):
    trainer = make_trainer(rows, num_iterations=2, steps_per_generation=2)
    inputs, _ = first_batch(trainer)
    batch = trainer._generate_and_score_completions(copy.deepcopy(inputs))
    assert "old_per_token_logps" not in batch and "sampling_per_token_logps" not in batch  # the ratio is 1
    texts = {str(row["prompt"]): row["completions"] for row in rows}
    for place, row in enumerate(inputs):
        which = place % 4
        ids = batch["completion_ids"][place][batch["completion_mask"][place].bool()].tolist()
        assert ids == [*tokenizer(texts[str(row["prompt"])][which])["input_ids"], tokenizer.eos_token_id]
        prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()]
        assert row["prompt"] in tokenizer.decode(prompt) if isinstance(row["prompt"], str) else len(prompt) > 4
        rewards = torch.tensor([torch.nan if r is None else r for r in row["logged_rewards"]])
        known = rewards[~rewards.isnan()]
        expected = (rewards[which] - known.mean()) / (known.std() + 1e-4)
        assert batch["advantages"][place].item() == pytest.approx(expected.nan_to_num().item(), abs=1e-4)


def test_it_trains_as_stock_does_on_the_same_rollouts(make_trainer, tokenizer):
    """Stock, given the same completions by a rollout_func and their rewards by a function, learns the same weights."""
    answers = {row["prompt"]: row for row in TEXTS}

    def rollout(prompts, trainer):
        texts = [answers[prompt]["completions"][place % 4] for place, prompt in enumerate(prompts)]
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": ids, "logprobs": None}

    def rewards(prompts, **kwargs):
        return [answers[prompt]["rewards"][place % 4] for place, prompt in enumerate(prompts)]

    prompts = [{"prompt": row["prompt"]} for row in TEXTS]
    stock = make_trainer(prompts, GRPOTrainer, reward_funcs=rewards, rollout_func=rollout)
    stock.train()
    ours = make_trainer(TEXTS, ceu_coef=0.0)
    ours.train()
    routed = make_trainer(TEXTS)
    routed.train()
    assert same(stock, ours) and not same(stock, routed)
    assert ours.state.log_history[0]["rewards/logged/mean"] == pytest.approx(1 / 3)


def test_several_epochs_on_a_stale_policy_keep_the_ratio_at_one(make_trainer):
    trainer = make_trainer(TEXTS, max_steps=-1, num_train_epochs=3, num_iterations=2, steps_per_generation=2)
    trainer.train()
    assert trainer.state.epoch == 3 and len(losses(trainer)) == 3 * 4 * 4
    assert all(entry["clip_ratio/region_mean"] == 0 for entry in losses(trainer))


@pytest.mark.parametrize("end", [True, False], ids=["ended", "cut off"])
def test_known_log_probabilities_are_what_the_ratio_is_to(make_trainer, tokenizer, end):
    trainer = make_trainer(with_log_probs(TEXTS, tokenizer, end), off_policy_mask_threshold=0.5)
    _, batch = first_batch(trainer)
    mask = batch["completion_mask"].bool()
    expected = -0.1 * torch.arange(1, mask.shape[1] + 1)
    for values, kept in zip(batch["old_per_token_logps"], mask, strict=True):
        assert torch.allclose(values[kept], expected[: kept.sum()])
    ends = batch["completion_ids"].eq(tokenizer.eos_token_id) & mask
    assert ends.any(dim=1).all() if end else not ends.any()
    trainer.train()
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] > 0


def test_an_anchored_rule_takes_the_place_of_ratio_and_clip(make_trainer, tokenizer):
    """The gradient on a log-probability is the advantage's, times min(1, p / p_logged) where it descends."""
    with pytest.raises(ValueError, match="descent_rule 'anchored'"):
        make_trainer(TEXTS, descent_rule="anchored")  # nothing is known
    rows = with_log_probs(TEXTS, tokenizer)
    ours = make_trainer(rows, descent_rule="anchored", ceu_coef=1)
    stock = make_trainer(rows, ceu_coef=0)
    _, batch = first_batch(ours)
    assert "old_per_token_logps" not in batch  # so that stock's ratio is 1 on this batch
    ours.current_gradient_accumulation_steps = stock.current_gradient_accumulation_steps = 1
    g, log_probs = log_prob_gradient(stock, batch)
    ratio = (log_probs - batch["sampling_per_token_logps"]).exp()
    expected = torch.where(g > 0, g * ratio.clamp(max=1), g)
    assert ((g > 0) & (ratio < 0.5)).any()
    torch.testing.assert_close(log_prob_gradient(ours, batch)[0], expected, rtol=1e-4, atol=1e-7)


def test_token_ids_are_taken_as_they_are_and_cut_at_the_longest_completion(make_trainer):
    rows = [{**row, "completions": [[9, 8, 7], [9], [8] * 12, [7, 7]], "rewards": [1, 0, 0, 1]} for row in TEXTS]
    _, batch = first_batch(make_trainer(rows))
    lengths = batch["completion_mask"].sum(dim=1)
    assert sorted(set(lengths.tolist())) == [1, 2, 3, 8]
    assert [9, 8, 7] in batch["completion_ids"][:, :3].tolist()


def test_an_evaluation_on_prompts_generates_and_is_scored_by_the_functions(make_trainer, tokenizer, caplog):
    """What it generates has no anchor, and needs none."""
    note_once.cache_clear()

    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    held_out = Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}])
    rows, given = with_log_probs(TEXTS, tokenizer), {"descent_rule": "anchored", "per_device_eval_batch_size": 8}
    trainer = make_trainer(rows, reward_funcs=length, eval_dataset=held_out, **given)
    with caplog.at_level("INFO", "ceu_rl"):
        trainer.train()
        scores = trainer.evaluate()
    assert trainer.state.log_history[0]["rewards/length/mean"] is None and "not known" not in caplog.text
    assert scores["eval_rewards/length/mean"] > 0 and scores["eval_rewards/logged/mean"] is None


def third(rows=TEXTS, **fields):
    """The rows, with other fields in the third."""
    return [*rows[:2], {**rows[2], **fields}, *rows[3:]]


def all_with(rows=TEXTS, **fields):
    return [{**row, **fields} for row in rows]


ONE = [[-0.5]] * 4
PROBLEMS = [
    (third(completions=["1", "2", "3"]), ["Row 2 of the train", "3 'completions' for 4", "num_generations"]),
    (third(completions=None), ["Row 2", "None as 'completions'"]),
    (third(rewards=[1.0, 0.0]), ["Row 2", "2 'rewards' for 4 completions"]),
    (third(rewards=[1.0, float("nan"), 0.0, 0.0]), ["Row 2", "nan in 'rewards' of completion 1"]),
    (third(rewards=[1e39, 0.0, 0.0, 0.0]), ["Row 2", "1e+39 in 'rewards' of completion 0"]),
    ([{"prompt": row["prompt"], "completions": row["completions"]} for row in TEXTS], ["no column 'rewards'"]),
    ([{**row, "log_probs": ONE if i else None} for i, row in enumerate(TEXTS)], ["Row 0", "None as 'log_probs' for 4"]),
    (all_with(log_probs=ONE[:2]), ["Row 0", "2 'log_probs' for 4 completions"]),
    (all_with(log_probs=[[float("nan")]] * 4), ["Row 0", "nan in 'log_probs' of completion 0"]),
    (all_with(log_probs=[[-0.5, 0.5]] * 4), ["Row 0", "has 0.5 in 'log_probs' of completion 0"]),
    (all_with(log_probs=[[-1e30]] * 4), ["Row 0", "-1e+30 in 'log_probs'"]),
    (all_with(log_probs=[[False]] * 4), ["Row 0", "False in 'log_probs'"]),
    (all_with(log_probs=[[-1.0] * 7] * 4), ["Row 0", "7 'log_probs' for completion 0, which has 2"]),
    (all_with(completions=[[8], [8, 9], [9], [10]], log_probs=ONE), ["Row 0", "1 'log_probs' for completion 1"]),
    (all_with(completions=[[1], [2], [3], [-1]]), ["Row 0", "[-1] in 'completions' of completion 3"]),
    (all_with(completions=[[True]] * 4), ["Row 0", "[True] in 'completions' of completion 0"]),
    (all_with(completions=[[{"role": "assistant", "content": "1"}]] * 4), ["Row 0", "in 'completions'", "token ids"]),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "parts"), PROBLEMS)
def test_rows_that_cannot_be_learned_from_are_named(make_trainer, rows, parts):
    with pytest.raises(ValueError) as caught:
        make_trainer(rows)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_is_evaluated_is_looked_at_too_and_what_is_cut_is_counted(make_trainer, caplog):
    held_out = Dataset.from_list(all_with(log_probs=[[-0.1] * 7] * 4))
    for given, name in ((held_out, "eval"), ({"one": held_out}, "one")):
        with pytest.raises(ValueError, match=f"Row 0 of the {name} dataset has 7 'log_probs' for completion 0"):
            make_trainer(TEXTS, eval_dataset=given)
    with caplog.at_level("INFO", "ceu_rl"):
        make_trainer(TEXTS, max_completion_length=2)
    assert "train dataset: 16 of 64 completions cut at max_completion_length (2)" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True}, "use_vllm is given, and the train dataset brings its completions"),
        ({"off_policy_mask_threshold": 0.5}, r"off_policy_mask_threshold is 0\.5, .* no 'log_probs'"),
        ({"reward_weights": [1.0, 1.0]}, r"reward weights \(2\) must match .* reward functions \(1\)"),
        ({"rollout_func": print}, "rollout_func is given, and the train dataset brings its completions"),
    ],
)
def test_settings_without_effect_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(TEXTS, **settings)


def test_a_recipe_needs_no_reward_function(recipe, tmp_path):
    config = recipe(num_generations=4, per_device_train_batch_size=4, max_length=None, max_steps=1)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in TEXTS))
    assert main(["grpo", "--config", config]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 1


def test_each_trainer_names_the_other(make_trainer):
    with pytest.raises(ValueError, match="OfflineGRPOTrainer"):
        make_trainer(TEXTS, CEUGRPOTrainer, reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(ValueError, match=r"no 'completions'.*CEUGRPOTrainer"):
        make_trainer([{"prompt": "1+1="}])
