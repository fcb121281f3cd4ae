"""Checkpoints of a run: saved, checked, restored.

checkpointer.py    durable ones, by orbax: in the workdir, another folder or a bucket
local.py           frequent ones, on each machine's own disk
saver.py           both kinds, as the training loop uses them
errors.py          what a storage can fail with, as errors of ours
"""

from webssl_jax.checkpoints.checkpointer import Checkpointer, checksums, directory
from webssl_jax.checkpoints.errors import CheckpointError, DamagedCheckpoint, StorageError

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamagedCheckpoint",
    "StorageError",
    "checksums",
    "directory",
]
