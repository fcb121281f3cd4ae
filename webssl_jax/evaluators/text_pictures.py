"""Pictures of a method with texts (CLIP): how alike images and captions are, and what each finds
first among the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from webssl_jax.data import records
from webssl_jax.data.pipeline import ImageView, Source, read_some
from webssl_jax.evaluators.datasets import CAPTIONED, dataset_of
from webssl_jax.evaluators.texts.retrieval import NoCaptions, link
from webssl_jax.model import Model, in_batches, text_of, to_host
from webssl_jax.visuals import neighbours, pairs

NAMES = ("similarity", "image_to_text", "text_to_image")
FOUND = 5
_BATCH = 16
log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """images: (n, H, W, 3) uint8. texts: m different captions. links: (p, 2) int32, which image has
    which caption; each image and each text occurs."""

    images: np.ndarray
    texts: tuple[str, ...]
    links: np.ndarray


def read_pictured(
    source: Source, view: ImageView, names: Sequence[str], limit: int, threads: int = 16
) -> Pairs | None:
    """At most ``limit`` captioned images for the pictures ``names``, evenly from the whole source;
    None if none of them is ours, or if there is no caption, which the log then says."""
    if not any(name in NAMES for name in names):
        return None

    def see(record: records.Record) -> tuple[np.ndarray, tuple[str, ...]] | None:
        return (view(record.image), record.captions) if record.captions else None

    found = [row for _, row in read_some(source, see, limit, threads)]
    try:
        _, texts, links = link([captions for _, captions in found], dataset_of(source, CAPTIONED))
    except NoCaptions as error:
        log.info("no pictures of images and texts: %s", error)
        return None
    return Pairs(np.stack([image for image, _ in found]), texts, links)


class TextPictures:
    """Draws ``names`` of some pairs.

    Args:
      found: among all of it is searched; every ``n / shown``-th image is shown, with its first
        text.
      names: of :data:`NAMES`; others are not ours and are passed over.
    """

    def __init__(self, found: Pairs, names: Sequence[str], shown: int = 8):
        self._pairs = found
        self._names = tuple(name for name in NAMES if name in names)
        count = min(shown, len(found.images))
        self._images = np.arange(count) * len(found.images) // count
        first = {image: text for image, text in reversed(found.links.tolist())}
        self._texts = np.array(list(dict.fromkeys(first[image] for image in self._images.tolist())))
        self._own = np.zeros((len(found.images), len(found.texts)), bool)
        self._own[found.links[:, 0], found.links[:, 1]] = True
        self._among = f"{len(found.images):,} images and {len(found.texts):,} texts"

    def draw(self, model: Model, of: str) -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}. All processes call it; only the first gets pictures. ``of`` as
        of ``pictures.ModelPictures.draw``."""
        text = text_of(model)
        batch = model.rounded_batch(_BATCH)
        images = np.concatenate(
            [
                to_host(text.embed_images(part))[:n]
                for part, n in in_batches(self._pairs.images, batch)
            ]
        )
        texts = text(self._pairs.texts)
        if jax.process_index():
            return {}
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            log.warning("no pictures of images and texts: there is NaN or infinity in them")
            return {}
        return {name: getattr(self, f"_{name}")(images, texts, of) for name in self._names}

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
