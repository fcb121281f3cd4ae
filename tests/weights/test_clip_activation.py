"""CLIP's activation in the files of families whose code has none."""

import types

import pytest

from webssl_jax.models import sizes
from webssl_jax.weights.families import table_of
from webssl_jax.weights.tables import WeightsError


@pytest.mark.parametrize("family", ["hf-vit", "timm", "dinov2-pth", "hf-dinov2"])
def test_quick_gelu_is_refused_where_the_file_would_be_computed_with_gelu(family):
    made = types.SimpleNamespace(encoder=sizes.web_dino("micro", mlp="quick_gelu"))
    with pytest.raises(WeightsError, match=f"{family}: its code has no mlp = 'quick_gelu'"):
        table_of(family, made)
