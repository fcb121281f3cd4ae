"""Features of a data set on disk: the same however they came about, and never more of the data set
in memory than a few batches."""

import dataclasses
import gc
import os
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.image_shards import ListSource, encode_image
from tests.evaluators.small_models import (
    BATCH,
    broken,
    changed,
    coloured,
    items_of,
    small_clip,
    small_mae,
)
from webssl_jax.config import UserError
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import features
from webssl_jax.evaluators.datasets import (
    CAPTIONED,
    LABELLED,
    class_ids,
    class_names,
    dataset_of,
    open_dataset,
)
from webssl_jax.evaluators.features import Cache, Rows, union
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.model import Model, in_batches
from webssl_jax.models.features import Want

WANT = Want(patches="mean", blocks=(-2, -1))


def dataset(n=20, damage=(), seed=0, **more):
    """``n`` labelled records; those in ``damage`` are broken."""
    images, labels = coloured(n, seed)
    files = [encode_image(image) for image in images]
    for i in damage:
        files[i] = files[i][: len(files[i]) // 2]
    captions = [f"picture {i}" for i in range(n)]
    return of_items(items_of(files, labels, captions), **more)


def of_items(items, needed=LABELLED, limit=0):
    return dataset_of(ListSource(tuple(items)), needed, limit)


def preprocessed(model, n=20, seed=0):
    return np.stack(
        [model.preprocess(encode_image(image)) for image in coloured(n, seed)[0]], axis=0
    )


def arrays(store, names=("cls", "patches", "cls@1", "patches@1", "cls@2", "patches@2")):
    return {name: store.array(name)[:] for name in names}


@pytest.fixture
def calls(monkeypatch):
    """The number of images of each call of a network, while this test runs."""
    seen, plain = [], Model.features

    def spy(self, images, want):
        seen.append(len(images))
        return plain(self, images, want)

    monkeypatch.setattr(Model, "features", spy)
    return seen


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one batch."""
    monkeypatch.setattr(features, "CHUNK_BYTES", 1)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """What 20 records give in one go."""
    cache = Cache(tmp_path_factory.mktemp("once"), BATCH, 2)
    return arrays(cache.pooled(small_mae(), dataset(), WANT))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_they_are_those_of_the_model_and_the_last_batch_is_filled_up(tmp_path, calls, once):
    store = Cache(tmp_path, BATCH, 2).pooled(small_mae(), dataset(), WANT)
    assert calls == [BATCH] * 3  # of 20 images
    found = arrays(store)
    assert all(x.dtype == np.float32 and x.shape == (20, 32) for x in found.values())
    assert_equal(found, once)
    seen = small_mae(1).features(preprocessed(small_mae()), Want(blocks=(1, 2)))
    wanted = {"cls": seen.cls, "patches": seen.patches.mean(axis=(1, 2))}
    for block, (cls, patches) in seen.blocks.items():
        wanted |= {f"cls@{block}": cls, f"patches@{block}": patches.mean(axis=(1, 2))}
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert [row.number for row in store.rows] == list(range(20)) and len(store) == 20
    assert store.labels == coloured(20)[1] and store.rows[7].captions == ("picture 7",)


def test_eight_devices_give_what_one_gives(tmp_path, once):
    one = Cache(tmp_path, BATCH, 2).pooled(small_mae(1), dataset(), WANT)
    for name, array in arrays(one).items():
        np.testing.assert_allclose(array, once[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_kill_costs_no_more_than_the_chunk_it_fell_into(
    tmp_path, monkeypatch, small_chunks, calls, once
):
    plain = Model.features

    def killed(self, images, want):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, images, want)

    cache = Cache(tmp_path, BATCH, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Model, "features", killed)
        cache.pooled(small_mae(), dataset(), WANT)
    assert calls == [BATCH] * 2 and len(list(tmp_path.rglob("chunk-*[0-9]"))) == 2
    calls.clear()
    store = cache.pooled(small_mae(), dataset(), WANT)
    assert calls == [BATCH]  # the third of three
    assert_equal(arrays(store), once)
    assert [row.number for row in store.rows] == list(range(20))


def test_a_chunk_is_written_whole_or_not_at_all(tmp_path, monkeypatch, small_chunks, calls, once):
    written, plain = [], np.save

    def killed(path, array):
        written.append(path)
        if len(written) == 8:  # of six arrays a chunk
            raise KeyboardInterrupt
        plain(path, array)

    cache = Cache(tmp_path, BATCH, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        cache.pooled(small_mae(), dataset(), WANT)
    assert [path.name for path in tmp_path.rglob("chunk-*[0-9]")] == ["chunk-000000"]
    assert list(tmp_path.rglob("*.partial"))
    calls.clear()
    assert_equal(arrays(cache.pooled(small_mae(), dataset(), WANT)), once)
    assert calls == [BATCH] * 2


def test_chunks_of_another_size_that_a_kill_left_are_not_mixed_with_others(
    tmp_path, monkeypatch, small_chunks, once
):
    """Two chunks of 8 records are there, when all 20 are asked for in chunks of 16."""
    plain, written = features._write, []

    def killed(folder, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(folder)
        plain(folder, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "_write", killed)
        Cache(tmp_path, BATCH, 2).pooled(small_mae(), dataset(), WANT)
    store = Cache(tmp_path, 2 * BATCH, 2).pooled(small_mae(), dataset(), WANT)
    assert [row.number for row in store.rows] == list(range(20))
    for name, array in arrays(store).items():
        np.testing.assert_allclose(array, once[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_whoever_wants_a_part_of_what_is_there_gets_it(tmp_path, calls, once):
    cache, model = Cache(tmp_path, BATCH, 2), small_mae()
    cache.pooled(model, dataset(), WANT)
    calls.clear()
    for part in (Want(patches="mean"), Want(patches="none"), Want(patches="mean", blocks=(2,))):
        store = cache.pooled(model, dataset(), part)
        np.testing.assert_array_equal(store.array("cls")[:], once["cls"])
    assert not calls
    cache.pooled(model, dataset(), Want(patches="mean", blocks=(0,)))
    assert len(calls) == 3


def test_tokens_are_kept_beside_their_mean_where_the_grid_is_wanted(tmp_path, calls, once):
    cache, model = Cache(tmp_path, BATCH, 2), small_mae()
    store = cache.pooled(model, dataset(), union([WANT, Want(patches="grid")]))
    found = arrays(store)
    for name, array in found.items():
        np.testing.assert_allclose(array, once[name], rtol=1e-5, atol=1e-5, err_msg=name)
    tokens, count = store.array("tokens"), model.encoder.num_patches
    assert tokens.shape == (20, count, 32) and tokens.parts[0].dtype == np.float32
    np.testing.assert_allclose(tokens[:].mean(axis=1), once["patches"], rtol=1e-5, atol=1e-5)
    calls.clear()
    assert_equal(arrays(cache.pooled(model, dataset(), WANT)), found)
    assert not calls


def test_features_that_the_disk_cannot_hold_are_refused_before_the_first_image(
    tmp_path, monkeypatch, calls
):
    """A byte is missing for 20 images of CLS, mean and all patches, 32 wide."""
    model = small_mae()
    needed = 20 * (2 + model.encoder.num_patches) * 32 * 4
    usage = lambda path: SimpleNamespace(free=needed - 1)  # noqa: E731
    monkeypatch.setattr(features.shutil, "disk_usage", usage)
    with pytest.raises(UserError, match="features of 20 images need 0.0 GiB, and 0.0 are free"):
        Cache(tmp_path, BATCH, 2).pooled(model, dataset(), Want())
    assert not calls
    Cache(tmp_path, BATCH, 2).pooled(model, dataset(), Want(patches="mean"))


@pytest.mark.parametrize("what", ["weights", "data", "preprocessing"])
def test_other_weights_other_data_and_another_view_are_not_taken_for_the_same(
    tmp_path, calls, what
):
    cache, model, data = Cache(tmp_path, BATCH, 2), small_mae(), dataset(8)
    cache.pooled(model, data, Want(patches="mean"))
    if what == "weights":
        model = changed(model, "encoder/blocks/mlp/fc1/bias")
    elif what == "data":
        data = dataset(8, seed=1)
    else:
        networks = dataclasses.replace(model.networks, preprocess=Preprocess(32, 40))
        model = Model(networks, model.params)
    calls.clear()
    cache.pooled(model, data, Want(patches="mean"))
    assert calls == [BATCH]


def test_damaged_records_are_passed_over_and_counted(tmp_path, caplog, once):
    data = dataset(damage=(3, 9, 10))
    store = Cache(tmp_path, BATCH, 2).pooled(small_mae(), data, WANT)
    left = [i for i in range(20) if i not in (3, 9, 10)]
    assert [row.number for row in store.rows] == left
    assert "list record 9" in caplog.text and "3 damaged records skipped" in caplog.text
    for name, array in arrays(store).items():
        np.testing.assert_allclose(array, once[name][left], rtol=1e-5, atol=1e-5, err_msg=name)


def test_records_without_what_is_needed_are_not_looked_at(tmp_path, calls):
    images, labels = coloured(20)
    some = [label if i % 2 else None for i, label in enumerate(labels)]
    captions = [("a", "b") if i % 5 == 0 else () for i in range(20)]
    items, cache = items_of(images, some, captions), Cache(tmp_path, BATCH, 2)
    store = cache.pooled(small_mae(), of_items(items), Want(patches="mean"))
    assert [row.number for row in store.rows] == list(range(1, 20, 2)) and calls == [BATCH] * 2
    store = cache.pooled(small_mae(), of_items(items, CAPTIONED), Want(patches="mean"))
    assert [row.number for row in store.rows] == [0, 5, 10, 15] and calls == [BATCH] * 3
    assert store.rows[0].captions == ("a", "b") and store.labels == [None, some[5], None, some[15]]
    with pytest.raises(UserError, match="no captioned image can be read in 3 records"):
        cache.pooled(small_mae(), of_items(items[1:4], CAPTIONED), Want(patches="mean"))


def test_a_chunk_of_nothing_but_damage_is_no_trouble(tmp_path, small_chunks, once):
    store = Cache(tmp_path, BATCH, 2).pooled(small_mae(), dataset(damage=range(8, 16)), WANT)
    left = [*range(8), *range(16, 20)]
    np.testing.assert_allclose(store.array("cls")[:], once["cls"][left], rtol=1e-5, atol=1e-5)


def test_a_data_set_of_nothing_but_damage_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match="no labelled image can be read in 3 records .list rec"
    ) as line:
        Cache(tmp_path, BATCH, 2).pooled(small_mae(), dataset(3, damage=range(3)), WANT)
    assert "\n" not in str(line.value)


def test_what_is_not_finite_is_refused_and_names_the_record(tmp_path):
    def compute(images):
        grey = images.reshape(len(images), -1).mean(axis=1, dtype=np.float32)
        return {"grey": np.where(images[:, 0, 0, 0] == 5, np.nan, grey)[:, None]}

    levels = [np.full((20, 20, 3), i, np.uint8) for i in range(12)]
    items = items_of(levels, ["ant"] * 12)
    items[2] = b"broken"
    cache, view = Cache(tmp_path, BATCH, 2), Preprocess(16, 16)
    with pytest.raises(UserError, match=r"NaN or infinity in the features .grey. of list record 5"):
        cache.of_pixels("grey", view, of_items(items), compute, 4)
    with pytest.raises(UserError, match=r"NaN or infinity in the features .cls. of list record 0"):
        cache.pooled(broken(small_mae()), dataset(8), WANT)
    assert not list(tmp_path.rglob("done.json"))


@pytest.mark.parametrize("on_devices", [True, False])
def test_memory_does_not_grow_with_the_number_of_records(
    tmp_path, monkeypatch, small_chunks, on_devices
):
    """Images that are alive at once, of 64 and of 320 records."""
    alive, most, lock = [0], [0], threading.Lock()
    plain = Preprocess.__call__

    def gone():
        with lock:
            alive[0] -= 1

    def counted(self, data):
        image = np.array(plain(self, data))
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        weakref.finalize(image, gone)
        return image

    monkeypatch.setattr(Preprocess, "__call__", counted)
    peaks, files = [], items_of(*coloured(64))
    for copies in (1, 5):
        most[0] = 0
        data = of_items(files * copies)
        cache = Cache(tmp_path / str(copies), BATCH, 1)
        if on_devices:
            store = cache.pooled(small_mae(), data, WANT)
        else:
            mean = lambda images: {"mean": images.mean(axis=(1, 2))}  # noqa: E731
            store = cache.of_pixels("mean", Preprocess(16, 16), data, mean, 12)
        assert len(store) == 64 * copies
        gc.collect()
        assert alive[0] == 0
        peaks.append(most[0])
    assert max(peaks) <= 16 + 3 * BATCH, peaks  # read ahead by one thread, and on the way


def test_embeddings_are_those_of_the_image_tower(tmp_path):
    model = small_clip()
    store = Cache(tmp_path, BATCH, 2).embeddings(model, dataset(11))
    found = store.array("image")[:]
    batches = in_batches(preprocessed(model, 11), BATCH)
    ours = [np.asarray(model.text.embed_images(part))[:n] for part, n in batches]
    np.testing.assert_array_equal(found, np.concatenate(ours))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch = 12: does not divide over 8 batch shards"):
        Cache(tmp_path, 12, 2).pooled(small_mae(), dataset(), WANT)


def test_outcomes_are_remembered_and_features_of_a_model_forgotten(tmp_path):
    cache, made = Cache(tmp_path, BATCH, 2), []

    def make():
        made.append(1)
        items = {"top1": np.arange(3, dtype=np.float32)}
        return {"raw pixels": Outcome(("top1",), {"top1": 1.0}, items, "d")}

    for _ in range(2):
        found = cache.remember("trivial-of-these", make)
    assert made == [1] and found["raw pixels"].items["top1"].tolist() == [0, 1, 2]
    cache.pooled(small_mae(), dataset(8), Want(patches="mean"))
    other = changed(small_mae(), "encoder/blocks/mlp/fc1/bias")
    cache.pooled(other, dataset(8), Want(patches="mean"))
    cache.forget(small_mae())
    left = [name for name in os.listdir(tmp_path) if name != "outcomes"]
    assert len(left) == 1 and left[0].startswith(other.fingerprint)
    assert cache.remember("trivial-of-these", make) and made == [1]


def test_rows_on_disk_are_read_like_one_array():
    rng = np.random.default_rng(0)
    parts = tuple(rng.normal(size=(n, 3)).astype(np.float32) for n in (4, 1, 7))
    whole, rows = np.concatenate(parts), Rows(parts)
    assert rows.shape == (12, 3) and rows.dtype == np.float32 and len(rows) == 12
    wanted = np.array([11, 0, 4, 4, 5])
    np.testing.assert_array_equal(rows[wanted], whole[wanted])
    np.testing.assert_array_equal(rows[2:9], whole[2:9])
    picked = rows.pick(wanted)
    assert picked.shape == (5, 3)
    np.testing.assert_array_equal(picked[1:], whole[wanted][1:])
    np.testing.assert_array_equal(picked.pick(np.array([3, 0]))[:], whole[wanted][[3, 0]])


def test_the_union_of_what_is_wanted_covers_each():
    found = union([Want(patches="none", blocks=(3,)), Want(cls=False, patches="mean", blocks=(1,))])
    assert found == Want(cls=True, patches="mean", blocks=(1, 3))


def test_a_limit_draws_evenly_and_the_fingerprint_knows_what_was_drawn(tmp_path):
    few, again = dataset(200, limit=50), dataset(200, limit=50)
    assert few.indices.tolist() == again.indices.tolist() == sorted(set(few.indices.tolist()))
    assert len(few) == 50 and abs(few.indices.mean() - 99.5) < 30
    assert few.identity == again.identity
    known = [few, dataset(200), dataset(200, limit=51), dataset(199), dataset(200, seed=1)]
    assert len({data.identity for data in known}) == 5
    assert dataset(7, limit=100).indices.tolist() == list(range(7))
    with pytest.raises(UserError, match="nowhere"):
        open_dataset(str(tmp_path / "nowhere-*.arrayrecord"), LABELLED)


def test_labels_become_classes_and_records_without_one_are_passed_over():
    data, labels = dataset(4), ["cat", None, "ant", "cat"]
    names = class_names(labels, data)
    rows, classes = class_ids(labels, names, data)
    assert names == ("ant", "cat") and rows.tolist() == [0, 2, 3] and classes.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="label 'cat' is none of the 1 known classes .ant, ...."):
        class_ids(labels, ("ant",), data)
    with pytest.raises(UserError, match="at least 2 classes; all in 4 records .* are 'cat'"):
        class_names(["cat"] * 4, data, least=2)
    with pytest.raises(UserError, match="no labelled image in 4 records .list record 0"):
        class_ids([None] * 4, ("ant",), data)
