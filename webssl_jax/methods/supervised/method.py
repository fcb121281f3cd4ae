"""Plain classification: the control that sees labels, against which methods without them are read.

The recipe is the simple baseline of Beyer et al. (arXiv 2205.01580): a ViT whose head begins at
zero, cross-entropy, mixup (Zhang et al., arXiv 1710.09412). What is evaluated is the encoder, as of
every method.

Shape letters: B images, H x W pixels, N patches, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.data.decode import sides
from webssl_jax.data.labelled import LabelledView
from webssl_jax.data.views import Preprocess, RandomResizedCropView
from webssl_jax.methods import losses
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.mae.method import View
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals
from webssl_jax.models import pixels, sizes
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Supervised:
    """The method. Hashable, so it can be static under jit.

    classes: the labels of the records, in the order of the head's outputs.
    loss_name: ``softmax``, one class an image, or ``sigmoid``, every class by itself and summed.
    label_smoothing: of the softmax: the share of a target that all classes have alike.
    mixup: of each batch, a weight is drawn from Beta(mixup, mixup), and each image and target
      become their weighted mean with the image and target before them; 0 for no mixing.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    classes: tuple[str, ...]
    loss_name: str = "softmax"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    view: View = View(scale_min=0.05)
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    evaluated = "params"
    picture_names = ()

    @property
    def couples_batch(self) -> bool:
        """Mixing takes two images of a batch; see also ``methods.mae``."""
        return self.mixup > 0 or self.encoder.drop_path > 0

    @classmethod
    def from_config(cls, config: Any) -> Supervised:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class, ``loss`` for ``loss_name``; ``view`` is a group). ``classes`` is a text: names
        with commas between, or the path of a file with one a line.

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        fields = sizes.with_groups(cls, config.method, view=View)
        fields["loss_name"] = fields.pop("loss", cls.loss_name)
        fields["classes"] = _read_classes(str(fields.get("classes", "")))
        model = {"image_size": fields["view"].image_size} | sizes.given(config.model)
        return sizes.construct(cls, fields | {"encoder": sizes.build(model)}, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(*sides(self.view.image_size))
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes: {len(self.classes)} names, {len(set(self.classes))} of them different; "
                "give two or more, each once"
            )
        if self.loss_name not in LOSSES:
            raise ValueError(f"loss = {self.loss_name!r} is not one of {', '.join(LOSSES)}")
        if (
            not 0 <= self.label_smoothing < 1
            or self.label_smoothing
            and self.loss_name != "softmax"
        ):
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} must lie in [0, 1), and is of softmax"
            )
        if self.mixup < 0:
            raise ValueError(f"mixup = {self.mixup} must be zero or positive")

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Fresh parameters {"encoder", "classifier"}; the head is zero, so that all classes are
        alike at first."""
        images = jnp.zeros((1, *batch_spec["image"].shape[1:]))
        encoder = ViT(self.encoder).init(rng, images)["params"]
        classifier = self._classifier.init(rng, jnp.zeros((1, self.encoder.width)))["params"]
        return Variables({"encoder": encoder, "classifier": classifier}, {}, {})

    @property
    def _classifier(self) -> nn.Dense:
        return nn.Dense(len(self.classes), kernel_init=nn.initializers.zeros)

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The cross-entropy of a batch: ``image`` (B, H, W, 3) uint8 and ``label`` (B,) int32."""
        images = pixels.normalise(batch["image"], self.mean, self.std)
        targets = jax.nn.one_hot(batch["label"], len(self.classes))
        mix_rng, drop_rng = jax.random.split(rng)
        if self.mixup:
            own = jax.random.beta(mix_rng, self.mixup, self.mixup)
            images, targets = (
                own * x + (1 - own) * jnp.roll(x, 1, axis=0) for x in (images, targets)
            )
        seen = ViT(self.encoder).apply(
            {"params": params["encoder"]},
            images,
            train=True,
            rngs=train_rngs(self.encoder, drop_rng),
        )
        assert isinstance(seen, ViTOutput)  # of images of one size
        logits = self._classifier.apply({"params": params["classifier"]}, seen.cls)
        assert isinstance(logits, jax.Array)
        if self.loss_name == "softmax":
            loss = losses.softmax_cross_entropy(logits, targets, self.label_smoothing)
        else:
            loss = losses.sigmoid_cross_entropy(logits, targets)
        right = jnp.argmax(logits, axis=1) == jnp.argmax(targets, axis=1)
        report = {"top1": right.mean(), "logit_std": logits.std()}
        return LossOutput(loss, {"classification": loss}, report, aux)

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[Any, np.random.Generator], dict[str, np.ndarray]]:
        v = self.view
        crop = RandomResizedCropView(v.image_size, (v.scale_min, v.scale_max), flip=v.hflip)
        return LabelledView(crop, self.classes)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.image_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch, *sides(self.view.image_size), 3)
        return {
            "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """As of ``methods.mae``: biases and the factors of norms and LayerScale are not decayed."""
        return Tables(decay=(ONE_DIMENSIONAL,))

    def vitals(self, global_batch: int) -> Vitals:
        """The loss beside that of a network that knows nothing, and the share of training images
        that are right beside chance."""
        c = len(self.classes)
        uniform_loss = math.log(c) if self.loss_name == "softmax" else c * math.log(2)
        signs = (
            Sign("train/classification", "classification loss", uniform_loss),
            Sign("train/top1", "training images that are right", 1.0, 1 / c),
            Sign("train/logit_std", "std of the logits"),
        )
        alarm = Alarm(
            "labels do not fit their images",
            (Limit("train/classification", above=0.98), Limit("train/top1", below=0.02)),
            "the network is no better than a guess",
            "the records (webssl inspect-records: are labels mixed up?), config.optim.lr (lower), "
            "optim.warmup (longer)",
        )
        return Vitals(signs, (alarm,))

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """Three times the forward matrix products."""
        e = self.encoder
        h, w = e.grid_of(*sides(self.view.image_size))
        return 3.0 * (e.encode_flops(h * w) + 2.0 * e.width * len(self.classes))


def _read_classes(text: str) -> tuple[str, ...]:
    if not text:
        raise ValueError("method.classes: name the labels, or a file that has one in each line")
    names = text.split(",")
    if len(names) == 1:
        try:
            names = pathlib.Path(text).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"method.classes = {text}: cannot be read ({error})") from error
    return tuple(name.strip() for name in names if name.strip())
