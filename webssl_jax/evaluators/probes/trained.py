"""Probes whose heads are trained by gradient steps, as the papers do it: what they share from
labelled shards to figures. Subclasses say which heads, on what, by which recipe.

DINOv2 picks the best of its heads on the validation set that it then reports. Here each head is
trained twice side by side, on the same features of the same batches: on all training images, and on
all but a held-out part of them, near-duplicates on one side. The copies choose, on the held-out
images; the figure of the head so named, trained on all of them, is ``top1``. What the published way
gives is printed beside it: ``top1_selected_on_test``.

Shape letters: n images, K heads of a grid.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data.views import RandomResizedCropView
from webssl_jax.evaluators import datasets, fit, work
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.batches import Batches, Cached, Images, calls_of
from webssl_jax.evaluators.datasets import Dataset, Subset
from webssl_jax.evaluators.features import Cache, Table
from webssl_jax.evaluators.fit import Fitted, Grid, Head, Recipe
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes import imagenet
from webssl_jax.evaluators.probes.heads import CrossEntropy, See
from webssl_jax.evaluators.probes.judging import (
    TOP,
    Judged,
    judge_images,
    judge_store,
    judge_tables,
    judging,
    mean_per_class,
)
from webssl_jax.evaluators.probes.labelled import LabelledOptions, LabelledPair, Problem, pick
from webssl_jax.evaluators.probes.splits import hold_out
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.networks import Networks

ON_TEST = "top1_selected_on_test"
CROP_SCALE = (0.08, 1.0)  # torchvision's default, of DINOv2, MAE and CAPI
ALL, KEPT = "all", "kept"  # weights of training images


@dataclasses.dataclass(frozen=True)
class TrainedOptions(LabelledOptions):
    """The keys of a row; see :class:`LabelledOptions`.

    iterations: updates; 0: as published. batch: images of each.
    augment: random crops and flips, whose features are made anew at each visit; False: the images
      as they are evaluated, whose features are made once and kept.
    held_out: the share of training images that choose the head.
    seed: of the order of images, the crops, the split and the first weights.
    real: a file of ReaL's labels; v2, sketch: labelled shards of ImageNet's other test sets; a, r:
      of those of 200 classes; c: ``SHARDS/{corruption}-{level}-*``, of corrupted images. See
      ``imagenet.py``.
    """

    iterations: int = 0
    batch: int = 1024
    augment: bool = True
    held_out: float = 0.1
    seed: int = 0
    real: str = ""
    v2: str = ""
    sketch: str = ""
    a: str = ""
    r: str = ""
    c: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0 or self.batch < 1:
            raise ValueError("iterations must not be negative, and batch at least 1")
        if not 0 < self.held_out <= 0.5:
            raise ValueError(f"held_out = {self.held_out} must be above 0 and at most 0.5")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must be in 0 ... 2^32 - 1")
        if self.c and not ("{corruption}" in self.c and "{level}" in self.c):
            raise ValueError(f"c = {self.c!r}: give SHARDS/{{corruption}}-{{level}}-*")


class Variant(NamedTuple):
    """What heads see, the head, and how many are computed at once (0: all)."""

    see: See
    head: Head
    at_once: int = 0


class Trial(NamedTuple):
    """Heads to be trained. variants: {name: variant}, in the order in which the first of equals
    wins. rates: learning rates as they are published, for a batch of 256."""

    variants: dict[str, Variant]
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    recipe: Recipe

    @property
    def parts(self) -> list[str]:
        """The arrays of features that heads see."""
        return sorted({part for variant in self.variants.values() for part in variant.see.parts})

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of the heads of a variant."""
        return [(rate, decay) for rate in self.rates for decay in self.decays]


def grids_of(trial: Trial, batch: int) -> dict[str, Grid]:
    """{variant-part: heads}, with rates scaled for the batch. They are trained on all images, and,
    where there is something to choose, on those that are kept too."""
    rates = tuple(rate * batch / 256 for rate in trial.rates)
    several = len(trial.variants) * len(trial.pairs) > 1
    return {
        f"{name}-{part}": Grid(
            *(variant.head, variant.see, CrossEntropy(part), rates, trial.decays, variant.at_once)
        )
        for name, variant in trial.variants.items()
        for part in ((ALL, KEPT) if several else (ALL,))
    }


class Chosen(NamedTuple):
    """A head: its variant, and its number in the grid."""

    variant: str
    number: int


class Found(NamedTuple):
    """Of a probe the outcome, its heads, those that were chosen by {metric: head}, and what the
    test images were taken for."""

    outcome: Outcome
    fitted: Fitted
    chosen: dict[str, Chosen]
    test: Judged


# How heads are judged on the held-out training images (True), or on the test images.
Judge = Callable[[Fitted, bool], Judged]


class TrainedProbe(abc.ABC):
    """Top-1 accuracy of heads trained on frozen features.

    name: of the kind. protocol: raised whenever the same features of the same images would get
    another figure.
    """

    Options: ClassVar[type] = TrainedOptions
    needs = frozenset({FEATURES})
    name: ClassVar[str]
    protocol: ClassVar[int]

    def __init__(self, options: Any):
        self._options, self._pair = options, LabelledPair(options)
        self._others = imagenet.Others.of(options)
        self.data = f"{self._pair.identity}-{self.protocol}{self._others.identity}"
        # features of images as they are, which rows share
        self.datasets = () if options.augment else self._pair.datasets

    @classmethod
    @abc.abstractmethod
    def want(cls, options: Any, networks: Networks) -> Want:
        """See ``base.Evaluation``."""

    @classmethod
    @abc.abstractmethod
    def trial(cls, options: Any, want: Want, classes: int, images: int) -> Trial:
        """The heads for features as wanted of so many training images."""

    @classmethod
    @abc.abstractmethod
    def plain_head(cls, classes: int) -> Head:
        """What vectors, such as trivial features, are judged with."""

    @abc.abstractmethod
    def meaning(self, problem: Problem) -> str:
        """What was done, in words; see ``Outcome.meaning``."""

    @classmethod
    def work(cls, options: Any, model: Model, size: work.Size) -> list[work.Program]:
        """What it has the devices do; see ``evaluators/work.py``. Trivial features are left out."""
        assert model.mesh is not None  # shapes have places
        want, shape = cls.want(options, model.networks), model.preprocess.shape
        trial = cls.trial(options, want, size.classes, size.images)
        grids = grids_of(trial, options.batch)
        name, calls, rows = "training images", 1, options.batch
        features: Any
        if not options.augment:
            seen, made = work.through(name, model, want, shape, size.images, size.batch)
            arrays = {part: jax.eval_shape(See((part,)), made) for part in trial.parts}
            tables = {part: ((rows, *x.shape[1:]), x.dtype) for part, x in arrays.items()}
            features = work.on_batch(model, tables)
        else:
            calls = calls_of(model.mesh, rows, size.batch)
            images, rows = trial.recipe.steps * rows, rows // calls
            seen, features = work.through(name, model, want, shape, images, rows)
        targets = {"label": jnp.int32, ALL: jnp.float32, KEPT: jnp.float32, "substituted": jnp.bool}
        each = {name: ((rows,), dtype) for name, dtype in targets.items()}
        update, fitted = work.updates(model, grids, trial.recipe, features, calls, each)
        held = len(grids) > len(trial.variants)  # they are judged besides
        if not options.augment:  # of held-out images features are there
            held = False
        tested = size.test_images + held * round(options.held_out * size.images)
        test, of_test = work.through("test images", model, want, shape, tested, size.batch)
        may = jax.ShapeDtypeStruct((size.classes,), bool, sharding=meshes.replicated(model.mesh))
        said = work.Program(
            *("judging", test.calls, judging(model.mesh), (fitted, of_test, may), model.params)
        )
        state = update.arguments[0]
        seen, test = (dataclasses.replace(x, beside=state) for x in (seen, test))
        return [seen, update, test, said]

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        of_train, of_test = self._pair.datasets
        assert model.mesh is not None  # features are made on it
        if self._options.batch % (shards := meshes.batch_shards(model.mesh)):
            raise UserError(f"batch = {self._options.batch}: does not divide over {shards} devices")
        if self._options.augment:
            random_crops(model)  # refused before hours of work
        problem = self._pair.pixel_problem(model.preprocess, cache)
        numbers = self._numbers(of_train, problem.train_rows, model, cache)
        valid = None
        if self._others.real:  # refused before hours of work, too
            test = self._numbers(of_test, problem.test_rows, model, cache)
            given = (of_test, test, problem.test_labels, problem.classes)
            valid = imagenet.read_real(self._others.real, *given)
        want = self.want(self._options, model.networks)
        trial = self.trial(self._options, want, problem.num_classes, len(problem.train_labels))
        rules = datasets.fingerprint(self.name, self.protocol, self._options)
        known = datasets.fingerprint(rules, problem.data)
        held = self._split(problem)[1]
        held_out = dataclasses.replace(
            of_train, indices=numbers[held], identity=f"{of_train.identity}-held-{known}"
        )

        def look(dataset: Dataset, fitted: Fitted, allowed: np.ndarray | None) -> Judged:
            classes = problem.classes
            if not self._options.augment:
                store = cache.pooled(model, dataset, want)
                assert model.mesh is not None
                parts = trial.parts
                return judge_store(model.mesh, store, dataset, fitted, parts, classes, allowed)
            return judge_images(model, cache, dataset, want, fitted, classes, known, allowed)

        def judge(fitted: Fitted, on_held_out: bool) -> Judged:
            if on_held_out and not self._options.augment:
                assert isinstance(data, Cached) and model.mesh is not None
                rows = {part: pick(x, held) for part, x in data.features.items()}
                labels = problem.train_labels[held]
                return judge_tables(model.mesh, fitted, rows, labels, problem.num_classes)
            return look(held_out if on_held_out else of_test, fitted, None)

        data = self._batches(model, cache, problem, numbers, want, trial)
        found = self._evaluate(problem, trial, data, cache.heads(model, known), judge)
        outcome = self._with_others(found, problem, valid, look)
        of_tables = functools.partial(self.of_tables, cache, model.mesh, trial)
        trivial = self._pair.trivial_outcomes(problem, cache, f"{self.name}-{rules}", of_tables)
        return dataclasses.replace(outcome, baselines=trivial, chance=problem.chance())

    def _numbers(
        self, dataset: Dataset, rows: np.ndarray, model: Model, cache: Cache
    ) -> np.ndarray:
        """(n,) int: the records that are these of the readable ones."""
        seen = self._pair.thumbnails(dataset, model.preprocess, cache).rows
        return np.array([seen[row].number for row in rows.tolist()], np.int64)

    def _with_others(
        self,
        found: Found,
        problem: Problem,
        valid: np.ndarray | None,
        look: Callable[[Dataset, Fitted, np.ndarray | None], Judged],
    ) -> Outcome:
        """The outcome with the figures of other test sets: those of the chosen heads, by name.
        valid: (n, C) bool, the right classes of the test images by ReaL."""
        chosen = {name: (f"{x.variant}-{ALL}", x.number) for name, x in found.chosen.items()}
        fitted = found.fitted.only(chosen)
        metrics, items = dict(found.outcome.metrics), dict(found.outcome.items)
        hits: dict[str, np.ndarray] = {}
        for name, dataset, few in self._others.sets:
            allowed = self._others.allowed(dataset, problem.classes) if few else None
            judged = look(dataset, fitted, allowed)
            hits |= {f"{name}_{metric}": judged.hits(metric)[:, 0] for metric in chosen}
        if valid is not None:
            some = valid.any(axis=1)
            for metric, (grid, number) in chosen.items():
                said = found.test.said[grid][:, number, 0]
                hits[f"real_{metric}"] = valid[np.arange(len(said)), said][some]
        for name, each in hits.items():
            if name.startswith("c/"):
                continue
            more, values = scored(name, each)
            metrics, items = metrics | more, items | values
        metrics |= imagenet.corruption_errors(hits)
        return dataclasses.replace(found.outcome, metrics=metrics, items=items)

    def _batches(
        self,
        model: Model,
        cache: Cache,
        problem: Problem,
        numbers: np.ndarray,
        want: Want,
        trial: Trial,
    ) -> Batches:
        """Of training images with the record ``numbers``."""
        o, (train, _), targets = self._options, self._pair.datasets, self._targets(problem)
        if not o.augment:
            store = cache.pooled(model, train, want)
            tables = {part: problem.train_rows_of(store.array(part)) for part in trial.parts}
            assert model.mesh is not None
            return Cached(tables, targets, model.mesh, o.batch, o.seed)
        view, source = random_crops(model), Subset(train.source, numbers)
        return Images(
            *(model, source, view, want, o.batch, o.seed, cache.batch, targets, cache.threads)
        )

    def of_tables(
        self,
        cache: Cache,
        mesh: Mesh,
        trial: Trial,
        problem: Problem,
        train: Mapping[str, Table],
        test: Mapping[str, Table],
    ) -> Outcome:
        """The outcome of features that are there already: {name: (rows, D)} of all readable
        records. Of ``trial`` the recipe and the grid count."""
        classes = problem.num_classes
        head = self.plain_head(classes)
        trial = trial._replace(variants={name: Variant(See((name,)), head) for name in train})
        of_train = {name: problem.train_rows_of(x) for name, x in train.items()}
        of_test = {name: problem.test_rows_of(x) for name, x in test.items()}
        held = self._split(problem)[1]

        def judge(fitted: Fitted, on_held_out: bool) -> Judged:
            if on_held_out:
                rows = {name: x[held] for name, x in of_train.items()}
                return judge_tables(mesh, fitted, rows, problem.train_labels[held], classes)
            return judge_tables(mesh, fitted, of_test, problem.test_labels, classes)

        targets = self._targets(problem)
        data = Cached(of_train, targets, mesh, self._options.batch, self._options.seed)
        known = datasets.fingerprint(self.name, self.protocol, self._options, sorted(train))
        folder = cache.folder / f"trivial-heads-{known}-{problem.data}"
        found = self._evaluate(problem, trial, data, folder, judge).outcome
        with distributed.error_barrier():
            if jax.process_index() == 0:
                shutil.rmtree(folder)
        return found

    def _split(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of training images (kept, held out)."""
        o = self._options
        return hold_out(problem.train_labels, problem.groups, o.held_out, o.seed)

    def _targets(self, problem: Problem) -> dict[str, np.ndarray]:
        n = len(problem.train_labels)
        kept = np.zeros(n, np.float32)
        kept[self._split(problem)[0]] = 1
        labels = problem.train_labels.astype(np.int32)
        return {"label": labels, ALL: np.ones(n, np.float32), KEPT: kept}

    def _evaluate(
        self, problem: Problem, trial: Trial, data: Batches, folder: pathlib.Path, judge: Judge
    ) -> Found:
        """Trains all heads, chooses, and looks at the test images once."""
        pairs = trial.pairs
        grids = grids_of(trial, self._options.batch)
        several = len(grids) > len(trial.variants)
        fitted = fit.fit(grids, data, trial.recipe, folder, self._options.seed)
        test = judge(fitted, False)
        hits = {name: test.hits(f"{name}-{ALL}") for name in trial.variants}
        on_test = {name: hit.mean(axis=0) for name, hit in hits.items()}
        chosen_by = on_test
        if several:
            held = judge(fitted, True)
            chosen_by = {name: held.hits(f"{name}-{KEPT}").mean(axis=0) for name in hits}
        chosen, published = best(chosen_by), best(on_test)
        top1, items = scored("top1", hits[chosen.variant][:, chosen.number])
        top5, more = scored("top5", test.hits(f"{chosen.variant}-{ALL}", TOP)[:, chosen.number])
        metrics, items = top1 | top5, items | more
        said = test.said[f"{chosen.variant}-{ALL}"][:, chosen.number, :1]
        metrics["top1_mean_per_class"] = mean_per_class(said, test.labels)
        heads = {"top1": chosen} | ({ON_TEST: published} if several else {})
        words = {metric: _words(head, pairs) for metric, head in heads.items()}
        if several:
            found, more = scored(ON_TEST, hits[published.variant][:, published.number])
            metrics, items = metrics | found, items | more
        for name, accuracy in on_test.items():
            # TensorBoard takes no + in a name
            own = int(chosen_by[name].argmax())
            metrics[f"{name.replace('+', '_and_')}_top1"] = float(accuracy[own])
        lost = sum(int(bad.sum()) for name, bad in fitted.diverged().items() if name.endswith(ALL))
        if lost:
            words["top1"] += f"; {lost} of {len(pairs) * len(hits)} heads diverged"
        data_name = f"{problem.data}-{self.name}-{self.protocol}"
        text = self.meaning(problem)
        outcome = Outcome(tuple(heads), metrics, items, data_name, text, words)
        return Found(outcome, fitted, heads, test)


def best(accuracies: Mapping[str, np.ndarray]) -> Chosen:
    """Of {variant: (K,) accuracies} the best head; of equals the first one."""
    variant = max(accuracies, key=lambda name: accuracies[name].max())
    return Chosen(variant, int(accuracies[variant].argmax()))


def random_crops(model: Model) -> RandomResizedCropView:
    """The augmentation of all three papers, at the size that a model is judged at.

    Raises:
      UserError: for a model whose images are no squares.
    """
    size = model.preprocess.size
    if isinstance(size, tuple):
        raise UserError(
            f"{model.origin.name}: takes images of {size[0]} x {size[1]} pixels, and random crops "
            "are squares; give augment=False"
        )
    return RandomResizedCropView(size, CROP_SCALE)


def _words(chosen: Chosen, pairs: Sequence[tuple[float, float]]) -> str:
    rate, decay = pairs[chosen.number]
    return f"{chosen.variant}, rate {rate:g}" + (f", decay {decay:g}" if decay else "")
