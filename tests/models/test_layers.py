"""The parts with a backward pass of their own: what they compute, and how little they keep."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax.models.layers import gated, gelu

# (ours, the plain form, how many arrays of the input's size the backward pass keeps of each)
PARTS = {
    "gelu": (gelu, lambda x: nn.gelu(x, approximate=False), 1, 3),
    "gated": (gated, lambda gate, x: nn.silu(gate) * x, 2, 5),
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
