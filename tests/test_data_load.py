"""What a dataset's name means, and the check of its rows."""

import gzip
import json
import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from ceu_rl.data.load import BUILDERS, load, open_dataset
from ceu_rl.data.rows import check_layout, leave_ties_out
from ceu_rl.tofu import load_tofu

USER, SAID, OTHER = (
    {"role": "user", "content": "1+2="},
    {"role": "assistant", "content": "3"},
    {"role": "assistant", "content": "4"},
)
PARTS = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]}
SYSTEM = {"role": "system", "content": "Add."}
TEXTS, ANSWERS = {"chosen": "3", "rejected": "4"}, {"chosen": [SAID], "rejected": [OTHER]}
TEXT, CHAT = {"prompt": "1+2=", **TEXTS}, {"prompt": [USER], **ANSWERS}
WHOLE = {name: [USER, *answer] for name, answer in ANSWERS.items()}
INSTRUCTED = {name: [SYSTEM, *turns] for name, turns in WHOLE.items()}
INSTRUCTING = {"prompt": [SYSTEM, USER]}
SAME = [  # what TRL reads right as it stands
    ("preference", TEXT),
    ("preference", CHAT),
    ("preference", {"chosen": "ab", "rejected": "ac"}),
    ("preference", WHOLE),
    ("sft", {"prompt": "1+2=", "completion": "3"}),
    ("sft", {"messages": [USER, SAID]}),
    ("sft", {"text": "abc"}),
    ("sft", {"input_ids": [1, 2]}),
    ("sft", {"conversations": [{"from": "user", "value": "a"}]}),
    ("prompt", {"prompt": "1+2=", "answer": 3}),
    ("prompt", {"prompt": [USER]}),
]


def made(rows, stream=False):
    return IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)


# rows


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        *((kind, row, row) for kind, row in SAME),
        *(
            ("preference", {"prompt": prompt, **answers}, CHAT)
            for prompt, answers in (
                *(("1+2=", WHOLE), (" 1+2=\n", WHOLE), ("1+2=", ANSWERS)),  # the first is UltraFeedback's export
                *(([USER], WHOLE), ([USER], TEXTS), ([PARTS], ANSWERS)),
            )
        ),
        ("preference", {"prompt": "1+2=", **INSTRUCTED}, {**CHAT, **INSTRUCTING}),
        *(
            ("sft", {"prompt": prompt, "completion": answer}, {"prompt": [USER], "completion": [SAID]})
            for prompt, answer in (("1+2=", [USER, SAID]), ([USER], [USER, SAID]), ([USER], "3"))
        ),
        ("sft", {"prompt": [USER], "completion": INSTRUCTED["chosen"]}, {"completion": [SAID], **INSTRUCTING}),
        ("sft", {"messages": [PARTS, PARTS]}, {"messages": [USER, USER]}),
        ("sft", {"prompt": "1+2=", "messages": [USER, SAID]}, {"messages": [USER, SAID]}),  # UltraChat's export
        ("prompt", {"prompt": [PARTS]}, {"prompt": [USER]}),
    ],
)
def test_layouts_that_say_the_same_are_understood(kind, row, expected, stream):
    found = list(check_layout(made([row, row], stream), "train", kind))
    assert found == [expected, expected]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "row", "expected", "noted"),
    [
        *[("preference", {name: "1+2=", **TEXTS}, TEXT, name) for name in "question instruction query input".split()],
        ("preference", {"instruction": "1+2=", "input": "", **TEXTS}, TEXT, "instruction"),
        ("preference", {"question": "1+2=", **ANSWERS}, CHAT, "question"),
        ("preference", {"question": "1+2=", **WHOLE}, CHAT, "question"),
        *(("preference", {"question": [turn], **TEXTS}, CHAT, "question") for turn in (USER, PARTS)),
        ("sft", {"query": "1+2=", "completion": "3"}, {"prompt": "1+2=", "completion": "3"}, "query"),
        ("prompt", {"question": "1+2=", "answer": "3"}, {"prompt": "1+2=", "question": "1+2="}, "question"),
    ],
)
def test_columns_that_hold_the_prompt_are_understood_and_said(kind, row, expected, noted, stream, caplog):
    with caplog.at_level("INFO", "ceu_rl"):
        (found,) = check_layout(made([row], stream), "train", kind)
    read = (*expected, "prompt", "completion", "chosen", "rejected", "messages", "conversations")
    assert {name: value for name, value in found.items() if name in read} == expected
    assert f"'{noted}'" in caplog.text and "train dataset" in caplog.text


def test_columns_about_a_row_are_left_alone(caplog):
    ultra = {"prompt": "1+2=", "prompt_id": "a1", "messages": [USER, SAID], **WHOLE, "score_chosen": 1.0}
    found = check_layout(made([ultra, ultra]), "train", "preference")
    assert set(found.column_names) == {*TEXT, "prompt_id", "score_chosen"}  # TRL may judge the layout by messages
    hh = {"chosen": "Human: Hi Assistant: A", "rejected": "Human: Hi Assistant: B", "source": "hh", "n": 1}
    with caplog.at_level("INFO", "ceu_rl"):
        found = check_layout(made([hh]), "train", "preference")
    assert found.to_list() == [hh] and "['n', 'source'] is not read" in caplog.text


def test_a_dataset_in_trls_own_layout_is_not_copied():
    dataset = made([CHAT, CHAT])
    assert check_layout(dataset, "train", "preference") is dataset


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        *[("preference", {**TEXT, c: "Be brief."}, f"has '{c}'") for c in ("question", "System_Message", "passages")],
        ("preference", {**CHAT, "messages": [{**USER, "content": "5+5="}, SAID]}, "'messages'"),
        *[("preference", {**row, "system": "Add."}, "'system'") for row in (TEXT, CHAT, WHOLE)],
        ("prompt", {"system": "Add.", "prompt": [USER]}, "'system'"),
        ("preference", {"question": 3, **TEXTS}, "'question'"),
        ("preference", {"instruction": "1", "input": "+2", **TEXTS}, "'input'"),
        ("preference", {"question": "a", "query": "b", **TEXTS}, "'query'"),
        ("preference", {"题目": "法国的首都是哪里", "chosen": "首都是巴黎", "rejected": "首都是伦敦"}, "'题目'"),
        ("preference", {"turns": [{**USER, "content": "What is 1+2?"}], **TEXTS}, "'turns'"),
        ("sft", {"text": "a", "Instruction": "Of old."}, "'Instruction'"),
        ("sft", {"system": "Add.", "conversations": [{"from": "human", "value": "a"}]}, "'system'"),
        *(("sft", {"prompt": "b", **row}, "'prompt'") for row in ({"text": "a"}, {"messages": [USER, SAID]})),
        ("prompt", {"question": " "}, "'question'"),
        ("preference", {"prompt": "a", "choosen": "b", "rejected": "c"}, "no column 'chosen'.*rename 'choosen'"),
        ("sft", {"prompt": "a"}, "no column 'completion'"),
        ("sft", {"completion": "a"}, "no column 'prompt'"),
        ("sft", {"message": []}, "no column 'messages'.*rename 'message'"),
        ("prompt", {"asked": "a"}, "no column 'prompt'"),
        *[("preference", {**TEXT, c: v}, f"has an empty '{c}'") for c in TEXT for v in ("", " \n", None)],
        *[("preference", {**CHAT, c: []}, f"has an empty '{c}'") for c in ("prompt", "chosen")],
        *[
            ("preference", {**CHAT, "chosen": [{**SAID, "content": content}]}, "has an empty 'chosen'")
            for content in (" ", None, [{"type": "text", "text": ""}])
        ],
        ("sft", {"messages": [USER, {**SAID, "content": ""}]}, "has an empty 'messages'"),
        ("preference", {**TEXT, "chosen": 3}, "has a int as 'chosen' .3.; make it text"),
        ("preference", {**TEXT, "chosen": ["3"]}, "has the item '3' in 'chosen'"),
        ("preference", {**CHAT, "chosen": [{"content": "3"}]}, "has a message without a role .* in 'chosen'"),
        ("preference", {**CHAT, "chosen": [{**SAID, "content": 3}]}, "has a content of type int in 'chosen'"),
        *[
            ("preference", {**CHAT, "prompt": [message, USER]}, "has a message without content .* 'prompt'")
            for message in ({**USER, "content": ""}, {"role": "user", "value": "q"}, {**SYSTEM, "content": None})
        ],
        *[("prompt", {"prompt": chat([USER])}, "messages that are written as text") for chat in (str, json.dumps)],
        *[
            ("preference", {"prompt": prompt, **WHOLE}, "has words that are in no message of 'chosen' as 'prompt'")
            for prompt in ("5+5=", [SYSTEM, USER], [{**USER, "content": "5+5="}])
        ],
        ("preference", {**CHAT, "chosen": [USER, SAID]}, "has words that are in no message of 'rejected' as 'prompt'"),
        ("preference", {**CHAT, "chosen": [{**SAID, "content": [{"type": "image"}]}]}, "has content of type image"),
        ("preference", {**CHAT, "chosen": "3"}, "has text beside messages in 'chosen'"),
        ("sft", {"conversations": [{"x": 1}]}, "has a turn without from and value in 'conversations'"),
        *[("sft", {"input_ids": ids}, "has no token ids as 'input_ids'") for ids in ("abc", [1, -5], [])],
        ("sft", {"prompt": "1+2=", "completion": [USER]}, "has no answer in 'completion'"),
        ("sft", {"messages": "a"}, "has a str as 'messages'"),
        *[("sft", {"text": "a", "tools": tools}, "has a .* as 'tools'") for tools in ("hammer", 3, "")],
        *[("preference", {**CHAT, "chat_template_kwargs": v}, "has a .* as 'chat_template_kw") for v in ("{}", [1])],
    ],
)
def test_a_row_or_column_that_cannot_be_learned_from_is_named(kind, row, message, stream):
    with pytest.raises(ValueError, match=f"(Row 0 of the|The) train dataset .*{message}"):
        list(check_layout(made([row], stream), "train", kind))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (DatasetDict(train=made([TEXT]), test=made([TEXT])), "is DatasetDict.*; give one datasets.Dataset"),
        ("rows.jsonl", "is 'rows.jsonl'; give one datasets.Dataset"),
        ([TEXT], r"is \["),
        (None, "is None"),
        (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "has no rows"),
    ],
)
def test_what_is_no_dataset_is_named(value, message):
    with pytest.raises(ValueError, match=f"The train dataset {message}"):
        check_layout(value, "train", "preference")


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "", "reasoning_content": "1+2 is 3"},
        {"content": None, "thinking": "1+2 is 3"},
        {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"content": None, "function_call": {"name": "add", "arguments": "{}"}},
        {"content": [{"type": "text", "text": "See"}, {"type": "image", "image": "x.png"}]},
    ],
)
def test_a_turn_that_says_something_in_another_field_is_not_empty(turn):
    row = {**CHAT, "chosen": [{"role": "assistant", **turn}], "images": ["x.png"]}
    assert list(check_layout(made([row], stream=True), "train", "preference")) == [row]


def test_a_later_row_is_named_and_the_other_columns_stay():
    chats = [{"prompt": "1+2=", **WHOLE, "n": n} for n in range(4)]
    assert check_layout(made(chats), "train", "preference")["n"] == [0, 1, 2, 3]
    chats[2]["chosen"] = []
    with pytest.raises(ValueError, match="Row 2 of the eval dataset has an empty 'chosen'"):
        check_layout(made(chats), "eval", "preference")


def test_what_tokenized_rows_tell(caplog):
    caplog.set_level("INFO", "ceu_rl")
    pairs = {"prompt_ids": [[1, 2], []], "chosen_ids": [[3, 4], [3, 4]], "rejected_ids": [[3, 5], [3]]}
    pairs = Dataset.from_dict(pairs)
    for length, mode, cut, left in ((None, "keep_start", 0, 2), (3, "keep_start", 2, 1), (1, "keep_end", 3, 2)):
        args = SimpleNamespace(max_length=length, truncation_mode=mode, dataset_num_proc=None)
        caplog.clear()
        assert len(leave_ties_out(pairs, pairs, "train", args, True)) == left  # the prompt counts too
        assert f"{cut} answers cut at max_length ({length}); {2 - left} pairs left out" in caplog.text


# names


def script(**fields):
    names = {"dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test"}
    return SimpleNamespace(**{**names, "dataset_streaming": False, **fields})


def write(path, rows):
    match path.suffix:
        case ".csv":
            Dataset.from_list(rows).to_csv(path)
        case ".tsv":
            Dataset.from_list(rows).to_csv(path, sep="\t")
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"prompt": f"{n}+1=", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(20)]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_a_file_is_a_dataset_and_a_share_of_it_the_test_split(tmp_path, suffix):
    name = write(tmp_path / f"rows.{suffix}", ROWS)
    datasets, task = load("dpo", script(dataset_name=name), evaluates=False)
    assert datasets["train"].to_list() == ROWS and set(datasets) == {"train"} and task is None
    parted, _ = load("dpo", script(dataset_name=name, dataset_test_split="0.1"), evaluates=True)
    again, _ = load("dpo", script(dataset_name=name, dataset_test_split="0.1"), evaluates=True)
    assert len(parted["eval"]) == 2 and len(parted["train"]) == 18
    assert sorted(map(str, [*parted["train"], *parted["eval"]])) == sorted(map(str, ROWS))
    assert parted["eval"].to_list() == again["eval"].to_list()
    blind, _ = load("dpo", script(dataset_name=name, dataset_test_split="0.1"), evaluates=False)
    assert set(blind) == {"train"}  # what a later evaluation asks was not trained on
    assert blind["train"].to_list() == parted["train"].to_list()


LAYOUTS = [
    lambda q, a: {"chosen": [dict(USER, content=q), dict(SAID, content=a)], "rejected": [dict(USER, content=q), OTHER]},
    lambda q, a: {"chosen": f"{q} yes {a}", "rejected": f"{q} no"},
    lambda q, a: {"messages": [{**USER, "content": q}, {**SAID, "content": a}]},
    lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    lambda q, a: {"text": q},
    lambda q, a: {"prompt": f" {q}\n" if a == "a0" else q, "chosen": a, "rejected": "b"},
    lambda q, a: {"prompt": [{**USER, "content": q}], "completion": [{**SAID, "content": a}]},
    lambda q, a: {"question": q, "answer": a},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_prompt_is_in_both_parts_whatever_the_layout(tmp_path, layout):
    questions = [f"Is {n} odd?" for n in range(5)]
    rows = [layout(question, f"a{n}") for question in questions for n in range(4)]
    name = write(tmp_path / "rows.jsonl", rows)
    parts, _ = load("sft", script(dataset_name=name, dataset_test_split="0.3"), evaluates=True)
    asked = [{question for question in questions for row in part if question in str(row)} for part in parts.values()]
    assert set.union(*asked) == set(questions) and not set.intersection(*asked)
    assert len(parts["eval"]) == 8  # the next prompt after 6 rows


def test_a_prompt_of_many_rows_does_not_swell_the_test_split(tmp_path):
    often = [{"prompt": "often", "chosen": f"a{n}", "rejected": "b"} for n in range(91)]
    name = write(tmp_path / "rows.jsonl", [*often, *ROWS[:9]])
    parts, _ = load("dpo", script(dataset_name=name, dataset_test_split="0.1"), evaluates=True)
    assert len(parts["eval"]) == 9 and "often" not in parts["eval"]["prompt"]
    halves = write(tmp_path / "halves.jsonl", [{**row, "prompt": str(n % 2)} for n, row in enumerate(ROWS)])
    parts, _ = load("dpo", script(dataset_name=halves, dataset_test_split="0.1"), evaluates=True)
    assert len(parts["eval"]) == 10


@pytest.mark.parametrize("name", ["b[1].jsonl", "rows?1.jsonl", "*.jsonl", "r[2]/rows.jsonl"])
def test_a_file_name_is_no_pattern(tmp_path, name):
    write(tmp_path / "b1.jsonl", ROWS[:3])
    write(tmp_path / "rowsX1.jsonl", ROWS[:4])
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write(path, ROWS)
    datasets, _ = load("dpo", script(dataset_name=str(path)), evaluates=False)
    assert datasets["train"].to_list() == ROWS


@pytest.mark.parametrize("header", ["i,prompt,answer", ",prompt,answer", "\n\n,prompt,answer", "\ufeffi,prompt,answer"])
def test_a_cell_of_a_csv_is_the_text_that_stands_there(tmp_path, header):
    """Beside an index as pandas writes it too."""
    (tmp_path / "rows.csv").write_text(f'{header}\n0,q1,None\n1,q2,007\n2,"q,3",NA\n\n3,q4,\n')
    datasets, _ = load("grpo", script(dataset_name=str(tmp_path / "rows.csv")), evaluates=False)
    assert datasets["train"]["prompt"] == ["q1", "q2", "q,3", "q4"]
    assert datasets["train"]["answer"] == ["None", "007", "NA", None]


def every_way(path, method="sft"):
    """The rows of one file by each way that a recipe or TOFU names it."""
    kind = BUILDERS[path.suffix]
    (path.parent / "train").mkdir()
    shutil.copy(path, path.parent / "train" / f"train{path.suffix}")
    for fields in ({"dataset_name": str(path)}, {"dataset_name": str(path.parent / "train")}):
        for streaming in (False, True):
            yield load(method, script(**fields, dataset_streaming=streaming), evaluates=False)[0]["train"]
    if kind == "json":
        yield load_tofu(str(path.parent / "train"), "train")


def test_every_way_to_read_json_gives_what_stands_there(tmp_path):
    numbers = {"n": 1, "pi": 3.141592653589793, "tiny": 5e-324, "long": 2**70}
    call = {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": {"song": "x", **numbers}}}]}
    rows = [
        {"prompt": [USER], "completion": [call], "id": 1, "day": "2024-01-02", "tools": [{"name": "f", "song": {}}]},
        {"prompt": [USER], "completion": [SAID], "id": "12", "day": "2024-01-03", "tools": [{"name": "g"}]},
        {"prompt": "Sing", "completion": [SAID], "id": {"a": None}, "day": None, "tools": None, "late": [1, None, 2.5]},
    ]
    rows = [{**row, "at": "2024-01-02T10:00:00Z", "meta": {"days": ["2024-01-02"]}} for row in rows]
    write(tmp_path / "rows.jsonl", rows)
    columns = set().union(*rows)
    for found in every_way(tmp_path / "rows.jsonl"):
        read = [{"late": None, **row} for row in found]
        assert read == [{column: row.get(column) for column in columns} for row in rows], type(found)
        assert [type(row["id"]) for row in read] == [int, str, dict]


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_every_way_to_read_csv_gives_what_stands_there(tmp_path, suffix, separator):
    rows = [("q1", "001", "2024-01-02"), ("q2", "None", "1e3"), ("q3", "x" * 200_000, "")]
    lines = [("prompt", "completion", "at"), *rows]
    (tmp_path / f"rows.{suffix}").write_text("".join(f"{separator.join(line)}\n" for line in lines))
    for found in every_way(tmp_path / f"rows.{suffix}"):
        assert [tuple(value or "" for value in row.values()) for row in found] == rows


def test_a_file_may_be_packed(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b'{"day": "2024-01-02"}\n'))
    assert open_dataset(str(tmp_path / "rows.jsonl"), None)["train"].to_list() == [{"day": "2024-01-02"}]


def test_a_row_may_bring_what_the_chat_template_takes():
    for tools in (None, [], "[]", '[{"name": "f"}]'):
        check_layout(made([{**CHAT, "tools": tools, "chat_template_kwargs": {"a": 1}}], False), "train", "preference")
    check_layout(made([{"prompt": "a", "tools": "hammer"}], False), "train", "prompt")  # a column for a reward


def test_text_and_messages_are_not_mixed(tmp_path):
    """TRL decides by the first row."""
    text = {"prompt": "one and two", "chosen": "three", "rejected": "four"}
    for rows, message in (
        ([CHAT, text], "Row 1 of the train dataset is text, and row 0 is messages"),
        ([text, text, CHAT], "Row 2 of the train dataset is messages, and row 0 is text"),
    ):
        name = write(tmp_path / f"rows{len(rows)}.jsonl", rows)
        datasets, _ = load("dpo", script(dataset_name=name), evaluates=False)
        with pytest.raises(ValueError, match=message):
            check_layout(datasets["train"], "train", "preference")


def test_folders(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", ROWS)
    write(tmp_path / "files" / "test.jsonl", ROWS[:3])
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:3])).save_to_disk(tmp_path / "two")
    for folder, split, rows in (("files", "test", 3), ("one", "0.25", 5), ("two", "test", 3)):
        given = script(dataset_name=str(tmp_path / folder), dataset_test_split=split)
        datasets, _ = load("dpo", given, evaluates=True)
        assert len(datasets["eval"]) == rows and len(datasets["train"]) == 20 - (5 if split == "0.25" else 0)


@pytest.mark.parametrize(("files", "left"), [("a.jsonl b.csv", "b.csv"), ("train.jsonl more.jsonl", "more.jsonl")])
def test_a_file_that_datasets_does_not_read_is_named(tmp_path, caplog, files, left):
    for name in files.split():
        write(tmp_path / name, ROWS)
    with caplog.at_level("INFO", "ceu_rl"):
        assert len(open_dataset(str(tmp_path), None)["train"]) == len(ROWS)
    assert f"also holds {left}, which datasets does not read" in caplog.text


ONE = '{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("rows.jsonl", None, {}, "rows.jsonl is no file"),
        ("rows.jsonl", "", {}, "rows.jsonl has no rows"),
        ("rows.jsonl", ONE + '{"a": 1', {}, "Line 2 of .*rows.jsonl is no valid JSON .*; give one object on each line"),
        ("rows.jsonl", "[1, 2", {}, "rows.jsonl is no valid JSON .*, or one array of objects"),
        ("rows.jsonl", ONE + '{"a": {"b": "\\ud83d"}}', {}, "Line 2 of .*rows.jsonl has half a character"),
        ("rows.json", '[{}, {"\\ud83d": 1}]', {}, "Row 1 of .*rows.json has half a character"),
        ("rows.jsonl", ONE + '{"a": {"b": 1, "b": 1}}', {}, "Line 2 of .*rows.jsonl .* .'b' is given twice"),
        ("twice.csv", "prompt,chosen,,,chosen\na,b,,,c\n", {}, "twice.csv raised .* the header has 'chosen' twice"),
        ("rows.jsonl", ONE + '"a"', {}, "Line 2 of .* holds 'a'; give an object"),
        ("latin.jsonl", ONE.encode() + b'{"a": "\xe9"}\n', {}, "latin.jsonl is not UTF-8 .* at byte 16"),
        ("more.csv", "prompt,chosen,rejected\nHi, how?,c1,r1\n", {}, "row 0 has 4 fields and the header 3, so quote"),
        ("none.csv", "prompt,chosen\n", {}, "Reading dataset_name .*none.csv raised .* no data"),
        ("rows.txt", "a\n", {}, "rows.txt is a file of another kind; give one that ends in .jsonl, "),
        ("state.json", "{", {"dataset_name": "{tmp}"}, "Reading dataset_name .* raised"),
        ("rows.jsonl", None, {"dataset_name": "./nowhere"}, "./nowhere is no folder and no file"),
        ("rows.jsonl", ONE, {"dataset_config": "x"}, "dataset_config is 'x', and .* has no configs"),
        ("rows.jsonl", ONE, {"dataset_test_split": "0.1"}, "a part of the 1 rows is empty"),
        ("rows.jsonl", ONE, {"dataset_test_split": "1.5"}, "use a split's name or a share between 0 and 1"),
        ("rows.jsonl", ONE, {"dataset_test_split": "dev"}, r"'dev', .* \['train'\]; .* one, or a share"),
        ("rows.jsonl", ONE, {"dataset_train_split": "trian"}, r"train_split is 'trian', .* \['train'\]; name one\."),
        ("rows.jsonl", ONE, {"dataset_test_split": "0.5", "dataset_streaming": True}, "a streamed .* cannot be parted"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, name, content, fields, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fields = {key: str(tmp_path) if value == "{tmp}" else value for key, value in fields.items()}
    asked_only = fields.get("dataset_test_split") == "dev"  # a name is not looked for without evaluation
    for evaluates in (True,) if asked_only else (True, False):
        with pytest.raises(ValueError, match=message) as refusal:
            load("dpo", script(**{"dataset_name": str(tmp_path / name), **fields}), evaluates=evaluates)
        assert "\n" not in str(refusal.value)


def test_prompts_may_have_a_format_or_a_transform():
    rows = Dataset.from_list([{"prompt": f"{n}+1=", "number": n} for n in range(4)])
    for form in ("torch", "numpy"):
        given = rows.with_format(form)
        assert check_layout(given, "train", "prompt") is given
    asked = rows.rename_column("prompt", "asked").with_transform(lambda batch: {"prompt": batch["asked"]})
    assert check_layout(asked, "train", "prompt") is asked
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        check_layout(asked.with_transform(lambda batch: {"asked": batch["asked"]}), "train", "prompt")
