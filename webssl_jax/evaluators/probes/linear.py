"""The linear probe as DINOv2 does it (dinov2/eval/linear.py; paper, appendix B.3): a grid of
learning rates and of features, one linear layer each, trained by SGD on augmented images.

Four kinds of features: CLS of the last block or of the last four side by side, each with and
without the mean of the last block's patch tokens; the final norm is applied to all blocks. SGD with
momentum 0.9 and no decay, a cosine to zero over 12,500 updates of 1,024 images, learning rates for
a batch of 256 scaled by the batch. Crops, flips and normalisation are those of torchvision.

The learning rates that the code ships and those that the paper prints differ; ``rates`` says which,
by default both. Heads are named by their rate for a batch of 256. (The original names them by the
scaled rate with five decimals, so that at small batches two of them share a name, and one is lost.)
"""

from __future__ import annotations

import dataclasses

from webssl_jax.evaluators.fit import Head, Recipe
from webssl_jax.evaluators.probes import heads, logistic
from webssl_jax.evaluators.probes.heads import See
from webssl_jax.evaluators.probes.labelled import Problem
from webssl_jax.evaluators.probes.trained import TrainedOptions, TrainedProbe, Trial, Variant
from webssl_jax.models.features import Want
from webssl_jax.optim.schedules import warmup_cosine
from webssl_jax.weights.networks import Networks, encoder_of

_BOTH = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
CODE = (1e-5, 2e-5, 5e-5, *_BOTH)
PAPER = (*_BOTH, 0.2, 0.3, 0.5)
ITERATIONS = 12_500
RATES = {"code": CODE, "paper": PAPER, "both": tuple(sorted({*CODE, *PAPER}))}


@dataclasses.dataclass(frozen=True)
class LinearOptions(TrainedOptions):
    """The keys of a row; see :class:`TrainedOptions`.

    rates: ``code``, ``paper`` (13 each) or ``both`` (16).
    last_blocks: CLS tokens of so many last blocks, side by side; a network with fewer gives all.
    """

    rates: str = "both"
    last_blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates not in RATES:
            raise ValueError(f"rates = {self.rates!r} is not one of {', '.join(RATES)}")
        if self.last_blocks < 1:
            raise ValueError(f"last_blocks = {self.last_blocks} must be at least 1")


class Linear(TrainedProbe):
    """Top-1 accuracy of the best of 64 linear layers."""

    Options = LinearOptions
    name = "linear"
    protocol = 2

    @classmethod
    def want(cls, options: LinearOptions, networks: Networks) -> Want:
        """CLS of the last blocks, mean patches of the last."""
        depth = encoder_of(networks).depth
        return Want(
            patches="mean", blocks=tuple(range(depth - min(options.last_blocks, depth), depth))
        )

    @classmethod
    def trial(cls, options: LinearOptions, want: Want, classes: int, images: int) -> Trial:
        """See :class:`TrainedProbe`."""
        head = cls.plain_head(classes)
        joined = logistic.variants(want.blocks)
        variants = {
            name: Variant(See(parts), head)
            for name, parts in joined.items()
            if name.startswith("cls")
        }
        steps = options.iterations or ITERATIONS
        recipe = Recipe(steps, warmup_cosine(1.0, 0.0, steps))
        return Trial(variants, RATES[options.rates], (0.0,), recipe)

    @classmethod
    def plain_head(cls, classes: int) -> Head:
        """See :class:`TrainedProbe`."""
        return heads.Linear(classes)

    def meaning(self, problem: Problem) -> str:
        """See :class:`TrainedProbe`."""
        o = self._options
        seen = "random crops" if o.augment else "images as they are"
        return (
            f"linear probe as in DINOv2: share of {len(problem.test_labels):,} test images put "
            f"into the right one of {problem.num_classes} classes by one linear layer on frozen "
            f"features, trained by SGD on {seen} of {len(problem.train_labels):,} images "
            f"({o.iterations or ITERATIONS:,} updates of {o.batch:,}). Features and learning rate "
            "are chosen on held-out training images; selected_on_test: on the test images "
            "themselves, as it was published."
        )
