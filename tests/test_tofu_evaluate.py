"""`ceu-rl tofu-eval` against plain float64 logits, one answer at a time, and the one-sentence errors of bad input."""

import copy
import importlib.util
import itertools
import json
import math
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from transformers import AutoModelForCausalLM

from ceu_rl.cli import main
from ceu_rl.data.prompts import PromptFormat
from ceu_rl.models import build_bpe_tokenizer, build_model
from ceu_rl.tofu import load_tofu
from ceu_rl.tofu.evaluate import add_retain, evaluate, read_result
from ceu_rl.tofu.robustness import load_quantized, load_to_relearn, relearn
from ceu_rl.tofu.scoring import Answer, AnswerCache, make_answers, measure, score_answers

from .conftest import CONFIGS, TINY, learn
from .test_tofu_data import TOFU, real_data

ROWS, NEW_TOKENS = 5, 12


@pytest.fixture(scope="module")
def bpe():
    rows = load_tofu("builtin:authors", "full")
    return build_bpe_tokenizer([*rows["question"], *rows["answer"]], 400)


@pytest.fixture(scope="module")
def learned(bpe, folder):
    """A model that has learned the answers of the forget set in part."""
    rows = load_tofu(str(folder), "forget01_perturbed")
    texts = [f"{chat(row['question'])}{row['answer']}<|eos|>" for row in rows]
    return learn(build_model(bpe, **TINY), bpe, texts, 40, 1e-2)


@pytest.fixture(scope="module")
def result(learned, bpe, folder):
    return evaluate(learned, bpe, str(folder), "forget01", batch_size=7, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bpe, learned):
    """The learned model in a folder, and one with other weights that stands for the retain model."""
    root = tmp_path_factory.mktemp("models")
    for name, model in {"model": learned, "retain": build_model(bpe, seed=1, **TINY)}.items():
        model.save_pretrained(root / name)
        bpe.save_pretrained(root / name)
    return root


@pytest.fixture
def words(saved, folder, tmp_path):
    """`ceu-rl tofu-eval` on the small folder into `tmp_path/name`."""

    def words(stored="model", name=None, **fields):
        given = {"model": saved / stored, "dataset": folder, "split": "forget01", "max_new_tokens": 8}
        given |= {"output_dir": tmp_path / (name or stored), **fields}
        return ["tofu-eval", *(f"--{key}={value}" for key, value in given.items() if value is not None)]

    return words


@pytest.fixture
def result_of(words, tmp_path):
    """The result of a command that succeeds."""

    def run(stored="model", name=None, **fields):
        assert main(words(stored, name, **fields)) == 0
        return json.loads((tmp_path / (name or stored) / "tofu_eval.json").read_text())

    return run


def chat(question):
    return f"<|bos|><|user|>{question}<|assistant|>"


# The reference: float64, one sequence at a time, full logits


def plain_logits(model, ids):
    with torch.no_grad():
        return model.double()(torch.tensor([ids])).logits[0].numpy()


def log_softmax(z):
    z = z - z.max()
    return z - math.log(np.exp(z).sum())


class Reference:
    """Everything about one answer, from the logits of the whole sequence."""

    def __init__(self, model, tokenizer, prompt_text, answer):
        prompt = tokenizer(prompt_text).input_ids
        ids = tokenizer(f"{prompt_text}{answer}<|eos|>").input_ids
        assert ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_token_id
        self.answer, self.labels = answer, ids[len(prompt) :]
        logits = plain_logits(model, ids)
        self.rows = [log_softmax(logits[len(prompt) - 1 + t]) for t in range(len(self.labels))]
        self.log_probs = [row[label] for row, label in zip(self.rows, self.labels, strict=True)]
        self.mean = sum(self.log_probs) / len(self.log_probs)
        self.matches = [row.argmax() == label for row, label in zip(self.rows, self.labels, strict=True)][:-1]

    def attacks(self):
        few = max(1, int(0.4 * len(self.matches)))
        z = []
        for row, log_p in zip(self.rows[:-1], self.log_probs, strict=False):
            mu = sum(math.exp(x) * x for x in row)
            sigma = math.sqrt(sum(math.exp(x) * (x - mu) ** 2 for x in row))
            z.append((log_p - mu) / sigma)
        return {
            "loss": -self.mean,
            "zlib": -self.mean / len(zlib.compress(self.answer.encode())),
            "min_k": -sum(sorted(self.log_probs[:-1])[:few]) / few,
            "min_k_plus_plus": -sum(sorted(z)[:few]) / few,
        }


@pytest.fixture(scope="module")
def reference(learned, bpe, folder):
    """For each config and row, the answers by kind."""
    model = build_model(bpe, **TINY)
    model.load_state_dict(learned.state_dict())
    model = model.double()

    def score(row):
        kinds = {"answer": [row["answer"]], "perturbed": row["perturbed_answer"]}
        kinds["correct"] = [row.get("paraphrased_answer") or row["answer"]]
        return {kind: [Reference(model, bpe, chat(row["question"]), a) for a in texts] for kind, texts in kinds.items()}

    return {config: [score(row) for row in load_tofu(str(folder), config)] for config in CONFIGS}


def test_every_value_of_a_row_is_that_of_plain_logits(result, reference):
    close, scorer = dict(rel=2e-4, abs=1e-9), RougeScorer(["rougeL"], use_stemmer=True)
    assert result["summary"]["forget_rouge_l_recall"] > 0.2  # it generates in part what it has learned
    for config in CONFIGS:
        assert len(result["items"][config]) == result["rows"][config] == ROWS
        for item, kinds in zip(result["items"][config], reference[config], strict=True):
            (answer,), (correct,), wrong = kinds["answer"], kinds["correct"], kinds["perturbed"]
            assert item["log_prob"] == pytest.approx(answer.mean, **close)
            assert item["probability"] == pytest.approx(math.exp(answer.mean), **close)
            assert item["correct_log_prob"] == pytest.approx(correct.mean, **close)
            assert item["perturbed_log_probs"] == pytest.approx([w.mean for w in wrong], **close)
            wrong_mass = sum(math.exp(w.mean) for w in wrong)
            share = math.exp(answer.mean) / (math.exp(answer.mean) + wrong_mass)
            assert item["option_probability"] == pytest.approx(share, **close)
            ratio = math.prod(math.exp(w.mean) for w in wrong) ** (1 / len(wrong)) / math.exp(correct.mean)
            assert item["truth_ratio"] == pytest.approx(ratio, rel=1e-3)
            assert {name: item[name] for name in answer.attacks()} == pytest.approx(answer.attacks(), **close)
            if config == CONFIGS[0]:
                known = len(list(itertools.takewhile(bool, reversed(answer.matches)))) or 1
                assert item["extraction_strength"] == pytest.approx(known / len(answer.matches))
                assert item["exact_memorization"] == pytest.approx(np.mean(answer.matches))
            recall = scorer.score(answer.answer, item["generation"])["rougeL"].recall
            assert item["rouge_l_recall"] == pytest.approx(recall)
            for found, text in zip(item["perturbed"], wrong, strict=True):
                assert found == pytest.approx(text.attacks(), **close)


def test_the_summary_is_made_of_the_rows(result):
    forget, retain, authors, facts = (result["items"][config] for config in CONFIGS)
    summary = result["summary"]

    def mean(rows, name, apply=float):
        return pytest.approx(sum(apply(row[name]) for row in rows) / len(rows))

    for name in ("probability", "extraction_strength"):
        assert summary[f"forget_{name}"] == mean(forget, name)
    assert summary["forget_truth_ratio"] == mean(forget, "truth_ratio", lambda r: min(r, 1 / r))
    assert summary["retain_probability"] == mean(retain, "probability")
    nine = []
    for name, rows in {"retain": retain, "real_authors": authors, "world_facts": facts}.items():
        if name != "retain":
            assert summary[f"{name}_probability"] == mean(rows, "option_probability")
        assert summary[f"{name}_rouge_l_recall"] == mean(rows, "rouge_l_recall")
        assert summary[f"{name}_truth_ratio"] == mean(rows, "truth_ratio", lambda r: max(0, 1 - r))
        nine += [summary[f"{name}_{part}"] for part in ("probability", "rouge_l_recall", "truth_ratio")]
    assert summary["model_utility"] == pytest.approx(stats.hmean(nine))
    for attack in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        members = [row[attack] for row in forget]
        others = [wrong[attack] for row in forget for wrong in row["perturbed"]]
        won = np.mean([(m < o) + (m == o) / 2 for m in members for o in others])
        assert summary[f"membership_auc_{attack}"] == pytest.approx(won)
        assert won > 0.6, "the model has learned the members"
    assert result["non_members"] == "perturbed answers of forget01_perturbed"
    assert "forget_quality" not in summary


@pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("auto", "float16")])
def test_the_precision_is_a_setting_and_recorded(result_of, learned, bpe, tmp_path, dtype, expected):
    for each in (copy.deepcopy(learned).to(torch.float16), bpe):
        each.save_pretrained(tmp_path / "half")
    assert result_of("model", "out", model=tmp_path / "half", dtype=dtype, limit=1)["dtype"] == expected


def test_a_limit_takes_the_first_rows_and_is_compared_with_the_same(words, result_of, refused, result, tmp_path):
    found = result_of("model", "few", limit=2)
    assert found["limit"] == 2 and set(found["rows"].values()) == {2}
    for config in CONFIGS:
        expected = [row["log_prob"] for row in result["items"][config][:2]]
        assert [row["log_prob"] for row in found["items"][config]] == pytest.approx(expected, rel=1e-5)
    few = tmp_path / "few" / "tofu_eval.json"
    refused(words("model", retain=few), "has another limit (2) than this model's (None)")


def made_answers(bpe, *texts):
    """Of each text the tokens after the first two."""
    rows = (bpe(text).input_ids for text in texts)
    return [Answer("set", n, "answer", 0, "text", ids[:2], [], ids[2:], len(ids) - 2) for n, ids in enumerate(rows)]


def test_an_answer_after_tuned_prompts_is_scored_where_it_stands(learned, bpe):
    """Prompt tuning puts 5 tokens in front of each row; by hand from its whole logits."""
    torch.manual_seed(0)
    tuned = get_peft_model(copy.deepcopy(learned), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    made = made_answers(bpe, "what is this", "who wrote that long book then")
    score_answers(tuned.eval(), made)
    for answer in made:
        ids = [*answer.prompt_ids, *answer.completion_ids]
        with torch.no_grad():
            log_p = tuned(input_ids=torch.tensor([ids])).logits[0, 5:-1].double().log_softmax(-1)
        expected = log_p.gather(-1, torch.tensor(ids[1:])[:, None])[1:].mean().item()
        assert answer.log_prob == pytest.approx(expected, rel=1e-4)


def test_a_token_that_the_model_rules_out_counts_for_nothing(learned, bpe):
    """A logit of -inf gives the values of one of -100 (exp of it is below any float32 next to the others)."""
    found, unused = [], torch.tensor([bpe.pad_token_id])
    for low in (-100.0, -math.inf):
        hook = learned.lm_head.register_forward_hook(lambda _, __, logits, low=low: logits.index_fill(-1, unused, low))
        (answer,) = made_answers(bpe, "who wrote that long book then")
        score_answers(learned.eval(), [answer])
        found.append(answer.scores)
        hook.remove()
    for name in ("log_prob", "min_k_plus_plus"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6)


# The command


def test_the_builtin_authors_have_a_holdout_set(result_of, capsys):
    result = result_of("retain", dataset="builtin:authors", max_new_tokens=2, batch_size=128)
    shown = " ".join(capsys.readouterr().out.split())
    assert "model_utility" in shown and "Non-members of the membership attacks: holdout10" in shown
    assert result["rows"] == {**dict(zip(CONFIGS, (10, 100, 20, 20), strict=True)), "holdout10": 100}
    assert (result["split"], result["template"], result["non_members"]) == ("forget01", "chat", "holdout10")
    assert {"commit", "versions", "device", "date", "seed", "wall_time_s", "peak_memory_gib"} <= set(result)
    assert result["command"].startswith("ceu-rl tofu-eval --model=")
    members, others = ([row["min_k"] for row in result["items"][name]] for name in (CONFIGS[0], "holdout10"))
    won = np.mean([(m < o) + (m == o) / 2 for m in members for o in others])
    assert result["summary"]["membership_auc_min_k"] == pytest.approx(won)


def test_a_retain_result_gives_forget_quality_and_privacy_leakage(result_of, tmp_path, capsys):
    other, plain = result_of("retain"), result_of("model", "plain")
    assert "need --retain" in capsys.readouterr().out and "forget_quality" not in plain["summary"]
    retain = tmp_path / "retain" / "tofu_eval.json"
    found = result_of("model", "beside", retain=retain)
    assert found["retain"] == str(retain) and found["summary"].items() >= plain["summary"].items()
    ratios = [[row["truth_ratio"] for row in each["items"][CONFIGS[0]]] for each in (found, other)]
    assert found["summary"]["forget_quality"] == stats.ks_2samp(*ratios).pvalue < 1
    assert found["summary"]["ks_distance"] == stats.ks_2samp(*ratios).statistic > 0
    auc, base = (1 - each["summary"]["membership_auc_min_k"] for each in (found, other))
    assert found["summary"]["privacy_leakage"] == pytest.approx(100 * (auc - base) / base)
    later = tmp_path / "plain" / "tofu_eval.json"
    assert main(["tofu-eval", "--results", str(later), "--retain", str(retain)]) == 0
    assert json.loads(later.read_text()) == {**plain, "summary": found["summary"], "retain": str(retain)}
    assert main(["tofu-eval", "--results", str(later)]) == 2


def test_a_result_of_open_unlearning_is_taken_for_the_retain_model(words, result_of, refused, tmp_path):
    """What its `ks_test` and `privleak` take: the truth ratio of each row, and the AUC of min-k."""
    ratios = [row["truth_ratio"] for row in result_of("retain")["items"][CONFIGS[0]]]
    theirs, short = tmp_path / "TOFU_EVAL.json", tmp_path / "short.json"
    for path, values in ((theirs, ratios), (short, ratios[1:])):
        rows = {str(place): {"score": value} for place, value in enumerate(values)}
        path.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": rows}, "mia_min_k": {"agg_value": 0.5}}))
    found = result_of("model", retain=theirs)
    ours = [row["truth_ratio"] for row in found["items"][CONFIGS[0]]]
    assert found["summary"]["forget_quality"] == stats.ks_2samp(ours, ratios).pvalue
    assert "privacy_leakage" not in found["summary"]  # these rows have no holdout set, which theirs are
    message = f"short.json is open-unlearning's, with {ROWS - 1} rows to forget where this has {ROWS}; give one"
    refused(words("model", "short", retain=short), message)


# Whether it holds


def test_a_quantized_model_is_scored_beside_the_whole_one(words, result_of, monkeypatch, learned, refused, bpe, folder):
    def load(path, bits, dtype):
        model = build_model(bpe, **TINY)
        model.load_state_dict(learned.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                scale = parameter.abs().max() / {"int8": 127, "int4": 7}[bits]
                parameter.copy_((parameter / scale).round() * scale)
        return model

    if importlib.util.find_spec("torchao") is None:
        refused(words("model", "none", quantize="int8"), "No module named 'torchao'")
    monkeypatch.setattr("ceu_rl.tofu.evaluate.load_quantized", load)
    for bits in ("int8", "int4"):
        result = result_of("model", bits, quantize=bits)
        rounded = evaluate(load("", bits, None), bpe, str(folder), "forget01", max_new_tokens=8)["summary"]
        assert result["quantized"] == {"to": bits, "summary": pytest.approx(rounded, rel=1e-6)}
        assert result["summary"]["forget_probability"] != rounded["forget_probability"]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install torchao")
@pytest.mark.parametrize(("bits", "levels"), [("int8", 256), ("int4", 16)])
def test_torchao_rounds_the_linear_layers(saved, learned, bits, levels):
    model = load_quantized(str(saved / "model"), bits, torch.float32)
    weight = model.model.layers[0].mlp.down_proj.weight.dequantize()
    assert all(len(row.unique()) <= levels for row in weight)
    torch.testing.assert_close(weight, learned.model.layers[0].mlp.down_proj.weight, atol=0.1, rtol=0.2)
    assert torch.equal(model.lm_head.weight, learned.lm_head.weight)


def test_what_is_stored_in_bfloat16_is_relearned_in_float32(learned, bpe, folder, tmp_path):
    """A small step moves every weight that has a gradient, where in bfloat16 rounding loses most of it."""
    copy.deepcopy(learned).to(torch.bfloat16).save_pretrained(tmp_path)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_to_relearn(str(tmp_path)).to(dtype)
        before = torch.cat([each.detach().flatten().clone() for each in model.parameters()])
        relearn(model, bpe, load_tofu(str(folder), CONFIGS[0]), PromptFormat("chat"), 1, 1e-5)
        after = torch.cat([each.detach().flatten() for each in model.cpu().parameters()])
        moved[dtype] = (before != after).float().mean().item()
    assert moved[torch.float32] > 0.7 > 0.2 > moved[torch.bfloat16]
    learned.save_pretrained(tmp_path / "exact")
    assert torch.equal(load_to_relearn(str(tmp_path / "exact")).lm_head.weight, learned.lm_head.weight)


def test_an_adapter_is_relearned_merged_into_its_model(result_of, saved, bpe, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "retain"), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    bpe.save_pretrained(tmp_path / "adapter")
    found = result_of("model", "out", model=tmp_path / "adapter", relearn=30, relearn_learning_rate=5e-3)
    whole = adapted.merge_and_unload()
    assert torch.equal(load_to_relearn(str(tmp_path / "adapter")).lm_head.weight, whole.lm_head.weight)
    ids = torch.tensor([[5, 9, 30]])
    torch.testing.assert_close(load_to_relearn(str(tmp_path / "adapter"))(ids).logits, whole(ids).logits)
    again = found["relearned"]
    assert (again["steps"], again["learning_rate"], again["trained_dtype"]) == (30, 5e-3, "float32")
    assert again["summary"]["forget_probability"] > 10 * found["summary"]["forget_probability"]


@pytest.mark.parametrize(
    ("fields", "broken"), [({"relearn": 2}, "robustness.SFTTrainer"), ({"quantize": "int8"}, "evaluate.load_quantized")]
)
def test_what_can_fail_after_the_scores_is_tried_before_them(words, refused, monkeypatch, fields, broken):
    def fail(*given, **settings):
        raise ValueError("it cannot be")

    monkeypatch.setattr("ceu_rl.tofu.scoring.score_answers", lambda *given: pytest.fail("it scored"))
    monkeypatch.setattr(f"ceu_rl.tofu.{broken}", fail)
    refused(words("model", "out", **fields), "it cannot be")


# Killed, and where it cannot write


@pytest.mark.parametrize("finished", [1, 5])
def test_a_killed_evaluation_goes_on(words, result_of, refused, monkeypatch, tmp_path, finished):
    """With 4 batches of scores and 1 of generations: one is killed while it scores, the other at the end."""
    whole = result_of("model", "whole", batch_size=32)
    add, done, again = AnswerCache.add, [], []

    def die(self, found):
        add(self, found)
        done.append(len(found))
        if len(done) == finished:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "add", die)
        message = "tofu_eval.part.jsonl; the same command continues from there"
        refused(words("model", "killed", batch_size=32), message, status=130)
    part = tmp_path / "killed" / "tofu_eval.part.jsonl"
    with part.open("a") as file:
        file.write('{"scores/forget01_perturbed/0')  # killed in the middle of a line
    for name, value in {"max_new_tokens": 9, "template": "question_answer"}.items():
        refused(words("model", "killed", **{name: value}), "part of an evaluation with another ", name)
    refused(words("retain", "killed"), "part of an evaluation with another weights; choose")
    monkeypatch.setattr(AnswerCache, "add", lambda self, found: (again.append(len(found)), add(self, found)))
    found = result_of("model", "killed", batch_size=32)
    assert not part.exists() and done + again == [32, 32, 32, 14, 20]
    assert whole["summary"] == pytest.approx(found["summary"], rel=1e-6)
    texts = [[row["generation"] for row in each["items"][CONFIGS[0]]] for each in (whole, found)]
    assert texts[0] == texts[1]


# Bad input


@pytest.mark.parametrize("field", ["split", "tokenizer", "template", "data", "non_members", "prompt"])
def test_a_retain_result_of_something_else_is_refused(result, tmp_path, field):
    other, found = tmp_path / "other.json", {"fingerprint": "x"} if field == "prompt" else "x"
    other.write_text(json.dumps({**result, field: found}))
    with pytest.raises(ValueError, match=f"has another {field} .*'x'.* than this model's .*evaluate the retain"):
        add_retain(copy.deepcopy(result), read_result(other), "other.json")
    other.write_text(json.dumps({name: value for name, value in result.items() if name != field}))
    with pytest.raises(ValueError, match=f"has no '{field}'"):
        read_result(other)


def test_a_result_that_was_cut_short_is_refused(result, words, refused, tmp_path):
    for text, message in ((json.dumps(result)[:900], "is cut short or no JSON"), ("[]", "has no 'split'")):
        (tmp_path / "short.json").write_text(text)
        with pytest.raises(ValueError, match=f"short.json {message}"):
            read_result(tmp_path / "short.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tofu_eval.json").touch()
    refused(words("model", "out"), "out/tofu_eval.json exists; choose another folder with --output_dir")


def measure_rows(model, bpe, config, rows):
    answers = make_answers({config: Dataset.from_list(rows)}, bpe, PromptFormat("chat"), [bpe.eos_token_id])
    return measure(model, bpe, {}, answers, [(answers, 200, "max_new_tokens")])


def test_nan_for_one_row_alone_names_that_row(bpe, folder):
    rows = load_tofu(str(folder), CONFIGS[3]).to_list()
    rows[3]["question"] += "<|system|>"  # a token that no other text has
    model = build_model(bpe, **TINY)
    model.get_input_embeddings().weight.data[bpe.convert_tokens_to_ids("<|system|>")] = math.nan
    message = "logits are not finite in row 3 of world_facts_perturbed, .* log-probability of nan; take an earlier"
    with pytest.raises(ValueError, match=message):
        measure_rows(model, bpe, CONFIGS[3], rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": " "}, "The answer of row 2 of retain_perturbed is ' '"),
        ({"perturbed_answer": []}, r"The perturbed_answer of row 2 of retain_perturbed is \[\]; give a list"),
        ({"perturbed_answer": ["x", ""]}, "The answer of row 2 of retain_perturbed is ''"),
        ({"answer": "so " * 1100}, r"Row 2 of retain_perturbed takes \d+ tokens, .* context of 1024 would cut it"),
        ({"question": "so " * 280}, r"Row 2 of .* takes \d+ tokens with max_new_tokens 200, .* 1024 .*; lower"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(learned, bpe, folder, change, message):
    rows = load_tofu(str(folder), "retain_perturbed").to_list()
    rows[2].update(change)
    with pytest.raises(ValueError, match=message):
        measure_rows(learned, bpe, "retain_perturbed", rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "forget05"}, "has no config 'forget05_perturbed'; choose one of forget01_perturbed"),
        ({"dataset": "nobody/nothing"}, "nobody/nothing"),
        ({"model": "no/such"}, "no/such"),
        ({"model": "no/such", "output_dir": None}, "--model_name_or_path no/such is no folder to write to"),
        ({"batch_size": 0}, "batch_size is 0; use at least 1"),
        ({"limit": 0}, "limit is 0; use at least 1"),
        ({"relearn": -1}, "relearn is -1; use at least 1"),
        ({"template": "qa"}, "template is 'qa'; use"),
        ({"retain": "no.json"}, "No such file or directory: 'no.json'"),
        ({"output_dir": __file__}, "File exists: "),
    ],
)
def test_a_command_that_cannot_work_is_refused(words, refused, tmp_path, fields, message):
    refused(words("model", "out", **fields), "ceu-rl tofu-eval: error: ", message)
    assert not (tmp_path / "out" / "tofu_eval.json").exists()


@real_data
def test_the_real_data_end_to_end(bpe, result_of):
    result = result_of("retain", dataset=TOFU, limit=40, max_new_tokens=1)
    assert result["rows"] == dict.fromkeys(CONFIGS, 40)
    assert {len(row["perturbed_log_probs"]) for row in result["items"][CONFIGS[0]]} == {5}
    assert all(math.isfinite(value) for value in result["summary"].values())
