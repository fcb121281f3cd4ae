"""Files of ``transformers``: ``hf-vit`` (ViTModel), ``hf-vit-mae`` (ViTMAEForPreTraining) and
``hf-ijepa`` (IJepaModel, which is ViTModel without a CLS token).

Names are those of files on the hub. ``transformers`` 5 calls its modules otherwise
(``layers.0.attention.q_proj``) and renames when it loads and saves, so the same files open in
versions 4 and 5.

MAE's position tables are fixed, so they are no parameters of ours; their files hold them as
tensors.
"""

from __future__ import annotations

from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import positions
from webssl_jax.weights.tables import CONV, Constant, Row, Table, WeightsError, linear, norm

# Other spellings found in files: module names of transformers 5, and what its save_pretrained makes
# of the decoder (5.23 writes decoder.decoder_encoder.layer.0 where the hub's files have
# decoder.decoder_layers.0).
ATTENTION_ALIASES = (
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
)
_ALIASES = (
    (r"decoder_encoder\.layer\.", "decoder_layers."),
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    *ATTENTION_ALIASES,
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def vit_table(encoder: ViTConfig) -> Table:
    """``ViTModel`` without pooling layer: the encoder alone.

    A pooler in a file is passed over on import: no method here trains one, and the published
    Web-MAE files, made from models without one, hold random numbers there.
    """
    rows, constants = _encoder(encoder, "")
    return Table(
        "hf-vit",
        rows,
        constants,
        leave_out=(r"^(?!encoder/)",),
        # the encoder of a ViTMAE or of a classifier keeps its prefix
        aliases=((r"^vit\.", ""), *_ALIASES),
        ignore=(r"^pooler\.", r"^classifier\."),
    )


def ijepa_table(encoder: ViTConfig) -> Table:
    """``IJepaModel`` without pooling layer: the encoder alone."""
    rows, constants = _encoder(encoder, "")
    return Table(
        "hf-ijepa",
        rows,
        constants,
        leave_out=(r"^(?!encoder/)",),
        aliases=((r"^ijepa\.", ""), *_ALIASES),
        ignore=(r"^pooler\.", r"^classifier\."),
    )


def vit_mae_table(encoder: ViTConfig, decoder: ViTConfig) -> Table:
    """``ViTMAEForPreTraining``: encoder and decoder, ready to train on.

    Raises:
      WeightsError: if the decoder differs from the encoder where one config.json has one key for
      both.
    """
    for field in ("norm_eps", "qkv_bias", "mlp"):
        if getattr(encoder, field) != getattr(decoder, field):
            raise WeightsError(
                f"hf-vit-mae: encoder and decoder must have the same {field}, not "
                f"{getattr(encoder, field)!r} and {getattr(decoder, field)!r}; export as hf-vit"
            )
    rows, constants = _encoder(encoder, "vit.")
    rows += (
        *linear("decoder/embed", "decoder.decoder_embed"),
        Row("decoder/mask_token", "decoder.mask_token"),
        *_blocks("decoder/blocks", "decoder.decoder_layers", decoder.qkv_bias),
        *norm("decoder/norm", "decoder.decoder_norm"),
        *linear("decoder/pred", "decoder.decoder_pred"),
    )
    constants += (positions.constant(decoder, "decoder.decoder_pos_embed"),)
    return Table(
        "hf-vit-mae", rows, constants, leave_out=(r"^(?!encoder/|decoder/)",), aliases=_ALIASES
    )


def vit_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ViTModel. ``method`` has an ``encoder``."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        **shared_config(method.encoder),
        "intermediate_size": method.encoder.hidden,
        "encoder_stride": method.encoder.patch_size,
    }


def ijepa_config(method: Any) -> dict[str, Any]:
    """``config.json`` of IJepaModel. ``method`` has an ``encoder``."""
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        **shared_config(method.encoder),
        "intermediate_size": method.encoder.hidden,
    }


def vit_mae_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ViTMAEForPreTraining. ``method`` is a ``methods.mae.MAE``."""
    decoder = method.decoder
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **shared_config(method.encoder),
        "intermediate_size": method.encoder.hidden,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.hidden,
        "mask_ratio": method.mask_ratio,
        "norm_pix_loss": method.norm_pix_loss,
    }


def shared_config(c: ViTConfig) -> dict[str, Any]:
    """What ``config.json`` says of any ViT."""
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": 3,
        "qkv_bias": c.qkv_bias,
    }


def _encoder(c: ViTConfig, prefix: str) -> tuple[tuple[Row, ...], tuple[Constant, ...]]:
    embeddings = prefix + "embeddings."
    table, constants = positions.rows(c, embeddings + "position_embeddings")
    cls = [Row("encoder/cls_token", embeddings + "cls_token")] if c.pooling == "cls" else []
    rows = (
        *cls,
        *table,
        Row("encoder/patch_embed/kernel", embeddings + "patch_embeddings.projection.weight", CONV),
        Row("encoder/patch_embed/bias", embeddings + "patch_embeddings.projection.bias"),
        *_blocks("encoder/blocks", prefix + "encoder.layer", c.qkv_bias),
        *norm("encoder/norm", prefix + "layernorm"),
    )
    return rows, constants


def _blocks(ours: str, theirs: str, qkv_bias: bool) -> tuple[Row, ...]:
    block = theirs + ".{i}."
    return (
        *norm(f"{ours}/norm1", block + "layernorm_before"),
        *attention_rows(ours, block, qkv_bias),
        *norm(f"{ours}/norm2", block + "layernorm_after"),
        *linear(f"{ours}/mlp/fc1", block + "intermediate.dense"),
        *linear(f"{ours}/mlp/fc2", block + "output.dense"),
    )


def attention_rows(ours: str, block: str, qkv_bias: bool) -> tuple[Row, ...]:
    """The rows of a block's attention, which ViT and Dinov2 call alike. block: "LAYERS.{i}."."""
    attention = block + "attention."
    return (
        *linear(f"{ours}/attn/q", attention + "attention.query", qkv_bias),
        *linear(f"{ours}/attn/k", attention + "attention.key", qkv_bias),
        *linear(f"{ours}/attn/v", attention + "attention.value", qkv_bias),
        *linear(f"{ours}/attn/out", attention + "output.dense"),
    )
