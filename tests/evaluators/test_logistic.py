"""Logistic regression over eight devices: reaches the optimum, finds what is there, finds nothing
where nothing is, and never looks at test labels to choose."""

import time

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from tests.evaluators.problems import blobs, problem_of
from webssl_jax.evaluators import sharded
from webssl_jax.evaluators.features import Rows
from webssl_jax.evaluators.probes import logistic
from webssl_jax.sharding import mesh as meshes


def evaluate(train, y, test, truth, classes):
    problem = problem_of(y, truth, classes)
    return logistic.evaluate(problem, train, test)


def logits_of(x, y, queries, classes, penalties, **more):
    """(P, m, classes), of rows over eight devices."""
    with sharded.exact():
        head = logistic.fit(sharded.on_rows(x), y, classes, penalties, **more)
        rotated = sharded.apply_scaling(head.scaling, sharded.everywhere(queries)) @ head.basis
        scores = np.tensordot(np.asarray(rotated), np.asarray(head.weights), axes=1) + head.bias
    return np.moveaxis(np.asarray(scores), 1, 0)


def slow_fit(x, y, queries, classes, penalty):
    """Logits by plain gradient descent, in float64."""
    scale = lambda a: ((a - x.mean(0)) / x.std(0) / np.sqrt(x.shape[1])).astype(np.float64)  # noqa: E731
    z = scale(x)
    w, b = np.zeros((x.shape[1], classes)), np.zeros(classes)
    for _ in range(5000):
        logits = z @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True) - np.eye(classes)[y]) / len(y)
        w, b = w - 2.0 * (z.T @ p + penalty * w), b - 1.0 * p.sum(0)
    return scale(queries) @ w + b


def assert_same_logits(found, wanted, **tolerance):
    """softmax is blind to a common shift"""
    centred = [a - a.mean(-1, keepdims=True) for a in (found, wanted)]
    np.testing.assert_allclose(*centred, **tolerance)


def test_separable_classes_are_separated():
    x, y = blobs(600, 4, 16, spread=0.2)
    found = evaluate({"cls": x[:400]}, y[:400], {"cls": x[400:]}, y[400:], 4)
    assert found.metrics["top1"] > 0.99


def test_noise_stays_at_chance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1200, 16)).astype(np.float32), rng.integers(0, 4, 1200)
    found = evaluate({"cls": x[:400]}, y[:400], {"cls": x[400:]}, y[400:], 4)
    assert abs(found.metrics["top1"] - 0.25) < 4 * found.se("top1")


@pytest.mark.parametrize("held_out", [False, True])
def test_the_solver_reaches_the_optimum_of_the_penalised_problem(held_out):
    """301 rows do not divide over eight devices; rows held out stay on them, with no say."""
    x, y = blobs(301, 4, 10, spread=1.5)
    kept = np.arange(301)
    if held_out:
        kept = np.sort(np.random.default_rng(0).permutation(301)[:240])
        x[~np.isin(np.arange(301), kept)] += 50  # would pull mean, scale and weights far away
    expected = slow_fit(x[kept], y[kept], x, 4, 1e-3)
    given = {"kept": kept} if held_out else {}
    (ours,) = logits_of(x, y, x, 4, (1e-3,), rules=logistic.Rules(iterations=300), **given)
    assert_same_logits(ours[kept], expected[kept], atol=2e-3)


def test_dinov2_s_protocol_minimises_the_sum_over_features_as_they_are():
    """C * the sum of cross-entropies + |W|^2 / 2, by scipy's L-BFGS in float64."""
    x, y = blobs(200, 3, 5, spread=1.0)
    x = x * 3 + 1
    rules = logistic.RULES["dinov2"]
    assert len(rules.strengths) == 45 and rules.strengths[0] == 1e-6
    assert rules.strengths[-1] == pytest.approx(1e5)
    c = 0.01
    (ours,) = logits_of(x, y, x, 3, (1 / (c * 200),), rules=rules)

    def objective(flat):
        w, b = flat[:15].reshape(5, 3), flat[15:]
        logits = x.astype(np.float64) @ w + b
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        excess = c * (np.exp(log_p) - np.eye(3)[y])
        grad = np.concatenate([(x.T @ excess + w).ravel(), excess.sum(0)])
        return -c * log_p[np.arange(200), y].sum() + (w**2).sum() / 2, grad

    solved = minimize(objective, np.zeros(18), jac=True, tol=1e-12).x
    wanted = x @ solved[:15].reshape(5, 3) + solved[15:]
    assert_same_logits(ours, wanted, atol=2e-3)


def test_predictions_are_the_largest_logits_of_real_rows():
    x, y = blobs(301, 4, 10, spread=1.5)
    with sharded.exact():
        rows = sharded.on_rows(x)
        found = logistic.predict(logistic.fit(rows, y, 4, (1e-4, 1e-3)), rows, 301)
    assert found.shape == (2, 301)
    logits = logits_of(x, y, x, 4, (1e-4, 1e-3))
    clear = np.diff(np.sort(logits)[..., -2:])[..., 0] > 1e-4
    assert clear.mean() > 0.98 and (found == logits.argmax(-1))[clear].all()


def test_a_grid_of_penalties_gives_what_each_gives_alone():
    x, y = blobs(301, 4, 10, spread=1.0)
    grid = logits_of(x, y, x, 4, (1e-4, 1e-2))
    for i, penalty in enumerate((1e-4, 1e-2)):
        alone = logits_of(x, y, x, 4, (penalty,))[0]
        np.testing.assert_allclose(grid[i], alone, atol=1e-3)


def test_more_features_than_images_and_constant_features_are_no_problem():
    x, y = blobs(60, 3, 200, spread=0.5)
    x[:, 7] = 1234.567
    (logits,) = logits_of(x[:40], y[:40], x[40:], 3, (1e-4,))
    assert np.isfinite(logits).all()
    assert (logits.argmax(1) == y[40:]).mean() > 0.9


def test_scale_and_offset_of_a_feature_do_not_matter():
    x, y = blobs(301, 4, 10, spread=1.0)
    moved = x * np.linspace(0.01, 100, 10, dtype=np.float32) + 5
    np.testing.assert_allclose(
        logits_of(moved, y, moved, 4, (1e-3,)), logits_of(x, y, x, 4, (1e-3,)), atol=2e-2
    )


def test_the_head_is_chosen_without_test_labels():
    x, y = blobs(600, 4, 16, spread=2.0)
    noise = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    train, test = ({"cls": noise[s], "patches": x[s]} for s in (slice(0, 400), slice(400, 600)))
    first = evaluate(train, y[:400], test, y[400:], 4)
    shuffled = np.random.default_rng(1).permutation(y[400:])
    assert first.chosen == evaluate(train, y[:400], test, shuffled, 4).chosen
    assert first.chosen["top1"].startswith("patches, penalty ")
    assert first.metrics["top1"] == pytest.approx(first.metrics["patches_top1"])
    assert first.metrics["top1"] > first.metrics["cls_top1"]
    assert "200 test images" in first.meaning and "400 images" in first.meaning


def test_the_same_images_give_the_same_figures_also_from_parts_on_disk():
    x, y = blobs(600, 4, 16, spread=2.0)
    one = evaluate({"cls": x[:400]}, y[:400], {"cls": x[400:]}, y[400:], 4)
    parts = [{"cls": Rows(tuple(np.split(rows, [33, 90])))} for rows in (x[:400], x[400:])]
    two = evaluate(parts[0], y[:400], parts[1], y[400:], 4)
    np.testing.assert_array_equal(one.items["top1"], two.items["top1"])
    assert one.chosen == two.chosen and one.metrics == two.metrics


def test_of_penalties_the_largest_within_a_standard_error_of_the_best_is_chosen(monkeypatch):
    """Of eight penalties whose held-out accuracies are set here; 100 of 500 rows are held out."""
    accuracies = np.array([0.50, 0.60, 0.70, 0.68, 0.678, 0.60, 0.69, 0.3])
    asked, labels = [], np.zeros(500, np.int64)

    def predicted(head, x, n):
        kept = asked[-1]
        held_out = np.setdiff1d(np.arange(n), kept)
        out = np.ones((8, n), np.int64)  # the wrong class
        for row, accuracy in zip(out, accuracies):
            row[held_out[: round(accuracy * len(held_out))]] = 0
            row[kept] = 0  # must not count
        return out

    monkeypatch.setattr(logistic, "fit", lambda x, y, c, penalties, kept, rules: asked.append(kept))
    monkeypatch.setattr(logistic, "predict", predicted)
    penalty, accuracy = logistic.choose_penalty(None, labels, 2, np.arange(500))
    assert penalty == logistic.PENALTIES[6] and accuracy == pytest.approx(0.69)
    assert len(asked) == logistic.SPLITS and all(len(kept) == 400 for kept in asked)
    assert len({tuple(kept) for kept in asked}) == logistic.SPLITS


def test_variants_join_the_blocks_that_dinov2_joins():
    n, d, blocks = 3, 4, (2, 3, 4, 5)
    names = ["cls", "patches"]
    names += [f"{kind}@{block}" for kind in ("cls", "patches") for block in blocks]
    stored = {name: Rows((np.full((n, d), i, np.float32),)) for i, name in enumerate(names)}
    out = {
        name: logistic.Joined(tuple(stored[part] for part in parts))
        for name, parts in logistic.variants(blocks).items()
    }
    assert {name: x.shape[1] // d for name, x in out.items()} == {
        "cls": 1,
        "cls+patches": 2,
        "patches": 1,
        "cls_x4": 4,
        "cls_x4+patches": 5,
        "patches_x4": 4,
    }
    joined = out["cls_x4+patches"]
    assert joined[:][0, ::d].tolist() == [2, 3, 4, 5, 1]
    assert joined.pick(np.array([2, 0])).shape == (2, 20) and joined[np.array([1])].shape == (1, 20)
    assert set(logistic.variants((5,))) == {"cls", "cls+patches", "patches"}


def test_rows_lie_over_all_devices_and_nowhere_whole():
    with sharded.exact():
        rows = sharded.on_rows(np.arange(301 * 2, dtype=np.float32).reshape(301, 2), fill=-1)
    assert rows.shape == (304, 2) and len(rows.sharding.device_set) == 8
    assert {shard.data.shape for shard in rows.addressable_shards} == {(38, 2)}
    assert (meshes.whole(rows)[301:] == -1).all() and meshes.whole(rows)[300, 1] == 601


def test_a_variant_of_the_quick_start_takes_seconds():
    x, y = blobs(3500, 20, 128, spread=4.0)
    x = np.tile(x, 2)
    start = time.process_time()
    evaluate({"cls+patches": x[:2500]}, y[:2500], {"cls+patches": x[2500:]}, y[2500:], 20)
    # seconds of processor time over all cores; about 4, with half of it for compiling
    assert time.process_time() - start < 15
