"""The small parts of a ViT: patches, linear layers, norms, MLPs, LayerScale.

Initial values are those of the network's scheme (``init_schemes.py``).

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
from einops import rearrange
from jax import ad_checkpoint
from jax.sharding import PartitionSpec

from webssl_jax.models.sizes import LANES, BlockConfig, ViTConfig

# (B, T, D), or a tuple of such, one for each size of crop. Any, as jax.tree.map takes both alike.
Tokens = Any

BATCH_AXES = ("replica", "fsdp")  # of sharding/mesh.py
AXES = (*BATCH_AXES, "tensor")


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """(B, H, W, C) -> (B, h * w, p * p * C): patches row-major, inside a patch pixels row-major,
    channels last."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Inverse of :func:`patchify`: (B, h * w, p * p * C) with ``grid`` = (h, w) -> (B, H, W, C)."""
    h, w = grid
    return rearrange(
        patches, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=patch_size, q=patch_size
    )


def gather_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """``tokens[b, index[b, k]]``: (B, N, ...) and (B, K) -> (B, K, ...). Every index must lie in
    0..N - 1: for indices outside, jax would need a second pass over the result to fill them in."""
    index = jnp.expand_dims(index, range(2, tokens.ndim))
    return jnp.take_along_axis(tokens, index, axis=1, mode="promise_in_bounds")


class Linear(nn.Module):
    """A linear layer: float32 parameters, computed in ``config.dtype``.

    fused: the original stores the kernel as one of that many equal parts of a larger matrix.
    inputs: rows of the kernel, where ``x`` was padded with zeros to more channels.
    padded_features: pad the output with zeros to that many channels; see :func:`pad_to_lanes`.
    """

    config: BlockConfig
    features: int
    fused: int = 1
    use_bias: bool = True
    inputs: int | None = None
    padded_features: int | None = None

    @nn.compact
    def __call__(self, x: Tokens, layer_scale: jax.Array | None = None) -> Tokens:
        """(..., inputs) -> (..., features).

        ``x`` may be several arrays: weights are then gathered over the devices, and their gradients
        summed, once for all.

        layer_scale: (features,), multiplies the output by channel. Kernel and bias are multiplied
        instead, which is the same and costs almost nothing. Its gradient follows from the kernel's,
        so the backward pass does not need the output.
        """
        c, init = self.config, self.config.init_scheme
        channels = jax.tree.leaves(x)[0].shape[-1]
        inputs, columns = self.inputs or channels, self.padded_features or self.features
        kernel = self.param("kernel", init.kernel(self.name, self.fused), (inputs, self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", init.bias(self.name, inputs), (self.features,))
        if layer_scale is not None:
            kernel = kernel * layer_scale
            bias = None if bias is None else bias * layer_scale
        kernel = _zero_pad(kernel.astype(c.dtype), (channels, columns))
        product = cpu_matmul if on_cpu() else jnp.matmul
        y = jax.tree.map(lambda rows: product(rows.astype(c.dtype), kernel), x)
        if bias is None:
            return y
        bias = _zero_pad(bias.astype(c.dtype), (columns,))
        return jax.tree.map(lambda rows: rows + bias, y)


def platform() -> str | None:
    """The platform of the current mesh, for which a train step is traced; None without a mesh. The
    one place that asks: what is chosen by it leaves programs for other devices as they are."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def on_cpu() -> bool:
    """Whether the current mesh is of CPUs."""
    return platform() == "cpu"


@jax.custom_vjp
def cpu_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel`` of (..., K) and (K, N), with the kernel's gradient as x^T dy.

    Autodiff asks for (dy^T x)^T, for which XLA copies dy on CPUs and takes a slower product. Two
    MLPs of 512 and 2048 channels in a scan take 0.53 CPU seconds for forward and backward with it,
    and 0.43 this way."""
    return jnp.matmul(x, kernel)


def _cpu_matmul_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(x, kernel), (x, kernel)


def _cpu_matmul_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.matmul(dy, kernel.T), jnp.matmul(rows.T, d_rows)


cpu_matmul.defvjp(_cpu_matmul_forward, _cpu_matmul_backward)


def dense(
    config: BlockConfig, features: int, name: str | None, *, fused: int = 1, use_bias: bool = True
) -> Linear:
    """A linear layer of that name."""
    return Linear(config, features, fused, use_bias, name=name)


def _zero_pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``x`` with zeros after it on every axis, up to ``shape``."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])


def pad_to_lanes(channels: int) -> int:
    """``channels`` rounded up to a multiple of a TPU's 128 lanes, where that adds little.

    The TPU compiler sums a gradient of the 7B's (4096, 10928) over 16 chips by an all-reduce, of
    (4096, 11008) by a reduce-scatter, which sends half the bytes; the cycles are the same.
    """
    return -(-channels // LANES) * LANES if channels >= 4096 else channels


def projection(inputs: int, embedding: int, use_bias: bool = False) -> nn.Dense:
    """CLIP's linear projection from ``inputs`` channels of a tower into the embedding space that
    images and texts share; the kernel begins as normal 1/sqrt(inputs). Computed in float32: it is
    cheap beside a tower, and the loss compares all pairs of its outputs."""
    return nn.Dense(
        embedding,
        use_bias=use_bias,
        dtype="float32",
        kernel_init=nn.initializers.normal(inputs**-0.5),
        name="projection",
    )


def layer_norm(config: BlockConfig, name: str | None, dtype: str | None = None) -> nn.Module:
    """The norm of ``config``, with statistics in float32. LayerNorm takes two passes: E[x^2] -
    E[x]^2 loses all digits where activations have large means."""
    if config.norm == "rms":
        return nn.RMSNorm(config.norm_eps, dtype=dtype or config.dtype, name=name)
    return nn.LayerNorm(
        config.norm_eps, dtype=dtype or config.dtype, use_fast_variance=False, name=name
    )


def batch_shards() -> tuple[tuple[str, ...], int]:
    """The axes over which the current mesh shards a batch, and into how many shards; (), 1 where it
    does not, or where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def tensor_shards() -> int:
    """Into how many shards the current mesh cuts heads and hidden channels; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def on_batch(x: jax.Array) -> jax.Array:
    """Constrains activations (B, ...) to be sharded over the batch only, under a mesh.

    The batch and one axis of every weight are both sharded over ``fsdp``. Without the constraint
    the compiler may gather the activations of the whole batch instead of one layer's weights: for
    the 300m at batch 4096 on eight chips that took 19 GB a chip. A batch that the shards do not
    divide (a few pictures) is left as it is.
    """
    axes, shards = batch_shards()
    if not axes or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def on_channels(x: jax.Array) -> jax.Array:
    """Constrains what was looked up in a table (B, T, D) to be cut as the table is, by channels
    over ``fsdp``, and over ``replica`` by the batch.

    The table's gradient is then summed where its parts lie. Without the constraint each device has
    the gradient of the whole table, and all of them are summed by all: of Llama 3, 2 GB a device.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    replicas, ways = sizes.get("replica", 1), sizes.get("fsdp", 1)
    if ways == 1 or sizes.get("tensor", 1) > 1 or x.shape[0] % replicas or x.shape[-1] % ways:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("replica", None, "fsdp"))


def keep_order(x: jax.Array) -> jax.Array:
    """:func:`on_batch` where replica, fsdp and tensor of the mesh are all above 1, else nothing.

    There XLA's partitioner mixes up the images of two devices in the gradients of what lies below a
    linear layer whose kernel is cut by fsdp and tensor, unless the layout of the layer's input is
    said; the loss is right. Seen with jax 0.10.2 on CPU devices; a program for TPUs showed no sign
    of it. So it stands before every linear layer outside the blocks, which have ``on_batch`` at
    both ends.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return on_batch(x) if all(mesh.shape.get(axis, 1) > 1 for axis in AXES) else x


def l2_normalise(x: jax.Array, eps: float) -> jax.Array:
    """x / max(|x|, eps) over the last axis, with a gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), eps * eps))


def checkpoint_name(x: Tokens, name: str) -> Tokens:
    """jax's ``checkpoint_name`` for one or several arrays: names them for the ``named`` remat
    policy of ``blocks.py``, which saves named arrays."""
    return jax.tree.map(lambda array: ad_checkpoint.checkpoint_name(array, name), x)


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel size = p, as one matrix product over patches from
    :func:`patchify`. So MAE embeds only the patches that it keeps."""

    config: ViTConfig

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """(B, N, p * p * 3) -> (B, N, D)."""
        c, init = self.config, self.config.init_scheme
        p, inputs = c.patch_size, c.patch_size**2 * 3
        kernel = self.param("kernel", init.patch_kernel(inputs), (p, p, 3, c.width))
        patches, kernel = nn.dtypes.promote_dtype(patches, kernel, dtype=c.dtype)
        embedded = patches @ rearrange(kernel, "p q c d -> (p q c) d")
        if not c.patch_bias:
            return embedded
        bias = self.param("bias", init.patch_bias(inputs), (c.width,))
        return embedded + bias.astype(c.dtype)


_ValueAndDerivative = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _saving_derivative(function: _ValueAndDerivative) -> Callable[[jax.Array], jax.Array]:
    """The activation of which ``function`` gives value and derivative, in float32. The backward
    pass saves one array, the derivative, where autodiff would save three."""

    def in_float32(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, derivative = function(x.astype(jnp.float32))
        return value.astype(x.dtype), derivative.astype(x.dtype)

    @jax.custom_jvp
    @functools.wraps(function)
    def activation(x: jax.Array) -> jax.Array:
        return in_float32(x)[0]

    @activation.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, derivative = in_float32(*primals)
        return value, derivative * tangents[0]

    return activation


@_saving_derivative
def gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x * Phi(x) with the exact normal distribution function Phi, evaluated in float32."""
    phi = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * phi, phi + x * density


@_saving_derivative
def quick_gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU, evaluated in float32."""
    gate = jax.nn.sigmoid(1.702 * x)
    return x * gate, gate + 1.702 * x * gate * (1 - gate)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's tanh form (SigLIP), evaluated in float32. The backward pass saves ``x`` alone."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: jax.Array, x: jax.Array) -> jax.Array:
    """silu(gate) * x (Shazeer, arXiv 2002.05202). The backward pass saves the two inputs and
    recomputes the rest, where autodiff would save three arrays more."""
    return nn.silu(gate) * x


_ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or with SwiGLU w3(silu(x w1) * (x w2)). The outputs of the first
    layers are named ``mlp`` for remat."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Tokens, layer_scale: jax.Array | None = None) -> Tokens:
        """(B, T, D) -> (B, T, D). layer_scale: as in :class:`Linear`, of the output."""
        c = self.config
        if c.mlp == "swiglu":
            padded = pad_to_lanes(c.hidden)  # the added channels are 0 throughout

            def first_layer(name: str) -> Tokens:
                layer = Linear(c, c.hidden, fused=2, padded_features=padded, name=name)
                return checkpoint_name(layer(x), "mlp")

            hidden = jax.tree.map(swiglu, first_layer("w1"), first_layer("w2"))
            return Linear(c, c.width, inputs=c.hidden, name="w3")(hidden, layer_scale)
        hidden = checkpoint_name(dense(c, c.hidden, "fc1")(x), "mlp")
        return dense(c, c.width, "fc2")(jax.tree.map(_ACTIVATIONS[c.mlp], hidden), layer_scale)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239). The last layer of
    the branch multiplies by it (:class:`Linear`)."""

    width: int
    initial: float

    @nn.compact
    def __call__(self) -> jax.Array:
        """(D,) float32."""
        return self.param("gamma", nn.initializers.constant(self.initial), (self.width,))
