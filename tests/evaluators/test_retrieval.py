"""Retrieval: recalls against a slow reference, and pairs read from records."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import methods
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.data.views import EvalView
from webssl_jax.evaluators import retrieval
from webssl_jax.sharding import mesh as meshes


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
    made = retrieval.recalls(images, texts, np.array(sorted(links)))
    assert set(made) == {
        f"{a}_r{k}" for a in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    back = {(j, i) for i, j in links}
    for k in (1, 5, 10):
        assert made[f"image_to_text_r{k}"] == slow_recall(images, texts, links, k)
        assert made[f"text_to_image_r{k}"] == slow_recall(texts, images, back, k)
    assert 0.1 < made["image_to_text_r1"] < made["image_to_text_r10"]


def test_a_collapsed_network_finds_nothing_and_a_perfect_one_everything():
    links = np.stack([np.arange(20)] * 2, axis=1)
    same = normalise(np.ones((20, 4)))
    assert set(retrieval.recalls(same, same, links).values()) == {0.0}
    apart = np.eye(20, dtype=np.float32)
    assert set(retrieval.recalls(apart, apart, links).values()) == {1.0}


@dataclasses.dataclass(frozen=True)
class ListSource:
    items: tuple[bytes, ...]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def describe(self, index):
        return f"list record {index}"


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
    few = retrieval.read_pairs(source(*[("a",)] * 9), EvalView(16, resize=16), limit=3)
    assert few.images[:, 0, 0, 0].tolist() == [0, 3, 6]


def test_a_run_is_measured_with_its_own_towers_on_any_mesh():
    method = methods.create(
        ConfigDict(
            {
                "model": {"size": "micro"},
                "method": {"name": "clip", "text": {"depth": 1}, "view": {"image_size": 16}},
            }
        )
    )
    variables = jax.jit(lambda: method.init(jax.random.key(0), method.batch_spec(1)))()
    captioned = source(*[(f"number {i}", "the same") for i in range(11)])
    mesh = jax.make_mesh((1, 8, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    run = retrieval.RunRetrieval(method, mesh, captioned, batch=8)
    assert run.pairs.texts[:3] == ("number 0", "the same", "number 1")
    made = run.run(variables)

    images = method.embed_images(variables.params, run.pairs.images)
    texts = method.embed_texts(variables.params, Tokenizer(77)(run.pairs.texts))
    assert made == retrieval.recalls(np.asarray(images), np.asarray(texts), run.pairs.links)
    broken = variables._replace(params=jax.tree.map(lambda x: x * jnp.nan, variables.params))
    with pytest.raises(UserError, match="NaN or infinity in the embeddings"):
        run.run(broken)


def test_a_source_without_captions_is_refused_in_one_line():
    with pytest.raises(UserError, match="no captioned image in 2 records"):
        retrieval.read_pairs(source((), ()), EvalView(16, resize=16))


def test_the_last_batch_is_filled_and_cut_off_again():
    seen = []

    def function(rows):
        seen.append(len(rows))
        return rows * 2.0

    rows = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(retrieval.embed(function, rows, 4), rows * 2)
    assert seen == [4, 4, 4]
