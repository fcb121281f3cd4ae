"""Whole trainings in this process, of the real recipes made small: loader, schedules, step."""

import functools
import io
from typing import Any, NamedTuple

import jax
import numpy as np

from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax.data import records
from webssl_jax.data.decode import decode_image
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict


class Records(list):
    """Encoded records in memory, as a source."""

    def describe(self, index):
        return f"record {index}"


@functools.cache
def few_images(count, side=48):
    """So many pictures of the embedded corpus, spread over all of it, no two with a caption in
    common: small, because decoding would cost more than the network."""
    source, seen, chosen = ArrayRecordSource("corpus:train"), set(), Records()
    for index in range(0, len(source), len(source) // (4 * count)):
        record = records.decode(source[index])
        if seen.isdisjoint(record.captions) and record.captions and len(chosen) < count:
            seen.update(record.captions)
            file = io.BytesIO()
            decode_image(record.image).resize((side, side)).save(file, "PNG")
            small = records.Record(
                file.getvalue(), record.captions, record.key, side, side, "small", record.label
            )
            chosen.append(records.encode(small))
    assert len(chosen) == count
    return chosen


class Run(NamedTuple):
    """metrics: {name: (steps,)}. first, last: variables before and after."""

    method: Any
    metrics: dict[str, np.ndarray]
    first: Any
    last: Any


def train(spec, overrides, source, seeds):
    """{seed: a whole run of a config on one device}."""
    config = configs.load(spec, overrides)
    method = methods.create(config)
    mesh = meshes.create(config.sharding, jax.devices()[:1])
    optimizer = Optimizer.from_config(config.optim, method.tables())
    step = make_train_step(method, optimizer, Guard(), run_schedules(config, method), mesh)
    template = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    step = jit_train_step(step, template, mesh)  # compiled for the first seed alone
    return {seed: _run(config, method, optimizer, step, mesh, source, seed) for seed in seeds}


def _run(config, method, optimizer, step, mesh, source, seed):
    state = train_state.create(method, optimizer, seed, config.global_batch, mesh)
    first, rows = jax.device_get(state.variables), []
    names = method.batch_spec(config.global_batch)
    with TrainLoader(
        source, method.train_view(), global_batch=config.global_batch, seed=seed, threads=2
    ) as loader:
        for _ in range(configs.total_steps(config)):
            batch = next(loader)
            placed = meshes.to_global({name: batch[name] for name in names}, mesh)
            state, metrics, _ = step(state, placed, verdict(0, mesh))
            rows.append(metrics)
    metrics = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return Run(method, metrics, first, jax.device_get(state.variables))
