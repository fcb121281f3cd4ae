"""Parameters of decoders in files: safetensors of ``transformers`` and GGUF, streamed onto devices,
and safetensors back."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from webssl_jax import params as params_lib
from webssl_jax.language import gguf_file, hf
from webssl_jax.language.decoder import template
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.sharding import rules
from webssl_jax.weights import load as weights_load
from webssl_jax.weights import safetensors_io, tables
from webssl_jax.weights.networks import Networks


def read_config(folder: pathlib.Path, dtype: str) -> DecoderConfig:
    """The decoder that a folder of transformers holds, to be computed in ``dtype``.

    Raises:
      WeightsError: if it cannot be read, or is none of ours.
    """
    file = folder / "config.json"
    return dataclasses.replace(hf.read_config(safetensors_io.parse_json(file), file), dtype=dtype)


def open_(path: str) -> weights_load.Loaded | None:
    """A language model as weights that lie in files: the network ``language``. None for what is
    none: a folder or file of another kind.

    Raises:
      WeightsError: for a missing or damaged file, or a decoder that is none of ours.
    """
    if path == gguf_file.PACKAGED or path.endswith(".gguf"):
        place = gguf_file.packaged_file() if path == gguf_file.PACKAGED else pathlib.Path(path)
        if not place.is_file():
            raise tables.WeightsError(f"{place}: no such file")
        file = gguf_file.GGUFFile(place)
        tensors: Mapping[str, tables.TensorOfTheirs] = file.tensors
        config, table, family = file.config, file.table(), "GGUF"
    else:
        folder = pathlib.Path(path)
        said = folder / "config.json"
        kind = safetensors_io.parse_json(said).get("model_type") if said.is_file() else None
        if kind not in hf.MODEL_TYPES:
            return None
        config = read_config(folder, "float32")
        tensors = safetensors_io.open_file(folder)
        table = dataclasses.replace(hf.table(config), family=str(folder))
        family = hf.model_type(config)
    params = {"language": tables.open_(tensors, table, template(config))}
    dtype = str(next(iter(tensors.values())).dtype)
    return weights_load.Loaded(family, Networks(language=config), params, path, "", dtype)


def read_params(
    folder: pathlib.Path, config: DecoderConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameters in a folder of transformers, held in ``config.dtype``.

    Raises:
      WeightsError: for a missing file or tensor, one that does not fit or is not finite.
    """
    table = dataclasses.replace(hf.table(config), family=str(folder))
    return place(safetensors_io.open_file(folder), table, config, mesh)


def place(
    tensors: Mapping[str, Any], table: tables.Table, config: DecoderConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """All parameters, in ``config.dtype``, on the devices of ``mesh`` (None: on the first device).
    One after the other: the host never holds more than one of them.

    Raises:
      WeightsError: naming what is missing, unexpected, misshapen or not finite.
    """
    shapes = template(config)
    opened = tables.open_(tensors, table, shapes)
    put = _placing(shapes, mesh, config.dtype)
    not_finite: list[str] = []

    def one(path: str, leaf: tables.Leaf) -> jax.Array | None:
        try:
            return put(path, leaf)
        except tables.NotFinite as error:
            not_finite.append(str(error))
            return None

    placed = params_lib.unflatten(
        {path: one(path, leaf) for path, leaf in params_lib.flatten(opened).items()}
    )
    tables.refuse(table.family, {"NaN or infinity in": not_finite})
    return placed


def _placing(shapes: Any, mesh: Mesh | None, dtype: str) -> Callable[[str, tables.Leaf], jax.Array]:
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = {} if mesh is None else params_lib.flatten(rules.shardings(shapes, mesh))
    kind = safetensors_io.DTYPES[dtype]
    return lambda path, leaf: weights_load.place(leaf, leaf.shape, where.get(path, alone), kind)


def write_folder(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Any,
    dtype: str = "float32",
    max_file_bytes: int = safetensors_io.MAX_FILE_BYTES,
) -> None:
    """Writes ``config.json`` and safetensors that transformers opens, one block at a time.

    Raises:
      WeightsError: if there is no such model in transformers, a value is not finite, or the folder
        is not empty or cannot be written.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise tables.WeightsError(f"{folder}: is not empty; name a new folder")
    table = hf.table(config)
    specs = [
        safetensors_io.Spec(tensor.key, tensor.shape, dtype)
        for tensor in tables.layout(table, params)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_folder(folder, specs, tables.export(params, table), max_file_bytes)
    text = json.dumps(hf.write_config(config, dtype), indent=2) + "\n"
    safetensors_io.write_text(folder / "config.json", text)
