"""The Pallas kernels' arithmetic, run without a TPU; tests/tpu/test_kernel_costs.py compiles
them for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from webssl_jax.models import attention, attention_kernel
from webssl_jax.models.attention import dot_product_attention, kernel_attention
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.sizes import BlockConfig

# Two heads a kernel, one, four, and one of two registers' width; one token more than whole tiles,
# fewer than one, whole ones.
SHAPES = [(257, 4, 64, False), (50, 2, 128, False), (77, 2, 64, True), (128, 4, 32, False)]
SHAPES += [(7, 1, 256, True)]


def inputs(tokens, heads, channels, dtype, images=2):
    keys = jax.random.split(jax.random.key(0), 4)
    size = 3 / channels**0.25  # scores of about the same spread, whatever the channels
    shape = (images, tokens, heads * channels)
    return [size * jax.random.normal(key, shape).astype(dtype) for key in keys]


def formula(q, k, v, heads, causal):
    q, k, v = (x.astype("float32").reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    out = dot_product_attention(q, k, v, causal)
    return out.reshape(*out.shape[:2], -1)


def largest_error(ours, theirs):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# float32 as exact as sums in another order are; bfloat16 rounds weights and products to 8 bits
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("tokens, heads, channels, causal", SHAPES)
def test_output_and_gradients_are_those_of_the_formula(
    tokens, heads, channels, causal, dtype, tolerance
):
    q, k, v, d_out = inputs(tokens, heads, channels, dtype)
    theirs, vjp = jax.vjp(functools.partial(formula, heads=heads, causal=causal), q, k, v)
    ours = attention_kernel.forward(q, k, v, heads, causal, interpret=True)
    assert largest_error(ours, theirs) < tolerance
    gradients = attention_kernel.backward(q, k, v, d_out, heads, causal, interpret=True)
    for ours, theirs in zip(gradients, vjp(d_out.astype("float32")), strict=True):
        assert largest_error(ours, theirs) < tolerance


def test_without_a_tpu_the_same_is_worked_out_by_xla():
    q, k, v, d_out = inputs(10, 4, 64, "float32")
    theirs, their_vjp = jax.vjp(functools.partial(formula, heads=4, causal=False), q, k, v)
    ours, vjp = jax.vjp(lambda *x: kernel_attention(*x, 4), q, k, v)
    assert largest_error(ours, theirs) < 3e-6
    for ours, theirs in zip(vjp(d_out), their_vjp(d_out)):
        assert largest_error(ours, theirs) < 3e-6


def config(**fields):
    return BlockConfig(width=256, depth=2, heads=4, **fields)


def gradients(config):
    """Of two blocks, to parameters and tokens, under the mesh that is in force."""
    stack, slots = block_stack(config, train=True), jnp.zeros(2, int)
    x = jax.random.normal(jax.random.key(1), (8, 5, config.width))
    params = stack.init(jax.random.key(0), (x, None), slots)["params"]

    @jax.jit
    @jax.grad
    def gradient(arrays):
        params, x = arrays
        (y, _), _ = stack.apply({"params": params}, (x, None), slots)
        return jnp.sin(y).sum()

    return gradient((params, x))


@pytest.mark.parametrize("remat", ["none", "named"])
def test_blocks_cut_over_images_and_heads_have_the_same_gradients(remat, monkeypatch):
    # the kernels themselves, and not what stands in for them without a TPU
    for name in ("forward", "backward"):
        run = functools.partial(getattr(attention_kernel, name), interpret=True)
        monkeypatch.setattr(attention_kernel, name, run)
    taken = lambda *arrays, tpu, default: tpu(*arrays)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", taken)
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        ours = gradients(config(remat=remat, attention="pallas"))
        theirs = gradients(config(remat=remat))
    scale = max(np.abs(plain).max() for plain in jax.tree.leaves(theirs))
    for mine, plain in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # against the largest of all: that of the keys' bias is 0 but for rounding
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("tokens, heads, images", [(769, 4, 8), (5, 2, 8), (5, 4, 3)])
def test_what_the_kernels_do_not_take_is_left_to_xla(tokens, heads, images):
    """More tokens than they hold; one head of 64 a device, which fills no lanes; three images."""
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    made = BlockConfig(width=64 * heads, depth=1, heads=heads, attention="pallas")
    with jax.set_mesh(mesh):
        assert attention._sharded_kernel(made, images, tokens) is None
        assert attention._sharded_kernel(config(attention="pallas"), 8, 768) is not None


def test_heads_that_fill_no_lanes_are_refused_in_one_line():
    with pytest.raises(ValueError, match="heads that fill 128 channels together, not 3 of 64"):
        BlockConfig(width=192, depth=1, heads=3, attention="pallas")


def test_arrays_are_cut_by_image_and_head():
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    x = jnp.ones((8, 5, 256))
    with jax.set_mesh(mesh):
        mix = attention._sharded_kernel(config(attention="pallas"), *x.shape[:2])
        (made,) = jax.jit(lambda x: [mix(x, x, x)])(x)
    assert made.sharding.spec == PartitionSpec(("replica", "fsdp"), None, "tensor")
