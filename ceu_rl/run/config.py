"""A recipe and what the command line changes of it, read once: the settings of a run, each of the type of its field.

    ceu-rl METHOD --config RECIPE.yaml [--any_field value ...]

Fields, their types and their help are those of TRL's and of our configs. `--any-field` is the same as `--any_field`,
`--model` as `--model_name_or_path`, and `--dataset` as `--dataset_name`. A recipe's value is read as the same words on
the command line: `1e-4` is a number, and `no` a text where texts are asked for. Nothing here imports torch before it is
asked for a method: `set_variables` of a recipe comes first.
"""

import argparse
import copy
import difflib
import inspect
import logging
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

# Script arguments, config and trainer of each method. They are names, because importing GRPO's takes seconds
CLASSES = {
    "dpo": ("ceu_rl.data.prompts:PromptArguments", "ceu_rl.dpo:CEUDPOConfig", "ceu_rl.dpo:CEUDPOTrainer"),
    "grpo": ("trl.scripts.grpo:GRPOScriptArguments", "ceu_rl.grpo:CEUGRPOConfig", "ceu_rl.grpo:CEUGRPOTrainer"),
    "sft": ("ceu_rl.data.prompts:PromptArguments", "trl:SFTConfig", "ceu_rl.sft:WholeSFTTrainer"),
    "unlearn": (
        *("ceu_rl.unlearn:UnlearnScriptArguments", "ceu_rl.unlearn:UnlearnConfig", "ceu_rl.unlearn:UnlearnTrainer"),
    ),
}
# Where a run lies and how it continues is not what it is; a secret is not recorded
NO_SETTINGS = ("output_dir", "resume_from_checkpoint", "hub_token")
ALIASES = {"model": "model_name_or_path", "dataset": "dataset_name"}
# A truth value or a number, or else a text; argparse knows one type of a field
MIXED = ("scale_rewards", "pad_to_multiple_of", "include_num_input_tokens_seen", "trackio_static_space_id")
# What the help of a command shows after the fields of our own config
USED = (
    *("model_name_or_path", "dataset_name", "dataset_test_split", "output_dir", "learning_rate", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "max_length", "use_peft", "resume_from_checkpoint"),
    *("packing", "beta", "reward_funcs", "num_generations", "use_vllm"),
)


def parser_for(method: str) -> Any:
    """TRL's parser for the fields of one method: `ceu-rl METHOD --help-all` is its help."""
    from trl import ModelConfig, TrlParser

    from .retention import KeptArguments

    script, config = map(pkgutil.resolve_name, CLASSES[method][:2])
    parser = TrlParser(
        (script, config, ModelConfig, KeptArguments),  # type: ignore[arg-type]
        prog=f"ceu-rl {method}",
        usage=f"ceu-rl {method} --config RECIPE.yaml [--any_field value ...]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    for action in parser._actions:
        short = next((f"--{short}" for short, name in ALIASES.items() if name == action.dest), None)
        if short:
            action.option_strings.append(short)  # type: ignore[attr-defined]
            parser._option_string_actions[short] = action
        elif action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"  # the last one
        elif action.dest in MIXED:
            action.type = yaml.safe_load
    return parser


def print_help(method: str, all_fields: bool) -> None:
    """The fields of our own classes and those that are used most, or all that TRL's classes have too."""
    parser = parser_for(method)
    if not all_fields:
        script, config, *others = parser.dataclass_types

        def own(*classes: Any) -> list[str]:
            ours = [kind for each in classes for kind in each.__mro__ if kind.__module__.startswith("ceu_rl")]
            return [name for kind in ours for name in vars(kind).get("__annotations__", {})]

        actions = {action.dest: action for action in reversed(parser._actions)}
        actions["resume_from_checkpoint"].help = "A checkpoint to go on from, alone the last one in output_dir."
        names = dict.fromkeys([*own(config), *USED, *own(script, *others)])
        shown = [actions[name] for name in names if name in actions]
        for action in shown:
            action.option_strings = [each for each in action.option_strings if "-" not in each.removeprefix("--")]
        parser._optionals._group_actions = shown
        parser.description = "--config RECIPE.yaml gives any of these as `field: value`; the command line goes first."
        parser.epilog = f"{parser.prog} --help-all shows all that TRL has."
    parser.print_help()


def set_variables(argv: Sequence[str]) -> None:
    """Set the variables of the field `env` of a command line's recipe; torch and CUDA read some when they start."""
    recipe, _ = _split_config(argv)
    if recipe and (variables := load_yaml(recipe).get("env")):
        os.environ.update({str(name): str(value) for name, value in _check_variables(variables, recipe).items()})


def read_recipe(method: str, path: str | Path) -> dict[str, Any]:
    """The fields of a recipe, typed.

    Raises:
        ValueError: with the file, for what is no recipe, and with the field for one that is given twice, that the
            method does not have, or whose value has another type.
    """
    path, parser = Path(path), parser_for(method)
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    content = load_yaml(path, typed=False)
    if (named := content.pop("method", method)) != method:
        raise ValueError(f"{path}: method is {named!r}; train it with ceu-rl {named} --config {path}.")
    fields = {"env": _check_variables(content.pop("env"), path)} if "env" in content else {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = ALIASES.get(name, name)
        if name in fields:
            raise ValueError(f"{path} gives {name} twice; give it once.")
        if isinstance(value, str) or name not in hints:
            fields |= _parse(parser, [f"--{name}={value}"], f"{path}: ")
        elif name in lists and value and all(isinstance(each, str) for each in value):
            fields |= _parse(parser, [f"--{name}", *value], f"{path}: ")
        else:  # which no word says: null, a mapping, or a list for a field that may also be a text
            fields[name] = value
            try:
                type_validator(name, value, hints[name])
            except TypeError:
                wanted = inspect.formatannotation(hints[name])
                raise ValueError(f"{path}: {name} is {value!r}; give a value of type {wanted}.") from None
    return fields


def recipe_method(path: str | Path) -> str:
    """The field `method` of a recipe: the command that trains it; a ValueError where it is missing or unknown."""
    method = load_yaml(Path(path)).get("method")
    if method not in CLASSES:
        raise ValueError(f"{path}: method is {method!r}; write one of {', '.join(CLASSES)}, as in `method: dpo`.")
    return str(method)


def read_arguments(method: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a command line asks for: the fields of its recipe, then those that it gives itself, typed.

    Raises:
        ValueError: as for [`read_recipe`], and for words that are no option.
    """
    if asked := {"-h", "--help", "--help-all"} & set(argv):
        print_help(method, "--help-all" in asked)
        raise SystemExit(0)
    recipe, words = _split_config(argv)
    return {**(read_recipe(method, recipe) if recipe else {}), **_parse(parser_for(method), words)}


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run: its arguments without where it lies and whether it is resumed."""
    return {name: value for name, value in arguments.items() if name not in NO_SETTINGS}


def with_defaults(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and, of each field that they do not give, its default."""
    defaults = {action.dest: action.default for action in parser_for(method)._actions if action.dest != "help"}
    return settings_of(defaults) | dict(settings)


def build_configs(method: str, arguments: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Script arguments, training config, model config, and what the model should keep."""
    import torch

    from .checks import check_numbers

    check_numbers(arguments)
    fields = copy.deepcopy({name: value for name, value in arguments.items() if name != "env"})
    if not (torch.accelerator.is_available() or "use_cpu" in fields or "RANK" in os.environ):
        logging.getLogger(__name__).info("No GPU was found: use_cpu is true, and bf16 false unless it is given.")
        fields = {"bf16": False, **fields, "use_cpu": True}
    return parser_for(method).parse_dict(fields)


def _split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe of `--config`, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", type=Path, default=[])
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError:
        raise ValueError("--config has no value; give a recipe: --config RECIPE.yaml.") from None
    recipe, *others = found.config or [None]
    if others:
        raise ValueError(f"--config is given {len(found.config)} times; give one recipe.")
    return recipe, rest


def _parse(parser: Any, words: Sequence[str], where: str = "") -> dict[str, Any]:
    """The fields that words of a command line give."""
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    try:
        namespace, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"{where}{error}.") from None
    if rest:
        if Path(rest[0]).suffix in (".yaml", ".yml"):
            raise ValueError(f"{rest[0]} is no option; write --config {rest[0]}.")
        name = rest[0].lstrip("-").partition("=")[0]
        asked, fields = name.replace("-", "_"), [action.dest for action in parser._actions]
        # batch_size is a part of its field's name, and lr are its first letters
        used = [one for one in USED if one in fields and asked.isidentifier()]
        stem = asked.removesuffix("s") if len(asked) > 3 else asked  # as in TRL's datasets
        named = [one for one in used if stem in one or asked == "".join(word[0] for word in one.split("_"))]
        close = named or difflib.get_close_matches(asked, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"{parser.prog} --help-all lists what there is."
        raise ValueError(f"{where}There is no field {name!r}; {hint}")
    return vars(namespace)


def _check_variables(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(each, str | int | float) for each in value.values()):
        raise ValueError(f"{path}: env is {value!r}; give NAME: value lines, the variables of the environment.")
    return value


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that the loader would read as numbers."""


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


_OnceLoader.yaml_constructors = {  # a date is a text
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
}
for _kind in (_OnceLoader, _Dumper):  # 1e-5 is a number, as in YAML 1.2
    _number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+0123456789"))


def dump_recipe(settings: Mapping[str, Any]) -> str:
    """The text of a recipe with these settings."""
    return str(yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def load_yaml(path: Path, typed: bool = True) -> dict[Any, Any]:
    """A mapping; unless `typed`, its numbers and truth values are the texts that stand there."""
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder; name a file in it' if path.is_dir() else 'no file; check its name'}.")
    try:
        loader = _OnceLoader(path.read_bytes().decode("utf-8-sig"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
        if not typed and isinstance(node, yaml.MappingNode):
            content = {key.value: _texts(value, loader) for key, value in node.value}
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


def _texts(node: yaml.Node, loader: _OnceLoader) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_texts(each, loader) for each in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else re.sub(r"(?i)^([-+]?)\.(inf|nan)$", r"\1\2", node.value)
    return loader.construct_object(node, deep=True)
