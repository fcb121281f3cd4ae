"""timm's image towers of CLIP and SigLIP: ``timm-clip`` and ``timm-siglip``, both ways.

They are timm's ``VisionTransformer`` with a norm before the blocks, or with attention pooling
instead of a class token. The way into the space of texts, which timm calls ``head``, is passed over
on import.
"""

from __future__ import annotations

from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import clip, mae
from webssl_jax.weights.tables import LINEAR, Row, Table, WeightsError, linear, norm

_HEAD = (r"^head\.",)
SIGLIP_MLPS = ("gelu_tanh", "gelu")
_SIGLIP = {"pooling": ("map",), "mlp": SIGLIP_MLPS, "qkv_bias": (True,)}


def clip_table(encoder: ViTConfig) -> Table:
    """``vit_..._clip_...``: the encoder.

    Raises:
      WeightsError: for a tower that its code computes otherwise.
    """
    clip.check_tower("timm-clip", encoder, clip.IMAGE)
    if encoder.norm_eps != clip.NORM_EPS:
        raise WeightsError(
            f"timm-clip: its code has norm_eps = {clip.NORM_EPS:g} built in, this tower has "
            f"{encoder.norm_eps:g}; export in a format of transformers"
        )
    embed, bias, *rest = mae.encoder_rows(encoder)
    assert bias.ours == "encoder/patch_embed/bias"  # which CLIP has not
    rows = (
        Row("encoder/cls_token", "cls_token"),
        Row("encoder/pos_embed", "pos_embed"),
        embed,
        *norm("encoder/pre_norm", "norm_pre"),
        *rest,
    )
    return Table("timm-clip", rows, (), (r"^(?!encoder/)",), (mae.WRAPPERS,), _HEAD)


def siglip_table(encoder: ViTConfig) -> Table:
    """``vit_..._siglip_...``: the encoder, pooling included.

    Raises:
      WeightsError: for a tower that its code computes otherwise.
    """
    clip.check_tower("timm-siglip", encoder, _SIGLIP)
    ours, theirs = "encoder/pool", "attn_pool"
    key_value = tuple(f"{ours}/attn/{x}" for x in "kv")
    rows = (
        Row("encoder/pos_embed", "pos_embed"),
        *mae.encoder_rows(encoder),
        Row(f"{ours}/probe", f"{theirs}.latent"),
        *linear(f"{ours}/attn/q", f"{theirs}.q"),
        Row(tuple(f"{x}/kernel" for x in key_value), f"{theirs}.kv.weight", LINEAR),
        Row(tuple(f"{x}/bias" for x in key_value), f"{theirs}.kv.bias"),
        *linear(f"{ours}/attn/out", f"{theirs}.proj"),
        *norm(f"{ours}/norm", f"{theirs}.norm"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
    )
    return Table("timm-siglip", rows, (), (r"^(?!encoder/)",), (mae.WRAPPERS,), _HEAD)


def clip_config(method: Any) -> dict[str, Any]:
    """``config.json`` of a folder for ``timm.create_model("local-dir:FOLDER")``. ``method`` has an
    ``encoder``."""
    quick = "quickgelu_" if method.encoder.mlp == "quick_gelu" else ""
    return mae.timm_config(method) | {"architecture": f"vit_base_patch16_clip_{quick}224"}


def siglip_config(method: Any) -> dict[str, Any]:
    """As :func:`clip_config`."""
    config = mae.timm_config(method)
    config["model_args"]["act_layer"] = method.encoder.mlp
    return config | {"architecture": "vit_base_patch16_siglip_224", "global_pool": "map"}


def activation(architecture: str) -> str | None:
    """The activation of an image tower by timm's name of it; None of SigLIP's, which timm computes
    with exact GELU though they were trained with its tanh form."""
    if "siglip" in architecture:
        return None
    return "quick_gelu" if "quickgelu" in architecture else "gelu"
