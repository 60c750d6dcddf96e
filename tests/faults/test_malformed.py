"""Bad input at volume: each ends in one sentence of ours or is understood, never in a traceback from a dependency.

The inputs are drawn by hypothesis, the same in every run.
"""

import contextlib
import json
import math
import string
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, IterableDataset, Json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ceu_rl import CEUDPOConfig, CEUDPOTrainer
from ceu_rl.cli import main
from ceu_rl.data.load import open_dataset
from ceu_rl.data.rows import CONTEXTS, QUESTIONS, SYSTEMS, _leaves, check_layout
from ceu_rl.run.config import parser_for, read_recipe


def volume(count):
    """So many inputs, the same each time; a fixture that is a folder is written over by each."""
    same = {"derandomize": True, "deadline": None, "database": None}
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), **same)


WORDS = st.text(string.printable + "é\u2028\u0085\ufeff{}[]:&*!|>%@`", max_size=12)
NOT_TEXT = (st.none(), st.booleans(), st.integers(-3, 10**6), st.floats())
SCALARS = st.one_of(*NOT_TEXT, WORDS, st.sampled_from(["1e-4", "no", "true", ".nan"]))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=5
)
FIELDS = sorted({action.dest for action in parser_for("dpo")._actions} - {"help"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("malformed")


@contextlib.contextmanager
def refused_in_a_sentence(*needed):
    """What is not understood ends in one line that has these words."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        assert text.strip() and "\n" not in text, text
        assert all(word in text for word in needed), text


# recipes


@volume(300)
@given(content=st.one_of(st.binary(max_size=60), WORDS.map(str.encode), VALUES.map(lambda v: json.dumps(v).encode())))
def test_files_that_are_no_recipe(folder, content):
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    with refused_in_a_sentence(str(path)):
        found = read_recipe("dpo", path)
        assert isinstance(found, dict)


@volume(300)
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | WORDS, VALUES, min_size=1, max_size=3))
def test_recipes_with_fields_of_every_type(folder, fields):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with refused_in_a_sentence(str(path)):
        found = read_recipe("dpo", path)
        assert {name.replace("-", "_") for name in fields} == set(found)


# rows

SAYS = {"content": WORDS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2)}
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS, "arguments": VALUES})})
MORE = {"reasoning_content": WORDS, "thinking": WORDS, "tool_calls": st.lists(CALL, max_size=2)}
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, **SAYS}, optional=MORE), max_size=3)
CELLS = st.one_of(SCALARS, WORDS, MESSAGES, st.lists(WORDS, max_size=2))
ASKED = (*QUESTIONS, *SYSTEMS, *CONTEXTS, "answer", "problem", "prompt_id", "tools")
NAMES = ("prompt", "chosen", "rejected", "completion", "messages", "text", "prompts")
ROWS = st.fixed_dictionaries({}, optional={name: CELLS for name in (*NAMES, *ASKED)})
# Rows that are right but for the columns beside
PAIRS = st.fixed_dictionaries(
    {"chosen": st.just("It is three"), "rejected": st.just("It is four")},
    optional={name: CELLS for name in ("prompt", "messages", *ASKED)},
)
KINDS = st.sampled_from(["preference", "sft", "prompt"])


@volume(400)
@given(rows=st.lists(ROWS | PAIRS, min_size=1, max_size=3), kind=KINDS, streaming=st.booleans())
def test_rows_of_every_layout(rows, kind, streaming):
    dataset = dataset_of(rows)
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    with refused_in_a_sentence("train dataset"):
        checked = list(check_layout(stream if streaming else dataset, "train", kind))
        assert len(checked) == len(dataset)
        # No question is lost: what stands beside an answer is in what is learned, or was refused
        for before, after in zip(dataset, checked, strict=True):
            if kind == "preference":
                learned = squeezed(str([texts(after.get(name)) for name in ("prompt", "chosen", "rejected")]))
                for name in (*QUESTIONS, *SYSTEMS, *CONTEXTS):
                    assert all(squeezed(str([text]))[2:-2] in learned for text in texts(before.get(name))), name


def dataset_of(rows):
    columns = {name: Json() for row in rows for name in row}
    encoded = [{name: json.dumps(row.get(name)) for name in columns} for row in rows]
    return Dataset.from_list(encoded, features=Features(columns))


def texts(cell):
    return list(_leaves(cell))


def squeezed(text):
    return " ".join(text.split())


@volume(200)
@given(
    rows=st.lists(ROWS | PAIRS | st.dictionaries(WORDS, VALUES, max_size=3), min_size=1, max_size=4),
    array=st.booleans(),
    streaming=st.booleans(),
)
def test_rows_of_a_file_are_what_stands_there(folder, rows, array, streaming):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    with refused_in_a_sentence(str(path)):
        found = list(open_dataset(str(path), None, streaming=streaming)["train"])
        assert [{name: row.get(name) for name in found[0]} for row in map(plain, rows)] == [*map(plain, found)]


def plain(value):
    """As JSON has it, to the digits that a cell of mixed kinds keeps."""
    text = json.dumps(value)
    digits = dict(parse_float=lambda number: f"{float(number):.12g}", parse_int=str)
    return json.loads(text, parse_constant=lambda _: None, **digits)


@volume(60)
@given(rows=st.lists(ROWS.filter(lambda row: {"chosen", "rejected"} <= set(row)) | PAIRS, min_size=1, max_size=2))
def test_rows_through_the_trainer(folder, tiny_model, tokenizer, rows):
    dataset = dataset_of(rows)
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    args = CEUDPOConfig(str(folder / "run"), max_steps=1, save_strategy="no", report_to="none", **settings)
    with refused_in_a_sentence("train dataset"):
        trainer = CEUDPOTrainer(tiny_model(), tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


# code in the place of data


class Payload:
    """What unpickling it does is to make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def code(folder, ran):
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")


def mapped(folder, ran, **fields):
    code(folder / "base", ran)
    config = folder / "base" / "config.json"
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": classes, **fields}))


def mapped_and_unknown(folder, ran):
    mapped(folder, ran, model_type="mine")


def pickled_beside(folder, ran):
    torch.save(Payload(ran), folder / "base" / "pytorch_model.bin")


def pickled_alone(folder, ran):
    pickled_beside(folder, ran)
    (folder / "base" / "model.safetensors").unlink()


def script_of_data(folder, ran):
    code(folder / "data", ran)
    (folder / "data" / "code.py").rename(folder / "data" / "data.py")


@pytest.mark.parametrize(
    ("make", "status"),
    [(mapped, 0), (mapped_and_unknown, 2), (pickled_beside, 0), (pickled_alone, 2), (script_of_data, 2)],
)
def test_nothing_that_is_loaded_runs(recipe, preferences, tmp_path, capsys, make, status):
    """Code and pickles that come with a model or a dataset; `trust_remote_code` is not set."""
    preferences.to_json(tmp_path / "data" / "train.jsonl")
    make(tmp_path, tmp_path / "ran")
    assert main(["dpo", "--config", recipe(dataset_name=str(tmp_path / "data"), max_steps=1)]) == status
    assert not (tmp_path / "ran").exists()
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("ceu-rl dpo: error: ") == (status != 0)
    assert make is not pickled_alone or "take safetensors" in err
