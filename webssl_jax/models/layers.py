"""The small parts of a ViT: patches, linear layers with the originals' initial values, MLPs,
LayerScale.

Initial values (``BlockConfig.init``):
  mae        xavier-uniform, the fused query-key-value matrix counted as one; biases 0; tokens
             normal 0.02.
  dinov2     normal 0.02 (its truncation at +-2 never bites); biases 0; CLS and registers
             normal 1e-6; mask token 0.
  clip       PyTorch's defaults: q, k, v as in ``mae``, kernels of the other layers and biases of
             the MLP uniform +-1/sqrt(inputs), biases of attention 0; CLS and positions
             normal 1/sqrt(D).
  clip_text  normal, of std 1/sqrt(D) for q, k, v, 1/sqrt(2 D) for fc1, 1/sqrt(2 D L) where a branch
             ends (out, fc2), L blocks; biases as in ``clip``.
  siglip     big_vision's: xavier-uniform, every matrix for itself; biases of the MLP normal 1e-6,
             others 0; positions and token embeddings normal 1/sqrt(D); the patch kernel normal
             1/sqrt(inputs), its bias 0.
The patch bias is otherwise PyTorch's default for a convolution, and but for ``mae`` the patch
kernel too.

Shape letters: B images, H x W pixels, h x w patches, p patch side, T tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from webssl_jax.models.sizes import LANES, BlockConfig, ViTConfig

Initializer = Callable[..., jax.Array]
Tokens = Any  # (B, T, D), or a tuple of such, one for each size of crop

BATCH_AXES = ("replica", "fsdp")  # of sharding/mesh.py


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """(B, H, W, C) -> (B, h * w, p * p * C): patches row-major, inside a patch pixels row-major,
    channels last."""
    b, height, width, c = images.shape
    p = patch_size
    patches = images.reshape(b, height // p, p, width // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(patches: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Inverse of :func:`patchify`: (B, h * w, p * p * C) with ``grid`` = (h, w) -> (B, H, W, C)."""
    (h, w), p = grid, patch_size
    pixels = patches.reshape(patches.shape[0], h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(patches.shape[0], h * p, w * p, -1)


def gather_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """``tokens[b, index[b, k]]``: (B, N, ...) and (B, K) -> (B, K, ...). Every index must lie in
    0..N - 1: jax would else look at all of the result once more, to fill in for those outside."""
    index = jnp.expand_dims(index, range(2, tokens.ndim))
    return jnp.take_along_axis(tokens, index, axis=1, mode="promise_in_bounds")


def uniform(limit: float) -> Initializer:
    """Uniform in [-limit, limit)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


def kernel_init(config: BlockConfig, fused: int = 1, name: str | None = None) -> Initializer:
    """For the (in, out) kernel of the layer ``name``, which the originals store as one of ``fused``
    equal parts of a larger matrix."""
    if config.init == "dinov2":
        return nn.initializers.normal(0.02)
    if config.init == "clip_text":
        variances = {"fc1": 2, "out": 2 * config.depth, "fc2": 2 * config.depth}
        return nn.initializers.normal((variances.get(name, 1) * config.width) ** -0.5)
    if config.init == "clip" and name not in ("q", "k", "v"):
        return lambda key, shape, dtype=jnp.float32: uniform(shape[0] ** -0.5)(key, shape, dtype)

    if config.init == "siglip":
        fused = 1

    def xavier(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return uniform(math.sqrt(6 / (shape[0] + fused * shape[1])))(key, shape, dtype)

    return xavier


def bias_init(config: BlockConfig, name: str | None) -> Initializer:
    """For the bias of the layer ``name``."""
    if config.init in ("clip", "clip_text"):
        if name in ("fc1", "w1", "w2"):
            return uniform(config.width**-0.5)
        if name in ("fc2", "w3"):
            return uniform(config.hidden**-0.5)
    if config.init == "siglip" and name in ("fc1", "fc2"):
        return nn.initializers.normal(1e-6)
    return nn.initializers.zeros


def token_init(config: ViTConfig) -> Initializer:
    """For CLS and register tokens."""
    stds = {"mae": 0.02, "clip": config.width**-0.5}
    return nn.initializers.normal(stds.get(config.init, 1e-6))


def position_init(config: ViTConfig) -> Initializer:
    """For a learned table of positions."""
    own = config.init in ("clip", "siglip")
    return nn.initializers.normal(config.width**-0.5 if own else 0.02)


class Linear(nn.Module):
    """A linear layer: float32 parameters, computed in ``config.dtype``.

    ``gain`` (features,) multiplies the output, channel by channel. It goes into the kernel and the
    bias instead, which is the same, costs nothing beside the product, and leaves the backward pass
    without need of the output: the gain's gradient follows from the kernel's.

    ``x`` may have more channels than the kernel's ``inputs``, and more than ``features`` may be
    wanted (``columns``): the kernel is filled up with zeros; see :func:`whole_lanes`.

    ``x`` may be several arrays, whose weights are then gathered and whose gradients are summed over
    the devices once.
    """

    config: BlockConfig
    features: int
    fused: int = 1
    use_bias: bool = True
    inputs: int | None = None
    columns: int | None = None

    @nn.compact
    def __call__(self, x: Tokens, gain: jax.Array | None = None) -> Tokens:
        """(..., inputs) -> (..., features)."""
        c = self.config
        init = kernel_init(c, self.fused, self.name)
        channels = jax.tree.leaves(x)[0].shape[-1]
        inputs, columns = self.inputs or channels, self.columns or self.features
        kernel = self.param("kernel", init, (inputs, self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", bias_init(c, self.name), (self.features,))
        if gain is not None:
            kernel = kernel * gain
            bias = None if bias is None else bias * gain
        kernel = _filled_up(kernel.astype(c.dtype), (channels, columns))
        y = jax.tree.map(lambda rows: jnp.matmul(rows.astype(c.dtype), kernel), x)
        if bias is None:
            return y
        bias = _filled_up(bias.astype(c.dtype), (columns,))
        return jax.tree.map(lambda rows: rows + bias, y)


def dense(
    config: BlockConfig, features: int, name: str | None, *, fused: int = 1, use_bias: bool = True
) -> Linear:
    """A linear layer of that name."""
    return Linear(config, features, fused, use_bias, name=name)


def _filled_up(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``x`` with zeros after it on every axis, up to ``shape``."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])


def whole_lanes(channels: int) -> int:
    """``channels`` rounded up to a multiple of a TPU's lanes, where that is little more.

    The TPU compiler sums a gradient of the 7B's (4096, 10928) over 16 chips by an all-reduce, of
    (4096, 11008) by a reduce-scatter, which sends half the bytes; the cycles are the same.
    """
    return -(-channels // LANES) * LANES if channels >= 4096 else channels


def projection(inputs: int, embedding: int, use_bias: bool = False) -> nn.Dense:
    """CLIP's way from ``inputs`` channels of a tower into the space of images and texts: a matrix,
    normal 1/sqrt(inputs). In float32 throughout: it costs nothing beside a tower, and the loss
    compares all pairs of what comes out."""
    return nn.Dense(
        embedding,
        use_bias=use_bias,
        dtype="float32",
        kernel_init=nn.initializers.normal(inputs**-0.5),
        name="projection",
    )


def layer_norm(config: BlockConfig, name: str | None, dtype: str | None = None) -> nn.LayerNorm:
    """Statistics in float32, in two passes: E[x^2] - E[x]^2 cancels where activations have large
    means."""
    return nn.LayerNorm(
        config.norm_eps, dtype=dtype or config.dtype, use_fast_variance=False, name=name
    )


def batch_cut() -> tuple[tuple[str, ...], int]:
    """The axes over which the mesh in force cuts a batch, and into how many parts; (), 1 where it
    cuts none or there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def on_batch(x: jax.Array) -> jax.Array:
    """Pins activations (B, ...) to be cut over images only, where a mesh is in force.

    The batch and one axis of every weight both lie on ``fsdp``. Left alone, the compiler may gather
    the activations of the whole batch instead of one layer's weights: for the 300m at batch 4096 on
    eight chips that took 19 GB a chip. A batch that does not divide (a few pictures) is left alone.
    """
    axes, ways = batch_cut()
    if not axes or x.shape[0] % ways:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def l2_normalise(x: jax.Array, eps: float) -> jax.Array:
    """x / max(|x|, eps) over the last axis, with a gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), eps * eps))


def save_as(name: str, x: Tokens) -> Tokens:
    """``x``, labelled for the ``named`` remat policy of ``blocks.py``, which keeps labelled
    arrays."""
    return jax.tree.map(lambda array: checkpoint_name(array, name), x)


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel = p, as one matrix product over patches that are already
    cut out.

    Cutting first lets MAE embed only the patches it keeps.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """(B, N, p * p * 3) from :func:`patchify` -> (B, N, D)."""
        c = self.config
        fan_in = c.patch_size**2 * 3
        torch_default = 1 / math.sqrt(fan_in)
        limit = math.sqrt(6 / (fan_in + c.width)) if c.init == "mae" else torch_default
        init = nn.initializers.lecun_normal() if c.init == "siglip" else uniform(limit)
        kernel = self.param("kernel", init, (c.patch_size, c.patch_size, 3, c.width))
        patches, kernel = nn.dtypes.promote_dtype(patches, kernel, dtype=c.dtype)
        embedded = patches @ kernel.reshape(fan_in, c.width)
        if not c.patch_bias:
            return embedded
        init = nn.initializers.zeros if c.init == "siglip" else uniform(torch_default)
        bias = self.param("bias", init, (c.width,))
        return embedded + bias.astype(c.dtype)


def _keeping_slope(value_and_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]]):
    """The activation of which ``value_and_slope`` gives both, in float32. The backward pass keeps
    one array, the slope, where autodiff would keep three."""

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = value_and_slope(x.astype(jnp.float32))
        return value.astype(x.dtype), slope.astype(x.dtype)

    @jax.custom_jvp
    @functools.wraps(value_and_slope)
    def activation(x: jax.Array) -> jax.Array:
        return both(x)[0]

    @activation.defjvp
    def _(primals, tangents):
        value, slope = both(*primals)
        return value, slope * tangents[0]

    return activation


@_keeping_slope
def gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x * Phi(x) with the exact normal distribution function Phi, evaluated in float32."""
    phi = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * phi, phi + x * density


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, x: jax.Array) -> jax.Array:
    """silu(gate) * x. The backward pass keeps the two and works the rest out again, where autodiff
    would keep three arrays more."""
    return nn.silu(gate) * x


@_keeping_slope
def quick_gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU, evaluated in float32."""
    gate = jax.nn.sigmoid(1.702 * x)
    return x * gate, gate + 1.702 * x * gate * (1 - gate)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's tanh form (SigLIP), evaluated in float32. The backward pass keeps ``x`` alone."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or with SwiGLU w3(silu(x w1) * (x w2)). What the first layers put
    out bears the name ``mlp``. ``gain`` as of :class:`Linear`, of the output."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Tokens, gain: jax.Array | None = None) -> Tokens:
        c = self.config
        if c.mlp == "swiglu":
            columns = whole_lanes(c.hidden)  # those beyond are 0 throughout

            def opening(name: str) -> Tokens:
                return save_as("mlp", Linear(c, c.hidden, 2, columns=columns, name=name)(x))

            hidden = jax.tree.map(gated, opening("w1"), opening("w2"))
            return Linear(c, c.width, inputs=c.hidden, name="w3")(hidden, gain)
        hidden = save_as("mlp", dense(c, c.hidden, "fc1")(x))
        activation = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}.get(c.mlp, gelu)
        return dense(c, c.width, "fc2")(jax.tree.map(activation, hidden), gain)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239); the last layer of
    the branch multiplies it in (:class:`Linear`)."""

    config: BlockConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """(D,)."""
        return self.param(
            "gamma", nn.initializers.constant(self.config.layer_scale), (self.config.width,)
        )
