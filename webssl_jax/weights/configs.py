"""What ``config.json`` (of transformers or of timm) and our own ``.pth`` say beside the tensors.
What they say of shapes must agree with those."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import dino, dinov3, preprocessing, timm_towers
from webssl_jax.weights.preprocessing import one_way
from webssl_jax.weights.stored import Opened, WeightsError, shown

# What transformers takes when config.json does not say.
_SHARED = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
}
_VIT = _SHARED | {"intermediate_size": 3072, "layer_norm_eps": 1e-12, "patch_size": 16}
_MAE = {
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
_DINO = _SHARED | {"mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
_DEFAULTS = {
    "vit": _VIT,
    "vit_mae": _VIT | _MAE,
    "ijepa": _VIT,
    "dinov3_vit": dinov3.DEFAULTS,
    "dinov2": _DINO | {"patch_size": 14, "use_mask_token": True},
    "dinov2_with_registers": _DINO | {"patch_size": 16, "num_register_tokens": 4},
}
# timm's model_args that change what is computed, with the values that mean a plain ViT.
_TIMM_PLAIN = {
    "in_chans": (3,),
    "class_token": (True,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "final_norm": (True,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "proj_bias": (True,),
    "embed_norm_layer": (None,),
    "norm_layer": (None,),  # LayerNorm of epsilon 1e-6; by any other name the epsilon is open
}
_TIMM_TOWER = {
    "in_chans": (3,),
    "final_norm": (True,),
    "qk_norm": (False,),
    "proj_bias": (True,),
    "init_values": (None,),
    "norm_layer": (None,),
}
# Those that do not: they are about training, the classifier, or how images come in.
_TIMM_FREE = (
    "num_classes",
    "global_pool",
    "pool_include_prefix",
    "fc_norm",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "weight_init",
    "fix_init",
    "dynamic_img_size",
    "dynamic_img_pad",
)


def default(model_type: str, key: str) -> Any:
    """What transformers takes for ``key`` of that kind of model."""
    return _DEFAULTS[model_type][key]


def facts_of(
    files: Opened,
    model_types: tuple[str, ...],
    facts: Mapping[str, Any],
    decoder: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What shapes do not say: heads, decoder_heads, norm_eps, position_resize, mask_ratio,
    norm_pix_loss, preprocess; those that are known, the last always.

    Args:
      model_types: of the transformers' models that the tensors can belong to.
      facts, decoder: what the shapes say, fields of a ViTConfig; decoder None without one.

    Raises:
      WeightsError: if config.json makes no sense, or says something else than the shapes do.
    """
    said: dict[str, Any] = {"preprocess": preprocessing.default(facts["image_size"])}
    if files.extra:
        kinds = dict(heads=int, decoder_heads=int, mask_ratio=float, norm_pix_loss=bool)
        kinds |= dict(position_resize=str, image_size=str)  # the size: read with the shapes
        kinds |= dict(norm_eps=float)
        for key, value in files.extra.items():
            if type(value) is not kinds.get(key):
                raise WeightsError(f"{files.path}: webssl_jax.{shown(key)} = {shown(value)}")
        said |= {key: value for key, value in files.extra.items() if key != "image_size"}
    if files.config is None:
        return said
    if "model_type" in files.config:
        return said | _transformers(files, files.config, model_types, facts, decoder)
    if "architecture" in files.config:
        timm = _timm_dinov3 if facts["position"] == "rope" else _timm
        return said | timm(files, files.config, facts)
    raise WeightsError(f"{files.config_file}: is a config.json neither of transformers nor of timm")


def _transformers(
    files: Opened,
    stated: dict[str, Any],
    model_types: tuple[str, ...],
    facts: Mapping[str, Any],
    decoder: Mapping[str, Any] | None,
) -> dict[str, Any]:
    file, kind = files.config_file, stated["model_type"]
    if kind not in model_types:
        raise WeightsError(
            f"{file}: model_type = {shown(kind)} is no {' and no '.join(model_types) or 'such'}"
        )
    if kind == "dinov3_vit":
        said = dinov3.facts_of(file, stated, ViTConfig(**facts, heads=1))
        return {
            "heads": number(file, said, "num_attention_heads", int),
            "norm_eps": number(file, said, "layer_norm_eps", float),
            "rope_base": number(file, said, "rope_theta", float),
            "preprocess": _of_processor(files, facts),
        }
    config = _DEFAULTS[kind] | stated
    config["image_size"] = one_way(config["image_size"])
    agree(
        file,
        config,
        {
            "hidden_size": facts["width"],
            "num_hidden_layers": facts["depth"],
            "patch_size": facts["patch_size"],
            "image_size": facts["image_size"],
            "qkv_bias": facts["qkv_bias"],
            "num_channels": 3,
            "hidden_act": "gelu",
        },
    )
    if "intermediate_size" in _DEFAULTS[kind]:
        agree(file, config, {"intermediate_size": facts["mlp_hidden"]})
    else:
        swiglu = facts["mlp"] == "swiglu"
        tokens = {"use_mask_token": facts["mask_token"]}
        tokens["num_register_tokens"] = facts["num_registers"]
        tokens = {key: value for key, value in tokens.items() if key in _DEFAULTS[kind]}
        agree(file, config, {"use_swiglu_ffn": swiglu} | tokens)
        hidden = dino.hf_hidden(facts["width"], number(file, config, "mlp_ratio", int), swiglu)
        if hidden != facts["mlp_hidden"]:
            raise WeightsError(
                f"{file}: mlp_ratio = {config['mlp_ratio']} makes an MLP of {hidden}, the weights "
                f"have one of {facts['mlp_hidden']}"
            )
    said = {
        "heads": number(file, config, "num_attention_heads", int),
        "norm_eps": number(file, config, "layer_norm_eps", float),
    }
    if decoder:
        config = _MAE | config
        agree(
            file,
            config,
            {
                "decoder_hidden_size": decoder["width"],
                "decoder_num_hidden_layers": decoder["depth"],
                "decoder_intermediate_size": decoder["mlp_hidden"],
            },
        )
        said["decoder_heads"] = number(file, config, "decoder_num_attention_heads", int)
        said["mask_ratio"] = number(file, config, "mask_ratio", float)
        said["norm_pix_loss"] = number(file, config, "norm_pix_loss", bool)
    return said | {"preprocess": _of_processor(files, facts)}


def _of_processor(files: Opened, facts: Mapping[str, Any]) -> Any:
    """How ``preprocessor_config.json`` makes images."""
    usual = preprocessing.default(facts["image_size"])
    return preprocessing.of_transformers(files.preprocessor_file, files.preprocessor, usual)


def timm_tower(files: Opened, facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what timm's config says of an image tower beside its shapes: heads, mlp, those that are
    known; its ``pretrained_cfg``).

    Raises:
      WeightsError: as :func:`facts_of`.
    """
    assert files.config is not None  # the caller has looked
    file, architecture = files.config_file, files.config["architecture"]
    given, trained = _timm_args(files, files.config)
    ours = {
        "embed_dim": facts["width"],
        "depth": facts["depth"],
        "patch_size": facts["patch_size"],
        "img_size": facts["image_size"],
        "qkv_bias": True,
    }
    agree(file, given, {key: value for key, value in ours.items() if key in given})
    _check_ratio(file, given, facts, facts["mlp_hidden"])
    _refuse_unknown(
        file, given, (*ours, "num_heads", "mlp_ratio", "act_layer", *_TIMM_FREE), _TIMM_TOWER
    )
    said: dict[str, Any] = {}
    if "num_heads" in given:
        said["heads"] = number(file, given, "num_heads", int)
    mlp = given.get("act_layer") or timm_towers.activation(str(architecture))
    if mlp is not None:
        said["mlp"] = mlp
    return said, trained


def _timm_args(files: Opened, stated: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model_args`` and ``pretrained_cfg``."""
    given, trained = stated.get("model_args", {}), stated.get("pretrained_cfg", {})
    if not isinstance(given, dict) or not isinstance(trained, dict):
        raise WeightsError(f"{files.config_file}: model_args or pretrained_cfg is no object")
    # timm writes the side of a square, or both sides
    return {key: one_way(value) for key, value in given.items()}, trained


def _check_ratio(
    file: Any, given: Mapping[str, Any], facts: Mapping[str, Any], hidden: int
) -> None:
    """Compares timm's ``mlp_ratio`` with the width ``hidden`` of the MLP's first layer."""
    if "mlp_ratio" not in given:
        return
    made = facts["width"] * number(file, given, "mlp_ratio", float)
    if abs(made - hidden) >= 1:  # timm rounds it down
        raise WeightsError(
            f"{file}: mlp_ratio = {given['mlp_ratio']} makes an MLP of {made:g}, the "
            f"weights have one of {facts['mlp_hidden']}"
        )


def _refuse_unknown(
    file: Any, given: Mapping[str, Any], free: Sequence[str], plain: Mapping[str, tuple[Any, ...]]
) -> None:
    other = [
        f"{shown(key)} = {shown(value)}"
        for key, value in given.items()
        if key not in free and value not in plain.get(key, ())
    ]
    if other:
        raise WeightsError(
            f"{file}: model_args name what this code does not compute or does not know: "
            f"{', '.join(other)}"
        )


def _timm(files: Opened, stated: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    file = files.config_file
    given, trained = _timm_args(files, stated)
    swiglu, registers = facts["mlp"] == "swiglu", facts["num_registers"]
    ours = {
        "embed_dim": facts["width"],
        "depth": facts["depth"],
        "patch_size": facts["patch_size"],
        "img_size": facts["image_size"],
        "qkv_bias": facts["qkv_bias"],
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
    }
    ours |= {"class_token": False} if facts.get("pooling") == "mean" else {}
    agree(file, given, {key: value for key, value in ours.items() if key in given})
    said = {}
    if "num_heads" in given:
        said["heads"] = number(file, given, "num_heads", int)
    _check_ratio(file, given, facts, facts["mlp_hidden"] * (2 if swiglu else 1))
    plain = _TIMM_PLAIN | {"act_layer": (None, "silu" if swiglu else "gelu")}
    free = (*ours, "num_heads", "mlp_ratio", *_TIMM_FREE)
    if facts["layer_scale"] is None:
        plain["init_values"] = (None,)
    else:
        free += ("init_values",)  # the weights say what has become of them
    _refuse_unknown(file, given, free, plain)
    usual = preprocessing.default(facts["image_size"])
    said["preprocess"] = preprocessing.of_timm(file, trained, usual)
    return said


def _timm_dinov3(files: Opened, stated: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    file = files.config_file
    given, trained = _timm_args(files, stated)
    ours = {
        "embed_dim": facts["width"],
        "depth": facts["depth"],
        "patch_size": facts["patch_size"],
        "qkv_bias": facts["qkv_bias"],
        "num_reg_tokens": facts["num_registers"],
    }
    agree(file, given, {key: value for key, value in ours.items() if key in given})
    gated = facts["mlp"] == "swiglu"
    if not gated:  # else it is rounded up
        _check_ratio(file, given, facts, facts["mlp_hidden"])
    free = (*ours, "num_heads", "mlp_ratio", "img_size", "init_values", "rope_temperature")
    free += ("swiglu_align_to", *_TIMM_FREE)
    _refuse_unknown(file, given, free, dinov3.TIMM_PLAIN | {"swiglu_mlp": (gated,)})
    said: dict[str, Any] = {}
    if "num_heads" in given:
        said["heads"] = number(file, given, "num_heads", int)
    if "rope_temperature" in given:
        said["rope_base"] = number(file, given, "rope_temperature", float)
    usual = preprocessing.default(facts["image_size"])
    return said | {"preprocess": preprocessing.of_timm(file, trained, usual)}


def agree(file: Any, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Raises:
    WeightsError: if ``config`` says something else than ``shapes``; one line with all that differs.
    """
    wrong = [
        f"{key} = {shown(config[key])}, not {value}"
        for key, value in shapes.items()
        if config[key] != value
    ]
    if wrong:
        raise WeightsError(
            f"{file}: disagrees with the weights, or with this code: {'; '.join(wrong)}"
        )


def number(file: Any, config: Mapping[str, Any], key: str, kind: type[int | float]) -> Any:
    """``config[key]``, a ``kind`` above 0, or a bool.

    Raises:
      WeightsError: if it is none.
    """
    value = config[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is not bool and not 0 < value < math.inf:
        raise WeightsError(f"{file}: {key} = {shown(value)} makes no sense")
    return value
