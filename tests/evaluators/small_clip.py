"""A CLIP of few numbers, and a mesh of all devices, for the evaluators with texts."""

import functools

import jax
from jax.sharding import AxisType
from ml_collections import ConfigDict

from webssl_jax import methods
from webssl_jax.sharding import mesh as meshes

MESH = jax.make_mesh((1, 8, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
BATCH = 8


@functools.cache
def small_clip():
    """(method, variables)."""
    method = methods.create(
        ConfigDict(
            {
                "model": {"size": "micro"},
                "method": {"name": "clip", "text": {"depth": 1}, "view": {"image_size": 16}},
            }
        )
    )
    return method, jax.jit(lambda: method.init(jax.random.key(0), method.batch_spec(1)))()
