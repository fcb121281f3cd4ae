"""Names of the original MAE code and of timm: ``mae-pth`` and ``timm``. (timm's towers of CLIP and
SigLIP: ``timm_towers.py``.)

Both call an encoder's tensors alike, with q, k and v fused. ``mae-pth`` has the decoder too, in a
``.pth`` file under ``model``. ``timm`` has the encoder alone, of MAE or of DINOv2; so have the
published ``webssl-mae*`` ``.pth`` files and those that original MAE calls "pre-trained, encoder
only". DINOv2's own names (``dino.py``) are timm's but for a few.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from webssl_jax.data.views import Preprocess
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import positions, preprocessing
from webssl_jax.weights.tables import CONV, LINEAR, Row, Table, WeightsError, linear, norm

# What wrappers put into names when the wrapped model was saved.
WRAPPERS = (r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+", r"\1")
NORM_EPS = 1e-6  # of the originals and of timm; their files do not say


def timm_table(encoder: ViTConfig) -> Table:
    """timm's ``VisionTransformer`` with class token and final norm. A classifier's head in a file
    is passed over on import. One that was fine-tuned on the mean of patches, as MAE's are, has that
    mean's norm (``fc_norm``) in the place of the final one: it is taken for it.

    A mask token has no place in it. With registers timm has no position for the class token: it is
    added to that token in the file, which computes the same, and comes back as a part of it.
    """
    cls = Row("encoder/cls_token", "cls_token")
    table, fixed = positions.rows(encoder, "pos_embed", with_cls=not encoder.num_registers)
    if encoder.num_registers:
        table += (Row("encoder/register_tokens", "reg_token"),)
        if encoder.position == "learned":
            position = ("encoder/pos_embed", lambda x: x[:, :1])
            cls = dataclasses.replace(cls, plus=position)
    return Table(
        "timm",
        (cls, *table, *encoder_rows(encoder, swiglu=("fc1", "fc2"))),
        fixed,
        leave_out=(r"^(?!encoder/)", r"^encoder/mask_token$"),
        aliases=(WRAPPERS, (r"^fc_norm\.", "norm.")),
        ignore=(r"^head\.",),
    )


def mae_table(encoder: ViTConfig, decoder: ViTConfig) -> Table:
    """Original MAE's ``MaskedAutoencoderViT``: encoder and decoder."""
    plain = dataclasses.replace(encoder, mlp="gelu", layer_scale=None)  # it knows no other
    table, constants = positions.rows(encoder, "pos_embed")
    rows = (
        Row("encoder/cls_token", "cls_token"),
        *table,
        *encoder_rows(plain),
        *linear("decoder/embed", "decoder_embed"),
        Row("decoder/mask_token", "mask_token"),
        *block_rows(decoder, "decoder/blocks", "decoder_blocks"),
        *norm("decoder/norm", "decoder_norm"),
        *linear("decoder/pred", "decoder_pred"),
    )
    constants += (positions.constant(decoder, "decoder_pos_embed"),)
    return Table(
        "mae-pth", rows, constants, leave_out=(r"^(?!encoder/|decoder/)",), aliases=(WRAPPERS,)
    )


def check_original(config: ViTConfig, family: str, norm_eps: float) -> None:
    """Refuses what the originals' code, with its own ``norm_eps``, computes otherwise, without a
    word, from the same file.

    Raises:
      WeightsError: naming the field.
    """
    if config.norm_eps != norm_eps:
        raise WeightsError(
            f"{family}: its code has norm_eps = {norm_eps:g} built in, this model has "
            f"{config.norm_eps:g}; export in a format of transformers"
        )


def mae_extra(method: Any) -> dict[str, int | float | bool | str]:
    """What a ``.pth`` file of tensors does not say, kept beside them under ``webssl_jax``. Loaders
    of the original read ``model`` only."""
    return {
        "heads": method.encoder.heads,
        "image_size": preprocessing.size_in_words(method.encoder.image_size),
        "decoder_heads": method.decoder.heads,
        "mask_ratio": float(method.mask_ratio),
        "norm_pix_loss": bool(method.norm_pix_loss),
    }


def timm_config(method: Any) -> dict[str, Any]:
    """``config.json`` of a folder for ``timm.create_model("local-dir:FOLDER")``. ``method`` has an
    ``encoder``."""
    c = method.encoder
    packed = c.mlp == "swiglu"  # timm counts both halves
    more: dict[str, Any] = {}
    if c.layer_scale is not None:
        more["init_values"] = c.layer_scale
    if c.num_registers:
        more |= {"reg_tokens": c.num_registers, "no_embed_class": True}
    return {
        # Any of the kind, model_args make of it what this one is. That an MLP is SwiGLU cannot be
        # said there.
        "architecture": "vit_giant_patch14_dinov2" if packed else "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": c.width,
        "global_pool": "token",
        "model_args": {
            "img_size": c.image_size,
            "patch_size": c.patch_size,
            "embed_dim": c.width,
            "depth": c.depth,
            "num_heads": c.heads,
            "mlp_ratio": ratio(c.hidden * (2 if packed else 1), c.width),
            "qkv_bias": c.qkv_bias,
            **more,
        },
        "pretrained_cfg": {
            "input_size": [3, *c.image_shape],
            "fixed_input_size": True,
            **preprocessing.for_timm(_at(method.preprocess, c)),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _at(preprocess: Preprocess, c: ViTConfig) -> Preprocess:
    """``preprocess`` at the encoder's own size."""
    return preprocess.at(c.image_size) if isinstance(c.image_size, int) else preprocess


def ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` from which ``int(width * mlp_ratio)`` makes ``hidden``."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else math.nextafter(exact, math.inf)


def encoder_rows(
    c: ViTConfig, prefix: str = "", swiglu: tuple[str, str] = ("w12", "w3")
) -> tuple[Row, ...]:
    """What all originals call alike: the patch embedding, the blocks and the final norm. swiglu:
    names of the packed MLP's two layers."""
    return (
        Row("encoder/patch_embed/kernel", f"{prefix}patch_embed.proj.weight", CONV),
        Row("encoder/patch_embed/bias", f"{prefix}patch_embed.proj.bias"),
        *block_rows(c, "encoder/blocks", f"{prefix}blocks", swiglu),
        *norm("encoder/norm", f"{prefix}norm"),
    )


def block_rows(
    c: ViTConfig, ours: str, theirs: str, swiglu: tuple[str, str] = ("w12", "w3")
) -> tuple[Row, ...]:
    """The rows of the blocks of one network."""
    block = theirs + ".{i}."
    attn = f"{ours}/attn"
    qkv = fused(tuple(f"{attn}/{x}" for x in "qkv"), f"{block}attn.qkv")
    scales = [Row(f"{ours}/layer_scale{i}/gamma", f"{block}ls{i}.gamma") for i in (1, 2)]
    return (
        *norm(f"{ours}/norm1", f"{block}norm1"),
        *(qkv if c.qkv_bias else qkv[:1]),
        *linear(f"{attn}/out", f"{block}attn.proj"),
        *(scales if c.layer_scale is not None else ()),
        *norm(f"{ours}/norm2", f"{block}norm2"),
        *mlp_rows(c, ours, block, swiglu),
    )


def mlp_rows(c: ViTConfig, ours: str, block: str, swiglu: tuple[str, str]) -> tuple[Row, ...]:
    """The rows of the blocks' MLPs; the gate of a packed one stands first. block: "BLOCKS.{i}."."""
    if c.mlp == "swiglu":
        first, last = swiglu
        return (
            *fused((f"{ours}/mlp/w1", f"{ours}/mlp/w2"), f"{block}mlp.{first}"),
            *linear(f"{ours}/mlp/w3", f"{block}mlp.{last}"),
        )
    return (
        *linear(f"{ours}/mlp/fc1", f"{block}mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{block}mlp.fc2"),
    )


def fused(ours: tuple[str, ...], theirs: str) -> tuple[Row, Row]:
    """The rows of one ``nn.Linear`` that holds several of ours, one after the other."""
    return (
        Row(tuple(f"{path}/kernel" for path in ours), f"{theirs}.weight", LINEAR),
        Row(tuple(f"{path}/bias" for path in ours), f"{theirs}.bias"),
    )
