"""Evaluation tied to a run's workdir: what ``train.py`` does by cadence and ``evaluate.py``
afterwards.

Writes ``eval/STEP.json`` (``results.py``) and, with labelled training images,
``eval/baselines.json`` (trivial features, once); both with every test image's hit or miss, so that
any two steps can be compared image by image.
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
from webssl_jax.evaluators.report import report
from webssl_jax.evaluators.results import Result, read_result
from webssl_jax.evaluators.retrieval import RetrievalEvaluation, read_pairs
from webssl_jax.evaluators.towers import has_texts, tokenize, tower_functions
from webssl_jax.evaluators.zero_shot import (
    ZeroShotEvaluation,
    prompts,
    read_class_names,
    read_templates,
)
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

    def bind(variables: Variables):
        def features(images: np.ndarray, layers=(), inside=False) -> Features:
            array = meshes.from_whole(images, mesh)
            return compute(variables, array, tuple(layers), inside)

        return features

    return bind


def check_texts(entry: ConfigDict, method: Method) -> None:
    """Refuses evaluations with texts of a method without, before anything is made.

    Args:
      entry: ``config.eval``.

    Raises:
      ConfigError: if ``method`` has no text tower.
    """
    for key in ("zero_shot", "retrieval"):
        if entry[key] and not has_texts(method):
            raise ConfigError(
                f"config.eval.{key} = {entry[key]}: {type(method).__name__} has no text tower; "
                "leave it empty"
            )


def check_text_files(entry: ConfigDict) -> None:
    """Reads the files that ``config.eval`` names besides shards, so that a bad one is found before
    a checkpoint is read.

    Raises:
      UserError: if a file cannot be used.
    """
    if entry.zero_shot:
        read_templates(entry.zero_shot)
    if entry.class_names:
        read_class_names(entry.class_names)


class RunEvaluation:
    """What ``entry`` asks for: k-NN and linear probe of a run's features on labelled shards; of a
    method with texts also zero-shot classification of the test images, and retrieval.

    Args:
      entry: ``config.eval``. A network with fewer blocks than ``last_blocks`` gives all it has.
      workdir: gets the ``eval`` folder; written by process 0 only.

    Raises:
      ConfigError, UserError: if no figure can come from these shards and files, or the batch does
        not divide over the mesh.
    """

    def __init__(
        self, entry: ConfigDict, method: Method, mesh: Mesh, workdir: str, threads: int = 16
    ):
        check_texts(entry, method)
        ways = meshes.batch_shards(mesh)
        if entry.batch % ways:
            raise ConfigError(
                f"config.eval.batch = {entry.batch}: does not divide over {ways} batch shards"
            )
        self._frozen = self._zero_shot = self._retrieval = None
        if entry.train or entry.zero_shot:
            self._read_labelled(entry, method, threads)
        if entry.retrieval:
            source, limit = ArrayRecordSource(entry.retrieval), entry.retrieval_images or None
            pairs = read_pairs(source, method.eval_view(), limit, threads)
            self._retrieval = RetrievalEvaluation(pairs, tokenize(method, pairs.texts))
        self._bind = feature_function(method, mesh)
        if has_texts(method):
            self._bind_towers = tower_functions(method, mesh, entry.batch)
        self._folder = pathlib.Path(workdir) / "eval"
        self._writes = jax.process_index() == 0

    def _read_labelled(self, entry: ConfigDict, method: Method, threads: int) -> None:
        templates = read_templates(entry.zero_shot) if entry.zero_shot else ()
        given = read_class_names(entry.class_names) if entry.class_names else None
        view, limit = method.eval_view(), entry.max_images or None
        train, classes = None, given and given.labels
        if entry.train:
            found = pipeline.read_labelled(
                ArrayRecordSource(entry.train), view, limit, threads=threads
            )
            classes = tuple(found.class_names)
            train = Dataset(found.images, found.labels, classes)
        found = pipeline.read_labelled(
            ArrayRecordSource(entry.test), view, limit, threads=threads, class_names=classes
        )
        test = Dataset(found.images, found.labels, tuple(found.class_names))
        if train:
            blocks = min(entry.last_blocks, method.encoder.depth)
            self._frozen = FrozenFeatureEvaluation(
                train, test, entry.batch, layers=range(-blocks, 0)
            )
        if templates:
            names = given.of(test.class_names) if given else test.class_names
            tokens = tokenize(method, prompts(names, templates))
            self._zero_shot = ZeroShotEvaluation(test, names, templates, tokens)

    @classmethod
    def from_config(
        cls, config: ConfigDict, method: Method, mesh: Mesh, workdir: str
    ) -> RunEvaluation | None:
        """What a run's config asks for; None if that is nothing."""
        entry = config.eval
        if not (entry.train or entry.zero_shot or entry.retrieval):
            return None
        return cls(entry, method, mesh, workdir, config.data.threads)

    def run(self, variables: Variables, step: int) -> Result:
        """Measures, and keeps the result in the workdir. All processes call it; if the first cannot
        write, it raises on all of them."""
        frozen = zero_shot = retrieval = None
        if self._frozen:
            frozen = self._frozen.measure(self._bind(variables), step)
        if self._zero_shot:
            zero_shot = self._zero_shot.measure(self._bind_towers(variables))
        if self._retrieval:
            retrieval = self._retrieval.measure(self._bind_towers(variables))
        result, rows = Result(step, frozen, zero_shot, retrieval), self._baselines()
        with distributed.error_barrier():
            if self._writes:
                self._folder.mkdir(parents=True, exist_ok=True)
                if rows:
                    stored = {name: row.to_json() for name, row in rows.items()}
                    write_json(self._folder / "baselines.json", stored)
                write_json(self._folder / f"{step:08d}.json", result.to_json())
        return result

    def baselines(self) -> dict[str, dict[str, float]]:
        """{name: metrics} of trivial features and of chance, for the curves."""
        rows = {name: row.metrics() for name, row in self._baselines().items()}
        with_texts = [part for part in (self._zero_shot, self._retrieval) if part]
        chance = {name: x for part in with_texts for name, x in part.chance.items()}
        return rows | ({"chance": chance} if chance else {})

    def _baselines(self) -> dict[str, Measurement]:
        if not self._frozen:
            return {}
        path = self._folder / "baselines.json"
        return self._frozen.baselines(json.loads(path.read_text()) if path.exists() else None)

    def report(self, result: Result) -> str:
        """The tables of trivial features, step 0 and ``result``, with what each figure means."""
        first = self._folder / f"{0:08d}.json"
        step0 = read_result(first) if first.exists() and result.step else None
        return report(result, self._baselines(), step0)
