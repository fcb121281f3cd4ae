"""Retrieval: recalls against a slow reference, chance against shuffling, and pairs read from
records."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import ListSource
from tests.evaluators.small_clip import BATCH, MESH, small_clip
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.data.views import EvalView
from webssl_jax.evaluators import retrieval, towers


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
    found = retrieval.Retrieval("", *retrieval.ranks(images, texts, np.array(sorted(links))), {})
    made = found.metrics()
    back = {(j, i) for i, j in links}
    for k in (1, 5, 10):
        assert made[f"eval/retrieval/image_to_text_r{k}"] == slow_recall(images, texts, links, k)
        assert made[f"eval/retrieval/text_to_image_r{k}"] == slow_recall(texts, images, back, k)
    share = made["eval/retrieval/image_to_text_r1"]
    assert 0.1 < share < made["eval/retrieval/image_to_text_r10"]
    assert made["eval/retrieval/image_to_text_r1_se"] == pytest.approx(
        np.sqrt(share * (1 - share) / 40)
    )
    again = retrieval.Retrieval.from_json(found.to_json())
    assert again.metrics() == made


def test_a_collapsed_network_finds_nothing_and_a_perfect_one_everything():
    links = np.stack([np.arange(20)] * 2, axis=1)
    same = normalise(np.ones((20, 4)))
    assert all((x.behind == 19).all() for x in retrieval.ranks(same, same, links))
    apart = np.eye(20, dtype=np.float32)
    assert all((x.behind == 0).all() for x in retrieval.ranks(apart, apart, links))


def test_chance_is_the_mean_over_random_orders():
    links = np.array([[0, 0], [0, 1], [0, 2], [1, 2], [2, 3], [3, 3], [3, 4]])
    rng, hits = np.random.default_rng(0), []
    for _ in range(4000):  # embeddings that say nothing
        images, texts = (normalise(rng.normal(size=(n, 6))) for n in (4, 5))
        found = retrieval.Retrieval("", *retrieval.ranks(images, texts, links), {})
        hits.append([found.image_to_text.within(1).top1, found.text_to_image.within(1).top1])
    named = retrieval.chance(links)
    wanted = [named[f"eval/retrieval/{way}_r1"] for way in ("image_to_text", "text_to_image")]
    np.testing.assert_allclose(np.mean(hits, axis=0), wanted, atol=0.012)
    assert wanted[0] == pytest.approx((3 + 1 + 1 + 2) / 4 / 5)
    assert named["eval/retrieval/image_to_text_r5"] == 1  # there are five


def source(*captions):
    items = []
    for i, texts in enumerate(captions):
        stream = io.BytesIO()
        Image.new("RGB", (20, 20), (i, 0, 0)).save(stream, "PNG")
        image = b"broken" if texts == ("broken",) else stream.getvalue()
        items.append(records.encode(records.Record(image, texts, str(i), 20, 20, "test")))
    return ListSource(tuple(items))


def test_pairs_are_the_captioned_images_and_equal_captions_are_one_text(caplog):
    found = retrieval.read_pairs(
        source(("a", "b", "a"), (), ("broken",), ("b",), ("c",)), EvalView(16, resize=16)
    )
    assert found.images.shape == (3, 16, 16, 3) and found.images[:, 0, 0, 0].tolist() == [0, 3, 4]
    assert found.texts == ("a", "b", "c")
    assert found.links.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2]]
    assert "list record 2" in caplog.text
    few = retrieval.read_pairs(source(*[(), ("a",)] * 9), EvalView(16, resize=16), limit=5)
    numbers = few.images[:, 0, 0, 0].tolist()
    assert len(numbers) == 5 and numbers == sorted(numbers) and all(x % 2 for x in numbers)


def test_a_source_without_captions_is_refused_in_one_line():
    with pytest.raises(UserError, match="no captioned image in 2 records"):
        retrieval.read_pairs(source((), ()), EvalView(16, resize=16))


def test_a_run_is_measured_with_its_own_towers_on_any_mesh():
    method, variables = small_clip()
    pairs = retrieval.read_pairs(
        source(*[(f"number {i}", "the same") for i in range(11)]), method.eval_view()
    )
    assert pairs.texts[:3] == ("number 0", "the same", "number 1")
    evaluation = retrieval.RetrievalEvaluation(pairs, towers.tokenize(method, pairs.texts))
    bind = towers.tower_functions(method, MESH, BATCH)
    made = evaluation.measure(bind(variables))

    images = method.embed_images(variables.params, pairs.images)
    texts = method.embed_texts(variables.params, Tokenizer(77)(pairs.texts))
    ranks = retrieval.ranks(np.asarray(images), np.asarray(texts), pairs.links)
    assert [made.image_to_text.to_json(), made.text_to_image.to_json()] == [
        rank.to_json() for rank in ranks
    ]
    broken = variables._replace(params=jax.tree.map(lambda x: x * jnp.nan, variables.params))
    with pytest.raises(UserError, match="retrieval: NaN or infinity in the embeddings"):
        evaluation.measure(bind(broken))


def test_what_was_found_among_other_pairs_has_another_fingerprint():
    pairs = retrieval.read_pairs(source(("a",), ("b",)), EvalView(16, resize=16))
    others = (
        pairs._replace(images=pairs.images + 1),
        pairs._replace(texts=("a", "c")),
        pairs._replace(links=pairs.links[::-1].copy()),
    )
    flat = towers.Towers(lambda rows: np.eye(2, 4), lambda rows: np.eye(2, 4))
    seen = {retrieval.RetrievalEvaluation(x, None).measure(flat).data for x in (pairs, *others)}
    assert len(seen) == 4
