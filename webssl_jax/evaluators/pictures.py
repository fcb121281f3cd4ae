"""Pictures of any feature function: PCA of patches, attention, nearest neighbours, token norms.

An evaluator in the sense of ``base.py``: it is made once from images and run on feature functions,
a training run's by cadence or a checkpoint's afterwards (tools/pictures.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax.config import UserError, suggest
from webssl_jax.data import records
from webssl_jax.data.pipeline import Source, read_each
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import text_pictures
from webssl_jax.evaluators.base import FeatureFunction, evenly_spaced
from webssl_jax.evaluators.features import in_batches
from webssl_jax.evaluators.retrieval import Pairs
from webssl_jax.evaluators.runs import feature_function
from webssl_jax.evaluators.towers import has_texts, tokenize, tower_functions
from webssl_jax.methods.base import Method, Variables
from webssl_jax.sharding import mesh as meshes
from webssl_jax.visuals import attention, neighbours, norms, pca

NAMES = ("pca", "attention", "neighbours", "norms")
NEIGHBOURS = 7
_OF_ALL = ("neighbours", "norms")  # these look at every image, the others at a few
_BATCH = 16
log = logging.getLogger(__name__)


class Images(NamedTuple):
    """pixels (n, H, W, 3) uint8; for each a label or None, and a caption ("" where there is
    none)."""

    pixels: np.ndarray
    labels: Sequence[str | None]
    captions: Sequence[str]


def available(method: Method) -> tuple[str, ...]:
    """What can be drawn of ``method``, besides what its features give."""
    return method.picture_names + (text_pictures.NAMES if has_texts(method) else ())


def choose(asked: str, own: Sequence[str], where: str) -> tuple[str, ...]:
    """The pictures that ``asked`` names: ``all``, ``none``, or names with commas between them.

    Args:
      own: of :func:`available`.
      where: the key or flag that asks.

    Raises:
      UserError: for a name that is neither ours nor the method's, and for no name at all.
    """
    known = (*own, *NAMES)
    names = tuple(name.strip() for name in asked.split(",") if name.strip())
    if names in (("all",), ("none",)):
        return known if names == ("all",) else ()
    if not names:
        raise UserError(
            f"{where} = {asked!r}: names no picture; give all, none or some of {', '.join(known)}"
        )
    for name in names:
        if name not in known:
            raise UserError(
                f"{where} = {asked}: there is no picture {name!r} of these weights; "
                f"{suggest(name, (*known, 'all'))}"
            )
    return tuple(dict.fromkeys(names))


def read_images(
    source: Source, view: Callable[[bytes], np.ndarray], limit: int, threads: int = 16
) -> Images:
    """At most ``limit`` images of a source, evenly from its beginning to its end; the same every
    time, so that pictures of different steps can be compared. Damaged ones are named in the log and
    passed over.

    Raises:
      UserError: if none can be read.
    """

    def see(record: records.Record) -> tuple[np.ndarray, str | None, str]:
        caption = record.captions[0] if record.captions else record.key
        return view(record.image), record.label, caption

    chosen = evenly_spaced(len(source), limit).tolist()
    found = [image for _, image in read_each(source, see, chosen, threads)]
    if not found:
        raise UserError(f"{source.describe(0)}, ...: no image can be read; nothing to picture")
    pixels, labels, captions = zip(*found)
    return Images(np.stack(pixels), labels, captions)


def images_needed(names: Sequence[str], shown: int, candidates: int) -> int:
    """How many images to read for the pictures ``names``."""
    return max(shown, candidates) if any(name in _OF_ALL for name in names) else shown


class MethodPictures:
    """All pictures of a method's variables: what it draws itself, what its features give, and those
    of its images and texts.

    Args:
      names: of :func:`choose`. shown, images: as of :class:`FeaturePictures`.
      pairs: of ``text_pictures.read_pictured``; None for no such pictures.
      seed: of the randomness in the method's own pictures, the same at every step.
    """

    def __init__(
        self,
        method: Method,
        mesh: Mesh,
        images: Images,
        names: Sequence[str],
        shown: int = 8,
        seed: int = 0,
        pairs: Pairs | None = None,
    ):
        ways = meshes.batch_shards(mesh)
        batch = -(-_BATCH // ways) * ways
        self._of_features = FeaturePictures(images, names, shown, batch)
        self._bind = feature_function(method, mesh)
        self._of_texts = None
        if pairs:
            tokens = tokenize(method, pairs.texts)
            self._of_texts = text_pictures.TextPictures(pairs, tokens, names, shown)
            self._bind_towers = tower_functions(method, mesh, batch)
        self._method, self._rng = method, jax.random.key(seed)
        self._own = tuple(name for name in method.picture_names if name in names)
        rows = evenly_spaced(len(images.pixels), shown)
        position = np.arange(len(rows), dtype=np.int32)
        self._batch = {"image": images.pixels[rows], "position": position}

    @classmethod
    def from_config(
        cls, config: ConfigDict, method: Method, mesh: Mesh, source: Source, names: Sequence[str]
    ) -> MethodPictures:
        """As a run's config asks for them, of images of ``source``; those of texts of the pairs for
        retrieval, where there are such."""
        entry, view, threads = config.pictures, method.eval_view(), config.data.threads
        limit = images_needed(names, entry.images, entry.candidates)
        images = read_images(source, view, limit, threads)
        captioned = ArrayRecordSource(config.eval.retrieval) if config.eval.retrieval else source
        pairs = text_pictures.read_pictured(captioned, view, names, entry.candidates, threads)
        return cls(method, mesh, images, names, entry.images, config.seed, pairs)

    def draw(self, variables: Variables, step: int, of: str = "") -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}. All processes of a run call it together; the first one's result
        is whole. ``of`` as of :meth:`FeaturePictures.run`."""
        drawn = {}
        if self._own:
            drawn = self._method.pictures(variables, self._batch, self._rng)
            drawn = {name: drawn[name] for name in self._own}
        drawn |= dict(self._of_features.run(self._bind(variables), step, of))
        if self._of_texts:
            drawn |= dict(self._of_texts.run(self._bind_towers(variables), step, of))
        return drawn


class FeaturePictures:
    """Draws ``names`` of some images.

    Args:
      images: neighbours are sought and norms counted among all of them; the other pictures show
        every ``n / shown``-th.
      names: of :data:`NAMES`; others are not ours and are passed over.
      shown: images to show.
      batch: images a call of the feature function.
    """

    name = "pictures"

    def __init__(self, images: Images, names: Sequence[str], shown: int = 8, batch: int = 8):
        self._images, self._batch = images, batch
        self._names = tuple(name for name in NAMES if name in names)
        if "neighbours" in self._names and len(images.pixels) < 2:
            log.info("no picture of neighbours: there is a single image")
            self._names = tuple(name for name in self._names if name != "neighbours")
        self.shown = evenly_spaced(len(images.pixels), shown)
        self._draws = jax.process_index() == 0

    def run(
        self, features: FeatureFunction, step: int, of: str = ""
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, (H, W, 3) uint8).

        On many hosts every process runs it to its end, for all take part in the features; only the
        first draws. ``of``: whose pictures they are, for their titles, if not of a training step.
        """
        if not self._names:
            return
        every = any(name in self._names for name in _OF_ALL)
        rows = np.arange(len(self._images.pixels)) if every else self.shown
        seen = _look(features, self._images.pixels, rows, set(self.shown.tolist()), self._batch)
        if not self._draws:
            return
        if not all(np.isfinite(part).all() for part in seen):
            log.warning("no pictures of features: there is NaN or infinity in them")
            return
        draw = {"pca": self._pca, "attention": self._attention, "norms": self._norms}
        draw["neighbours"] = self._neighbours
        for name in self._names:
            yield name, draw[name](seen, of or f"step {step:,}")

    def _pca(self, seen: _Seen, of: str) -> np.ndarray:
        return pca.pca_sheet(
            self._images.pixels[self.shown], seen.patches, title=f"PCA of patch features, {of}"
        )

    def _attention(self, seen: _Seen, of: str) -> np.ndarray:
        title = f"Attention of the CLS token in the last block, {of}"
        return attention.attention_sheet(
            self._images.pixels[self.shown], seen.attention, title=title
        )

    def _norms(self, seen: _Seen, of: str) -> np.ndarray:
        images = self._images
        names = [label or text or str(i) for i, (_, label, text) in enumerate(zip(*images))]
        return norms.norm_figure(
            images.pixels,
            seen.cls_norm,
            seen.register_norms,
            seen.patch_norms,
            names,
            title=f"Token norms before the final norm, {of}, {len(names):,} images",
        )

    def _neighbours(self, seen: _Seen, of: str) -> np.ndarray:
        images = self._images
        indices, cosines = neighbours.nearest(
            seen.pooled[self.shown], seen.pooled, NEIGHBOURS, self.shown
        )
        return neighbours.neighbour_sheet(
            images.pixels,
            self.shown,
            indices,
            cosines,
            images.labels,
            images.captions,
            title=f"Nearest neighbours, {of}",
            subtitle=f"Among {len(images.pixels):,} images.",
        )


class _Seen(NamedTuple):
    """Of the shown images: patches (s, h, w, D), attention (s, heads, h, w). Of all that were
    looked at: pooled (n, 2 D) and the norms of ``methods.base.Inside``."""

    patches: np.ndarray
    attention: np.ndarray
    pooled: np.ndarray
    cls_norm: np.ndarray
    register_norms: np.ndarray
    patch_norms: np.ndarray


def _look(
    features: FeatureFunction, pixels: np.ndarray, rows: np.ndarray, shown: set[int], batch: int
) -> _Seen:
    kept: list[list[np.ndarray]] = [[] for _ in _Seen._fields]
    for chosen, n in in_batches(rows, batch):
        seen = jax.device_get(features(pixels[chosen], inside=True))
        chosen, inside = chosen[:n], seen.inside
        show = [i for i, row in enumerate(chosen.tolist()) if row in shown]
        # CLS tokens are what DINO and CLIP train, patches what MAE does: half of the cosine is of
        # the one, half of the other.
        halves = [_unit(seen.cls[:n]), _unit(seen.patches[:n].mean(axis=(1, 2)))]
        values = _Seen(
            seen.patches[show],
            inside.attention[show],
            np.concatenate(halves, axis=1) / np.sqrt(2),
            inside.cls_norm[:n],
            inside.register_norms[:n],
            inside.patch_norms[:n],
        )
        for parts, value in zip(kept, values):
            parts.append(value)
    return _Seen(*map(np.concatenate, kept))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
