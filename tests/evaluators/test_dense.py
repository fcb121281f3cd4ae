"""Rows of segmentation and depth: what they find where the answer is known, what stands beside it,
and what is refused before anything is trained."""

import functools

import jax
import numpy as np
import pytest

from tests.evaluators.scenes import CLASSES, class_file, record, scene, scene_shard
from tests.evaluators.small_models import mesh_of, shard, small_mae
from webssl_jax.config import UserError
from webssl_jax.data import annotations
from webssl_jax.evaluators import fit, outcome
from webssl_jax.evaluators.dense import depth as depths
from webssl_jax.evaluators.dense import knn, losses, segmentation
from webssl_jax.evaluators.dense.depth import Depth, DepthOptions, four_blocks
from webssl_jax.evaluators.dense.knn import KNNSegmentation, KNNSegmentationOptions
from webssl_jax.evaluators.dense.segmentation import Segmentation, SegmentationOptions
from webssl_jax.evaluators.features import Cache
from webssl_jax.sharding import mesh as meshes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(training shards, test shards of another size, names of the classes)."""
    folder = tmp_path_factory.mktemp("scenes")
    train = scene_shard(folder, "train", range(16))
    test = scene_shard(folder, "test", range(100, 103), height=48, width=40)
    return train, test, class_file(folder)


def test_a_linear_head_segments_scenes_at_all_scales_and_is_far_above_the_commonest_class(
    data, tmp_path, monkeypatch
):
    train, test, classes = data
    options = SegmentationOptions(
        train, test, classes, True, size=32, batch=8, steps=25, learning_rate=5e-2
    )
    row, model, cache = Segmentation(options), small_mae(devices=1), Cache(tmp_path, 8, 2)
    assembled, predicted = [], segmentation._Image.predicted
    with monkeypatch.context() as m:
        m.setattr(
            segmentation._Image, "predicted", lambda x: (assembled.append(x), predicted(x))[1]
        )
        found = row.run(model, cache)
    assert [len(image.logits) for image in assembled] == [10] * 3  # five scales, each flipped
    assert found.headline == ("miou",) and found.metrics["miou"] > 0.6
    assert found.baselines["majority class"].metrics["miou"] < 0.25
    assert found.baselines["place"].metrics["miou"] < 0.4
    assert found.baselines["colour"].metrics["miou"] > 0.9  # of scenes that are told by colour
    np.testing.assert_allclose(found.items["miou"].mean(), found.metrics["miou"], atol=1e-6)
    of_classes = [found.metrics[f"iou_{name}"] for name in CLASSES]
    np.testing.assert_allclose(np.mean(of_classes), found.metrics["miou"], rtol=1e-6)
    gap = outcome.difference(found, found.baselines["majority class"], "miou")
    assert gap.paired and gap.clear
    with monkeypatch.context() as m:  # the trained head is there: nothing is trained again
        m.setattr(fit, "_train", lambda state, *unused: state)
        params, running = row._fit(model, cache, options.protocol).head("head", 0)
    assert float(np.abs(running.mean).max()) > 0 and params["conv"]["kernel"].shape == (96, 3)
    assert set(found.pictures) == {"best", "worst", "classes"}


@pytest.mark.slow
def test_a_linear_head_finds_depths_better_than_their_mean(data, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "WARMUP_STEPS", 5)
    train, test, _ = data
    options = DepthOptions(
        train, test, 4, layout="plain", size=(40, 56), steps=50, batch=8, learning_rate=5e-2
    )
    found = Depth(options).run(small_mae(devices=1), Cache(tmp_path, 8, 2))
    assert found.metrics["rmse"] < 0.8 * found.baselines["mean depth"].metrics["rmse"]
    assert found.chosen == {"rmse": "blocks 0, 1, 2 of 3"}
    assert found.metrics["delta1"] > found.baselines["mean depth"].metrics["delta1"]
    assert set(found.pictures) == {"best", "worst"}


def test_training_images_of_another_size_are_as_large_as_those_of_the_test():
    """As published nothing is resized: NYUd's images have the size that its layout says."""
    for layout, size, train_size, crop in (
        ("nyu", (), (427, 565), (416, 544)),
        ("nyu", (240, 320), (214, 282), (208, 272)),
        ("plain", (84, 112), (84, 112), (73, 95)),
        ("kitti", (), (352, 1216), (352, 704)),
        ("kitti", (176, 608), (176, 608), (176, 352)),
    ):
        of_train, of_test = DepthOptions("a", "b", layout=layout, size=size).layouts
        assert (of_train.train_size, of_train.crop) == (train_size, crop)
        assert of_test.size == (size or depths.LAYOUTS[layout].size)


def test_a_depth_head_gives_its_loss_depths_of_four_times_the_patches_and_its_steps():
    head, loss = depths.DepthHead(10.0), depths.Loss(gradient_weight=0.5)

    def one(features, truth):
        params, stats = head.init(jax.random.key(0), features)
        outputs, stats = head.apply(params, stats, features, True)
        return outputs, stats, loss(outputs, {"depth": truth})

    shapes = jax.ShapeDtypeStruct((4, 6, 7, 64), "float32"), jax.ShapeDtypeStruct((4, 48, 50), "f4")
    (metres, step), stats, value = jax.eval_shape(one, *shapes)
    assert metres.shape == (4, 24, 28) and value.shape == () and step.dtype == "int32"
    assert jax.tree.map(lambda x: x.shape, stats) == {"step": ()}


@pytest.mark.slow
def test_similar_patches_segment_scenes_without_training(data, tmp_path):
    train, test, classes = data
    options = KNNSegmentationOptions(train, test, classes, size=40, memory=500, batch=8)
    found = KNNSegmentation(options).run(small_mae(devices=1), Cache(tmp_path, 8, 2))
    assert found.metrics["miou"] > 0.5 > found.baselines["majority class"].metrics["miou"]


def test_votes_of_patches_on_eight_devices_are_those_of_all_pairs_compared():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(101, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 101).astype(np.int32)
    patches = rng.normal(size=(8, 2, 3, 6)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (patches.reshape(-1, 6), bank)]
    similarity = unit[0] @ unit[1].T
    expected = np.zeros((48, 4))
    for row, values in enumerate(similarity):
        near = np.argsort(-values)[: knn.K]
        weights = np.exp(values[near] / knn.TEMPERATURE)
        np.add.at(expected[row], labels[near], weights / weights.sum())
    for devices in (8, 1):
        mesh = mesh_of(devices)
        placed = knn.lay(mesh, bank, labels)
        found = knn.voting(mesh, 4)(*placed, meshes.from_whole(patches, mesh))
        np.testing.assert_allclose(np.asarray(found).reshape(48, 4), expected, rtol=1e-4, atol=1e-6)


def test_the_class_of_a_patch_is_the_commonest_of_its_pixels():
    mask = np.full((6, 9), 255, np.uint8)
    mask[:3, :4] = 1
    mask[2:, 6:] = [[0, 2, 2]] * 4
    found = knn.patch_classes(mask, 3).reshape(3, 3)
    assert found.tolist() == [[1, 1, 255], [1, 1, 2], [255, 255, 2]]


def test_four_blocks_are_those_of_the_originals():
    assert four_blocks(12) == (2, 5, 8, 11)
    assert four_blocks(24) == (4, 11, 17, 23)
    assert four_blocks(26) == (5, 11, 17, 23)  # without the last
    assert four_blocks(32) == (7, 15, 23, 31)
    assert four_blocks(40) == (9, 19, 29, 39)
    assert four_blocks(3) == (0, 1, 2)


def test_eigens_and_gargs_crops_are_the_published_rows_and_columns(data):
    truth = np.full((480, 640), 5.0)
    predicted = truth + 1
    predicted[45:471, 41:601] = 5
    test = Depth(DepthOptions(data[0], data[1]))._test
    judge = functools.partial(depths.errors_of, dataset=test, number=0)
    assert judge(predicted, truth, depths.LAYOUTS["nyu"])["rmse"] == 0
    predicted[44] = predicted[:, 601] = 9
    assert judge(predicted, truth, depths.LAYOUTS["nyu"])["rmse"] == 0
    predicted[45, 41] = predicted[470, 600] = 9
    assert judge(predicted, truth, depths.LAYOUTS["nyu"])["rmse"] > 0
    truth = np.full((352, 1216), 5.0)
    predicted = truth + 1
    predicted[143:349, 43:1172] = 5
    assert judge(predicted, truth, depths.LAYOUTS["kitti"])["rmse"] == 0
    with pytest.raises(UserError, match="no depth from 0.001 to 10 m where it is judged"):
        judge(predicted, truth * 4, depths.LAYOUTS["nyu"])


def test_what_is_wrong_with_masks_and_depths_is_one_line_before_anything_is_trained(
    data, tmp_path, monkeypatch
):
    train, test, classes = data

    def never(*unused, **also):
        raise AssertionError("trained")

    monkeypatch.setattr(segmentation, "fit", never)
    monkeypatch.setattr(depths, "fit", never)
    image, mask, metres = scene(0)
    good, deep = annotations.encode_mask(mask), annotations.encode_depth(metres)
    cases = {
        "gone": (record(image, "x"), "no annotation 'mask' in record 'x'"),
        "size": (record(image[:, :-8], "x", mask=good), "56 x 40 pixels, its image has 48 x 40"),
        "torn": (record(image, "x", mask=good[:60]), "annotation 'mask': damaged PNG"),
    }
    for name, (item, expected) in cases.items():
        bad = shard(tmp_path, name, [item])
        for pair in ((bad, test), (train, bad)):
            row = Segmentation(SegmentationOptions(*pair, classes))
            with pytest.raises(UserError, match=expected):
                row.run(small_mae(), Cache(tmp_path / "cache", 8, 2))
    bad = shard(tmp_path, "deep", [record(image, "x", depth=deep[:80])])
    for pair in ((bad, test), (train, bad)):
        row = Depth(DepthOptions(*pair, layout="plain"))
        with pytest.raises(UserError, match=r"record 0.*annotation 'depth': damaged PNG"):
            row.run(small_mae(), Cache(tmp_path / "cache", 8, 2))
    flat = annotations.encode_mask(np.zeros_like(mask))
    bad = shard(tmp_path, "flat", [record(image, "x", mask=flat)])
    row = Segmentation(SegmentationOptions(bad, test, classes))
    with pytest.raises(UserError, match=r"2 classes of the test set are in no training mask"):
        row.run(small_mae(), Cache(tmp_path / "cache", 8, 2))


@pytest.mark.parametrize(
    ("options", "more", "expected"),
    [
        (SegmentationOptions, {"train": ""}, "train = '': give masked shards"),
        (SegmentationOptions, {"steps": 0}, "steps and batch must be at least 1"),
        (DepthOptions, {"layers": 2}, "layers = 2 must be 1 or 4"),
        (DepthOptions, {"layout": "nyud"}, "layout = 'nyud' is not one of nyu, sun, kitti, plain"),
        (DepthOptions, {"batch": 15}, "batch = 15: must be even"),
        (DepthOptions, {"steps": 100}, "steps = 100: must be above 100; so many first steps learn"),
        (KNNSegmentationOptions, {"memory": 0}, "size, memory and batch must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, more, expected):
    with pytest.raises(ValueError, match=expected):
        options(**{"train": "a", "test": "b"} | more)


def test_protocols_have_the_published_numbers():
    lin = SegmentationOptions("a", "b").protocol
    assert (lin.blocks, lin.size, lin.stride, lin.ratios, lin.flip) == (1, 512, 341, (1.0,), False)
    ms = SegmentationOptions("a", "b", multiscale=True).protocol
    assert (ms.blocks, ms.size, ms.stride, ms.scale) == (4, 640, 320, (1.0, 3.0))
    assert ms.ratios == (1.0, 1.32, 1.73, 2.28, 3.0) and ms.flip
    assert [int(ms.size * ratio) for ratio in ms.ratios] == [640, 844, 1107, 1459, 1920]
    assert lin.want(40).blocks == () and ms.want(40).blocks == (36, 37, 38) and ms.want(40).pad
