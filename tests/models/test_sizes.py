"""Sizes by name: parameter counts against the table of the paper, abstractly, and complaints in one
line."""

import jax
import jax.numpy as jnp
import pytest

from webssl_jax import params
from webssl_jax.models import sizes
from webssl_jax.models.decoder import MAEDecoder
from webssl_jax.models.vit import ViT

# 224 px, mask token included (recipes.md 1.1, counted from the released definitions).
WEB_DINO = {
    "300m": 303_655_168,
    "1b": 1_134_771_200,
    "2b": 2_084_237_568,
    "3b": 2_948_317_184,
    "5b": 4_938_338_816,
    "7b": 6_450_170_880,
}
# (encoder, stock decoder); both counts hold the fixed position tables, which are no parameters
# here.
WEB_MAE = {
    "300m": (303_301_632, 26_240_256),
    "700m": (630_764_800, 26_309_708),
    "1b": (1_134_564_864, 26_440_780),
    "2b": (2_084_019_840, 27_030_604),
    "3b": (2_948_047_872, 27_227_212),
    "5b": (4_937_035_264, 27_489_356),
}


def count_vit(config: sizes.ViTConfig) -> int:
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return params.count(jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"])


@pytest.mark.parametrize("size", WEB_DINO)
def test_web_dino_has_the_published_parameter_count(size):
    assert count_vit(sizes.web_dino(size)) == WEB_DINO[size]


@pytest.mark.parametrize(("image_size", "count"), [(378, 6_452_108_288), (518, 6_454_729_728)])
def test_web_dino_7b_grows_only_by_positions_at_high_resolution(image_size, count):
    assert count_vit(sizes.web_dino("7b", image_size=image_size)) == count


@pytest.mark.parametrize("size", WEB_MAE)
def test_web_mae_has_the_published_parameter_counts(size):
    encoder = sizes.web_mae(size)
    table = (encoder.num_patches + 1) * encoder.width
    assert count_vit(encoder) + table == WEB_MAE[size][0]

    decoder = sizes.build(
        dict(width=512, depth=8, heads=16, patch_size=encoder.patch_size, position="sincos")
    )
    shape = jax.eval_shape(
        lambda key: MAEDecoder(decoder).init(
            key,
            jnp.zeros((1, encoder.width)),
            jnp.zeros((1, 1, encoder.width)),
            jnp.zeros((1, encoder.num_patches), int),
            encoder.grid,
        )["params"],
        jax.random.key(0),
    )
    assert params.count(shape) + (encoder.num_patches + 1) * 512 == WEB_MAE[size][1]


def test_every_named_size_is_counted_above():
    assert set(WEB_DINO) == set(sizes.WEB_DINO_SIZES) - {"micro", "tiny"}
    assert set(WEB_MAE) == set(sizes.WEB_MAE_SIZES) - {"micro", "tiny"}


def test_swiglu_hidden_follows_the_rounding_of_dinov2():
    hidden = [sizes.web_dino(size).hidden for size in ("300m", "1b", "2b", "3b", "5b", "7b")]
    assert hidden == [2736, 4096, 7168, 8192, 9560, 10928]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sizes.web_dino("700m"), "no Web-DINO size '700m'; known: micro, tiny, 300m"),
        (lambda: sizes.web_mae("tiny", widht=3), "a ViT has no field 'widht'"),
        (lambda: sizes.web_mae("tiny", heads=5), "width = 128 does not divide into heads = 5"),
        (
            lambda: sizes.web_mae("tiny", image_size=50),
            "image_size = 50 is not a multiple of patch_size = 8",
        ),
        (lambda: sizes.web_mae("tiny", remat="some"), "remat = 'some' is not one of none, full"),
        (lambda: sizes.web_mae("tiny", drop_path=1.0), "drop_path = 1.0 must lie in"),
        (lambda: sizes.web_mae("tiny", depth=2.5), "depth = 2.5 must be a whole number"),
        (lambda: sizes.web_mae("tiny", depth=True), "depth = True must be a whole number"),
        (lambda: sizes.web_mae("tiny", width="foo"), "width = 'foo' must be a whole number"),
        (lambda: sizes.web_mae("tiny", mask_token="false"), "'false' must be true or false"),
        (lambda: sizes.web_mae("tiny", mlp=3), "mlp = 3 must be a word"),
        (lambda: sizes.web_mae("tiny", norm_eps=float("nan")), "norm_eps = nan must be a number"),
        (lambda: sizes.web_mae("tiny", norm_eps=0.0), "norm_eps = 0.0 must be positive"),
        (lambda: sizes.web_mae("tiny", layer_scale="x"), "'x' must be a number or none"),
        (lambda: sizes.web_mae("tiny", mlp_hidden=0), "mlp_hidden = 0 must be at least 1"),
        (lambda: sizes.web_mae("tiny", drop_path_group=0), "drop_path_group = 0 must be at least"),
        (lambda: sizes.web_mae("tiny", num_registers=-1), "num_registers = -1 must be zero or"),
        (
            lambda: sizes.build(dict(width=32, depth=1, heads=1)),
            "a ViT needs the field 'patch_size'",
        ),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_numbers_and_optional_fields_take_none():
    made = sizes.web_dino("micro", layer_scale=1, drop_path=0, mlp_hidden=None)
    assert (made.layer_scale, made.drop_path, made.mlp_hidden) == (1, 0, None)
    assert sizes.web_dino("micro", layer_scale=None).layer_scale is None


@pytest.mark.parametrize("mlp", sizes.MLPS)
def test_block_flops_are_twice_the_weights_a_token_meets_plus_attention(mlp):
    config = sizes.web_dino("micro", mlp=mlp)
    shape = jax.eval_shape(ViT(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernels = sum(
        x.size for path, x in params.flatten(shape["blocks"]).items() if path.endswith("kernel")
    )
    tokens = 17
    attention = 4 * tokens * tokens * config.width * config.depth
    assert config.block_flops(tokens) == 2 * kernels * tokens + attention
