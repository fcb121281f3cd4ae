"""Zero-shot retrieval of image-text pairs: does an image find one of its captions among all
captions, and a caption its image?

Recall at k as CLIP and its followers report it on Flickr30k and COCO (Karpathy's splits: no prompt,
raw captions): the share of queries with at least one right answer among the k highest cosines. A
caption that several images share is one text with several images, so that equal captions are no
rivals of each other; where captions differ, as there, nothing changes by that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.base import TEXTS
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.model import Model, text_of
from webssl_jax.weights.networks import Networks

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
HEADLINE_K = 10
# Raised whenever the same model would get another figure on the same data.
PROTOCOL = 2
_QUERIES = 1024  # compared at a time, so that memory stays bounded


class NoCaptions(UserError):
    """No record of a source has a caption."""


@dataclasses.dataclass(frozen=True)
class RetrievalOptions:
    """The keys of a row. pairs: captioned shards. max_images: drawn evenly; 0 for all; fewer are
    easier to tell apart."""

    pairs: str
    max_images: int = 0

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.CAPTIONED, pairs=self.pairs)


class Retrieval:
    """Recall of captions by images and of images by captions."""

    Options = RetrievalOptions
    needs = frozenset({TEXTS})

    def __init__(self, options: RetrievalOptions):
        self._data = datasets.open_dataset(options.pairs, datasets.CAPTIONED, options.max_images)
        self.data, self.datasets = f"{self._data.identity}-{PROTOCOL}", (self._data,)

    @classmethod
    def want(cls, options: RetrievalOptions, networks: Networks) -> None:
        """None: embeddings are not pooled features."""
        return None

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        store = cache.embeddings(model, self._data)
        rows, texts, links = link([row.captions for row in store.rows], self._data)
        images = store.array("image")[rows]
        embedded = embed_texts(model, texts)
        metrics: dict[str, float] = {}
        items: dict[str, np.ndarray] = {}
        for way, behind in zip(WAYS, ranks(images, embedded, links)):
            for k in KS:
                found = scored(f"{way}_r{k}", behind < k)
                metrics, items = metrics | found[0], items | found[1]
        meaning = (
            f"retrieval: share of {len(rows):,} images with one of their own captions among the k "
            f"closest of {len(texts):,} texts, and of texts with one of their own images among the "
            "k closest."
        )
        data = datasets.fingerprint(self._data.identity, rows, texts, links, PROTOCOL)
        headline = tuple(f"{way}_r{HEADLINE_K}" for way in WAYS)
        return Outcome(headline, metrics, items, data, meaning, chance=chance(links))


def link(
    captions: Sequence[Sequence[str]], dataset: Dataset
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """(rows that have a caption, different texts, links (p, 2) int32: which of those rows has which
    text).

    Raises:
      NoCaptions: if no record has a caption.
    """
    rows = np.array([i for i, texts in enumerate(captions) if texts], np.int64)
    if not len(rows):
        raise NoCaptions(
            f"no captioned image in {len(dataset):,} records ({dataset.source.describe(0)}, ...); "
            "give records with captions, or leave retrieval out"
        )
    places: dict[str, int] = {}
    links = [
        (image, places.setdefault(caption, len(places)))
        for image, row in enumerate(rows.tolist())
        for caption in dict.fromkeys(captions[row])
    ]
    return rows, tuple(places), np.array(links, np.int32)


def embed_texts(model: Model, texts: Sequence[str]) -> np.ndarray:
    """(n, E) float32, L2-normalised.

    Raises:
      UserError: without a text tower or its tokenizer, or if they cannot be compared.
    """
    embeddings = text_of(model)(texts)
    if not np.isfinite(embeddings).all():
        raise UserError(
            "evaluation: NaN or infinity in the embeddings of texts; the network has diverged, or "
            "its number format is too small for it"
        )
    return embeddings


def ranks(
    images: np.ndarray, texts: np.ndarray, links: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) of each image, how many wrong texts are at least as near as the nearest of its own; and
    (m,) of each text, the same of images. 0 is a hit at the first place.

    images: (n, E), texts: (m, E), L2-normalised. links: (p, 2) int, which image has
    which text; each image and each text occurs.
    """
    return _ranks(images, texts, links), _ranks(texts, images, links[:, ::-1])


def _ranks(queries: np.ndarray, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    out = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ answers.T
        here = right[(right[:, 0] >= start) & (right[:, 0] < start + len(scores))]
        mask = np.zeros(scores.shape, bool)
        mask[here[:, 0] - start, here[:, 1]] = True
        best = np.where(mask, scores, -np.inf).max(axis=1, keepdims=True)
        out[start : start + len(scores)] = ((scores >= best) & ~mask).sum(axis=1)
    return out


def chance(links: np.ndarray) -> dict[str, float]:
    """{metric: its mean over all orders of the answers}. A query with c right ones among m answers
    misses them all in the first k with probability (m - c choose k) / (m choose k)."""
    out = {}
    for way, right in zip(WAYS, (links, links[:, ::-1])):
        c, m = np.bincount(right[:, 0]), right[:, 1].max() + 1
        for k in KS:
            drawn = np.arange(min(k, m))[:, None]
            misses = np.prod(np.maximum(1 - c / (m - drawn), 0), axis=0)
            out[f"{way}_r{k}"] = float(1 - misses.mean())
    return out
