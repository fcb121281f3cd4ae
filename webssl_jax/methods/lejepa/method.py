"""LeJEPA (Balestriero and LeCun, arXiv 2511.08544): views of an image predict each other, and the
embeddings of a batch shall be normally distributed. Experimental.

One network, no teacher, no stopped gradient, no predictor. The embedding of every view shall be
near the mean over the views of its image; SIGReg keeps embeddings from becoming alike
(``sigreg.py``). The full training code was not published and others could not repeat its figures
(issues 20, 25, 35, 41 and 50 there); configs/lejepa.py says what is known.

Shape letters: B images, V views (global ones first), H x W pixels, D width, E channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax import colours
from webssl_jax.data.decode import sides
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.views import Preprocess
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.dino.view import GLOBAL_CROPS, View
from webssl_jax.methods.lejepa.sigreg import directions, most, sigreg
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, effective_rank, most_rank
from webssl_jax.models import sizes
from webssl_jax.models.batch_norm_mlp import BatchNormMlp, MlpConfig
from webssl_jax.models.layers import l2_normalise
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim.tables import Tables

_VIEW = View(
    local_count=6,
    global_scale=(0.3, 1.0),
    local_scale=(0.05, 0.3),
    blur=(0.5, 0.5, 0.5),
    solarize=(0.2, 0.2, 0.2),
)


@dataclasses.dataclass(frozen=True)
class LeJEPA:
    """The method. Hashable, so it can be static under jit.

    encoder, projector: the networks; their trees are ``params``. Batch norm of the projector takes
      its statistics over all views of the batch.
    sigreg_weight: lambda; the views' distance weighs 1 less it. As SIGReg grows with the batch, a
      weight belongs to its batch.
    directions: of SIGReg, drawn anew in every step.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    projector: MlpConfig = MlpConfig(2048, 512, 3, last_norm=False)
    view: View = _VIEW
    sigreg_weight: float = 0.05
    directions: int = 1024
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    couples_batch = True
    evaluated = "params"
    picture_names = ()

    @classmethod
    def from_config(cls, config: Any) -> LeJEPA:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class; ``view`` and ``projector`` are groups).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        fields = sizes.with_groups(cls, config.method, view=View, projector=MlpConfig)
        model = {"image_size": fields["view"].global_size} | sizes.given(config.model)
        return sizes.construct(cls, fields | {"encoder": sizes.build(model)}, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        for size in (self.view.global_size, self.view.local_size):
            self.encoder.grid_of(*sides(size))
        if not 0 < self.sigreg_weight < 1 or self.directions < 1:
            raise ValueError(
                f"sigreg_weight = {self.sigreg_weight} must lie in (0, 1) and directions = "
                f"{self.directions} be at least 1"
            )

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh encoder and projector."""
        rngs = jax.random.split(rng)
        image = jnp.zeros((1, *sides(self.view.global_size), 3))
        encoder = ViT(self.encoder).init(rngs[0], image)["params"]
        projector = self._projector.init(rngs[1], jnp.zeros((1, self.encoder.width)))["params"]
        return Variables({"encoder": encoder, "projector": projector}, {}, {})

    @property
    def _projector(self) -> BatchNormMlp:
        return BatchNormMlp(self.projector, self.encoder.dtype)

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The loss of one global batch: ``global_crops`` (B, 2, H, W, 3) and ``local_crops``
        (B, V - 2, h, w, 3), uint8."""
        b = batch["global_crops"].shape[0]
        drop_rng, direction_rng = jax.random.split(rng)
        views = self.view.crops(batch, self.mean, self.std)
        outputs = ViT(self.encoder).apply(
            {"params": params["encoder"]},
            tuple(views),
            train=True,
            rngs=train_rngs(self.encoder, drop_rng),
        )
        pooled = [
            rearrange(out.cls, "(b v) d -> b v d", b=b)
            for out in outputs
            if isinstance(out, ViTOutput)  # all, for mypy
        ]
        flat = rearrange(jnp.concatenate(pooled, axis=1), "b v d -> (b v) d")
        embedded = self._projector.apply({"params": params["projector"]}, flat)
        assert isinstance(embedded, jax.Array)  # no state was asked for
        embedded = rearrange(embedded, "(b v) e -> v b e", b=b)
        drawn = directions(direction_rng, self.projector.output, self.directions)
        statistic = sigreg(embedded, drawn)
        distance = jnp.square(embedded - embedded.mean(axis=0)).mean()
        terms = {
            "sigreg_loss": self.sigreg_weight * statistic,
            "invariance": (1 - self.sigreg_weight) * distance,
        }
        cls = rearrange(pooled[0], "b v d -> (b v) d")
        report = {
            "sigreg": statistic,
            "unexplained": distance / jnp.maximum(embedded.var(axis=(0, 1)).mean(), 1e-6),
            "feature_std": l2_normalise(cls, 1e-8).std(axis=0).mean() * self.encoder.width**0.5,
            "effective_rank": effective_rank(cls),
        }
        return LossOutput(sum(terms.values(), jnp.zeros(())), terms, report, aux)

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> MultiCropView:
        return self.view.loader()

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.global_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self.view.batch_spec(batch)

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """Everything is decayed, as in the minimal code, which has one group of parameters."""
        return Tables()

    def vitals(self, global_batch: int) -> Vitals:
        """SIGReg falls to about 1, what it is of normal embeddings, and views agree more and
        more."""
        crops = most_rank(GLOBAL_CROPS * global_batch, self.encoder.width)
        signs = (
            Sign("train/sigreg", "SIGReg (about 1 of normal embeddings)", most(global_batch)),
            Sign("train/unexplained", "share of the variance that is within an image", 1.0),
            Sign("train/invariance", "distance of the views of an image"),
            Sign("train/feature_std", "feature std", 1.0),
            Sign("train/effective_rank", "effective rank", crops, 1),
        )
        alarms = (
            Alarm(
                "all embeddings are one point",
                (Limit("train/sigreg", above=0.5), Limit("train/effective_rank", below=0.05)),
                "the views agree because all images do",
                "method.sigreg_weight (higher), optim.lr (lower), global_batch (larger)",
            ),
            Alarm(
                "views have nothing in common",
                (Limit("train/unexplained", above=0.98),),
                "two views of an image are as far apart as two images",
                "method.sigreg_weight (lower: it grows with the batch), optim.lr (lower), "
                "optim.warmup (longer)",
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """Three times the forward matrix products of all views, and of SIGReg's projection."""
        e, v = self.encoder, self.view
        counts = ((GLOBAL_CROPS, v.global_size), (v.local_count, v.local_size))
        grids = [(count, e.grid_of(*sides(size))) for count, size in counts]
        encode = sum(count * e.encode_flops(h * w) for count, (h, w) in grids)
        own = self.projector.flops(e.width) + 2.0 * self.projector.output * self.directions
        return 3.0 * (encode + (GLOBAL_CROPS + v.local_count) * own)
