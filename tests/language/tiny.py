"""A random language model of 32 ids with a tokenizer of words, in a folder of transformers."""

import jax
import tokenizers

from webssl_jax.language import model, tokenizer
from webssl_jax.language.decoder import init
from webssl_jax.language.sizes import DecoderConfig

WORDS = "a small brown dog sat on the red sofa why ? <a> [ ]".split()


def save(folder, chat_template=None, context=64):
    """Writes it; texts begin with ``<s>``, answers end with ``</s>``."""
    words = ["<unk>", "<s>", "</s>", *WORDS]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = DecoderConfig(vocabulary=32, width=16, depth=2, heads=2, kv_heads=1, context=context)
    words = tokenizer.Tokenizer(inner, special, (2,), chat_template, "test")
    model.LanguageModel(config, init(config, jax.random.key(0)), words).save(folder)
    return folder
