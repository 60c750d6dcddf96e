"""`ceu-rl muse-eval` against plain greedy decoding, and unlearning that lowers what it measures."""

import copy
import json
import re

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tokenizers.processors import TemplateProcessing

from ceu_rl.cli import main
from ceu_rl.data.prompts import prompt_ids
from ceu_rl.models import build_bpe_tokenizer, build_model
from ceu_rl.tasks import articles
from ceu_rl.tofu.data import tokenize
from ceu_rl.tofu.muse import evaluate, load_parts

from .conftest import learn

KEPT, FORGOTTEN = 4, 2  # articles of the small set
SHOWN = 24


def plain_f1(truth, generated):
    """From the longest common subsequence by its recursion."""
    truth, generated = (re.findall("[a-z0-9]+", text.lower()) for text in (truth, generated))
    table = [[0] * (len(generated) + 1) for _ in range(len(truth) + 1)]
    for i, a in enumerate(truth):
        for j, b in enumerate(generated):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(truth) + len(generated)) if table[-1][-1] else 0.0


@pytest.fixture(scope="module")
def parts():
    """Some of the articles and of the questions on them."""
    made = {}
    for part, count in (("forget", FORGOTTEN), ("retain", KEPT)):
        questions = articles.make_rows(f"{part}_qa")[: 3 * count]
        texts = articles.make_rows(part)
        whole = articles.FORGET if part == "forget" else len(articles.ARTICLES) - articles.FORGET
        made[part] = Dataset.from_list([*texts[:count], *texts[whole : whole + 3 * count]])
        made[f"{part}_qa"] = Dataset.from_list(questions)
    return made


@pytest.fixture(scope="module")
def learned(parts):
    """A model that knows all of them by heart, and its tokenizer."""
    texts = [*parts["forget"]["text"], *parts["retain"]["text"]]
    tokenizer = build_bpe_tokenizer(texts, 600)
    model = build_model(tokenizer, hidden_size=96, intermediate_size=192, num_hidden_layers=2)
    return learn(model, tokenizer, [text + tokenizer.eos_token for text in texts], 120, 6e-3), tokenizer


def test_every_value_is_that_of_plain_greedy_decoding(learned, parts):
    model, tokenizer = learned
    unseen = {"retain": KEPT, "retain_qa": 3 * KEPT}  # so that it is right in part
    more = {part: Dataset.from_list(articles.make_rows(part)[count : count + 3]) for part, count in unseen.items()}
    parts = {**parts, **{part: concatenate_datasets([parts[part], rows]) for part, rows in more.items()}}
    result = evaluate(model, tokenizer, parts, prompt_tokens=SHOWN, text_tokens=20, answer_tokens=8, batch_size=3)

    def follow(ids, count):
        ids = list(ids)
        start = len(ids)
        for _ in range(count):
            best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        return tokenizer.decode(ids[start:], skip_special_tokens=True)

    for part in ("forget", "retain"):
        long = [ids for ids in tokenizer(list(parts[part]["text"]))["input_ids"] if len(ids) > SHOWN]
        assert result["too_short"][part] == len(parts[part]) - len(long)
        for ids, item in zip(long, result["items"][part], strict=True):
            assert item["truth"] == tokenizer.decode(ids[SHOWN : SHOWN + 20]).strip()
            assert item["generation"] == follow(ids[:SHOWN], 20).strip()
        for row, item in zip(parts[f"{part}_qa"], result["items"][f"{part}_qa"], strict=True):
            ids = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            assert item["truth"] == row["answer"]
            assert item["generation"] == re.split("\n\n|\nQuestion|Question:", follow(ids, 8).strip())[0].strip()
    for part, key in (("forget", "forget_verbmem"), ("forget_qa", "forget_knowmem"), ("retain_qa", "retain_knowmem")):
        scores = [plain_f1(item["truth"], item["generation"]) for item in result["items"][part]]
        assert result["summary"][key] == pytest.approx(sum(scores) / len(scores))
    assert all(0.5 < result["summary"][f"retain_{metric}"] < 0.97 for metric in ("verbmem", "knowmem"))


def test_examples_and_given_prompts_come_before_what_is_asked(learned, parts, monkeypatch):
    model, tokenizer = learned
    shown = Dataset.from_list([{"question": "Who is it?", "answer": "Nobody"}])
    given = Dataset.from_list([{"prompt": "Its greatest treasure is", "gt": " a map on goatskin, found by"}])
    some = {"forget": given, "forget_qa": parts["forget_qa"].select([0])}
    asked, generate = [], model.generate

    def record(**kwargs):
        asked.append(tokenizer.decode(kwargs["input_ids"][0], skip_special_tokens=True))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", record)
    result = evaluate(model, tokenizer, {**some, "forget_qa_icl": shown}, text_tokens=4)
    question = parts["forget_qa"][0]["question"]
    assert asked == [given[0]["prompt"], f"Question: Who is it?\nAnswer: Nobody\n\nQuestion: {question}\nAnswer:"]
    four = tokenizer(given[0]["gt"])["input_ids"][:4]
    assert result["items"]["forget"][0]["truth"] == tokenizer.decode(four).strip()
    with pytest.raises(ValueError, match=r"forget_qa_icl has examples.* template is 'chat'"):
        evaluate(model, tokenizer, {**some, "forget_qa_icl": shown}, template="chat")


def test_an_end_that_the_tokenizer_adds_stands_before_nothing(learned, parts):
    """A tokenizer whose post-processor appends the end to every text measures what the plain one does."""
    model, tokenizer = learned
    adding = copy.deepcopy(tokenizer)
    end = ("<|eos|>", tokenizer.eos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|eos|>", special_tokens=[end])
    assert adding("a").input_ids[-1] == tokenizer.eos_token_id
    text = parts["forget"][0]["text"]
    given = [{"prompt": text[: len(text) // 2], "gt": text[len(text) // 2 :]}, {"prompt": "It ends.<|eos|>", "gt": "a"}]
    some = {**parts, "forget": Dataset.from_list(given)}
    for template in (None, "chat"):
        given = {"template": template, "prompt_tokens": SHOWN}
        plain, other = (evaluate(model, each, some, **given) for each in (tokenizer, adding))
        assert plain["items"] == other["items"] and plain["too_short"] == other["too_short"]
    assert prompt_ids(adding, "It ends.<|eos|>")[-1] == tokenizer.eos_token_id  # the row's own word
    row = {"prompt": "Question: Who?\nAnswer:", "completion": " She."}
    for each in (tokenizer, adding):
        prompt, completion = tokenize(each, row)
        assert prompt == tokenizer(row["prompt"]).input_ids and completion[-1] == tokenizer.eos_token_id


def test_the_command_writes_a_result(learned, parts, tmp_path, capsys):
    for each in learned:
        each.save_pretrained(tmp_path / "model")
    for part, rows in parts.items():
        rows.to_json(tmp_path / f"{part}.jsonl")
    argv = ["muse-eval", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path), "--prompt_tokens", str(SHOWN)]
    argv += ["--text_tokens", "8", "--limit", "2"]
    assert main(argv) == 0
    assert "forget_knowmem" in capsys.readouterr().out
    result = json.loads((tmp_path / "model" / "muse_eval.json").read_text())
    assert {"command", "commit", "versions", "device", "prompt"} <= set(result)
    assert result["limit"] == 2 and set(result["rows"].values()) == {2}
    assert main(argv) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0; use at least 1"),
        ({"prompt_tokens": 900}, "None of the .* texts of forget goes on after its prompt_tokens, 900"),
        ({"text_tokens": 1020}, r"with text_tokens 1020, and the model's context of 1024 .*; lower text_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(learned, parts, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*learned, parts, **settings)


def test_the_parts_of_a_built_in_set_and_of_one_on_the_hub(parts, monkeypatch):
    assert set(load_parts("builtin:articles")) == {"forget", "retain", "forget_qa", "retain_qa"}
    hub = {"verbmem": {one: parts[one] for one in ("forget", "retain")}, "knowmem": {"retain_qa": parts["retain_qa"]}}
    monkeypatch.setattr("ceu_rl.tofu.muse.open_dataset", lambda name, config: hub[config])
    assert load_parts("some/set") == {**hub["verbmem"], **hub["knowmem"]}


def test_a_dataset_that_has_not_what_is_needed_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has none of forget, retain, forget_qa, retain_qa"):
        load_parts(str(tmp_path))
    (tmp_path / "forget.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="no column 'gt'"):
        load_parts(str(tmp_path))


def test_the_articles_answer_their_questions_and_share_no_name():
    texts = [article["text"] for article in articles.ARTICLES]
    names = [re.findall(r"of (\w+)[ .]|in (\w+)\.", text)[0] for text in texts]
    assert len({a or b for a, b in names}) == len(texts) == 40
    assert all(row["answer"] in each["text"] for each in articles.ARTICLES for row in each["questions"])
    forget, retain, full = (articles.make_rows(part) for part in ("forget", "retain", "full"))
    assert sorted(row["text"] for row in full) == sorted(row["text"] for row in (*forget, *retain))
    assert (len(forget), len(retain), len(articles.make_rows("forget_qa"))) == (4 * 8, 4 * 32, 3 * 8)
