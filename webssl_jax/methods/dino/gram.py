"""The Gram loss of DINOv3 (Siméoni et al., arXiv 2508.10104, section 4). In a second stage, what
the student's patches of a crop are to each other shall be what those of an earlier network are, so
that dense features do not decay while the others get better.

Shape letters: M crops, N patches of the student, D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from webssl_jax.models.layers import l2_normalise
from webssl_jax.models.position import INTERPOLATIONS, Grid


@dataclasses.dataclass(frozen=True)
class Gram:
    """weight: of the loss. size: pixels of the Gram teacher's crops, which are those of the student
    without colours and blur. teacher: a run, or a file or folder of weights, whose encoder the Gram
    teacher begins as; empty for the run's own teacher at the first step of the stage.
    refresh_images: when, counted from the start of all training, the run's teacher takes its place;
    refresh_every_images: and again after so many, ``refreshes`` times in all.

    Raises:
      ValueError: when a field is out of range.
    """

    weight: float = 2.0
    size: int = 512
    teacher: str = ""
    refresh_images: int = 0
    refresh_every_images: int = 0
    refreshes: int = 0

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.size < 1:
            raise ValueError(f"weight = {self.weight}, size = {self.size}: must be positive")
        counts = (self.refresh_images, self.refresh_every_images, self.refreshes)
        if min(counts) < 0 or self.refreshes > 1 and not self.refresh_every_images:
            raise ValueError(
                "refresh_images, refresh_every_images and refreshes must be zero or positive, and "
                "more than one refresh needs refresh_every_images"
            )

    def due(self, step: jax.Array, global_batch: int) -> jax.Array:
        """1 where the teacher takes the Gram teacher's place before ``step``, else 0."""
        first = round(self.refresh_images / global_batch)
        every = max(round(self.refresh_every_images / global_batch), 1)
        number, late = jnp.divmod(step - first, every)
        return jnp.where((late == 0) & (number >= 0) & (number < self.refreshes), 1.0, 0.0)


def gram_loss(student: jax.Array, teacher: jax.Array, grid: Grid, teacher_grid: Grid) -> jax.Array:
    """The mean squared difference of all cosines between two patches of a crop.

    student: (M, N, D) of ``grid``. teacher: (M, N', D) of ``teacher_grid``, which is resized to the
    other (bicubic, not antialiased) before it is normalised.
    """
    resize = INTERPOLATIONS["plain"].resize
    teacher = jax.vmap(lambda x: jnp.asarray(resize(x, teacher_grid, grid)))(teacher)

    def cosines(x: jax.Array) -> jax.Array:
        x = l2_normalise(x.astype(jnp.float32), 1e-12)
        return jnp.einsum("mid,mjd->mij", x, x, precision=jax.lax.Precision.HIGHEST)

    return jnp.square(cosines(student) - cosines(teacher)).mean()
