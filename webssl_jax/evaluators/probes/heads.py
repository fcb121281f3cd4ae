"""The heads of published probes, what they see of frozen features, and the loss that trains them.

Shape letters: b images, N patches, D width of a feature, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from webssl_jax.config import UserError
from webssl_jax.evaluators.batches import Batch
from webssl_jax.evaluators.features import TOKENS
from webssl_jax.models.features import Features

HEAD_WIDTH = 64  # of an attention head of CAPI's probe


@dataclasses.dataclass(frozen=True)
class See:
    """Some arrays of the features of a batch, side by side. parts: their names: as ``Cache.pooled``
    has them: ``cls``, ``patches``, ``cls@BLOCK``; ``tokens`` (b, N, D) alone."""

    parts: tuple[str, ...]

    def __call__(self, features: Features | Mapping[str, jax.Array]) -> jax.Array:
        """(b, sum of D) float32, or (b, N, D)."""
        return jnp.concatenate([_part(features, name) for name in self.parts], axis=-1)


def _part(features: Features | Mapping[str, jax.Array], name: str) -> jax.Array:
    if not isinstance(features, Features):
        return features[name]
    kind, _, block = name.partition("@")
    cls, patches = features.blocks[int(block)] if block else (features.cls, features.patches)
    if kind == "cls":
        assert cls is not None  # it was wanted
        return cls
    assert patches is not None
    if kind == TOKENS:
        return patches.reshape(len(patches), -1, patches.shape[-1])
    return patches if patches.ndim == 2 else patches.mean(axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear layer. std: of its first weights."""

    classes: int
    std: float = 0.01

    def init(self, rng: jax.Array, features: jax.Array) -> tuple[Any, Any]:
        """See ``fit.Head``."""
        # torch's trunc_normal_, which MAE and CAPI take, cuts at 2: far out of these
        kernel = self.std * jax.random.normal(rng, (features.shape[-1], self.classes))
        return {"kernel": kernel, "bias": jnp.zeros(self.classes)}, {}

    def apply(self, params: Any, stats: Any, features: jax.Array, train: bool) -> tuple[Any, Any]:
        """Logits (b, C)."""
        return features @ params["kernel"] + params["bias"], stats


@dataclasses.dataclass(frozen=True)
class BatchNormLinear(Linear):
    """BatchNorm without affine before the layer (mae/main_linprobe.py): torch's, with biased
    variance in the batch and unbiased one in the running statistics."""

    eps: float = 1e-6
    momentum: float = 0.1

    def init(self, rng: jax.Array, features: jax.Array) -> tuple[Any, Any]:
        """See ``fit.Head``."""
        d = features.shape[-1]
        return super().init(rng, features)[0], {"mean": jnp.zeros(d), "var": jnp.ones(d)}

    def apply(self, params: Any, stats: Any, features: jax.Array, train: bool) -> tuple[Any, Any]:
        """Logits (b, C)."""
        mean, var = stats["mean"], stats["var"]
        if train:
            b = len(features)
            mean, var = features.mean(axis=0), features.var(axis=0)
            new = {"mean": mean, "var": var * (b / max(b - 1, 1))}
            stats = {
                name: (1 - self.momentum) * old + self.momentum * new[name]
                for name, old in stats.items()
            }
        normed = (features - mean) * jax.lax.rsqrt(var + self.eps)
        return normed @ params["kernel"] + params["bias"], stats


@dataclasses.dataclass(frozen=True)
class AttentionPool:
    """CAPI's attentive probe (Darcet et al. 2025, arXiv 2502.08769): a learned query attends to the
    patch tokens, D / 64 heads; one layer makes keys and values, one the logits. There is no
    projection of query or output, and no norm."""

    classes: int
    std: float = 0.02

    def init(self, rng: jax.Array, features: jax.Array) -> tuple[Any, Any]:
        """See ``fit.Head``.

        Raises:
          UserError: for a width that does not divide into heads.
        """
        d = features.shape[-1]
        if d % _pool_heads(d):
            raise UserError(f"attentive probe: a width of {d} is not a multiple of {HEAD_WIDTH}")
        shapes = {"query": (d,), "kv/kernel": (d, 2 * d), "kernel": (d, self.classes)}
        keys = jax.random.split(rng, len(shapes))
        drawn = {
            name: self.std * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        kv = {"kernel": drawn["kv/kernel"], "bias": jnp.zeros(2 * d)}
        bias = jnp.zeros(self.classes)
        return {"query": drawn["query"], "kv": kv, "kernel": drawn["kernel"], "bias": bias}, {}

    def apply(self, params: Any, stats: Any, features: jax.Array, train: bool) -> tuple[Any, Any]:
        """Logits (b, C) of tokens (b, N, D)."""
        b, _, d = features.shape
        kernel = params["kv"]["kernel"].reshape(d, 2, _pool_heads(d), -1)
        query = params["query"].reshape(_pool_heads(d), -1)
        # One query for all images, so no token needs a key or a value: q (W x) = (q W) x, the keys'
        # bias adds the same to all tokens, and the mean of values is the value of the mean.
        asked = jnp.einsum("dhk,hk->dh", kernel[:, 0], query) * query.shape[1] ** -0.5
        weights = jax.nn.softmax(jnp.einsum("bnd,dh->bhn", features, asked))
        mean = jnp.einsum("bhn,bnd->bhd", weights, features)
        values = jnp.einsum("bhd,dhk->bhk", mean, kernel[:, 1]).reshape(b, d)
        pooled = values + params["kv"]["bias"][d:]
        return pooled @ params["kernel"] + params["bias"], stats


def _pool_heads(width: int) -> int:
    return max(width // HEAD_WIDTH, 1)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Mean softmax cross-entropy to ``label`` (b,) int, of the images whose weight in the array
    ``weights`` (b,) of the batch is 1 (and not 0), without those whose place another record has
    taken."""

    weights: str

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        weights = batch[self.weights]
        if "substituted" in batch:
            weights = weights * ~batch["substituted"]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=-1)
        return -(log_p[:, 0] * weights).sum() / jnp.maximum(weights.sum(), 1)
