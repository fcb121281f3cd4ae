import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax.models.attention import cpu_attention, dot_product_attention, recompute_attention
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.sizes import BlockConfig


# single heads, groups of two and of four, and three heads that do not pair
@pytest.mark.parametrize(
    "form, heads, channels",
    [(recompute_attention, *size) for size in [(3, 4), (4, 64), (4, 32), (3, 64)]]
    + [(cpu_attention, 3, 4)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_our_own_backward_passes_have_the_gradients_of_the_formula(causal, form, heads, channels):
    keys = jax.random.split(jax.random.key(0), 4)
    size = 6 / channels**0.5  # scores of about the same spread, whatever the channels
    q, k, v, d_out = (size * jax.random.normal(key, (2, 7, heads, channels)) for key in keys)
    plain, plain_vjp = jax.vjp(lambda *x: dot_product_attention(*x, causal), q, k, v)
    ours, ours_vjp = jax.vjp(lambda *x: form(*x, causal), q, k, v)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    for our, their in zip(ours_vjp(d_out), plain_vjp(d_out)):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-5)


def products(jaxpr) -> int:
    """Matrix products in a jaxpr and in all inside it; a scan's body once."""
    inner = [value for equation in jaxpr.eqns for value in equation.params.values()]
    inner = [getattr(value, "jaxpr", value) for value in inner]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(products(value) for value in inner if hasattr(value, "eqns"))


# attention computes the scores again even where nothing else is
@pytest.mark.parametrize("remat, again", [("named", 1), ("full", 9)])
def test_named_runs_no_matrix_product_again_but_that_of_the_scores(remat, again):
    config = BlockConfig(
        width=16, depth=2, heads=2, mlp="swiglu", layer_scale=0.1, dtype="bfloat16", remat=remat
    )
    stack, x, slots = block_stack(config, train=True), jnp.ones((2, 5, 16)), jnp.zeros(2, int)
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), (x, None), slots)["params"])

    def loss(params, x):
        return stack.apply({"params": params}, (x, None), slots)[0][0].sum()

    count = products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x).jaxpr)
    forward = 7 + 2  # linear layers; scores and mixing
    assert count == forward + 2 * forward + again
