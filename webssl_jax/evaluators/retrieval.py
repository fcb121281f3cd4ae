"""Zero-shot retrieval of image-text pairs: does an image find one of its captions among all
captions, and a caption its image?

Recall at k as CLIP and its followers report it on Flickr30k and COCO (Karpathy's splits: no prompt,
raw captions): the share of queries with at least one right answer among the k highest cosines. A
caption that several images share is one text with several images, so that equal captions are no
rivals of each other; where captions differ, as there, nothing changes by that.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import EvalView, Source, read_some
from webssl_jax.evaluators.base import Ranks
from webssl_jax.evaluators.towers import Towers, check_finite

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
PROTOCOL = 1  # as that of frozen.py
_QUERIES = 1024  # compared at a time, so that memory stays bounded


class NoCaptions(UserError):
    """No record of a source has a caption."""


class Pairs(NamedTuple):
    """images: (n, H, W, 3) uint8. texts: m different captions. links: (p, 2) int32, which image has
    which caption; each image and each text occurs."""

    images: np.ndarray
    texts: tuple[str, ...]
    links: np.ndarray


def read_pairs(
    source: Source, view: EvalView, limit: int | None = None, threads: int = 16
) -> Pairs:
    """The captioned images of a source, at most ``limit``, evenly from the whole of it; the same
    every time. Damaged records are skipped, and named in the log.

    Raises:
      NoCaptions: if no record has a caption.
    """

    def see(record: records.Record) -> tuple[np.ndarray, tuple[str, ...]] | None:
        return (view(record.image), record.captions) if record.captions else None

    found = [row for _, row in read_some(source, see, limit, threads)]
    if not found:
        raise NoCaptions(
            f"no captioned image in {len(source):,} records ({source.describe(0)}, ...); give "
            "records with captions, or leave retrieval out"
        )
    places: dict[str, int] = {}
    links = [
        (image, places.setdefault(caption, len(places)))
        for image, (_, captions) in enumerate(found)
        for caption in dict.fromkeys(captions)
    ]
    return Pairs(np.stack([row[0] for row in found]), tuple(places), np.array(links, np.int32))


class Retrieval(NamedTuple):
    """What a network found.

    data: fingerprint of the pairs, and the protocol; only results with the same are comparable.
    image_to_text: of each image, how many wrong texts come before its first right one;
    text_to_image: the other way. chance: the metrics that a random order would have on average.
    """

    data: str
    image_to_text: Ranks
    text_to_image: Ranks
    chance: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """``eval/retrieval/image_to_text_r1``, ``..._r5``, ``..._r10`` and ``text_to_image_...``,
        each with ``_se``."""
        out = {}
        for way in WAYS:
            for k in KS:
                score = getattr(self, way).within(k)
                name = f"eval/retrieval/{way}_r{k}"
                out |= {name: score.top1, f"{name}_se": score.se}
        return out

    @property
    def counts(self) -> tuple[int, int]:
        """(images, texts)."""
        return len(self.image_to_text.behind), len(self.text_to_image.behind)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        ways = {way: getattr(self, way).to_json() for way in WAYS}
        return self._asdict() | ways

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Retrieval:
        """Inverse of :meth:`to_json`."""
        ways = {way: Ranks.from_json(row[way]) for way in WAYS}
        return cls(**row | ways)


class RetrievalEvaluation:
    """Measures retrieval among ``pairs``, of which ``tokens`` (m, C) are the texts. ``chance``: the
    metrics of a random order."""

    name = "retrieval"

    def __init__(self, pairs: Pairs, tokens: np.ndarray):
        self.pairs, self._tokens = pairs, tokens
        crc = zlib.crc32(np.ascontiguousarray(pairs.images))
        crc = zlib.crc32("\n".join(pairs.texts).encode(), zlib.crc32(pairs.links, crc))
        self._data = f"{crc:08x}-{PROTOCOL}"
        self.chance = chance(pairs.links)

    def measure(self, towers: Towers) -> Retrieval:
        """All processes call it.

        Raises:
          UserError: if an embedding is not finite.
        """
        images, texts = towers.images(self.pairs.images), towers.texts(self._tokens)
        check_finite("retrieval", images, texts)
        return Retrieval(self._data, *ranks(images, texts, self.pairs.links), self.chance)


def ranks(images: np.ndarray, texts: np.ndarray, links: np.ndarray) -> tuple[Ranks, Ranks]:
    """(n,) of each image, how many wrong texts are at least as near as the nearest of its own; and
    (m,) of each text, the same of images. 0 is a hit at the first place.

    images: (n, E), texts: (m, E), L2-normalised. links: as of :class:`Pairs`.
    """
    return _ranks(images, texts, links), _ranks(texts, images, links[:, ::-1])


def _ranks(queries: np.ndarray, answers: np.ndarray, right: np.ndarray) -> Ranks:
    out = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ answers.T
        here = right[(right[:, 0] >= start) & (right[:, 0] < start + len(scores))]
        mask = np.zeros(scores.shape, bool)
        mask[here[:, 0] - start, here[:, 1]] = True
        best = np.where(mask, scores, -np.inf).max(axis=1, keepdims=True)
        out[start : start + len(scores)] = ((scores >= best) & ~mask).sum(axis=1)
    return Ranks(out)


def chance(links: np.ndarray) -> dict[str, float]:
    """{metric: its mean over all orders of the answers}. A query with c right ones among m answers
    misses them all in the first k with probability (m - c choose k) / (m choose k)."""
    out = {}
    for way, right in zip(WAYS, (links, links[:, ::-1])):
        c, m = np.bincount(right[:, 0]), right[:, 1].max() + 1
        for k in KS:
            drawn = np.arange(min(k, m))[:, None]
            misses = np.prod(np.maximum(1 - c / (m - drawn), 0), axis=0)
            out[f"eval/retrieval/{way}_r{k}"] = float(1 - misses.mean())
    return out
