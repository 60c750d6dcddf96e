"""A character tokenizer with a chat template, built in memory.

One token is one character of printable ASCII or a newline; every other character becomes `<|unk|>`. A chat is

    <|bos|><|user|>827+695=<|assistant|>...<|eos|>

so the prompt with its generation prompt is an exact prefix of prompt + completion, in text and in tokens.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
ROLES = ("system", "user", "assistant")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role ' ~ message['role'] ~ ': use system, user or assistant.') }}"
    "{%- endif %}"
    "{{- '<|' ~ message['role'] ~ '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] ~ eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the character tokenizer: 4 special tokens, 3 role tokens and 96 characters.

    `tokenizer(text)` adds no special token: the chat template writes `<|bos|>` and ends every assistant turn
    with `<|eos|>`. Padding is on the left, as generation needs it.
    """
    role_tokens = [f"<|{role}|>" for role in ROLES]
    vocabulary = [PAD, BOS, EOS, UNK, *role_tokens, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=role_tokens,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
