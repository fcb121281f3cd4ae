"""MoCo v3 (Chen et al., arXiv 2104.02057): two views of an image are to find each other among the
views of all other images in the batch.

The queries are a student's, through a projector and a predictor; the keys are those of its running
average, encoder and projector. The patch embedding stays as it was drawn, which keeps large batches
stable.

The original moves the running average within a step, before the keys are made; the loop here does
it after the step, with the momentum of the next: the same in another order.

Shape letters: B images, V = 2 views, H x W pixels, D width, E channels of queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.data import photometric
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.views import Preprocess
from webssl_jax.methods import distortions
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.teachers import running_average
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, effective_rank, most_rank
from webssl_jax.models import pixels, sizes
from webssl_jax.models.batch_norm_mlp import BatchNormMlp, MlpConfig
from webssl_jax.models.layers import l2_normalise
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim.tables import Tables

VIEWS = 2
PATCH_EMBED = r"^encoder/patch_embed/"


@dataclasses.dataclass(frozen=True)
class View:
    """Two crops of ``image_size`` pixels, each with an area share between the two of ``scale``,
    flipped and distorted as in ``data/photometric.py``; ``blur`` and ``solarize`` have a
    probability for each view, and ``distort_on`` is as of DINO's view.

    Raises:
      ValueError: when a field is out of range.
    """

    image_size: int = 224
    scale: tuple[float, ...] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: tuple[float, ...] = (1.0, 0.1)
    solarize: tuple[float, ...] = (0.0, 0.2)
    distort_on: str = "host"

    def __post_init__(self) -> None:
        if len(self.scale) != 2:
            raise ValueError(f"scale = {self.scale} must be (least, most)")
        pixels.check_crop(self.image_size, *self.scale)
        chances = (self.flip, self.jitter, self.grayscale, *self.blur, *self.solarize)
        if len(self.blur) != VIEWS or len(self.solarize) != VIEWS:
            raise ValueError(f"blur = {self.blur}, solarize = {self.solarize}: two numbers each")
        if not all(0 <= chance <= 1 for chance in chances):
            raise ValueError("flip, jitter, grayscale, blur and solarize must lie in [0, 1]")
        photometric.check_place(self.distort_on)


@dataclasses.dataclass(frozen=True)
class MoCoV3:
    """The method. Hashable, so it can be static under jit.

    projector, predictor: their trees stand beside "encoder" in ``params``; ``teacher`` has
      "encoder" and "projector".
    temperature: of the contrast; the loss is multiplied by twice of it, as in the original.
    momentum: of the running average at the start; it rises to 1 by half a cosine over the run.
    train_patch_embed: also train the patch embedding.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    projector: MlpConfig = MlpConfig(layers=3)
    predictor: MlpConfig = MlpConfig(layers=2)
    view: View = View()
    temperature: float = 0.2
    momentum: float = 0.99
    train_patch_embed: bool = False
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    couples_batch = True
    evaluated = "params"  # the published probes are of the trained encoder, not of the average
    picture_names = ()

    @classmethod
    def from_config(cls, config: Any) -> MoCoV3:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class; ``view``, ``projector`` and ``predictor`` are groups).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        heads = {"projector": MlpConfig, "predictor": MlpConfig}
        fields = sizes.with_groups(cls, config.method, view=View, **heads)
        model = {"image_size": fields["view"].image_size}
        model |= {"position": "sincos_rows", "init": "moco"} | sizes.given(config.model)
        return sizes.construct(cls, fields | {"encoder": sizes.build(model)}, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(self.view.image_size, self.view.image_size)
        if self.temperature <= 0 or not 0 <= self.momentum <= 1:
            raise ValueError(
                f"temperature = {self.temperature} must be positive and momentum = "
                f"{self.momentum} lie in [0, 1]"
            )
        if self.projector.output != self.predictor.output:
            raise ValueError(
                f"projector.output = {self.projector.output}, predictor.output = "
                f"{self.predictor.output}: queries and keys are compared, so they must be equal"
            )

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh student, and of its encoder and projector the copy."""
        rngs, side = jax.random.split(rng, 3), self.view.image_size
        trees = {"encoder": ViT(self.encoder).init(rngs[0], jnp.zeros((1, side, side, 3)))}
        pooled = jnp.zeros((1, self.encoder.width))
        trees["projector"] = self._projector.init(rngs[1], pooled)
        projected = jnp.zeros((1, self.projector.output))
        trees["predictor"] = self._predictor.init(rngs[2], projected)
        params = {name: tree["params"] for name, tree in trees.items()}
        return Variables(params, {name: params[name] for name in ("encoder", "projector")}, {})

    @property
    def _projector(self) -> BatchNormMlp:
        return BatchNormMlp(self.projector, self.encoder.dtype)

    @property
    def _predictor(self) -> BatchNormMlp:
        return BatchNormMlp(self.predictor, self.encoder.dtype)

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """Both directions of the contrast of one global batch: ``views`` (B, V, H, W, 3) uint8.

        Each view goes through each network by itself: batch norm has four statistics.
        """
        views = distortions.normalised(batch, "views", self.mean, self.std)
        drop_rngs = jax.random.split(rng, VIEWS)
        pooled = [self._encode(params, views[:, i], drop_rngs[i]) for i in range(VIEWS)]
        queries = [self._project(params, x, predict=True) for x in pooled]
        keys = [
            jax.lax.stop_gradient(self._project(teacher, self._encode(teacher, views[:, i], None)))
            for i in range(VIEWS)
        ]
        pairs = ((queries[0], keys[1]), (queries[1], keys[0]))
        found = [contrast(query, key, self.temperature) for query, key in pairs]
        loss = sum((each for each, _ in found), jnp.zeros(()))
        both = jnp.concatenate(pooled)
        report = {
            "accuracy": sum((right for _, right in found), jnp.zeros(())) / VIEWS,
            "effective_rank": effective_rank(both),
            "feature_std": l2_normalise(both, 1e-8).std(axis=0).mean()
            * math.sqrt(self.encoder.width),
        }
        return LossOutput(loss, {"contrast": loss}, report, aux)

    def _project(self, tree: Params, pooled: jax.Array, predict: bool = False) -> jax.Array:
        out = self._projector.apply({"params": tree["projector"]}, pooled)
        if predict:
            out = self._predictor.apply({"params": tree["predictor"]}, out)
        assert isinstance(out, jax.Array)  # no state was asked for
        return out

    def _encode(self, tree: Params, images: jax.Array, rng: jax.Array | None) -> jax.Array:
        rngs = {} if rng is None else train_rngs(self.encoder, rng)
        out = ViT(self.encoder).apply(
            {"params": tree["encoder"]}, images, train=rng is not None, rngs=rngs
        )
        assert isinstance(out, ViTOutput)  # of images of one size
        return out.cls

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        """The running average, with which the next step makes its keys."""
        return running_average(teacher, params, schedule_values["momentum"])

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]:
        return TwoViews(self.view)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.image_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.view.image_size
        spec = {"views": jax.ShapeDtypeStruct((batch, VIEWS, side, side, 3), jnp.uint8)}
        device = self.view.distort_on == "device"
        return spec | (distortions.spec(spec, ("views",)) if device else {})

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """``momentum``: that of the step after this one, as the module's docstring says."""

        def momentum(step: jax.Array) -> jax.Array:
            done = jnp.clip((step + 1) / total_steps, 0.0, 1.0)
            return 1 - (1 - self.momentum) * (1 + jnp.cos(jnp.pi * done)) / 2

        return {"momentum": momentum}

    def tables(self) -> Tables:
        """Everything that is trained is decayed, as in the original."""
        return Tables(frozen=() if self.train_patch_embed else ((PATCH_EMBED, True),))

    def vitals(self, global_batch: int) -> Vitals:
        """How well views find each other, and whether features still differ."""
        chance = 1 / global_batch
        uniform_loss = VIEWS * 2 * self.temperature * math.log(global_batch)
        signs = (
            Sign("train/contrast", "contrastive loss", uniform_loss),
            Sign("train/accuracy", "views that find each other", 1.0, chance),
            Sign("train/feature_std", "feature std", 1.0),
            Sign(
                "train/effective_rank",
                "effective rank",
                most_rank(VIEWS * global_batch, self.encoder.width),
                1,
            ),
            Sign("optim/grad_norm", "gradient norm"),
        )
        alarms = (
            Alarm(
                "views do not find each other",
                (Limit("train/accuracy", below=0.02), Limit("train/contrast", above=0.98)),
                "an image is no closer to its own other view than to others",
                "config.optim.lr (lower), optim.warmup (longer), method.train_patch_embed (false), "
                "method.view.scale (larger crops)",
            ),
            Alarm(
                "features are all alike",
                (Limit("train/feature_std", below=0.02), Limit("train/effective_rank", below=0.02)),
                "the encoder makes nearly the same of every image; what tells views apart is "
                "noise that batch norm blows up",
                "config.optim.lr (lower), optim.clip (global), config.optim.weight_decay (lower)",
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """For both views, three times the forward matrix products of the student and once those of
        the average; the comparison of all pairs is left out."""
        e = self.encoder
        h, w = e.grid_of(self.view.image_size, self.view.image_size)
        encode = e.encode_flops(h * w)
        project = self.projector.flops(e.width)
        student = encode + project + self.predictor.flops(self.projector.output)
        return VIEWS * (3.0 * student + encode + project)


@dataclasses.dataclass(frozen=True)
class TwoViews:
    """The two views of an encoded image."""

    view: View

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"views": (2, size, size, 3) uint8}``; for a device what is to be done to them, too.

        Raises:
          DecodeError: if the image cannot be decoded.
        """
        v = self.view
        crops = MultiCropView(
            global_size=v.image_size,
            local_size=v.image_size,
            local_count=0,
            global_scale=(v.scale[0], v.scale[1]),
            flip=v.flip,
            blur=(v.blur[0], v.blur[1], 0.0),
            solarize=(v.solarize[0], v.solarize[1], 0.0),
            distortion=photometric.Distortion(jitter=v.jitter, grayscale=v.grayscale),
            distort_on=v.distort_on,
        )
        made = crops(data, rng)
        return {name.replace("global_crops", "views"): array for name, array in made.items()}


def contrast(
    queries: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """(InfoNCE times 2 x temperature, share of queries whose own key is the closest) of (B, E)
    queries and keys; row i of both is of one image. Oord et al., arXiv 1807.03748, eq. 4."""
    queries, keys = l2_normalise(queries, 1e-12), l2_normalise(keys, 1e-12)
    logits = jnp.einsum("qe,ke->qk", queries, keys, precision=jax.lax.Precision.HIGHEST)
    logits = logits / temperature
    own = jnp.arange(len(logits))
    loss = -jax.nn.log_softmax(logits)[own, own].mean()
    return 2 * temperature * loss, (jnp.argmax(logits, axis=1) == own).mean()
