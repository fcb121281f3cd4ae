"""Monocular depth by a linear head on frozen patch features, as DINOv2 judges encoders (arXiv
2304.07193, section 7.4; its configs of the Monocular-Depth-Estimation-Toolbox).

``lin. 1`` sees the last block, ``lin. 4`` four evenly spaced ones; both without the final norm, and
with the CLS token beside every patch. The head gives each pixel a distribution over 256 depths. The
test sees whole images, as they are and flipped.

What differs from what was published: the figure is that of the head after its last step; published
is the best of all evaluations on the test images themselves (by abs_rel, every 800 steps).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data import dense_views, records
from webssl_jax.data.dense_views import Area, DepthView
from webssl_jax.evaluators import datasets, work
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.batches import Batch, Images
from webssl_jax.evaluators.datasets import Dataset, Subset
from webssl_jax.evaluators.dense import heads, losses, recipes, scores, stream
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.fit import Fitted, Grid, Recipe, fit
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.model import Model
from webssl_jax.models.features import Features, Want
from webssl_jax.sharding import distributed
from webssl_jax.visuals import depths
from webssl_jax.weights.networks import Networks

PROTOCOL = 2  # raised whenever the same weights and records would get another figure
LOW = 1e-3  # metres
SHOWN = 4
_CLIP = 35.0  # the largest norm of a gradient
_GROUP = 2  # images whose loss is taken together: two a GPU, as published
_WARMUP, _WARMUP_FROM = 1 / 3, 1e-3  # share of all steps; share of the rate
_TABLE = "head"
_PLACES = 16  # rows and columns
MEAN_DEPTHS = ("mean depth", "mean depth of the place")


class Layout(NamedTuple):
    """How a data set is used.

    units_per_metre: of its PNGs. high: metres, of the bins and of what is judged. train_area,
    test_area: the part of the images that counts; None for all. train_size: (height, width) to
    which the former is resized, so that things are as large as in the test. crop: (height, width)
    of training. degrees, brightness: of the augmentation. size: (height, width) that the network
    sees in the test. judged: (first row, end, first column, end) of what is judged, as shares of
    ``test_area``; None for all.
    """

    units_per_metre: float
    high: float
    train_area: Area | None
    test_area: Area | None
    train_size: tuple[int, int]
    crop: tuple[int, int]
    degrees: float
    brightness: tuple[float, float]
    size: tuple[int, int]
    judged: tuple[float, float, float, float] | None


# Eigen's crop is rows 45:471 and columns 41:601 of 480 x 640; Garg's is these shares of KITTI's.
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
_NYU = Layout(
    units_per_metre=1000,
    high=10,
    train_area=(45, 472, 43, 608),
    test_area=None,
    train_size=(427, 565),
    crop=(416, 544),
    degrees=2.5,
    brightness=(0.75, 1.25),
    size=(480, 640),
    judged=_EIGEN,
)
_WHOLE = _NYU._replace(train_area=None, train_size=(480, 640), judged=None)
LAYOUTS = {
    "nyu": _NYU,
    # its depths are stored with three bits less than they have: 8 units a millimetre
    "sun": _WHOLE._replace(units_per_metre=8000),
    "kitti": Layout(
        *(256, 80, (352, 1216), (352, 1216), (352, 1216), (352, 704)),
        *(1.0, (0.9, 1.1), (352, 1216), _GARG),
    ),
    "plain": _WHOLE,
}


@dataclasses.dataclass(frozen=True)
class DepthOptions:
    """The keys of a row.

    train, test: shards with depth. layers: 1 or 4, of the protocols ``lin. 1`` and ``lin. 4``.
    blocks: which ones instead, 0-based. layout, test_layout: how the sets are used, of
    :data:`LAYOUTS`; an empty ``test_layout`` is ``layout``. size: (height, width) that the network
    sees in the test, by which training images and crops scale too; empty for the layout's.
    max_images: of each set, drawn evenly; 0 for all. gradient_weight: of the gradient loss, which
    is 0 as published (see ``losses.gradient``). steps, batch, learning_rate, weight_decay, seed: of
    the head's training; a call of the network sees ``batch`` images, then and in the test.
    """

    train: str
    test: str
    layers: int = 1
    blocks: tuple[int, ...] = ()
    layout: str = "nyu"
    test_layout: str = ""
    size: tuple[int, ...] = ()
    max_images: int = 0
    gradient_weight: float = 0.0
    steps: int = 38_400
    batch: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.DEPTH, train=self.train, test=self.test)
        if self.layers not in (1, 4):
            raise ValueError(f"layers = {self.layers} must be 1 or 4")
        for name in (self.layout, self.test_layout or self.layout):
            if name not in LAYOUTS:
                raise ValueError(f"layout = {name!r} is not one of {', '.join(LAYOUTS)}")
        if len(self.size) not in (0, 2) or any(side < 1 for side in self.size):
            raise ValueError(f"size = {self.size} must be a height and a width")
        if self.batch < 1 or self.batch % _GROUP:
            raise ValueError(f"batch = {self.batch}: must be even")
        if self.steps <= losses.WARMUP_STEPS:
            raise ValueError(
                f"steps = {self.steps}: must be above {losses.WARMUP_STEPS}; so many first steps "
                "learn the mean depth alone"
            )
        if min(self.gradient_weight, self.learning_rate, self.weight_decay) < 0:
            raise ValueError("gradient_weight, learning_rate, weight_decay must not be negative")

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of the training and of the test images."""
        train, test = (
            self._sized(LAYOUTS[x]) for x in (self.layout, self.test_layout or self.layout)
        )
        return train, test

    def _sized(self, layout: Layout) -> Layout:
        if not self.size:
            return layout

        def scaled(sides: tuple[int, int]) -> tuple[int, int]:
            height, width = (
                round(new * side / old) for new, side, old in zip(self.size, sides, layout.size)
            )
            return height, width

        return layout._replace(
            size=scaled(layout.size), crop=scaled(layout.crop), train_size=scaled(layout.train_size)
        )

    def blocks_of(self, depth: int) -> tuple[int, ...]:
        """0-based blocks that the head of a network of so many sees."""
        if self.blocks:
            return self.blocks
        return (depth - 1,) if self.layers == 1 else four_blocks(depth)


def four_blocks(depth: int) -> tuple[int, ...]:
    """Meta's rule for four evenly spaced blocks, which has an exception for 24; of fewer than four
    all. Where four do not divide the depth, the last block is not among them."""
    if depth < 4:
        return tuple(range(depth))
    return (4, 11, 17, 23) if depth == 24 else tuple(i * (depth // 4) - 1 for i in (1, 2, 3, 4))


def see(features: Features) -> jax.Array:
    """(B, h, w, 2 D blocks): patches and CLS of the blocks that were wanted."""
    return heads.with_cls([features.blocks[block] for block in sorted(features.blocks)])


@dataclasses.dataclass(frozen=True)
class DepthHead:
    """``fit.Head``: depths from ``LOW`` to ``high`` metres. It counts its steps, with which the
    loss changes."""

    high: float

    def init(self, rng: jax.Array, features: Any) -> tuple[heads.Params, dict[str, jax.Array]]:
        """See ``fit.Head``."""
        return heads.init_depth(rng, features.shape[-1]), {"step": jnp.int32(0)}

    def apply(
        self, params: heads.Params, stats: dict[str, jax.Array], features: jax.Array, train: bool
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """((depths (B, 4 h, 4 w), steps before this one), statistics)."""
        step, params = stats["step"], heads.clip_gradient(params, _CLIP)
        return (heads.depth(params, features, LOW, self.high), step), {"step": step + train}


@dataclasses.dataclass(frozen=True)
class Loss:
    """The scale-invariant loss, and so much of the gradient loss."""

    gradient_weight: float = 0.0

    def __call__(self, outputs: tuple[jax.Array, jax.Array], batch: Batch) -> jax.Array:
        """Of depths at the size of the truth."""
        (depths_, step), truth = outputs, batch["depth"]
        predicted = heads.resize(depths_[..., None], *truth.shape[1:])[..., 0]
        total = losses.scale_invariant(predicted, truth, step, _GROUP)
        if self.gradient_weight:
            total += self.gradient_weight * losses.gradient(predicted, truth)
        return total


class Depth:
    """Root mean square error of a linear head on frozen patch features, in metres."""

    Options = DepthOptions
    needs = frozenset({FEATURES})
    datasets: tuple[Dataset, ...] = ()  # pooled features of none

    def __init__(self, options: DepthOptions):
        self._options = options
        self._train, self._test = (
            datasets.open_dataset(shards, datasets.DEPTH, options.max_images)
            for shards in (options.train, options.test)
        )
        self.data = f"{self._train.identity}-{self._test.identity}-{PROTOCOL}"

    @classmethod
    def want(cls, options: DepthOptions, networks: Networks) -> None:
        """None: nothing pooled."""
        return None

    @classmethod
    def work(cls, options: DepthOptions, model: Model, size: work.Size) -> list[work.Program]:
        """See ``evaluators/work.py``."""
        train, test = options.layouts
        return stream.work_of(
            model,
            _want(options, model),
            _grids(options),
            _recipe(options),
            (train.crop, options.batch, {"depth": jnp.float32}),
            (test.size, 2 * size.test_images),  # each is flipped, too
            Clipped(train.high),
        )

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        options, (train, test) = self._options, self._options.layouts
        blocks = options.blocks_of(model.encoder.depth)
        rules = datasets.fingerprint(self.data, train, test)
        baselines = cache.remember(
            f"mean-depth-{rules}",
            lambda: mean_depths(self._train, self._test, train, test, rules, cache.threads),
        )
        want = _want(options, model)
        fitted = self._fit(model, cache, want, train)
        found, shown = judge(model, fitted, want, self._test, (train, test), options.batch, cache)
        metrics, items = figures(found)
        what = f"lin. {options.layers}"
        meaning = (
            f"depth ({what}): root mean square error in metres, lower is better, of each of "
            f"{len(self._test):,} test images, then their mean."
        )
        chosen = {"rmse": f"blocks {', '.join(map(str, blocks))} of {model.encoder.depth}"}
        return Outcome(
            ("rmse",),
            metrics,
            items,
            rules,
            meaning,
            chosen,
            baselines=baselines,
            pictures=shown.draw(test.high, f"{what}, {model.origin.name}"),
        )

    def _fit(self, model: Model, cache: Cache, want: Want, layout: Layout) -> Fitted:
        options = self._options
        view = DepthView(
            layout.train_area,
            layout.crop,
            layout.units_per_metre,
            layout.degrees,
            layout.brightness,
            layout.train_size,
        )
        known = datasets.fingerprint(options, self.data, model.preprocess)
        folder = cache.heads(model, known)
        source = Subset(self._train.source, self._train.indices)
        data = Images(model, source, view, want, options.batch, options.seed, threads=cache.threads)
        return fit(_grids(options), data, _recipe(options), folder, options.seed)


def _want(options: DepthOptions, model: Model) -> Want:
    return Want(blocks=options.blocks_of(model.encoder.depth), blocks_norm=False, pad=True)


def _grids(options: DepthOptions) -> dict[str, Grid]:
    head, loss = DepthHead(options.layouts[0].high), Loss(options.gradient_weight)
    return {_TABLE: Grid(head, see, loss, (options.learning_rate,), (options.weight_decay,))}


def _recipe(options: DepthOptions) -> Recipe:
    steps = options.steps
    schedule = recipes.cosine(steps, round(steps * _WARMUP), _WARMUP_FROM)
    return Recipe(steps, schedule, "adamw", b1=recipes.one_cycle(steps))


@dataclasses.dataclass(frozen=True)
class Clipped:
    """From what the head puts out to depths from ``LOW`` to ``high`` metres."""

    high: float

    def __call__(self, outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.clip(outputs[0], LOW, self.high)


def judge(
    model: Model,
    fitted: Fitted,
    want: Want,
    dataset: Dataset,
    layouts: tuple[Layout, Layout],
    batch: int,
    cache: Cache,
) -> tuple[np.ndarray, Shown]:
    """((n, figures) of all test images, on all processes; what to show of those of this one).

    layouts: of training, which says the range of the head, and of the test.
    """
    high, layout = layouts[0].high, layouts[1]
    batch = model.rounded_batch(batch)
    compute = stream.program(model, fitted, _TABLE, want, Clipped(high))
    share = stream.own_share(model, batch)
    own = dataset.indices[share.group :: share.groups]
    found = np.zeros((len(dataset), len(scores.DEPTH_FIGURES)), np.float32)
    shown, progress = Shown(SHOWN), stream.progress(len(own), "test:")

    def items() -> Iterator[tuple[tuple[int, Image.Image, np.ndarray], np.ndarray]]:
        def look(record: records.Record) -> tuple[Image.Image, np.ndarray]:
            return dense_views.read_depth(record, layout.test_area, layout.units_per_metre)

        for number, (image, truth) in stream.read_all(dataset, look, own, cache.threads):
            pixels = dense_views.resize(image, *layout.size[::-1])
            yield (number, image, truth), np.stack([pixels, pixels[:, ::-1]])

    for (number, image, truth), pair in stream.through(model, compute, items(), layout.size, batch):
        both = (pair[0] + pair[1][:, ::-1]) / 2
        predicted = stream.enlarged(both, *truth.shape)
        errors = errors_of(predicted, truth, layout, dataset, number)
        found[np.searchsorted(dataset.indices, number)] = list(errors.values())
        shown.offer(np.asarray(image), truth, predicted, errors["rmse"])
        progress.update(1)
    progress.close()
    # An image that another process judged is 0 here; figures are not negative.
    return distributed.gather(found).max(axis=0), shown


def errors_of(
    predicted: np.ndarray, truth: np.ndarray, layout: Layout, dataset: Dataset, number: int
) -> dict[str, float]:
    """The figures of one image, of depths (H, W).

    Raises:
      UserError: where no pixel counts.
    """
    counts = (truth > LOW) & (truth < layout.high)
    if layout.judged:
        inside = np.zeros_like(counts)
        sides = np.repeat(truth.shape, 2)
        y0, y1, x0, x1 = (int(share * side + 1e-6) for share, side in zip(layout.judged, sides))
        inside[y0:y1, x0:x1] = True
        counts &= inside
    if not counts.any():
        raise UserError(
            f"{dataset.source.describe(number)}: no depth from {LOW} to {layout.high:g} m where it "
            "is judged; see units_per_metre of the layout, or leave the record out"
        )
    return scores.depth_errors(np.maximum(predicted[counts], LOW), truth[counts])


def figures(found: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, items) of an outcome, from the figures (n, 9) of images."""
    metrics: dict[str, float] = {}
    items: dict[str, np.ndarray] = {}
    for name, values in zip(scores.DEPTH_FIGURES, found.T):
        one, own = scored(name, values)
        metrics, items = metrics | one, items | own
    return metrics, items


def mean_depths(
    train: Dataset, test: Dataset, of_train: Layout, of_test: Layout, rules: str, threads: int
) -> dict[str, Outcome]:
    """{"mean depth", "mean depth of the place": their figures}: of all known pixels of training
    images, and of each of 16 x 16 places. Every record is read, so that what is wrong with one is
    said before hours of training.

    Raises:
      UserError: for a record that cannot be read, or one without a depth to judge.
    """
    total, known = np.zeros((_PLACES, _PLACES)), np.zeros((_PLACES, _PLACES))

    def add(record: records.Record) -> tuple[np.ndarray, np.ndarray]:
        _, depth = dense_views.read_depth(record, of_train.train_area, of_train.units_per_metre)
        rows, columns = (np.arange(side) * _PLACES // side for side in depth.shape)
        cells = (rows[:, None] * _PLACES + columns).ravel()
        there = (depth > LOW) & (depth < of_train.high)
        size = _PLACES**2
        sums = np.bincount(cells, np.where(there, depth, 0).ravel(), size)
        return sums, np.bincount(cells, there.ravel(), size)

    for _, (sums, counts) in stream.read_all(train, add, train.indices, threads):
        total += sums.reshape(total.shape)
        known += counts.reshape(known.shape)
    if not known.any():
        raise UserError(
            f"{train.source.describe(0)}, ...: no depth from {LOW} to {of_train.high:g} m in any "
            "of them; see units_per_metre of the layout"
        )
    mean = total.sum() / known.sum()
    places = np.where(known > 0, total / np.maximum(known, 1), mean)
    found: dict[str, list[list[float]]] = {name: [] for name in MEAN_DEPTHS}

    def look(record: records.Record) -> np.ndarray:
        return dense_views.read_depth(record, of_test.test_area, of_test.units_per_metre)[1]

    for number, truth in stream.read_all(test, look, test.indices, threads):
        guesses = np.full(truth.shape, mean), stream.enlarged(places, *truth.shape)
        for name, guess in zip(MEAN_DEPTHS, guesses):
            errors = errors_of(guess, truth, of_test, test, number)
            found[name].append(list(errors.values()))
    return {
        name: Outcome(("rmse",), *figures(np.array(rows, np.float32)), rules)
        for name, rows in found.items()
    }


class Shown:
    """The ``most`` images with the best and with the worst predictions, made small."""

    def __init__(self, most: int):
        self._most, self._count = most, 0
        self._best: list[tuple[float, int, depths.Predicted]] = []
        self._worst: list[tuple[float, int, depths.Predicted]] = []

    def offer(
        self, pixels: np.ndarray, truth: np.ndarray, predicted: np.ndarray, rmse: float
    ) -> None:
        """Keeps an image or not."""
        self._count += 1
        one: depths.Predicted | None = None
        for heap, order in ((self._best, -rmse), (self._worst, rmse)):
            if len(heap) < self._most or order > heap[0][0]:
                one = one or depths.small(pixels, truth, predicted, f"{rmse:.2f} m")
                push = heapq.heappush if len(heap) < self._most else heapq.heapreplace
                push(heap, (order, self._count, one))

    def draw(self, high: float, of: str) -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}; none on other processes than the first."""
        if jax.process_index() or not self._count:
            return {}
        among = f"of {self._count:,} images, by root mean square error"
        return {
            name: depths.sheet(
                [one for *_, one in sorted(heap, key=lambda x: -x[0])],
                high,
                f"{words} {among}; {of}",
            )
            for name, words, heap in (
                ("best", "The best", self._best),
                ("worst", "The worst", self._worst),
            )
        }
