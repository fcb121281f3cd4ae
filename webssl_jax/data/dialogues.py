"""Conversations about images: from a record to a square image and tokens, on the host."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from webssl_jax.data import annotations as annotation
from webssl_jax.data.decode import decode_image
from webssl_jax.data.records import Record, RecordError
from webssl_jax.data.turns import IMAGE, DialogueError
from webssl_jax.data.views import RecordView
from webssl_jax.language.dialogue import Dialogue, seen_cells


def square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """An RGB image in the middle of a square of the colour ``mean`` (shares of 255, cut to whole
    grey levels), as LLaVA pads it."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(255 * share) for share in mean)
    made = Image.new("RGB", (side, side), (red, green, blue))
    made.paste(image, ((side - width) // 2, (side - height) // 2))
    return made


def see(image: Image.Image, size: int, mean: tuple[float, ...]) -> np.ndarray:
    """(size, size, 3) uint8: padded to a square, then resized (bicubic, antialiased)."""
    made = square(image, mean).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(made)


@dataclasses.dataclass(frozen=True)
class DialogueView(RecordView):
    """The image of a record and its annotation ``conversations``.

    size: pixels a side. mean: the encoder's, of padding. shape: cells of an image, (rows, columns).
    length: tokens, image included; longer conversations are cut at their end.
    """

    size: int
    mean: tuple[float, ...]
    shape: tuple[int, int]
    length: int
    dialogue: Dialogue

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (size, size, 3) uint8, "tokens": (length,) int32 as of
        ``language.dialogue.Encoded`` with ``PADDING`` after them, "answer": (length,) bool, "cut":
        () int32}``, the last the number of tokens that found no room. A conversation without
        ``<image>`` gets a black image, which no token stands for.

        Raises:
          DecodeError: if the image cannot be decoded.
          RecordError: without a conversation that can be learned.
        """
        turns = annotation.conversations(record)
        try:
            messages = self.dialogue.messages(turns, image=True)
            shown = any(IMAGE in message["content"] for message in messages)
            cells, image = None, np.zeros((self.size, self.size, 3), np.uint8)
            if shown:
                opened = decode_image(record.image)
                cells = seen_cells(*opened.size, self.shape, self.dialogue.unpad)
                image = see(opened, self.size, self.mean)
            encoded, cut = self.dialogue.encode(messages, cells).fitted(self.length)
        except DialogueError as error:
            raise RecordError(str(error)) from None
        return {
            "image": image,
            "tokens": encoded.tokens,
            "answer": encoded.answer,
            "cut": np.asarray(cut, np.int32),
        }
