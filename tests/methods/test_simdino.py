"""SimDINOv2's losses are those of the original, and its figures are bounded as the signs say."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax.methods.losses import masked_patch_loss
from webssl_jax.methods.simdino.losses import agreement, coding_rate, patch_cosines, rate_limits
from webssl_jax.models.batch_norm_mlp import MlpConfig
from webssl_jax.models.heads import Projector

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "simdino_losses.npz")
# (loss, agreement, coding rate) of the original, in one process
EXPECTED = {
    "wide/v2": (-2.081456422805786, -0.006997785996645689, 2.088454246520996),
    "wide/v2_students": (-2.670006513595581, -0.006997785996645689, 2.677004337310791),
    "tall/v1eps": (-0.4155443608760834, -0.017146000638604164, 0.4326903522014618),
    "tall/coeff2": (-1.4742650985717773, -0.017146000638604164, 1.5085570812225342),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_agreement_and_rate_with_their_gradients_are_the_originals(case):
    shape, variant = case.split("/")
    student, teacher = (
        jnp.asarray(GOLDEN[f"{shape}/{x}"].swapaxes(0, 1)) for x in ("student", "teacher")
    )
    eps, weight = (0.5 if variant == "v1eps" else 0.05), (2.0 if variant == "coeff2" else 1.0)

    def loss(student):
        spread = student[:, : teacher.shape[1]]
        if variant != "v2_students":
            spread = (spread + teacher) / 2
        parts = agreement(student, teacher), coding_rate(spread, eps)
        return -weight * parts[0] - parts[1], parts

    (total, parts), gradient = jax.value_and_grad(loss, has_aux=True)(student)
    np.testing.assert_allclose((total, *parts), EXPECTED[case], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.swapaxes(0, 1), GOLDEN[f"{case}/grad"], atol=1e-5)


def test_masked_patches_and_the_projector_are_the_originals():
    masks = GOLDEN["patch/masks"]
    weights = (masks / masks.sum(axis=1, keepdims=True))[masks]

    def normed(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss(student):
        rows = patch_cosines(normed(student), normed(GOLDEN["patch/teacher"]))
        return masked_patch_loss(rows, weights, len(masks))

    value, gradient = jax.value_and_grad(loss)(GOLDEN["patch/student"])
    np.testing.assert_allclose(value, 0.005354892462491989, rtol=1e-4)
    np.testing.assert_allclose(gradient, GOLDEN["patch/grad"], atol=1e-5)
    params = {
        f"fc{i + 1}": {
            "kernel": GOLDEN[f"head/sd/mlp.{2 * i}.weight"].T,
            "bias": GOLDEN[f"head/sd/mlp.{2 * i}.bias"],
        }
        for i in range(3)
    }
    made = Projector(MlpConfig(24, 8, 3)).apply({"params": params}, GOLDEN["head/x"])
    np.testing.assert_allclose(made, normed(GOLDEN["head/y"]), atol=1e-5)


def test_parts_of_a_batch_have_rates_of_their_own_whose_factors_count_it_whole():
    """As on two devices of the original: I + E / (m W eps) Z^T Z of each device's m images."""
    x = np.random.default_rng(0).standard_normal((8, 2, 4)).astype(np.float32)
    wanted = 0.0
    for part in (x[:4], x[4:]):
        for view in range(2):
            z = part[:, view].astype(np.float64)
            wanted += np.linalg.slogdet(np.eye(4) + 4 / (8 * 0.05) * z.T @ z)[1] / 2 / 4
    wanted *= (4 + 8) / (4 * 8)
    np.testing.assert_allclose(coding_rate(jnp.asarray(x), 0.05, groups=2), wanted, rtol=1e-5)


@pytest.mark.parametrize("images, channels, groups", [(8, 4, 1), (4, 8, 1), (8, 4, 2)])
def test_the_least_rate_is_that_of_one_point_and_the_most_of_even_directions(
    images, channels, groups
):
    least, most = rate_limits(images, channels, 0.05, groups)
    one = np.zeros((images, 1, channels), np.float32)
    one[..., 0] = 1
    even = np.eye(channels, dtype=np.float32)[np.arange(images) % channels][:, None]
    for x, wanted in ((one, least), (even, most)):
        np.testing.assert_allclose(coding_rate(jnp.asarray(x), 0.05, groups), wanted, rtol=1e-5)
