"""CAPI's attentive probe (Darcet et al. 2025, arXiv 2502.08769; capi/eval_classification.py), the
fair one for encoders whose CLS token is not trained.

Three sources: CLS and the mean of patch tokens with a linear layer each, and all patch tokens with
attention pooling. AdamW, 12,500 updates of 1,024 images, a linear warm-up over the first tenth and
a cosine to zero; ten learning rates x three weight decays for each source, biases without decay.
The head is chosen on held-out training images, as CAPI does; trained on all of them, it is judged.
"""

from __future__ import annotations

import dataclasses

from webssl_jax.evaluators.features import TOKENS
from webssl_jax.evaluators.fit import Head, Recipe
from webssl_jax.evaluators.probes import heads
from webssl_jax.evaluators.probes.heads import See
from webssl_jax.evaluators.probes.labelled import Problem
from webssl_jax.evaluators.probes.trained import TrainedOptions, TrainedProbe, Trial, Variant
from webssl_jax.models.features import Want
from webssl_jax.optim.schedules import warmup_cosine
from webssl_jax.weights.networks import Networks

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
DECAYS = (5e-4, 1e-3, 5e-2)
ITERATIONS = 12_500
_WARM_UP = 0.1  # of the updates
AT_ONCE = 10  # heads of attention: each has a mean token (D,) of an image for each 64 of its width


@dataclasses.dataclass(frozen=True)
class AttentiveOptions(TrainedOptions):
    """The keys of a row; see :class:`TrainedOptions`."""


class Attentive(TrainedProbe):
    """Top-1 accuracy of the best of 90 heads on CLS, mean patches or all patches."""

    Options = AttentiveOptions
    name = "attentive"
    protocol = 2

    @classmethod
    def want(cls, options: AttentiveOptions, networks: Networks) -> Want:
        """CLS and all patches of the last block."""
        return Want(patches="grid")

    @classmethod
    def trial(cls, options: AttentiveOptions, want: Want, classes: int, images: int) -> Trial:
        """See :class:`TrainedProbe`."""
        linear = cls.plain_head(classes)
        variants = {
            "cls": Variant(See(("cls",)), linear),
            "patches": Variant(See(("patches",)), linear),
            "attention": Variant(See((TOKENS,)), heads.AttentionPool(classes), AT_ONCE),
        }
        steps = options.iterations or ITERATIONS
        schedule = warmup_cosine(1.0, 0.0, steps, round(_WARM_UP * steps))
        recipe = Recipe(steps, schedule, "adamw", b2=0.95, decay_biases=False)
        return Trial(variants, RATES, DECAYS, recipe)

    @classmethod
    def plain_head(cls, classes: int) -> Head:
        """See :class:`TrainedProbe`."""
        return heads.Linear(classes, std=0.02)

    def meaning(self, problem: Problem) -> str:
        """See :class:`TrainedProbe`."""
        o = self._options
        return (
            f"attentive probe as in CAPI: share of {len(problem.test_labels):,} test images put "
            f"into the right one of {problem.num_classes} classes by one layer on CLS, on mean "
            "patches, or by attention pooling over all patches, trained by AdamW on "
            f"{len(problem.train_labels):,} images ({o.iterations or ITERATIONS:,} updates of "
            f"{o.batch:,}). Source, learning rate and decay are chosen on held-out training images."
        )
