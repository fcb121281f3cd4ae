"""I-JEPA: the sizes and places of blocks, what padding may not change, teacher, targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import methods
from webssl_jax.config import ConfigError
from webssl_jax.methods.ijepa.blocks import MultiBlock
from webssl_jax.models import pixels
from webssl_jax.models.predictor import Predictor
from webssl_jax.models.vit import ViT

from .test_every_method import batch_of, drawn, load


@pytest.mark.parametrize("grid", [(16, 16), (28, 28), (14, 10)])
def test_blocks_have_the_sizes_of_the_formula(grid):
    """In double precision, by hand: one number gives area and aspect, no side is a whole one."""
    masks, u = MultiBlock(), np.random.default_rng(0).random(200, np.float32)
    heights, widths = masks.target_size(jnp.asarray(u), grid)
    squares = masks.context_size(jnp.asarray(u), grid)
    for i, number in enumerate(u.astype(float)):
        area = int(grid[0] * grid[1] * (0.15 + 0.05 * number))
        aspect = 0.75 + 0.75 * number
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        assert (heights[i], widths[i]) == (min(height, grid[0] - 1), min(width, grid[1] - 1))
        side = round(math.sqrt(int(grid[0] * grid[1] * (0.85 + 0.15 * number))))
        assert squares[0][i] == min(side, grid[0] - 1) and squares[1][i] == min(side, grid[1] - 1)


def test_a_context_shows_no_target_and_the_last_row_and_column_are_never_used():
    grid, masks = (12, 10), MultiBlock(context_patches=120)
    made = masks.draw(jax.random.key(3), jnp.arange(64), grid)
    seen = np.zeros((64, 120), int)
    for image, (context, there, targets, inside) in enumerate(zip(*map(np.asarray, made))):
        shown = set(context[there])
        hidden = set(targets[inside])
        assert len(shown) == there.sum() > masks.min_keep and not shown & hidden
        assert (np.diff(context[there]) > 0).all() and inside.sum() % 4 == 0
        seen[image, list(shown | hidden)] = 1
        for block in zip(targets, inside):
            rows, columns = np.divmod(block[0][block[1]], 10)
            size = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert size == len(rows) == inside[0].sum()  # a rectangle, of one size for all
    used = seen.reshape(64, *grid).any(axis=0)
    assert used[:-1, :-1].all() and not used[-1].any() and not used[:, -1].any()
    alone = masks.draw(jax.random.key(3), jnp.arange(5, 6), grid)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[5]), alone, made)


def test_a_context_without_room_is_drawn_again_and_then_with_a_target_less():
    masks, grid = MultiBlock(targets=2, min_keep=3, context_patches=16), (4, 4)
    both = jnp.asarray([[0, 0], [0, 1]])  # 3 x 2 each: all but a column of the context
    target, context = (jnp.int32(3), jnp.int32(2)), (jnp.int32(3), jnp.int32(3))
    tries = jnp.zeros((60, 2), int)
    made = masks.place(both, target, tries, context, grid)
    # without either nothing of the 3 x 3 block is left; without the first a column of 3, which is
    # not more than 3; so all of it is shown
    assert made.context_present.sum() == 9
    made = masks.place(both, target, tries.at[7].set((1, 1)), context, grid)
    np.testing.assert_array_equal(made.context[:5], [7, 11, 13, 14, 15])  # the eighth try


def test_padding_changes_neither_the_loss_nor_the_gradient():
    """An image with as many tokens as it has, and one target block after the other."""
    method = methods.create(load("ijepa"))
    variables, grid, key = drawn(method), method.encoder.grid, jax.random.key(5)
    batch = {"image": batch_of(method, 0)["image"][:1], "position": np.arange(1)}
    blocks = jax.device_get(method.masks.draw(key, jnp.arange(1), grid))
    assert not blocks.context_present.all() and not blocks.targets_present.all()
    image = pixels.normalise(batch["image"], method.mean, method.std)
    places = blocks.context[blocks.context_present][None]
    encode, there = ViT(method.encoder).apply, jnp.ones((1, places.shape[1]), bool)

    @jax.value_and_grad
    def ours(params):
        return method.loss(params, variables.teacher, {}, batch, key, {}).loss

    @jax.value_and_grad
    def unpadded(params):
        target = encode({"params": variables.teacher["encoder"]}, image).patches[0]
        spread = jnp.sqrt(target.var(axis=1, keepdims=True) + 1e-5)
        target = (target - target.mean(axis=1, keepdims=True)) / spread
        seen = encode({"params": params["encoder"]}, image, keep=places).patches
        losses = []
        for block, inside in zip(blocks.targets[0], blocks.targets_present[0]):
            wanted = block[inside]
            made = Predictor(method.predictor, method.encoder.width).apply(
                {"params": params["predictor"]},
                *(seen, places, there, wanted[None, None], jnp.ones((1, 1, len(wanted)), bool)),
                grid,
            )
            gap = jnp.abs(made[0, 0] - target[wanted])
            losses.append(jnp.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
        return sum(losses) / len(losses)  # blocks of a step have one size

    (loss, gradient), (wanted, wanted_gradient) = (
        jax.jit(f)(variables.params) for f in (ours, unpadded)
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, wanted_gradient
    )


def test_the_teacher_is_an_average_of_the_encoder_whose_momentum_rises_linearly():
    method = methods.create(load("ijepa"))
    momentum = method.schedules(100, 8)["momentum"]
    np.testing.assert_allclose([momentum(k) for k in (0, 50, 100)], [0.98, 0.99, 1.0], rtol=1e-6)
    student = {"encoder": {"a": jnp.ones(2)}, "predictor": {"b": jnp.ones(2)}}
    teacher = method.update_teacher({"encoder": {"a": jnp.zeros(2)}}, student, {"momentum": 0.98})
    np.testing.assert_allclose(teacher["encoder"]["a"], 0.02, rtol=1e-5)
    assert set(teacher) == {"encoder"}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("masks.min_keep", 12, "min_keep = 12: a target of 4x4 patches"),
        ("masks.context_patches", 17, "there are 16 patches"),
        ("masks.target_scale", (0.2, 0.1), "must be \\(least, most\\)"),
        ("momentum", 1.5, "momentum = 1.5 must lie in"),
    ],
)
def test_a_config_that_cannot_be_is_refused(key, value, words):
    config = load("ijepa")
    config.method.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=words):
        methods.create(config)
