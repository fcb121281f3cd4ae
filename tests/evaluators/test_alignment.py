"""Agreement with a language model: metrics beside platonic-rep's, the permutation test, and a row
with real features of small networks."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.evaluators.small_models import BATCH, coloured, items_of, shard, small_mae
from tests.language import tiny
from webssl_jax.errors import UserError
from webssl_jax.evaluators.alignment import metrics, platonic
from webssl_jax.evaluators.features import Cache
from webssl_jax.language import model as language
from webssl_jax.models.features import Want

GOLDEN = pathlib.Path(__file__).parent / "golden" / "alignment.json"
K = 5


@pytest.fixture(scope="module")
def features():
    """x (40, 2, 14) and y (40, 3, 18) of golden/alignment.json. Its figures are those of
    platonic-rep (dcd76ba) in float64, with svcca's randomised SVD replaced by an exact one and its
    CCA iterated to 1e-16."""
    rng, n = np.random.RandomState(0), 40  # whose numbers never change
    core = rng.normal(size=(n, 6))

    def make(layers, width):
        parts = [
            core @ rng.normal(size=(6, width)) * scale + rng.normal(size=(n, width)) + 0.5
            for scale in np.linspace(0.3, 1, layers)
        ]
        out = np.stack(parts, axis=1)
        out[:, :, 1] *= 30  # an outlier
        return out.astype(np.float32)

    return make(2, 14), make(3, 18)


@functools.partial(jax.jit, static_argnums=0)
def scores(name, x, y, order):
    """(L, M): as it is; with the items of x in another order; with what was prepared of x in it."""

    def stacked(features):
        made = [metrics.prepare(name, features[:, i], K) for i in range(features.shape[1])]
        return jax.tree.map(lambda *layers: jnp.stack(layers), *made)

    against, own = metrics.against(name, stacked(y)), stacked(x)
    return against(own), against(stacked(x[order])), against(metrics.shuffle(name, own, order))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_metric_equals_the_originals_and_follows_its_items_when_they_are_shuffled(name, features):
    golden = json.loads(GOLDEN.read_text())
    order = np.random.default_rng(0).permutation(40)
    for how in ("mean", "exact"):
        x, y = (metrics.clamp(part, how) for part in features)
        ours, wanted, moved = scores(name, x, y, order)
        np.testing.assert_allclose(ours, golden[how][name], atol=1e-6)
    np.testing.assert_allclose(moved, wanted, atol=2e-6)
    assert np.abs(wanted - ours).max() > 0.01


def options(**changes):
    return platonic.AlignmentOptions("x", "y", **{"k": K, "permutations": 99, **changes})


def test_shuffling_tells_what_agrees_from_what_does_not():
    """The best of 6 pairs of layers: high by chance, which the p value knows."""
    rng = np.random.RandomState(1)
    own, other = rng.normal(size=(60, 8)), rng.normal(size=(60, 3, 8))
    same = np.stack([own + 0.3 * rng.normal(size=own.shape) for _ in range(2)], axis=1)
    agreed = platonic.score(same, np.concatenate([other, own[:, None]], axis=1), options())
    assert agreed.best("mutual_knn")[1] == 3
    assert platonic.p_value(agreed.scores["mutual_knn"].max(), agreed.shuffled) == 0.01
    apart = platonic.score(same, other, options())
    assert platonic.p_value(apart.scores["mutual_knn"].max(), apart.shuffled) > 0.05
    assert apart.shuffled.mean() > 1.1 * K / 59  # one pair's chance
    assert platonic.p_value(0.5, np.array([0.5, 0.2, 0.1])) == 0.5  # equals count


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(language model, pattern of 24 pairs, their images and captions). One has no caption, one is
    damaged."""
    folder = tmp_path_factory.mktemp("alignment")
    rng = np.random.default_rng(0)
    captions = [(" ".join(rng.choice(tiny.WORDS[:9], 1 + i % 6)), "unused") for i in range(24)]
    images = coloured(24, side=32)[0]
    captions[4] = ()
    items = items_of(images, None, captions)
    items[7] = b"broken"
    there = [i for i in range(24) if i not in (4, 7)]
    pairs = shard(folder, "pairs", items)
    return str(tiny.save(folder / "words")), pairs, images[there], [captions[i][0] for i in there]


def slow_mutual(x, y, k):
    """Of each image the share of its k nearest that its caption has too."""
    near = []
    for part in (x, y):
        unit = part / np.linalg.norm(part, axis=1, keepdims=True)
        far = -(unit @ unit.T) + 9 * np.eye(len(unit))
        near.append([set(np.argsort(row)[:k]) for row in far])
    return np.array([len(a & b) / k for a, b in zip(*near)])


def test_a_row_takes_every_block_and_every_layer_and_keeps_what_texts_gave(
    world, tmp_path, monkeypatch
):
    words, pairs, images, captions = world
    row = platonic.Alignment(
        platonic.AlignmentOptions(pairs, words, k=4, clamp="none", permutations=19)
    )
    model, cache = small_mae(), Cache(tmp_path / "c", BATCH, 2)
    made = row.run(model, cache)
    view = np.stack([model.preprocess(item) for item in map(Image.fromarray, images)])
    want = Want(patches="none", blocks=(0, 1, 2), blocks_norm=False)
    seen = model.features(np.concatenate([view, view[:2]]), want)
    states = language.load(words).hidden_states(captions, side="right")
    hidden = np.asarray(states.hidden) * states.mask[..., None]
    texts = hidden.sum(axis=2) / states.mask.sum(axis=1)[:, None]
    shares = [
        [slow_mutual(np.asarray(seen.blocks[i][0])[:22], layer, 4) for layer in texts]
        for i in range(3)
    ]
    means = np.mean(shares, axis=-1)
    block, layer = np.unravel_index(means.argmax(), means.shape)
    assert made.metrics["mutual_knn"] == pytest.approx(means.max())
    assert (made.metrics["image_block"], made.metrics["text_layer"]) == (block + 1, layer)
    np.testing.assert_allclose(made.items["mutual_knn"], shares[block][layer], atol=1e-6)
    assert "22 pairs" in made.meaning and f"block {block + 1} of 3" in made.chosen["mutual_knn"]
    assert set(made.baselines) == {"raw pixels", "colour histogram"}
    assert made.baselines["raw pixels"].data == made.data
    assert made.chance["mutual_knn"] > 4 / 21
    monkeypatch.setattr(language, "load", None)  # the next model needs none
    other = row.run(small_mae(seed=1), cache)
    assert other.data == made.data
    assert (other.items["mutual_knn"] != made.items["mutual_knn"]).any()


def test_what_cannot_be_compared_is_one_line(world, tmp_path):
    words, pairs, *_ = world

    def refused(error, **changes):
        given = {"pairs": pairs, "language": words, **changes}
        with pytest.raises((UserError, ValueError), match=error) as caught:
            row = platonic.Alignment(platonic.AlignmentOptions(**given))
            row.run(small_mae(), Cache(tmp_path / "c", BATCH, 2))
        assert "\n" not in str(caught.value)

    refused("by 22 neighbours needs more pairs than 22", k=22)
    refused("metrics = 'cka,cosine': known are mutual_knn, ", metrics="cka,cosine")
    refused("no such folder; name a folder of transformers", language=str(tmp_path / "none"))
    short = str(tiny.save(tmp_path / "short", context=4))
    refused("captions of .*text 3 has 5 tokens, the model reads at most 4", language=short)
