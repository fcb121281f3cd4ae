"""Probes whose heads are trained: their inputs, heads and figures beside the originals', and sets
whose answer is known. golden/ has what facebookresearch/dinov2 and capi gave."""

import dataclasses
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.evaluators.problems import blobs, problem_of
from tests.evaluators.small_models import (
    BATCH,
    CLASSES,
    coloured,
    items_of,
    labelled_shard,
    mesh_of,
    shard,
    small_mae,
)
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.imagenet import wordnet_numbers
from webssl_jax.evaluators import datasets, fit, tables
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.fit import Fitted, Grid
from webssl_jax.evaluators.probes import heads, imagenet, judging, linear, logistic
from webssl_jax.evaluators.probes.heads import AttentionPool, BatchNormLinear, CrossEntropy, See
from webssl_jax.evaluators.probes.judging import Judged, mean_per_class
from webssl_jax.evaluators.probes.labelled import LabelledPair
from webssl_jax.evaluators.probes.linear import Linear
from webssl_jax.evaluators.probes.trained import best
from webssl_jax.evaluators.suite import Suite
from webssl_jax.model import Model
from webssl_jax.models.features import Features, Want

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def vectors():
    return np.load(GOLDEN / "j_probes.npz")


def test_linear_heads_see_what_dinov2_gives_them(vectors):
    blocks = {i: tuple(vectors[f"linear/block{i}/{x}"] for x in ("cls", "patch")) for i in range(4)}
    grid = lambda patches: patches.reshape(24, 3, 3, 12)  # noqa: E731
    ours = {i: (jnp.asarray(cls), jnp.asarray(grid(patch))) for i, (cls, patch) in blocks.items()}
    seen = Features(*ours[3], None, ours, None)
    variants = logistic.variants((0, 1, 2, 3))
    for name, theirs in (
        ("cls", "n1_avgpoolFalse"),
        ("cls+patches", "n1_avgpoolTrue"),
        ("cls_x4", "n4_avgpoolFalse"),
        ("cls_x4+patches", "n4_avgpoolTrue"),
    ):
        found, wanted = See(variants[name])(seen), vectors[f"linear/input_{theirs}"]
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(See(("tokens",))(seen), blocks[3][1])


def test_accuracies_are_those_of_dinov2(vectors):
    labels = vectors["metrics/labels"]
    said = np.argsort(-vectors["metrics/preds"], axis=1)[:, None, :5]
    judged = Judged(labels, {"it": said})
    for most, name in ((1, "top-1"), (5, "top-5")):
        hits = judged.hits("it", most)[:, 0]
        np.testing.assert_allclose(hits.mean(), vectors[f"metrics/mean_accuracy/{name}"], 1e-6)
        wanted = vectors[f"metrics/mean_per_class_accuracy/{name}"]
        np.testing.assert_allclose(mean_per_class(said[:, 0, :most], labels), wanted, 1e-6)


def test_the_attentive_head_is_capi_s_with_its_gradients():
    z = np.load(GOLDEN / "j_attention_pool.npz")

    def ours(kind):
        kv = {"kernel": z[f"{kind}/kv.weight"].T, "bias": z[f"{kind}/kv.bias"]}
        last = {"kernel": z[f"{kind}/linear.weight"].T, "bias": z[f"{kind}/linear.bias"]}
        return {"query": z[f"{kind}/query_token"], "kv": kv, **last}

    params, x, head = jax.tree.map(jnp.asarray, ours("sd")), jnp.asarray(z["x"]), AttentionPool(5)
    batch = {"label": jnp.asarray(z["y"].astype(np.int32)), "all": jnp.ones(3)}

    def loss(params):
        logits, _ = head.apply(params, {}, x, True)
        return CrossEntropy("all")(logits, batch), logits

    with jax.default_matmul_precision("highest"):
        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, z["logits"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(value, 1.7738691568374634, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)  # noqa: E731
    jax.tree.map(close, grads, ours("grad"))
    made, _ = jax.eval_shape(head.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_an_image_of_weight_zero_or_in_another_s_place_adds_nothing_to_the_loss():
    logits, label = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3))), jnp.arange(4) % 3
    batch = {"label": label, "kept": jnp.array([1.0, 0, 1, 1])}
    batch["substituted"] = jnp.array([False, False, True, False])
    found = CrossEntropy("kept")(logits, batch)
    alone = {"label": label[jnp.array([0, 3])], "all": jnp.ones(2)}
    np.testing.assert_allclose(
        found, CrossEntropy("all")(logits[jnp.array([0, 3])], alone), rtol=1e-6
    )


def test_both_published_lists_of_learning_rates_are_there_and_the_first_of_equals_wins():
    assert len(linear.CODE) == len(linear.PAPER) == 13 and len(linear.RATES["both"]) == 16
    assert (linear.CODE[0], linear.CODE[-1]) == (1e-5, 0.1)
    assert (linear.PAPER[0], linear.PAPER[-1]) == (1e-4, 0.5)
    tied = {"cls": np.array([0.1, 0.5, 0.5]), "cls_x4": np.array([0.5, 0.2, 0.5])}
    assert best(tied) == ("cls", 1)


def test_batch_norm_before_the_layer_is_torch_s():
    rng, head = np.random.default_rng(0), BatchNormLinear(4)
    module = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    batches = [rng.normal(2, 3, (8, 6)).astype(np.float32) for _ in range(3)]
    params, stats = head.init(jax.random.key(0), batches[0])
    assert float(jnp.std(params["kernel"])) < 0.02 and not params["bias"].any()
    eye = {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}
    for x in batches:
        ours, stats = head.apply(eye, stats, jnp.asarray(x), True)
        np.testing.assert_allclose(ours, module(torch.tensor(x)).numpy(), atol=1e-5)
    np.testing.assert_allclose(stats["var"], module.running_var.numpy(), rtol=1e-5)
    module.eval()
    ours, after = head.apply(eye, stats, jnp.asarray(batches[0]), False)
    np.testing.assert_allclose(ours, module(torch.tensor(batches[0])).numpy(), atol=1e-5)
    assert after is stats


def test_corruption_errors_are_ratios_of_means_over_levels_to_alexnet_s():
    """Errors of AlexNet's size give 1; halved ones of a single corruption 1 - 1/30."""
    assert len(imagenet.ALEXNET) == 15
    n, hits = 10_000, {"v2_top1": np.ones(3)}
    for name, error in imagenet.ALEXNET.items():
        for level in imagenet.LEVELS:
            right = np.arange(n) >= round(n * error * (0.5 if name == "fog" else 1))
            hits[f"c/{name}/{level}_top1"] = right
    found = imagenet.corruption_errors(hits)
    assert found == {"c_mce_top1": pytest.approx(1 - 1 / 30, abs=1e-3)}
    assert imagenet.corruption_errors({"v2_top1": np.ones(3)}) == {}


def test_real_labels_are_found_by_the_validation_file_s_name(tmp_path):
    images, names = coloured(3)
    items = []
    for item, i in zip(items_of(images, names), (2, 1, 3), strict=True):
        key = f"x/ILSVRC2012_val_0000000{i}.JPEG"
        items.append(records.encode(dataclasses.replace(records.decode(item), key=key)))
    data = datasets.open_dataset(shard(tmp_path, "val", items), datasets.LABELLED)
    path, classes = tmp_path / "real.json", wordnet_numbers()

    def read(numbers, classes=classes):
        labels = np.zeros(len(numbers), int)
        return imagenet.read_real(str(path), data, np.array(numbers), labels, classes)

    path.write_text("[[3], [5, 7], []]")
    for known in (classes, tuple(map(str, range(1000)))):
        valid = read([0, 1, 2], known)
        assert [np.flatnonzero(row).tolist() for row in valid] == [[5, 7], [3], []]
    with pytest.raises(UserError, match="labels must be ImageNet's .* here '1' is the first"):
        read([0], tuple(map(str, range(1, 1001))))  # the devkit's numbers have another order
    with mock.patch.object(imagenet, "_ENOUGH", 2):
        with pytest.raises(UserError, match="right by ReaL in 0 % of 2 images, where 90 % are"):
            read([0, 1, 2])
    with pytest.raises(UserError, match="is for 1000 classes, here are 3"):
        read([0], classes[:3])
    path.write_text("[[3]]")
    with pytest.raises(UserError, match="has the key .*val_00000002"):
        read([0])
    path.write_text("[[3], 4]")
    with pytest.raises(UserError, match="must hold a list of lists"):
        read([0])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """{"train": 60 labelled images of three classes, "test": 30}."""
    folder = tmp_path_factory.mktemp("shards")
    return {
        "train": labelled_shard(folder, "train", 60),
        "test": labelled_shard(folder, "test", 30, seed=1),
    }


@pytest.fixture(scope="module")
def judged(shards, tmp_path_factory):
    """Of features (600, d), labels and true labels the outcome; the last 200 are for the test."""
    options = Linear.Options(**shards, iterations=40, batch=64, rates="paper")
    probe, cache = Linear(options), Cache(tmp_path_factory.mktemp("cache"), BATCH, 2)
    trial = probe.trial(options, Want(blocks=(0,)), 4, 400)

    def run(x, labels, truth):
        problem = problem_of(labels[:400], truth[400:], 4)
        x = x.astype(np.float32)
        return probe.of_tables(cache, mesh_of(1), trial, problem, {"x": x[:400]}, {"x": x[400:]})

    return run


def test_known_answers_one_hot_features_noise_and_shuffled_labels(judged):
    """All right; less where the signal is weaker; chance where features or labels say nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    one_hot = np.eye(4)[labels]
    assert judged(one_hot, labels, labels).metrics["top1"] == 1
    noise = rng.normal(size=one_hot.shape)
    weak = judged(one_hot + noise, labels, labels).metrics["top1"]
    sigma = np.sqrt(0.25 * 0.75 / 200)
    assert 0.25 + 3 * sigma < weak < 0.9
    assert abs(judged(noise, labels, labels).metrics["top1"] - 0.25) < 3 * sigma
    shuffled = judged(one_hot, rng.permutation(labels), labels).metrics["top1"]
    assert abs(shuffled - 0.25) < 3 * sigma


def test_no_test_label_takes_part_in_the_choice_and_the_published_one_stands_beside(judged):
    x, labels = blobs(600, 4, 8, spread=2.0)
    found = judged(x, labels, labels)
    other = judged(x, labels, np.roll(labels, 1))
    assert other.chosen["top1"] == found.chosen["top1"]
    assert found.headline == ("top1", "top1_selected_on_test")
    assert found.metrics["top1_selected_on_test"] >= found.metrics["top1"]
    assert found.items["top1"].mean() == pytest.approx(found.metrics["top1"])


def run(rows, folder):
    """Outcomes of a small network on one device, which compiles faster; all that was kept of its
    heads is gone."""
    found = Suite(rows, folder / ".cache", BATCH, 2).run(small_mae(1), folder / "eval")
    assert not list((folder / ".cache").glob("*heads*"))
    for one in found.values():
        assert len(one.items["top1"]) == 30 and ", rate " in one.chosen["top1"]
    return found


def test_a_row_goes_from_shards_to_a_table_with_other_test_sets(shards, tmp_path, monkeypatch):
    """The same images once more, and some of two classes."""
    monkeypatch.setattr(LabelledPair, "trivial_outcomes", lambda *_: {})  # below
    images, names = coloured(20, seed=3)
    two = [i for i, name in enumerate(names) if name != "cat"]
    few = items_of([images[i] for i in two], [names[i] for i in two])
    row = {"kind": "linear", **shards, "iterations": 12, "batch": 16, "rates": "paper"}
    others = {"v2": shards["test"], "a": shard(tmp_path, "a", few)}
    found = run({"lin": {**row, **others}}, tmp_path)
    lin = found["lin"].metrics
    assert len([name for name in lin if name.startswith("cls")]) == 4
    assert lin["top1"] > 0.5 and lin["v2_top1"] == lin["top1"]
    assert lin["v2_top1_selected_on_test"] == lin["top1_selected_on_test"]
    assert lin["a_top1"] >= 0.5 and len(found["lin"].items["a_top1"]) == len(two)
    assert "lin top1 selected on test" in " ".join(tables.report({"a": found}).split())


def test_real_labels_of_other_images_are_refused_before_a_head_is_trained(shards, tmp_path):
    (tmp_path / "real.json").write_text("[[1], [2]]")
    row = {"kind": "linear", **shards, "batch": 16, "real": str(tmp_path / "real.json")}
    never = mock.patch.object(fit, "fit", side_effect=AssertionError("trained"))
    with never, pytest.raises(UserError, match="is for 1000 classes, here are 3"):
        Suite({"lin": row}, tmp_path, BATCH, 2).run(small_mae(1), tmp_path / "eval")


def test_heads_say_the_same_of_features_that_are_kept_as_of_images(shards, tmp_path):
    model, cache = small_mae(devices=1), Cache(tmp_path, BATCH, 2)
    dataset = datasets.open_dataset(shards["test"], datasets.LABELLED)
    rng, width, parts = np.random.default_rng(0), model.encoder.width, ("cls", "patches", "tokens")
    seen_by = {"both": (heads.Linear(3), parts[:2]), "pool": (AttentionPool(3, std=1.0), parts[2:])}
    grids, params = [], {}
    for name, (head, own) in seen_by.items():
        shape = (len(own) * width,) if name == "both" else (9, width)
        start, _ = head.init(jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        params[name] = jax.tree.map(lambda x: rng.normal(size=(2, *x.shape)), start)
        grids.append((name, Grid(head, See(own), CrossEntropy("all"), (0.1, 0.2))))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    fitted = Fitted(tuple(grids), params, dict.fromkeys(params, {}))
    allowed = np.array([True, False, True])
    given = (dataset, Want(), fitted, CLASSES, "known", allowed)
    seen = judging.judge_images(model, cache, *given)
    store = cache.pooled(model, dataset, Want())
    kept = judging.judge_store(model.mesh, store, dataset, fitted, parts, CLASSES, allowed)
    for name in seen_by:
        np.testing.assert_array_equal(kept.said[name][:, :, :2], seen.said[name][:, :, :2])
        assert 1 not in kept.said[name][:, :, :2] and len(np.unique(kept.said[name][:, :, 0])) == 2
    np.testing.assert_array_equal(kept.labels, seen.labels)


@pytest.mark.slow
def test_the_other_trained_probes_go_from_shards_to_figures_beside_trivial_ones(
    shards, tmp_path, monkeypatch
):
    """Attention sees each image once, however many the updates."""
    calls, plain = [], Model.features
    count = lambda self, images, want: calls.append(want) or plain(self, images, want)  # noqa: E731
    monkeypatch.setattr(Model, "features", count)
    rows = {
        "still": {"kind": "linear", "augment": False, "last_blocks": 1, "iterations": 12},
        "mae": {"kind": "mae_linear", "epochs": 2},
        "pool": {"kind": "attentive", "augment": False, "iterations": 30},
    }
    found = run({name: {**row, **shards, "batch": 16} for name, row in rows.items()}, tmp_path)
    assert sum(want.patches == "grid" for want in calls) == -(-60 // BATCH) + -(-30 // BATCH)
    kinds = ("cls", "patches", "attention")
    for name, variants in (("still", 2), ("mae", 1), ("pool", 3)):
        one = found[name]
        assert len([x for x in one.metrics if x.split("_")[0] in kinds]) == variants
        assert set(one.baselines) == {"majority class", "raw pixels", "colour histogram"}
    assert found["mae"].headline == ("top1",) and found["still"].metrics["top1"] > 0.5
