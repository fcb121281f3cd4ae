"""Claims about webssl_jax.curation.balancing: what is sampled, and how often."""

import numpy as np
import pytest

from webssl_jax.curation import balancing


def digests(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def pool(n=200_000, entries=50, seed=1):
    """(lengths, matches, counts of entries) of captions with one to four entries, some frequent."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, n)
    popularity = 1 / np.arange(1, entries + 1) ** 1.5
    drawn = rng.choice(entries, (n, 4), p=popularity / popularity.sum())
    matches = drawn[np.arange(4) < lengths[:, None]]
    return lengths, matches, np.bincount(matches, minlength=entries)


def test_an_entry_is_asked_for_with_t_over_its_count_and_always_in_the_tail():
    counts = np.array([0, 1, 99, 100, 101, 400])
    asked = balancing.probabilities(counts, 100)
    np.testing.assert_allclose(asked, [1, 1, 1, 1, 100 / 101, 0.25], rtol=1e-15)
    assert (asked[:4] == 1).all()


def test_a_caption_with_a_tail_entry_always_stays():
    lengths, matches, counts = pool()
    threshold = int(np.sort(counts)[25])
    asked = balancing.probabilities(counts, threshold)
    kept = balancing.sample(lengths, matches, digests(len(lengths)), asked, 0)
    of = np.repeat(np.arange(len(lengths)), lengths)
    tail = np.zeros(len(lengths), bool)
    tail[of[counts[matches] <= threshold]] = True
    assert tail.any() and kept[tail].all() and not kept[~tail].all()


def test_captions_stay_as_often_as_if_each_of_their_entries_threw_its_own_coin():
    lengths, matches, counts = pool()
    asked = balancing.probabilities(counts, 500)
    kept = balancing.sample(lengths, matches, digests(len(lengths)), asked, 3)
    coins = np.random.default_rng(4).random(len(matches)) < asked[matches]
    thrown = np.logical_or.reduceat(coins, np.cumsum(lengths) - lengths)
    for n in range(1, 5):  # by the number of entries; and for captions of the commonest entry
        of_n = lengths == n
        a, b = kept[of_n].mean(), thrown[of_n].mean()
        error = np.sqrt((a * (1 - a) + b * (1 - b)) / of_n.sum())
        assert abs(a - b) < 4 * error, n
    alone = (lengths == 1) & (matches[np.cumsum(lengths) - lengths] == 0)
    spread = np.sqrt(asked[0] / alone.sum())
    assert abs(kept[alone].mean() - asked[0]) < 4 * spread


def test_the_draw_is_a_function_of_seed_and_digest_alone_and_uniform():
    names = digests(100_000)
    drawn = balancing.uniform(names, 5)
    order = np.random.default_rng(0).permutation(len(names))
    np.testing.assert_array_equal(balancing.uniform(names[order], 5), drawn[order])
    assert drawn.min() >= 0 and drawn.max() < 1
    np.testing.assert_allclose(np.histogram(drawn, 20, (0, 1))[0], 5000, atol=5 * 70)
    other = balancing.uniform(names, 6)
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.02
    consecutive = balancing.uniform(np.arange(100_000, dtype=np.uint64), 5)
    assert abs(np.corrcoef(consecutive[1:], consecutive[:-1])[0, 1]) < 0.02


def test_a_larger_threshold_keeps_what_a_smaller_one_keeps():
    lengths, matches, counts = pool(20_000)
    names = digests(len(lengths))
    kept = [
        balancing.sample(lengths, matches, names, balancing.probabilities(counts, t), 0)
        for t in (10, 100, 1000, 10**9)
    ]
    for fewer, more in zip(kept, kept[1:]):
        assert (more[fewer]).all() and more.sum() > fewer.sum()
    assert kept[-1].all()


@pytest.mark.parametrize("share, threshold", [(0.001, 1), (0.03, 10), (0.2, 60), (0.99, 300)])
def test_the_threshold_of_a_tail_share_is_the_count_whose_tail_is_nearest_to_it(share, threshold):
    counts = np.array([0, 0, 1, 1, 2, 10, 60, 300])  # tails: 2, 4, 14, 74, 374 of 374
    assert balancing.threshold_of_tail(counts, share) == threshold


def test_a_shard_without_any_match_keeps_nothing():
    nothing = np.zeros(0, np.uint32)
    kept = balancing.sample(nothing, nothing, np.zeros(0, np.uint64), np.ones(3), 0)
    assert kept.shape == (0,)
