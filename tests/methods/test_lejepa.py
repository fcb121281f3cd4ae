"""SIGReg against its formula in float64, its value of normal and of collapsed embeddings, and the
loss of a whole step put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange

from webssl_jax import methods
from webssl_jax.methods.lejepa.sigreg import directions, most, sigreg
from webssl_jax.models import pixels
from webssl_jax.models.batch_norm_mlp import BatchNormMlp, MlpConfig
from webssl_jax.models.vit import ViT

from .test_every_method import batch_of, drawn, load


def test_sigreg_is_the_integral_of_epps_and_pulley():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 6, 5)).astype(np.float32)
    a = np.array(directions(jax.random.key(0), 5, 7))
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1, rtol=1e-6)
    t = np.linspace(-3, 3, 33)  # both sides, where the code doubles one
    projected = (z.astype(np.float64) @ a)[..., None] * t
    gap = np.abs(np.exp(1j * projected).mean(axis=1) - np.exp(-(t**2) / 2)) ** 2
    wanted = 6 * np.trapezoid(gap * np.exp(-(t**2) / 2), t, axis=-1).mean()
    np.testing.assert_allclose(sigreg(jnp.asarray(z), jnp.asarray(a)), wanted, rtol=1e-5)


def test_it_is_about_one_for_normal_embeddings_at_any_batch_and_grows_with_the_batch_otherwise():
    a = directions(jax.random.key(0), 4, 64)
    values = []
    for size in (32, 512):
        z = jax.random.normal(jax.random.key(size), (8, size, 4))
        values.append(float(sigreg(z, a)))
        np.testing.assert_allclose(sigreg(0 * z, a), most(size), rtol=1e-5)
    assert all(0.8 < value < 1.3 for value in values)
    assert most(512) == 16 * most(32) > 50


def test_the_projector_ends_in_a_plain_layer_like_torchs():
    x = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    c = MlpConfig(hidden=6, output=5, layers=2, last_norm=False)
    tree = BatchNormMlp(c).init(jax.random.key(0), x)["params"]
    first, last = (torch.from_numpy(np.array(tree[f"fc{i}"]["kernel"])) for i in (1, 2))
    out = torch.nn.functional.batch_norm(torch.from_numpy(x) @ first, None, None, training=True)
    wanted = torch.relu(out) @ last + torch.from_numpy(np.array(tree["fc2"]["bias"]))
    np.testing.assert_allclose(BatchNormMlp(c).apply({"params": tree}, x), wanted, atol=2e-5)
    assert set(tree) == {"fc1", "norm1", "fc2"} and "bias" not in tree["fc1"]


def test_the_loss_is_the_distance_from_the_mean_view_and_sigreg():
    method = methods.create(load("lejepa"))
    variables, batch = drawn(method), batch_of(method, 0)
    params = variables.params

    @jax.jit
    def both():
        out = method.loss(*variables, batch, jax.random.key(1), {})
        cls = []
        for name in ("global_crops", "local_crops"):
            images = pixels.normalise(batch[name], method.mean, method.std)
            flat = rearrange(images, "b v h w c -> (b v) h w c")
            seen = ViT(method.encoder).apply({"params": params["encoder"]}, flat).cls
            cls.append(rearrange(seen, "(b v) d -> v b d", b=len(images)))
        stacked = jnp.concatenate(cls)  # (V, B, D)
        flat = rearrange(stacked, "v b d -> (v b) d")
        z = BatchNormMlp(method.projector).apply({"params": params["projector"]}, flat)
        z = rearrange(z, "(v b) e -> v b e", v=len(stacked))
        return out.terms, out.report["sigreg"], ((z - z.mean(axis=0)) ** 2).mean(), z

    terms, statistic, distance, z = both()
    np.testing.assert_allclose(terms["invariance"], 0.95 * distance, rtol=1e-4)
    np.testing.assert_allclose(terms["sigreg_loss"], 0.05 * statistic, rtol=1e-6)
    others = directions(jax.random.key(5), z.shape[-1], 4096)
    np.testing.assert_allclose(statistic, sigreg(z, others), rtol=0.2)  # of other directions
