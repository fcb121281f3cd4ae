"""Configurations of transformers and ViTs, and the sizes of the Web-SSL paper (arXiv 2504.01017,
Table 1) by name.

Web-DINO: patch 14, SwiGLU, LayerScale, learned positions, a mask token (DINOv2's block).
Web-MAE: GELU MLP of 4 x width, fixed sin-cos positions, patch 14 (300m: 16), no LayerScale.
``micro`` and ``tiny`` are small versions of both families for laptops and tests.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from webssl_jax.models.init_schemes import INIT_SCHEMES, InitScheme
from webssl_jax.models.position import INTERPOLATIONS, POSITIONS, Grid, Interpolation, Position
from webssl_jax.models.rope import Rope

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Config = typing.TypeVar("_Config", bound="DataclassInstance")

MLPS = ("gelu", "quick_gelu", "gelu_tanh", "swiglu")
POOLINGS = ("cls", "map", "mean")
NORMS = ("layer", "rms")
DTYPES = ("bfloat16", "float32")
REMATS = ("none", "full", "most", "dots", "named")
ATTENTIONS = ("xla", "pallas")
LANES = 128  # of a TPU: channels that its matrix unit takes at a time


def heads_per_lanes(heads: int, head_dim: int) -> int | None:
    """How many of ``heads`` are computed together on TPUs, because they fill the lanes exactly;
    None where no number does."""
    if head_dim % LANES == 0:
        return 1
    group = LANES // head_dim
    return group if group * head_dim == LANES and heads % group == 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A stack of transformer blocks. Widths are in channels.

    mlp: two layers with ``gelu`` (exact), ``quick_gelu`` (CLIP's x * sigmoid(1.702 x)) or
      ``gelu_tanh`` between them, or ``swiglu``.
    mlp_hidden: hidden width; ``None`` takes the originals' rule (:attr:`hidden`).
    layer_scale: initial gamma, ``None`` for no LayerScale.
    key_bias: whether keys have one, where queries and values do (most of DINOv3's have none; where
      nothing is rotated, a bias of all keys alike changes no weight of attention).
    norm: ``layer`` or ``rms`` (RMSNorm, without bias; Zhang and Sennrich, arXiv 1910.07467).
    drop_path: rate of stochastic depth, the same in every block (``blocks.py``).
    drop_path_group: images from which one subset is drawn, ``None`` for the whole batch. The
      originals draw per device; a fixed group keeps the result independent of the mesh.
    init: the initial values, as of ``mae`` (xavier) or ``dinov2`` (normal 0.02); all are in
      ``init_schemes.py``.
    dtype: of the computation. Parameters and outputs are always float32.
    remat: what the backward pass recomputes; see ``blocks.py``.
    attention: ``xla``, or ``pallas`` for our own TPU kernels of up to 768 tokens
      (``attention_kernel.py``); the result is the same.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    width: int
    depth: int
    heads: int
    mlp: str = "gelu"
    mlp_hidden: int | None = None
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_group: int | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    norm: str = "layer"
    norm_eps: float = 1e-6
    init: str = "dinov2"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        self._check_choices(
            mlp=MLPS, init=tuple(INIT_SCHEMES), dtype=DTYPES, remat=REMATS, attention=ATTENTIONS
        )
        self._check_choices(norm=NORMS)
        if not self.qkv_bias:
            object.__setattr__(self, "key_bias", False)  # one way to say it
        self._check_positive("width", "depth", "heads", "mlp_hidden", "drop_path_group")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps = {self.norm_eps} must be positive")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} does not divide into heads = {self.heads}")
        if self.attention == "pallas":
            self._check_kernels()
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path = {self.drop_path} must lie in [0, 1)")

    def _check_kernels(self) -> None:
        if heads_per_lanes(self.heads, self.head_dim) is None:
            raise ValueError(
                "attention = 'pallas' takes heads that fill 128 channels together, not "
                f"{self.heads} of {self.head_dim}; use 'xla'"
            )

    def _check_choices(self, **fields: tuple[str, ...]) -> None:
        for field, known in fields.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} = {getattr(self, field)!r} is not one of {', '.join(known)}"
                )

    def _check_positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP: 4 x width; for SwiGLU 2/3 of that, rounded up to a multiple of 8
        (DINOv2)."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.mlp == "swiglu":
            return (int(4 * self.width * 2 / 3) + 7) // 8 * 8
        return 4 * self.width

    @property
    def causal(self) -> bool:
        """Whether a token attends only to itself and to earlier tokens."""
        return False

    @property
    def rope(self) -> Rope | None:
        """How queries and keys are rotated; None where they are not."""
        return None

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def init_scheme(self) -> InitScheme:
        """The initialisers that ``init`` names."""
        return INIT_SCHEMES[self.init](self.width, self.depth)

    def block_flops(self, tokens: int) -> float:
        """Floating-point operations of all blocks, forward, for one sequence of ``tokens``: the
        matrix products of the four projections, the MLP and the two attention products, two
        operations a multiply-add."""
        projections = 4 * self.width * self.width
        mlp = (3 if self.mlp == "swiglu" else 2) * self.width * self.hidden
        attention = 2 * tokens * self.width
        return 2.0 * self.depth * tokens * (projections + mlp + attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(BlockConfig):
    """One vision transformer. Lengths of images and patches are in pixels.

    image_size: the side of a square, or (height, width).
    patch_bias: whether the patch embedding has a bias; CLIP's has none.
    position: ``learned`` (a parameter, CLS included), ``sincos`` or ``sincos_rows`` (MAE's and
      MoCo's fixed tables, no parameter; ``position.py``), or ``rope`` (rotated queries and keys;
      ``rope.py``).
    rope_base, rope_rescale, rope_jitter, rope_shift: of ``rope``, the fields of ``rope.Rope``.
    position_resize: how the position table is resized for another image size; see ``position.py``.
    num_registers: register tokens (Darcet et al., arXiv 2309.16588).
    mask_token: whether a learned token can replace masked patches (iBOT).
    pre_norm: a LayerNorm of all tokens before the first block (CLIP).
    pooling: ``cls``, the output of a CLS token stands for the image; ``map``, there is no CLS token
      but attention pooling of all tokens (SigLIP; ``pooling.py``); ``mean``, there is none and the
      mean of the patches stands for the image (I-JEPA).

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    patch_size: int
    image_size: int | tuple[int, ...] = 224
    patch_bias: bool = True
    position: str = "learned"
    position_resize: str = "plain"
    rope_base: float = 100.0
    rope_rescale: float | None = None
    rope_jitter: float | None = None
    rope_shift: float | None = None
    num_registers: int = 0
    mask_token: bool = False
    pre_norm: bool = False
    pooling: str = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(position=tuple(POSITIONS), position_resize=tuple(INTERPOLATIONS))
        self._check_choices(pooling=POOLINGS)
        self._check_positive("patch_size")
        sides = self.image_shape
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size = {self.image_size} must be at least 1, or two sides")
        if sides[0] == sides[1]:
            object.__setattr__(self, "image_size", sides[0])  # one way to say it
        if self.num_registers < 0:
            raise ValueError(f"num_registers = {self.num_registers} must be zero or positive")
        if any(side % self.patch_size for side in sides):
            raise ValueError(
                f"image_size = {self.image_size} is not a multiple of patch_size = "
                f"{self.patch_size}"
            )
        _ = self.position_scheme, self.rope  # check their own fields

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def grid(self) -> Grid:
        """Patches (rows, columns) at the config's own image size."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Rows of a learned table: the CLS token's, where there is one, and the patches'."""
        return (self.pooling == "cls") + self.num_patches

    @property
    def interpolation(self) -> Interpolation:
        """The rule that ``position_resize`` names."""
        return INTERPOLATIONS[self.position_resize]

    @property
    def position_scheme(self) -> Position:
        """The positions that ``position`` names."""
        cls_rows = self.num_positions - self.num_patches
        return POSITIONS[self.position](self.width, self.grid, cls_rows, self.interpolation)

    @property
    def rope(self) -> Rope | None:
        if self.position != "rope":
            return None
        augments = (self.rope_rescale, self.rope_jitter, self.rope_shift)
        return Rope(self.head_dim, self.rope_base, *augments)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: CLS, where there is one, and registers."""
        return (self.pooling == "cls") + self.num_registers

    def encode_flops(self, patches: int) -> float:
        """As :meth:`block_flops`, of ``patches`` with the tokens before them, and of their
        embedding."""
        embed = 2.0 * patches * self.patch_size**2 * 3 * self.width
        return embed + self.block_flops(self.prefix + patches)

    def grid_of(self, height: int, width: int) -> Grid:
        """Patches (rows, columns) of an image of ``height`` x ``width`` pixels.

        Raises:
          ValueError: if a side is not a multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height}x{width} pixels does not divide into patches of "
                f"{self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size


# name: (width, depth, heads)
_SHAPES = {
    "300m": (1024, 24, 16),
    "700m": (1280, 32, 16),
    "1b": (1536, 40, 24),
    "2b": (2688, 24, 21),
    "3b": (3072, 26, 24),
    "5b": (3584, 32, 28),
    "7b": (4096, 32, 32),
}
# Small enough to train on a CPU.
_SMALL: dict[str, dict[str, Any]] = {
    "micro": dict(width=32, depth=2, heads=2, patch_size=8, image_size=32),
    "tiny": dict(width=128, depth=6, heads=4, patch_size=8, image_size=48),
}
WEB_DINO_SIZES = ("micro", "tiny", "300m", "1b", "2b", "3b", "5b", "7b")
WEB_MAE_SIZES = ("micro", "tiny", "300m", "700m", "1b", "2b", "3b", "5b")


def web_dino(size: str, **overrides: Any) -> ViTConfig:
    """The Web-DINO encoder of that name; ``overrides`` replace any field of :class:`ViTConfig`.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    fields = shape("Web-DINO", size, WEB_DINO_SIZES, patch_size=14)
    fields |= dict(
        mlp="swiglu",
        position="learned",
        position_resize="offset",
        layer_scale=1e-5,
        mask_token=True,
        init="dinov2",
    )
    return build(fields | overrides)


def web_mae(size: str, **overrides: Any) -> ViTConfig:
    """The Web-MAE encoder of that name; ``overrides`` replace any field of :class:`ViTConfig`.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    fields = shape("Web-MAE", size, WEB_MAE_SIZES, patch_size=16 if size == "300m" else 14)
    fields |= dict(mlp="gelu", position="sincos", position_resize="plain", init="mae")
    return build(fields | overrides)


def build(fields: Mapping[str, Any]) -> ViTConfig:
    """``ViTConfig(**fields)``, with errors in one line for people.

    Raises:
      ValueError: for an unknown or missing field, a value of another type than the field's, or
        fields that do not fit.
    """
    return construct(ViTConfig, fields, "a ViT")


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are said. None stands for a size's own value, so that every field is a key that
    can be overridden."""
    return {key: value for key, value in fields.items() if value is not None}


def with_groups(cls: type, fields: Mapping[str, Any], **groups: type) -> dict[str, Any]:
    """The fields of ``config.method`` for ``cls``, its name left out, and each group made an object
    of its class. What is not said of a group is as in the default of ``cls``; a group of which
    nothing is said is that default.

    Raises:
      ValueError: as :func:`construct`.
    """
    made = {key: value for key, value in fields.items() if key != "name"}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, group in groups.items():
        own, default = made.get(name), defaults[name]
        known = vars(default) if isinstance(default, group) else {}
        if own is not None:
            made[name] = construct(group, known | dict(own), f"method.{name}")
        elif known:
            made[name] = default
    return made


def construct(cls: type[_Config], fields: Mapping[str, Any], what: str) -> _Config:
    """``cls(**fields)`` for a dataclass whose fields are int, float, bool, str, tuple or dataclass,
    or None. A list, as JSON gives it, is taken as a tuple. ``what`` names the object in errors.

    Raises:
      ValueError: one line: an unknown or missing field, a value that is not of the field's
        annotated type (an int is a float, a bool is no int), or an error of ``cls`` itself.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{what} has no field {name!r}; known: {', '.join(known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in fields:
            raise ValueError(
                f"{what} needs the field {name!r}"
                + (", or a size by name" if cls is ViTConfig else "")
            )
    hints = typing.get_type_hints(cls)
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    for name, value in fields.items():
        if not _is_instance(value, hints[name]):
            raise ValueError(f"{what}: {name} = {value!r} must be {_type_in_words(hints[name])}")
    try:
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _is_instance(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_instance(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:  # tuple[X, ...]
        item, _ = typing.get_args(hint)
        return isinstance(value, tuple) and all(_is_instance(x, item) for x in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint)


def _type_in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type_in_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each {_type_in_words(typing.get_args(hint)[0])}"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return known.get(hint, "none" if hint is types.NoneType else hint.__name__)


def shape(family: str, size: str, known: tuple[str, ...], patch_size: int) -> dict[str, Any]:
    """The fields that follow from a size of the paper, or from ``micro`` or ``tiny``.

    Raises:
      ValueError: if it is not one of those ``known`` in the family.
    """
    if size not in known:
        raise ValueError(f"no {family} size {size!r}; known: {', '.join(known)}")
    if size in _SMALL:
        return dict(_SMALL[size])
    width, depth, heads = _SHAPES[size]
    return dict(
        width=width, depth=depth, heads=heads, patch_size=patch_size, dtype="bfloat16", remat="full"
    )
