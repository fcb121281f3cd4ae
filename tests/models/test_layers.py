"""The parts with a backward pass of their own: what they compute, and how little they keep."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from webssl_jax.models.attention import Attention
from webssl_jax.models.layers import AXES, Mlp, cpu_matmul, gelu, keep_order, pad_to_lanes, swiglu
from webssl_jax.models.sizes import BlockConfig
from webssl_jax.params import flatten

# (ours, the plain form, how many arrays of the input's size the backward pass keeps of each)
PARTS = {
    "gelu": (gelu, lambda x: nn.gelu(x, approximate=False), 1, 3),
    "swiglu": (swiglu, lambda gate, x: nn.silu(gate) * x, 2, 5),
}
each = pytest.mark.parametrize("part", PARTS)


def inputs(function, dtype):
    rng = np.random.default_rng(0)
    names = inspect.signature(function).parameters
    return [jnp.asarray(3 * rng.standard_normal((40, 5)), dtype) for _ in names]


@each
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.02)])
def test_value_and_gradients_are_those_of_the_plain_form(part, dtype, tolerance):
    ours, plain, _, _ = PARTS[part]
    arguments = inputs(plain, dtype)
    value, pull = jax.vjp(jax.jit(ours), *arguments)
    exact, exact_pull = jax.vjp(plain, *(x.astype(jnp.float32) for x in arguments))
    assert value.dtype == dtype
    found, wanted = (value, *pull(value)), (exact, *exact_pull(value.astype(jnp.float32)))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * np.abs(b).max())


@each
def test_the_backward_pass_keeps_fewer_arrays_than_autodiff_would(part):
    ours, plain, kept, kept_by_autodiff = PARTS[part]
    arguments = inputs(plain, "float32")

    def arrays(function):
        residuals = jax.tree.leaves(jax.vjp(jax.jit(function), *arguments)[1])
        return sum(x.shape == arguments[0].shape for x in residuals)

    assert (arrays(ours), arrays(plain)) == (kept, kept_by_autodiff)


def test_an_mlp_of_odd_width_is_the_plain_formula_and_keeps_its_shapes():
    """Inside it is wider, for the TPU's lanes; nothing of that shows."""
    config = BlockConfig(width=8, depth=1, heads=1, mlp="swiglu", mlp_hidden=4100, init="clip")
    assert pad_to_lanes(4100) == 4224 and pad_to_lanes(4095) == 4095 and pad_to_lanes(4096) == 4096
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 8)), jnp.float32)
    params = Mlp(config).init(jax.random.key(0), x)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes == {
        "w1/kernel": (8, 4100),
        "w1/bias": (4100,),
        "w2/kernel": (8, 4100),
        "w2/bias": (4100,),
        "w3/kernel": (4100, 8),
        "w3/bias": (8,),
    }

    def plain(params, x):
        w1, w2, w3 = (params[name] for name in ("w1", "w2", "w3"))
        gate, value = (x @ w["kernel"] + w["bias"] for w in (w1, w2))
        return nn.silu(gate) * value @ w3["kernel"] + w3["bias"]

    def ours(params, x):
        return Mlp(config).apply({"params": params}, x)

    value, pull = jax.vjp(ours, params, x)
    wanted, wanted_pull = jax.vjp(plain, params, x)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    for path, leaf in flatten(pull(value)[0]).items():
        other = flatten(wanted_pull(value)[0])[path]
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_the_product_of_cpus_has_the_gradients_of_autodiff():
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 7, 5), (5, 3), (2, 7, 3))
    )
    ours, plain = jax.vjp(cpu_matmul, x, kernel), jax.vjp(jnp.matmul, x, kernel)
    np.testing.assert_array_equal(ours[0], plain[0])
    for got, wanted in zip(ours[1](dy), plain[1](dy), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform, chosen", [("cpu", True), ("tpu", False), (None, False)])
def test_only_programs_for_cpus_have_their_products(platform, chosen):
    layer = Attention(BlockConfig(width=4, depth=1, heads=1, remat="none"))
    device = platform and jax.sharding.AbstractDevice("its name", None, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        x = jnp.ones((1, 2, 4))
        program = str(jax.make_jaxpr(lambda: layer.init_with_output(jax.random.key(0), x))())
    assert [name in program for name in ("cpu_matmul", "cpu_attention")] == [chosen, chosen]


def test_gradients_of_two_layers_are_right_where_all_axes_of_the_mesh_are_used():
    """And without ``keep_order`` still wrong: when that fails, jax has mended it, and
    ``keep_order`` can go."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES)
    on_mesh = functools.partial(jax.sharding.NamedSharding, mesh)
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(shape, np.float32) for shape in ((32, 16), (16, 16))]
    images = rng.standard_normal((16, 32), np.float32)

    def loss(kernels, images, before):
        for kernel in kernels:
            images = jnp.tanh(before(images) @ kernel)
        return (images**3).mean()

    def worst(before):
        """The largest difference of the sharded program's gradients from the whole ones."""
        whole = jax.grad(loss)(kernels, images, lambda x: x)
        cut = [on_mesh(PartitionSpec("fsdp", "tensor"))] * 2
        program = jax.jit(jax.grad(loss), static_argnums=2, out_shardings=cut)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            batch = jax.device_put(images, on_mesh(PartitionSpec(AXES[:2])))
            found = program(jax.device_put(kernels, cut), batch, before)
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, whole))

    assert worst(keep_order) < 1e-5
    assert worst(lambda x: x) > 0.1
