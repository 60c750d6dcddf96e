"""A recipe and what the command line changes of it, read once: the settings of a run, each of the type of its field.

    ceu-rl METHOD --config RECIPE.yaml [--any_field value ...]

Fields, their types and their help are those of TRL's and of our configs. `--any-field` is the same as `--any_field`,
`--model` as `--model_name_or_path`, and `--dataset` as `--dataset_name`. Nothing here imports torch before it is asked
for a method: `set_variables` of a recipe comes first.
"""

import argparse
import copy
import difflib
import logging
import os
import re
import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

METHODS = ("dpo", "grpo", "sft", "unlearn")
# Where a run lies and how it continues is not what it is; a secret is not recorded
NO_SETTINGS = ("output_dir", "resume_from_checkpoint", "hub_token")
ALIASES = {"model": "model_name_or_path", "dataset": "dataset_name"}
# What the help of a command opens with, beside the fields of our own classes
USED = (
    *("model_name_or_path", "dataset_name", "dataset_test_split", "output_dir", "learning_rate", "max_steps"),
    *("per_device_train_batch_size", "max_length", "use_peft", "resume_from_checkpoint"),
)
USED_BY = {"sft": ("packing",), "dpo": ("beta", "loss_type"), "grpo": ("reward_funcs", "num_generations", "use_vllm")}
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
_PARSER = threading.Lock()


def classes_of(method: str) -> tuple[Any, Any, Any]:
    """Script arguments, config and trainer of a method. GRPO's bring vLLM, which takes seconds to import."""
    from .retention import with_kept

    script, config, trainer = _classes_of(method)
    return with_kept(script), config, trainer


def _classes_of(method: str) -> tuple[Any, Any, Any]:
    from trl import SFTConfig

    from ..data.prompts import PromptArguments

    match method:
        case "dpo":
            from ..dpo import CEUDPOConfig, CEUDPOTrainer

            return PromptArguments, CEUDPOConfig, CEUDPOTrainer
        case "grpo":
            from trl.scripts.grpo import GRPOScriptArguments

            from ..grpo import CEUGRPOConfig, CEUGRPOTrainer

            return GRPOScriptArguments, CEUGRPOConfig, CEUGRPOTrainer
        case "unlearn":
            from ..unlearn import UnlearnConfig, UnlearnScriptArguments, UnlearnTrainer

            return UnlearnScriptArguments, UnlearnConfig, UnlearnTrainer
    from ..sft import WholeSFTTrainer

    return PromptArguments, SFTConfig, WholeSFTTrainer


def parser_for(method: str) -> Any:
    """TRL's parser for the fields of one method: `ceu-rl METHOD --help-all` is its help."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    script, config, _ = classes_of(method)
    with _PARSER:  # it rewrites the types of the classes' fields, and the runs of a comparison are read in threads
        parser = TrlParser(
            (script, config, ModelConfig, DatasetMixtureConfig),  # type: ignore[arg-type]
            prog=f"ceu-rl {method}",
            usage=f"ceu-rl {method} --config RECIPE.yaml [--any_field value ...]",
            allow_abbrev=False,
        )
    for short, name in ALIASES.items():
        action = next(action for action in parser._actions if action.dest == name)
        action.option_strings.append(f"--{short}")  # type: ignore[attr-defined]
        parser._option_string_actions[f"--{short}"] = action
    return parser


def print_help(method: str, all_fields: bool) -> None:
    """The fields of our own classes and those that are used most, or all that TRL's classes have too."""
    parser = parser_for(method)
    if all_fields:
        return parser.print_help()
    script, config, *_ = parser.dataclass_types
    classes = [kind for each in (config, script) for kind in each.__mro__ if kind.__module__.startswith("ceu_rl")]
    own = [name for kind in classes for name in vars(kind).get("__annotations__", {})]
    used = [name for name in (*USED, *USED_BY.get(method, ())) if name not in own]
    shown = argparse.ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        add_help=False,
        description="--config RECIPE.yaml gives any of these as `field: value`; what stands beside it goes before.",
        epilog=f"{parser.prog} --help-all shows all that TRL has.",
    )
    for title, names in (("of this package", own), ("used most, of TRL", used)):
        group = shown.add_argument_group(title)
        for action in (
            copy.copy(each) for name in dict.fromkeys(names) for each in parser._actions if each.dest == name
        ):
            action.option_strings = [each for each in action.option_strings if "-" not in each.removeprefix("--")]
            group._add_action(action)
    shown.print_help()


def set_variables(argv: Sequence[str]) -> None:
    """Set the variables of the field `env` of a command line's recipe; torch and CUDA read some when they start."""
    recipe, _ = _split_config(argv)
    if recipe and (variables := _load_yaml(recipe).get("env")):
        _check_variables(variables, recipe)
        os.environ.update({name: str(value) for name, value in variables.items()})


def read_recipe(method: str, path: str | Path) -> dict[str, Any]:
    """The fields of a recipe, typed.

    Raises:
        ValueError: with the file, for what is no UTF-8, no YAML or no mapping, and with the field for one that is given
            twice, that the method does not have, or whose value has another type.
        OSError: if it cannot be read.
    """
    return _Fields(parser_for(method), method).of_recipe(Path(path))


def recipe_method(path: str | Path) -> str:
    """The field `method` of a recipe: the command that trains it.

    Raises:
        ValueError: for a recipe that [`read_recipe`] cannot read, or whose method is missing or unknown.
        OSError: if it cannot be read.
    """
    method = _load_yaml(Path(path)).get("method")
    if method not in METHODS:
        raise ValueError(f"{path}: method is {method!r}; write one of {', '.join(METHODS)}, as in `method: dpo`.")
    return str(method)


def read_arguments(method: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a command line asks for: the fields of its recipe, then those that it gives itself, typed.

    Raises:
        ValueError: as for [`read_recipe`], and for words that are no option.
        SystemExit: after `--help` and `--help-all`, and from argparse for a value that an option does not take.
    """
    if asked := {"-h", "--help", "--help-all"} & set(argv):
        print_help(method, "--help-all" in asked)
        raise SystemExit(0)
    fields = _Fields(parser_for(method), method)
    recipe, rest = _split_config(argv)
    return {**(fields.of_recipe(recipe) if recipe else {}), **fields.of_words(rest)}


def read_settings(method: str, argv: Sequence[str]) -> dict[str, Any]:
    """The settings of a run: [`read_arguments`] without where it lies and whether it is resumed."""
    return settings_of(read_arguments(method, argv))


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of a run."""
    return {name: value for name, value in arguments.items() if name not in NO_SETTINGS}


def with_defaults(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and, of each field that they do not give, its default."""
    defaults = {action.dest: action.default for action in parser_for(method)._actions if action.dest != "help"}
    return {name: value for name, value in defaults.items() if name not in NO_SETTINGS} | dict(settings)


def build_configs(method: str, arguments: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Script arguments, training config, model config and dataset mixture."""
    import torch

    from .checks import check_numbers

    check_numbers(arguments)
    # A copy: the config of a mixture writes its own objects into what it is given, which is recorded as it was
    fields = {name: copy.deepcopy(value) for name, value in arguments.items() if name != "env"}
    if not (torch.accelerator.is_available() or "use_cpu" in fields or "RANK" in os.environ):
        logging.getLogger(__name__).info("No GPU was found: use_cpu is true, and bf16 false unless it is given.")
        fields = {"bf16": False, **fields, "use_cpu": True}
    return parser_for(method).parse_dict(fields)


def _split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe of `--config`, and the other words."""
    found, rest = [], list(argv)
    while at := next((i for i, word in enumerate(rest, 1) if word == "--config" or word.startswith("--config=")), 0):
        word = rest.pop(at - 1)
        if word == "--config" and (at > len(rest) or rest[at - 1].startswith("--")):
            raise ValueError("--config has no value; give a recipe: --config RECIPE.yaml.")
        found.append(rest.pop(at - 1) if word == "--config" else word.removeprefix("--config="))
    if len(found) > 1:
        raise ValueError(f"--config is given {len(found)} times ({', '.join(found)}); give one recipe.")
    if found and not Path(found[0]).is_file():
        raise ValueError(f"--config names {found[0]!r}, which is no file; give a recipe: --config RECIPE.yaml.")
    return (Path(found[0]) if found else None), rest


class _Fields:
    """The fields of a method's parser, and how a value becomes one of theirs."""

    def __init__(self, parser: Any, method: str | None = None) -> None:
        self.parser, self.method = parser, method
        self.hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
        self.actions = {action.dest: action for action in reversed(parser._actions)}

    def of_words(self, words: Sequence[str]) -> dict[str, Any]:
        """The fields that a command line gives, through argparse."""
        for action in self.parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        self.actions["resume_from_checkpoint"].nargs, self.actions["resume_from_checkpoint"].const = "?", "true"
        namespace, rest = self.parser.parse_known_args(list(words))
        if rest:
            raise ValueError(self._unknown(rest[0]))
        return {name: self._typed(name, value, f"--{name}") for name, value in vars(namespace).items()}

    def of_recipe(self, path: Path) -> dict[str, Any]:
        """The fields of a file."""
        content = _load_yaml(path)
        fields: dict[str, Any] = {}
        for key, value in content.items():
            name = str(key).replace("-", "_")
            name = ALIASES.get(name, name)
            if name in fields:
                raise ValueError(f"{path} gives {name} twice; give it once.")
            if name == "method":
                if value != self.method:
                    raise ValueError(f"{path}: method is {value!r}; train it with ceu-rl {value} --config {path}.")
                continue
            if name == "env":
                _check_variables(value, path)
            elif name not in self.actions or name not in self.hints:
                raise ValueError(f"{path}: {self._unknown(str(key))}")
            fields[name] = value if name == "env" else self._typed(name, value, f"{path}: {name}")
        return fields

    def _unknown(self, word: str) -> str:
        if not word.startswith("-") and Path(word).suffix in (".yaml", ".yml"):
            return f"{word} is no option; write --config {word}."
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        close = difflib.get_close_matches(name, self.hints, n=1)
        if not close and not word.startswith("-") and " " in word:
            return f"{word!r} is no option; write --field value."
        hint = f"did you mean {close[0]}?" if close else f"{self.parser.prog} --help-all lists what there is."
        return f"There is no field {word!r}; {hint}"

    def _typed(self, name: str, value: Any, where: str) -> Any:
        """The value as its field's type has it: text that is a number, a whole number for a float, one for a list."""
        if name == "resume_from_checkpoint" and isinstance(value, bool):
            return str(value).lower()  # true is the last one, a text the folder of one
        if name == "scale_rewards" and isinstance(value, bool):
            return value  # TRL's type is text, and it takes both
        hint = self.hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        lists = [kind for kind in kinds if get_origin(kind) is list or kind is list]
        if lists and not isinstance(value, list | dict | None) and not (isinstance(value, str) and str in kinds):
            value = [value]
        if isinstance(value, list) and lists:
            inner: Any = (*get_args(lists[0]), Any)[0]
            value = [_convert(each, (inner,)) for each in value]
        else:
            value = _convert(value, kinds)
        try:
            if not any(hasattr(inner, "__dataclass_fields__") for kind in lists for inner in get_args(kind)):
                type_validator(name, value, hint)
        except TypeError:
            wanted = [WORDS.get(get_origin(kind) or kind) for kind in kinds]
            words = " or ".join(dict.fromkeys(word for word in wanted if word)) or str(hint)
            quotes = ", in quotes where YAML reads it as something else" if str in kinds else ""
            raise ValueError(f"{where} is {value!r}; use {words}{quotes}.") from None
        return value


def _convert(value: Any, kinds: Iterable[Any]) -> Any:
    """Text of a number or a truth value, and a whole number for a float; what fits no kind is left as it is."""
    kinds = tuple(kinds)
    if isinstance(value, str) and str not in kinds:
        for kind in (bool, int, float):
            if kind in kinds:
                try:
                    return _truth(value) if kind is bool else kind(value)
                except ValueError:
                    continue
    if isinstance(value, int) and not isinstance(value, bool) and int not in kinds:
        if float in kinds:
            return float(value)
        if bool in kinds and value in (0, 1):
            return bool(value)
    return value


def _truth(text: str) -> bool:
    from transformers.hf_argparser import string_to_bool

    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error


def _check_variables(value: Any, path: Path) -> None:
    if (
        not isinstance(value, dict)
        or not all(isinstance(name, str) and name and not {"=", "\0"} & set(name) for name in value)
        or not all(isinstance(each, str | int | float) and "\0" not in str(each) for each in value.values())
    ):
        raise ValueError(f"{path}: env is {value!r}; give NAME: value lines, the variables of the environment.")


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that the loader below would read as numbers."""


class _OnceLoader(yaml.SafeLoader):
    """YAML in which each key of a mapping is given once; PyYAML keeps the last and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the parent refuses it, or merges it
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice; give it once", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# Numbers as YAML 1.2 has them, and no dates: 0100 is not 64, 1:30 not 90, and 1e-5 is a number
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
}
_OnceLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag.rsplit(":", 1)[1] not in (*_NUMBERS, "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    for _kind in (_OnceLoader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list("-+.0123456789"))


def dump_recipe(settings: Mapping[str, Any]) -> str:
    """The text of a recipe with these settings."""
    return str(yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _load_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), _OnceLoader)  # a subclass of the safe loader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except RecursionError:
        raise ValueError(f"{path} is no valid recipe (it is nested too deeply).") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path} is no valid recipe ({line}{' '.join(problem.split())}).") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else repr(content)
        raise ValueError(f"{path} holds {held}; write `field: value` lines.")
    return content
