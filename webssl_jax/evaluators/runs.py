"""Evaluation tied to a run's workdir: what ``train.py`` does by cadence and ``evaluate.py``
afterwards.

Writes ``eval/baselines.json`` (trivial features, once) and ``eval/STEP.json`` (each with every test
image's hit or miss, so that any two steps can be compared image by image).
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax.config import ConfigError
from webssl_jax.data import pipeline
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators.base import Dataset
from webssl_jax.evaluators.frozen import FrozenFeatureEvaluation, Measurement
from webssl_jax.evaluators.report import report_table
from webssl_jax.files import write_json
from webssl_jax.methods.base import Features, Method, Variables
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes

log = logging.getLogger(__name__)


def feature_function(method: Method, mesh: Mesh) -> Callable[[Variables], Callable[..., Features]]:
    """``bind(variables) -> features(images (B, H, W, 3) uint8, layers=(), inside=False)``, compiled
    once for all steps.

    Every process passes the same images; B must divide over the mesh. The results are whole on
    every process.
    """

    @functools.partial(jax.jit, static_argnums=(2, 3), out_shardings=meshes.replicated(mesh))
    def compute(
        variables: Variables, images: jax.Array, layers: tuple[int, ...], inside: bool
    ) -> Features:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            return method.features(variables, images, layers, inside)

    sharding = meshes.batch_sharding(mesh)

    def bind(variables: Variables):
        def features(images: np.ndarray, layers=(), inside=False) -> Features:
            array = jax.make_array_from_callback(
                images.shape, sharding, lambda index: images[index]
            )
            return compute(variables, array, tuple(layers), inside)

        return features

    return bind


class RunEvaluation:
    """k-NN and linear probe of a run's features on labelled shards.

    Args:
      entry: ``config.eval`` (train, test, batch, max_images, last_blocks). A network with fewer
        blocks than ``last_blocks`` gives all it has.
      workdir: gets the ``eval`` folder; written by process 0 only.

    Raises:
      ConfigError, UserError: if no figure can come from these shards, or the batch does not divide
        over the mesh.
    """

    def __init__(
        self, entry: ConfigDict, method: Method, mesh: Mesh, workdir: str, threads: int = 16
    ):
        ways = int(np.prod([mesh.shape[axis] for axis in meshes.BATCH_AXES]))
        if entry.batch % ways:
            raise ConfigError(
                f"config.eval.batch = {entry.batch}: does not divide over {ways} batch shards"
            )
        view, limit = method.eval_view(), entry.max_images or None
        images, labels, names = pipeline.read_labelled(
            ArrayRecordSource(entry.train), view, limit, threads=threads
        )
        train = Dataset(images, labels, tuple(names))
        images, labels, names = pipeline.read_labelled(
            ArrayRecordSource(entry.test), view, limit, threads=threads, class_names=names
        )
        blocks = min(entry.last_blocks, method.encoder.depth)
        self._evaluation = FrozenFeatureEvaluation(
            train, Dataset(images, labels, tuple(names)), entry.batch, layers=range(-blocks, 0)
        )
        self._bind = feature_function(method, mesh)
        self._folder = pathlib.Path(workdir) / "eval"
        self._writes = jax.process_index() == 0

    def run(self, variables: Variables, step: int) -> Measurement:
        """Measures, and keeps the result in the workdir. All processes call it; if the first cannot
        write, it raises on all of them."""
        rows = self._baselines()
        result = self._evaluation.measure(self._bind(variables), step)
        with distributed.together():
            if self._writes:
                self._folder.mkdir(parents=True, exist_ok=True)
                stored = {name: row.to_json() for name, row in rows.items()}
                write_json(self._folder / "baselines.json", stored)
                write_json(self._folder / f"{step:08d}.json", result.to_json())
        return result

    def baselines(self) -> dict[str, dict[str, float]]:
        """{name: metrics} of the trivial features, for the curves."""
        return {name: row.metrics() for name, row in self._baselines().items()}

    def _baselines(self) -> dict[str, Measurement]:
        path = self._folder / "baselines.json"
        return self._evaluation.baselines(json.loads(path.read_text()) if path.exists() else None)

    def report(self, result: Measurement) -> str:
        """The table of trivial features, step 0 and ``result``, with what each figure means."""
        first = self._folder / f"{0:08d}.json"
        step0 = (
            Measurement.from_json(json.loads(first.read_text()))
            if first.exists() and result.step
            else None
        )
        return report_table(result, self._baselines(), step0)
