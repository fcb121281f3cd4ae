"""k-NN and linear probe of frozen features, beside trivial features of the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from webssl_jax.evaluators import baselines as trivial
from webssl_jax.evaluators.base import Dataset, FeatureFunction, Score, check, fingerprint
from webssl_jax.evaluators.features import extract
from webssl_jax.evaluators.knn import knn
from webssl_jax.evaluators.linear import probe, variants
from webssl_jax.evaluators.splits import look_alikes

# Raised whenever the same features of the same images would get another figure, so that stored
# figures of an older rule are measured anew (baselines) or not paired with new ones (step 0).
PROTOCOL = 2


class Measurement(NamedTuple):
    """One row of the report: both scores of one kind of feature on one pair of image sets.

    step: training steps behind it, None for trivial features. data: fingerprint of the images and
    labels, and the protocol; only measurements with the same are compared item by item.
    """

    step: int | None
    data: str
    train_images: int
    classes: int
    knn: Score
    linear: Score

    @property
    def test_images(self) -> int:
        return len(self.knn.correct)

    def metrics(self) -> dict[str, float]:
        """``eval/knn/top1``, ``eval/linear/top1``, each with ``_se``, and every variant's own
        figure."""
        out = {}
        for name, score in (("knn", self.knn), ("linear", self.linear)):
            out[f"eval/{name}/top1"] = score.top1
            out[f"eval/{name}/top1_se"] = score.se
            for variant, value in score.by_variant.items():
                # TensorBoard takes neither @ nor + in a name.
                out[f"eval/{name}/{variant.replace('@', '_k').replace('+', '_and_')}"] = value
        return out

    def to_json(self) -> dict:
        """Plain JSON types, with what a later paired comparison needs."""
        return self._asdict() | {"knn": self.knn.to_json(), "linear": self.linear.to_json()}

    @classmethod
    def from_json(cls, row: dict) -> Measurement:
        """Inverse of :meth:`to_json`; what else is in ``row`` is passed over."""
        own = {name: row[name] for name in cls._fields}
        scores = {name: Score.from_json(row[name]) for name in ("knn", "linear")}
        return cls(**own | scores)


class FrozenFeatureEvaluation:
    """Serves the training run by cadence and ``evaluate.py``: the same images, the same figures.

    Args:
      train, test: labelled images, resized as for evaluation, without augmentation.
      batch: images a call of the feature function.
      layers: 0-based numbers of the last blocks (four, in DINOv2's probe), in order of depth; empty
        for the last block's output alone.
      seed: of the split that chooses the probe's head.

    Raises:
      UserError: if no figure can come from these images (a split is empty, classes differ).
    """

    name = "frozen"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        batch: int = 256,
        layers: Sequence[int] = (),
        seed: int = 0,
    ):
        check(train, test)
        self.train, self.test = train, test
        self.batch, self.layers, self.seed = batch, tuple(layers), seed
        self.data = f"{fingerprint(train, test)}-{PROTOCOL}"
        self._groups = look_alikes(train.images, train.labels)
        self._baselines: dict[str, Measurement] = {}

    def run(self, features: FeatureFunction, step: int) -> Iterator[tuple[str, float]]:
        """The protocol of ``base.Evaluator``: the metrics of :meth:`measure` one by one."""
        yield from self.measure(features, step).metrics().items()

    def measure(self, features: FeatureFunction, step: int) -> Measurement:
        """Extracts features of both sets and scores them."""
        train, test = (
            extract(features, data.images, self.batch, self.layers)
            for data in (self.train, self.test)
        )
        heads = variants(train, self.layers), variants(test, self.layers)
        # What is joined from CLS and patches has no common scale, which cosines would need.
        neighbours = tuple({k: v for k, v in x.items() if "+" not in k} for x in heads)
        return self._score(step, neighbours, heads)

    def baselines(self, stored: Mapping[str, dict] | None = None) -> dict[str, Measurement]:
        """{"majority class", "raw pixels", "colour histogram": Measurement}, computed once.

        Args:
          stored: ``{name: measurement.to_json()}`` of an earlier run; used when it is of the same
            images.
        """
        if self._baselines:
            return self._baselines
        if stored and all(row["data"] == self.data for row in stored.values()):
            self._baselines = {name: Measurement.from_json(row) for name, row in stored.items()}
            return self._baselines
        hits = trivial.majority(self.train.labels, self.test.labels)
        common = self.train.class_names[int(np.bincount(self.train.labels).argmax())]
        guess = Score(hits, f"always {common!r}", {})
        rows = {"majority class": self._row(None, guess, guess)}
        train, test = (trivial.trivial_features(data.images) for data in (self.train, self.test))
        for name in train:
            one = {name: train[name]}, {name: test[name]}
            rows[name] = self._score(None, one, one)
        self._baselines = rows
        return rows

    def _score(self, step, neighbours: tuple[dict, dict], heads: tuple[dict, dict]) -> Measurement:
        y, y_test, classes = self.train.labels, self.test.labels, len(self.train.class_names)
        return self._row(
            step,
            knn(neighbours[0], y, neighbours[1], y_test, classes, self._groups),
            probe(heads[0], y, heads[1], y_test, classes, self._groups, self.seed),
        )

    def _row(self, step, nearest: Score, linear: Score) -> Measurement:
        return Measurement(
            step, self.data, len(self.train.labels), len(self.train.class_names), nearest, linear
        )
