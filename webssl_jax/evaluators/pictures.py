"""Pictures of any model: PCA of patches, attention, nearest neighbours, token norms, and of those
with a decoder what they reconstruct. They are made once from images, and drawn of a training run's
model by cadence, or of any other (tools/pictures.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from webssl_jax.config import UserError, suggest
from webssl_jax.data import records
from webssl_jax.data.pipeline import Source, read_each
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import text_pictures
from webssl_jax.evaluators.text_pictures import Pairs
from webssl_jax.methods import losses, masking
from webssl_jax.model import Model, fill_up, in_batches, to_host
from webssl_jax.models import pixels
from webssl_jax.models.features import Want
from webssl_jax.models.layers import unpatchify
from webssl_jax.visuals import attention, neighbours, norms, pca, reconstruction
from webssl_jax.weights.networks import Networks

RECONSTRUCTION = "reconstruction"
NAMES = ("pca", "attention", "neighbours", "norms")
NEIGHBOURS = 7
_OF_ALL = ("neighbours", "norms")  # these look at every image, the others at a few
_BATCH = 16
_HIDDEN_GREY = 128  # what a hidden patch looks like
_WANT = Want(diagnostics=True)
log = logging.getLogger(__name__)


class Images(NamedTuple):
    """pixels (n, H, W, 3) uint8; for each a label or None, and a caption ("" where there is
    none)."""

    pixels: np.ndarray
    labels: Sequence[str | None]
    captions: Sequence[str]


def available(networks: Networks) -> tuple[str, ...]:
    """What can be drawn with these networks."""
    return (
        ((RECONSTRUCTION,) if networks.decoder else ())
        + (text_pictures.NAMES if networks.has_tokenizer else ())
        + NAMES
    )


def choose(asked: str, known: Sequence[str], where: str) -> tuple[str, ...]:
    """The pictures that ``asked`` names: ``all``, ``none``, or names with commas between them.

    Args:
      known: of :func:`available`, and of a training method's own.
      where: the key or flag that asks.

    Raises:
      UserError: for a name that is not known, and for no name at all.
    """
    names = tuple(name.strip() for name in asked.split(",") if name.strip())
    if names in (("all",), ("none",)):
        return tuple(known) if names == ("all",) else ()
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


class ModelPictures:
    """All pictures of a model: what its features give, what it reconstructs, and those of its
    images and texts.

    Args:
      images: neighbours are sought and norms counted among all of them; the other pictures show
        every ``n / shown``-th.
      names: of :func:`choose`; those that need what the model has not are passed over.
      shown: images to show.
      seed: of what a reconstruction hides, the same at every step.
      pairs: of ``text_pictures.read_pictured``; None for no pictures of texts.
    """

    def __init__(
        self,
        images: Images,
        names: Sequence[str],
        shown: int = 8,
        seed: int = 0,
        pairs: Pairs | None = None,
    ):
        self._images, self._seed = images, seed
        self._names = tuple(name for name in (RECONSTRUCTION, *NAMES) if name in names)
        if "neighbours" in self._names and len(images.pixels) < 2:
            log.info("no picture of neighbours: there is a single image")
            self._names = tuple(name for name in self._names if name != "neighbours")
        self.shown = evenly_spaced(len(images.pixels), shown)
        self._of_texts = text_pictures.TextPictures(pairs, names, shown) if pairs else None
        self._draws = jax.process_index() == 0

    @classmethod
    def from_config(
        cls, config: ConfigDict, preprocess: Preprocess, source: Source, names: Sequence[str]
    ) -> ModelPictures:
        """As a run's config asks for them, of images of ``source``."""
        entry, threads = config.pictures, config.data.threads
        images = read_images(
            source, preprocess, images_needed(names, entry.images, entry.candidates), threads
        )
        pairs = text_pictures.read_pictured(source, preprocess, names, entry.candidates, threads)
        return cls(images, names, entry.images, config.seed, pairs)

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """The shown images, as a batch for ``methods.base.Method.pictures``."""
        rows = self._images.pixels[self.shown]
        return {"image": rows, "position": np.arange(len(rows), dtype=np.int32)}

    def draw(self, model: Model, of: str = "") -> dict[str, np.ndarray]:
        """{name: (H, W, 3) uint8}.

        On many hosts every process calls it, for all take part in the features; only the first gets
        pictures. ``of``: whose pictures they are, for their titles; by default the model's origin.
        """
        of = of or model.origin.name
        drawn: dict[str, np.ndarray] = {}
        if RECONSTRUCTION in self._names and model.networks.decoder:
            drawn |= self._reconstruction(model)
        names = [name for name in self._names if name != RECONSTRUCTION]
        if names:
            every = any(name in names for name in _OF_ALL)
            rows = np.arange(len(self._images.pixels)) if every else self.shown
            seen = _look(model, self._images.pixels, rows, set(self.shown.tolist()))
            if not self._draws:
                pass
            elif not all(np.isfinite(part).all() for part in seen):
                log.warning("no pictures of features: there is NaN or infinity in them")
            else:
                draw = {"pca": self._pca, "attention": self._attention, "norms": self._norms}
                draw["neighbours"] = self._neighbours
                drawn |= {name: draw[name](seen, of) for name in names}
        if self._of_texts and model.text:
            drawn |= self._of_texts.draw(model, of)
        return drawn

    def _reconstruction(self, model: Model) -> dict[str, np.ndarray]:
        """Image, what was seen of it, what was predicted, and both together.

        Where the loss is of normalised patches, the network predicts every patch only up to its
        mean and contrast, so the picture borrows those two numbers from the true patch.
        """
        rows = self._images.pixels[self.shown]
        encoder, view = model.encoder, model.preprocess
        grid, p = encoder.grid_of(*rows.shape[1:3]), encoder.patch_size
        positions = jnp.arange(len(rows), dtype=jnp.int32)
        rng = jax.random.split(jax.random.key(self._seed))[0]
        noise = np.asarray(masking.per_example_noise(rng, positions, grid[0] * grid[1]))
        batch = model.rounded_batch(_BATCH)
        found: list[tuple[np.ndarray, ...]] = []
        for images, n in in_batches(rows, batch):
            made = model.reconstruct(images, fill_up(noise[len(found) :][:batch], batch))
            found += list(zip(*(x[:n] for x in to_host(made))))
        if not self._draws:
            return {}
        prediction, patches, mask = (np.stack(part) for part in zip(*found))
        if model.networks.norm_pix_loss:
            mean, std = losses.patch_statistics(jnp.asarray(patches))
            prediction = prediction * np.asarray(std) + np.asarray(mean)
        covered = jnp.asarray(mask[:, :, None].repeat(p * p * 3, axis=-1))
        hidden = np.asarray(unpatchify(covered, p, grid)) > 0
        pictured = unpatchify(jnp.asarray(prediction), p, grid)
        predicted = np.asarray(pixels.denormalise(pictured, view.mean, view.std))
        masked = np.where(hidden, np.uint8(_HIDDEN_GREY), rows)
        pasted = np.where(hidden, predicted, rows)
        return {RECONSTRUCTION: reconstruction.panel(rows, masked, predicted, pasted)}

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
    looked at: pooled (n, 2 D) and the norms of ``models.features.Diagnostics``."""

    patches: np.ndarray
    attention: np.ndarray
    pooled: np.ndarray
    cls_norm: np.ndarray
    register_norms: np.ndarray
    patch_norms: np.ndarray


def _look(model: Model, images: np.ndarray, rows: np.ndarray, shown: set[int]) -> _Seen:
    kept: list[list[np.ndarray]] = [[] for _ in _Seen._fields]
    for chosen, n in in_batches(rows, model.rounded_batch(_BATCH)):
        seen = to_host(model.features(images[chosen], _WANT))
        chosen, inside = chosen[:n], seen.diagnostics
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


def evenly_spaced(n: int, k: int) -> np.ndarray:
    """``k`` of ``n`` indices, evenly from the first on; all of them when there are fewer."""
    k = min(n, k)
    return np.arange(k) * n // max(k, 1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
