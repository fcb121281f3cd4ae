"""SigLIP's weights in the names of ``transformers``: ``hf-siglip`` (``SiglipModel``), both towers
with scale and bias, and ``hf-siglip-vision`` (``SiglipVisionModel``), the image tower.

Google's own weights have texts of 32,000 pieces of sentencepiece, padded with id 1: the tower reads
such ids; a tokenizer for them is not here.
"""

from __future__ import annotations

from typing import Any

from webssl_jax.data import tokens
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.weights.clip import (
    BARE_VISION,
    POSITION_NUMBERS,
    TABLE,
    check_tower,
    hf_blocks,
    hf_image_tower,
    hf_texts,
    hf_tower,
)
from webssl_jax.weights.tables import CONV, LINEAR, Row, Table, Transform, linear, norm

MLPS = ("gelu_tanh",)
_BLOCKS = {"mlp": MLPS, "qkv_bias": (True,)}
_IMAGE = {"pooling": ("map",), **_BLOCKS}
_TEXT = {"causal": (False,), "pooling": ("last",), **_BLOCKS}
ACTIVATION = "gelu_pytorch_tanh"  # transformers' name of it
NORM_EPS = 1e-6
PAD = 1  # of google's texts

_SCALAR = Transform(lambda x: x.reshape(1), lambda x: x.reshape(()))  # ours (), theirs (1,)


def hf_table(encoder: ViTConfig, text: TextConfig) -> Table:
    """``SiglipModel``.

    Raises:
      WeightsError: for towers that its code computes otherwise.
    """
    check_tower("hf-siglip", encoder, _IMAGE)
    check_tower("hf-siglip", text, _TEXT)
    rows = (
        *_vision(),
        *hf_texts(),
        *linear("text/projection", "text_model.head"),
        Row("logit_scale", "logit_scale", _SCALAR),
        Row("logit_bias", "logit_bias", _SCALAR),
    )
    return Table("hf-siglip", rows, ignore=POSITION_NUMBERS)


def hf_vision_table(encoder: ViTConfig) -> Table:
    """``SiglipVisionModel``: the encoder, pooling included. Texts are passed over on import.

    Raises:
      WeightsError: for a tower that its code computes otherwise.
    """
    check_tower("hf-siglip-vision", encoder, _IMAGE)
    return Table(
        "hf-siglip-vision",
        _vision(),
        leave_out=(r"^(?!encoder/)",),
        aliases=BARE_VISION,
        ignore=(*POSITION_NUMBERS, r"^(text_model|classifier)\.", r"^logit_(scale|bias)$"),
    )


def hf_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ``SiglipModel``. ``method`` has ``encoder`` and ``text``."""
    text = method.text
    vision = hf_vision_config(method)
    del vision["architectures"]
    ours = text.vocabulary == tokens.VOCABULARY
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vision,
        "text_config": hf_tower(text)
        | {
            "model_type": "siglip_text_model",
            "hidden_act": ACTIVATION,
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.context,
            "projection_size": text.embedding,
            "bos_token_id": tokens.START if ours else None,
            "eos_token_id": tokens.END if ours else PAD,
            "pad_token_id": tokens.END if ours else PAD,
        },
    }


def hf_vision_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ``SiglipVisionModel``. ``method`` has an ``encoder``."""
    encoder = method.encoder
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **hf_image_tower(encoder),
        "hidden_act": ACTIVATION,
        "vision_use_head": True,
    }


def _vision() -> tuple[Row, ...]:
    image, pool = "vision_model.", "encoder/pool"
    embeddings, head = image + "embeddings.", image + "head."
    qkv = tuple(f"{pool}/attn/{x}" for x in "qkv")
    return (
        Row("encoder/patch_embed/kernel", embeddings + "patch_embedding.weight", CONV),
        Row("encoder/patch_embed/bias", embeddings + "patch_embedding.bias"),
        Row("encoder/pos_embed", embeddings + "position_embedding.weight", TABLE),
        *hf_blocks("encoder/blocks", image),
        *norm("encoder/norm", image + "post_layernorm"),
        Row(f"{pool}/probe", head + "probe"),
        Row(tuple(f"{x}/kernel" for x in qkv), head + "attention.in_proj_weight", LINEAR),
        Row(tuple(f"{x}/bias" for x in qkv), head + "attention.in_proj_bias"),
        *linear(f"{pool}/attn/out", head + "attention.out_proj"),
        *norm(f"{pool}/norm", head + "layernorm"),
        *linear(f"{pool}/mlp/fc1", head + "mlp.fc1"),
        *linear(f"{pool}/mlp/fc2", head + "mlp.fc2"),
    )
