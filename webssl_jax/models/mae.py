"""Masked autoencoding as two networks compute it (He et al., arXiv 2111.06377): hide patches,
encode the rest, decode all. Training, drawing and comparing with other code call the same function.

Shape letters: B images, h x w = N patches, K visible patches, p patch side, P = p * p * 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from webssl_jax.models.decoder import MAEDecoder
from webssl_jax.models.layers import patchify
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs


class RandomMask(NamedTuple):
    """keep (B, K) int32: visible patches. restore (B, N) int32: place of each patch in the shuffled
    order, so that ``restore < K`` are the visible ones. mask (B, N) float32: 1 where hidden."""

    keep: jax.Array
    restore: jax.Array
    mask: jax.Array


class Reconstruction(NamedTuple):
    """prediction (B, N, P) of the decoder, the true ``patches`` (B, N, P), and ``mask`` (B, N), 1
    where hidden."""

    prediction: jax.Array
    patches: jax.Array
    mask: jax.Array


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """int(N * (1 - ratio)), as in MAE.

    Raises:
      ValueError: if that leaves nothing to see or nothing to predict.
    """
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(
            f"mask_ratio = {mask_ratio} keeps {kept} of {num_patches} patches; some must stay, "
            "some go"
        )
    return kept


def random_mask(noise: jax.Array, kept: int) -> RandomMask:
    """MAE's per-image shuffle (section 3): the ``kept`` patches with the least noise stay visible,
    in the order of their noise. noise: (B, N) float32 in [0, 1)."""
    shuffled = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(shuffled, axis=1)
    return RandomMask(shuffled[:, :kept], restore, (restore >= kept).astype(jnp.float32))


def reconstruct(
    encoder: ViTConfig,
    decoder: ViTConfig,
    params: dict[str, Any],
    images: jax.Array,
    noise: jax.Array,
    mask_ratio: float,
    drop_path_rng: jax.Array | None = None,
) -> Reconstruction:
    """Hides, encodes and decodes normalised images (B, H, W, 3).

    Args:
      params: {"encoder", "decoder"}.
      noise: (B, N) float32 in [0, 1), whose smallest entries mark the visible patches.
      drop_path_rng: draws stochastic depth, in training; None for none.
    """
    grid = encoder.grid_of(*images.shape[1:3])
    chosen = random_mask(noise, visible_count(grid[0] * grid[1], mask_ratio))
    seen = ViT(encoder).apply(
        {"params": params["encoder"]},
        images,
        keep=chosen.keep,
        train=drop_path_rng is not None,
        rngs={} if drop_path_rng is None else train_rngs(encoder, drop_path_rng),
    )
    assert isinstance(seen, ViTOutput)  # of images of one size
    prediction = MAEDecoder(decoder).apply(
        {"params": params["decoder"]}, seen.cls, seen.patches, chosen.restore, grid
    )
    assert isinstance(prediction, jax.Array)  # no state was asked for
    return Reconstruction(prediction, patchify(images, encoder.patch_size), chosen.mask)
