"""CLIP's weights in the names of ``transformers``' ``CLIPModel`` and of open_clip, which are
MetaCLIP's and OpenAI's too: both towers, their ways into the shared space, the logit scale.

open_clip keeps q, k and v fused, and its projections as bare matrices, inputs first.
"""

from __future__ import annotations

from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.weights import mae
from webssl_jax.weights.tables import CONV, LINEAR, Row, Table, WeightsError, linear, norm, squeeze

_TABLE = squeeze(0)  # positions: ours (1, N, D), theirs (N, D)
_VECTOR = squeeze(0, 1)  # the CLS token: ours (1, 1, D), theirs (D,)


def hf_table(encoder: ViTConfig, text: TextConfig) -> Table:
    """``CLIPModel``. It has no place for SigLIP's bias.

    Raises:
      WeightsError: for towers that its code computes otherwise.
    """
    _check("hf-clip", encoder, text)
    image, words = "vision_model.", "text_model."
    embeddings = image + "embeddings."
    rows = (
        Row("encoder/cls_token", embeddings + "class_embedding", _VECTOR),
        Row("encoder/patch_embed/kernel", embeddings + "patch_embedding.weight", CONV),
        Row("encoder/pos_embed", embeddings + "position_embedding.weight", _TABLE),
        *norm("encoder/pre_norm", image + "pre_layrnorm"),  # so spelt
        *_hf_blocks("encoder/blocks", image, encoder.qkv_bias),
        *norm("encoder/norm", image + "post_layernorm"),
        *linear("projection", "visual_projection", bias=False),
        Row("text/token_embed", words + "embeddings.token_embedding.weight"),
        Row("text/pos_embed", words + "embeddings.position_embedding.weight", _TABLE),
        *_hf_blocks("text/blocks", words, text.qkv_bias),
        *norm("text/norm", words + "final_layer_norm"),
        *linear("text/projection", "text_projection", bias=False),
        Row("logit_scale", "logit_scale"),
    )
    # Positions' numbers, which old versions saved.
    return Table("hf-clip", rows, ignore=(r"embeddings\.position_ids$",))


def hf_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ``CLIPModel``. ``method`` has ``encoder`` and ``text``.

    Texts are pooled at the first token of the largest id, which is the end of the text.
    """
    encoder, text = method.encoder, method.text
    end = text.vocabulary - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": text.embedding,
        "vision_config": _hf_tower(encoder)
        | {
            "model_type": "clip_vision_model",
            "image_size": encoder.image_size,
            "patch_size": encoder.patch_size,
            "num_channels": 3,
            "projection_dim": text.embedding,
        },
        "text_config": _hf_tower(text)
        | {
            "model_type": "clip_text_model",
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.context,
            "projection_dim": text.embedding,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def open_clip_table(encoder: ViTConfig, text: TextConfig, bias: bool = False) -> Table:
    """open_clip's ``CLIP`` and ``CustomTextCLIP``. bias: with SigLIP's.

    Raises:
      WeightsError: for towers that its code computes otherwise.
    """
    name = "open-clip"
    _check(name, encoder, text)
    if encoder.mlp != text.mlp:
        raise WeightsError(
            f"{name}: one activation serves both towers, not {encoder.mlp} and {text.mlp}"
        )
    for tower in (encoder, text):
        if tower.norm_eps != 1e-5:
            raise WeightsError(
                f"{name}: its code has norm_eps = 1e-05 built in, a tower has {tower.norm_eps:g}; "
                "export in the format of transformers"
            )
    rows = (
        Row("encoder/cls_token", "visual.class_embedding", _VECTOR),
        Row("encoder/patch_embed/kernel", "visual.conv1.weight", CONV),
        Row("encoder/pos_embed", "visual.positional_embedding", _TABLE),
        *norm("encoder/pre_norm", "visual.ln_pre"),
        *_open_clip_blocks("encoder/blocks", "visual.", encoder.qkv_bias),
        *norm("encoder/norm", "visual.ln_post"),
        Row("projection/kernel", "visual.proj"),
        Row("text/token_embed", "token_embedding.weight"),
        Row("text/pos_embed", "positional_embedding", _TABLE),
        *_open_clip_blocks("text/blocks", "", text.qkv_bias),
        *norm("text/norm", "ln_final"),
        Row("text/projection/kernel", "text_projection"),
        Row("logit_scale", "logit_scale"),
        *([Row("logit_bias", "logit_bias")] if bias else []),
    )
    return Table(
        name,
        rows,
        aliases=(mae.WRAPPERS, (r"^text\.", "")),  # CustomTextCLIP's text tower has a prefix
        # facts beside the weights in OpenAI's files, and the mask that some versions saved
        ignore=(r"^(input_resolution|context_length|vocab_size|attn_mask)$",),
    )


def _check(family: str, encoder: ViTConfig, text: TextConfig) -> None:
    """Refuses what shapes do not show and the originals compute otherwise.

    Raises:
      WeightsError: naming the field.
    """
    for tower, field, wanted in (
        (text, "causal", (True,)),
        (text, "pooling", ("eot",)),
        (encoder, "mlp", ("gelu", "quick_gelu")),
        (text, "mlp", ("gelu", "quick_gelu")),
    ):
        value = getattr(tower, field)
        if value not in wanted:
            raise WeightsError(f"{family}: has no {field} = {value!r}")


def _hf_tower(c: ViTConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "hidden_act": c.mlp,
        "layer_norm_eps": c.norm_eps,
        "attention_dropout": 0.0,
    }


def _hf_blocks(ours: str, tower: str, qkv_bias: bool) -> tuple[Row, ...]:
    block = tower + "encoder.layers.{i}."
    qkv = (linear(f"{ours}/attn/{x}", f"{block}self_attn.{x}_proj", qkv_bias) for x in "qkv")
    return (
        *norm(f"{ours}/norm1", block + "layer_norm1"),
        *(row for rows in qkv for row in rows),
        *linear(f"{ours}/attn/out", block + "self_attn.out_proj"),
        *norm(f"{ours}/norm2", block + "layer_norm2"),
        *linear(f"{ours}/mlp/fc1", block + "mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", block + "mlp.fc2"),
    )


def _open_clip_blocks(ours: str, tower: str, qkv_bias: bool) -> tuple[Row, ...]:
    block = tower + "transformer.resblocks.{i}."
    qkv = [f"{ours}/attn/{x}" for x in "qkv"]
    rows = [Row(tuple(f"{path}/kernel" for path in qkv), block + "attn.in_proj_weight", LINEAR)]
    if qkv_bias:
        rows.append(Row(tuple(f"{path}/bias" for path in qkv), block + "attn.in_proj_bias"))
    return (
        *norm(f"{ours}/norm1", block + "ln_1"),
        *rows,
        *linear(f"{ours}/attn/out", block + "attn.out_proj"),
        *norm(f"{ours}/norm2", block + "ln_2"),
        *linear(f"{ours}/mlp/fc1", block + "mlp.c_fc"),
        *linear(f"{ours}/mlp/fc2", block + "mlp.c_proj"),
    )
