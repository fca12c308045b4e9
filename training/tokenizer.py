"""Makes the tokenizer: byte-level BPE with LFM2's special tokens at LFM2's ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 2048
SPECIAL = (  # the index is the id
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)
PAD, BOS, END_OF_TEXT, END_OF_TURN = 0, 1, 2, 7
# Words with the space before them, numbers of up to three digits, punctuation, line ends, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
CONFIG: dict[str, Any] = {  # tokenizer_config.json
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL[BOS],
    "eos_token": SPECIAL[END_OF_TURN],
    "pad_token": SPECIAL[PAD],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 128000,
    "chat_template": CHAT_TEMPLATE,
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of 2048 entries, made from `texts`, that puts the BOS before a prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A $B",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    return tokenizer
