"""Frozen features of a set of images, as float32 numpy arrays on the host, and their whitening."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.evaluators.base import FeatureFunction

# Of the mean eigenvalue. Directions that carry less are noise and are not blown up.
SHRINKAGE = 0.01


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
      UserError: if a feature is not finite.
      ValueError: if there are no images, or ``feature_fn`` does not return the blocks asked for.
    """
    if not len(images):
        raise ValueError("no images to extract features from")
    layers = tuple(layers)
    chunks = [_pooled(feature_fn, part, n, layers) for part, n in in_batches(images, batch)]
    pooled = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    odd = [name for name, x in pooled.items() if not np.isfinite(x).all()]
    if odd:
        raise UserError(
            f"evaluation: NaN or infinity in the features ({', '.join(odd)}); the network has "
            "diverged, or its number format is too small for it"
        )
    return pooled


def in_batches(rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """``rows`` in parts of exactly ``batch``, so that one compilation serves, each with the number
    of its rows that count: the last part is filled with copies of its last row."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        missing = batch - len(part)
        yield np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]), len(part)


def _pooled(
    feature_fn: FeatureFunction, images: np.ndarray, n: int, layers: tuple[int, ...]
) -> dict[str, np.ndarray]:
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


def whiten(x: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets after PCA whitening by the statistics of ``x``: (n, r) and (m, r), r = min(n, d).

    (x - mean) B / sqrt(v + ``SHRINKAGE`` mean(v)), with B, v the eigenbasis of the covariance. A
    few directions carry most of the variance of masked-autoencoder features, and cosine similarity
    sees little else; whitening is retrieval's usual answer (Jegou & Chum, "Negative evidences and
    co-occurrences in image retrieval: the benefit of PCA and whitening", ECCV 2012).

    Args:
      x: (n, d), queries: (m, d), float32.
    """
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x, queries = x - mean, queries - mean
    basis, values = eigenbasis(x)
    # Where all rows are equal there is nothing to whiten, and nothing to divide by.
    floor = SHRINKAGE * values.sum() / max(len(values), 1)
    scale = 1 / np.sqrt(np.maximum(values + floor, 1e-12))
    return x @ basis * scale, queries @ basis * scale


def eigenbasis(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis (d, r) of the span of the rows of ``x`` (n, d) and the eigenvalues (r,) of
    x'x/n, r = min(n, d) or less, both float32. The smaller of the two Gram matrices decides the
    cost."""
    n, d = x.shape
    if d <= n:
        values, basis = np.linalg.eigh((x.T @ x).astype(np.float64) / n)
        return basis.astype(np.float32), np.maximum(values, 0).astype(np.float32)
    values, left = np.linalg.eigh((x @ x.T).astype(np.float64) / n)
    keep = values > values[-1] * 1e-7
    values, left = values[keep], left[:, keep]
    return (x.T @ (left / np.sqrt(n * values))).astype(np.float32), values.astype(np.float32)
