"""How much readable text an image holds, without a language model: by a text detector in ONNX.

The detector is PP-OCRv4 (mobile, 4.7 MB, Apache-2.0) out of a package, or any graph with its
interface: float32 (1, 3, H, W) in, sides multiples of 32, and (1, 1, H, W) probabilities of text
out.

    pip install 'webssl_jax[text-filter]'
    pip install --no-deps rapidocr-onnxruntime==1.4.4    # whose requirements are not needed
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data.decode import decode_image
from webssl_jax.data.records import Record

INSTALL = "pip install --no-deps rapidocr-onnxruntime==1.4.4"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_TEXT = 0.3  # probability of a pixel's being text, PP-OCR's threshold
_BOX = 0.6  # mean probability of a box, also PP-OCR's
_SMALLEST = 3  # pixels of a box's shorter side
_GRID = 32  # sides are multiples of it


@dataclasses.dataclass(frozen=True)
class TextBoxes:
    """text_area: share of the image's pixels that are text. boxes: connected pieces of text, words
    mostly. lines: rows of boxes at one height. text_height: the median height of a box, as a share
    of the image's.

    model: an ONNX file; empty: the package's. side: the longer side that the detector sees, in
    pixels at most. Smaller images are not enlarged: a small drawing, enlarged, looks like letters.
    """

    model: str = ""
    side: int = 512

    version: ClassVar[int] = 1
    columns: ClassVar[Mapping[str, pa.DataType]] = {
        "text_area": pa.float32(),
        "boxes": pa.int32(),
        "lines": pa.int32(),
        "text_height": pa.float32(),
    }

    def __post_init__(self) -> None:
        if self.side < _GRID:
            raise UserError(f"--scorer text_boxes:side={self.side}: must be at least {_GRID}")

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> dict[str, Any]:
        image = decode_image(record.image, self.side)
        scale = min(1.0, self.side / max(image.size))
        sides = [max(_GRID, round(n * scale / _GRID) * _GRID) for n in image.size]
        pixels = np.asarray(image.resize(sides, Image.Resampling.BILINEAR), np.float32)
        # PP-OCR's own reader gives blue first, with the statistics of red first
        normal = (pixels[..., ::-1] / 255 - _MEAN) / _STD
        session = _session(self.model or str(packaged_model()))
        feed = {session.get_inputs()[0].name: normal.transpose(2, 0, 1)[None]}
        return measure(session.run(None, feed)[0][0, 0])


def measure(probability: np.ndarray) -> dict[str, Any]:
    """The columns, from (H, W) probabilities of text."""
    from scipy import ndimage

    text = probability > _TEXT
    pieces, count = ndimage.label(text)
    found = []  # (top, bottom) of each box
    means = ndimage.mean(probability, pieces, np.arange(1, count + 1)) if count else []
    for (rows, columns), mean in zip(ndimage.find_objects(pieces), means, strict=True):
        sides = rows.stop - rows.start, columns.stop - columns.start
        if mean >= _BOX and min(sides) >= _SMALLEST:
            found.append((rows.start, rows.stop))
    heights = [bottom - top for top, bottom in found]
    return {
        "text_area": float(text.mean()),
        "boxes": len(found),
        "lines": _lines(found),
        "text_height": float(np.median(heights)) / len(probability) if found else 0.0,
    }


def _lines(boxes: Sequence[tuple[int, int]]) -> int:
    """Rows that boxes stand in: a box whose middle lies within the one before it is in its row."""
    lines, bottom = 0, -1.0
    for top, end in sorted(boxes, key=sum):
        if (top + end) / 2 > bottom:
            lines, bottom = lines + 1, end
    return lines


def packaged_model() -> Path:
    """PP-OCRv4's detector in the package ``rapidocr-onnxruntime``, which is not imported.

    Raises:
      UserError: if the package is not there.
    """
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("models/*det*.onnx")):
            return file
    raise UserError(
        f"--scorer text_boxes: the package that holds the detector is not installed: {INSTALL}, or "
        "name a graph: --scorer text_boxes:model=FILE"
    )


@functools.lru_cache(1)
def _session(model: str) -> Any:
    """Once in a worker."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "--scorer text_boxes: onnxruntime is not installed; pip install "
            "'webssl_jax[text-filter]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a worker has one core
    try:
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception as error:  # it has no common type
        words = " ".join(str(error).split())
        raise UserError(f"--scorer text_boxes:model={model}: cannot be read ({words})") from None
