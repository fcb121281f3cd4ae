"""Pictures of a method with texts (CLIP): how alike images and captions are, and what each finds
first among the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from webssl_jax.data.pipeline import EvalView, Source
from webssl_jax.evaluators.base import evenly_spaced
from webssl_jax.evaluators.retrieval import NoCaptions, Pairs, read_pairs
from webssl_jax.evaluators.towers import Towers
from webssl_jax.visuals import neighbours, pairs

NAMES = ("similarity", "image_to_text", "text_to_image")
FOUND = 5
log = logging.getLogger(__name__)


def read_pictured(
    source: Source, view: EvalView, names: Sequence[str], limit: int, threads: int = 16
) -> Pairs | None:
    """Captioned images for the pictures ``names``; None if none of them is ours, or if there is no
    caption, which the log then says."""
    if not any(name in NAMES for name in names):
        return None
    try:
        return read_pairs(source, view, limit, threads)
    except NoCaptions as error:
        log.info("no pictures of images and texts: %s", error)
        return None


class TextPictures:
    """Draws ``names`` of some pairs.

    Args:
      found: among all of it is searched; every ``n / shown``-th image is shown, with its first
        text.
      tokens: of its texts.
      names: of :data:`NAMES`; others are not ours and are passed over.
    """

    def __init__(self, found: Pairs, tokens: np.ndarray, names: Sequence[str], shown: int = 8):
        self._pairs, self._tokens = found, tokens
        self._names = tuple(name for name in NAMES if name in names)
        self._images = evenly_spaced(len(found.images), shown)
        first = {image: text for image, text in reversed(found.links.tolist())}
        self._texts = np.array(list(dict.fromkeys(first[image] for image in self._images.tolist())))
        self._own = np.zeros((len(found.images), len(found.texts)), bool)
        self._own[found.links[:, 0], found.links[:, 1]] = True
        self._among = f"{len(found.images):,} images and {len(found.texts):,} texts"
        self._draws = jax.process_index() == 0

    def run(self, towers: Towers, step: int, of: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, (H, W, 3) uint8). All processes run it; only the first draws. ``of`` as of
        ``FeaturePictures.run``."""
        images, texts = towers.images(self._pairs.images), towers.texts(self._tokens)
        if not self._draws:
            return
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            log.warning("no pictures of images and texts: there is NaN or infinity in them")
            return
        for name in self._names:
            yield name, getattr(self, f"_{name}")(images, texts, of or f"step {step:,}")

    def _similarity(self, images: np.ndarray, texts: np.ndarray, of: str) -> np.ndarray:
        return pairs.similarity_sheet(
            self._pairs.images[self._images],
            [self._pairs.texts[i] for i in self._texts],
            texts[self._texts] @ images[self._images].T,
            self._own[self._images][:, self._texts].T,
            f"How alike texts and images are, {of}",
        )

    def _image_to_text(self, images: np.ndarray, texts: np.ndarray, of: str) -> np.ndarray:
        indices, cosines = neighbours.nearest(images[self._images], texts, FOUND)
        words, found, missed = self._pairs.texts, [], []
        for image, near, values in zip(self._images, indices, cosines):
            own = self._own[image]
            found.append([(words[j], float(x), bool(own[j])) for j, x in zip(near, values)])
            scores = texts @ images[image]
            best = int(np.where(own, scores, -np.inf).argmax())
            place = 1 + int((scores > scores[best]).sum())
            missed.append(None if own[near].any() else (words[best], float(scores[best]), place))
        return pairs.texts_sheet(
            self._pairs.images[self._images],
            found,
            missed,
            f"Images and the texts closest to them, {of}",
            f"Among {self._among}, with cosines. Green: the image's own text; red: where that is "
            "not among them, its own best and the place it has.",
        )

    def _text_to_image(self, images: np.ndarray, texts: np.ndarray, of: str) -> np.ndarray:
        indices, cosines = neighbours.nearest(texts[self._texts], images, FOUND)
        found = [
            [(self._pairs.images[i], float(x), bool(self._own[i, text])) for i, x in zip(*row)]
            for text, *row in zip(self._texts, indices, cosines)
        ]
        hits = sum(any(own for *_, own in row) for row in found)
        return pairs.images_sheet(
            [self._pairs.texts[i] for i in self._texts],
            found,
            f"Texts and the images closest to them, {of}",
            f"Among {self._among}, with cosines. Green frames: the text's own image, found for "
            f"{hits} of {len(found)}.",
        )
