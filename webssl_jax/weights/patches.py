"""A patch embedding for patches of another size."""

from __future__ import annotations

import numpy as np

from webssl_jax.models.position import INTERPOLATIONS


def resample(kernel: np.ndarray, size: int) -> np.ndarray:
    """The kernel for patches of ``size`` pixels that gives, of patches resized to it, what
    ``kernel`` gives of the patches, as nearly as can be.

    That is the pseudo-inverse of the resize's transpose (FlexiViT, Beyer et al., arXiv 2212.08013,
    section 3.4). The resize is bicubic with antialiasing, as in timm.

    kernel: (p, p, colours, D). Returns (size, size, colours, D) float32.
    """
    resize = INTERPOLATIONS["antialias"].matrix(kernel.shape[0], size).astype(np.float64)
    inverse = np.linalg.pinv(resize.T)  # (size, p)
    made = np.einsum("ia,jb,abcd->ijcd", inverse, inverse, kernel.astype(np.float64))
    return made.astype(np.float32)
