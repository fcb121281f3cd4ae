"""Losses, centring and head of DINOv2 against vectors of its own PyTorch code (golden/, float32).

Measured gaps are relative to the largest value of a tensor.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import params as paths
from webssl_jax.methods import losses
from webssl_jax.methods.dino import prototypes
from webssl_jax.models.heads import Head, HeadConfig, Scores

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "b_dinov2_losses.npz")
IBOT_LOSS = 19.146162033081055  # b_dinov2_losses.json, as are the other scalars
PADDED_IBOT_LOSS = 49.96364974975586
DINO_LOSS = 187.43411254882812
CHUNKS = (0, 16)  # prototypes at a time; 0: all
KOLEO = {
    "random": -0.18021126091480255,
    "clustered": 6.748349189758301,
    "duplicates": 16.525033950805664,
    "two_rows": -0.4512018859386444,
}


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def scores(logits):
    """Scores that come to just these logits."""
    return Scores(jnp.asarray(logits), jnp.eye(logits.shape[-1]))


def fixed(targets):
    """Targets that come to just these, (R, K)."""
    zeros = jnp.zeros(targets.shape[0]), jnp.zeros(targets.shape[1])
    return prototypes.Targets(scores(np.log(targets)), 1.0, *zeros)


def sinkhorn(logits, temperature, **options):
    return np.exp(prototypes.sinkhorn_knopp(scores(logits), temperature, **options).logs())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("iterations, temperature", [(3, 0.07), (1, 0.07), (3, 0.04)])
def test_sinkhorn_equals_the_original(iterations, temperature, chunk):
    name = f"dino_sinkhorn/it{iterations}_t{temperature}"
    logits = GOLDEN[f"{name}/teacher_out"]
    ours = sinkhorn(logits, temperature, iterations=iterations, chunk=chunk)
    close(ours, GOLDEN[f"{name}/probs"])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_padding_takes_no_part_in_sinkhorn(chunk):
    logits = GOLDEN["ibot/sinkhorn_in"]
    padded = np.concatenate([logits[:5], np.full((4, 64), 50, np.float32), logits[5:]])
    valid = np.r_[np.ones(5), np.zeros(4), np.ones(13)] > 0
    ours = sinkhorn(padded, 0.07, valid=valid, chunk=chunk)
    assert not ours[~valid].any()
    close(ours[valid], GOLDEN["ibot/sinkhorn_probs"])
    assert not sinkhorn(padded, 0.07, valid=np.zeros(22, bool), chunk=chunk).any()
    # the original cuts padding off before it calls; what it is given all takes part
    ours = sinkhorn(GOLDEN["ibot/sinkhorn_padded_in"], 0.07)
    close(ours, GOLDEN["ibot/sinkhorn_padded_probs"])


def test_sinkhorn_does_not_overflow_and_reaches_prototypes_that_are_far_from_all():
    logits = np.zeros((4, 3), np.float32)
    logits[:, 0], logits[:, 2] = 100, -100
    # Rows that are all alike get equal shares of everything.
    np.testing.assert_allclose(sinkhorn(logits, 0.04), np.full((4, 3), 1 / 3), rtol=1e-3)
    shifted = sinkhorn(GOLDEN["ibot/sinkhorn_in"] + 1000, 0.07)
    np.testing.assert_allclose(shifted, GOLDEN["ibot/sinkhorn_probs"], rtol=5e-3)  # +1000 rounds


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_the_centre_is_applied_one_step_late_as_in_the_original(kind, chunk):
    name = {"dino": "teacher_out", "ibot": "teacher_tokens"}[kind]
    centre, rounds = jnp.zeros(64), {"dino": 3, "ibot": 2}[kind]
    for i in range(rounds):
        given = scores(GOLDEN[f"{kind}_center/round{i}/{name}"].reshape(-1, 64))
        ours = prototypes.centred_softmax(given, centre, 0.05, chunk=chunk)
        theirs = GOLDEN[f"{kind}_center/round{i}/probs_temp0.05"].reshape(-1, 64)
        close(np.exp(ours.logs()), theirs, 1e-5)  # of exponents over 64 a last bit is 8e-6
        rows = len(given.features)
        centre = prototypes.next_centre(centre, given, jnp.full(rows, 1 / rows), 0.9)
    close(centre, GOLDEN[f"{kind}_center/final_center"].ravel())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_dino_loss_and_its_gradients_equal_the_original(chunk):
    student = np.stack([GOLDEN[f"dino_forward/student{i}"] for i in range(4)], axis=1)
    teacher = np.stack([GOLDEN[f"dino_forward/teacher{i}"] for i in range(2)], axis=1)
    targets = fixed(teacher.reshape(-1, 64))

    def loss(student):  # the original adds up the pairs, each the mean over images
        pairs = prototypes.cross_entropies(targets, scores(student), 0.1, chunk=chunk)
        return pairs.mean(axis=0).sum()

    value, grad = jax.value_and_grad(loss)(student)
    assert float(value) == pytest.approx(DINO_LOSS, rel=1e-6)
    for i in range(4):
        close(grad[:, i], GOLDEN[f"dino_forward/grad{i}"])


def ibot_loss(targets, student, weights, crops, chunk=0):
    rows = prototypes.cross_entropies(fixed(targets), scores(student[:, None]), 0.1, chunk=chunk)
    return losses.masked_patch_loss(rows.reshape(-1), weights, crops)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_ibot_loss_and_its_gradients_equal_the_original(chunk):
    masks = GOLDEN["ibot/masks"]
    weights = (masks / masks.sum(axis=1, keepdims=True).clip(1))[masks]
    teacher = GOLDEN["ibot/teacher_masked"]

    def loss(student):
        return ibot_loss(teacher, student, weights, len(masks), chunk)

    value, grad = jax.value_and_grad(loss)(GOLDEN["ibot/student_masked"])
    assert float(value) == pytest.approx(IBOT_LOSS, rel=1e-6)
    close(grad, GOLDEN["ibot/grad_masked"])
    dense = np.zeros_like(GOLDEN["ibot/grad_dense"])
    dense[masks] = grad
    close(dense, GOLDEN["ibot/grad_dense"])


def test_padding_changes_neither_the_ibot_loss_nor_its_gradient():
    masks, padding = GOLDEN["ibot/masks"], np.zeros(5, np.float32)
    weights = np.r_[GOLDEN["ibot/masks_weight"], padding]
    teacher, student = GOLDEN["ibot/padded_teacher"], GOLDEN["ibot/padded_student"].copy()

    def loss(student):
        return ibot_loss(teacher, student, weights, len(masks))

    value, grad = jax.value_and_grad(loss)(student)
    assert float(value) == pytest.approx(PADDED_IBOT_LOSS, rel=1e-6)
    student[18:] = 1e4
    assert float(loss(student)) == float(value) and not np.asarray(grad)[18:].any()


@pytest.mark.parametrize("case", KOLEO)
def test_koleo_and_its_gradient_equal_the_original(case):
    x = GOLDEN[f"koleo/{case}/x"]
    value, grad = jax.value_and_grad(lambda x: losses.koleo(x[None]))(x)
    assert np.isfinite(grad).all()
    if case == "clustered":
        # Dot products of rows 1e-3 apart differ by the rounding of float32, so which row is nearest
        # is chance there, in the original too: in float64 the loss is 6.7678.
        assert float(value) == pytest.approx(KOLEO[case], rel=5e-3)
        return
    assert float(value) == pytest.approx(KOLEO[case], rel=2e-6)
    if case != "duplicates":  # the gradient of a distance of zero is all rounding
        close(grad, GOLDEN[f"koleo/{case}/grad"], 1e-5)


def test_koleo_looks_for_neighbours_within_a_group_only():
    a = GOLDEN["koleo/random/x"]
    assert float(losses.koleo(np.stack([a, a]))) == pytest.approx(KOLEO["random"], rel=2e-6)
    assert float(losses.koleo(np.concatenate([a, a])[None])) > 10  # now each row has a twin


@pytest.mark.parametrize("layers", [1, 3])
def test_the_head_and_its_gradients_equal_the_original(layers):
    name = f"head/l{layers}"
    head = Head(HeadConfig(prototypes=64, bottleneck=16, hidden=48, layers=layers))

    def ours(prefix):
        tree = {
            "last_layer/g": GOLDEN[f"{prefix}/last_layer.weight_g"].T,
            "last_layer/v": GOLDEN[f"{prefix}/last_layer.weight_v"].T,
        }
        for i in range(layers):
            key = f"{prefix}/mlp.{2 * i}" if layers > 1 else f"{prefix}/mlp"
            tree[f"fc{i + 1}/kernel"] = GOLDEN[f"{key}.weight"].T
            tree[f"fc{i + 1}/bias"] = GOLDEN[f"{key}.bias"]
        return paths.unflatten(tree)

    tree, x = ours(f"{name}/sd"), GOLDEN[f"{name}/x"]
    y, pull = jax.vjp(lambda tree, x: head.apply({"params": tree}, x).logits(), tree, x)
    close(y, GOLDEN[f"{name}/y"])
    grads, grad_x = pull(jnp.asarray(GOLDEN[f"{name}/cotangent"]))
    close(grad_x, GOLDEN[f"{name}/grad_x"], 1e-5)
    theirs = paths.flatten(ours(f"{name}/grad"))
    for path, grad in paths.flatten(grads).items():
        close(grad, theirs[path], 1e-5)


def test_a_fresh_head_has_the_original_s_initial_values():
    head = Head(HeadConfig(prototypes=4096, bottleneck=64, hidden=128))
    tree = head.init(jax.random.key(0), jnp.zeros((1, 96)))["params"]
    assert (tree["last_layer"]["g"] == 1).all() and tree["last_layer"]["g"].shape == (1, 4096)
    assert float(jnp.abs(tree["last_layer"]["v"]).max()) == pytest.approx(1 / 8, rel=1e-3)
    assert float(tree["fc2"]["kernel"].std()) == pytest.approx(0.02, rel=0.03)
    assert not tree["fc3"]["bias"].any() and tree["fc3"]["kernel"].shape == (128, 64)


@pytest.mark.parametrize("width, dino, ibot", [(1024, 57.55, 40.51), (4096, 63.84, 46.80)])
def test_paper_heads_have_the_original_s_number_of_parameters(width, dino, ibot):
    for bottleneck, millions in ((384, dino), (256, ibot)):
        head = Head(HeadConfig(prototypes=131072, bottleneck=bottleneck))
        shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, width)))
        assert paths.count(shapes) / 1e6 == pytest.approx(millions, abs=0.006)
