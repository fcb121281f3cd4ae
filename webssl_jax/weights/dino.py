"""Files of Web-DINO and DINOv2: the originals' ``.pth`` and those of ``transformers``.

  dinov2-pth              the encoder, as published: a bare state dict.
  dinov2-teacher          encoder and heads, as training writes them: {"teacher": {"backbone...",
                          "dino_head...", "ibot_head..."}}; a student's the same under "student".
  dinov2-heads            the heads of such a file alone.
  hf-dinov2, hf-dinov2-registers
                          ``Dinov2Model`` and ``Dinov2WithRegistersModel``.

The originals' blocks are called ``blocks.3`` or, cut into chunks of depth // chunks,
``blocks.CHUNK.3``: the last number is the block's own either way (a chunk begins with placeholders
that hold nothing). Import takes both, export writes what it is asked for (``chunked_names``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import hf, positions, preprocessing
from webssl_jax.weights.mae import WRAPPERS, encoder_rows, mlp_rows
from webssl_jax.weights.tables import CONV, LINEAR, Constant, Row, Table, WeightsError, linear, norm

_MLP_RATIO = 4  # of every Dinov2 config; SwiGLU makes 2/3 of it, rounded up
_PLAIN_BLOCKS = (r"^(backbone\.)?blocks\.\d+\.(\d+)\.", r"\1blocks.\2.")
_HEAD_ALIASES = (
    # PyTorch's newer weight_norm
    (r"last_layer\.parametrizations\.weight\.original0$", "last_layer.weight_g"),
    (r"last_layer\.parametrizations\.weight\.original1$", "last_layer.weight_v"),
)
_STUDENT = r"^(student|dino_loss|ibot_patch_loss)\."  # beside the teacher in a whole checkpoint


def backbone_table(encoder: ViTConfig) -> Table:
    """The encoder alone; heads in a file are passed over on import."""
    rows, constants = _backbone(encoder, "")
    return Table(
        "dinov2-pth",
        rows,
        constants,
        leave_out=(r"^(?!encoder/)",),
        aliases=(WRAPPERS, (r"^teacher\.", ""), (r"^backbone\.", ""), _PLAIN_BLOCKS),
        ignore=(_STUDENT, r"^((dino|ibot)_)?head\."),  # DINO's own files have one "head"
    )


def teacher_table(encoder: ViTConfig, heads: dict[str, HeadConfig]) -> Table:
    """Encoder and heads. heads: {"dino_head": ..., "ibot_head": ...}; the second is missing where
    both losses share the first."""
    rows, constants = _backbone(encoder, "backbone.")
    own = r"^(cls_token|mask_token|pos_embed|register_tokens|patch_embed\.|blocks\.|norm\.)"
    return Table(
        "dinov2-teacher",
        (*rows, *head_rows(heads)),
        constants,
        aliases=(
            *(WRAPPERS, (r"^teacher\.", ""), (own, r"backbone.\1")),
            *(_PLAIN_BLOCKS, *_HEAD_ALIASES),
        ),
        ignore=(_STUDENT,),
    )


def heads_table(heads: dict[str, HeadConfig]) -> Table:
    """The heads alone."""
    return Table(
        "dinov2-heads",
        head_rows(heads),
        leave_out=(r"^encoder/",),
        aliases=(WRAPPERS, (r"^teacher\.", ""), *_HEAD_ALIASES),
        ignore=(_STUDENT,),
    )


def chunked_names(names: list[str], depth: int, chunks: int) -> list[str]:
    """``names`` as a network of ``depth`` blocks that was built with ``block_chunks = chunks``
    has them.

    Chunks hold depth // chunks blocks; what is left over makes further chunks (26 in 4: 6, 6, 6, 6
    and 2).

    Raises:
      WeightsError: for chunks that no network has.
    """
    if not 1 <= chunks <= depth:
        raise WeightsError(f"{depth} blocks cannot be cut into {chunks} chunks")
    size = depth // chunks
    return [
        re.sub(r"(^|\.)blocks\.(\d+)\.", lambda m: f"{m[1]}blocks.{int(m[2]) // size}.{m[2]}.", x)
        for x in names
    ]


def teacher_extra(method: Any) -> dict[str, int | str]:
    """What a teacher file of tensors does not say; see ``mae.mae_extra``."""
    c = method.encoder
    size = preprocessing.size_in_words(c.image_size)
    return {"heads": c.heads, "position_resize": c.position_resize, "image_size": size}


def hf_table(encoder: ViTConfig) -> Table:
    """``Dinov2Model``: the encoder."""
    return _hf_table("hf-dinov2", encoder, encoder.mask_token, False)


def hf_registers_table(encoder: ViTConfig) -> Table:
    """``Dinov2WithRegistersModel``: the encoder; mask token and registers always."""
    return _hf_table("hf-dinov2-registers", encoder, True, True)


def hf_config(method: Any) -> dict[str, Any]:
    """``config.json`` of Dinov2Model. ``method`` has an ``encoder``.

    Raises:
      WeightsError: if the MLP has not the width that follows from ``mlp_ratio``, a whole number.
    """
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        **_hf_shared("hf-dinov2", method.encoder),
        "use_mask_token": method.encoder.mask_token,
    }


def hf_registers_config(method: Any) -> dict[str, Any]:
    """``config.json`` of Dinov2WithRegistersModel; see :func:`hf_config`."""
    return {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        **_hf_shared("hf-dinov2-registers", method.encoder),
        "num_register_tokens": method.encoder.num_registers,
    }


def hf_hidden(width: int, mlp_ratio: int, swiglu: bool) -> int:
    """Hidden width of an MLP in ``transformers``' Dinov2."""
    hidden = width * mlp_ratio
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _hf_shared(family: str, c: ViTConfig) -> dict[str, Any]:
    swiglu = c.mlp == "swiglu"
    ratios = (_MLP_RATIO, *range(1, 17))
    ratio = next((r for r in ratios if hf_hidden(c.width, r, swiglu) == c.hidden), None)
    if ratio is None:
        raise WeightsError(
            f"{family}: an MLP of {c.hidden} at width {c.width} follows from no whole mlp_ratio"
        )
    return hf.shared_config(c) | {
        "mlp_ratio": ratio,
        "use_swiglu_ffn": swiglu,
        "layerscale_value": c.layer_scale,
        "drop_path_rate": 0.0,
    }


def _backbone(c: ViTConfig, prefix: str) -> tuple[tuple[Row, ...], tuple[Constant, ...]]:
    table, constants = positions.rows(c, f"{prefix}pos_embed")
    rows = [Row("encoder/cls_token", f"{prefix}cls_token"), *table]
    if c.mask_token:
        rows.append(Row("encoder/mask_token", f"{prefix}mask_token"))
    if c.num_registers:
        rows.append(Row("encoder/register_tokens", f"{prefix}register_tokens"))
    return (*rows, *encoder_rows(c, prefix)), constants


def layer_name(head: str, i: int, layers: int) -> str:
    """Of linear layer i of a head: activations stand at the odd numbers, one alone is no list."""
    return f"{head}.mlp.{2 * i}" if layers > 1 else f"{head}.mlp"


def head_rows(heads: Mapping[str, HeadConfig], plain: bool = False) -> tuple[Row, ...]:
    """The rows of the heads; plain: of prototypes without weight norm."""
    rows: list[Row] = []
    parts = {"kernel": "weight"} if plain else {"g": "weight_g", "v": "weight_v"}
    for name, head in heads.items():
        for i in range(head.layers):
            rows += linear(f"{name}/fc{i + 1}", layer_name(name, i, head.layers))
        rows += (
            Row(f"{name}/last_layer/{ours}", f"{name}.last_layer.{theirs}", LINEAR)
            for ours, theirs in parts.items()
        )
    return tuple(rows)


def _hf_table(family: str, c: ViTConfig, mask_token: bool, registers: bool) -> Table:
    table, constants = positions.rows(c, "embeddings.position_embeddings")
    rows = [Row("encoder/cls_token", "embeddings.cls_token"), *table]
    if mask_token:
        rows.append(Row("encoder/mask_token", "embeddings.mask_token"))
    if registers:
        rows.append(Row("encoder/register_tokens", "embeddings.register_tokens"))
    patches = "embeddings.patch_embeddings.projection"
    ours, block = "encoder/blocks", "encoder.layer.{i}."
    rows += (
        Row("encoder/patch_embed/kernel", f"{patches}.weight", CONV),
        Row("encoder/patch_embed/bias", f"{patches}.bias"),
        *norm(f"{ours}/norm1", f"{block}norm1"),
        *hf.attention_rows(ours, block, c.qkv_bias),
        *(Row(f"{ours}/layer_scale{i}/gamma", f"{block}layer_scale{i}.lambda1") for i in (1, 2)),
        *norm(f"{ours}/norm2", f"{block}norm2"),
        *mlp_rows(c, ours, block, ("weights_in", "weights_out")),
        *norm("encoder/norm", "layernorm"),
    )
    return Table(
        family,
        tuple(rows),
        constants,
        leave_out=(r"^(?!encoder/)",),
        # the encoder of a classifier keeps its prefix
        aliases=((r"^dinov2(_with_registers)?\.", ""), *hf.ATTENTION_ALIASES),
        ignore=(r"^classifier\.",),
    )
