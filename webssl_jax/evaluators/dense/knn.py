"""Segmentation by the most similar patches of training images: nothing is learned, so it is cheap.

As in-context scene understanding (Balazevic et al., arXiv 2306.01667), with the votes of DINOv2's
k-NN: each patch of a test image is compared by cosine similarity with patches of training images;
the 30 nearest vote for the commonest class of their pixels, with weight softmax(similarity / 0.07).
The shares of votes are enlarged to pixels. Images are resized to a square.

Training patches lie on all devices, each its own rows; the search is exact among them.

Shape letters: B images, h x w patches, D width, N patches of training images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from webssl_jax.config import UserError
from webssl_jax.data import annotations as annotation
from webssl_jax.data import dense_views, records
from webssl_jax.data.decode import decode_image
from webssl_jax.data.dense_views import IGNORE
from webssl_jax.evaluators import datasets, work
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.dense import lookups, scores, segmentation, stream, windows
from webssl_jax.evaluators.dense.classes import class_table
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.networks import Networks

PROTOCOL = 1  # raised whenever the same weights and records would get another figure
TEMPERATURE, K = 0.07, 30
_WANT = Want(cls=False)


@dataclasses.dataclass(frozen=True)
class KNNSegmentationOptions:
    """The keys of a row.

    train, test, classes, max_images: as of the kind ``segmentation``. size: of the square, in
    pixels, rounded to whole patches. memory: patches of training images at most, evenly of all.
    batch: images a call of the network.
    """

    train: str
    test: str
    classes: str = "ade20k"
    max_images: int = 0
    size: int = 448
    memory: int = 200_000
    batch: int = 16

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.MASKS, train=self.train, test=self.test)
        if min(self.size, self.memory, self.batch) < 1:
            raise ValueError("size, memory and batch must be at least 1")


class KNNSegmentation:
    """Mean IoU of the classes that the most similar training patches vote for."""

    Options = KNNSegmentationOptions
    needs = frozenset({FEATURES})
    datasets: tuple[Dataset, ...] = ()  # pooled features of none

    def __init__(self, options: KNNSegmentationOptions):
        self._options, self._classes = options, class_table(options.classes)
        self._train, self._test = (
            datasets.open_dataset(shards, datasets.MASKS, options.max_images)
            for shards in (options.train, options.test)
        )
        self.data = f"{self._train.identity}-{self._test.identity}-knn-{PROTOCOL}"

    @classmethod
    def want(cls, options: KNNSegmentationOptions, networks: Networks) -> None:
        """None: nothing pooled."""
        return None

    @classmethod
    def work(
        cls, options: KNNSegmentationOptions, model: Model, size: work.Size
    ) -> list[work.Program]:
        """See ``evaluators/work.py``."""
        assert model.mesh is not None  # shapes have places
        grid, batch = _grid(model, options.size), model.rounded_batch(options.batch)
        shape = (grid * model.encoder.patch_size,) * 2
        seen, _ = work.through("training images", model, _WANT, shape, size.images, batch)
        test, made = work.through("test images", model, _WANT, shape, size.test_images, batch)
        rows = min(options.memory, size.images * grid**2)
        rows += -rows % model.mesh.size
        place = NamedSharding(model.mesh, PartitionSpec(meshes.AXES))
        bank = jax.ShapeDtypeStruct((rows, model.encoder.width), jnp.float32, sharding=place)
        labels = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)
        vote = voting(model.mesh, len(class_table(options.classes).names))
        arguments = bank, labels, made.patches
        voted = work.Program("votes", test.calls, vote, arguments, model.params)
        return [seen, dataclasses.replace(test, beside=(bank, labels)), voted]

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        options, names = self._options, self._classes.names
        rules = datasets.fingerprint(self.data, self._classes, options.size, options.memory)
        baselines = lookups.outcomes(
            self._train, self._test, self._classes, not options.max_images, rules, cache
        )
        bank, labels = self._remember(model, cache)
        found, shown = self._judge(model, bank, labels, cache)
        metrics, items = lookups.figures(found, self._classes)
        meaning = (
            f"k-NN segmentation: mean IoU over {len(names)} classes in {len(self._test):,} test "
            f"images, of the class that the {K} most similar of {len(labels):,} training patches "
            "vote for. Nothing is learned."
        )
        of = f"k-NN, {model.origin.name}"
        pictures = shown.draw(self._classes, scores.segmented(found), of)
        return Outcome(
            ("miou",), metrics, items, rules, meaning, baselines=baselines, pictures=pictures
        )

    def _remember(self, model: Model, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """(patches (N, D), their classes (N,)) of training images, on all processes."""
        grid = _grid(model, self._options.size)
        each = min(grid**2, -(-self._options.memory // len(self._train)))
        batch = model.rounded_batch(self._options.batch)
        share = stream.own_share(model, batch)
        own = self._train.indices[share.group :: share.groups]
        rows = -(-len(self._train) // share.groups)  # of the process with most images
        bank = np.zeros((rows, each, model.encoder.width), np.float32)
        labels = np.full((rows, each), IGNORE, np.int32)

        def items() -> Iterator[tuple[tuple[int, np.ndarray], np.ndarray]]:
            for number, (pixels, mask) in self._read(model, self._train, own, cache.threads):
                yield (number, patch_classes(mask, grid)), pixels[None]

        side = grid * model.encoder.patch_size
        for place, ((number, classes), made) in enumerate(
            stream.through(model, functools.partial(_patches, model), items(), (side, side), batch)
        ):
            kept = np.random.default_rng(number).permutation(grid**2)[:each]
            bank[place], labels[place] = made[0].reshape(grid**2, -1)[kept], classes[kept]
        first = np.unique(distributed.gather(share.group), return_index=True)[1]
        bank, labels = (distributed.gather(x)[first] for x in (bank, labels))
        known = labels.reshape(-1) != IGNORE
        if not known.any():
            raise UserError(
                f"size = {self._options.size}: no patch of a training image has a class"
            )
        return bank.reshape(-1, bank.shape[-1])[known], labels.reshape(-1)[known]

    def _judge(
        self, model: Model, bank: np.ndarray, labels: np.ndarray, cache: Cache
    ) -> tuple[scores.Areas, segmentation.Shown]:
        assert model.mesh is not None
        number, batch = len(self._classes.names), model.rounded_batch(self._options.batch)
        share = stream.own_share(model, batch)
        own = self._test.indices[share.group :: share.groups]
        placed = lay(model.mesh, bank, labels)
        vote = voting(model.mesh, number)
        found = np.zeros((len(self._test), 3, number), np.int64)
        shown = segmentation.Shown(segmentation.SHOWN)
        grid = _grid(model, self._options.size)
        side = grid * model.encoder.patch_size

        def items() -> Iterator[tuple[tuple[int, np.ndarray, np.ndarray], np.ndarray]]:
            for index, (pixels, truth) in self._read(model, self._test, own, cache.threads):
                yield (index, truth, pixels), pixels[None]

        def compute(images: jax.Array) -> jax.Array:
            return vote(*placed, _patches(model, images))

        for (index, truth, pixels), made in stream.through(
            model, compute, items(), (side, side), batch
        ):
            predicted = enlarged(made[0], *truth.shape)
            one = scores.areas(predicted, truth, number)
            found[np.searchsorted(self._test.indices, index)] = one
            shown.offer(pixels, truth, predicted, one)
        whole = distributed.gather(found).max(axis=0)
        return scores.Areas(*whole.transpose(1, 0, 2).astype(np.int64)), shown

    def _read(
        self, model: Model, dataset: Dataset, own: np.ndarray, threads: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        side = _grid(model, self._options.size) * model.encoder.patch_size

        def look(record: records.Record) -> tuple[np.ndarray, np.ndarray]:
            pixels = dense_views.resize(decode_image(record.image), side, side)
            return pixels, self._classes(record)

        return stream.read_all(dataset, look, own, threads)


def _patches(model: Model, images: jax.Array) -> jax.Array:
    """(B, h, w, D)."""
    found = model.features(images, _WANT).patches
    assert found is not None  # they were wanted
    return found


def patch_classes(mask: np.ndarray, grid: int) -> np.ndarray:
    """(grid * grid,) int32: of each cell of a mask (H, W) the commonest class, 255 where there is
    none."""
    rows, columns = (np.arange(side) * grid // side for side in mask.shape)
    if min(mask.shape) < grid:  # else some cells would have no pixel
        return annotation.resize_mask(mask, grid, grid).reshape(-1).astype(np.int32)
    cells = (rows[:, None] * grid + columns).ravel()
    counts = np.bincount(cells * 256 + mask.ravel(), minlength=grid**2 * 256)
    counts = counts.reshape(-1, 256)[:, :IGNORE]
    return np.where(counts.any(axis=1), counts.argmax(axis=1), IGNORE).astype(np.int32)


def enlarged(votes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Votes (h, w, C) -> (height, width) uint8, the class with most of them at each pixel."""
    rows, columns = (
        windows.interpolation(*x).astype(np.float32) for x in zip(votes.shape, (height, width))
    )
    out = np.empty((height, width), np.uint8)
    for y, x in windows.tiles(height, width):
        out[y, x] = windows.assemble(votes, rows[y], columns[x]).argmax(axis=-1)
    return out


def lay(mesh: Mesh, bank: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Patches (N, D), normalised, and their classes (N,) over all devices, filled up with rows of
    class -1, which do not vote."""
    more = -len(labels) % mesh.size
    bank = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    whole = np.pad(bank, ((0, more), (0, 0))), np.pad(labels, (0, more), constant_values=-1)
    place = NamedSharding(mesh, PartitionSpec(meshes.AXES))
    first, second = (
        jax.make_array_from_callback(x.shape, place, functools.partial(_take, x)) for x in whole
    )
    return first, second


@functools.lru_cache(maxsize=8)
def voting(mesh: Mesh, classes: int) -> Callable[..., jax.Array]:
    """A function (bank (N, D), labels (N,), patches (B, h, w, D)) -> shares of votes
    (B, h, w, C)."""

    def nearest(
        bank: jax.Array, labels: jax.Array, patches: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of this device's rows the nearest to every image's patches, then of all devices'."""
        all_patches = jax.lax.all_gather(patches, meshes.BATCH_AXES, axis=0, tiled=True)

        def of_one(image: jax.Array) -> tuple[jax.Array, jax.Array]:
            similarity = image.reshape(-1, image.shape[-1]) @ bank.T
            similarity = jnp.where(labels[None] >= 0, similarity, -jnp.inf)
            value, index = jax.lax.top_k(similarity, min(K, len(labels)))
            return value, labels[index]

        value, label = jax.lax.map(of_one, all_patches)
        value, label = (
            jax.lax.all_gather(x, meshes.AXES, axis=2, tiled=True) for x in (value, label)
        )
        value, index = jax.lax.top_k(value, min(K, value.shape[2]))
        label = jnp.take_along_axis(label, index, axis=2)
        weights = jax.nn.softmax(value / TEMPERATURE, axis=-1)
        first = jax.lax.axis_index(meshes.BATCH_AXES) * len(patches)
        size = len(patches)
        weights = jax.lax.dynamic_slice_in_dim(weights, first, size)
        return weights, jax.lax.dynamic_slice_in_dim(label, first, size)

    rows, batch = PartitionSpec(meshes.AXES), PartitionSpec(meshes.BATCH_AXES)
    search = jax.shard_map(
        nearest, mesh=mesh, in_specs=(rows, rows, batch), out_specs=(batch, batch), check_vma=False
    )

    @jax.jit
    def vote(bank: jax.Array, labels: jax.Array, patches: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(patches, axis=-1, keepdims=True)
        with jax.default_matmul_precision("highest"):
            weights, label = search(bank, labels, patches / jnp.maximum(length, 1e-12))
        shares = jax.vmap(jax.vmap(functools.partial(_sum, classes)))(weights, label)
        return shares.reshape(*patches.shape[:3], classes)

    return vote


def _sum(classes: int, weights: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.zeros(classes).at[labels].add(weights)


def _take(whole: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return whole[index]


def _grid(model: Model, size: int) -> int:
    """Patches a side of a square of about ``size`` pixels."""
    return max(round(size / model.encoder.patch_size), 1)
