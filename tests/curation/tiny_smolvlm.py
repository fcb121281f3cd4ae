"""A SmolVLM2 of few random weights, as one lies on disk."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
MARKS = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"]


def write(path):
    """Its images are of up to 2 x 2 tiles of 16 pixels, 4 tokens each."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=MARKS[1],
        eos_token=MARKS[1],
        additional_special_tokens=[*MARKS, "<global-img>", *TILES],
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    torch.manual_seed(0)
    config = transformers.SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={**small, "image_size": 16, "patch_size": 4, "initializer_range": 1.0},
        text_config={
            **small,
            "model_type": "llama",
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "initializer_range": 1.0,
        },
    )
    transformers.SmolVLMForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    sides = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    SmolVLMImageProcessorPil(**sides).save_pretrained(path)
    return path
