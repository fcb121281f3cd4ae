"""What transformers and ViTs are made of, and the sizes of the Web-SSL paper (arXiv 2504.01017,
Table 1) by name.

Web-DINO: patch 14, SwiGLU, LayerScale, learned positions, a mask token (DINOv2's own block).
Web-MAE: GELU MLP of 4 x width, fixed sin-cos positions, patch 14 (300m: 16), no LayerScale.
``tiny`` and ``micro`` are twins of both families for laptops and tests.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from webssl_jax.models import position

MLPS = ("gelu", "quick_gelu", "gelu_tanh", "swiglu")
POSITIONS = ("learned", "sincos")
INITS = ("mae", "dinov2", "clip", "clip_text", "siglip")
POOLINGS = ("cls", "map")
DTYPES = ("bfloat16", "float32")
REMATS = ("none", "full", "dots", "named")
ATTENTIONS = ("xla", "pallas")
LANES = 128  # channels that a TPU's products take at a time


def heads_together(heads: int, channels: int) -> int | None:
    """How many heads of ``channels`` are taken at a time on TPUs: those that fill whole lanes,
    None where no number of them does."""
    if channels % LANES == 0:
        return 1
    share = LANES // channels
    return share if share * channels == LANES and heads % share == 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A stack of transformer blocks. Widths are in channels.

    mlp: two layers with the exact GELU, with CLIP's x * sigmoid(1.702 x) or with GELU's tanh form
      between, or ``swiglu``.
    mlp_hidden: hidden width; ``None`` takes the originals' rule (``hidden`` below).
    layer_scale: initial gamma, ``None`` for no LayerScale.
    drop_path: rate of the batch-subset stochastic depth, the same in every block (``blocks.py``).
    drop_path_group: images that draw their subset together, ``None`` for the whole batch. The
      originals draw per device; naming the group keeps the result independent of the mesh.
    init: ``mae`` (xavier), ``dinov2`` (normal 0.02), ``clip``, ``clip_text`` or ``siglip``; see
      ``layers.py``.
    dtype: of the computation. Parameters and outputs are float32 always.
    remat: what the backward pass recomputes; see ``blocks.py``.
    attention: ``xla``, or ``pallas`` for our own kernels on TPUs (``attention_kernel.py``), of up
      to 768 tokens; the same result either way.

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
    norm_eps: float = 1e-6
    init: str = "dinov2"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"

    # whether a token sees only itself and those before it: a field of text towers
    causal: typing.ClassVar[bool] = False

    def __post_init__(self):
        self._check_words(mlp=MLPS, init=INITS, dtype=DTYPES, remat=REMATS, attention=ATTENTIONS)
        self._check_counts("width", "depth", "heads", "mlp_hidden", "drop_path_group")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps = {self.norm_eps} must be positive")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} does not divide into heads = {self.heads}")
        if self.attention == "pallas" and heads_together(self.heads, self.head_dim) is None:
            raise ValueError(
                "attention = 'pallas' takes heads that fill 128 channels together, not "
                f"{self.heads} of {self.head_dim}; use 'xla'"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path = {self.drop_path} must lie in [0, 1)")

    def _check_words(self, **fields: tuple[str, ...]) -> None:
        for field, known in fields.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} = {getattr(self, field)!r} is not one of {', '.join(known)}"
                )

    def _check_counts(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP: 4 x width, or for SwiGLU 2/3 of that rounded up to a multiple of
        8 (DINOv2)."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.mlp == "swiglu":
            return (int(4 * self.width * 2 / 3) + 7) // 8 * 8
        return 4 * self.width

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

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

    patch_bias: whether the patch embedding has one; CLIP's has none.
    position: ``learned`` (a parameter, CLS included) or ``sincos`` (fixed, MAE's table, never a
      parameter).
    position_resize: how the table follows another image size; see ``position.py``.
    mask_token: whether masked patches can be replaced by a learned token (iBOT).
    pre_norm: a LayerNorm of all tokens before the first block (CLIP).
    pooling: ``cls``, a token of its own stands for the image; ``map``, there is none, and attention
      pooling of all others takes its place (SigLIP; ``pooling.py``).

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    patch_size: int
    image_size: int = 224
    patch_bias: bool = True
    position: str = "learned"
    position_resize: str = "plain"
    num_registers: int = 0
    mask_token: bool = False
    pre_norm: bool = False
    pooling: str = "cls"

    def __post_init__(self):
        super().__post_init__()
        self._check_words(position=POSITIONS, position_resize=tuple(position.MODES))
        self._check_words(pooling=POOLINGS)
        self._check_counts("patch_size", "image_size")
        if self.num_registers < 0:
            raise ValueError(f"num_registers = {self.num_registers} must be zero or positive")
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"width = {self.width} must be a multiple of 4 for sincos positions")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size} is not a multiple of patch_size = "
                f"{self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) at the config's own image size."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Rows of a learned table: the CLS token's, where there is one, and the patches'."""
        return (self.pooling == "cls") + self.num_patches

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
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


# name: (width, depth, heads). Twins follow the same rules at sizes that a CPU trains.
_SHAPES = {
    "300m": (1024, 24, 16),
    "700m": (1280, 32, 16),
    "1b": (1536, 40, 24),
    "2b": (2688, 24, 21),
    "3b": (3072, 26, 24),
    "5b": (3584, 32, 28),
    "7b": (4096, 32, 32),
}
_TWINS: dict[str, dict[str, Any]] = {
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
    """``ViTConfig(**fields)``, complaining about a wrong or missing field in one line for people.

    Raises:
      ValueError: for an unknown or missing field, a value of another type than the field's, or
        fields that do not fit.
    """
    return construct(ViTConfig, fields, "a ViT")


def construct(cls: type, fields: Mapping[str, Any], what: str) -> Any:
    """``cls(**fields)`` for a dataclass of int, float, bool, str, tuple and dataclass fields, ``|
    None`` included. A list, as JSON gives it, is taken as a tuple.

    Raises:
      ValueError: one line that says of ``what``: an unknown or missing field, a value that is not
        of the field's annotated type (an int is a float, a bool is no int), or what ``cls`` itself
        finds wrong.
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
        if not _is_a(value, hints[name]):
            raise ValueError(f"{what}: {name} = {value!r} must be {_words(hints[name])}")
    try:
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:  # tuple[X, ...]
        item, _ = typing.get_args(hint)
        return isinstance(value, tuple) and all(_is_a(x, item) for x in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each {_words(typing.get_args(hint)[0])}"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return known.get(hint, "none" if hint is types.NoneType else hint.__name__)


def shape(family: str, size: str, known: tuple[str, ...], patch_size: int) -> dict[str, Any]:
    """The fields that follow from a size of the paper, or of a twin.

    Raises:
      ValueError: if it is not one of those ``known`` in the family.
    """
    if size not in known:
        raise ValueError(f"no {family} size {size!r}; known: {', '.join(known)}")
    if size in _TWINS:
        return dict(_TWINS[size])
    width, depth, heads = _SHAPES[size]
    return dict(
        width=width, depth=depth, heads=heads, patch_size=patch_size, dtype="bfloat16", remat="full"
    )
