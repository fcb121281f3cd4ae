"""Heads, losses, windows and figures of dense evaluations beside what the originals give, and
beside PyTorch."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from webssl_jax.evaluators.dense import heads, losses, scores, windows
from webssl_jax.models.features import center_pad

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name):
    """(arrays, facts) of a vector of the originals."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return dict(stored), json.loads((GOLDEN / f"{name}.json").read_text())


def our_head(arrays, prefix, norm, conv):
    """A segmentation head out of a torch state dict."""
    stored = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    params = {
        "norm": {"scale": stored[f"{norm}.weight"], "bias": stored[f"{norm}.bias"]},
        "conv": {"kernel": stored[f"{conv}.weight"][:, :, 0, 0].T, "bias": stored[f"{conv}.bias"]},
    }
    running = heads.Running(stored[f"{norm}.running_mean"], stored[f"{norm}.running_var"])
    return params, running


def to_last(x):
    return np.moveaxis(x, 1, -1)


def test_the_segmentation_heads_of_both_originals_are_reproduced():
    arrays, facts = golden("k_depth_head")
    head = our_head(arrays, "seg_lin/sd/", "bn", "conv_seg")
    features = to_last(arrays["feats/3/patch"])
    apply = jax.jit(heads.segmentation, static_argnums=3)
    logits, _ = apply(*head, features, False)
    np.testing.assert_allclose(logits, to_last(arrays["seg_lin/logits"]), **facts["tolerance"])

    arrays, facts = golden("k_segmentation")
    head = our_head(arrays, "head1/sd/", "batchnorm_layer", "conv")
    logits, _ = apply(*head, to_last(arrays["feats/0"]), False)
    np.testing.assert_allclose(logits, to_last(arrays["head1/logits_eval"]), **facts["tolerance"])
    larger = heads.resize(logits, 28, 36)
    expected = to_last(arrays["head1/predict_28x36"])
    np.testing.assert_allclose(larger, expected, **facts["tolerance"])


def test_the_depth_head_and_its_test_size_are_reproduced():
    arrays, facts = golden("k_depth_head")
    params = {
        "kernel": arrays["depth1/sd/conv_depth.weight"][:, :, 0, 0].T,
        "bias": arrays["depth1/sd/conv_depth.bias"],
    }
    seen = heads.with_cls([(arrays["feats/3/cls"], to_last(arrays["feats/3/patch"]))])
    enlarged = heads.resize(seen, 20, 24)  # the original's order: features first
    np.testing.assert_allclose(
        enlarged, to_last(arrays["depth1/features_x4"]), **facts["tolerance"]
    )
    found = heads.depth(params, seen, 0.001, 10.0)
    np.testing.assert_allclose(found, arrays["depth1/depth"][:, 0], **facts["tolerance"])
    larger = heads.resize(jnp.clip(found, 0.001, 10.0)[..., None], 61, 75)[..., 0]
    np.testing.assert_allclose(larger, arrays["depth1/test_61x75"][:, 0], **facts["tolerance"])


def test_centre_padding_puts_images_where_the_original_does():
    _, facts = golden("k_depth_head")
    pad = jax.jit(center_pad, static_argnums=1)
    for size, expected in facts["scalars"]["center_padding"].items():
        height, width = map(int, size.split("x"))
        padded = np.asarray(pad(np.ones((1, height, width, 1), np.float32), 14))[0, :, :, 0]
        rows, columns = (np.flatnonzero(padded.any(axis=axis)) for axis in (1, 0))
        assert list(padded.shape) == expected["out"]
        assert [rows[0], rows[-1] + 1] == expected["image_rows"]
        assert [columns[0], columns[-1] + 1] == expected["image_cols"]
        assert padded.sum() == height * width


def test_sliding_windows_give_the_logits_of_the_original():
    arrays, facts = golden("k_segmentation")
    config = facts["config"]
    crop, stride, patch = config["crop"], config["stride"], config["patch"]
    head = our_head(arrays, "head1/sd/", "batchnorm_layer", "conv")
    image = to_last(arrays["slide/both_larger_64x80/image"])[0]
    cut = windows.cut(image, crop, stride)
    n, m = cut.shape[:2]
    features = F.conv2d(
        torch.from_numpy(
            np.ascontiguousarray(np.moveaxis(cut.reshape(n * m, crop, crop, 3), 3, 1))
        ),
        torch.from_numpy(arrays["patch/sd/weight"]),
        torch.from_numpy(arrays["patch/sd/bias"]),
        stride=patch,
    ).numpy()
    logits, _ = heads.segmentation(*head, to_last(features), train=False)
    t = crop // patch
    logits = windows.joined(np.asarray(logits).reshape(n, m, t, t, -1))
    rows, columns = (windows.assembly(side, crop, stride, t, side) for side in (64, 80))
    found = windows.assemble(logits, rows, columns)
    expected = to_last(arrays["slide/both_larger_64x80/logits"])[0]
    np.testing.assert_allclose(found, expected, **facts["tolerance"])
    # to another size, and in tiles: as the original resizes its canvas
    rows, columns = (
        windows.assembly(*x) for x in ((64, crop, stride, t, 150), (80, crop, stride, t, 131))
    )
    canvas = torch.from_numpy(arrays["slide/both_larger_64x80/logits"])
    larger = F.interpolate(canvas, (150, 131), mode="bilinear")[0].numpy()
    found = np.empty((150, 131, logits.shape[-1]), np.float32)
    for y, x in windows.tiles(150, 131):
        found[y, x] = windows.assemble(logits, rows[y], columns[x])
    np.testing.assert_allclose(found, np.moveaxis(larger, 0, -1), **facts["tolerance"])


def test_windows_cover_the_axis_and_end_at_its_edge():
    assert windows.spans(512, 512, 341) == [(0, 512)]
    assert windows.spans(683, 512, 341) == [(0, 512), (171, 683)]
    assert windows.spans(1366, 512, 341) == [(0, 512), (341, 853), (682, 1194), (854, 1366)]
    assert len(windows.spans(1920, 640, 320)) == 5
    with pytest.raises(ValueError, match="511 pixels are less than a window of 512"):
        windows.spans(511, 512, 341)


def test_areas_and_mean_iou_are_those_of_the_original():
    arrays, facts = golden("k_segmentation")
    classes, found = 8, []
    for i in range(3):
        truth = arrays[f"miou/gt{i}"].astype(np.uint8)
        truth = np.where((truth == 0) | (truth == 255), 255, truth - 1)  # zero is no class
        one = scores.areas(arrays[f"miou/pred{i}"], truth, classes)
        expected = arrays[f"miou/areas{i}_reduce1"]
        np.testing.assert_array_equal((one.both, one.union, one.predicted, one.true), expected)
        found.append(one)
    whole = scores.segmented(scores.Areas(*(np.stack(x) for x in zip(*found))))
    expected = facts["scalars"]["miou_reduce1"]
    np.testing.assert_allclose(whole.miou, expected["mIoU"], 1e-6)
    np.testing.assert_allclose(whole.accuracy, expected["aAcc"], 1e-6)
    np.testing.assert_allclose(whole.mean_accuracy, expected["acc"], 1e-6)


def test_the_influence_of_an_image_is_what_weighing_it_more_does_and_averages_to_miou():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 30, 16, 16))
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, predicted)
    each = [scores.areas(p, t, 5) for p, t in zip(predicted, truth)]
    found = scores.Areas(*(np.stack(x) for x in zip(*each)))
    whole = scores.segmented(found)
    assert np.isnan(whole.iou[4])  # neither predicted nor true
    np.testing.assert_allclose(whole.influence.mean(), whole.miou, rtol=1e-12)
    step = 1e-5
    weights = np.ones(30)
    weights[7] += step
    more = scores.segmented(scores.Areas(*(x * weights[:, None] for x in found))).miou
    np.testing.assert_allclose(
        (more - whole.miou) / step * 30, whole.influence[7] - whole.miou, rtol=1e-3
    )


def test_batch_norm_of_a_head_is_pytorchs_in_training_and_after():
    rng = np.random.default_rng(0)
    norm = torch.nn.BatchNorm2d(6)
    x = rng.normal(2, 3, (3, 4, 5, 6)).astype(np.float32)
    params, running = heads.init_segmentation(jax.random.key(0), 6, 6)
    params["conv"] = {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}
    theirs = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    head = jax.jit(heads.segmentation, static_argnums=3)
    for train in (True, True, False):
        norm.train(train)
        ours, running = head(params, running, x, train)
        np.testing.assert_allclose(ours, to_last(norm(theirs).detach().numpy()), atol=2e-5)
    np.testing.assert_allclose(running.mean, norm.running_mean, rtol=1e-5)
    np.testing.assert_allclose(running.var, norm.running_var, rtol=1e-5)


def test_unlabelled_pixels_add_nothing_to_the_cross_entropy_and_are_counted():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (2, 5, 4)).astype(np.uint8)
    labels[0, :2] = 255
    theirs = F.cross_entropy(
        torch.from_numpy(np.moveaxis(logits, -1, 1).copy()),
        torch.from_numpy(labels.astype(np.int64)),
        ignore_index=255,
        reduction="none",
    ).mean()
    np.testing.assert_allclose(jax.jit(losses.cross_entropy)(logits, labels), theirs, rtol=1e-5)


def test_the_scale_invariant_loss_is_its_formula_in_groups_and_in_its_first_steps():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 9, (4, 6, 5)).astype(np.float32)
    truth[rng.random(truth.shape) < 0.3] = 0
    predicted = rng.uniform(0.5, 9, truth.shape).astype(np.float32)
    later, early = [], []
    for pair in (slice(0, 2), slice(2, 4)):
        p, t = (torch.from_numpy(x[pair][truth[pair] > 0]) for x in (predicted, truth))
        error = torch.log(p + 1e-3) - torch.log(t + 1e-3)
        later.append(torch.sqrt(torch.var(error) + 0.15 * error.mean() ** 2))
        early.append(torch.sqrt(0.15 * error.mean() ** 2))
    loss = jax.jit(jax.value_and_grad(losses.scale_invariant))
    for step, expected in ((100, later), (99, early)):
        found, _ = loss(predicted, truth, step)
        np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
    _, slope = loss(truth, truth, 100)  # no error: sqrt(0)
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="3 images does not divide into groups of 2"):
        losses.scale_invariant(predicted[:3], truth[:3], 0)


def test_the_gradient_loss_is_zero_for_a_constant_factor_and_counts_known_pairs_only():
    truth = np.full((1, 24, 24), 2, np.float32)
    loss = jax.jit(losses.gradient)
    np.testing.assert_allclose(loss(truth * 1.5, truth), 0, atol=3e-4)  # 1e-3 is added to both
    predicted = truth.copy()
    predicted[0, 12, 12] = 4  # seen by 2 rows and 2 columns at strides 1, 2, 4 and 6
    gap = np.log(4.001) - np.log(2.001)
    expected = sum(4 * gap / (24 // s) ** 2 for s in (1, 2, 4)) + 2 * gap / 16
    np.testing.assert_allclose(loss(predicted, truth), expected, rtol=1e-5)
    truth[0, 12, 12] = 0
    np.testing.assert_allclose(loss(predicted, truth), 0, atol=1e-6)


def test_depth_errors_are_their_formulas():
    found = scores.depth_errors(np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.0, 2.0]))
    log2 = np.log(2)
    expected = {
        "rmse": np.sqrt(5 / 3),
        "abs_rel": (0.5 + 1) / 3,
        "sq_rel": (0.5 + 2) / 3,
        "log10": 2 * np.log10(2) / 3,
        "rmse_log": log2 * np.sqrt(2 / 3),
        "silog": 100 * log2 * np.sqrt(2 / 3),
        "delta1": 1 / 3,
        "delta2": 1 / 3,
        "delta3": 1 / 3,
    }
    assert tuple(found) == scores.DEPTH_FIGURES
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_a_gradient_is_clipped_to_its_norm_and_shorter_ones_stay():
    params = {"kernel": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}

    def loss(params, most):
        held = heads.clip_gradient(params, most)
        return 3 * held["kernel"][0] + 4 * held["bias"][0]  # a slope of norm 5

    slope = jax.grad(loss)(params, 2.5)
    np.testing.assert_allclose((slope["kernel"][0], slope["bias"][0]), (1.5, 2), rtol=1e-5)
    slope = jax.grad(loss)(params, 6.0)
    np.testing.assert_allclose((slope["kernel"][0], slope["bias"][0]), (3, 4), rtol=1e-5)
