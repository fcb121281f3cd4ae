"""One process of several: evaluates an untrained network by rows, and prints what it found as one
JSON line.

python -m tests.multihost.feature_worker COORDINATOR PROCESSES PROCESS FOLDER ROW[,ROW]
"""

import json
import pathlib
import sys

import jax
from ml_collections import ConfigDict

from webssl_jax import train_state
from webssl_jax.evaluators import features
from webssl_jax.evaluators.suite import Suite
from webssl_jax.methods.mae.method import MAE, View
from webssl_jax.model import Model
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes

DATA = {"train": "corpus:train", "test": "corpus:test", "max_images": 200}
ROWS = {"knn": {"kind": "knn", **DATA}, "probe": {"kind": "logistic", "last_blocks": 1, **DATA}}


def main(coordinator, processes, process, folder, names):
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process)
    features.MOST_ROWS = 32  # so that there are more chunks than processes
    encoder = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=32, position="sincos")
    decoder = ViTConfig(width=32, depth=1, heads=2, patch_size=8, image_size=32, position="sincos")
    method = MAE(encoder, decoder, view=View(image_size=32))
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
    optim = ConfigDict(
        dict(lr=1e-3, lr_batch=8, lr_scaling="none", final_lr=0.0, warmup_steps=0)
        | dict(warmup_ends_at_peak=False, weight_decay=0.0, final_weight_decay=None, b1=0.9)
        | dict(b2=0.95, eps=1e-8, moment_dtype="float32", clip="none", clip_norm=1.0)
        | dict(lr_multipliers=(), frozen=(), abort_after_skipped=1)
    )
    optimizer = Optimizer.from_config(optim, method.tables())
    state = train_state.create(method, optimizer, 0, 8, mesh)
    model = Model.of(method, state.variables)
    rows = {name: ROWS[name] for name in names.split(",")}
    outcomes = Suite(rows, pathlib.Path(folder) / ".cache", batch=16, threads=2).run(
        model, pathlib.Path(folder)
    )
    found = {
        "fingerprint": model.fingerprint,
        "rows": {
            row: {
                "metrics": one.metrics,
                "items": {name: x.tolist() for name, x in one.items.items()},
                "baselines": {name: b.metrics for name, b in one.baselines.items()},
                "data": one.data,
            }
            for row, one in outcomes.items()
        },
    }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
