"""The probe: finds what is there, finds nothing where nothing is, and never looks at test labels to
choose."""

import time

import numpy as np

from webssl_jax.evaluators import linear


def blobs(n, classes, d, spread, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = rng.normal(size=(classes, d))
    return (centres[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels


def test_separable_classes_are_separated():
    x, y = blobs(600, 5, 32, spread=0.2)
    score = linear.probe({"cls": x[:400]}, y[:400], {"cls": x[400:]}, y[400:], 5)
    assert score.top1 > 0.99


def test_noise_stays_at_chance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1200, 32)).astype(np.float32), rng.integers(0, 4, 1200)
    score = linear.probe({"cls": x[:400]}, y[:400], {"cls": x[400:]}, y[400:], 4)
    assert abs(score.top1 - 0.25) < 4 * score.se


def test_the_solver_reaches_the_optimum_of_the_penalised_problem():
    x, y = blobs(300, 4, 10, spread=1.5)
    penalty = 1e-3
    z = (x - x.mean(0)) / x.std(0) / np.sqrt(x.shape[1])
    z = z.astype(np.float64)
    w, b = np.zeros((10, 4)), np.zeros(4)
    for _ in range(20000):  # plain gradient descent, float64
        logits = z @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True) - np.eye(4)[y]) / len(y)
        w, b = w - 2.0 * (z.T @ p + penalty * w), b - 1.0 * p.sum(0)
    expected = z @ w + b
    ours = linear.fit_and_apply(x, y, x, 4, (penalty,), iterations=300)[0]
    # softmax is blind to a common shift
    centred = [a - a.mean(1, keepdims=True) for a in (ours, expected)]
    np.testing.assert_allclose(centred[0], centred[1], atol=2e-3)


def test_a_grid_of_penalties_gives_what_each_gives_alone():
    x, y = blobs(200, 3, 12, spread=1.0)
    grid = linear.fit_and_apply(x, y, x, 3, (1e-4, 1e-2))
    for i, penalty in enumerate((1e-4, 1e-2)):
        np.testing.assert_allclose(
            grid[i], linear.fit_and_apply(x, y, x, 3, (penalty,))[0], atol=1e-3
        )


def test_more_features_than_images_and_constant_features_are_no_problem():
    x, y = blobs(60, 3, 200, spread=0.5)
    x[:, 7] = 1234.567
    logits = linear.fit_and_apply(x[:40], y[:40], x[40:], 3, (1e-4,))
    assert np.isfinite(logits).all()
    assert (logits[0].argmax(1) == y[40:]).mean() > 0.9


def test_scale_and_offset_of_a_feature_do_not_matter():
    x, y = blobs(200, 3, 12, spread=1.0)
    moved = x * np.linspace(0.01, 100, 12, dtype=np.float32) + 5
    np.testing.assert_allclose(
        linear.fit_and_apply(moved, y, moved, 3, (1e-3,)),
        linear.fit_and_apply(x, y, x, 3, (1e-3,)),
        atol=2e-2,
    )


def test_the_head_is_chosen_without_test_labels():
    x, y = blobs(700, 4, 16, spread=2.0)
    noise = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    train, test = ({"cls": noise[s], "patches": x[s]} for s in (slice(0, 500), slice(500, 700)))
    first = linear.probe(train, y[:500], test, y[500:], 4)
    shuffled = linear.probe(train, y[:500], test, np.random.default_rng(1).permutation(y[500:]), 4)
    assert first.chosen == shuffled.chosen
    assert first.chosen.startswith("patches")
    assert first.top1 == first.by_variant["patches"]


def test_the_same_seed_gives_the_same_figures():
    x, y = blobs(300, 4, 16, spread=2.0)
    one, two = (
        linear.probe({"cls": x[:200]}, y[:200], {"cls": x[200:]}, y[200:], 4, seed=3)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.correct, two.correct)
    assert one.chosen == two.chosen


def test_variants_join_the_blocks_that_dinov2_joins():
    n, d, layers = 3, 4, (2, 3, 4, 5)
    features = {
        name: np.full((n, d), i, np.float32)
        for i, name in enumerate(
            ["cls", "patches"]
            + [f"{kind}@{layer}" for kind in ("cls", "patches") for layer in layers]
        )
    }
    out = linear.variants(features, layers)
    assert {name: x.shape[1] // d for name, x in out.items()} == {
        "cls": 1,
        "cls+patches": 2,
        "patches": 1,
        "cls_x4": 4,
        "cls_x4+patches": 5,
        "patches_x4": 4,
    }
    assert out["cls_x4+patches"][0, ::d].tolist() == [2, 3, 4, 5, 1]
    assert set(linear.variants(features, (5,))) == {"cls", "cls+patches", "patches"}


def test_the_quick_start_s_grid_takes_seconds():
    x, y = blobs(3500, 20, 128, spread=4.0)
    sets = {"cls": x, "cls+patches": np.tile(x, 2), "patches": x}
    start = time.process_time()
    linear.probe(
        {k: v[:2500] for k, v in sets.items()},
        y[:2500],
        {k: v[2500:] for k, v in sets.items()},
        y[2500:],
        20,
    )
    # seconds of processor time over all cores; about 6 when idle
    assert time.process_time() - start < 30
