"""An untrained network is judged by rows, over all devices of all processes."""

from unittest import mock

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
KNN = {"knn": {"kind": "knn", **DATA}}


def compute(folder, rows=KNN):
    """{fingerprint, rows: {row: metrics, items, baselines, data}}."""
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
    with mock.patch.object(features, "MOST_ROWS", 32):  # more chunks than processes
        suite = Suite(rows, folder / ".cache", batch=16, threads=2)
        outcomes = suite.run(model, folder)
    return {
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
