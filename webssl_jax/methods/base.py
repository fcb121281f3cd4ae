"""What a training method is: the protocol between the loop and MAE, DINO, CLIP and whatever comes
next.

A method turns views into a loss. It owns networks, never parameters: every tree is an argument. It
sees no device, no optimiser, no logger; losses are written on global arrays and jit brings the
collectives. What it leaves after training is a ``model.Model``, and that is all that evaluations,
pictures and exports know. To add a method, write a folder here, name it in ``methods/__init__.py``
and give it a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from webssl_jax.data.views import Preprocess, Turns
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


def initial_weights(method: Any) -> Mapping[str, str]:
    """What a method's attribute ``initial_weights`` says, where it has one: {"teacher/NAME" or
    "aux/NAME": a run, or a file or folder of weights, whose encoder that tree begins as}. For
    networks beside student and teacher, such as a frozen one."""
    return getattr(method, "initial_weights", {})


def is_later_stage(method: Any) -> bool:
    """What a method's attribute ``later_stage`` says, where it has one: whether it is meant to go
    on with what a run of it has learned (``config.continue_from``)."""
    return getattr(method, "later_stage", False)


def kinds_of(method: Any) -> tuple[Any, ...]:
    """What a method's attribute ``kinds`` says, where it has one: for each size that its batches
    come in, the method that takes such batches. They have one train state, and each is compiled.
    Its ``train_view`` is then a ``data.views.Turns``, a view for each in this order."""
    return getattr(method, "kinds", (method,))


class Method(Protocol):
    """The contract. Implementations are frozen dataclasses made from a config."""

    # True when the loss of one image depends on the others in its batch (Sinkhorn, KoLeo, softmax
    # contrast). Gradient accumulation would then silently change the loss, so the loop refuses it.
    couples_batch: bool

    # The network whose features are evaluated, drawn and exported.
    encoder: ViTConfig

    # Which tree of the variables is evaluated, drawn and exported: "params" or "teacher".
    evaluated: str

    # What ``pictures`` draws, besides the pictures that any model gives.
    picture_names: tuple[str, ...]

    @property
    def preprocess(self) -> Preprocess:
        """How images are made for inference; picklable."""

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

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]] | Turns:
        """A picklable function from an encoded image to uint8 views: {"image": (H, W, 3)}."""

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the views of ``batch`` images, as the loader delivers them."""

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """{name: step -> value} of what the method itself schedules (teacher momentum,
        temperatures, ...)."""

    def tables(self) -> Tables:
        """Defaults for the optimiser, overridable by config."""

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}, pictures of what exists only in training, such as masks.
        ``batch``: ``image`` (B, H, W, 3) uint8 and ``position`` (B,), whole on every process."""

    def vitals(self, global_batch: int) -> Vitals:
        """The logged figures that tell a healthy run from a sick one, and the alarms on them."""

    def train_flops(self) -> float:
        """Floating-point operations of one image's share of a training step, without recomputation
        (3 x forward, plus the teacher's forward where there is one). The numerator of MFU."""
