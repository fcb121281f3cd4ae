"""A patch embedding for patches of another size."""

from __future__ import annotations

import numpy as np

from webssl_jax.models.position import INTERPOLATIONS


def matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float64: what to multiply both sides of a kernel for patches of ``old`` pixels
    with, to get the one for patches of ``new`` pixels that gives, of patches resized to it, what
    the kernel gives of the patches, as nearly as can be.

    That is the pseudo-inverse of the resize's transpose (FlexiViT, Beyer et al., arXiv 2212.08013,
    section 3.4). The resize is bicubic with antialiasing, as in timm.
    """
    return np.linalg.pinv(INTERPOLATIONS["antialias"].matrix(old, new).astype(np.float64).T)


def resample(kernel: np.ndarray, size: int) -> np.ndarray:
    """The kernel for patches of ``size`` pixels; see :func:`matrix`.

    kernel: (p, p, colours, D). Returns (size, size, colours, D) float32.
    """
    inverse = matrix(kernel.shape[0], size)
    made = np.einsum("ia,jb,abcd->ijcd", inverse, inverse, kernel.astype(np.float64))
    return made.astype(np.float32)
