"""Labelled problems made of numbers, for the classifiers."""

import numpy as np

from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators.probes.labelled import Problem


def problem_of(train_labels, test_labels, classes, groups=None):
    """All rows labelled; no look-alikes unless ``groups`` says so."""
    n, m = len(train_labels), len(test_labels)
    return Problem(
        tuple(f"class {i}" for i in range(classes)),
        np.arange(n),
        np.asarray(train_labels),
        np.arange(m),
        np.asarray(test_labels),
        np.arange(n) if groups is None else groups,
        "data",
        Preprocess(16, 16),
    )


def blobs(n, classes, d, spread, seed=0):
    """(features (n, d), labels (n,)): a cloud for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = rng.normal(size=(classes, d))
    return (centres[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels
