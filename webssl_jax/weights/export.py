"""Writes weights for other libraries: folders of ``transformers``, timm and open_clip with their
configs, preprocessing, tokenizer and a model card, or a ``.pth`` file of the original code.

``publish.py`` says what is written, of a run or of weights of another family, and adds a card.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from webssl_jax.telemetry.progress import Progress
from webssl_jax.weights import (
    clip,
    dino,
    preprocessing,
    safetensors_io,
    tables,
    tokenizer_files,
    torch_file,
)
from webssl_jax.weights.families import FAMILIES, table_of
from webssl_jax.weights.stored import WeightsError
from webssl_jax.weights.tables import Constant

_CHUNKED = ("dinov2-pth", "dinov2-teacher")
_OURS = (
    "model*.safetensors",
    safetensors_io.INDEX_FILE,
    "config.json",
    "preprocessor_config.json",
    clip.OPEN_CLIP_FILE,
    clip.OPEN_CLIP_CONFIG,
    *tokenizer_files.NAMES,
    "README.md",
)


def write(
    params: Any,
    networks: Any,
    family: str,
    output: str | os.PathLike,
    dtype: str,
    max_file_bytes: int,
    card: Callable[[], str],
    chunks: int | None = None,
) -> pathlib.Path:
    """Writes parameters of ``networks``. The result appears whole or not at all.

    Args:
      networks: :class:`~webssl_jax.weights.networks.Networks`.
      params: arrays, or ``tables.Leaf``.
      family: a name in ``FAMILIES``.
      output: for a folder a new or empty one, or an earlier export, which is then replaced; for
        a ``.pth`` family the file.
      dtype: of the weights, ``float32`` or ``bfloat16``.
      card: makes the README.md; called for a folder, before anything is written.
      chunks: as which blocks are named, of DINOv2's ``.pth``; see ``dino.chunked_names``.

    Raises:
      WeightsError: if the family cannot hold the networks, a parameter is not finite, ``output``
        holds something else, or the disk is full.
    """
    output = pathlib.Path(output)
    # "." has no name to stage under; of a link, what it leads to is replaced
    if not output.name or output.name == ".." or output.is_symlink():
        output = output.resolve()
    table, entry = table_of(family, networks), FAMILIES[family]
    config = entry.config(networks) if entry.config else None
    readme = card() if _is_folder(family) else ""
    layout = tables.layout(table, params)
    if chunks is not None and family not in _CHUNKED:
        raise WeightsError(f"{family}: has no chunks of blocks; {', '.join(_CHUNKED)} have")
    names = [t.key for t in layout]
    if chunks is not None:
        names = dino.chunked_names(names, networks.encoder.depth, chunks)
    # Constants stay in float32: they are small, and a position table rounded to bfloat16 moves the
    # features by 2e-4.
    specs = [
        safetensors_io.Spec(name, t.shape, "float32" if isinstance(t.row, Constant) else dtype)
        for name, t in zip(names, layout)
    ]
    size = sum(spec.num_bytes for spec in specs)
    _check_replaceable(output, _is_folder(family))
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    progress = Progress(len(specs), f"writing {size / 1e6:,.1f} MB:", "tensors")
    arrays = (array for _, array in tables.export(params, table))
    stream = _counted(zip(names, arrays), progress)
    try:
        if not _is_folder(family):
            output.parent.mkdir(parents=True, exist_ok=True)
            extra = {"webssl_jax": entry.extra(networks)} if entry.extra else {}
            torch_file.write_file(output, entry.key, specs, stream, extra)
            progress.close()
            return output
        staging.mkdir(parents=True)
        if entry.weights_file:
            safetensors_io.write_file(staging / entry.weights_file, specs, stream)
        else:
            safetensors_io.write_folder(staging, specs, stream, max_file_bytes)
        progress.close()
        assert config is not None  # a folder has one
        texts = {entry.config_file: _json(config), "README.md": readme}
        if entry.library == "transformers":
            texts["config.json"] = _json(config | {"dtype": dtype})
            texts["preprocessor_config.json"] = _json(
                preprocessing.for_transformers(networks.preprocess, entry.towers)
            )
            if "text" in entry.needs and tokenizer_files.has_tokenizer(networks.text.vocabulary):
                masked = networks.text.pooling == "eot"
                texts |= tokenizer_files.tokenizer_files(networks.text.context, masked)
        for name, text in texts.items():
            safetensors_io.write_text(staging / name, text)
        _put(staging, output)
    except OSError as error:
        raise WeightsError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _is_folder(family: str) -> bool:
    """Whether a family is written as a folder, and not as a single ``.pth`` file."""
    return family in FAMILIES and FAMILIES[family].config is not None


def _check_replaceable(output: pathlib.Path, folder: bool) -> None:
    """Refuses to put an export where anything but an export is."""
    if not folder:
        if output.is_dir() or output.suffix not in (".pth", ".pt"):
            raise WeightsError(f"--output {output}: name a .pth file")
        return
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


def _put(staging: pathlib.Path, output: pathlib.Path) -> None:
    """Puts ``staging`` where ``output`` is. What was there goes aside and is removed last: whenever
    this ends, no export that was whole is lost."""
    if not output.exists():
        os.replace(staging, output)
        return
    aside = output.with_name(f".{output.name}.{os.getpid()}.old")
    os.replace(output, aside)
    try:
        os.replace(staging, output)
    except BaseException:  # Ctrl-C too
        os.replace(aside, output)
        raise
    shutil.rmtree(aside)


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors:
        yield tensor
        progress.update()


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
