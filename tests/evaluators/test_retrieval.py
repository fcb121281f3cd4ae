"""Retrieval: recalls against a slow reference, chance against shuffling, and pairs read from
records."""

import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import ListSource
from tests.evaluators.small_models import BATCH, broken, coloured, items_of, shard, small_clip
from webssl_jax.config import UserError
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.evaluators.datasets import CAPTIONED, dataset_of
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.texts import retrieval
from webssl_jax.evaluators.texts.retrieval import Retrieval
from webssl_jax.model import fill_up, in_batches


def normalise(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def slow_recall(queries, answers, right, k):
    """Sorts all answers of each query and looks through the first k."""
    hits = 0
    for i, query in enumerate(queries):
        order = sorted(range(len(answers)), key=lambda j: -float(query @ answers[j]))
        hits += any((i, j) in right for j in order[:k])
    return hits / len(queries)


def test_recalls_equal_a_slow_reference(monkeypatch):
    """40 images with 1 to 3 captions each, some of them shared; few queries at a time."""
    monkeypatch.setattr(retrieval, "_QUERIES", 7)
    rng = np.random.default_rng(0)
    links = {(i, int(j)) for i in range(40) for j in rng.integers(0, 60, rng.integers(1, 4))}
    links |= {(int(rng.integers(40)), j) for j in range(60)}
    images = rng.normal(size=(40, 8))
    texts = np.stack([images[[i for i, j in links if j == t]].mean(axis=0) for t in range(60)])
    images, texts = normalise(images), normalise(texts + rng.normal(size=texts.shape))
    of_images, of_texts = retrieval.ranks(images, texts, np.array(sorted(links)))
    back = {(j, i) for i, j in links}
    for k in (1, 5, 10):
        assert (of_images < k).mean() == slow_recall(images, texts, links, k)
        assert (of_texts < k).mean() == slow_recall(texts, images, back, k)
    assert 0.1 < (of_images < 1).mean() < (of_images < 10).mean()


def test_a_collapsed_network_finds_nothing_and_a_perfect_one_everything():
    links = np.stack([np.arange(20)] * 2, axis=1)
    same = normalise(np.ones((20, 4)))
    assert all((x == 19).all() for x in retrieval.ranks(same, same, links))
    apart = np.eye(20, dtype=np.float32)
    assert all((x == 0).all() for x in retrieval.ranks(apart, apart, links))


def test_chance_is_the_mean_over_random_orders():
    links = np.array([[0, 0], [0, 1], [0, 2], [1, 2], [2, 3], [3, 3], [3, 4]])
    rng, hits = np.random.default_rng(0), []
    for _ in range(4000):  # embeddings that say nothing
        images, texts = (normalise(rng.normal(size=(n, 6))) for n in (4, 5))
        hits.append([(behind < 1).mean() for behind in retrieval.ranks(images, texts, links)])
    named = retrieval.chance(links)
    wanted = [named[f"{way}_r1"] for way in ("image_to_text", "text_to_image")]
    np.testing.assert_allclose(np.mean(hits, axis=0), wanted, atol=0.012)
    assert wanted[0] == pytest.approx((3 + 1 + 1 + 2) / 4 / 5)
    assert named["image_to_text_r5"] == 1  # there are five


def test_pairs_are_the_captioned_images_and_equal_captions_are_one_text():
    captions = [("a", "b", "a"), (), ("b",), ("c",)]
    data = dataset_of(ListSource(tuple(items_of(coloured(4)[0], None, captions))), CAPTIONED)
    rows, texts, links = retrieval.link(captions, data)
    assert rows.tolist() == [0, 2, 3] and texts == ("a", "b", "c")
    assert links.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2]]
    with pytest.raises(retrieval.NoCaptions, match="no captioned image in 4 records .list record"):
        retrieval.link([()] * 4, data)


@pytest.fixture
def run(tmp_path):
    """run(model, captions, seed) -> outcome, of images with those captions."""
    count = iter(range(99))

    def evaluate(model, captions, seed=0, damage=(), **options):
        items = items_of(coloured(len(captions), seed)[0], None, captions)
        for i in damage:
            items[i] = b"broken"
        pattern = shard(tmp_path, f"pairs{next(count)}", items)
        return Retrieval(Retrieval.Options(pattern, **options)).run(
            model, Cache(tmp_path / "c", BATCH, 2)
        )

    return evaluate


def test_a_model_is_measured_with_its_own_towers(run):
    """11 images with two captions, one of them shared by all; one without; one damaged."""
    model = small_clip()
    captions = [(f"number {i}", "the same") for i in range(13)]
    captions[4] = ()
    made = run(model, captions, damage=[7])
    left = [i for i in range(13) if i not in (4, 7)]
    texts = ["number 0", "the same", *(f"number {i}" for i in left[1:])]
    links = [[i, 0 if i == 0 else i + 1] for i in range(11)] + [[i, 1] for i in range(11)]
    view = np.stack(
        [model.preprocess(item) for item in map(Image.fromarray, coloured(13)[0][left])]
    )
    images = [np.asarray(model.text.embed_images(x))[:n] for x, n in in_batches(view, BATCH)]
    embedded = np.asarray(model.text.embed(fill_up(Tokenizer(77)(texts), 16)))[:12]
    wanted = retrieval.ranks(np.concatenate(images), embedded, np.array(sorted(links)))
    for way, behind in zip(retrieval.WAYS, wanted):
        for k in (1, 5, 10):
            np.testing.assert_array_equal(made.items[f"{way}_r{k}"], behind < k)
            share = (behind < k).mean()
            assert made.metrics[f"{way}_r{k}"] == pytest.approx(share)
            assert made.metrics[f"{way}_r{k}_se"] == pytest.approx(
                np.sqrt(share * (1 - share) / len(behind))
            )
    assert made.headline == ("image_to_text_r10", "text_to_image_r10")
    assert made.chance == retrieval.chance(np.array(sorted(links)))
    assert "11 images" in made.meaning and "12 texts" in made.meaning


def test_a_network_that_diverged_is_one_line(run):
    model, captions = small_clip(), [(f"t{i}",) for i in range(9)]
    with pytest.raises(UserError, match="NaN or infinity in the features .image. of .*pairs0"):
        run(broken(model), captions)
    deaf = broken(model).params["text"]
    half = type(model)(model.networks, model.params | {"text": deaf}, model.origin)
    with pytest.raises(UserError, match="NaN or infinity in the embeddings of texts"):
        run(half, captions)


def test_a_source_without_captions_is_refused_in_one_line(run):
    with pytest.raises(UserError, match="no captioned image can be read in 2 records") as caught:
        run(small_clip(), [(), ()])
    assert "\n" not in str(caught.value)


def test_what_was_found_among_other_pairs_has_another_fingerprint(run):
    """Other images, another text, and the texts at other images."""
    model, captions = small_clip(), [(f"t{i}",) for i in range(16)]
    other = [*captions[:11], ("new",), *captions[12:]]
    swapped = [*captions[:11], captions[12], captions[11], *captions[13:]]
    told = [
        run(model, captions), run(model, captions, seed=1), run(model, other),
        run(model, swapped), run(model, captions, max_images=12),
    ]  # fmt: skip
    assert len({one.data for one in told}) == 5
    assert run(model, captions).data == told[0].data
