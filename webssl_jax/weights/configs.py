"""What ``config.json`` (of transformers or of timm) and our own ``.pth`` say beside the tensors.
What they say of shapes must agree with those."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from webssl_jax.methods import pixels
from webssl_jax.weights.stored import Opened, WeightsError, shown

# What transformers takes when config.json does not say.
HF_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
# timm's model_args that change what is computed, with the values that mean a plain ViT.
_TIMM_PLAIN = {
    "in_chans": (3,),
    "class_token": (True,),
    "pos_embed": ("learn",),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "proj_bias": (True,),
    "init_values": (None,),
    "embed_norm_layer": (None,),
    "norm_layer": (None,),  # LayerNorm of epsilon 1e-6; by any other name the epsilon is open
    "act_layer": (None, "gelu"),
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


def facts_of(
    files: Opened, facts: Mapping[str, Any], decoder: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What shapes do not say: heads, decoder_heads, norm_eps, mask_ratio, norm_pix_loss, mean, std;
    those that are known, the colours always.

    Args:
      facts, decoder: what the shapes say, fields of a ViTConfig; decoder None without one.

    Raises:
      WeightsError: if config.json makes no sense, or says something else than the shapes do.
    """
    mean, std = pixels.IMAGENET_MEAN, pixels.IMAGENET_STD
    config, file = files.config, files.config_file
    said: dict[str, Any] = {}
    if files.extra:
        kinds = dict(heads=int, decoder_heads=int, mask_ratio=float, norm_pix_loss=bool)
        for key, value in files.extra.items():
            if type(value) is not kinds.get(key):
                raise WeightsError(f"{files.path}: webssl_jax.{shown(key)} = {shown(value)}")
        said |= files.extra
    if config is not None and "model_type" in config:
        if config["model_type"] not in ("vit", "vit_mae"):
            raise WeightsError(
                f"{file}: model_type = {shown(config['model_type'])} is no vit(_mae)"
            )
        config = HF_DEFAULTS | config
        _agree(
            file,
            config,
            {
                "hidden_size": facts["width"],
                "num_hidden_layers": facts["depth"],
                "intermediate_size": facts["mlp_hidden"],
                "patch_size": facts["patch_size"],
                "image_size": facts["image_size"],
                "qkv_bias": facts["qkv_bias"],
                "num_channels": 3,
                "hidden_act": "gelu",
            },
        )
        said["heads"] = _number(file, config, "num_attention_heads", int)
        said["norm_eps"] = _number(file, config, "layer_norm_eps", float)
        if decoder:
            _agree(
                file,
                config,
                {
                    "decoder_hidden_size": decoder["width"],
                    "decoder_num_hidden_layers": decoder["depth"],
                    "decoder_intermediate_size": decoder["mlp_hidden"],
                },
            )
            said["decoder_heads"] = _number(file, config, "decoder_num_attention_heads", int)
            said["mask_ratio"] = _number(file, config, "mask_ratio", float)
            said["norm_pix_loss"] = _number(file, config, "norm_pix_loss", bool)
        colours = files.preprocessor
        mean = _colours(file, colours.get("image_mean", mean))
        std = _colours(file, colours.get("image_std", std))
    elif config is not None and "architecture" in config:
        given = config.get("model_args", {})
        colours = config.get("pretrained_cfg", {})
        if not isinstance(given, dict) or not isinstance(colours, dict):
            raise WeightsError(f"{file}: model_args or pretrained_cfg is no object")
        ours = {
            "embed_dim": facts["width"],
            "depth": facts["depth"],
            "patch_size": facts["patch_size"],
            "img_size": facts["image_size"],
            "qkv_bias": facts["qkv_bias"],
        }
        _agree(file, given, {key: value for key, value in ours.items() if key in given})
        if "num_heads" in given:
            said["heads"] = _number(file, given, "num_heads", int)
        if "mlp_ratio" in given:
            hidden = facts["width"] * _number(file, given, "mlp_ratio", float)
            if abs(hidden - facts["mlp_hidden"]) >= 1:  # timm rounds it down
                raise WeightsError(
                    f"{file}: mlp_ratio = {given['mlp_ratio']} makes an MLP of {hidden:g}, the "
                    f"weights have one of {facts['mlp_hidden']}"
                )
        other = [
            f"{shown(key)} = {shown(value)}"
            for key, value in given.items()
            if key not in (*ours, "num_heads", "mlp_ratio", *_TIMM_FREE)
            and value not in _TIMM_PLAIN.get(key, ())
        ]
        if other:
            raise WeightsError(
                f"{file}: model_args name what this code does not compute or does not know: "
                f"{', '.join(other)}"
            )
        mean = _colours(file, colours.get("mean", mean))
        std = _colours(file, colours.get("std", std))
    elif config is not None:
        raise WeightsError(f"{file}: is a config.json neither of transformers nor of timm")
    return said | {"mean": mean, "std": std}


def _agree(file: Any, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} = {shown(config[key])}, not {value}"
        for key, value in shapes.items()
        if config[key] != value
    ]
    if wrong:
        raise WeightsError(
            f"{file}: disagrees with the weights, or with this code: {'; '.join(wrong)}"
        )


def _number(file: Any, config: Mapping[str, Any], key: str, kind: type) -> Any:
    value = config[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is not bool and not 0 < value < math.inf:
        raise WeightsError(f"{file}: {key} = {shown(value)} makes no sense")
    return value


def _colours(file: Any, value: Any) -> tuple[float, ...]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(x) in (int, float) and math.isfinite(x) for x in value)
    ):
        raise WeightsError(f"{file}: colours {shown(value)} are no three numbers")
    return tuple(map(float, value))
