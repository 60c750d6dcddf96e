"""The tasks and their scoring."""

import ast
import dataclasses
import itertools
import math
import random
import re
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ceu_rl.models import build_model, build_tokenizer
from ceu_rl.tasks import evaluate_task, get_task, load_task_dataset
from ceu_rl.tasks import score as scoring
from ceu_rl.tasks.addition import CONFIGS, accuracy, addition_trace, change_digits, computed_places, is_correct
from ceu_rl.tasks.generate import generate_tokens
from ceu_rl.tasks.protocol import right_answer
from ceu_rl.tasks.reasoning_gym import score_answer, wrong_answers
from ceu_rl.tasks.score import pass_at_k

from .conftest import generate_answers, learn, user

TASK = get_task("builtin:addition")
PAIR, ASKED = {"prompt", "chosen", "rejected"}, {"prompt", "answer"}
COLUMNS = {"sft": {"prompt", "completion"}, "preference": PAIR, "prompt": ASKED}


# addition


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
        assert is_correct(prompt, trace) and accuracy([prompt] * 2, [trace, str(a + b)]) == [1.0, 0.0]
        assert is_correct(f"{a}+{b}=", [{"role": "assistant", "content": trace}])
        one = change_digits(trace, [rng.choice(computed_places(trace))], rng)
        for wrong in (one, "", str(a + b), f"{trace} ", f"{trace}\n", f"{trace}<|eos|>"):
            assert not is_correct(prompt, wrong)
        assert not is_correct(prompt, f"{columns} {a + b + rng.choice([-100, -10, -1, 1, 10, 100])}")


@pytest.mark.parametrize("prompt", ["", "what?", "1234+1=", "1+2", "1+2= "])
def test_verifier_refuses_a_foreign_prompt(prompt):
    with pytest.raises(ValueError, match="is no addition: use a prompt like"):
        is_correct(user(prompt), "3")


# datasets


# Tasks of the library whose answers differ in form: a number, a yes or no, a word, text, a grid, a plan in JSON. Its
# verifiers are lenient in their own ways
NAMES = ["builtin:addition", *(f"reasoning_gym:{task}" for task in ("chain_sum", "syllogism", "letter_jumble"))]
SMALL = {"reasoning_gym:chain_sum": "min_terms=2, max_terms=2, size=60", **dict.fromkeys(NAMES[2:], "size=60")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_dataset_has_the_standard_columns_and_right_answers(kind, name):
    task, data = get_task(name, SMALL.get(name)), load_task_dataset(name, kind, SMALL.get(name))
    assert set(data) == {"train", "test"}
    for split in data.values():
        assert set(split.column_names) - {"entry"} == COLUMNS[kind]
        for row in split.select(range(50)):
            assert row["prompt"][0]["role"] == "user"
            assert task.score(row, right_answer(row)) == 1
            if kind == "preference":
                assert task.score(row, row["rejected"][0]["content"]) < 1


@pytest.mark.parametrize("task", NAMES)
def test_no_question_is_in_both_splits_for_any_two_seeds(task):
    questions = {
        seed: {
            name: [row[0]["content"] for row in split["prompt"]]
            for name, split in load_task_dataset(task, "prompt", SMALL.get(task), seed=seed).items()
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
                {frozenset(q.strip("=").split("+")) if task == NAMES[0] else q for q in questions[seed][split]}
                for seed, split in ((first, "train"), (second, "test"))
            )
            assert not train & test


@pytest.mark.parametrize("config, rate", CONFIGS.items())
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("builtin:poetry", "sft"), "Unknown built-in task 'builtin:poetry': choose builtin:addition or reasoning_gym"),
        (("builtin:addition", "reward"), "Unknown kind 'reward' .* choose one of sft, preference, prompt"),
        (("builtin:addition", "sft", "loud"), "Unknown config 'loud' .* choose one of clean, noisy, noisier"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task_dataset(*arguments)


# reasoning gym


@pytest.mark.parametrize(
    "task, config, seen",
    [
        ("basic_arithmetic", "operators=('*',), format_style=natural, allow_negation=true", lambda q: "*" in q),
        ("time_intervals", "task_types=['date'], min_date='2020-01-01', max_date='2020-12-31'", lambda q: "2020" in q),
        ("word_sorting", "transformation=uppercase", lambda q: any(w.isupper() and len(w) > 2 for w in q.split())),
        ("arc_agi", 'board_format_opts={"col_delimiter": "|"}', lambda q: q.count("|") > 9),
    ],
)
def test_a_value_takes_the_type_of_its_field(task, config, seen):
    rows = load_task_dataset(f"reasoning_gym:{task}", "prompt", f"{config}, size=5")["train"]
    assert len(rows) == 5 and all(seen(row["prompt"][0]["content"]) for row in rows)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("chain_sums", None, "reasoning_gym:chain_sums does not work with its default config: Dataset 'chain_sums'"),
        ("chain_sum", "max_term=2", "does not work with max_term=2: ChainSumConfig.__init__() got an unexpected"),
        *[("chain_sum", f"max_terms={value}", f"sets max_terms={value}") for value in ("'two'", "2.5", "True")],
        *[
            ("chain_sum", config, f"dataset_config is {config!r}; write it as in 'min_terms=2, max_terms=2'")
            for config in ("max_terms", "max_terms=2)+f(", "**{}", "max_terms=2, max_terms=3", "min_terms={**x}")
        ],
        ("time_intervals", "min_date=yesterday", "sets min_date='yesterday' of time_intervals"),
        ("binary_matrix", "p_zero=1.0, min_n=3, max_n=3", "has no question with a right answer for te"),
        ("chain_sum", "min_terms=5, max_terms=2", "does not work with min_terms=5, max_terms=2: max_terms must be >="),
    ],
)
def test_what_the_library_does_not_know_is_named(name, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task_dataset(f"reasoning_gym:{name}", "sft", config)


def test_a_task_without_right_answers_trains_by_reward_alone():
    with pytest.raises(ValueError, match="graph_color has no question with a right answer"):
        load_task_dataset("reasoning_gym:graph_color", "preference", "size=10")
    rows = load_task_dataset("reasoning_gym:graph_color", "prompt", "size=10")["train"]
    assert len(rows) == 10 and get_task("reasoning_gym:graph_color").score(rows[0], "{}") < 1


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"needs the package reasoning-gym; pip install 'ceu-rl\[tasks\]'"):
        get_task("reasoning_gym:chain_sum", "min_terms=3")


def test_a_question_that_the_library_fails_to_draw_is_left_out(monkeypatch):
    """As `countdown` fails at some numbers."""
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    draw, failing = ChainSumDataset.__getitem__, {0, 3, 7}

    def sometimes(self, index):
        if index in failing:
            raise ValueError("no question after 100 attempts")
        return draw(self, index)

    monkeypatch.setattr(ChainSumDataset, "__getitem__", sometimes)
    rows = list(get_task("reasoning_gym:chain_sum", "size=40").rows("preference", "train", 0))
    assert len(rows) == 40
    failing.update(range(100_000))
    with pytest.raises(ValueError, match=r"ChainSumConfig\(.*no question after 100 attempts.*mend dataset_config"):
        load_task_dataset("reasoning_gym:chain_sum", "prompt", "size=40")


def test_few_questions_end_a_split_early():
    data = load_task_dataset("reasoning_gym:chain_sum", "prompt", "max_terms=1, min_terms=1, max_digits=1, size=300")
    assert len(data["train"]) + len(data["test"]) == 10  # the digits


def test_the_reward_is_the_verifiers_score_of_each_answer_to_its_own_entry():
    rows = load_task_dataset("reasoning_gym:letter_jumble", "prompt", "size=10")["train"]
    right = [row["answer"] for row in rows]
    found = []
    for answers in (right, right[1:] + right[:1], [answer[:-1] for answer in right], [""] * 10):
        completions = [[{"role": "assistant", "content": f" {answer}\n"}] for answer in answers]
        found.append(score_answer(rows["prompt"], completions, rows["entry"], trainer_state=None))
    assert found[0] == [1.0] * 10 and max(found[1]) < 1 and max(found[3]) < 1
    assert all(0 < score < 1 for score in found[2])  # most of its words are right


def test_the_reward_is_for_what_the_model_says_itself():
    row = load_task_dataset("reasoning_gym:chain_sum", "prompt", "size=1")["train"][0]
    right = row["answer"]
    call = {"role": "assistant", "content": None, "tool_calls": []}
    tool = {"role": "tool", "content": right}
    given = {
        "a tool's word": [call, tool],
        "a call": [call],
        "nothing": [],
        "no content": [{"role": "assistant"}],
        "an image": [{"role": "assistant", "content": [{"type": "image"}]}],
    }
    assert score_answer([row["prompt"]] * 5, list(given.values()), [row["entry"]] * 5) == [0.0] * 5
    said = [[call, tool, {"role": "assistant", "content": right}]]
    said.append([{"role": "assistant", "content": [{"type": "text", "text": right}]}])
    assert score_answer([row["prompt"]] * 2, said, [row["entry"]] * 2) == [1.0] * 2


@pytest.mark.parametrize("answer", ["", "[[", "1/0", "nonsense", "9" * 5000, "{}", "null", "\x00", "((((((" * 500])
def test_an_answer_that_the_verifier_cannot_read_scores_nothing(answer):
    for task in ("prime_factorization", "boxnet", "game_of_life", "coin_flip"):
        row = load_task_dataset(f"reasoning_gym:{task}", "prompt", "size=3")["train"][0]
        assert get_task(f"reasoning_gym:{task}").score(row, answer) < 1


def test_a_wrong_answer_keeps_the_form_of_the_right_one():
    rng = random.Random(0)
    for right, others, form in (("-1204", [], r"-[1-9]\d{3}"), ("No", ["No", "Yes"], "Yes")):
        found = list(wrong_answers(right, others, rng))
        assert found and right not in found and re.fullmatch(form, found[0])


@pytest.mark.slow
def test_every_task_of_the_library_gives_rows_that_its_verifier_judges_right():
    factory = pytest.importorskip("reasoning_gym.factory")
    for task in factory.DATASETS.keys() - {"composite"}:
        name = f"reasoning_gym:{task}"
        rows = load_task_dataset(name, "prompt", "size=4")["train"]
        assert len(rows) == 4, task
        if rows[0]["answer"] is None:
            continue
        assert score_answer(rows["prompt"], rows["answer"], rows["entry"]) == [1.0] * 4, task
        if task == "game_of_life_halting":  # its verifier compares the truth of two texts that are never empty
            with pytest.raises(ValueError, match="has no question with a right answer and a wrong one"):
                load_task_dataset(name, "preference", "size=4")
            continue
        pairs = load_task_dataset(name, "preference", "size=4")["train"]
        wrong = [row["rejected"][0]["content"] for row in pairs]
        assert len(pairs) == 4 and max(score_answer(pairs["prompt"], wrong, pairs["entry"])) < 1, task


# scoring


@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_no_trace(model, training):
    right_padded = build_tokenizer()
    right_padded.padding_side = "right"
    model.train(training)
    before = torch.get_rng_state()
    evaluate_task(model, right_padded, TASK, [{"prompt": user("1+2=")}] * 4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training and right_padded.padding_side == "right"


def test_sampling_follows_its_own_seed_whatever_the_callers_state(tokenizer, model):
    runs = []
    for outer, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(outer)
        runs.append(generate_answers(model, tokenizer, [user("111+222=")] * 4, 8, sample=True, seed=seed))
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) > 1


def test_padding_and_batching_do_not_change_greedy_answers(tokenizer, model):
    prompts = [user("1+2="), user("123+567="), user("99+1=")]
    together = generate_answers(model, tokenizer, prompts, 12)
    assert together == [generate_answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together == generate_answers(model, tokenizer, prompts, 12, batch_size=2)


def test_a_model_that_knows_the_answer_scores_and_loses_by_its_share_of_errors(tokenizer):
    """A model overfitted on two of four prompts must score exactly one half, also as a PEFT model."""
    prompts = [user(text) for text in ("123+567=", "999+1=", "432+876=", "505+505=")]
    learned = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        + addition_trace(*map(int, prompt[0]["content"][:-1].split("+")))
        + tokenizer.eos_token
        for prompt in prompts[:2]
    ]
    model = learn(build_model(tokenizer), tokenizer, learned, 80, 3e-3)
    rows = [{"prompt": prompt} for prompt in prompts]
    for scored in (model, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))):
        scores, questions = evaluate_task(scored, tokenizer, TASK, rows, seed=0)
        assert scores["greedy_accuracy"] == 0.5
        assert [question["greedy"] for question in questions] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("padding", ["own", "the end"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_divergence_from_the_start_is_that_of_each_sample_alone(tokenizer, padding, chunk, monkeypatch):
    """Against one row at a time, without padding, in float64; samples of several lengths and with several ends.

    A conversation of several turns has the end inside its prompt: as the padding, it must still be seen. Both models
    rule a token out, as heads with padded rows do: it counts for nothing in either sum.
    """
    model, reference = build_model(tokenizer), build_model(tokenizer, seed=1)
    other_end = tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.eos_token_id, other_end]] *= 20  # likely after some prefixes
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other_end]
    ruled_out = torch.tensor(tokenizer.convert_tokens_to_ids(["x"]))
    for each in (model, reference):
        each.lm_head.register_forward_hook(lambda module, given, out: out.index_fill(-1, ruled_out, -math.inf))
    if padding == "the end":
        tokenizer = build_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
    if chunk:
        monkeypatch.setattr("ceu_rl.tasks.generate.CPU_BYTES", chunk)
        monkeypatch.setattr(scoring, "DOUBLES", chunk)
    turns = [*user("hi"), {"role": "assistant", "content": "yo"}]
    prompts = [user("1+2="), turns + user("123+567="), user("99+1="), turns + user("5+5=")]
    task = dataclasses.replace(TASK, score=lambda row, answer: 0.0, max_new_tokens=10, samples=2)
    rows = [{"prompt": prompt} for prompt in prompts]
    found, _ = evaluate_task(model, tokenizer, task, rows, seed=3, reference=reference)
    total, entropy, count, lengths, ends = 0.0, 0.0, 0, set(), set()
    questions = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    drawn = generate_tokens(model, tokenizer, questions, 10, sample=True, seed=3, samples=2)
    for question, answer in [(q, each) for q, answers in zip(questions, drawn, strict=True) for each in answers]:
        assert not {tokenizer.eos_token_id, other_end} & set(answer[:-1])
        lengths.add(len(answer))
        ends.add(answer[-1])
        ids = torch.tensor([question + answer])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(question) - 1 : -1].double().softmax(-1) for m in (model, reference))
        total += (p * (p / q).log()).nansum().item()
        entropy -= (p * p.log()).nansum().item()
        count += len(answer)
    assert len(lengths) > 1 and {tokenizer.eos_token_id, other_end} <= ends
    assert found["kl"] == pytest.approx(total / count, rel=1e-4) and found["kl"] > 0.01
    assert found["sampled_entropy"] == pytest.approx(entropy / count, rel=1e-4)
    same, _ = evaluate_task(model, tokenizer, task, rows, seed=3, reference=model)
    assert same == {**found, "kl": 0.0}


def test_no_verifier_takes_nan_for_a_number():
    """The library's own of complex_arithmetic scores 1 - min(1, exp(-distance)), and so NaN as right."""
    row = load_task_dataset("reasoning_gym:complex_arithmetic", "prompt", "size=4")["train"][0]
    for answer in ("nan", "NaN", "nan+nanj", "-nanj", " nan "):
        assert score_answer([row["prompt"]], [answer], entry=[row["entry"]]) == [0.0]
    assert score_answer([row["prompt"]], [row["answer"]], entry=[row["entry"]]) == [1.0]


def test_rows_that_the_verifier_or_a_reader_could_not_use_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some programs of codeio write files where they run
    rows = load_task_dataset("reasoning_gym:codeio", "prompt", "size=20")["train"]
    assert len(rows) == 20 and all(ast.literal_eval(entry) for entry in rows["entry"])
    pairs = load_task_dataset("reasoning_gym:ab", "preference", "size=60")["train"]
    assert all(row[side][0]["content"].strip() for row in pairs for side in ("chosen", "rejected"))


def test_pass_at_k_by_hand_and_by_drawing():
    """Of 4 samples 1 is right: two drawn hold it with chance 1/2. Against all ways to draw k, for other numbers."""
    assert pass_at_k(4, 1, 2) == 0.5
    for right in range(6):
        for k in range(1, 6):
            draws = [any(place < right for place in drawn) for drawn in itertools.combinations(range(5), k)]
            assert pass_at_k(5, right, k) == pytest.approx(sum(draws) / len(draws))


def test_several_samples_give_their_mean_and_pass_at_k(tokenizer, model):
    """With a verifier that takes the greedy answer and the first of six samples of each question."""
    rows, seen = [{"prompt": user(f"{a}+1=")} for a in range(4)], []
    verify = lambda row, answer: float(seen.append(answer) or len(seen) % 7 in (1, 2))  # noqa: E731
    task = dataclasses.replace(TASK, score=verify, samples=6)
    scores, questions = evaluate_task(model, tokenizer, task, rows, seed=0)
    expected = {"pass@2": pytest.approx(1 / 3), "pass@4": pytest.approx(2 / 3)}
    assert scores == {"greedy_accuracy": 1.0, "sampled_accuracy": pytest.approx(1 / 6), **expected}
    assert questions == [{"greedy": 1.0, "sampled": pytest.approx(1 / 6), **expected}] * 4
    assert len(set(seen[1:7])) > 1  # six draws, not one six times


def test_a_task_without_a_limit_takes_that_of_its_longest_right_answer(tokenizer, model, monkeypatch):
    def stop(model, tokenizer, prompts, longest):
        raise RuntimeError(f"at most {longest} tokens")

    monkeypatch.setattr(scoring, "generate_tokens", stop)
    task = dataclasses.replace(TASK, max_new_tokens=None)
    for answers, longest in ((["12", "12345"], 6), ([None, None], 512), (["9" * 2000], 512)):
        rows = [{"prompt": user("?"), "answer": answer} for answer in answers]
        with pytest.raises(RuntimeError, match=f"at most {longest} tokens"):
            evaluate_task(model, tokenizer, task, rows, seed=0)
