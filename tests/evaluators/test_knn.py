"""k-NN over eight devices against a slow reference, and its rules for ties, groups, clipping and
choosing without test labels."""

import pathlib

import jax
import numpy as np
import pytest

from tests.evaluators.problems import blobs, problem_of
from webssl_jax.evaluators import sharded
from webssl_jax.evaluators.features import Rows
from webssl_jax.evaluators.probes import knn
from webssl_jax.evaluators.probes.knn import KS, Search


def slow_knn(train, labels, queries, classes, k, max_k, groups=None, own=None):
    """DINOv2's vote, one query at a time in float64."""
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    out = []
    for i, query in enumerate(queries.astype(np.float64)):
        similarity = np.array([unit(query) @ unit(row) for row in train.astype(np.float64)])
        if groups is not None:
            similarity[groups == own[i]] = -np.inf
        order = np.argsort(-similarity, kind="stable")[:max_k]
        weights = np.exp(similarity[order] / 0.07)
        weights /= weights.sum()
        votes = np.zeros(classes)
        for row, weight in zip(order[:k], weights[:k], strict=True):
            votes[labels[row]] += weight
        out.append(votes.argmax())
    return np.array(out)


def search(train, labels, classes, groups=None):
    labels = np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else groups
    return Search(sharded.on_rows(np.asarray(train, np.float32)), labels, groups, classes)


def predict(train, labels, queries, classes, ks=KS, groups=None, chunk=32, **more):
    with sharded.exact():
        return search(train, labels, classes, groups).predict(queries, ks, chunk=chunk, **more)


def leave_one_out(x, labels, classes, groups=None, k=20):
    x = np.asarray(x, np.float32)
    with sharded.exact():
        return search(x, labels, classes, groups).leave_one_out(x, k=k)


@pytest.fixture(scope="module")
def clusters():
    """301 training rows, which do not divide over eight devices, and 90 queries."""
    x, labels = blobs(391, 5, 24, spread=1.5)
    return x[:301], labels[:301], x[301:], labels[301:]


def test_predictions_over_eight_devices_equal_a_slow_reference_for_every_k(clusters):
    """A device has 38 rows, and the largest k is 200."""
    train, labels, queries, _ = clusters
    assert sharded.row_mesh().size == 8 and max(KS) > -(-len(train) // 8)
    fast = predict(train, labels, queries, 5)
    for k in KS:
        np.testing.assert_array_equal(
            fast[k], slow_knn(train, labels, queries, 5, k, max(KS)), err_msg=f"k={k}"
        )


def test_features_that_lie_on_disk_in_parts_are_searched_and_asked_alike(clusters):
    train, labels, queries, _ = clusters
    cut = lambda x, at: Rows((x[:at], x[at:]))  # noqa: E731
    with sharded.exact():
        bank = sharded.on_rows(cut(train, 100))
        on_disk = Search(bank, labels, np.arange(301), 5).predict(cut(queries, 7), KS, chunk=32)
    np.testing.assert_array_equal(on_disk[10], predict(train, labels, queries, 5)[10])


def test_shares_of_votes_and_accuracies_are_those_of_dinov2():
    """The weights add up to 1 over all 60 neighbours, so fewer have less than the whole."""
    z = np.load(pathlib.Path(__file__).parent / "golden" / "j_probes.npz")
    train, test = (
        z[f"knn/{x}"] / np.linalg.norm(z[f"knn/{x}"], axis=1, keepdims=True)
        for x in ("train", "test")
    )
    labels, truth = z["knn/train_labels"], z["knn/test_labels"]
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1)[:, :60]
    found = knn.shares(np.take_along_axis(similarity, nearest, axis=1), labels[nearest], (5, 20), 6)
    for ours, k in zip(found, (5, 20), strict=True):
        np.testing.assert_allclose(ours, z[f"knn/probs_k{k}"], atol=1e-5, rtol=1e-5)
    said = predict(z["knn/train"], labels, z["knn/test"], 6, (5, 20, 60))
    assert [(said[k] == truth).mean() for k in (5, 20)] == pytest.approx([0.9285714] * 2)


def test_few_shots_are_drawn_from_each_class_and_only_they_vote(clusters):
    train, labels, queries, truth = clusters
    drawn = knn.draw(labels, 3, seed=1)
    assert np.bincount(labels[drawn]).tolist() == [3] * 5 and (np.diff(drawn) > 0).all()
    problem = problem_of(labels, truth, 5)
    options = knn.KNNOptions("x", "y", shots=(3, 1000), tries=2)
    found = knn.few_shot(problem, {"cls": train}, {"cls": queries}, "cls, k = 20", options)
    by_hand = []
    for seed in range(2):
        rows = knn.draw(labels, 3, seed)
        by_hand.append((slow_knn(train[rows], labels[rows], queries, 5, 10, 15) == truth).mean())
    assert found["3_shot_top1_k10"] == pytest.approx(np.mean(by_hand))
    whole = knn.evaluate(problem, {"cls": train}, {"cls": queries}).metrics
    assert found["1000_shot_top1_k20"] == pytest.approx(whole["cls_top1_k20"])


def test_chunk_size_does_not_change_the_answer(clusters):
    train, labels, queries, _ = clusters
    wanted = predict(train, labels, queries, 5)[10]
    for chunk in (1, 1000):
        found = predict(train, labels, queries, 5, chunk=chunk)[10]
        np.testing.assert_array_equal(found, wanted)


def test_equal_votes_go_to_the_lower_class_and_equal_similarities_to_the_earlier_row():
    train = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    query = np.array([[2, 0]], np.float32)
    assert predict(train, [3, 1, 0, 0], query, 4, (1,))[1] == [3]
    assert predict(train, [3, 1, 0, 2], query, 4, (3,))[3] == [1]
    # The same over all devices: row 5 is the first of ten equal ones, which lie on six of them.
    train = np.repeat(np.eye(2, dtype=np.float32)[::-1], (5, 10), axis=0)
    labels = np.array([0] * 5 + [3, 2, 2, 1, 1, 1, 2, 3, 3, 3])
    found = predict(train, labels, query, 4, (1, 3))
    assert found[1] == [3] and found[3] == [2]


def test_rows_of_a_query_s_own_group_do_not_vote(clusters):
    train, labels, _, _ = clusters
    groups = np.random.default_rng(0).integers(0, 60, 301)
    found = predict(train, labels, train, 5, groups=groups, query_groups=groups)
    for k in (10, 100):
        wanted = slow_knn(train, labels, train, 5, k, max(KS), groups, groups)
        np.testing.assert_array_equal(found[k], wanted)


def test_rows_that_fill_up_the_devices_do_not_vote():
    """Nine rows on eight devices, filled up with what lies closest to the query."""
    train = np.eye(9, dtype=np.float32) + 0.1
    query = np.full((1, 9), 3, np.float32)
    with sharded.exact():
        bank = sharded.on_rows(train, fill=3.0)
        assert bank.shape == (16, 9)
        found = Search(bank, np.full(9, 2), np.arange(9), 4).predict(query, (1, 9))
    assert found[1] == [2] and found[9] == [2]


def test_length_of_a_feature_does_not_matter(clusters):
    train, labels, queries, _ = clusters
    scale = np.random.default_rng(1).uniform(0.1, 10, (len(train), 1)).astype(np.float32)
    np.testing.assert_array_equal(
        predict(train * scale, labels, queries * 7, 5)[20], predict(train, labels, queries, 5)[20]
    )


def test_k_is_clipped_to_the_number_of_training_images():
    x = {"cls": np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)}
    labels = np.arange(12) % 3
    found = knn.evaluate(problem_of(labels, labels, 3), x, x)
    assert set(found.metrics) == {"top1", "top1_se"} | {
        f"{space}_top1_k{k}" for space in ("cls", "cls_whitened") for k in (10, 12)
    }
    assert found.chosen["top1"].endswith(", k = 12")


def test_leave_one_out_does_not_let_an_image_vote_for_itself():
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(400, 16)), rng.integers(0, 4, 400)
    assert predict(noise, labels, noise, 4, (1,))[1].tolist() == labels.tolist()
    assert leave_one_out(noise, labels, 4, k=1) < 0.4


def test_leave_one_out_does_not_let_twins_vote_for_each_other():
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.normal(size=(200, 16)), 3, axis=0)
    labels = np.repeat(rng.integers(0, 4, 200), 3)
    assert leave_one_out(noise, labels, 4, k=2) > 0.95
    assert leave_one_out(noise, labels, 4, groups=np.arange(600) // 3, k=2) < 0.4


def test_the_headline_feature_is_chosen_without_test_labels(clusters):
    train, labels, queries, truth = clusters
    rng = np.random.default_rng(3)
    sets = [
        {"cls": rng.normal(size=x.shape).astype(np.float32), "patches": x} for x in (train, queries)
    ]
    found = knn.evaluate(problem_of(labels, truth, 5), *sets)
    wrong = knn.evaluate(problem_of(labels, rng.permutation(truth), 5), *sets)
    assert found.chosen == wrong.chosen == {"top1": "patches, k = 20"}
    top1 = found.metrics["top1"]
    assert top1 == pytest.approx(found.metrics["patches_top1_k20"])
    assert top1 > found.metrics["cls_top1_k20"]
    assert found.items["top1"].mean() == pytest.approx(top1) and len(found.items["top1"]) == 90
    assert "90 test images" in found.meaning and "301 training images" in found.meaning


def test_a_training_mesh_around_it_changes_nothing(clusters):
    train, labels, queries, _ = clusters
    wanted = predict(train, labels, queries, 5)[20]
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(predict(train, labels, queries, 5)[20], wanted)
        with sharded.exact():
            assert jax.config.jax_default_matmul_precision == "highest"
            assert sharded.on_rows(train).sharding.num_devices == 8
        assert jax.sharding.get_mesh() == mesh
    assert jax.config.jax_default_matmul_precision != "highest"
