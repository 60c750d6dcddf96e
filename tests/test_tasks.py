"""The tasks and their scoring."""

import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.tasks import (
    TASKS,
    evaluate_accuracy,
    evaluate_samples,
    generate_answers,
    get_task,
    load_task_dataset,
    maze,
)
from ceu_rl.tasks.addition import TASK, addition_trace, computed_places, corrupt, is_correct
from ceu_rl.tasks.score import generate_tokens

COLUMNS = {
    "sft": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "prompt": {"prompt", "answer"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer)


@pytest.fixture(scope="module")
def preference():
    return load_task_dataset("builtin:addition", "preference")


def user(text):
    return [{"role": "user", "content": text}]


# addition


def test_trace_by_hand():
    assert addition_trace(827, 695) == "7+5+0=12 2+9+1=12 8+6+1=15 1522"
    assert addition_trace(7, 0) == "7+0+0=07 0+0+0=00 0+0+0=00 7"


def test_verifier_against_python_addition():
    rng = random.Random(0)
    for _ in range(2000):
        a, b = rng.randrange(1000), rng.randrange(1000)
        prompt, trace = user(f"{a}+{b}="), addition_trace(a, b)
        columns, total = trace.rsplit(" ", 1)
        assert int(total) == a + b
        carry = 0
        for place, column in enumerate(columns.split()):
            left, right = column.split("=")
            x, y, carry_in = map(int, left.split("+"))
            assert (x, y, carry_in) == (a // 10**place % 10, b // 10**place % 10, carry)
            assert int(right) == x + y + carry_in
            carry = int(right) // 10
        assert is_correct(prompt, trace)
        assert is_correct(f"{a}+{b}=", [{"role": "assistant", "content": trace}])
        assert not is_correct(prompt, corrupt(trace, rng))
        assert not is_correct(prompt, f"{columns} {a + b + rng.choice([-100, -10, -1, 1, 10, 100])}")


@pytest.mark.parametrize("wrong", ["", "3", "{} ", "{} 3", "{}\n", "{}<|eos|>"])
def test_verifier_demands_the_exact_trace(wrong):
    assert not is_correct("1+2=", wrong.format(addition_trace(1, 2)))


def test_a_corruption_changes_one_computed_digit_and_reaches_all_of_them():
    trace, rng, places = addition_trace(827, 695), random.Random(0), set()
    for _ in range(2000):
        wrong = corrupt(trace, rng)
        changed = [i for i, (old, new) in enumerate(zip(trace, wrong, strict=True)) if old != new]
        assert len(changed) == 1
        assert wrong[changed[0]].isdigit()
        places.add(changed[0])
    assert places == {6, 7, 15, 16, 24, 25, 27, 28, 29, 30}


@pytest.mark.parametrize("prompt", ["", "what?", "1234+1=", "1+2", "1+2= "])
def test_verifier_refuses_a_foreign_prompt(prompt):
    with pytest.raises(ValueError, match="is no addition: use a prompt like"):
        is_correct(user(prompt), "3")


# maze


def paths(grid):
    """Every simple path from S to G, by depth-first search, written apart from the package."""
    cells = {(r, c): mark for r, line in enumerate(grid.split("/")) for c, mark in enumerate(line) if mark != "#"}
    start = next(cell for cell, mark in cells.items() if mark == "S")
    found, stack = [], [(start, "", {start})]
    while stack:
        (r, c), moves, seen = stack.pop()
        if cells[r, c] == "G":
            found.append(moves)
            continue
        for move, cell in {"U": (r - 1, c), "D": (r + 1, c), "L": (r, c - 1), "R": (r, c + 1)}.items():
            if cell in cells and cell not in seen:
                stack.append((cell, moves + move, seen | {cell}))
    return found


def test_maze_verifier_against_all_paths():
    rng, several = random.Random(0), 0
    for example in maze.make_examples("train", 200, 0.0, 0):
        found = paths(example.question)
        shortest = {path for path in found if len(path) == min(map(len, found))}
        several += len(shortest) > 1
        assert maze.MIN_MOVES <= len(example.answer) <= maze.MAX_MOVES and example.answer in shortest
        others = {maze.corrupt(example.question, example.answer, rng) for _ in range(20)} | set(found) - shortest
        others |= {example.answer[:-1], example.answer + "U", example.answer + " ", "", "x", example.answer.lower()}
        for moves in shortest | others:
            assert maze.is_correct(user(example.question), moves) == (moves in shortest)
    assert several > 20


def test_a_maze_path_is_drawn_among_all_shortest_ones():
    drawn = {maze.shortest_path("S.../..../..../...G", random.Random(seed)) for seed in range(300)}
    assert len(drawn) == 20 and all(sorted(path) == sorted("DDDRRR") for path in drawn)


@pytest.mark.parametrize("prompt", ["", "S..G", "S.../..../..../....", "S.../..../..../..GG", "S.#./..../..../...X"])
def test_maze_verifier_refuses_a_foreign_prompt(prompt):
    with pytest.raises(ValueError, match="is no maze: use 4 rows of 4"):
        maze.is_correct(user(prompt), "R")


def test_maze_verifier_refuses_a_maze_without_a_path():
    with pytest.raises(ValueError, match="has no path from S to G; use a maze that has one"):
        maze.is_correct("S#../##../..../...G", "R")


# datasets


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", COLUMNS)
def test_dataset_has_the_standard_columns_and_right_answers(kind, name):
    is_correct = get_task(name).is_correct
    data = load_task_dataset(name, kind)
    assert set(data) == {"train", "test"}
    for split in data.values():
        assert set(split.column_names) == COLUMNS[kind]
        for row in split.select(range(100)):
            answer = next(row[key] for key in ("completion", "chosen", "answer") if key in row)
            assert row["prompt"][0]["role"] == "user"
            assert is_correct(row["prompt"], answer)
            if kind == "preference":
                assert not is_correct(row["prompt"], row["rejected"])


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_in_both_splits_for_any_two_seeds(task):
    questions = {
        seed: {
            name: [row[0]["content"] for row in split["prompt"]]
            for name, split in load_task_dataset(task, "prompt", seed=seed).items()
        }
        for seed in (0, 1)
    }
    assert questions[0]["train"] != questions[1]["train"]
    for first in questions:
        for name in ("train", "test"):
            assert len(set(questions[first][name])) == len(questions[first][name])
        for second in questions:
            # the two numbers of an addition in either order are one question
            train, test = (
                {frozenset(q.strip("=").split("+")) for q in questions[seed][split]}
                for seed, split in ((first, "train"), (second, "test"))
            )
            assert not train & test


def test_dataset_depends_on_its_arguments_alone(preference):
    random.seed(7)
    state = random.getstate()
    again = load_task_dataset("builtin:addition", "preference")
    assert random.getstate() == state
    for split in ("train", "test"):
        assert again[split].to_list() == preference[split].to_list()


@pytest.mark.parametrize("config, rate", TASK.configs.items())
def test_config_sets_the_error_rate_of_the_computed_digits_alone(config, rate):
    data = load_task_dataset("builtin:addition", "sft", config)
    wrong = total = 0
    for row in data["train"].select(range(4000)):
        answer = addition_trace(*map(int, row["prompt"][0]["content"][:-1].split("+")))
        shown, places = row["completion"][0]["content"], computed_places(answer)
        changed = {i for i, (old, new) in enumerate(zip(answer, shown, strict=True)) if old != new}
        assert changed <= set(places)
        wrong, total = wrong + len(changed), total + len(places)
    assert wrong / total == pytest.approx(rate, abs=0.006)
    assert all(is_correct(row["prompt"], row["completion"]) for row in data["test"])


@pytest.mark.parametrize("kind", ["preference", "prompt"])
def test_config_changes_no_other_kind(kind):
    clean, noisy = (load_task_dataset("builtin:addition", kind, config) for config in ("clean", "noisy"))
    assert clean["test"].to_list() == noisy["test"].to_list()
    assert clean["train"].select(range(100)).to_list() == noisy["train"].select(range(100)).to_list()


def test_no_answer_is_longer_than_the_limit(tokenizer, preference):
    for name, task in TASKS.items():
        rows = load_task_dataset(name, "prompt")["train"]
        assert max(len(tokenizer(row["answer"]).input_ids) + 1 for row in rows) == task.max_new_tokens, name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("builtin:poetry", "sft"), "Unknown built-in task 'builtin:poetry': choose one of builtin:addition"),
        (("builtin:addition", "reward"), "Unknown kind 'reward' .* choose one of sft, preference, prompt"),
        (("builtin:addition", "sft", "loud"), "Unknown config 'loud' .* choose one of clean, noisy, noisier"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task_dataset(*arguments)


# scoring


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_no_trace(tokenizer, model, preference, sample, training):
    right_padded = build_tokenizer()
    right_padded.padding_side = "right"
    model.train(training)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate_accuracy(model, right_padded, TASK, preference["test"]["prompt"][:4], sample=sample)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training
    assert right_padded.padding_side == "right"


def test_sampling_follows_its_own_seed_whatever_the_callers_state(tokenizer, model):
    prompts = [user("111+222=")] * 4
    runs = []
    for outer, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(outer)
        runs.append(generate_answers(model, tokenizer, prompts, 8, sample=True, seed=seed))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 1


def test_padding_and_batching_do_not_change_greedy_answers(tokenizer, model):
    prompts = [user("1+2="), user("123+567="), user("99+1=")]
    together = generate_answers(model, tokenizer, prompts, 12)
    assert together == [generate_answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together == generate_answers(model, tokenizer, prompts, 12, batch_size=2)


def test_a_model_that_knows_the_answer_scores_and_loses_by_its_share_of_errors(tokenizer):
    """A model overfitted on two of four prompts must score exactly one half, also as a PEFT model."""
    prompts = [user(text) for text in ("123+567=", "999+1=", "432+876=", "505+505=")]
    learned = [
        [*p, {"role": "assistant", "content": addition_trace(*map(int, p[0]["content"][:-1].split("+")))}]
        for p in prompts[:2]
    ]
    model = build_model(tokenizer)
    batch = tokenizer.apply_chat_template(learned, padding=True, return_dict=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate_accuracy(model, tokenizer, get_task("builtin:addition"), prompts) == 0.5
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert evaluate_accuracy(adapted, tokenizer, get_task("builtin:addition"), prompts) == 0.5


def test_divergence_from_the_start_is_that_of_each_sample_alone(tokenizer):
    """Against one row at a time, without padding, in float64; samples of several lengths."""
    model, reference = build_model(tokenizer), build_model(tokenizer, seed=1)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 20  # likely after some prefixes
    prompts = [user("1+2="), user("123+567="), user("99+1="), user("5+5=")]
    task = get_task("builtin:maze")
    found = evaluate_samples(model, reference, tokenizer, maze_like(task), prompts, seed=3)
    total, entropy, count, lengths = 0.0, 0.0, 0, set()
    for questions, answers in generate_tokens(model, tokenizer, prompts, task.max_new_tokens, sample=True, seed=3):
        for question, answer in zip(questions.tolist(), answers.tolist(), strict=True):
            question = [token for token in question if token != tokenizer.pad_token_id]
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            lengths.add(len(answer))
            ids = torch.tensor([question + answer])
            with torch.no_grad():
                p, q = (m(ids).logits[0, len(question) - 1 : -1].double().softmax(-1) for m in (model, reference))
            total += (p * (p / q).log()).sum().item()
            entropy -= (p * p.log()).sum().item()
            count += len(answer)
    assert len(lengths) > 1
    assert found["kl"] == pytest.approx(total / count, rel=1e-4) and found["kl"] > 0.01
    assert found["sampled_entropy"] == pytest.approx(entropy / count, rel=1e-4)
    same = evaluate_samples(model, model, tokenizer, maze_like(task), prompts, seed=3)
    assert same == {**found, "kl": 0.0}


def maze_like(task):
    """The task with a verifier that takes any question."""
    return dataclasses.replace(task, is_correct=lambda prompt, answer: False)


def test_scoring_no_prompts_is_refused(tokenizer, model):
    with pytest.raises(ValueError, match="0 prompts"):
        evaluate_accuracy(model, tokenizer, TASK, [])
