"""CLIP's activation: in the files of families whose code has none, and in those that do not say."""

import types

import pytest

from webssl_jax.models import clip_sizes, sizes
from webssl_jax.weights import towers
from webssl_jax.weights.families import FAMILIES, table_of
from webssl_jax.weights.tables import WeightsError


@pytest.mark.parametrize("family", ["hf-vit", "timm", "dinov2-pth", "hf-dinov2"])
def test_quick_gelu_is_refused_where_the_file_would_be_computed_with_gelu(family):
    made = types.SimpleNamespace(encoder=sizes.web_dino("micro", mlp="quick_gelu"))
    with pytest.raises(WeightsError, match=f"{family}: its code has no mlp = 'quick_gelu'"):
        table_of(family, made)


@pytest.mark.parametrize("size, mlp", [("g14", "gelu"), ("h14", "quick_gelu")])
def test_a_file_that_does_not_say_gets_the_activation_of_those_who_publish_the_size(size, mlp):
    """open_clip has ViT-g-14 without "-quickgelu" alone; of ViT-H-14 there are both."""
    image, text = clip_sizes.vision(size), clip_sizes.text(size)
    assert image.mlp == text.mlp == mlp
    facts = {"encoder": {"width": image.width, "depth": image.depth}}
    assert list(towers._activations(FAMILIES["open-clip-pth"], facts).values()) == [mlp]
