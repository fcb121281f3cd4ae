"""MAE as a method: config, traceability, independence of batch cuts and devices, features, tables,
pictures."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import methods, params
from webssl_jax.config import ConfigError
from webssl_jax.evaluators import pictures
from webssl_jax.methods import losses
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.models import sizes
from webssl_jax.models.features import Want


def config(**method):
    method = {
        "name": "mae",
        "decoder": {"width": 24, "depth": 1, "heads": 3},
        "view": {"image_size": 32},
    } | method
    return ConfigDict({"model": {"size": "micro"}, "method": method})


@pytest.fixture(scope="module")
def mae():
    return methods.create(config())


@pytest.fixture(scope="module")
def variables(mae):
    return jax.jit(lambda key: mae.init(key, mae.batch_spec(4)))(jax.random.key(0))


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
        "position": np.arange(n, dtype=np.int32),
    }


def grads(mae, variables):
    def loss(tree, data, rng):
        return mae.loss(tree, variables.teacher, variables.aux, data, rng, {}).loss

    return jax.jit(jax.value_and_grad(loss))


def test_config_reaches_both_networks():
    made = methods.create(
        ConfigDict(
            {
                "model": {"size": "300m", "depth": 3, "dtype": "float32"},
                "method": {
                    "name": "mae",
                    "mask_ratio": 0.6,
                    "norm_pix_loss": False,
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.2, 0.2, 0.2],
                    "view": {"image_size": 224, "scale_min": 0.3},
                },
            }
        )
    )
    assert made.encoder == dataclasses.replace(sizes.web_mae("300m"), depth=3, dtype="float32")
    assert (made.decoder.width, made.decoder.depth, made.decoder.heads) == (512, 8, 16)
    assert (made.decoder.patch_size, made.decoder.dtype, made.decoder.hidden) == (
        16,
        "float32",
        2048,
    )
    assert (made.mask_ratio, made.norm_pix_loss, made.mean, made.view.scale_min) == (
        0.6,
        False,
        (0.5, 0.5, 0.5),
        0.3,
    )
    assert hash(made) == hash(dataclasses.replace(made))


def test_a_model_without_a_named_size_is_described_by_its_fields():
    made = methods.create(
        ConfigDict(
            {
                "model": {"width": 48, "depth": 2, "heads": 3, "patch_size": 4},
                "method": {"name": "mae", "view": {"image_size": 24}},
            }
        )
    )
    assert (made.encoder.grid, made.encoder.position, made.encoder.init) == (
        (6, 6),
        "sincos",
        "mae",
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method.name": "beit"}, "no method 'beit'; "),
        ({"model.size": "8b"}, "no Web-MAE size '8b'"),
        ({"method.mask_ratio": 1.0}, "mask_ratio = 1.0 keeps 0 of 16"),
        (
            {"method.view": {"image_size": 36}},
            "image_size = 36 is not a multiple of patch_size = 8",
        ),
        ({"method.view": {"size": 32}}, "method.view has no field 'size'"),
        ({"method.decoder": {"heads": 7}}, "width = 512 does not divide into heads = 7"),
        ({"method.decoder": {"patch_size": 4}}, "decoder's patch_size = 4 must be the encoder's"),
        ({"method.ratio": 0.5}, "method has no field 'ratio'"),
        ({"model.pooling": "map"}, "pooling = 'map': the decoder needs 'cls'"),
        ({"method.mask_ratio": "most"}, "method: mask_ratio = 'most' must be a number"),
        ({"method.norm_pix_loss": 1}, "norm_pix_loss = 1 must be true or false"),
        ({"method.decoder": {"depth": 1.5}}, "method.decoder: depth = 1.5 must be a whole number"),
        ({"method.view": {"image_size": 32, "scale_min": 0.0}}, "method.view: scale_min = 0.0"),
        ({"method.view": {"image_size": 32, "scale_max": 0.1}}, "scale_min <= scale_max"),
        ({"method.view": {"image_size": 32, "hflip": -0.1}}, "hflip = -0.1 must lie in"),
        ({"method.view": {"image_size": 0}}, "method.view: image_size = 0 must be at least 1"),
        ({"method.mean": (0.5, 0.5)}, "mean = (0.5, 0.5) must be three numbers"),
        ({"method.std": [0.5, 0.5, -1]}, "std = (0.5, 0.5, -1) must be positive"),
        ({"method.std": "grey"}, "std = 'grey' must be a tuple, each a number"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change, says):
    wrong = config()
    for path, value in change.items():
        folder, name = path.split(".")
        if name in wrong[folder]:
            del wrong[folder][name]
        wrong[folder][name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ConfigError) as error:
        methods.create(wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_largest_size_can_be_created_abstractly():
    made = methods.create(ConfigDict({"model": {"size": "5b"}, "method": {"name": "mae"}}))
    shapes = jax.eval_shape(lambda key: made.init(key, made.batch_spec(4096)), jax.random.key(0))
    fixed = 257 * (3584 + 512)
    assert params.count(shapes.params) + fixed == 4_937_035_264 + 27_489_356
    assert (shapes.teacher, shapes.aux) == ({}, {})


def test_terms_add_up_and_an_untrained_network_scores_about_one(mae, variables):
    out = jax.jit(lambda v, b, k: mae.loss(*v, b, k, {}))(variables, batch(64), jax.random.key(1))
    assert sum(out.terms.values()) == out.loss
    assert 0.8 < out.loss < 2.5  # the targets have unit variance
    assert out.report["mask_ratio"] == 0.75


def test_the_loss_and_gradients_do_not_depend_on_how_the_batch_is_cut(mae, variables):
    whole, rng, step = batch(8), jax.random.key(5), grads(mae, variables)
    loss, gradient = step(variables.params, whole, rng)
    parts = [
        step(variables.params, {k: v[i : i + 2] for k, v in whole.items()}, rng)
        for i in range(0, 8, 2)
    ]
    np.testing.assert_allclose(np.mean([part[0] for part in parts]), loss, rtol=1e-6)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *[part[1] for part in parts])
    for (path, a), b in zip(params.flatten(gradient).items(), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6, rtol=1e-4, err_msg=path)


def test_masks_change_from_step_to_step_and_noise_overrides_them(mae, variables):
    loss = jax.jit(lambda data, key: mae.loss(*variables, data, key, {}).loss)
    keys = [jax.random.key(seed) for seed in (0, 1)]
    assert loss(batch(), keys[0]) != loss(batch(), keys[1])
    images = batch()["image"]
    noise = np.tile(np.linspace(0, 1, 16, endpoint=False, dtype=np.float32), (8, 1))
    fixed = [loss({"image": images, "noise": noise}, key) for key in keys]
    assert fixed[0] == fixed[1]
    made = Model.of(mae, variables).reconstruct(images, noise)
    np.testing.assert_array_equal(made.mask, np.tile(np.arange(16) >= 4, (8, 1)))
    np.testing.assert_allclose(losses.masked_pixel_loss(*made, True), fixed[0], rtol=1e-5)


def test_features_are_of_the_whole_image_on_its_grid_and_do_not_need_the_decoder(mae, variables):
    encoder_only = Variables({"encoder": variables.params["encoder"]}, {}, {})
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    out = Model.of(mae, encoder_only).features(images, Want(blocks=(0, -1), registers=True))
    assert (
        out.cls.shape == (2, 32)
        and out.patches.shape == (2, 5, 6, 32)
        and out.registers.shape == (2, 0, 32)
    )
    assert set(out.blocks) == {0, -1} and out.blocks[0][1].shape == (2, 5, 6, 32)
    np.testing.assert_array_equal(out.blocks[-1][0], out.cls)
    assert out.cls.dtype == jnp.float32


def test_decay_spares_biases_and_norms_and_nothing_else(mae, variables):
    decay = params.flatten(params.match(mae.tables().decay, variables.params, 1.0))
    assert not params.unmatched_rows(mae.tables().decay, variables.params)
    spared = {path for path, factor in decay.items() if factor == 0.0}
    assert all(path.endswith(("/bias", "/scale")) for path in spared)
    decayed = set(decay) - spared
    assert {
        "encoder/cls_token",
        "decoder/mask_token",
        "encoder/patch_embed/kernel",
        "decoder/pred/kernel",
    } <= decayed
    assert all(path.endswith(("kernel", "token")) for path in decayed)


def draw(mae, variables, n):
    """The picture of ``n`` images."""
    images = pictures.Images(batch(n)["image"], [None] * n, [""] * n)
    drawing = pictures.ModelPictures(images, (pictures.RECONSTRUCTION,), n)
    return drawing.draw(Model.of(mae, variables))[pictures.RECONSTRUCTION]


@pytest.fixture
def columns(mae, variables, monkeypatch):
    """Draws four images -> (images, masked, predicted, pasted) as they go into the picture."""
    given = []
    monkeypatch.setattr(pictures.reconstruction, "panel", lambda *parts: given.extend(parts))

    def columns():
        draw(mae, variables, 4)
        return given

    return columns


def test_pasted_pictures_keep_the_visible_pixels_and_borrow_true_patch_statistics(columns):
    images, masked, predicted, pasted = columns()
    hidden = (masked == 128).all(axis=-1)
    assert images.dtype == masked.dtype == predicted.dtype == pasted.dtype == np.uint8
    assert hidden.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_array_equal(pasted[~hidden], images[~hidden])
    np.testing.assert_array_equal(pasted[hidden], predicted[hidden])


def test_a_perfect_prediction_is_drawn_as_the_image_itself(columns, monkeypatch):
    reconstruct = Model.reconstruct

    def perfect(*arguments):
        made = reconstruct(*arguments)
        mean, std = losses.patch_statistics(made.patches)
        return made._replace(prediction=(made.patches - mean) / std)

    monkeypatch.setattr(Model, "reconstruct", perfect)
    images, _, predicted, _ = columns()
    np.testing.assert_array_equal(predicted, images)


def test_the_reconstruction_panel_is_a_picture_of_as_many_images_as_are_given(mae, variables):
    panels = [draw(mae, variables, n) for n in (8, 12, 16)]
    for drawn in panels:
        assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[-1] == 3
    heights = [drawn.shape[0] for drawn in panels]  # two columns: 4, 6 and 8 rows
    assert heights[0] < heights[1] and heights[2] - heights[1] == heights[1] - heights[0]


def test_stochastic_depth_couples_the_images_of_a_batch_and_nothing_else_does(mae):
    assert mae.couples_batch is False
    made = config()
    made.model.drop_path = 0.5
    assert methods.create(made).couples_batch is True


@pytest.mark.parametrize("size", [32, (32, 64)])
def test_views_give_what_the_batch_spec_promises(size):
    made = methods.create(config(view={"image_size": size}))
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(
        stream, "PNG"
    )
    spec = made.batch_spec(3)["image"]
    view = made.train_view()(stream.getvalue(), np.random.default_rng(0))
    assert view["image"].shape == spec.shape[1:] and view["image"].dtype == spec.dtype
    assert made.preprocess(stream.getvalue()).shape == spec.shape[1:]
    assert spec.shape[1:3] == (size if isinstance(size, tuple) else (size, size))
    assert made.encoder.grid == (spec.shape[1] // 8, spec.shape[2] // 8)


def test_a_wide_image_is_as_much_work_as_its_patches_and_its_loss_can_be_differentiated():
    wide, square = (methods.create(config(view={"image_size": s})) for s in ((16, 64), 32))
    assert wide.train_flops() == square.train_flops()
    variables = jax.eval_shape(lambda key: wide.init(key, wide.batch_spec(2)), jax.random.key(0))
    data = {"image": np.zeros((2, 16, 64, 3), np.uint8), "position": np.arange(2, dtype=np.int32)}

    def loss(tree):
        return wide.loss(tree, {}, {}, data, jax.random.key(0), {}).loss

    assert params.count(jax.eval_shape(jax.grad(loss), variables.params)) == params.count(
        variables.params
    )


def test_flops_of_the_300m_are_known():
    made = methods.create(ConfigDict({"model": {"size": "300m"}, "method": {"name": "mae"}}))
    # Forward, by hand: encoder 50 tokens x 302e6 block weights, decoder 197 x 25.2e6, two
    # operations a weight.
    by_weights = 2 * (50 * 24 * 12 * 1024**2 + 197 * 8 * 12 * 512**2)
    assert made.train_flops() / 3 == pytest.approx(by_weights, rel=0.06)
    assert made.train_flops() / 3 > by_weights


def test_eight_devices_with_sharded_parameters_compute_what_one_does():
    """Stochastic depth included: its groups draw the same images on any mesh."""
    made = config(decoder={"width": 32, "depth": 1, "heads": 2})
    made.model.update({"drop_path": 0.5, "drop_path_group": 4})
    mae = methods.create(made)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(x):
        return NamedSharding(
            mesh, P(*(None,) * (x.ndim - 1), "fsdp") if x.shape[-1] % 4 == 0 else P()
        )

    def init(key):
        return mae.init(key, mae.batch_spec(16))

    key, data, step = jax.random.key(0), batch(16), grads(mae, Variables({}, {}, {}))
    one = jax.jit(init)(key)
    many = jax.jit(init, out_shardings=jax.tree.map(place, jax.eval_shape(init, key)))(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)
    assert len(many.params["encoder"]["blocks"]["attn"]["q"]["kernel"].sharding.device_set) == 8

    loss, gradient = step(one.params, data, key)
    loss8, gradient8 = step(many.params, jax.device_put(data, NamedSharding(mesh, P("fsdp"))), key)
    np.testing.assert_allclose(loss8, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient8, gradient)
