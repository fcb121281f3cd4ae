"""A folder that ``transformers`` loads: weights, configs, preprocessing and a model card."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from webssl_jax.telemetry.progress import Progress
from webssl_jax.weights import safetensors_io, tables
from webssl_jax.weights.families import FAMILIES, table_of
from webssl_jax.weights.model_card import model_card
from webssl_jax.weights.tables import Constant, WeightsError

_BICUBIC = 3  # PIL's number
_OURS = (
    "model*.safetensors",
    safetensors_io.INDEX_FILE,
    "config.json",
    "preprocessor_config.json",
    "README.md",
)


def export_run(
    run: Any,
    family: str,
    output: str | os.PathLike,
    dtype: str = "float32",
    max_file_bytes: int = safetensors_io.MAX_FILE_BYTES,
) -> pathlib.Path:
    """Writes ``run`` as a folder of ``transformers``. The folder appears whole or not at all.

    Args:
      run: a :class:`~webssl_jax.checkpoints.Run`.
      family: ``hf-vit`` or ``hf-vit-mae``.
      output: a new or empty folder, or an earlier export, which is then replaced.
      dtype: of the weights, ``float32`` or ``bfloat16``.

    Raises:
      WeightsError: if the family cannot hold the run's networks, a parameter is not finite,
        ``output`` holds something else, or the disk is full.
    """
    output = pathlib.Path(output)
    table = table_of(family, run.method)
    # Constants stay in float32: they are small, and a position table rounded to bfloat16 moves the
    # features by 2e-4.
    specs = [
        safetensors_io.Spec(t.key, t.shape, "float32" if isinstance(t.row, Constant) else dtype)
        for t in tables.layout(table, run.variables.params)
    ]
    _check_replaceable(output)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(parents=True)
        size = sum(spec.num_bytes for spec in specs)
        progress = Progress(len(specs), f"writing {size / 1e6:,.1f} MB:", "tensors")
        stream = _counted(tables.export(run.variables.params, table), progress)
        safetensors_io.write_folder(staging, specs, stream, max_file_bytes)
        progress.close()
        config = FAMILIES[family].config(run.method) | {"dtype": dtype}
        card = model_card(run, FAMILIES[family].model_class, family, dtype, os.fspath(output))
        for name, text in (
            ("config.json", _json(config)),
            ("README.md", card),
            ("preprocessor_config.json", _json(preprocessor_config(run.method))),
        ):
            safetensors_io.write_text(staging / name, text)
        if output.exists():
            shutil.rmtree(output)
        os.replace(staging, output)
    except OSError as error:
        raise WeightsError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def import_folder(folder: str | os.PathLike, family: str, method: Any) -> dict[str, Any]:
    """Parameters (numpy, float32) for the networks of ``method`` from a folder or file.

    Raises:
      WeightsError: naming whatever does not fit; see :func:`webssl_jax.weights.tables.import_`.
    """
    template = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params
    reader = safetensors_io.Reader(folder)
    return tables.import_(reader, reader.keys(), table_of(family, method), template)


def preprocessor_config(method: Any) -> dict[str, Any]:
    """``preprocessor_config.json`` that repeats ``method.eval_view()`` and the normalisation.

    ViTImageProcessor can only squeeze an image into a square; BitImageProcessor resizes the shorter
    side and crops the centre, and is what DINOv2's own folders name.
    """
    view = method.eval_view()
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": view.size, "width": view.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(method.mean),
        "image_std": list(method.std),
    }


def _check_replaceable(output: pathlib.Path) -> None:
    """Refuses to put an export where anything but an export is."""
    if output.exists() and not output.is_dir():
        raise WeightsError(f"--output {output}: is a file; name a folder")
    if output.is_dir():
        other = [
            p.name
            for p in sorted(output.iterdir())
            if not any(p.match(pattern) for pattern in _OURS)
        ]
        if other:
            raise WeightsError(
                f"--output {output}: holds other things ({', '.join(other[:3])}"
                f"{', ...' if len(other) > 3 else ''}); name a new folder"
            )


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors:
        yield tensor
        progress.update()


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
