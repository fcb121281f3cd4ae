"""The losses of image-text pairs over the global batch: CLIP's softmax contrast (Radford et al.,
arXiv 2103.00020, figure 3) and SigLIP's sigmoid (Zhai et al., arXiv 2303.15343, section 3.2).

Every image is compared with every text of the global batch, but no device holds all B x B logits.
Each keeps its own images, gathers the texts, and multiplies out its rows of logits, ``block`` rows
at a time; a block is multiplied out again for its gradient. What softmax needs of a text, whose
column is spread over the devices, is one largest value and one sum a device. So one matrix product
serves both directions, only texts and their gradients travel, and a block of all rows is the plain
computation. Any mesh and any block give the same results up to the rounding of float32.

Compiled for a v5p-512 (256 chips, libtpu 0.0.42), batch 32768 in bfloat16, E = 1024, softmax with
gradients: 0.08 GiB temporary memory and 0.20 GB over the wire a chip. Left to the compiler, the
plain formula needs 0.19 GiB.

Shape letters: B pairs, E channels of the shared space; on one device b pairs, r rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from webssl_jax.models.layers import batch_shards

# For each text of the batch, (B,): the largest logit so far, and the sum of exp(logit - largest).
_Sums = tuple[jax.Array, jax.Array]
# What is summed for each text, and (B,) its largest logit with an image that is not its own.
_Carry = tuple[Any, jax.Array]


class Contrast(NamedTuple):
    """Scalars. loss: the mean over pairs. image_accuracy: the share of images that are closer to
    their own text than to any other of the batch; equally close counts as lost. text_accuracy: the
    share of texts that are closer to their own image."""

    loss: jax.Array
    image_accuracy: jax.Array
    text_accuracy: jax.Array


class _Comparison(NamedTuple):
    """What a device learns from its rows. positives: (b,), logits of its own pairs. rows: (b,), a
    sum over each of its images. columns: sums over each text of the batch (B,), of its images only.
    """

    positives: jax.Array
    rows: jax.Array
    columns: Any
    image_accuracy: jax.Array
    text_accuracy: jax.Array


def softmax_contrast(
    images: jax.Array, texts: jax.Array, scale: jax.Array, *, block: int = 0
) -> Contrast:
    """CLIP's loss: half the mean cross-entropy of finding the text of an image among all texts, and
    half that of finding the image of a text.

    images, texts: (B, E), L2-normalised, row i of both a pair; products are taken in their dtype
    and summed in float32. scale: () float32, what cosines are multiplied with. block: rows of
    logits that a device holds at a time, or the next smaller number that divides its rows; 0: all.
    """

    def on_device(
        shards: _Shards, images: jax.Array, texts: jax.Array, scale: jax.Array
    ) -> Contrast:
        def add(columns: _Sums, logits: jax.Array) -> _Sums:
            largest, total = columns
            # What is subtracted drops out, so it needs no gradient.
            new = jnp.maximum(largest, jax.lax.stop_gradient(logits).max(axis=0))
            total = total * jnp.exp(largest - new) + jnp.exp(logits - new).sum(axis=0)
            return new, total

        count = texts.shape[0] * shards.ways
        start = (jnp.full(count, -jnp.inf), jnp.zeros(count))
        rows = jax.nn.logsumexp
        found = _compare(shards, images, texts, scale, 0.0, rows, add, start, block)
        largest, total = found.columns
        most = shards.largest(largest)
        columns = most + jnp.log(shards.total(total * jnp.exp(largest - most)))
        both = shards.total((found.rows - 2 * found.positives).sum()) + columns.sum()
        return Contrast(both / (2 * count), found.image_accuracy, found.text_accuracy)

    return _on_shards(on_device, images, texts, scale)


def sigmoid_contrast(
    images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array, *, block: int = 0
) -> Contrast:
    """SigLIP's loss: for every image with every text, whether they are a pair. -sum log sigmoid(+-
    (scale * cosine + bias)) over all of them, divided by the number of images and not of pairs.

    bias: () float32; the rest as in :func:`softmax_contrast`.
    """

    def on_device(
        shards: _Shards, images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array
    ) -> Contrast:
        # -log sigmoid(-z) = softplus(z), and of a pair -log sigmoid(z) = softplus(z) - z
        def rows(logits: jax.Array, axis: int) -> jax.Array:
            return jax.nn.softplus(logits).sum(axis=axis)

        def none(columns: tuple[()], logits: jax.Array) -> tuple[()]:
            return columns

        count = texts.shape[0] * shards.ways
        found = _compare(shards, images, texts, scale, bias, rows, none, (), block)
        both = shards.total((found.rows - found.positives).sum())
        return Contrast(both / count, found.image_accuracy, found.text_accuracy)

    return _on_shards(on_device, images, texts, scale, bias)


def _compare(
    shards: _Shards,
    images: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array | float,
    rows: Callable[..., jax.Array],
    add: Callable[[Any, jax.Array], Any],
    columns: Any,
    block: int,
) -> _Comparison:
    """Takes a device's images (b, E) through their logits with all texts, a block at a time.

    texts: (b, E), those of the device. rows: logits (r, B), axis=1 -> (r,). add: (columns, logits)
    -> columns, from the start value ``columns``.
    """
    b, dtype = images.shape[0], images.dtype
    # Gathered in their own dtype; in float32 from there, so that the blocks' gradients are added
    # up in float32.
    everyone = shards.gather(texts).astype(jnp.float32)
    # What was rounded to bfloat16 gains nothing from the six passes of a float32 product on a TPU.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    place = jnp.arange(everyone.shape[0])

    def compare(
        carry: _Carry, piece: tuple[jax.Array, jax.Array]
    ) -> tuple[_Carry, tuple[jax.Array, jax.Array, jax.Array]]:
        columns, rival = carry
        images, own = piece
        cosines = jnp.einsum(
            "re,be->rb",
            images,
            everyone.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        logits = scale * cosines + bias
        mine = own[:, None] == place
        positives = jnp.where(mine, logits, 0.0).sum(axis=1)
        rivals = jnp.where(mine, -jnp.inf, jax.lax.stop_gradient(logits))
        carry = (add(columns, logits), jnp.maximum(rival, rivals.max(axis=0)))
        return carry, (positives, rows(logits, axis=1), rivals.max(axis=1))

    own = shards.shard_index() * b + jnp.arange(b)
    start = shards.on_each((columns, jnp.full(place.shape, -jnp.inf)))
    r = next(r for r in range(min(block or b, b), 0, -1) if b % r == 0)
    if r == b:
        carry, out = compare(start, (images, own))
    else:
        pieces = jax.tree.map(lambda x: rearrange(x, "(n r) ... -> n r ...", r=r), (images, own))
        carry, out = jax.lax.scan(jax.checkpoint(compare, prevent_cse=False), start, pieces)
        out = jax.tree.map(lambda x: rearrange(x, "n r -> (n r)"), out)
    columns, rival = carry
    positives, sums, image_rivals = out
    won = jax.lax.stop_gradient(positives)
    text_rivals = jax.lax.dynamic_slice_in_dim(shards.largest(rival), own[0], b)
    share = [
        shards.total((won > rivals).sum()) / place.shape[0]
        for rivals in (image_rivals, text_rivals)
    ]
    return _Comparison(positives, sums, columns, *share)


class _Shards(NamedTuple):
    """The devices that a batch is cut over, seen from one of them. axes: of the mesh; () where
    there is nothing to cut."""

    axes: tuple[str, ...]
    ways: int

    def gather(self, x: jax.Array) -> jax.Array:
        """(b, ...) of each -> (B, ...) on all."""
        return jax.lax.all_gather(x, self.axes, tiled=True) if self.axes else x

    def total(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self.axes) if self.axes else x

    def largest(self, x: jax.Array) -> jax.Array:
        """Without a gradient."""
        x = jax.lax.stop_gradient(x)
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def shard_index(self) -> jax.Array | int:
        """The index of this device's shard of the batch."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def on_each(self, tree: Any) -> Any:
        """Constants, as values that each device will change in its own way."""
        if not self.axes:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.axes, to="varying"), tree)


def _on_shards(
    on_device: Callable[..., Contrast], images: jax.Array, texts: jax.Array, *scalars: jax.Array
) -> Contrast:
    """``on_device(shards, images, texts, *scalars)`` with each device's rows, where a mesh is in
    force that the batch divides over.

    With ``shard_map``, because the compiler left alone gathers both sides, and adds up the texts'
    gradients over the devices at every block instead of once.
    """
    axes, ways = batch_shards()
    if not axes or images.shape[0] % ways:
        return on_device(_Shards((), 1), images, texts, *scalars)

    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        lambda *arrays: on_device(_Shards(axes, ways), *arrays),
        in_specs=(rows, rows) + (whole,) * len(scalars),
        out_specs=whole,
    )(images, texts, *scalars)
