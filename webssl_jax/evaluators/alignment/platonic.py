"""How far an encoder of images and a language model agree on what is alike (the platonic
representation hypothesis: Huh et al., arXiv 2405.07987), as Web-SSL measures it (arXiv 2504.01017,
figure 9).

Of each image the CLS token after every block (no final norm), of its first caption the mean over
tokens of every layer of the language model, clamped and normalised (``metrics.py``). Each pair of
layers has a score, by default mutual k-NN with k = 10; the best of all pairs counts.

The best of many pairs is high by chance too. So images are dealt to captions at random, many times,
and each time the best of all pairs is taken: their mean is what chance gives, and the share of
times that were as good as the truth is the p value.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.alignment import metrics
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes import trivial
from webssl_jax.evaluators.probes.labelled import TRIVIAL
from webssl_jax.language import model as language
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.models.sizes import DTYPES
from webssl_jax.sharding import distributed
from webssl_jax.visuals.alignment import layer_map
from webssl_jax.weights.networks import Networks

FEATURES_OF_IMAGES = ("cls", "patches")
# Raised whenever the same features of the same pairs would get another figure.
PROTOCOL = 1
_SEED = 0  # of the shuffles


@dataclasses.dataclass(frozen=True)
class AlignmentOptions:
    """The keys of a row.

    pairs: captioned shards; an image's first caption counts. language: what ``language.model.load``
      opens. dtype: in which it is computed. max_images: drawn evenly; 0 for all; scores of another
      number are not comparable.
    metrics: of ``metrics.METRICS``, with commas between, the headline first. k: neighbours.
    feature: of images, ``cls`` or ``patches``, their mean. clamp: as of ``metrics.clamp``.
    permutations: random deals, for chance and the p value of the headline; 0 for none.
    """

    pairs: str
    language: str
    dtype: str = "float32"
    max_images: int = 1024
    metrics: str = "mutual_knn"
    k: int = 10
    feature: str = "cls"
    clamp: str = "mean"
    permutations: int = 1000

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.CAPTIONED, pairs=self.pairs)
        if not self.language:
            raise ValueError("language = '': give a folder of transformers, a .gguf or 'smollm2'")
        if self.k < 2 or self.permutations < 0:
            raise ValueError("k must be at least 2 and permutations at least 0")
        if not set(self.names) <= set(metrics.METRICS):
            raise ValueError(f"metrics = {self.metrics!r}: known are {', '.join(metrics.METRICS)}")
        for name, known in (
            ("dtype", tuple(DTYPES)),
            ("feature", FEATURES_OF_IMAGES),
            ("clamp", metrics.CLAMPS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: one of {', '.join(known)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, the headline first."""
        return tuple(dict.fromkeys(name.strip() for name in self.metrics.split(",")))


class Alignment:
    """Agreement with a language model, of the best pair of layers."""

    Options = AlignmentOptions
    needs = frozenset({FEATURES})

    def __init__(self, options: AlignmentOptions):
        self._options = options
        self._data = datasets.open_dataset(options.pairs, datasets.CAPTIONED, options.max_images)
        self._language = _fingerprint(options.language)
        self.data = f"{self._data.identity}-{self._language}-{PROTOCOL}"
        self.datasets: tuple[Dataset, ...] = (self._data,)

    @classmethod
    def want(cls, options: AlignmentOptions, networks: Networks) -> None:
        """None: features before the final norm are not shared with other rows."""
        return None

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        o = self._options
        store = cache.of_model(
            f"blocks-{o.feature}",
            model,
            self._data,
            functools.partial(_blocks, model, o.feature),
            4 * model.encoder.depth * model.encoder.width,
        )
        if len(store) <= max(o.k, 3):
            raise UserError(
                f"alignment by {o.k} neighbours needs more pairs than {len(store):,} "
                f"({self._data.source.describe(0)}, ...); give others, or a smaller k"
            )
        captions = [row.captions[0] for row in store.rows]
        texts = self._text_features(captions, model, cache)
        numbers = np.array([row.number for row in store.rows])
        rules = (self._language, o.dtype, o.k, o.clamp, PROTOCOL)
        data = datasets.fingerprint(self._data.identity, numbers, captions, *rules)
        agreed = score(store.array("blocks")[:], texts, o)
        outcome = self._outcome(agreed, len(captions), data)
        trivial_ones = self._trivial(numbers, texts, model.preprocess, cache, data)
        title = f"{o.names[0].replace('_', ' ')} of each pair of layers, {model.origin.name}"
        picture = layer_map(agreed.scores[o.names[0]], f"layers of {o.language}", title)
        return dataclasses.replace(outcome, baselines=trivial_ones, pictures={"layers": picture})

    def _text_features(self, captions: list[str], model: Model, cache: Cache) -> np.ndarray:
        o = self._options

        def compute() -> np.ndarray:
            opened = language.load(o.language, o.dtype, model.mesh)
            try:
                found = opened.text_features(captions)
            except UserError as error:
                where = f"{self._data.source.describe(0)}, ..."
                raise UserError(f"captions of {where}: {error}") from None
            if not np.isfinite(found).all():
                raise UserError(f"{o.language}: NaN or infinity in its features; try dtype=float32")
            return found

        return cache.of_texts(f"{self._language}-{o.dtype}", captions, compute)

    def _trivial(
        self, numbers: np.ndarray, texts: np.ndarray, view: Preprocess, cache: Cache, data: str
    ) -> dict[str, Outcome]:
        """{"raw pixels", "colour histogram": outcome}: one layer each, whatever the model."""

        def make() -> dict[str, Outcome]:
            store = cache.of_pixels(
                "trivial", view, self._data, trivial.trivial_features, trivial.ROW_BYTES
            )
            rows = np.searchsorted([row.number for row in store.rows], numbers)
            return {
                name: self._outcome(
                    score(store.array(name)[rows][:, None], texts, self._options), len(rows), data
                )
                for name in TRIVIAL
            }

        asked = self._options.metrics, self._options.permutations
        known = datasets.fingerprint(view.for_pixels(), *asked)
        return cache.remember(f"alignment-{data}-{known}", make)

    def _outcome(self, agreed: Agreement, n: int, data: str) -> Outcome:
        o, head = self._options, self._options.names[0]
        values = {name: float(scores.max()) for name, scores in agreed.scores.items()}
        items: dict[str, np.ndarray] = {}
        for name, value in agreed.items.items():
            of_items, found = scored(name, value)
            values, items = values | of_items, items | found
        layers = agreed.scores[head].shape
        block, layer = agreed.best(head)
        values |= {"image_block": float(block + 1), "text_layer": float(layer)}
        words = f"block {block + 1} of {layers[0]} with layer {layer} of 0 to {layers[1] - 1}"
        chance = {}
        if agreed.shuffled is not None:
            chance[head] = float(agreed.shuffled.mean())
            values["p_value"] = p_value(values[head], agreed.shuffled)
            words += f", p = {values['p_value']:.3g}"
        of_images = "CLS token" if o.feature == "cls" else "mean patch"
        meaning = (
            f"alignment with {o.language}: {head} (k = {o.k}) of the {of_images} of an image and "
            f"the mean hidden state of its caption, {n:,} pairs; the best of all pairs of a block "
            "and a layer."
        )
        if chance:
            meaning += (
                f" Chance is the mean best of {o.permutations:,} random deals of images to "
                "captions, p the share of them that is as good."
            )
        return Outcome((head,), values, items, data, meaning, {head: words}, chance)


class Agreement(NamedTuple):
    """scores: {metric: (L, M)}. items: {metric: (N,) of the best pair}, where there are any.
    shuffled: the best of all pairs at each random deal, of the headline; None without."""

    scores: dict[str, np.ndarray]
    items: dict[str, np.ndarray]
    shuffled: np.ndarray | None

    def best(self, name: str) -> tuple[int, int]:
        """The layers of images and of texts that agree most; the first of several."""
        row, column = np.unravel_index(self.scores[name].argmax(), self.scores[name].shape)
        return int(row), int(column)


def score(images: np.ndarray, texts: np.ndarray, options: AlignmentOptions) -> Agreement:
    """All pairs of layers of two networks, of the same N items in the same order.

    images: (N, L, D). texts: (N, M, E). Every process computes all of it.
    """
    images, texts = (metrics.clamp(x, options.clamp) for x in (images, texts))
    scores, items, shuffled = {}, {}, None
    with jax.default_matmul_precision("highest"):
        for name in options.names:
            x, y = (_prepared(name, layers, options.k) for layers in (images, texts))
            found = _scores(name, x, y)
            scores[name] = np.asarray(found)
            best = np.unravel_index(scores[name].argmax(), scores[name].shape)
            if name in metrics.ITEMS:
                one, other = (rep[place][None] for rep, place in zip((x, y), best))
                items[name] = np.asarray(metrics.item_scores(name, one, other))[0, :, 0]
            if name == options.names[0] and options.permutations:
                seed = jax.random.key(_SEED)
                count = options.permutations
                shuffled = np.asarray(metrics.shuffled_best(name, x, y, seed, count))
    return Agreement(scores, items, shuffled)


def p_value(found: float, shuffled: np.ndarray) -> float:
    """The share of random deals, the truth among them, that are at least as good; up to rounding,
    which must not make the truth better than its equal."""
    return float((1 + (shuffled >= found - 1e-7).sum()) / (1 + len(shuffled)))


def _prepared(name: str, features: np.ndarray, k: int) -> metrics.Rep:
    """Layer by layer, so that a device never holds all of them."""
    made = [metrics.prepare(name, jnp.asarray(features[:, i]), k) for i in range(features.shape[1])]
    return jax.tree.map(lambda *layers: jnp.stack(layers), *made)


@functools.partial(jax.jit, static_argnums=0)
def _scores(name: str, x: metrics.Rep, y: metrics.Rep) -> jax.Array:
    return metrics.against(name, y)(x)


def _blocks(model: Model, feature: str, images: jax.Array) -> dict[str, jax.Array]:
    """{"blocks": (B, L, D)}: a token of each image after every block."""
    cls = feature == "cls"
    blocks = tuple(range(model.encoder.depth))
    want = Want(cls=cls, patches="none" if cls else "mean", blocks=blocks, blocks_norm=False)
    seen = model.features(images, want)
    layers = [seen.blocks[block][0 if cls else 1] for block in blocks]
    return {"blocks": jnp.stack([x for x in layers if x is not None], axis=1)}


@functools.lru_cache(maxsize=8)
def _fingerprint(path: str) -> str:
    """On all processes what the first one reads."""
    with distributed.error_barrier():
        found = language.fingerprint(path) if jax.process_index() == 0 else ""
    return distributed.from_first(found)
