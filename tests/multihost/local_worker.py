"""One process of several, that all count as one slice: saves a state on its own disk, and restores
it. What it wrote and whether it came back, as one JSON line.

python -m tests.multihost.local_worker COORDINATOR PROCESSES PROCESS FOLDER
"""

import json
import sys

import jax
import numpy as np

from tests.test_checkpoints import make
from webssl_jax.checkpoints.local import LocalCheckpoints
from webssl_jax.sharding import replicas


def main(coordinator, processes, process, folder):
    jax.distributed.initialize(coordinator, processes, process)
    replicas._domain = lambda device: 0
    state, template = make((jax.device_count(), 1, 1))
    local = LocalCheckpoints(folder, "run", template)
    local.save(state, after=-1)
    local.wait()
    with np.load(local.directory / "0.npz") as file:
        names = [name for name in file.files if name != "meta"]
        written = sum(file[name].nbytes for name in names)
    restored = local.restore_newest(newer_than=-1)
    same = [
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state._asdict()), strict=True)
    ]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    found = {"names": names, "written": written, "state": size, "same": all(same)}
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
