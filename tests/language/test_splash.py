"""Attention of decoders by jax's Splash kernels, run without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax.language import splash
from webssl_jax.language.sizes import decoder
from webssl_jax.sharding import mesh as meshes

SMALL = dict(width=256, heads=4, kv_heads=2, attention="pallas")
CONFIG = decoder("llama-3-8b", **SMALL)
TOKENS = 256


AXES = ConfigDict({"replica": 1, "fsdp": 2, "tensor": 2})


def on_mesh(run, *arguments):
    mesh = meshes.create(AXES, jax.devices()[:4])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run(*arguments)


def test_it_is_the_attention_of_real_tokens_with_its_gradients_on_four_devices(monkeypatch):
    """Padding before, within and after a text; two blocks of tokens, two heads a pair of keys and
    values."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(2, TOKENS, heads, 64)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    real = np.ones((2, TOKENS), bool)
    real[0, :5] = real[0, 90:110] = real[1, 200:] = False
    attend = on_mesh(splash.on_each_device, CONFIG, 2, TOKENS, True)

    def formula(q, k, v, real):
        allowed = real[:, None] & np.tri(TOKENS, dtype=bool)
        return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None])

    def both(attend, *where):
        def loss(q, k, v):
            out = jnp.where(real[..., None, None], attend(q, k, v, real), 0)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*jax.device_put((q, k, v), *where))

    cut = meshes.batch_sharding(meshes.create(AXES, jax.devices()[:4]))
    found, wanted = on_mesh(both, attend, cut), both(formula)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    "fields, texts, tokens, applies",
    [
        ({}, 4, 2048, True),
        ({"attention": "xla"}, 4, 2048, False),
        ({"window": 100}, 4, 2048, False),
        ({"kv_heads": 1}, 4, 2048, False),  # two devices share the heads
        ({}, 3, 2048, False),
        ({}, 4, 2000, False),
    ],
)
def test_where_the_kernels_do_not_apply_attention_stays_as_it_was(fields, texts, tokens, applies):
    config = decoder("llama-3-8b", **SMALL | fields)
    assert (on_mesh(splash.on_each_device, config, texts, tokens, True) is not None) == applies
    assert on_mesh(splash.on_each_device, config, texts, tokens) is None  # these are CPUs


def test_heads_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(ValueError, match="heads of 64 channels or a multiple, not 32; use 'xla'"):
        decoder("llama-3-8b", width=128, heads=4, kv_heads=2, attention="pallas")
