"""CLIP's losses and their gradients over all devices of all processes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from webssl_jax.methods.clip.contrastive import sigmoid_contrast, softmax_contrast
from webssl_jax.sharding import mesh as meshes

LOSSES = {
    "softmax": (softmax_contrast, (np.float32(8.0),)),
    "sigmoid": (sigmoid_contrast, (np.float32(8.0), np.float32(-2.0))),
}
PAIRS, WIDTH = 24, 8


def compute(folder=None):
    """{loss: [value, gradient of each argument]}."""
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, PAIRS, WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp")), meshes.replicated(mesh)
    sides = [
        jax.make_array_from_callback(side.shape, cut, lambda index, side=side: side[index])
        for side in features
    ]
    found = {}
    with jax.set_mesh(mesh):
        for name, (contrast, scalars) in LOSSES.items():
            arguments = (*sides, *(jax.device_put(jnp.asarray(x), whole) for x in scalars))

            def loss(*arguments, contrast=contrast):
                return contrast(*arguments, block=1).loss

            graded = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))
            value, gradients = graded(*arguments)
            gradients = [multihost_utils.process_allgather(g, tiled=True) for g in gradients]
            found[name] = [float(value), *(np.asarray(g).tolist() for g in gradients)]
    return {"devices": jax.device_count(), "found": found}
