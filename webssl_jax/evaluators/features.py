"""Frozen features of a set of images, as float32 numpy arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from webssl_jax.evaluators.base import FeatureFunction


def extract(
    feature_fn: FeatureFunction, images: np.ndarray, batch: int, layers: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Runs ``feature_fn`` over all images and pools what it returns.

    Every call gets exactly ``batch`` images, so one compilation serves: the last batch is filled
    with copies of its last image, which are cut off again.

    Args:
      feature_fn: ``features(images, layers=layers) -> Features``; see ``methods/base.py``. On many
        hosts it returns arrays that each process can read (fully replicated).
      images: (n, H, W, 3) uint8.
      batch: images a call.
      layers: block numbers, in the order of depth, handed on to ``feature_fn``.

    Returns:
      ``cls`` (n, D) and ``patches`` (n, D), the CLS token and the mean over patch tokens of the
      last block; and for each requested block ``cls@<block>`` and ``patches@<block>``, both (n, D).

    Raises:
      ValueError: if there are no images, or ``feature_fn`` does not return the blocks asked for.
    """
    if not len(images):
        raise ValueError("no images to extract features from")
    layers = tuple(layers)
    chunks = [
        _one_batch(feature_fn, images[i : i + batch], batch, layers)
        for i in range(0, len(images), batch)
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _one_batch(
    feature_fn, images: np.ndarray, batch: int, layers: tuple[int, ...]
) -> dict[str, np.ndarray]:
    n = len(images)
    if n < batch:
        images = np.concatenate([images, np.repeat(images[-1:], batch - n, axis=0)])
    features = feature_fn(images, layers=layers)
    tokens = {"": (features.cls, features.patches)}
    missing = [layer for layer in layers if layer not in features.layers]
    if missing:
        raise ValueError(
            f"the feature function returned blocks {sorted(features.layers)}, not {missing}"
        )
    tokens |= {f"@{layer}": features.layers[layer] for layer in layers}
    pooled = {}
    for suffix, (cls, patches) in tokens.items():
        pooled["cls" + suffix] = np.asarray(cls, np.float32)[:n]
        pooled["patches" + suffix] = np.asarray(patches, np.float32)[:n].mean(axis=(1, 2))
    return pooled
