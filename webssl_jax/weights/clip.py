"""CLIP's weights in the names of ``transformers``' ``CLIPModel`` and of open_clip, which are
MetaCLIP's and OpenAI's too: both towers, their ways into the shared space, the logit scale.

  hf-clip          ``CLIPModel``
  hf-clip-vision   ``CLIPVisionModel``: the image tower, without its projection
  open-clip        a folder of open_clip
  open-clip-pth    a ``.pt`` file of open_clip or MetaCLIP

open_clip keeps q, k and v fused, and its projections as bare matrices, inputs first. Both have
biases in all layers of their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.weights import mae, preprocessing
from webssl_jax.weights.tables import CONV, LINEAR, Row, Table, WeightsError, linear, norm, squeeze

MLPS = ("gelu", "quick_gelu")
IMAGE = {"mlp": MLPS, "qkv_bias": (True,)}
_TEXT = {"causal": (True,), "pooling": ("eot",), **IMAGE}
NORM_EPS = 1e-5
OPEN_CLIP_FILE = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"

# Positions' numbers, which old versions saved.
POSITION_NUMBERS = (r"embeddings\.position_ids$",)
# Module names of the image tower alone in transformers 5.
BARE_VISION = ((r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)", "vision_model."),)

TABLE = squeeze(0)  # positions: ours (1, N, D), theirs (N, D)
_VECTOR = squeeze(0, 1)  # the CLS token: ours (1, 1, D), theirs (D,)


def has_bias(method: Any) -> bool:
    """Whether a method, or ``networks.Networks``, adds SigLIP's bias to its logits."""
    return method.contrast == "sigmoid"


def hf_table(encoder: ViTConfig, text: TextConfig) -> Table:
    """``CLIPModel``. It has no place for SigLIP's bias.

    Raises:
      WeightsError: for towers that its code computes otherwise.
    """
    check_tower("hf-clip", encoder, IMAGE)
    check_tower("hf-clip", text, _TEXT)
    rows = (
        *_hf_vision(),
        *linear("projection", "visual_projection", bias=False),
        *hf_texts(),
        *linear("text/projection", "text_projection", bias=False),
        Row("logit_scale", "logit_scale"),
    )
    return Table("hf-clip", rows, ignore=POSITION_NUMBERS)


def hf_vision_table(encoder: ViTConfig) -> Table:
    """``CLIPVisionModel``: the encoder. What belongs to texts and to the shared space is passed
    over on import.

    Raises:
      WeightsError: for a tower that its code computes otherwise.
    """
    check_tower("hf-clip-vision", encoder, IMAGE)
    return Table(
        "hf-clip-vision",
        _hf_vision(),
        leave_out=(r"^(?!encoder/)",),
        aliases=BARE_VISION,
        ignore=(
            *POSITION_NUMBERS,
            r"^(text_model|text_projection|visual_projection|classifier)\.",
            r"^logit_scale$",
        ),
    )


def _hf_vision() -> tuple[Row, ...]:
    image = "vision_model."
    embeddings = image + "embeddings."
    return (
        Row("encoder/cls_token", embeddings + "class_embedding", _VECTOR),
        Row("encoder/patch_embed/kernel", embeddings + "patch_embedding.weight", CONV),
        Row("encoder/pos_embed", embeddings + "position_embedding.weight", TABLE),
        *norm("encoder/pre_norm", image + "pre_layrnorm"),  # so spelt
        *hf_blocks("encoder/blocks", image),
        *norm("encoder/norm", image + "post_layernorm"),
    )


def hf_vision_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ``CLIPVisionModel``. ``method`` has an ``encoder``."""
    encoder = method.encoder
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **hf_image_tower(encoder),
    }


def hf_config(method: Any) -> dict[str, Any]:
    """``config.json`` of ``CLIPModel``. ``method`` has ``encoder`` and ``text``.

    Texts are pooled at the first token of the largest id, which is the end of the text.
    """
    text = method.text
    end = text.vocabulary - 1
    vision = hf_vision_config(method)
    del vision["architectures"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": text.embedding,
        "vision_config": vision | {"projection_dim": text.embedding},
        "text_config": hf_tower(text)
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
    check_tower(name, encoder, IMAGE)
    check_tower(name, text, _TEXT)
    if encoder.mlp != text.mlp:
        raise WeightsError(
            f"{name}: one activation serves both towers, not {encoder.mlp} and {text.mlp}"
        )
    for tower in (encoder, text):
        if tower.norm_eps != NORM_EPS:
            raise WeightsError(
                f"{name}: its code has norm_eps = 1e-05 built in, a tower has {tower.norm_eps:g}; "
                "export in the format of transformers"
            )
    rows = (
        Row("encoder/cls_token", "visual.class_embedding", _VECTOR),
        Row("encoder/patch_embed/kernel", "visual.conv1.weight", CONV),
        Row("encoder/pos_embed", "visual.positional_embedding", TABLE),
        *norm("encoder/pre_norm", "visual.ln_pre"),
        *_open_clip_blocks("encoder/blocks", "visual."),
        *norm("encoder/norm", "visual.ln_post"),
        Row("projection/kernel", "visual.proj"),
        Row("text/token_embed", "token_embedding.weight"),
        Row("text/pos_embed", "positional_embedding", TABLE),
        *_open_clip_blocks("text/blocks", ""),
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


def open_clip_config(method: Any) -> dict[str, Any]:
    """``open_clip_config.json``. ``method`` has ``encoder`` and ``text``."""
    encoder, text = method.encoder, method.text
    return {
        "model_cfg": {
            "embed_dim": text.embedding,
            "quick_gelu": encoder.mlp == "quick_gelu",
            **({"init_logit_bias": -10.0} if has_bias(method) else {}),
            "vision_cfg": {
                "image_size": encoder.image_size,
                "layers": encoder.depth,
                "width": encoder.width,
                "head_width": encoder.head_dim,
                "mlp_ratio": mae.ratio(encoder.hidden, encoder.width),
                "patch_size": encoder.patch_size,
            },
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocabulary,
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
                "mlp_ratio": mae.ratio(text.hidden, text.width),
            },
        },
        "preprocess_cfg": preprocessing.for_open_clip(method.preprocess),
    }


def open_clip_extra(method: Any) -> dict[str, int | str]:
    """What a file of tensors does not say; see ``mae.mae_extra``."""
    encoder, text = method.encoder, method.text
    size = preprocessing.size_in_words(encoder.image_size)
    said = {"heads": encoder.heads, "text_heads": text.heads, "mlp": encoder.mlp}
    return said | {"image_size": size}


def check_tower(
    family: str, tower: ViTConfig | TextConfig, known: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuses what shapes do not show and the originals compute otherwise. known: the values that
    the family has of a field.

    Raises:
      WeightsError: naming the field.
    """
    for field, values in known.items():
        value = getattr(tower, field)
        if value not in values:
            raise WeightsError(f"{family}: has no {field} = {value!r}")


def hf_tower(c: ViTConfig | TextConfig) -> dict[str, Any]:
    """What ``config.json`` says of any tower."""
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "hidden_act": c.mlp,
        "layer_norm_eps": c.norm_eps,
        "attention_dropout": 0.0,
    }


def hf_image_tower(encoder: ViTConfig) -> dict[str, Any]:
    """What ``config.json`` says of any image tower."""
    return {
        **hf_tower(encoder),
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
    }


def hf_texts() -> tuple[Row, ...]:
    """The rows of a text tower up to its norm, which ``CLIPModel`` and ``SiglipModel`` call
    alike."""
    words = "text_model."
    return (
        Row("text/token_embed", words + "embeddings.token_embedding.weight"),
        Row("text/pos_embed", words + "embeddings.position_embedding.weight", TABLE),
        *hf_blocks("text/blocks", words),
        *norm("text/norm", words + "final_layer_norm"),
    )


def hf_blocks(ours: str, tower: str) -> tuple[Row, ...]:
    """The rows of a tower's blocks, which ``CLIPModel`` and ``SiglipModel`` call alike."""
    block = tower + "encoder.layers.{i}."
    qkv = (linear(f"{ours}/attn/{x}", f"{block}self_attn.{x}_proj") for x in "qkv")
    return (
        *norm(f"{ours}/norm1", block + "layer_norm1"),
        *(row for rows in qkv for row in rows),
        *linear(f"{ours}/attn/out", block + "self_attn.out_proj"),
        *norm(f"{ours}/norm2", block + "layer_norm2"),
        *linear(f"{ours}/mlp/fc1", block + "mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", block + "mlp.fc2"),
    )


def _open_clip_blocks(ours: str, tower: str) -> tuple[Row, ...]:
    block = tower + "transformer.resblocks.{i}."
    qkv = tuple(f"{ours}/attn/{x}" for x in "qkv")
    return (
        *norm(f"{ours}/norm1", block + "ln_1"),
        Row(tuple(f"{path}/kernel" for path in qkv), block + "attn.in_proj_weight", LINEAR),
        Row(tuple(f"{path}/bias" for path in qkv), block + "attn.in_proj_bias"),
        *linear(f"{ours}/attn/out", block + "attn.out_proj"),
        *norm(f"{ours}/norm2", block + "ln_2"),
        *linear(f"{ours}/mlp/fc1", block + "mlp.c_fc"),
        *linear(f"{ours}/mlp/fc2", block + "mlp.c_proj"),
    )
