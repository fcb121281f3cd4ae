"""What a training method is: the protocol between the loop and MAE, DINO, CLIP and whatever comes
next.

A method turns views into a loss and a feature function. It owns modules, never parameters: every
tree is an argument. It sees no device, no optimiser, no logger; losses are written on global arrays
and jit brings the collectives. To add a method, write one file here, name it in
``methods/__init__.py`` and give it a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from webssl_jax.methods.vitals import Vitals
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.optim.tables import Tables

Params = dict[str, Any]
Schedule = Callable[[jax.Array], jax.Array]


class Variables(NamedTuple):
    """Everything a method's functions need besides the batch. ``teacher`` and ``aux`` are ``{}``
    where unused."""

    params: Params
    teacher: Params
    aux: Params


class LossOutput(NamedTuple):
    """``terms`` (already weighted) add up to ``loss``; ``report`` holds scalars that are not
    losses."""

    loss: jax.Array
    terms: dict[str, jax.Array]
    report: dict[str, jax.Array]
    aux: Params


class Inside(NamedTuple):
    """What pictures need to see of B images inside the last block, in float32.

    attention: (B, heads, h, w), the CLS token's weights on patches; with those on itself and on
    registers they add up to 1. cls_norm (B,), register_norms (B, R), patch_norms (B, h, w): lengths
    of the block's output tokens, before the final norm makes them alike. Where pooled tokens take
    the place of CLS, the weights are those of the pooling's probe and ``cls_norm`` is the length of
    what is pooled.
    """

    attention: jax.Array
    cls_norm: jax.Array
    register_norms: jax.Array
    patch_norms: jax.Array


class Features(NamedTuple):
    """Frozen features of B images, after the final norm, in float32.

    cls: (B, D). patches: (B, h, w, D). registers: (B, R, D). layers: {block: (cls (B, D), patches
    (B, h, w, D))} for the blocks that were asked for, each through the final norm. inside: None
    unless asked for.
    """

    cls: jax.Array
    patches: jax.Array
    registers: jax.Array
    layers: dict[int, tuple[jax.Array, jax.Array]]
    inside: Inside | None = None


class Method(Protocol):
    """The contract. Implementations are frozen dataclasses made from a config."""

    # True when the loss of one image depends on the others in its batch (Sinkhorn, KoLeo, softmax
    # contrast). Gradient accumulation would then silently change the loss, so the loop refuses it.
    couples_batch: bool

    # The network whose features are evaluated, drawn and exported.
    encoder: ViTConfig

    # What ``pictures`` draws, besides the pictures that any feature function gives.
    picture_names: tuple[str, ...]

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Fresh float32 variables. Traceable, so that the state can be created sharded."""

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The training loss of one (micro)batch.

        ``batch["position"]`` (B,) int32 is each example's place in the *global* batch: fold it into
        ``rng`` for per-example randomness, which then does not depend on devices, hosts or
        accumulation.
        """

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        """The teacher after this step; ``teacher`` itself where there is none."""

    def features(
        self,
        variables: Variables,
        images: jax.Array,
        layers: Sequence[int] = (),
        inside: bool = False,
    ) -> Features:
        """Frozen features of uint8 images (B, H, W, 3) of any size the patches divide. ``layers``
        are 0-based block numbers; negative counts back. ``inside`` asks for :class:`Inside`."""

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]:
        """A picklable function from an encoded image to uint8 views: {"image": (H, W, 3)}."""

    def eval_view(self, size: int | None = None) -> Callable[[bytes], np.ndarray]:
        """A picklable function from an encoded image to one (H, W, 3) uint8 image for evaluation,
        of ``size`` pixels instead of the method's own when given."""

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the views of ``batch`` images, as the loader delivers them."""

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """{name: step -> value} of what the method itself schedules (teacher momentum,
        temperatures, ...)."""

    def tables(self) -> Tables:
        """Defaults for the optimiser, overridable by config."""

    def pictures(
        self, variables: Variables, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8} worth looking at during training."""

    def vitals(self, global_batch: int) -> Vitals:
        """The logged figures that tell a healthy run from a sick one, and the alarms on them."""

    def train_flops(self) -> float:
        """Floating-point operations of one image's share of a training step, without recomputation
        (3 x forward, plus the teacher's forward where there is one). The numerator of MFU."""
