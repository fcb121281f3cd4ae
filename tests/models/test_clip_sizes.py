"""CLIP's sizes by name: parameter counts, complaints in one line, and nothing large left whole."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from webssl_jax import params
from webssl_jax.models import clip_sizes
from webssl_jax.models.clip import CLIPVision
from webssl_jax.models.text import TextTower
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules

# (image tower, both and the logit scale): open_clip's and MetaCLIP's models, then the paper's
# widths with the assumptions of clip_sizes.py (recipes.md 1.3).
COUNTS = {
    "b32": (87_849_216, 151_277_313),
    "b16": (86_192_640, 149_620_737),
    "l14": (303_966_208, 427_616_513),
    "h14": (632_076_800, 986_109_441),
    "g14": (1_012_645_632, 1_366_678_273),
    "bigg14": (1_844_907_264, 2_539_567_105),
    "1b": (1_136_532_480, 1_831_192_321),
    "2b": (2_087_463_168, 2_782_123_009),
    "3b": (2_951_983_104, 3_646_642_945),
    "5b": (4_941_626_368, 5_636_286_209),
    "7b": (6_452_879_360, 7_147_539_201),
}


# (image tower, both with scale and bias) of SigLIP's, with its own 32,000 ids: those of
# transformers' SiglipModel (parity/test_siglip.py)
SIGLIP_COUNTS = {
    "siglip_b16": (92_884_224, 203_155_970),
    "siglip_l16": (315_894_784, 652_089_346),
    "siglip_so400m": (427_680_704, 877_415_602),
}


def shapes_of(size, **fields):
    encoder, text = clip_sizes.vision(size), clip_sizes.text(size, **fields)
    images = jnp.zeros((1, encoder.image_size, encoder.image_size, 3))
    vision, words = CLIPVision(encoder, text.embedding), TextTower(text)
    rng, tokens = jax.random.key(0), jnp.zeros((1, text.context), int)
    made = jax.eval_shape(lambda: (vision.init(rng, images), words.init(rng, tokens)))
    return made[0]["params"], made[1]["params"]


@pytest.mark.parametrize("size", COUNTS)
def test_each_size_has_the_parameter_count_of_the_original(size):
    vision, text = map(params.count, shapes_of(size))
    assert (vision, vision + text + 1) == COUNTS[size]


@pytest.mark.parametrize("size", SIGLIP_COUNTS)
def test_siglips_sizes_have_the_parameter_counts_of_transformers(size):
    vision, text = map(params.count, shapes_of(size, vocabulary=32_000))
    assert (vision, vision + text + 2) == SIGLIP_COUNTS[size]


def test_every_named_size_is_counted_above_but_for_twins_and_the_300m():
    assert set(COUNTS) == set(clip_sizes.CLIP_SIZES) - {"micro", "tiny", "300m"}
    assert set(SIGLIP_COUNTS) == set(clip_sizes.SIGLIP_SIZES) - {"siglip_micro", "siglip_tiny"}


@pytest.mark.parametrize("size", ["b16", "siglip_so400m"])
def test_nearly_all_of_both_towers_is_sharded(size):
    mesh = AbstractMesh((2, 4, 2), meshes.AXES, axis_types=(AxisType.Auto,) * len(meshes.AXES))
    vision, text = shapes_of(size)
    rules.check({**vision, "text": text}, mesh, 0.02)
    _, whole = rules.sharded_fraction(
        {**vision, "text": text}, AbstractMesh((1, 4, 1), meshes.AXES)
    )
    assert not [path for path, size in whole if size > 10_000]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: clip_sizes.vision("700m"), "no CLIP size '700m'; known: micro, tiny, b32"),
        (lambda: clip_sizes.text("700m"), "no CLIP size '700m'; known: micro, tiny, b32"),
        (lambda: clip_sizes.vision("tiny", causal=True), "a ViT has no field 'causal'"),
        (lambda: clip_sizes.text("tiny", patch_size=4), "a text tower has no field 'patch_size'"),
        (lambda: clip_sizes.text("tiny", pooling="cls"), "pooling = 'cls' is not one of eot, last"),
        (lambda: clip_sizes.text("tiny", context=0), "context = 0 must be at least 1"),
        (lambda: clip_sizes.text("tiny", heads=3), "width = 128 does not divide into heads = 3"),
        (lambda: clip_sizes.build_text({"width": 8}), "a text tower needs the field 'depth'"),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
