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
from webssl_jax.weights.clip import BARE_VISION, POSITION_NUMBERS, hf_blocks, hf_tower
from webssl_jax.weights.tables import (
    CONV,
    LINEAR,
    Row,
    Table,
    Transform,
    WeightsError,
    linear,
    norm,
    squeeze,
)

MLPS = ("gelu_tanh",)
ACTIVATION = "gelu_pytorch_tanh"  # transformers' name of it
NORM_EPS = 1e-6
PAD = 1  # of google's texts

_TABLE = squeeze(0)  # positions: ours (1, N, D), theirs (N, D)
_SCALAR = Transform(lambda x: x.reshape(1), lambda x: x.reshape(()))  # ours (), theirs (1,)


def hf_table(encoder: ViTConfig, text: TextConfig) -> Table:
    """``SiglipModel``.

    Raises:
      WeightsError: for towers that its code computes otherwise.
    """
    _check("hf-siglip", encoder, text)
    words = "text_model."
    rows = (
        *_vision(),
        Row("text/token_embed", words + "embeddings.token_embedding.weight"),
        Row("text/pos_embed", words + "embeddings.position_embedding.weight", _TABLE),
        *hf_blocks("text/blocks", words),
        *norm("text/norm", words + "final_layer_norm"),
        *linear("text/projection", words + "head"),
        Row("logit_scale", "logit_scale", _SCALAR),
        Row("logit_bias", "logit_bias", _SCALAR),
    )
    return Table("hf-siglip", rows, ignore=POSITION_NUMBERS)


def hf_vision_table(encoder: ViTConfig) -> Table:
    """``SiglipVisionModel``: the encoder, pooling included. Texts are passed over on import.

    Raises:
      WeightsError: for a tower that its code computes otherwise.
    """
    _check("hf-siglip-vision", encoder)
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
        **hf_tower(encoder),
        "hidden_act": ACTIVATION,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "vision_use_head": True,
    }


def _vision() -> tuple[Row, ...]:
    image, pool = "vision_model.", "encoder/pool"
    embeddings, head = image + "embeddings.", image + "head."
    qkv = tuple(f"{pool}/attn/{x}" for x in "qkv")
    return (
        Row("encoder/patch_embed/kernel", embeddings + "patch_embedding.weight", CONV),
        Row("encoder/patch_embed/bias", embeddings + "patch_embedding.bias"),
        Row("encoder/pos_embed", embeddings + "position_embedding.weight", _TABLE),
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


def _check(family: str, encoder: ViTConfig, text: TextConfig | None = None) -> None:
    """Refuses what shapes do not show and the original computes otherwise.

    Raises:
      WeightsError: naming the field.
    """
    fields = [
        (encoder, "pooling", ("map",)),
        (encoder, "mlp", MLPS),
        (encoder, "qkv_bias", (True,)),
    ]
    if text:
        fields += [
            (text, "causal", (False,)),
            (text, "pooling", ("last",)),
            (text, "mlp", MLPS),
            (text, "qkv_bias", (True,)),
        ]
    for tower, field, wanted in fields:
        if getattr(tower, field) not in wanted:
            raise WeightsError(f"{family}: has no {field} = {getattr(tower, field)!r}")
