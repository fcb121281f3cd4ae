"""The linear probe as MAE does it (mae/main_linprobe.py): BatchNorm without affine and one linear
layer on CLS, trained by LARS in large batches.

90 epochs of augmented images (50 are enough for ViT-L and larger, by MAE's own recipe), batches of
16,384, learning rate 0.1 for 256 images, ten epochs of warm-up, a cosine to zero, no decay. There
is one head, so nothing is chosen.
"""

from __future__ import annotations

import dataclasses

from webssl_jax.evaluators.fit import Head, Recipe
from webssl_jax.evaluators.probes import heads
from webssl_jax.evaluators.probes.heads import See
from webssl_jax.evaluators.probes.labelled import Problem
from webssl_jax.evaluators.probes.trained import TrainedOptions, TrainedProbe, Trial, Variant
from webssl_jax.models.features import Want
from webssl_jax.optim.schedules import warmup_cosine
from webssl_jax.weights.networks import Networks

RATE = 0.1
FEATURES = ("cls", "patches")
WARM_UP = 10  # epochs of 90


@dataclasses.dataclass(frozen=True)
class MAELinearOptions(TrainedOptions):
    """The keys of a row; see :class:`TrainedOptions`.

    epochs: where ``iterations`` is 0; a ninth of them is warm-up. feature: ``cls``, or ``patches``
    for their mean.
    """

    batch: int = 16_384
    epochs: int = 90
    feature: str = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"epochs = {self.epochs} must be at least 1")
        if self.feature not in FEATURES:
            raise ValueError(f"feature = {self.feature!r} is not one of {', '.join(FEATURES)}")


class MAELinear(TrainedProbe):
    """Top-1 accuracy of BatchNorm and one linear layer."""

    Options = MAELinearOptions
    name = "mae_linear"
    protocol = 2

    @classmethod
    def want(cls, options: MAELinearOptions, networks: Networks) -> Want:
        """CLS, or mean patches."""
        if options.feature == "cls":
            return Want(patches="none")
        return Want(cls=False, patches="mean")

    @classmethod
    def trial(cls, options: MAELinearOptions, want: Want, classes: int, images: int) -> Trial:
        """See :class:`TrainedProbe`."""
        o = options
        # MAE drops the last, smaller batch of an epoch
        steps = o.iterations or o.epochs * max(images // o.batch, 1)
        warm_up = round(steps * WARM_UP / 90)
        recipe = Recipe(steps, warmup_cosine(1.0, 0.0, steps, warm_up), "lars")
        variants = {o.feature: Variant(See((o.feature,)), cls.plain_head(classes))}
        return Trial(variants, (RATE,), (0.0,), recipe)

    @classmethod
    def plain_head(cls, classes: int) -> Head:
        """See :class:`TrainedProbe`."""
        return heads.BatchNormLinear(classes)

    def meaning(self, problem: Problem) -> str:
        """See :class:`TrainedProbe`."""
        return (
            f"linear probe as in MAE: share of {len(problem.test_labels):,} test images put into "
            f"the right one of {problem.num_classes} classes by BatchNorm and one linear layer, "
            f"trained by LARS on {len(problem.train_labels):,} images in batches of "
            f"{self._options.batch:,}; nothing is chosen."
        )
