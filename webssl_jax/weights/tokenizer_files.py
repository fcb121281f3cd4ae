"""CLIP's tokenizer as files for ``transformers`` (``CLIPTokenizer``, fast and slow), made from the
vocabulary of ``data/tokens.py``.

They give the ids of our tokenizer for texts that need no mending. Theirs mends and unescapes
nothing, and knows start and end of text as ``<|startoftext|>`` and ``<|endoftext|>``; ours by the
names open_clip gives them. Where that matters, give it ``tokens.clean(text)``.
"""

from __future__ import annotations

import json

from webssl_jax.data import tokens

START, END = "<|startoftext|>", "<|endoftext|>"
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_SUFFIX = "</w>"


def has_tokenizer(vocabulary: int) -> bool:
    """Whether a text tower of so many ids has those of our tokenizer, as far as their number
    tells."""
    return vocabulary == tokens.VOCABULARY


def tokenizer_files(context: int, masked: bool = True) -> dict[str, str]:
    """{name: text} for texts of at most ``context`` tokens; padded, on demand, with the end.
    masked: whether the model is told which tokens are padding. SigLIP's is not: it reads them.
    """
    letters, _ = tokens.spelling()
    merges = tokens.merges()
    names = [*letters, *(letter + _SUFFIX for letter in letters), *map("".join, merges), START, END]
    vocabulary = {name: i for i, name in enumerate(names)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["attention_mask"] if masked else [])],
    }
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {
        "tokenizer.json": json.dumps(_fast(vocabulary, merges), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
    }


def _fast(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict:
    """``tokenizer.json`` of the library ``tokenizers``."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[name], "content": name, **added, "special": True}
            for name in (START, END)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _WORDS},
                    "behavior": "Removed",
                    "invert": True,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocabulary[END]],
            "cls": [START, vocabulary[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _SUFFIX,
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
