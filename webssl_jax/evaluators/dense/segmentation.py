"""Semantic segmentation by a linear head on frozen patch features, as DINOv2 judges encoders
(arXiv 2304.07193, section 7.4; its mmsegmentation configs).

``lin.``: BatchNorm and a 1x1 convolution on the last block; images of 512 pixels, one scale,
sliding windows. ``+ms`` (``multiscale``): on the last four blocks together; 640 pixels, five scales
from 1 to 3 times that, each also flipped, class probabilities averaged.

The figure is mean IoU over the areas of the whole test set.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from webssl_jax.data import dense_views, records
from webssl_jax.data.decode import decode_image
from webssl_jax.data.dense_views import ClassTable, SegmentationView
from webssl_jax.evaluators import datasets, work
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.batches import Batch, Images
from webssl_jax.evaluators.datasets import Dataset, Subset
from webssl_jax.evaluators.dense import heads, lookups, losses, recipes, scores, stream, windows
from webssl_jax.evaluators.dense.classes import class_table, palette
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.fit import Fitted, Grid, Recipe, fit
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.model import Model
from webssl_jax.models.features import Features, Want
from webssl_jax.sharding import distributed
from webssl_jax.visuals import masks
from webssl_jax.weights.networks import Networks

PROTOCOL = 1  # raised whenever the same weights and records would get another figure
SHOWN = 4  # best and worst images in the picture
_WARMUP, _WARMUP_FROM = 1500 / 40_000, 1e-6  # share of all steps; share of the rate
_TABLE = "head"


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """The keys of a row.

    train, test: shards with masks. classes: ``ade20k``, ``voc2012``, ``cityscapes``, or a text file
    with a class a line. multiscale: the protocol ``+ms`` instead of ``lin.``. max_images: of each
    set, drawn evenly; 0 for all. size: of the shorter side and of windows, in pixels; 0 for the
    protocol's. steps, batch, learning_rate, weight_decay, seed: of the head's training; one call of
    the network sees ``batch`` images, then and in the test.
    """

    train: str
    test: str
    classes: str = "ade20k"
    multiscale: bool = False
    max_images: int = 0
    size: int = 0
    steps: int = 40_000
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.MASKS, train=self.train, test=self.test)
        if min(self.steps, self.batch) < 1:
            raise ValueError("steps and batch must be at least 1")
        if self.size < 0 or min(self.learning_rate, self.weight_decay) < 0:
            raise ValueError("size, learning_rate and weight_decay must not be negative")

    @property
    def protocol(self) -> Protocol:
        """What follows from these keys."""
        if self.multiscale:
            size = self.size or 640
            return Protocol(4, size, size // 2, (1.0, 3.0), (1.0, 1.32, 1.73, 2.28, 3.0), True)
        size = self.size or 512
        return Protocol(1, size, round(size * 2 / 3), (0.5, 2.0), (1.0,), False)


class Protocol(NamedTuple):
    """blocks: last ones that the head sees together. size: of the shorter side and of windows.
    stride: of windows. scale: of training images. ratios: of the test, each also flipped where
    ``flip`` says so."""

    blocks: int
    size: int
    stride: int
    scale: tuple[float, float]
    ratios: tuple[float, ...]
    flip: bool

    def want(self, depth: int) -> Want:
        """Of a network with so many blocks: :func:`see` puts them together."""
        before = range(depth - min(self.blocks, depth), depth - 1)
        return Want(cls=False, blocks=tuple(before), pad=True)


def see(features: Features) -> jax.Array:
    """(B, h, w, D blocks): the patches that were wanted, the last block's last."""
    before = [features.blocks[block][1] for block in sorted(features.blocks)]
    wanted = [x for x in (*before, features.patches) if x is not None]
    return jnp.concatenate(wanted, axis=-1)


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """``fit.Head``: BatchNorm and a 1x1 convolution to so many ``classes``."""

    classes: int

    def init(self, rng: jax.Array, features: Any) -> tuple[heads.Params, heads.Running]:
        """See ``fit.Head``."""
        return heads.init_segmentation(rng, features.shape[-1], self.classes)

    def apply(
        self, params: heads.Params, stats: heads.Running, features: jax.Array, train: bool
    ) -> tuple[jax.Array, heads.Running]:
        """Logits (B, h, w, C) on the grid of patches."""
        return heads.segmentation(params, heads.Running(*stats), features, train)


def loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy at the size of the masks."""
    mask = batch["mask"]
    return losses.cross_entropy(heads.resize(logits, *mask.shape[1:]), mask)


class Segmentation:
    """Mean IoU of a linear head on frozen patch features."""

    Options = SegmentationOptions
    needs = frozenset({FEATURES})
    datasets: tuple[Dataset, ...] = ()  # pooled features of none

    def __init__(self, options: SegmentationOptions):
        self._options = options
        self._classes = class_table(options.classes)
        self._train, self._test = (
            datasets.open_dataset(shards, datasets.MASKS, options.max_images)
            for shards in (options.train, options.test)
        )
        self.data = f"{self._train.identity}-{self._test.identity}-{PROTOCOL}"

    @classmethod
    def want(cls, options: SegmentationOptions, networks: Networks) -> None:
        """None: nothing pooled."""
        return None

    @classmethod
    def work(
        cls, options: SegmentationOptions, model: Model, size: work.Size
    ) -> list[work.Program]:
        """See ``evaluators/work.py``. Test images are taken to be 4:3."""
        protocol, shape = options.protocol, (options.protocol.size,) * 2
        views = 0
        for ratio in protocol.ratios:
            short = int(protocol.size * ratio)
            sides = short, short * 4 // 3
            rows, columns = (len(windows.spans(x, shape[0], protocol.stride)) for x in sides)
            views += rows * columns * (1 + protocol.flip)
        return stream.work_of(
            model,
            protocol.want(model.encoder.depth),
            _grids(options, class_table(options.classes)),
            _recipe(options),
            (shape, options.batch, {"mask": jnp.uint8}),
            (shape, views * size.test_images),
            _as_they_are,
        )

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        options, protocol = self._options, self._options.protocol
        rules = datasets.fingerprint(self.data, self._classes, protocol)
        baselines = lookups.outcomes(
            self._train, self._test, self._classes, not options.max_images, rules, cache
        )
        fitted = self._fit(model, cache, protocol)
        tester = Tester(model, fitted, self._classes, protocol, options.batch)
        found, shown = tester.run(self._test, cache.threads)
        metrics, items = lookups.figures(found, self._classes)
        what = "+ms" if options.multiscale else "lin."
        meaning = (
            f"segmentation ({what}): mean IoU over {len(self._classes.names)} classes in "
            f"{len(self._test):,} test images, areas of the whole set together; the standard error "
            "is over images."
        )
        pictures = shown.draw(
            self._classes, scores.segmented(found), f"{what}, {model.origin.name}"
        )
        return Outcome(
            ("miou",), metrics, items, rules, meaning, baselines=baselines, pictures=pictures
        )

    def _fit(self, model: Model, cache: Cache, protocol: Protocol) -> Fitted:
        options = self._options
        red, green, blue = (round(255 * x) for x in model.preprocess.mean)
        size = protocol.size
        view = SegmentationView(self._classes, size, size, protocol.scale, (red, green, blue))
        known = datasets.fingerprint(options, self.data, model.preprocess)
        data = Images(
            model,
            Subset(self._train.source, self._train.indices),
            view,
            protocol.want(model.encoder.depth),
            options.batch,
            options.seed,
            threads=cache.threads,
        )
        folder = cache.heads(model, known)
        return fit(_grids(options, self._classes), data, _recipe(options), folder, options.seed)


def _grids(options: SegmentationOptions, classes: ClassTable) -> dict[str, Grid]:
    rates, decays = (options.learning_rate,), (options.weight_decay,)
    return {_TABLE: Grid(LinearHead(len(classes.names)), see, loss, rates, decays)}


def _recipe(options: SegmentationOptions) -> Recipe:
    warmup = round(options.steps * _WARMUP)
    return Recipe(options.steps, recipes.poly(options.steps, warmup, _WARMUP_FROM), "adamw")


def _as_they_are(logits: jax.Array) -> jax.Array:
    return logits


@dataclasses.dataclass(eq=False)
class _Image:
    """An image on its way through the network. views: of each, (rows, columns) that put its windows
    together, and how many windows it has each way; logits: of those that came back."""

    number: int
    pixels: np.ndarray
    truth: np.ndarray
    views: list[tuple[np.ndarray, np.ndarray, tuple[int, int]]]
    logits: list[np.ndarray]

    def predicted(self) -> np.ndarray:
        """(H, W) uint8: the class with the most probability, over all views."""
        height, width = self.truth.shape
        out = np.empty((height, width), np.uint8)
        for y, x in windows.tiles(height, width):
            total: Any = 0
            for (rows, columns, _), logits in zip(self.views, self.logits, strict=True):
                part = windows.assemble(logits, rows[y], columns[x])
                total = total + (_softmax(part) if len(self.views) > 1 else part)
            out[y, x] = total.argmax(axis=-1)
        return out


class Tester:
    """Predictions of a trained head for images of any size."""

    def __init__(
        self, model: Model, fitted: Fitted, classes: ClassTable, protocol: Protocol, batch: int
    ):
        self._model, self._classes, self._protocol = model, classes, protocol
        self._batch = model.rounded_batch(batch)
        self._views = len(protocol.ratios) * (1 + protocol.flip)
        self._tokens = -(-protocol.size // model.encoder.patch_size)
        self._compute = stream.program(
            model, fitted, _TABLE, protocol.want(model.encoder.depth), _as_they_are
        )

    def run(self, dataset: Dataset, threads: int) -> tuple[scores.Areas, Shown]:
        """The areas (n, C) of all its images, on all processes; and what to show of those of this
        process."""
        share = stream.own_share(self._model, self._batch)
        own = dataset.indices[share.group :: share.groups]
        size = self._protocol.size
        found = np.zeros((len(dataset), 3, len(self._classes.names)), np.int64)
        shown = Shown(SHOWN)
        progress = stream.progress(len(own), "test:")
        items = self._items(dataset, own, threads)
        for image, made in stream.through(
            self._model, self._compute, items, (size, size), self._batch
        ):
            counts = image.views[len(image.logits)][2]
            image.logits.append(windows.joined(made.reshape(*counts, *made.shape[1:])))
            if len(image.logits) == self._views:  # image.views grows only as images are read
                predicted = image.predicted()
                one = scores.areas(predicted, image.truth, len(self._classes.names))
                found[np.searchsorted(dataset.indices, image.number)] = one
                shown.offer(image.pixels, image.truth, predicted, one)
                progress.update(1)
        progress.close()
        whole = distributed.gather(found).max(axis=0)  # processes may share images
        return scores.Areas(*whole.transpose(1, 0, 2).astype(np.int64)), shown

    def _items(
        self, dataset: Dataset, own: np.ndarray, threads: int
    ) -> Iterator[tuple[_Image, np.ndarray]]:
        def look(record: records.Record) -> tuple[Image.Image, np.ndarray]:
            return decode_image(record.image), self._classes(record)

        for number, (picture, truth) in stream.read_all(dataset, look, own, threads):
            image = _Image(number, np.asarray(picture), truth, [], [])
            for ratio in self._protocol.ratios:
                size = dense_views.size_for(picture, int(self._protocol.size * ratio))
                pixels = dense_views.resize(picture, *size)
                for flip in (False, True) if self._protocol.flip else (False,):
                    seen = pixels[:, ::-1] if flip else pixels
                    cut = windows.cut(seen, self._protocol.size, self._protocol.stride)
                    image.views.append(self._view(truth.shape, pixels.shape, cut.shape, flip))
                    yield image, cut.reshape(-1, *cut.shape[2:])

    def _view(
        self, out: tuple[int, ...], size: tuple[int, ...], cut: tuple[int, ...], flip: bool
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        rows, columns = (
            _assembly(side, self._protocol.size, self._protocol.stride, self._tokens, to)
            for side, to in zip(size[:2], out)
        )
        return rows, columns[::-1] if flip else columns, (cut[0], cut[1])


class Shown:
    """The ``most`` images with the best and with the worst predictions, made small."""

    def __init__(self, most: int):
        self._most, self._count = most, 0
        self._best: list[tuple[float, int, masks.Segmented]] = []
        self._worst: list[tuple[float, int, masks.Segmented]] = []

    def offer(
        self, pixels: np.ndarray, truth: np.ndarray, predicted: np.ndarray, found: scores.Areas
    ) -> None:
        """Keeps an image or not. Images without a labelled pixel are never kept."""
        true = found.true > 0
        if not true.any():
            return
        score = float((found.both[true] / found.union[true]).mean())
        self._count += 1
        one: masks.Segmented | None = None
        for heap, order in ((self._best, score), (self._worst, -score)):
            if len(heap) < self._most or order > heap[0][0]:
                one = one or masks.small(pixels, truth, predicted, f"{score:.2f}")
                push = heapq.heappush if len(heap) < self._most else heapq.heapreplace
                push(heap, (order, self._count, one))

    def draw(self, classes: ClassTable, found: scores.Segmented, of: str) -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}; none on other processes than the first."""
        if jax.process_index() or not self._count:
            return {}
        colours = palette(classes)
        among = f"of {self._count:,} images, by the mean IoU of the classes in each"
        sheets = {
            name: masks.sheet(
                [one for *_, one in sorted(heap, key=lambda x: -x[0])],
                classes.names,
                colours,
                f"{words} {among}; {of}",
            )
            for name, words, heap in (
                ("best", "The best", self._best),
                ("worst", "The worst", self._worst),
            )
        }
        return sheets | {"classes": masks.bars(classes.names, found.iou, colours, found.miou, of)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


_assembly = functools.lru_cache(maxsize=256)(windows.assembly)
