"""k-NN against a slow reference, and its rules for ties, clipping and choosing without test
labels."""

import os
import subprocess
import sys

import numpy as np
import pytest

from webssl_jax.evaluators.knn import KS, knn, leave_one_out, predict


def slow_knn(train, labels, queries, classes, k, max_k, temperature=0.07):
    """DINOv2's vote, one query at a time in float64."""
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    out = []
    for query in queries.astype(np.float64):
        similarity = np.array([unit(query) @ unit(row) for row in train.astype(np.float64)])
        order = np.argsort(-similarity, kind="stable")[:max_k]
        weights = np.exp(similarity[order] / temperature)
        weights /= weights.sum()
        votes = np.zeros(classes)
        for row, weight in zip(order[:k], weights[:k], strict=True):
            votes[labels[row]] += weight
        out.append(votes.argmax())
    return np.array(out)


@pytest.fixture(scope="module")
def clusters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 390)
    centres = rng.normal(size=(5, 24))
    x = (centres[labels] + 1.5 * rng.normal(size=(390, 24))).astype(np.float32)
    return x[:300], labels[:300], x[300:], labels[300:]


def test_predictions_equal_a_slow_reference_for_every_k(clusters):
    train, labels, queries, _ = clusters
    fast = predict(train, labels, queries, 5, KS, chunk=32)
    for k in KS:
        np.testing.assert_array_equal(
            fast[k], slow_knn(train, labels, queries, 5, k, max(KS)), err_msg=f"k={k}"
        )


def test_chunk_size_does_not_change_the_answer(clusters):
    train, labels, queries, _ = clusters
    for chunk in (1, 7, 90, 1000):
        np.testing.assert_array_equal(
            predict(train, labels, queries, 5, (10,), chunk=chunk)[10],
            predict(train, labels, queries, 5, (10,))[10],
        )


def test_equal_votes_go_to_the_lower_class_and_equal_similarities_to_the_earlier_row():
    train = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    query = np.array([[2, 0]], np.float32)
    assert predict(train, np.array([3, 1, 0, 0]), query, 4, (1,))[1] == [3]
    assert predict(train, np.array([3, 1, 0, 2]), query, 4, (3,))[3] == [1]


def test_length_of_a_feature_does_not_matter(clusters):
    train, labels, queries, _ = clusters
    scale = np.random.default_rng(1).uniform(0.1, 10, (len(train), 1)).astype(np.float32)
    np.testing.assert_array_equal(
        predict(train * scale, labels, queries * 7, 5, (20,))[20],
        predict(train, labels, queries, 5, (20,))[20],
    )


def test_k_is_clipped_to_the_number_of_training_images():
    rng = np.random.default_rng(0)
    x = {"cls": rng.normal(size=(12, 3)).astype(np.float32)}
    labels = np.arange(12) % 3
    score = knn(x, labels, x, labels, 3)
    assert set(score.by_variant) == {
        f"{space}/top1@{k}" for space in ("cls", "cls_whitened") for k in (10, 12)
    }
    assert score.chosen.endswith(", k = 12")


def test_leave_one_out_does_not_let_an_image_vote_for_itself():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 16)).astype(np.float32)
    labels = rng.integers(0, 4, 400)
    assert predict(noise, labels, noise, 4, (1,))[1].tolist() == labels.tolist()
    assert leave_one_out(noise, labels, 4, k=1) < 0.4


def test_leave_one_out_does_not_let_twins_vote_for_each_other():
    rng = np.random.default_rng(0)
    noise, labels = (
        np.repeat(rng.normal(size=(200, 16)), 3, axis=0),
        np.repeat(rng.integers(0, 4, 200), 3),
    )
    assert leave_one_out(noise, labels, 4, k=2) > 0.95
    assert leave_one_out(noise, labels, 4, groups=np.arange(600) // 3, k=2) < 0.4


def test_the_headline_feature_is_chosen_without_test_labels(clusters):
    train, labels, queries, truth = clusters
    rng = np.random.default_rng(3)
    sets = [
        {"cls": rng.normal(size=x.shape).astype(np.float32), "patches": x} for x in (train, queries)
    ]
    score = knn(sets[0], labels, sets[1], truth, 5)
    wrong = knn(sets[0], labels, sets[1], rng.permutation(truth), 5)
    assert score.chosen == wrong.chosen == "patches, k = 20"
    assert score.top1 == score.by_variant["patches/top1@20"] > score.by_variant["cls/top1@20"]


_UNDER_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from webssl_jax.evaluators.base import on_one_device
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
with jax.set_mesh(mesh):
    assert jax.jit(jnp.dot)(x, x.T).sharding.num_devices == 4  # the trap
    with on_one_device():
        assert jax.jit(jnp.dot)(x, x.T).sharding.num_devices == 1
        assert jax.config.jax_default_matmul_precision == "highest"
    assert jax.sharding.get_mesh() == mesh
"""


def test_a_training_mesh_around_it_does_not_spread_it_over_devices():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_A_MESH], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
