"""One process of several: CLIP's losses and their gradients over all devices, as one JSON line.

python -m tests.multihost.contrast_worker COORDINATOR PROCESSES PROCESS
"""

import json
import sys

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


def main(coordinator, processes, process):
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process)
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
                return contrast(*arguments, block=2).loss

            graded = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))
            value, gradients = graded(*arguments)
            gradients = [multihost_utils.process_allgather(g, tiled=True) for g in gradients]
            found[name] = [float(value), *(np.asarray(g).tolist() for g in gradients)]
    print("FOUND " + json.dumps({"devices": jax.device_count(), "found": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
