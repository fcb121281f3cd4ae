"""``init_from`` with a weight file: what fits goes into the sharded state, the rest is told."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import torch

from tests.weights import samples
from webssl_jax.methods.dino.method import DINO, View
from webssl_jax.models import position
from webssl_jax.weights.init_from import from_weights
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.safetensors_io import open_file
from webssl_jax.weights.stored import WeightsError


def fresh(method):
    """Other weights for ``method``, cut over four devices wherever an axis divides."""
    mesh = jax.make_mesh(
        (4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def place(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n % 4 == 0][:1]
        spec = ["fsdp" if i in axes else None for i in range(leaf.ndim)]
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, samples.make_params(method, seed=1))


def start(path, method):
    tree = fresh(method)
    filled = from_weights(str(path), method, {"params": tree, "teacher": {}})
    assert filled["teacher"] == {}
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, tree, filled["params"])
    assert all(jax.tree.leaves(same))
    return filled["params"], tree


@pytest.mark.parametrize("family", samples.FAMILIES)
def test_all_that_a_file_has_goes_into_the_state_as_it_is_cut(tmp_path, caplog, family):
    method = samples.make_method(depth=4)
    weights = samples.make_params(method)
    path = samples.write(family, tmp_path, method, weights)
    with caplog.at_level(logging.INFO):
        got, before = start(path, method)
    samples.assert_same(
        got if family in samples.BOTH else {"encoder": got["encoder"]},
        weights,
        "mae" if family in samples.BOTH else "encoder",
    )
    line = caplog.messages[-1]
    assert f"({family}, " in line and "took the encoder" in line
    assert ("and the decoder" in line) == (family in samples.BOTH)
    if family not in samples.BOTH:
        assert "fresh: decoder" in line
        samples.assert_same(
            {"decoder": got["decoder"], "encoder": weights["encoder"]},
            {"decoder": before["decoder"], "encoder": weights["encoder"]},
            "mae",
        )


def test_a_teacher_takes_the_encoder_too(tmp_path):
    method = samples.make_method()
    weights = samples.make_params(method)
    path = samples.write("timm", tmp_path, method, weights)
    trees = {"params": fresh(method), "teacher": {"encoder": fresh(method)["encoder"]}}
    filled = from_weights(str(path), method, trees)
    samples.assert_same(filled["teacher"], weights, "encoder")


def test_a_decoder_of_another_shape_is_left_and_the_line_says_why(tmp_path, caplog):
    path = samples.write("mae-pth", tmp_path)
    method = samples.make_method()
    method = dataclasses.replace(method, decoder=dataclasses.replace(method.decoder, width=8))
    with caplog.at_level(logging.INFO):
        got, before = start(path, method)
    assert "left in the file: the decoder (width = 16, not 8" in caplog.messages[-1]
    np.testing.assert_array_equal(
        got["decoder"]["embed"]["kernel"], before["decoder"]["embed"]["kernel"]
    )


def test_a_decoder_of_other_heads_is_left_too(tmp_path, caplog):
    path = samples.write("hf-vit-mae", tmp_path)
    method = samples.make_method()
    method = dataclasses.replace(method, decoder=dataclasses.replace(method.decoder, heads=2))
    with caplog.at_level(logging.INFO):
        start(path, method)
    assert "left in the file: the decoder (heads = 4, not 2)" in caplog.messages[-1]


def bare(folder):
    return (folder / "model.safetensors").rename(folder.with_suffix(".safetensors"))


def test_heads_of_the_run_do_not_hide_that_a_published_size_has_others(tmp_path):
    path = bare(samples.write("timm", tmp_path))
    with pytest.raises(WeightsError, match="heads = 2, not 4"):
        start(path, samples.make_method(heads=4))


def test_heads_that_the_file_states_go_before_those_of_the_published_size(tmp_path):
    method = samples.make_method(heads=4)
    start(samples.write("timm", tmp_path, method), method)


def test_the_line_says_what_was_assumed(tmp_path, caplog):
    method = samples.make_method(width=48, heads=3)
    path = bare(samples.write("hf-vit", tmp_path, method))
    with caplog.at_level(logging.INFO):
        start(path, method)
    assert "; assumed: heads = 3 (of the run), norm_eps = 1e-06 (no" in caplog.messages[-1]


@pytest.mark.parametrize("mode", ["plain", "offset"])
@pytest.mark.parametrize("theirs", ["learned", "sincos"])
def test_trained_positions_are_resized_to_the_resolution_of_the_run(tmp_path, caplog, mode, theirs):
    old = samples.make_method(position=theirs)
    weights = samples.make_params(old)
    path = samples.write("hf-vit", tmp_path, old, weights)
    method = samples.make_method(position="learned", image_size=48, position_resize=mode)
    with caplog.at_level(logging.INFO):
        got, _ = start(path, method)
    table = np.concatenate([np.zeros((1, 32)), position.sincos_2d(32, (4, 4))])
    if theirs == "learned":
        table = weights["encoder"]["pos_embed"][0]
    resized = position.INTERPOLATIONS[mode].resize(table[1:], (4, 4), (6, 6))
    np.testing.assert_allclose(got["encoder"]["pos_embed"][0, 1:], resized, atol=1e-6)
    np.testing.assert_array_equal(got["encoder"]["pos_embed"][0, 0], table[0])
    assert f"positions resized from 4x4 to 6x6 patches ({mode})" in caplog.messages[-1]


def test_of_sin_cos_positions_the_line_says_which_table_is_used(tmp_path, caplog):
    path = samples.write("timm", tmp_path)
    with caplog.at_level(logging.INFO):
        start(path, samples.make_method(image_size=48))
    assert "table of 6x6 patches, in the file of 4x4" in caplog.messages[-1]


@pytest.mark.parametrize(
    "encoder, named",
    [
        ({"width": 64}, "another encoder: width = 32, not 64"),
        ({"depth": 3}, "depth = 2, not 3"),
        ({"heads": 4}, "heads = 2, not 4"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-06, not 1e-05"),
        ({"qkv_bias": False}, "qkv_bias = True, not False"),
        ({"num_registers": 2}, "has nothing for encoder/register_tokens"),
    ],
    ids=str,
)
def test_a_file_of_another_network_is_refused_in_one_line(tmp_path, encoder, named):
    path = samples.write("timm", tmp_path)
    with pytest.raises(WeightsError, match=named) as caught:
        start(path, samples.make_method(**encoder))
    assert "\n" not in str(caught.value) and "config.init_from" in str(caught.value)


@pytest.mark.parametrize("size", [4, 10])
def test_patches_of_another_size_are_resampled_as_flexivit_and_timm_do_it(tmp_path, caplog, size):
    """PyTorch makes the whole resize matrix, column by column, and its pseudo-inverse."""
    old = samples.make_method(position="learned")
    weights = samples.make_params(old)
    path = samples.write("timm", tmp_path, old, weights)
    ours = dict(position="learned", patch_size=size, image_size=4 * size)
    with caplog.at_level(logging.INFO):
        got, _ = start(path, samples.make_method(**ours))
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    how = dict(size=size, mode="bicubic", antialias=True)
    resize = torch.nn.functional.interpolate(basis, **how).reshape(64, -1)  # transposed
    kernel = weights["encoder"]["patch_embed"]["kernel"].reshape(64, -1)
    wanted = (torch.linalg.pinv(resize) @ torch.from_numpy(kernel).double()).numpy()
    made = np.asarray(got["encoder"]["patch_embed"]["kernel"]).reshape(size * size, -1)
    np.testing.assert_allclose(made, wanted, atol=2e-6)
    line = caplog.messages[-1]
    assert f"patches resampled from 8 to {size} pixels" in line
    assert "left in the file: the decoder" not in line and "positions taken (4x4 patches)" in line


def test_dino_begins_from_a_masked_autoencoder_as_the_same_function(tmp_path, caplog):
    """Its LayerScale begins at 1, and its positions at the sin-cos table."""
    path = samples.write("mae-pth", tmp_path)
    networks = samples.make_dino(mlp="gelu", depth=2)
    view = View(global_size=32, local_size=16, local_count=2)
    heads = {name: getattr(networks, name) for name in ("dino_head", "ibot_head")}
    method = DINO(encoder=networks.encoder, **heads, group_images=2, view=view)
    tree = jax.tree.map(jax.numpy.asarray, samples.make_params(Networks.of(method), 1))
    with caplog.at_level(logging.INFO):
        filled = from_weights(str(path), method, {"params": tree, "teacher": tree})
    for name in ("params", "teacher"):
        encoder = filled[name]["encoder"]
        for i in (1, 2):
            np.testing.assert_array_equal(encoder["blocks"][f"layer_scale{i}"]["gamma"], 1)
        table = position.sincos_2d(32, (4, 4))
        np.testing.assert_array_equal(encoder["pos_embed"][0, 1:], table)
    line = caplog.messages[-1]
    assert "LayerScale begins at 1" in line and "fresh: dino_head, ibot_head, encoder/mask" in line


def test_trained_positions_are_refused_where_the_run_computes_its_own(tmp_path):
    path = samples.write("timm", tmp_path, samples.make_method(position="learned"))
    with pytest.raises(WeightsError, match="set config.model.position=learned"):
        start(path, samples.make_method())


def test_nan_in_the_last_parameter_loads_nothing(tmp_path):
    path = samples.write("timm", tmp_path)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    last = open_file(file)["norm.bias"].offset
    data[last : last + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    method = samples.make_method()
    tree = fresh(method)
    with pytest.raises(WeightsError, match="NaN or infinity in norm.bias; nothing was loaded"):
        from_weights(str(path), method, {"params": tree, "teacher": {}})
    samples.assert_same(tree, samples.make_params(method, seed=1), "mae")
