"""Every process saves its part of a state on its own disk, and restores it. All count as one slice,
which is what replicas are told apart by."""

from unittest import mock

import jax
import numpy as np

from tests.test_checkpoints import make
from webssl_jax.checkpoints.local import LocalCheckpoints
from webssl_jax.sharding import replicas


def compute(folder):
    """What this process wrote, and whether it came back."""
    with mock.patch.object(replicas, "_domain", lambda device: 0):
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
    return {"names": names, "written": written, "state": size, "same": all(same)}
