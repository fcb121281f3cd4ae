"""Image-text pairs: from a record to an image and the tokens of one of its captions, on the host.

MetaCLIP, as CLIP, takes any one of an image's texts at each visit (arXiv 2309.16671); here the
generator of that visit draws it, so that a run and its resumption read the same.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from webssl_jax.data.records import Record, RecordError
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.data.views import RandomResizedCropView, RecordView

UNCAPTIONED = ("empty", "replace")


@dataclasses.dataclass(frozen=True)
class CaptionedView(RecordView):
    """An image as ``crop`` gives it, and one of its captions in ``context`` tokens, filled up with
    ``pad``.

    uncaptioned: what happens to a record without a caption: ``empty``, its text is empty;
    ``replace``, it counts as damaged, so that the loader puts another record in its place and names
    it in the log. Replacing is for a few of them: where most records have none, convert the shards
    without these.

    Raises:
      ValueError: for an unknown ``uncaptioned``.
    """

    crop: RandomResizedCropView
    context: int = 77
    uncaptioned: str = "empty"
    pad: int = 0

    def __post_init__(self) -> None:
        if self.uncaptioned not in UNCAPTIONED:
            raise ValueError(
                f"uncaptioned = {self.uncaptioned!r} is not one of {', '.join(UNCAPTIONED)}"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (size, size, 3) uint8, "tokens": (context,) int32}``.

        Raises:
          DecodeError: if the image cannot be decoded.
          RecordError: if it has no caption and is to be replaced.
        """
        if not record.captions and self.uncaptioned == "replace":
            raise RecordError("no caption")
        out = self.crop(record.image, rng)
        text = record.captions[rng.integers(len(record.captions))] if record.captions else ""
        return out | {"tokens": _tokenizer(self.context, self.pad)([text])[0]}


@functools.cache
def _tokenizer(context: int, pad: int) -> Tokenizer:
    """One a process, where words are remembered."""
    return Tokenizer(context, pad)
