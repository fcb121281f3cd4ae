"""Zero-shot retrieval of image-text pairs: does an image find one of its captions among all
captions, and a caption its image?

Recall at k as CLIP and its followers report it on Flickr30k and COCO (Karpathy's splits: no prompt,
raw captions): the share of queries with at least one right answer among the k highest cosines. A
caption that several images share is one text with several images, so that equal captions are no
rivals of each other; where captions differ, as there, nothing changes by that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import DAMAGE, EvalView, Source
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.methods.base import Variables
from webssl_jax.methods.clip import CLIP
from webssl_jax.sharding import mesh as meshes

KS = (1, 5, 10)
_QUERIES = 1024  # compared at a time, so that memory stays bounded
log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """images: (n, H, W, 3) uint8. texts: m different captions. links: (p, 2) int32, which image has
    which caption; each image and each text occurs."""

    images: np.ndarray
    texts: tuple[str, ...]
    links: np.ndarray


def read_pairs(
    source: Source, view: EvalView, limit: int | None = None, threads: int = 16
) -> Pairs:
    """The captioned images of a source, at most ``limit``, evenly from the whole of it. Records
    without a caption are passed over; damaged ones too, named in the log.

    Raises:
      UserError: if no record has a caption.
    """

    def read(index: int) -> tuple[np.ndarray, tuple[str, ...]] | None:
        try:
            record = records.decode(source[index])
            return (view(record.image), record.captions) if record.captions else None
        except DAMAGE as error:
            reason = " ".join(str(error).split())
            log.warning("damaged record skipped: %s: %s", source.describe(index), reason)
            return None

    count = min(limit or len(source), len(source))
    chosen = (np.arange(count) * len(source) // count).tolist()
    with futures.ThreadPoolExecutor(threads) as pool:
        found = [row for row in pool.map(read, chosen) if row is not None]
    if not found:
        raise UserError(
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


def embed(function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, batch: int) -> np.ndarray:
    """``function`` (batch, ...) -> (batch, E) of all rows, always ``batch`` at a time, so that one
    compilation serves; the copies that fill the last are cut off again. (n, E) float32."""
    out = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        out.append(np.asarray(function(filled), np.float32)[: len(part)])
    return np.concatenate(out)


class RunRetrieval:
    """Retrieval with the two towers of a run, on a source's captioned images.

    Args:
      method: one with ``embed_images``, ``embed_texts`` and ``text`` (``methods/clip.py``).
      batch: images or texts a call; must divide over the mesh.
      limit: of images; None for all.

    Raises:
      UserError: if no record has a caption.
    """

    name = "retrieval"

    def __init__(
        self,
        method: CLIP,
        mesh: Mesh,
        source: Source,
        batch: int = 256,
        limit: int | None = None,
        threads: int = 16,
    ):
        self.pairs = read_pairs(source, method.eval_view(), limit, threads)
        self._tokens = Tokenizer(method.text.context)(self.pairs.texts)
        self._batch, self._sharding = batch, meshes.batch_sharding(mesh)

        def compiled(tower: Callable) -> Callable:
            def compute(params, rows):
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for layers.on_batch
                    return tower(params, rows)

            return jax.jit(compute, out_shardings=meshes.replicated(mesh))

        self._embed_images = compiled(method.embed_images)
        self._embed_texts = compiled(method.embed_texts)

    def run(self, variables: Variables) -> dict[str, float]:
        """What :func:`recalls` says. All processes call it.

        Raises:
          UserError: if an embedding is not finite.
        """

        def embedded(tower: Callable, rows: np.ndarray) -> np.ndarray:
            def call(part: np.ndarray) -> np.ndarray:
                placed = jax.make_array_from_callback(
                    part.shape, self._sharding, lambda index: part[index]
                )
                return tower(variables.params, placed)

            return embed(call, rows, self._batch)

        images = embedded(self._embed_images, self.pairs.images)
        texts = embedded(self._embed_texts, self._tokens)
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            raise UserError(
                "retrieval: NaN or infinity in the embeddings; the network has diverged, or its "
                "number format is too small for it"
            )
        return recalls(images, texts, self.pairs.links)


def recalls(
    images: np.ndarray, texts: np.ndarray, links: np.ndarray, ks: Sequence[int] = KS
) -> dict[str, float]:
    """{``image_to_text_r1``: the share of images with one of their captions among the ``1`` nearest
    texts, ..., ``text_to_image_r1``: ...}, in 0 ... 1.

    images: (n, E), texts: (m, E), L2-normalised. links: as of :class:`Pairs`. An answer that is as
    near as a wrong one counts as behind it.
    """
    out = {}
    both = (
        ("image_to_text", images, texts, links),
        ("text_to_image", texts, images, links[:, ::-1]),
    )
    for name, queries, answers, right in both:
        ranks = _ranks(queries, answers, right)
        out |= {f"{name}_r{k}": float((ranks < k).mean()) for k in ks}
    return out


def _ranks(queries: np.ndarray, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n,) how many wrong answers are at least as near to a query as its nearest right one."""
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ answers.T
        here = right[(right[:, 0] >= start) & (right[:, 0] < start + len(scores))]
        mask = np.zeros(scores.shape, bool)
        mask[here[:, 0] - start, here[:, 1]] = True
        best = np.where(mask, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[start : start + len(scores)] = ((scores >= best) & ~mask).sum(axis=1)
    return ranks
