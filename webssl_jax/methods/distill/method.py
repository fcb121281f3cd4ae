"""Distillation: a small student learns to make the features of a frozen encoder, of images and of
patches, whatever the two are (Ranzinger et al., arXiv 2312.06709, section 3, with one teacher: the
cosine of each pair).

The teacher is a run, or any weights that can be opened; no heads are needed. Teacher and student
see the same crop, each at its own size, and the teacher's patches are resized to the student's
grid.

Shape letters: B images, N patches of the student, D width of the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.data.decode import sides
from webssl_jax.data.paired import PairedView
from webssl_jax.data.views import Preprocess
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.mae.method import View
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, effective_rank, most_rank
from webssl_jax.models import pixels, sizes
from webssl_jax.models.adapter import Adapter
from webssl_jax.models.layers import l2_normalise
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables


@dataclasses.dataclass(frozen=True)
class Distill:
    """The method. Hashable, so it can be static under jit.

    encoder: the student. teacher: the frozen encoder, which sees ``teacher_size`` pixels; weights:
      the run, file or folder that it is read from. Their trees are ``params`` {"encoder",
      "cls_adapter", "patch_adapter"} and ``teacher`` {"frozen"}.
    hidden: width of the adapters, 0 for the teacher's.
    cls_weight, patch_weight: of the two terms.
    mean, std: of the student's images; teacher_mean, teacher_std: of the teacher's.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    teacher: ViTConfig
    weights: str
    teacher_size: int = 224
    view: View = View()
    hidden: int = 0
    cls_weight: float = 1.0
    patch_weight: float = 1.0
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD
    teacher_mean: tuple[float, ...] = colours.IMAGENET_MEAN
    teacher_std: tuple[float, ...] = colours.IMAGENET_STD

    evaluated = "params"
    picture_names = ()

    @property
    def couples_batch(self) -> bool:
        """See ``methods.mae``."""
        return self.encoder.drop_path > 0

    @property
    def initial_weights(self) -> dict[str, str]:
        """See ``methods.base.initial_weights``."""
        return {"teacher/frozen": self.weights}

    @classmethod
    def from_config(cls, config: Any) -> Distill:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class; ``view`` and ``teacher`` are groups).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        fields = sizes.with_groups(cls, config.method, view=View)
        own = sizes.given(fields.pop("teacher", None) or {})
        fields["teacher"] = sizes.construct(ViTConfig, own, "method.teacher")
        model = {"image_size": fields["view"].image_size} | sizes.given(config.model)
        return sizes.construct(cls, fields | {"encoder": sizes.build(model)}, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        colours.check(self.teacher_mean, self.teacher_std)
        self.encoder.grid_of(*sides(self.view.image_size))
        self.teacher.grid_of(self.teacher_size, self.teacher_size)
        if isinstance(self.view.image_size, tuple):
            raise ValueError(f"view.image_size = {self.view.image_size}: must be a square's side")
        if not self.weights:
            raise ValueError("method.weights: name a run, or weights, of the teacher")
        if min(self.cls_weight, self.patch_weight, self.hidden) < 0:
            raise ValueError("cls_weight, patch_weight and hidden must be zero or positive")

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh student with its adapters. The teacher is drawn too, and then read from
        ``weights``."""
        rngs = jax.random.split(rng, 4)
        own, seen = (jnp.zeros((1, *batch_spec[name].shape[1:])) for name in self.batch_spec(1))
        token = jnp.zeros((1, self.encoder.width))
        params = {
            "encoder": ViT(self.encoder).init(rngs[0], own)["params"],
            "cls_adapter": self._adapter.init(rngs[1], token)["params"],
            "patch_adapter": self._adapter.init(rngs[2], token)["params"],
        }
        return Variables(params, {"frozen": ViT(self.teacher).init(rngs[3], seen)["params"]}, {})

    @property
    def _adapter(self) -> Adapter:
        return Adapter(self.hidden or self.teacher.width, self.teacher.width, self.encoder.dtype)

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """One minus the cosine, of CLS and of every patch. batch: ``image`` (B, H, W, 3) and
        ``teacher_image`` (B, H', W', 3), uint8."""
        images = pixels.normalise(batch["image"], self.mean, self.std)
        theirs = pixels.normalise(batch["teacher_image"], self.teacher_mean, self.teacher_std)
        known = ViT(self.teacher).apply({"params": teacher["frozen"]}, theirs)
        seen = ViT(self.encoder).apply(
            {"params": params["encoder"]}, images, train=True, rngs=train_rngs(self.encoder, rng)
        )
        assert isinstance(known, ViTOutput) and isinstance(seen, ViTOutput)  # of one size
        grids = self._grids
        wanted = jax.vmap(lambda x: jnp.asarray(INTERPOLATIONS["plain"].resize(x, *grids)))(
            known.patches
        )
        made = {
            "cls": (self._adapt(params, "cls_adapter", seen.cls), known.cls),
            "patches": (self._adapt(params, "patch_adapter", seen.patches), wanted),
        }
        cosines = {name: cosine(*pair).mean() for name, pair in made.items()}
        terms = {
            "cls": self.cls_weight * (1 - cosines["cls"]),
            "patches": self.patch_weight * (1 - cosines["patches"]),
        }
        report = {f"{name}_cosine": value for name, value in cosines.items()}
        report["effective_rank"] = effective_rank(seen.cls)
        return LossOutput(sum(terms.values(), jnp.zeros(())), terms, report, aux)

    @property
    def _grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the teacher and of the student."""
        side = self.teacher_size
        own = self.encoder.grid_of(*sides(self.view.image_size))
        return self.teacher.grid_of(side, side), own

    def _adapt(self, params: Params, name: str, tokens: jax.Array) -> jax.Array:
        out = self._adapter.apply({"params": params[name]}, tokens)
        assert isinstance(out, jax.Array)
        return out

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]:
        v = self.view
        scale = (v.scale_min, v.scale_max)
        assert isinstance(v.image_size, int)  # the constructor refuses others
        return PairedView(v.image_size, self.teacher_size, scale, flip=v.hflip)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.image_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        views = {"image": self.view.image_size, "teacher_image": self.teacher_size}
        return {
            name: jax.ShapeDtypeStruct((batch, *sides(size), 3), jnp.uint8)
            for name, size in views.items()
        }

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """As of ``methods.mae``: biases and the factors of norms and LayerScale are not decayed."""
        return Tables(decay=(ONE_DIMENSIONAL,))

    def vitals(self, global_batch: int) -> Vitals:
        """How close the student is, and whether its features still differ."""
        most = most_rank(global_batch, self.encoder.width)
        signs = (
            Sign("train/cls_cosine", "cosine with the teacher, of images", 1.0),
            Sign("train/patches_cosine", "cosine with the teacher, of patches", 1.0),
            Sign("train/effective_rank", "effective rank", most, 1),
        )
        alarm = Alarm(
            "the student makes one feature of all images",
            (Limit("train/effective_rank", below=0.02),),
            "it says the teacher's mean for every image; its cosine may be high all the same",
            "config.optim.lr (lower), optim.warmup (longer), method.teacher_size, and are "
            "method.teacher_mean and teacher_std those of the teacher?",
        )
        return Vitals(signs, (alarm,))

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """Three times the forward matrix products of the student and its adapters, and once those
        of the teacher."""
        (rows, columns), (own_rows, own_columns) = self._grids
        e, t = self.encoder, self.teacher
        own, hidden = own_rows * own_columns, self.hidden or t.width
        adapt = 2.0 * (1 + own) * hidden * (e.width + t.width)
        return 3.0 * (e.encode_flops(own) + adapt) + t.encode_flops(rows * columns)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of the last axes of two arrays."""
    return (l2_normalise(a, 1e-8) * l2_normalise(b, 1e-8)).sum(axis=-1)
