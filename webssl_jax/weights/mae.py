"""Names of the original MAE code and of timm: ``mae-pth`` and ``timm``.

Both call an encoder's tensors alike, with q, k and v fused. ``mae-pth`` has the decoder too, in a
``.pth`` file under ``model``. ``timm`` has the encoder alone; so have the published ``webssl-mae*``
``.pth`` files and those that original MAE calls "pre-trained, encoder only".
"""

from __future__ import annotations

from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.positions import constant
from webssl_jax.weights.tables import CONV, LINEAR, Row, Table, WeightsError, linear, norm

# What wrappers put before every name when the wrapped model was saved.
_ALIASES = ((r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.)+", ""),)
NORM_EPS = 1e-6  # of both; their files do not say


def timm_table(encoder: ViTConfig) -> Table:
    """timm's ``VisionTransformer`` with class token and final norm. A classifier's head in a file
    is passed over on import."""
    rows, constants = _encoder(encoder)
    return Table(
        "timm",
        rows,
        constants,
        leave_out=(r"^(?!encoder/)",),
        aliases=_ALIASES,
        ignore=(r"^head\.",),
    )


def mae_table(encoder: ViTConfig, decoder: ViTConfig) -> Table:
    """Original MAE's ``MaskedAutoencoderViT``: encoder and decoder."""
    rows, constants = _encoder(encoder)
    rows += (
        *linear("decoder/embed", "decoder_embed"),
        Row("decoder/mask_token", "mask_token"),
        *_blocks("decoder/blocks", "decoder_blocks", decoder.qkv_bias),
        *norm("decoder/norm", "decoder_norm"),
        *linear("decoder/pred", "decoder_pred"),
    )
    constants += (constant(decoder, "decoder_pos_embed"),)
    return Table(
        "mae-pth", rows, constants, leave_out=(r"^(?!encoder/|decoder/)",), aliases=_ALIASES
    )


def check_original(config: ViTConfig, family: str) -> None:
    """Refuses what the originals' code computes otherwise, without a word, from the same file.

    Raises:
      WeightsError: naming the field.
    """
    if config.norm_eps != NORM_EPS:
        raise WeightsError(
            f"{family}: its code has norm_eps = {NORM_EPS:g} built in, this model has "
            f"{config.norm_eps:g}; export as hf-vit or hf-vit-mae"
        )


def mae_extra(method: Any) -> dict[str, dict[str, int | float | bool]]:
    """What a ``.pth`` file of tensors does not say, kept beside them under ``webssl_jax``. Loaders
    of the original read ``model`` only."""
    return {
        "webssl_jax": {
            "heads": method.encoder.heads,
            "decoder_heads": method.decoder.heads,
            "mask_ratio": float(method.mask_ratio),
            "norm_pix_loss": bool(method.norm_pix_loss),
        }
    }


def timm_config(method: Any) -> dict[str, Any]:
    """``config.json`` of a folder for ``timm.create_model("local-dir:FOLDER")``. ``method`` has an
    ``encoder``."""
    c, view = method.encoder, method.eval_view()
    return {
        # any plain ViT: model_args make of it what this one is
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": c.width,
        "global_pool": "token",
        "model_args": {
            "img_size": c.image_size,
            "patch_size": c.patch_size,
            "embed_dim": c.width,
            "depth": c.depth,
            "num_heads": c.heads,
            "mlp_ratio": c.hidden / c.width,
            "qkv_bias": c.qkv_bias,
        },
        "pretrained_cfg": {
            "input_size": [3, c.image_size, c.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": view.size / view.resize,
            "mean": list(method.mean),
            "std": list(method.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _encoder(c: ViTConfig) -> tuple[tuple[Row, ...], tuple]:
    rows = (
        Row("encoder/cls_token", "cls_token"),
        Row("encoder/patch_embed/kernel", "patch_embed.proj.weight", CONV),
        Row("encoder/patch_embed/bias", "patch_embed.proj.bias"),
        *_blocks("encoder/blocks", "blocks", c.qkv_bias),
        *norm("encoder/norm", "norm"),
    )
    if c.position == "learned":
        return (*rows, Row("encoder/pos_embed", "pos_embed")), ()
    return rows, (constant(c, "pos_embed"),)


def _blocks(ours: str, theirs: str, qkv_bias: bool) -> tuple[Row, ...]:
    block = theirs + ".{i}."
    attn = f"{ours}/attn"
    qkv = [
        Row(tuple(f"{attn}/{x}/kernel" for x in "qkv"), f"{block}attn.qkv.weight", LINEAR),
        Row(tuple(f"{attn}/{x}/bias" for x in "qkv"), f"{block}attn.qkv.bias"),
    ]
    return (
        *norm(f"{ours}/norm1", f"{block}norm1"),
        *(qkv if qkv_bias else qkv[:1]),
        *linear(f"{attn}/out", f"{block}attn.proj"),
        *norm(f"{ours}/norm2", f"{block}norm2"),
        *linear(f"{ours}/mlp/fc1", f"{block}mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{block}mlp.fc2"),
    )
