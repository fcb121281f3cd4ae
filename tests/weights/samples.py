"""A small MAE with random weights, non-trivial biases and norms, written in every family."""

import dataclasses

import jax
import numpy as np

from webssl_jax import params
from webssl_jax.methods.mae import MAE, View
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import export

FAMILIES = ("hf-vit", "hf-vit-mae", "mae-pth", "timm")
BOTH = ("hf-vit-mae", "mae-pth")  # hold a decoder too


def make_method(**encoder):
    fields = dict(width=32, depth=2, heads=2, patch_size=8, image_size=32, init="mae")
    vit = ViTConfig(**{"position": "sincos", **fields, **encoder})
    decoder = dataclasses.replace(vit, width=16, depth=1, heads=4, position="sincos")
    return MAE(
        vit, decoder, norm_pix_loss=False, mask_ratio=0.6, view=View(image_size=vit.image_size)
    )


def shapes_of(method):
    return jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params


def make_params(method, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        return values + 1 if path.endswith("scale") else values

    return params.map_with_path(draw, shapes_of(method))


def write(family, folder, method=None, weights=None, dtype="float32", max_file_bytes=2**40):
    """The path of an export of ``weights``."""
    method = method or make_method()
    output = folder / (f"{family}.pth" if family == "mae-pth" else family)
    weights = make_params(method) if weights is None else weights
    return export.write(weights, method, family, output, dtype, max_file_bytes, "card")


def assert_same(tree, weights, kind):
    """``tree`` holds the encoder of ``weights``, for ``kind`` mae the decoder too, bit by bit."""
    got, wanted = params.flatten(tree), params.flatten(weights)
    assert set(got) == {p for p in wanted if kind == "mae" or p.startswith("encoder/")}
    for path, value in got.items():
        assert np.asarray(value).dtype == np.float32
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
