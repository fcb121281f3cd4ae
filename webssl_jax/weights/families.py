"""The families of weight files by name. A new one is a file beside this and a row below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from webssl_jax.config import suggest
from webssl_jax.weights import clip, dino, dinov3, hf, ijepa, mae, mocov3, siglip, timm_towers
from webssl_jax.weights.networks import heads_of
from webssl_jax.weights.tables import Table, WeightsError


class Licence(NamedTuple):
    """Under which licence the published weights of a family are.

    name, link: for model cards: the hub's name of a licence it knows, else any name and where it
    is. terms: what it asks of whoever uses the weights, in a sentence.
    """

    name: str
    terms: str
    link: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family sees a method (``methods.base.Method``, or ``networks.Networks``) whose
    networks' configs are its fields.

    table: rows for the method's networks. needs: the networks, as fields of the method.
    library, opens: who opens its files, and with what.
    config: the dict of its ``config_file``; None for a family that is a single ``.pth`` file.
    weights_file: the one file of a folder, where its library knows no index of several.
    model_types: of transformers, in that config.
    key: what the tensors stand under in a ``.pth``; None where they are all there is.
    extra: what is kept beside them.
    resize: how its code fits positions to another image size (``ViTConfig.position_resize``).
    resize_registers: the same of networks with registers, where that is another way.
    norm_eps: the epsilon of networks whose files do not say it; fixed_eps: its code has that built
      in.
    periods: the tensor with the periods of rotated positions, which tells heads and base.
    key_mask: the tensor of a block that says that keys have no bias, where q, k and v share one.
    any_grid: its code takes grids of patches that are not square.
    mlps: kinds of MLP that its code has.
    towers: whose image tower its encoder is, ``clip`` or ``siglip``; described by ``towers.py``.
    fields: what all of its encoders have, fields of ``ViTConfig``: the pooling where it is not CLS,
      and ``position`` where it is ``rope``.
    licence: of its published weights, where that asks for something.
    """

    name: str
    needs: tuple[str, ...]
    table: Callable[[Any], Table]
    library: str
    opens: str
    config: Callable[[Any], dict[str, Any]] | None = None
    config_file: str = "config.json"
    weights_file: str | None = None
    model_types: tuple[str, ...] = ()
    key: str | None = None
    extra: Callable[[Any], dict[str, Any]] | None = None
    resize: str = "plain"
    resize_registers: str | None = None
    norm_eps: float = mae.NORM_EPS
    fixed_eps: bool = False
    periods: str = ""
    key_mask: str = ""
    any_grid: bool = False
    mlps: tuple[str, ...] = ("gelu", "swiglu")
    towers: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: Licence | None = None

    def resize_of(self, num_registers: int) -> str:
        """How its code fits positions of a network with so many registers."""
        return (num_registers and self.resize_registers) or self.resize


# DINOv2's hub and configs build networks with registers, and these alone, with
# interpolate_antialias=True and interpolate_offset=0.
_DINOV2_REGISTERS = "antialias"

DINOV3_LICENCE = Licence(
    "dinov3-license",
    "Meta's DINOv3 License lets you use them, also commercially, and asks that they, and what is "
    "made of them, are passed on under it and with a copy of it, that publications acknowledge "
    "DINOv3, and that they are not used for arms",
    "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
)
_NOT_COMMERCIAL = Licence("cc-by-nc-4.0", "CC BY-NC 4.0: not for commercial use")  # of Meta's code
_ROPE = {"position": "rope"}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "hf-vit",
            ("encoder",),
            lambda method: hf.vit_table(method.encoder),
            "transformers",
            "ViTModel",
            hf.vit_config,
            model_types=("vit", "vit_mae"),
            any_grid=True,
        ),
        Family(
            "hf-vit-mae",
            ("encoder", "decoder"),
            lambda method: hf.vit_mae_table(method.encoder, method.decoder),
            "transformers",
            "ViTMAEForPreTraining",
            hf.vit_mae_config,
            model_types=("vit", "vit_mae"),
        ),
        Family(
            "mae-pth",
            ("encoder", "decoder"),
            lambda method: mae.mae_table(method.encoder, method.decoder),
            "original MAE",
            "torch.load",
            key="model",
            extra=mae.mae_extra,
            fixed_eps=True,
        ),
        Family(
            "timm",
            ("encoder",),
            lambda method: mae.timm_table(method.encoder),
            "timm",
            "timm.create_model",
            mae.timm_config,
            resize="antialias",
            fixed_eps=True,
            any_grid=True,
        ),
        Family(
            "dinov2-pth",
            ("encoder",),
            lambda method: dino.backbone_table(method.encoder),
            "original DINOv2 and Web-SSL",
            "torch.load",
            resize="offset",
            resize_registers=_DINOV2_REGISTERS,
            fixed_eps=True,
        ),
        Family(
            "dinov2-teacher",
            ("encoder", "dino_head"),
            lambda method: dino.teacher_table(method.encoder, heads_of(method)),
            "original DINOv2 and Web-SSL",
            "torch.load",
            key="teacher",
            extra=dino.teacher_extra,
            resize="offset",
            resize_registers=_DINOV2_REGISTERS,
            fixed_eps=True,
        ),
        Family(
            "dinov2-heads",
            ("dino_head",),
            lambda method: dino.heads_table(heads_of(method)),
            "original DINOv2 and Web-SSL",
            "torch.load",
        ),
        Family(
            "hf-dinov2",
            ("encoder",),
            lambda method: dino.hf_table(method.encoder),
            "transformers",
            "Dinov2Model",
            dino.hf_config,
            model_types=("dinov2", "dinov2_with_registers"),
        ),
        Family(
            "hf-dinov2-registers",
            ("encoder",),
            lambda method: dino.hf_registers_table(method.encoder),
            "transformers",
            "Dinov2WithRegistersModel",
            dino.hf_registers_config,
            model_types=("dinov2", "dinov2_with_registers"),
            resize="antialias",
        ),
        Family(
            "hf-ijepa",
            ("encoder",),
            lambda method: hf.ijepa_table(method.encoder),
            "transformers",
            "IJepaModel",
            hf.ijepa_config,
            model_types=("ijepa",),
            any_grid=True,
            mlps=("gelu",),
            fields={"pooling": "mean"},
            licence=_NOT_COMMERCIAL,
        ),
        Family(
            "hf-dinov3",
            ("encoder",),
            lambda method: dinov3.table(method.encoder),
            "transformers",
            "DINOv3ViTModel",
            dinov3.config,
            model_types=("dinov3_vit",),
            any_grid=True,
            fields=_ROPE,
            licence=DINOV3_LICENCE,
        ),
        Family(
            "dinov3-pth",
            ("encoder",),
            lambda method: dinov3.original_table(method.encoder),
            "original DINOv3",
            "torch.load",
            norm_eps=dinov3.NORM_EPS,
            fixed_eps=True,
            periods=dinov3.PERIODS,
            key_mask=dinov3.KEY_MASK,
            any_grid=True,
            fields=_ROPE,
            licence=DINOV3_LICENCE,
        ),
        Family(
            "dinov3-teacher",
            ("encoder", "dino_head"),
            lambda method: dinov3.teacher_table(method.encoder, heads_of(method)),
            "original DINOv3",
            "torch.load",
            key="teacher",
            extra=dinov3.teacher_extra,
            norm_eps=dinov3.NORM_EPS,
            periods=f"backbone.{dinov3.PERIODS}",
            key_mask=f"backbone.{dinov3.KEY_MASK}",
            any_grid=True,
            fields=_ROPE,
            licence=DINOV3_LICENCE,
        ),
        Family(
            "timm-dinov3",
            ("encoder",),
            lambda method: dinov3.timm_table(method.encoder),
            "timm",
            "timm.create_model",
            dinov3.timm_config,
            norm_eps=dinov3.NORM_EPS,
            fixed_eps=True,
            any_grid=True,
            fields=_ROPE,
            licence=DINOV3_LICENCE,
        ),
        Family(
            "ijepa-pth",
            ("encoder",),
            lambda method: ijepa.table("ijepa-pth", method.encoder),
            "original I-JEPA",
            "torch.load",
            key="target_encoder",
            extra=ijepa.extra,
            fixed_eps=True,
            mlps=("gelu",),
            fields={"pooling": "mean"},
            licence=_NOT_COMMERCIAL,
        ),
        Family(
            "timm-ijepa",
            ("encoder",),
            lambda method: ijepa.table("timm-ijepa", method.encoder),
            "timm",
            "timm.create_model",
            ijepa.timm_config,
            resize="antialias",
            fixed_eps=True,
            any_grid=True,
            mlps=("gelu",),
            fields={"pooling": "mean"},
            licence=_NOT_COMMERCIAL,
        ),
        Family(
            "mocov3-pth",
            ("encoder",),
            lambda method: mocov3.table(method.encoder),
            "original MoCo v3",
            "torch.load",
            key="state_dict",
            extra=ijepa.extra,
            fixed_eps=True,
            mlps=("gelu",),
            licence=_NOT_COMMERCIAL,
        ),
        Family(
            "hf-clip",
            ("encoder", "text"),
            lambda method: clip.hf_table(method.encoder, method.text),
            "transformers",
            "CLIPModel",
            clip.hf_config,
            mlps=clip.MLPS,
            towers="clip",
        ),
        Family(
            "hf-clip-vision",
            ("encoder",),
            lambda method: clip.hf_vision_table(method.encoder),
            "transformers",
            "CLIPVisionModel",
            clip.hf_vision_config,
            mlps=clip.MLPS,
            towers="clip",
        ),
        Family(
            "open-clip",
            ("encoder", "text"),
            lambda method: clip.open_clip_table(method.encoder, method.text, clip.has_bias(method)),
            "open_clip",
            "open_clip.create_model_from_pretrained",
            clip.open_clip_config,
            config_file=clip.OPEN_CLIP_CONFIG,
            weights_file=clip.OPEN_CLIP_FILE,
            resize="antialias",
            mlps=clip.MLPS,
            towers="clip",
            any_grid=True,
        ),
        Family(
            "open-clip-pth",
            ("encoder", "text"),
            lambda method: clip.open_clip_table(method.encoder, method.text, clip.has_bias(method)),
            "open_clip and MetaCLIP",
            "torch.load",
            key="state_dict",
            extra=clip.open_clip_extra,
            resize="antialias",
            mlps=clip.MLPS,
            towers="clip",
            any_grid=True,
        ),
        Family(
            "hf-siglip",
            ("encoder", "text"),
            lambda method: siglip.hf_table(method.encoder, method.text),
            "transformers",
            "SiglipModel",
            siglip.hf_config,
            mlps=siglip.MLPS,
            towers="siglip",
        ),
        Family(
            "hf-siglip-vision",
            ("encoder",),
            lambda method: siglip.hf_vision_table(method.encoder),
            "transformers",
            "SiglipVisionModel",
            siglip.hf_vision_config,
            mlps=siglip.MLPS,
            towers="siglip",
        ),
        Family(
            "timm-clip",
            ("encoder",),
            lambda method: timm_towers.clip_table(method.encoder),
            "timm",
            "timm.create_model",
            timm_towers.clip_config,
            resize="antialias",
            mlps=clip.MLPS,
            towers="clip",
            any_grid=True,
        ),
        Family(
            "timm-siglip",
            ("encoder",),
            lambda method: timm_towers.siglip_table(method.encoder),
            "timm",
            "timm.create_model",
            timm_towers.siglip_config,
            resize="antialias",
            fixed_eps=True,
            mlps=timm_towers.SIGLIP_MLPS,
            towers="siglip",
            any_grid=True,
        ),
    )
}


def table_of(name: str, method: Any) -> Table:
    """The table that turns the parameters of ``method`` into files of the family ``name``.

    Raises:
      WeightsError: for an unknown family, or one that cannot hold the method's networks.
    """
    if name not in FAMILIES:
        raise WeightsError(f"no weight format {name!r}; {suggest(name, FAMILIES)}")
    family = FAMILIES[name]
    missing = [part for part in family.needs if getattr(method, part, None) is None]
    if missing:
        raise WeightsError(f"{name}: these weights have no {' and no '.join(missing)}")
    if "encoder" in family.needs and not family.towers:
        _check_fields(family, method.encoder)
    networks = [getattr(method, part) for part in ("encoder", "decoder") if part in family.needs]
    for network in networks:
        if network.mlp not in family.mlps:
            raise WeightsError(f"{name}: its code has no mlp = {network.mlp!r}")
        if not family.any_grid and network.grid[0] != network.grid[1]:
            raise WeightsError(
                f"{name}: its code knows square grids alone, and these patches stand in "
                "{}x{}; export as timm".format(*network.grid)
            )
    for network in networks if family.fixed_eps else ():
        mae.check_original(network, name, family.norm_eps)
    return family.table(method)


def _check_fields(family: Family, encoder: Any) -> None:
    """Refuses an encoder that the family's code computes otherwise, from the same names."""
    rotated = family.fields.get("position") == "rope"
    theirs = {"pooling": family.fields.get("pooling", "cls"), "rotated positions": rotated}
    ours = {"pooling": encoder.pooling, "rotated positions": encoder.position == "rope"}
    for key, value in theirs.items():
        if value != ours[key]:
            raise WeightsError(
                f"{family.name}: its networks have {key}: {value}, this model has {ours[key]}"
            )
