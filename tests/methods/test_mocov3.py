"""MoCo v3: the contrast, four statistics of batch norm, the order of updates, what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from webssl_jax import methods, params
from webssl_jax.methods.mocov3.method import contrast
from webssl_jax.models import pixels
from webssl_jax.models.batch_norm_mlp import BatchNormMlp, MlpConfig
from webssl_jax.models.position import sincos_2d
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT
from webssl_jax.optim.optimizer import Optimizer

from .test_every_method import batch_of, drawn, load


def test_the_contrast_is_torchs_cross_entropy_of_cosines():
    q, k = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    loss, accuracy = contrast(jnp.asarray(q), jnp.asarray(k), 0.2)
    a, b = (torch.nn.functional.normalize(torch.from_numpy(x)) for x in (q, k))
    logits = a @ b.T / 0.2
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(6)) * 0.4
    np.testing.assert_allclose(float(loss), float(wanted), rtol=1e-5)
    right = (logits.argmax(1) == torch.arange(6)).float().mean()
    np.testing.assert_allclose(float(accuracy), float(right), rtol=1e-6)


def test_the_projector_is_torchs_linear_layers_and_batch_norms():
    x = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    c = MlpConfig(hidden=6, output=5, layers=3)
    tree = BatchNormMlp(c).init(jax.random.key(0), x)["params"]
    tree = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), tree
    )
    out = torch.from_numpy(x)
    for i in (1, 2, 3):
        out = out @ torch.from_numpy(np.array(tree[f"fc{i}"]["kernel"]))
        affine = tree.get(f"norm{i}", {})
        weight, bias = (torch.from_numpy(np.array(v)) for v in map(affine.get, ("scale", "bias"))
        ) if affine else (None, None)  # fmt: skip
        out = torch.nn.functional.batch_norm(out, None, None, weight, bias, training=True)
        out = torch.relu(out) if i < 3 else out
    np.testing.assert_allclose(BatchNormMlp(c).apply({"params": tree}, x), out, atol=2e-5)
    assert "norm3" not in tree and "bias" not in tree["fc1"]


def test_each_view_goes_through_each_network_by_itself():
    """The loss is that of the views apart; together batch norm would have other statistics."""
    method = methods.create(load("mocov3"))
    variables, batch = drawn(method), batch_of(method, 0)
    project, predict = BatchNormMlp(method.projector).apply, BatchNormMlp(method.predictor).apply

    def projected(tree, view):
        images = pixels.normalise(batch["views"][:, view], method.mean, method.std)
        seen = ViT(method.encoder).apply({"params": tree["encoder"]}, images).cls
        return project({"params": tree["projector"]}, seen)

    def query(view):
        own = {"params": variables.params["predictor"]}
        return predict(own, projected(variables.params, view))

    @jax.jit
    def both():
        keys = [projected(variables.teacher, view) for view in (0, 1)]
        wanted = contrast(query(0), keys[1], 0.2)[0] + contrast(query(1), keys[0], 0.2)[0]
        return method.loss(*variables, batch, jax.random.key(1), {}).loss, wanted

    np.testing.assert_allclose(*both(), rtol=1e-5)


def test_the_momentum_is_that_of_the_next_step_and_ends_at_one():
    momentum = methods.create(load("mocov3")).schedules(100, 8)["momentum"]
    first = 1 - 0.01 * (1 + np.cos(np.pi / 100)) / 2
    np.testing.assert_allclose([momentum(0), momentum(99)], [first, 1.0], rtol=1e-6)


def test_all_is_decayed_that_is_trained_and_the_patch_embedding_is_not():
    config = load("mocov3")
    method = methods.create(config)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(8))).params
    tables = method.tables()
    assert not params.unmatched_rows(tables.frozen, shapes) and not tables.decay
    frozen = params.flatten(params.match(tables.frozen, shapes, False))
    still = {path for path, value in frozen.items() if value}
    assert still == {"encoder/patch_embed/kernel", "encoder/patch_embed/bias"}
    Optimizer.from_config(config.optim, tables).check(shapes)


def test_positions_are_maes_with_the_row_first():
    c = ViTConfig(
        width=16, depth=1, heads=1, patch_size=4, image_size=(12, 20), position="sincos_rows"
    )
    _, table = c.position_scheme.table({})
    turned = sincos_2d(16, (5, 3)).reshape(5, 3, 16).transpose(1, 0, 2).reshape(15, 16)
    np.testing.assert_array_equal(table, turned)
