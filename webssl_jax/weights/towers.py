"""Which towers of images and texts a weight file holds: what the shapes of its tensors say, and
what they cannot say (heads, activation, epsilon, colours) by the config beside them, by what our
own exports keep in a ``.pt``, or by the published sizes. What they say twice must agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from webssl_jax.models import clip_sizes, sizes
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.weights import clip, configs, preprocessing, shapes, siglip
from webssl_jax.weights.families import Family
from webssl_jax.weights.given import NOTHING, Given
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.preprocessing import one_way
from webssl_jax.weights.stored import Opened, WeightsError, shown

# What transformers takes when config.json does not say.
_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": clip.NORM_EPS}
_SIGLIP = {"hidden_act": siglip.ACTIVATION, "layer_norm_eps": siglip.NORM_EPS}
_HF = {
    ("clip", "encoder"): _B | _CLIP | {"patch_size": 32},
    ("clip", "text"): _B
    | _CLIP
    | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
    ("siglip", "encoder"): _B | _SIGLIP | {"patch_size": 16, "vision_use_head": True},
    ("siglip", "text"): _B | _SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64},
}
# What its names for activations are, where ours differ.
_ACTIVATIONS = {siglip.ACTIVATION: "gelu_tanh"}
_OLD_END = 2  # an eos_token_id of old configs, where it means the largest id
# What open_clip takes when its config does not say.
_OPEN_VISION = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
_OPEN_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
# Keys that do not change what is computed from texts and images.
_OPEN_FREE = (
    "patch_dropout",
    "output_tokens",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "pad_id",
    "eos_id",
)
# Those that do, with the values that mean CLIP; of any other key only nothing: None or False.
_OPEN_PLAIN = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
_OPEN_POOLS = ("tok", "argmax")


def describe(
    files: Opened, family: Family, given: Given = NOTHING, otherwise: Any = None
) -> tuple[Networks, str, tuple[str, ...]]:
    """As ``shapes.describe``, of a family with ``towers``.

    Raises:
      WeightsError: if shapes are missing or make no sense, or the config says otherwise.
    """
    read = _Towers(files, family, given)
    facts = {"encoder": read.vision()}
    facts["encoder"]["position_resize"] = shapes.position_resize(files, family, given, 0)[0]
    if "text" in family.needs:
        facts["text"] = read.text()
    try:
        said = _said(files, family.towers, facts)
    except WeightsError:
        # Before the config is blamed: do the shapes agree among themselves?
        with contextlib.suppress(ValueError):  # nor with any network
            one: dict[str, Any] = {"heads": 1, "mlp": family.mlps[0], "norm_eps": clip.NORM_EPS}
            own_parts: dict[str, Any] = {"encoder": ViTConfig(**facts["encoder"] | one)}
            if "text" in facts:
                own_parts["text"] = TextConfig(**facts["text"] | one)
            contrast = "sigmoid" if read.has("logit_bias") else "softmax"
            shapes.check_shapes(files, family, Networks(**own_parts, contrast=contrast))
        raise
    assumed = read.assumed
    built: dict[str, Any] = {}
    for tower, made in facts.items():
        own, name = getattr(otherwise, tower, None), "" if tower == "encoder" else "text "
        stated = said[tower]
        made["heads"] = shapes.choose(
            files,
            f"{name}heads",
            stated.get("heads"),
            given.heads if tower == "encoder" else None,
            _heads(tower, facts) | {"of the run": own and own.heads},
            assumed,
        )
        if made["heads"] is None:
            raise WeightsError(
                f"{files.path}: does not say how many heads attention of {tower} has, and width "
                f"{made['width']} with {made['depth']} blocks is no published size; "
                + (
                    "give it: heads=N (--heads N)"
                    if tower == "encoder"
                    else "a config file beside it can"
                )
            )
        made["mlp"] = shapes.choose(
            files,
            f"{name}mlp",
            stated.get("mlp") or (family.mlps[0] if len(family.mlps) == 1 else None),
            given.mlp,
            {"of the run": own and own.mlp} | _activations(family, facts),
            assumed,
        )
        made["norm_eps"] = stated.get("norm_eps", _HF[family.towers, tower]["layer_norm_eps"])
        kind = ViTConfig if tower == "encoder" else TextConfig
        try:
            built[tower] = kind(**made)
        except ValueError as error:
            raise WeightsError(f"{files.path}: {name}{error}") from None
    bias = family.towers == "siglip" or read.has("logit_bias")
    contrast = "sigmoid" if bias else "softmax"
    try:
        networks = Networks(**built, contrast=contrast, preprocess=said["preprocess"])
    except ValueError as error:
        raise WeightsError(f"{files.path}: {error}") from None
    return networks, read.dtype("encoder/patch_embed/kernel"), tuple(assumed)


def _heads(tower: str, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Attention heads by what tells them."""
    width, depth = facts[tower]["width"], facts[tower]["depth"]
    published = (*clip_sizes.CLIP_SIZES, *clip_sizes.SIGLIP_SIZES)
    named = clip_sizes.vision if tower == "encoder" else clip_sizes.text
    known = {(c.width, c.depth): c.heads for c in map(named, published)}
    guesses = {"of the published size": known.get((width, depth))}
    if tower == "text" and width % 64 == 0:
        guesses["width / 64, as of all of CLIP's texts"] = width // 64
    return guesses


def _activations(family: Family, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The activation of towers by whose they are: nothing in a bare file tells them apart."""
    if family.towers == "siglip":
        return {"as SigLIP's are trained; timm computes its B and L with gelu": "gelu_tanh"}
    c, g14 = facts["encoder"], clip_sizes.vision("g14")
    if (c["width"], c["depth"]) == (g14.width, g14.depth):
        return {"of every published ViT-g-14": g14.mlp}
    return {"OpenAI's and MetaCLIP's; of LAION's and DataComp's files give gelu": "quick_gelu"}


class _Towers(shapes.Shapes):
    """What the shapes in a file say about its towers."""

    def vision(self) -> dict[str, Any]:
        """Fields of a ViTConfig; what only a config says is not among them."""
        patch, across, colours, width = self._ours("encoder/patch_embed/kernel", 4)
        if colours != 3 or across != patch:
            self._refuse(f"patches of {patch}x{across}x{colours} are not square ones of 3 colours")
        siglip = self._family.towers == "siglip"
        number = self._ours("encoder/pos_embed", 3)[1] - (not siglip)
        if number < 1:
            self._refuse("has no positions of patches")
        size = tuple(side * patch for side in self.grid(number, patch))
        return dict(
            width=width,
            depth=self._depth("encoder"),
            mlp_hidden=self._out("encoder/blocks/mlp/fc1"),
            patch_size=patch,
            image_size=one_way(size),
            patch_bias=siglip,
            pre_norm=not siglip,
            pooling="map" if siglip else "cls",
            position="learned",
            init=self._family.towers,
        )

    def text(self) -> dict[str, Any]:
        """Fields of a TextConfig; what only a config says is not among them."""
        vocabulary, width = self._ours("text/token_embed", 2)
        own = {}
        if self._family.towers == "siglip":
            own = dict(causal=False, pooling="last", projection_bias=True, init="siglip")
        return own | dict(
            width=width,
            depth=self._depth("text"),
            mlp_hidden=self._out("text/blocks/mlp/fc1"),
            embedding=self._ours("text/projection/kernel", 2)[1],
            context=self._ours("text/pos_embed", 3)[1],
            vocabulary=vocabulary,
        )

    def _ours(self, path: str, axes: int) -> tuple[int, ...]:
        """The shape of our parameter ``path``, which has ``axes`` axes, in one block."""
        transform = self._rows[path].transform
        key = self._keys[path].format(i=0)
        theirs = transform.to_theirs(np.empty((1,) * axes))
        tensor = self._named(key, theirs.ndim)
        return transform.to_ours(np.broadcast_to(np.float32(0), tensor.shape)).shape


def _said(files: Opened, kind: str, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What shapes do not say: {"encoder": {heads, mlp, norm_eps}, "text": ..., preprocess}, those
    that are known.

    Raises:
      WeightsError: if a config makes no sense, or says something else than the shapes do.
    """
    said: dict[str, Any] = {"encoder": {}, "text": {}}
    usual = preprocessing.default(facts["encoder"]["image_size"], kind)
    said["preprocess"] = usual
    places = {"heads": ("encoder",), "text_heads": ("text",), "mlp": ("encoder", "text")}
    for key, value in files.extra.items():
        if key == "image_size":  # read with the shapes
            continue
        if type(value) is not (str if key == "mlp" else int) or key not in places:
            raise WeightsError(f"{files.path}: webssl_jax.{shown(key)} = {shown(value)}")
        for tower in places[key]:
            said[tower][key.removeprefix("text_")] = value
    if files.config is None:
        return said
    if "model_type" in files.config:
        _transformers(files, files.config, kind, facts, said)
        made = preprocessing.of_transformers(files.preprocessor_file, files.preprocessor, usual)
    elif "architecture" in files.config and "text" not in facts:
        said["encoder"], trained = configs.timm_tower(files, facts["encoder"])
        made = preprocessing.of_timm(files.config_file, trained, usual)
    elif "model_cfg" in files.config and kind == "clip" and "text" in facts:
        _open_clip(files, files.config, facts, said)
        given = files.config.get("preprocess_cfg", {})
        made = preprocessing.of_open_clip(files.config_file, given, usual)
    else:
        raise WeightsError(
            f"{files.config_file}: is a config neither of transformers nor of timm or open_clip"
        )
    return said | {"preprocess": made}


def _transformers(
    files: Opened,
    config: dict[str, Any],
    kind: str,
    facts: Mapping[str, Mapping[str, Any]],
    said: dict[str, Any],
) -> None:
    file, name = files.config_file, config["model_type"]
    if name != kind and (name != f"{kind}_vision_model" or "text" in facts):
        raise WeightsError(f"{file}: model_type = {shown(name)} is not that of these weights")
    for tower, made in facts.items():
        key = "vision_config" if tower == "encoder" else "text_config"
        own = _HF[kind, tower] | (_object(file, config, key) if name == kind else config)
        wanted = {
            "hidden_size": made["width"],
            "num_hidden_layers": made["depth"],
            "intermediate_size": made["mlp_hidden"],
        }
        if tower == "encoder":
            wanted |= {"patch_size": made["patch_size"], "image_size": made["image_size"]}
            wanted["num_channels"] = 3
        else:
            wanted["vocab_size"] = made["vocabulary"]
            wanted["max_position_embeddings"] = made["context"]
            # CLIP's takes the first token of that id: we take the largest.
            if kind == "clip" and own["eos_token_id"] != _OLD_END:
                wanted["eos_token_id"] = made["vocabulary"] - 1
        if kind == "siglip":
            own = {"projection_size": made["width"]} | sizes.given(own)
            wanted |= {"vision_use_head": True} if tower == "encoder" else {}
            wanted |= {"projection_size": made["embedding"]} if tower == "text" else {}
        own["image_size"] = one_way(own.get("image_size"))
        configs.agree(file, own, wanted)
        said[tower] = {
            "heads": configs.number(file, own, "num_attention_heads", int),
            "norm_eps": configs.number(file, own, "layer_norm_eps", float),
            "mlp": _activation(file, own, kind),
        }


def _open_clip(
    files: Opened,
    config: dict[str, Any],
    facts: Mapping[str, Mapping[str, Any]],
    said: dict[str, Any],
) -> None:
    file, model = files.config_file, _object(files.config_file, config, "model_cfg")
    _object(file, {"preprocess_cfg": {}} | config, "preprocess_cfg")
    quick = model.get("quick_gelu", False)
    if type(quick) is not bool:
        raise WeightsError(f"{file}: quick_gelu = {shown(quick)} makes no sense")
    configs.agree(file, {"embed_dim": None} | model, {"embed_dim": facts["text"]["embedding"]})
    for tower, key, defaults in (
        ("encoder", "vision_cfg", _OPEN_VISION),
        ("text", "text_cfg", _OPEN_TEXT),
    ):
        own, made = defaults | _object(file, model, key), facts[tower]
        wanted = {"width": made["width"], "layers": made["depth"]}
        if tower == "encoder":
            wanted |= {"patch_size": made["patch_size"], "image_size": made["image_size"]}
        else:
            wanted |= {"vocab_size": made["vocabulary"], "context_length": made["context"]}
        own["image_size"] = one_way(own.get("image_size"))
        configs.agree(file, own, wanted)
        hidden = int(made["width"] * configs.number(file, own, "mlp_ratio", float))
        if hidden != made["mlp_hidden"]:
            raise WeightsError(
                f"{file}: mlp_ratio = {own['mlp_ratio']} makes an MLP of {hidden}, the weights "
                f"have one of {made['mlp_hidden']}"
            )
        other = [
            f"{shown(name)} = {shown(value)}"
            for name, value in own.items()
            if not (
                name in ("image_size", *defaults)
                or name in _OPEN_FREE
                or value in (None, False)
                or (name == "pool_type" and value in _OPEN_POOLS)
                or _OPEN_PLAIN.get(name) == value
            )
        ]
        if other:
            raise WeightsError(
                f"{file}: {key} names what this code does not compute or does not know: "
                f"{', '.join(other)}"
            )
        if tower == "encoder":
            heads = made["width"] // configs.number(file, own, "head_width", int)
        else:
            heads = configs.number(file, own, "heads", int)
        said[tower] = {"heads": heads, "mlp": "quick_gelu" if quick else "gelu"}


def _object(file: Any, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under ``key``, which may be missing or null."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise WeightsError(f"{file}: {key} = {shown(value)} is no object")
    return value or {}


def _activation(file: Any, config: Mapping[str, Any], kind: str) -> str:
    value = config["hidden_act"]
    known = clip.MLPS if kind == "clip" else (siglip.ACTIVATION,)
    if value not in known:
        raise WeightsError(f"{file}: hidden_act = {shown(value)} is none of {', '.join(known)}")
    return _ACTIVATIONS.get(value, value)
