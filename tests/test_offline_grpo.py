"""GRPO offline, from logged completions: against what stock does with the same rollouts, and what is refused."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ceu_rl import CEUGRPOConfig, CEUGRPOTrainer, OfflineGRPOTrainer
from ceu_rl.cli import main

SUMS = [(a, b) for a in range(4) for b in range(4)]
TEXTS = [
    {"prompt": f"{a}+{b}=", "completions": [f"{a + b}", f"{a}", "", f"{b}1"], "rewards": [1, 0, 0, None]}
    for a, b in SUMS
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": text or "?"}] for text in row["completions"]],
        "rewards": [1.0, 0.0, 0.25, 0.5],
    }
    for row in TEXTS
]


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make(
        rows, trainer_class=OfflineGRPOTrainer, reward_funcs=None, eval_dataset=None, rollout_func=None, **settings
    ):
        defaults = {
            "output_dir": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_steps": 3,
        }
        config_class = CEUGRPOConfig if issubclass(trainer_class, CEUGRPOTrainer) else GRPOConfig
        return trainer_class(
            tiny_model(1),
            reward_funcs,
            config_class(**{**defaults, **settings}),
            train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )

    return make


def with_log_probs(rows, tokenizer, end=True):
    """Each token of each text at log-probability -0.1, -0.2, ..."""
    counts = [[len(tokenizer(text)["input_ids"]) + end for text in row["completions"]] for row in rows]
    return [
        {**row, "log_probs": [[-0.1 * (i + 1) for i in range(n)] for n in row_counts]}
        for row, row_counts in zip(rows, counts, strict=True)
    ]


def first_batch(trainer):
    rows = next(iter(trainer.get_train_dataloader()))
    return rows, trainer._prepare_inputs(rows)


PARTS = [
    {
        **row,
        "completions": [[{**m[0], "content": [{"type": "text", "text": m[0]["content"]}]}] for m in row["completions"]],
    }
    for row in CHATS
]


@pytest.mark.parametrize(
    "rows",
    [
        TEXTS,
        CHATS,
        PARTS,
        [{**text, "completions": row["completions"]} for text, row in zip(TEXTS, PARTS, strict=True)],
    ],
    ids=["text", "chat", "parts", "parts to text"],
)
def test_a_batch_holds_the_logged_tokens_with_their_end_and_the_advantages_of_their_rewards(
    make_trainer, tokenizer, rows
):
    trainer = make_trainer(rows, num_iterations=2, steps_per_generation=2)
    inputs, _ = first_batch(trainer)
    batch = trainer._generate_and_score_completions(copy.deepcopy(inputs))
    assert "old_per_token_logps" not in batch and "sampling_per_token_logps" not in batch  # the ratio is 1
    for place, row in enumerate(inputs):
        which = place % 4
        ids = batch["completion_ids"][place][batch["completion_mask"][place].bool()].tolist()
        completion = row["logged_completions"][which]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        text = text if isinstance(text, str) else text[0]["text"]
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
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

    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in TEXTS])
    trained = []
    for rows, settings in (
        (prompts, {"trainer_class": GRPOTrainer, "reward_funcs": rewards, "rollout_func": rollout}),
        (TEXTS, {"ceu_coef": 0.0}),
        (TEXTS, {}),
    ):
        trained.append(make_trainer(rows, **settings))  # seeds the order of the rollouts
        trained[-1].train()
    parameters = list(zip(*(trainer.model.parameters() for trainer in trained), strict=True))
    assert all(torch.equal(of_stock, of_ours) for of_stock, of_ours, _ in parameters)
    assert not any(torch.equal(of_stock, of_routed) for of_stock, _, of_routed in parameters)
    assert trained[1].state.log_history[0]["rewards/logged/mean"] == pytest.approx(1 / 3)


def test_several_epochs_on_a_stale_policy_keep_the_ratio_at_one(make_trainer):
    trainer = make_trainer(TEXTS, max_steps=-1, num_train_epochs=3, num_iterations=2, steps_per_generation=2)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.epoch == 3 and len(log) == 3 * 4 * 4
    assert all(entry["clip_ratio/region_mean"] == 0 for entry in log)


@pytest.mark.parametrize("end", [True, False], ids=["ended", "cut off"])
def test_known_log_probabilities_are_what_the_ratio_is_to(make_trainer, tokenizer, end):
    rows = [{**row, "completions": [text or "0" for text in row["completions"]]} for row in TEXTS]
    trainer = make_trainer(with_log_probs(rows, tokenizer, end), off_policy_mask_threshold=0.5)
    _, batch = first_batch(trainer)
    mask = batch["completion_mask"].bool()
    expected = -0.1 * torch.arange(1, mask.shape[1] + 1)
    assert all(
        torch.allclose(v[m], expected[: m.sum()]) for v, m in zip(batch["old_per_token_logps"], mask, strict=True)
    )
    ends = batch["completion_ids"].eq(tokenizer.eos_token_id) & mask
    assert ends.any(dim=1).all() if end else not ends.any()
    trainer.train()
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("known", [True, False])
def test_an_anchored_rule_takes_the_place_of_ratio_and_clip(make_trainer, tokenizer, known):
    """The gradient on a log-probability is the advantage's, times min(1, p / p_logged) where it descends."""
    rows = [{**row, "completions": [text or "0" for text in row["completions"]]} for row in TEXTS]
    if not known:
        with pytest.raises(ValueError, match="descent_rule 'anchored'"):
            make_trainer(rows, descent_rule="anchored")
        return
    rows = with_log_probs(rows, tokenizer)
    trainers = [make_trainer(rows, **extra) for extra in ({"descent_rule": "anchored", "ceu_coef": 1}, {"ceu_coef": 0})]
    _, batch = first_batch(trainers[0])
    assert "old_per_token_logps" not in batch  # so that stock's ratio is 1 on this batch
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = 1
        grads = {}
        handle = trainer.model.register_forward_hook(
            lambda module, args, outputs, grads=grads: (
                outputs.log_probs.register_hook(
                    lambda grad: grads.update(grad=grad, log_probs=outputs.log_probs.detach())
                )
                and None
            )
        )
        trainer.compute_loss(trainer.model, copy.deepcopy(batch)).backward()
        handle.remove()
        trainer.seen = grads
    ours, stock = (trainer.seen for trainer in trainers)
    width = batch["completion_ids"].shape[1]
    ratio = (stock["log_probs"][:, -width:] - batch["sampling_per_token_logps"]).exp()
    g = stock["grad"][:, -width:]
    expected = torch.where(g > 0, g * ratio.clamp(max=1), g)
    assert ((g > 0) & (ratio < 0.5)).any()
    torch.testing.assert_close(ours["grad"][:, -width:], expected, rtol=1e-4, atol=1e-7)


def test_token_ids_are_taken_as_they_are_and_cut_at_the_longest_completion(make_trainer):
    rows = [{**row, "completions": [[9, 8, 7], [9], [8] * 12, [7, 7]], "rewards": [1, 0, 0, 1]} for row in TEXTS]
    trainer = make_trainer(rows)
    inputs, _ = first_batch(trainer)
    batch = trainer._generate_and_score_completions(copy.deepcopy(inputs))
    assert batch["completion_ids"][0].tolist()[:3] == [9, 8, 7] and batch["completion_mask"].sum(dim=1).max() == 8


def test_an_evaluation_on_prompts_generates_and_is_scored_by_the_functions(make_trainer):
    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    held_out = Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}])
    trainer = make_trainer(TEXTS, reward_funcs=length, eval_dataset=held_out, per_device_eval_batch_size=8)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/length/mean"] is None
    scores = trainer.evaluate()
    assert scores["eval_rewards/length/mean"] > 0 and scores["eval_rewards/logged/mean"] is None
    with pytest.raises(ValueError, match=r"The eval dataset has no 'completions'.*give reward_funcs"):
        make_trainer(TEXTS, eval_dataset=held_out)


def changed(**fields):
    return [*TEXTS[:2], {**TEXTS[2], **fields}, *TEXTS[3:]]


ONE = [[-0.5]] * 4
IDS = [[8], [8, 9], [9], [10]]
PROBLEMS = [
    (changed(completions=["1", "2", "3"]), "Row 2 of the train dataset has 3 'completions', and num_generations is 4"),
    (changed(completions=None), "Row 2 of the train dataset has None as 'completions'; give a list of 4"),
    (changed(rewards=[1.0, 0.0]), "Row 2 of the train dataset has 2 'rewards' for 4 completions"),
    (changed(rewards=[1.0, float("nan"), 0.0, 0.0]), r"Row 2 .* the reward nan for completion 1 \('rewards'\)"),
    (changed(rewards=None), "Row 2 of the train dataset has None 'rewards' for 4 completions"),
    ([{k: v for k, v in row.items() if k != "rewards"} for row in TEXTS], "has 'completions' and no column 'rewards'"),
    (
        [{**row, "log_probs": ONE if i else None} for i, row in enumerate(TEXTS)],
        "Row 1 .* 'log_probs' where an earlier",
    ),
    ([{**row, "log_probs": [[float("nan")]] * 4} for row in TEXTS], r"Row 0 .* log-probability nan in completion 0"),
    ([{**row, "log_probs": [[0.5]] * 4} for row in TEXTS], r"Row 0 .* log-probability 0\.5 in completion 0"),
    ([{**row, "log_probs": ONE[:2]} for row in TEXTS], "Row 0 .* 2 'log_probs' for 4 completions"),
    (changed(rewards=[1e39, 0.0, 0.0, 0.0]), r"Row 2 .* the reward 1e\+39 for completion 0 \('rewards'\)"),
    ([{**row, "rewards": [1.0] * 4} for row in TEXTS], "no row whose completions have different 'rewards'"),
    ([{**row, "rewards": [None, 1.0, None, 1.0]} for row in TEXTS], "no row whose completions have different"),
    ([{**row, "logged_rewards": [9.0] * 4} for row in TEXTS], "has a column 'logged_rewards', a name that the trainer"),
    ([{**row, "log_probs": [[-1e30]] * 4} for row in TEXTS], r"Row 0 .* log-probability -1e\+30 in completion 0"),
    ([{**row, "log_probs": [[False]] * 4} for row in TEXTS], r"Row 0 .* log-probability False in completion 0"),
    (
        [{**row, "completions": IDS, "log_probs": ONE} for row in TEXTS],
        "Row 0 .* 1 'log_probs' for completion 1, which",
    ),
    ([{**row, "completions": [[1], [2], [3], [103]]} for row in TEXTS], "Row 0 .* the token id 103 in completion 3"),
    ([{**row, "completions": [[1], [2], [3], [-1]]} for row in TEXTS], r"Row 0 .* \[-1\] as completion 3"),
    ([{**row, "completions": [[True]] * 4} for row in TEXTS], r"Row 0 .* \[True\] as completion 0"),
    (
        [{**row, "completions": [[{"role": "assistant", "content": None}]] * 4} for row in CHATS],
        "Row 0 .* as completion 0 .'completions'.; give a text, one assistant message",
    ),
    (
        [{**row, "completions": [[{"role": "assistant", "content": [{"type": "image"}]}]] * 4} for row in CHATS],
        "Row 0 .* as completion 0 .'completions'.; give a text, one assistant message",
    ),
    (
        [{**row, "completions": [[{"role": "assistant", "content": "1", "thinking": "a"}]] * 4} for row in TEXTS],
        "completion of a text prompt has more than content .*'thinking': 'a'",
    ),
    ([{**row, "log_probs": [[-1.0] * 7] * 4} for row in TEXTS], "Row 0 .* 7 'log_probs' for completion 0, which has 2"),
]


@pytest.mark.parametrize(("rows", "message"), PROBLEMS)
def test_rows_that_cannot_be_learned_from_are_named(make_trainer, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(rows)


def test_what_is_evaluated_is_looked_at_too_and_what_is_cut_is_counted(make_trainer, caplog):
    held_out = Dataset.from_list([{**row, "log_probs": [[-0.1] * 7] * 4} for row in TEXTS])
    with pytest.raises(ValueError, match="Row 0 of the eval dataset has 7 'log_probs' for completion 0, which has 2"):
        make_trainer(TEXTS, eval_dataset=held_out)
    with pytest.raises(ValueError, match="Row 0 of the one dataset has 7 'log_probs'"):
        make_trainer(TEXTS, eval_dataset={"one": held_out})
    with caplog.at_level("INFO", "ceu_rl"):
        make_trainer(TEXTS, max_completion_length=2)
    assert "16 of the 64 completions of the train dataset are cut at 2 tokens" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True}, "use_vllm is True, and the train dataset brings its completions"),
        (
            {"off_policy_mask_threshold": 0.5},
            r"off_policy_mask_threshold is 0\.5, and the train dataset has no 'log_probs'",
        ),
        ({"reward_weights": [1.0, 1.0]}, r"reward_weights is \[1\.0, 1\.0\]; give 1 numbers, the first for the logged"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation is 'sum'; use one of sum_then_normalize"),
        ({"rollout_func": print}, "rollout_func is given, and the train dataset brings its completions"),
    ],
)
def test_settings_without_effect_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(TEXTS, **settings)


def test_a_recipe_needs_no_reward_function(tiny_model, tokenizer, tmp_path):
    tiny_model(1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in TEXTS))
    words = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "num_generations": 4,
        "max_steps": 1,
        "use_cpu": "true",
        "bf16": "false",
        "disable_tqdm": "true",
    }
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    assert main(["grpo", *argv]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 1


def test_each_trainer_names_the_other(make_trainer):
    with pytest.raises(ValueError, match="OfflineGRPOTrainer"):
        make_trainer(
            TEXTS, trainer_class=CEUGRPOTrainer, reward_funcs=lambda completions, **_: [0.0] * len(completions)
        )
    with pytest.raises(ValueError, match=r"no column 'completions'.*CEUGRPOTrainer"):
        make_trainer([{"prompt": "1+1="}])
