"""Files of DINOv3 (Siméoni et al., arXiv 2508.10104).

  hf-dinov3       ``DINOv3ViTModel`` of ``transformers``, the encoder.
  dinov3-pth      the encoder in the names of the published ``.pth``: a bare state dict.
  dinov3-teacher  encoder and heads, as the original's training writes them: {"teacher":
                  {"backbone...", "dino_head...", "ibot_head..."}}.
  timm-dinov3     timm's ``Eva`` with rotary positions, the encoder without its mask token.

Positions are rotated, so a file has no table of them, and the encoder takes images of any size. Of
the 7B, ``local_cls_norm`` acts in the original's training alone and is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import dino, mae, preprocessing
from webssl_jax.weights.stored import WeightsError, shown
from webssl_jax.weights.tables import CONV, LINEAR, Constant, Row, Table, Transform, linear, norm

# What transformers takes when config.json does not say.
DEFAULTS = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "patch_size": 16,
    "image_size": 224,
    "num_channels": 3,
    "num_register_tokens": 0,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
}
NORM_EPS = 1e-5  # of the published networks and of timm; their files do not say
PERIODS = "rope_embed.periods"
KEY_MASK = "blocks.{i}.attn.qkv.bias_mask"  # 0 where the bias of a fused product is no parameter
_BASE = 100.0
_UNUSED = (r"^local_cls_norm\.",)
_MASK_TOKEN = Transform(lambda x: x[None], lambda x: x[0])  # ours (1, D), theirs (1, 1, D)


def table(c: ViTConfig) -> Table:
    """``DINOv3ViTModel``."""
    ours, block = "encoder/blocks", "layer.{i}."
    patches, attention = "embeddings.patch_embeddings", f"{block}attention."
    mlp = {"fc1": "up_proj", "fc2": "down_proj"}
    if c.mlp == "swiglu":
        mlp = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    rows = [Row("encoder/cls_token", "embeddings.cls_token")]
    if c.num_registers:
        rows.append(Row("encoder/register_tokens", "embeddings.register_tokens"))
    rows += (
        Row("encoder/mask_token", "embeddings.mask_token", _MASK_TOKEN),
        Row("encoder/patch_embed/kernel", f"{patches}.weight", CONV),
        Row("encoder/patch_embed/bias", f"{patches}.bias"),
        *norm(f"{ours}/norm1", f"{block}norm1"),
        *linear(f"{ours}/attn/q", f"{attention}q_proj", c.qkv_bias),
        *linear(f"{ours}/attn/k", f"{attention}k_proj", c.qkv_bias and c.key_bias),
        *linear(f"{ours}/attn/v", f"{attention}v_proj", c.qkv_bias),
        *linear(f"{ours}/attn/out", f"{attention}o_proj"),
        *(Row(f"{ours}/layer_scale{i}/gamma", f"{block}layer_scale{i}.lambda1") for i in (1, 2)),
        *norm(f"{ours}/norm2", f"{block}norm2"),
    )
    for name, theirs in mlp.items():
        rows += linear(f"{ours}/mlp/{name}", f"{block}mlp.{theirs}")
    return Table(
        "hf-dinov3",
        (*rows, *norm("encoder/norm", "norm")),
        leave_out=(r"^(?!encoder/)",),
        # module names of transformers 5; the encoder of another model keeps its prefix
        aliases=((r"^dinov3_vit\.", ""), (r"^model\.", "")),
    )


def config(method: Any) -> dict[str, Any]:
    """``config.json``. ``method`` has an ``encoder``."""
    c = method.encoder
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "layer_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "num_attention_heads": c.heads,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "layerscale_value": c.layer_scale,
        "initializer_range": 0.02,
        "pos_embed_rescale": c.rope_rescale,  # these three act in training alone
        "pos_embed_jitter": c.rope_jitter,
        "pos_embed_shift": c.rope_shift,
        "image_size": c.image_size,
        **_told_by_shapes(c),
    }


def facts_of(file: Any, stated: Mapping[str, Any], c: ViTConfig) -> dict[str, Any]:
    """What ``config.json`` says beside the shapes, of which ``c`` is made: heads, norm_eps and
    rope_base, not yet checked.

    Raises:
      WeightsError: if it says something else than the shapes do.
    """
    said: dict[str, Any] = {**DEFAULTS, **stated}
    wrong = [
        f"{key} = {shown(said[key])}, not {value}"
        for key, value in _told_by_shapes(c).items()
        if said[key] != value
    ]
    if wrong:
        raise WeightsError(
            f"{file}: disagrees with the weights, or with this code: {'; '.join(wrong)}"
        )
    return said


def _told_by_shapes(c: ViTConfig) -> dict[str, Any]:
    gated = c.mlp == "swiglu"
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "intermediate_size": c.hidden,
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "patch_size": c.patch_size,
        "num_channels": 3,
        "num_register_tokens": c.num_registers,
        "query_bias": c.qkv_bias,
        "key_bias": c.qkv_bias and c.key_bias,
        "value_bias": c.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
    }


def original_table(c: ViTConfig) -> Table:
    """The published ``.pth``; heads in a file are passed over on import."""
    rows, constants = _original(c, "")
    return Table(
        "dinov3-pth",
        rows,
        constants,
        leave_out=(r"^(?!encoder/)",),
        aliases=(mae.WRAPPERS, (r"^teacher\.", ""), (r"^backbone\.", "")),
        ignore=(*_UNUSED, r"^(dino|ibot)_head\."),
    )


def teacher_table(c: ViTConfig, heads: Mapping[str, HeadConfig]) -> Table:
    """Encoder and heads. heads: {"dino_head": ..., "ibot_head": ...}."""
    rows, constants = _original(c, "backbone.")
    return Table(
        "dinov3-teacher",
        (*rows, *dino.head_rows(heads, plain=True)),
        constants,
        aliases=(mae.WRAPPERS, (r"^teacher\.", "")),
        ignore=tuple(pattern.replace("^", r"^backbone\.") for pattern in _UNUSED),
    )


def teacher_extra(method: Any) -> dict[str, int | float | str]:
    """What a teacher file of tensors does not say; see ``mae.mae_extra``."""
    c = method.encoder
    size = preprocessing.size_in_words(c.image_size)
    return {"heads": c.heads, "norm_eps": c.norm_eps, "image_size": size}


def timm_table(c: ViTConfig) -> Table:
    """timm's ``vit_..._dinov3``. A mask token has no place in it."""
    ours, block = "encoder/blocks", "blocks.{i}."
    kernels = tuple(f"{ours}/attn/{x}/kernel" for x in "qkv")
    rows = [Row("encoder/cls_token", "cls_token")]
    if c.num_registers:
        rows.append(Row("encoder/register_tokens", "reg_token"))
    rows += (
        Row("encoder/patch_embed/kernel", "patch_embed.proj.weight", CONV),
        Row("encoder/patch_embed/bias", "patch_embed.proj.bias"),
        *norm(f"{ours}/norm1", f"{block}norm1"),
        Row(kernels, f"{block}attn.qkv.weight", LINEAR),
    )
    if c.qkv_bias:
        rows += (Row(f"{ours}/attn/{x}/bias", f"{block}attn.{x}_bias") for x in "qv")
    rows += (
        *linear(f"{ours}/attn/out", f"{block}attn.proj"),
        *(Row(f"{ours}/layer_scale{i}/gamma", f"{block}gamma_{i}") for i in (1, 2)),
        *norm(f"{ours}/norm2", f"{block}norm2"),
    )
    mlp = {"fc1": "fc1", "fc2": "fc2"}
    if c.mlp == "swiglu":
        mlp = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
    for name, theirs in mlp.items():
        rows += linear(f"{ours}/mlp/{name}", f"{block}mlp.{theirs}")
    return Table(
        "timm-dinov3",
        (*rows, *norm("encoder/norm", "norm")),
        leave_out=(r"^(?!encoder/)", r"^encoder/mask_token$"),
        aliases=(mae.WRAPPERS,),
        ignore=(r"^head\.",),
    )


def timm_config(method: Any) -> dict[str, Any]:
    """``config.json`` of a folder for ``timm.create_model("local-dir:FOLDER")``. ``method`` has an
    ``encoder``."""
    c, config = method.encoder, mae.timm_config(method)
    gated = c.mlp == "swiglu"
    more: dict[str, Any] = {
        "mlp_ratio": mae.ratio(c.hidden, c.width),
        "num_reg_tokens": c.num_registers,
        "rope_temperature": c.rope_base,
        "global_pool": "token",
    }
    if gated:
        more["swiglu_align_to"] = 1  # else the hidden width is rounded up
    args = config["model_args"]
    config["model_args"] = {x: args[x] for x in args if x not in TIMM_OTHER} | more
    kind = "vit_7b_patch16_dinov3" if gated else "vit_small_patch16_dinov3_qkvb"
    return config | {"architecture": kind}


# Arguments that timm's VisionTransformer has and its Eva has not, or by another name.
TIMM_OTHER = ("reg_tokens", "no_embed_class")
# Those of Eva that change what is computed, with the values that mean DINOv3.
TIMM_PLAIN = {
    "in_chans": (3,),
    "class_token": (True,),
    "rope_type": ("dinov3",),
    "use_rot_pos_emb": (True,),
    "use_abs_pos_emb": (False,),
    "rope_rotate_half": (True,),
    "use_fc_norm": (False,),
    "use_post_norm": (False,),
    "scale_mlp": (False,),
    "scale_attn_inner": (False,),
    "norm_layer": (None,),  # LayerNorm of epsilon 1e-5
}


def rotation(periods: np.ndarray, width: int) -> dict[str, Any]:
    """heads and rope_base that the original's buffer of periods (d / 4,) tells, of heads with d
    channels. Periods that were rounded to bfloat16 are those of the usual base.

    Raises:
      ValueError: if heads of that size do not make up ``width``.
    """
    count = len(periods)
    if width % (4 * count):
        raise ValueError(f"{count} periods are of heads of {4 * count} channels, not of {width}")
    base = _BASE
    if count > 1:
        with np.errstate(invalid="ignore", over="ignore"):
            found = float(np.float64(periods[-1]) ** (count / (count - 1)))
        base = _BASE if abs(found - _BASE) < _BASE / 64 else found
    return {"heads": width // (4 * count), "rope_base": base}


def _original(c: ViTConfig, prefix: str) -> tuple[tuple[Row, ...], tuple[Constant, ...]]:
    """Rows and constants of the original's encoder."""
    ours, block = "encoder/blocks", f"{prefix}blocks.{{i}}."
    q, k, v = (f"{ours}/attn/{x}" for x in "qkv")
    quarter = c.head_dim // 4
    constants = [
        Constant(
            prefix + PERIODS,
            lambda: (c.rope_base ** (np.arange(quarter) / quarter)).astype(np.float32),
            f"the periods of rotated positions, 1 to nearly {c.rope_base:g}",
            c.rope_base / 256,  # they may have been kept in bfloat16
        )
    ]
    rows = [Row("encoder/cls_token", f"{prefix}cls_token")]
    if c.num_registers:
        rows.append(Row("encoder/register_tokens", f"{prefix}storage_tokens"))
    rows += (
        Row("encoder/mask_token", f"{prefix}mask_token"),
        Row("encoder/patch_embed/kernel", f"{prefix}patch_embed.proj.weight", CONV),
        Row("encoder/patch_embed/bias", f"{prefix}patch_embed.proj.bias"),
        *norm(f"{ours}/norm1", f"{block}norm1"),
        Row((f"{q}/kernel", f"{k}/kernel", f"{v}/kernel"), f"{block}attn.qkv.weight", LINEAR),
    )
    if c.qkv_bias:
        key = f"{k}/bias" if c.key_bias else None
        rows.append(Row((f"{q}/bias", key, f"{v}/bias"), f"{block}attn.qkv.bias"))
    if c.qkv_bias and not c.key_bias:
        mask = np.repeat(np.array([1, 0, 1], np.float32), c.width)
        what = "1 for queries and values and 0 for keys"
        names = (f"{prefix}{KEY_MASK}".format(i=i) for i in range(c.depth))
        constants += (Constant(name, lambda: mask, what) for name in names)
    rows += (
        *linear(f"{ours}/attn/out", f"{block}attn.proj"),
        *(Row(f"{ours}/layer_scale{i}/gamma", f"{block}ls{i}.gamma") for i in (1, 2)),
        *norm(f"{ours}/norm2", f"{block}norm2"),
    )
    for name in ("w1", "w2", "w3") if c.mlp == "swiglu" else ("fc1", "fc2"):
        rows += linear(f"{ours}/mlp/{name}", f"{block}mlp.{name}")
    return (*rows, *norm("encoder/norm", f"{prefix}norm")), tuple(constants)
