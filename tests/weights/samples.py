"""Small networks with random weights, non-trivial biases and norms, written in every family: a MAE,
the networks of DINO, and CLIP's towers."""

import dataclasses

import jax
import numpy as np

from webssl_jax import params
from webssl_jax.methods.mae.method import MAE, View
from webssl_jax.models import clip_sizes
from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import export, load, preprocessing, safetensors_io, torch_file
from webssl_jax.weights.families import FAMILIES as ALL
from webssl_jax.weights.networks import Networks, template_of

FAMILIES = ("hf-vit", "hf-vit-mae", "mae-pth", "timm")
BOTH = ("hf-vit-mae", "mae-pth")  # hold a decoder too
CLIP = ("hf-clip", "hf-clip-vision", "open-clip", "open-clip-pth")
DINO = ("dinov2-pth", "dinov2-teacher", "dinov2-heads", "hf-dinov2", "timm")


def make_method(**encoder):
    fields = dict(width=32, depth=2, heads=2, patch_size=8, image_size=32, init="mae")
    vit = ViTConfig(**{"position": "sincos", **fields, **encoder})
    decoder = dataclasses.replace(vit, width=16, depth=1, heads=4, position="sincos")
    return MAE(
        vit, decoder, norm_pix_loss=False, mask_ratio=0.6, view=View(image_size=vit.image_size)
    )


def make_dino(**encoder):
    """The networks of DINO: all the blocks' extras, two heads of different shapes."""
    fields = dict(width=32, depth=3, heads=2, patch_size=8, image_size=32, mlp="swiglu")
    fields |= dict(layer_scale=1e-5, mask_token=True, position_resize="offset")
    return Networks(
        ViTConfig(**fields | encoder),
        dino_head=HeadConfig(prototypes=24, bottleneck=8, hidden=20),
        ibot_head=HeadConfig(prototypes=16, bottleneck=12, hidden=20),
    )


def make_clip(contrast="softmax", text=None, **encoder):
    """CLIP's towers, of different shapes."""
    fields = dict(depth=3, mlp_hidden=57, image_size=24)
    words = dict(width=24, heads=3, embedding=20, context=12, vocabulary=64)
    return Networks(
        clip_sizes.vision("micro", **fields | encoder),
        text=clip_sizes.text("micro", **words | (text or {})),
        contrast=contrast,
        preprocess=preprocessing.default((fields | encoder)["image_size"], "clip"),
    )


def shapes_of(method):
    if isinstance(method, Networks):
        return template_of(method)
    return jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params


def make_params(method, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        return values + 1 if path.endswith(("scale", "gamma", "last_layer/g")) else values

    return params.map_with_path(draw, shapes_of(method))


def write(family, folder, method=None, weights=None, dtype="float32", max_file_bytes=2**40, **more):
    """The path of an export of ``weights``."""
    method = method or make_method()
    output = folder / (family if ALL[family].config else f"{family}.pth")
    weights = make_params(method) if weights is None else weights
    return export.write(
        weights, method, family, output, dtype, max_file_bytes, lambda: "card", **more
    )


def damaged(path, family, folder, change):
    """A copy in ``folder`` of a family's export after ``change`` of its {name: array}."""
    tensors = {name: x.read().copy() for name, x in load.open_files(path).tensors.items()}
    change(tensors)
    specs = [safetensors_io.Spec(name, x.shape) for name, x in tensors.items()]
    if not ALL[family].config:
        torch_file.write_file(folder / "x.pth", "model", specs, iter(tensors.items()), {})
        return folder / "x.pth"
    file = ALL[family].weights_file or safetensors_io.SINGLE_FILE
    safetensors_io.write_file(folder / file, specs, tensors.items())
    config = ALL[family].config_file
    (folder / config).write_text((path / config).read_text())
    return folder


def assert_same(tree, weights, kind):
    """``tree`` holds the encoder of ``weights``, for ``kind`` mae the decoder too, bit by bit."""
    got, wanted = params.flatten(tree), params.flatten(weights)
    assert set(got) == {p for p in wanted if kind == "mae" or p.startswith("encoder/")}
    for path, value in got.items():
        assert np.asarray(value).dtype == np.float32
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
