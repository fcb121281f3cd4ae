"""Files of DINOv3 (Siméoni et al., arXiv 2508.10104) in the names of ``transformers``:
``hf-dinov3`` (``DINOv3ViTModel``), the encoder.

Positions are rotated, so the file has no table of them, and the encoder takes images of any size.
Written from transformers (Apache-2.0), without a look into Meta's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.stored import WeightsError, shown
from webssl_jax.weights.tables import CONV, Row, Table, Transform, linear, norm

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
