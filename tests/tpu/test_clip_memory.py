"""What the blocks of CLIP's loss save of a chip's memory, said by the compiler."""

import jax
import jax.numpy as jnp
import pytest

from webssl_jax import config as configs
from webssl_jax.methods import clip
from webssl_jax.methods.clip.contrastive import Contrast
from webssl_jax.plan import training as plan
from webssl_jax.sharding import slices


def plain(images, texts, scale, *, block):
    """The formula as it stands in CLIP's paper (figure 3): all B x B logits, and the compiler to
    find out how to cut them."""
    logits = scale * jnp.einsum("ie,je->ij", images, texts, preferred_element_type=jnp.float32)
    own = jnp.diagonal(logits)
    loss = (jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)).mean() / 2 - own.mean()
    won = [(own >= logits.max(axis=axis)).mean() for axis in (1, 0)]
    return Contrast(loss, *won)


@pytest.mark.slow
def test_vit_l_at_batch_32768_needs_no_more_memory_than_with_whole_logits(monkeypatch):
    config = configs.load("configs/clip.py:size=l14")
    slice_ = slices.find("v5p-512")
    ours = plan.plan(config, slice_)
    monkeypatch.setattr(clip, "softmax_contrast", plain)
    whole = plan.plan(config, slice_)
    for name, found in (("blocks", ours), ("whole logits", whole)):
        print(
            f"{name}: peak {found['peak_hbm_gib']:.3f} GiB, state {found['state_gib']:.3f}, "
            f"wire {found['wire_gb']:.2f} GB ({found['exposed_gb']:.2f} exposed), "
            f"{found['compute_s']:.4f} s"
        )
    assert config.global_batch == 32_768 and slice_.chips == 256
    assert ours["fits"] and ours["peak_hbm_gib"] <= whole["peak_hbm_gib"] * 1.01
