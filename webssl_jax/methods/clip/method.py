"""Contrastive image-text learning: CLIP (Radford et al., arXiv 2103.00020), as MetaCLIP trains it
(Xu et al., arXiv 2309.16671), and with SigLIP's loss (Zhai et al., arXiv 2303.15343).

Two towers put images and texts into one space; an image and its caption shall be closer than the
image is to any other caption of the global batch. Cosines are multiplied with a learned scale, and
with the sigmoid loss a learned bias is added. Batches cannot be cut: every pair is compared with
all others.

Shape letters: B pairs, H x W pixels, C context, E channels of the shared space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.config import ConfigError
from webssl_jax.data.captioned import CaptionedView
from webssl_jax.data.tokens import VOCABULARY
from webssl_jax.data.views import Preprocess, RandomResizedCropView
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.clip.contrastive import sigmoid_contrast, softmax_contrast
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals
from webssl_jax.models import clip_sizes, pixels, sizes
from webssl_jax.models.clip import STARTS, embed_images, embed_texts, init_towers
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.optim.tables import Tables


@dataclasses.dataclass(frozen=True)
class View:
    """The augmentation: a random resized crop of ``image_size`` pixels over an area share between
    ``scale_min`` and ``scale_max``, and nothing else (MetaCLIP's). ``uncaptioned`` as of
    ``data.captioned.CaptionedView``.

    Raises:
      ValueError: when a field is out of range.
    """

    image_size: int = 224
    scale_min: float = 0.9
    scale_max: float = 1.0
    uncaptioned: str = "empty"

    def __post_init__(self) -> None:
        pixels.check_crop(self.image_size, self.scale_min, self.scale_max)


@dataclasses.dataclass(frozen=True)
class CLIP:
    """The method. ``encoder`` and ``text`` describe the two towers; hashable, so it can be static
    under jit.

    contrast: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP). scale, bias: what cosines are multiplied
    with and what is added at the start, ``None`` for the originals' values; there is no bias with
    softmax. scale_max: every step ends with the scale clamped to 1 ... this. block: rows of logits
    that a device holds at a time (``contrastive.py``), 0 for all of its own.
    """

    encoder: ViTConfig
    text: TextConfig
    contrast: str = "softmax"
    scale: float | None = None
    bias: float | None = None
    scale_max: float = 100.0
    block: int = 1024
    view: View = View()
    mean: tuple[float, ...] = colours.CLIP_MEAN
    std: tuple[float, ...] = colours.CLIP_STD

    couples_batch = True
    evaluated = "params"
    picture_names = ()

    @classmethod
    def from_config(cls, config: Any) -> CLIP:
        """Reads ``config.model`` (``size`` and/or fields of :class:`ViTConfig`) and
        ``config.method`` (``text``, fields of :class:`TextConfig` and perhaps its own ``size``;
        ``view`` and the fields of this class; all optional with a size).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        if config.get("global_batch", 2) < 2:
            raise ValueError(
                "global_batch = 1: an image is to find its text among others; 2 is the least"
            )
        method = sizes.with_groups(cls, config.method, view=View)
        model = {"image_size": method["view"].image_size} | sizes.given(config.model)
        size = model.pop("size", None)
        encoder = clip_sizes.vision(size, **model) if size else sizes.build(model)
        # The text tower is computed as the image tower is.
        same = {key: getattr(encoder, key) for key in ("dtype", "remat", "attention")}
        fields = same | sizes.given(method.pop("text", None) or {})
        size = fields.pop("size", size)
        text = clip_sizes.text(size, **fields) if size else clip_sizes.build_text(fields)
        return sizes.construct(cls, dict(method, encoder=encoder, text=text), "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(self.view.image_size, self.view.image_size)
        if self.contrast not in STARTS:
            raise ValueError(f"contrast = {self.contrast!r} is not one of {', '.join(STARTS)}")
        if self.contrast == "softmax" and self.bias is not None:
            raise ValueError(f"bias = {self.bias}: softmax has none, for it would change nothing")
        if not 1 <= self.start[0] <= self.scale_max:
            raise ValueError(
                f"scale = {self.start[0]}, scale_max = {self.scale_max}: must satisfy "
                "1 <= scale <= scale_max"
            )
        if self.block < 0:
            raise ValueError(f"block = {self.block} must be zero or positive")
        if self.encoder.pooling == "map" and self.encoder.width != self.text.embedding:
            raise ValueError(
                f"text.embedding = {self.text.embedding}: pooling = 'map' has no projection, so it "
                f"must be the width = {self.encoder.width} of images"
            )
        self._view()  # what it refuses is refused here, and not when the loader starts

    @property
    def start(self) -> tuple[float, float | None]:
        """Scale and bias before the first step."""
        scale, bias = STARTS[self.contrast]
        return (
            scale if self.scale is None else self.scale,
            bias if self.bias is None else self.bias,
        )

    @property
    def padding(self) -> int:
        """What stands after the end of a text, as ``data.tokens.Tokenizer`` fills up: 0, which
        nothing sees, or where the last place is pooled the end again, as in SigLIP."""
        return self.text.vocabulary - 1 if self.text.pooling == "last" else 0

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Fresh parameters: ``encoder`` and, but for SigLIP's, ``projection`` of the image tower,
        ``text``, ``logit_scale`` (the scale's logarithm) and with sigmoid ``logit_bias``; no
        teacher."""
        images = jnp.zeros((1, *batch_spec["image"].shape[1:]))
        return Variables(init_towers(self.encoder, self.text, rng, images, *self.start), {}, {})

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The contrast of one global batch: ``image`` (B, H, W, 3) uint8 and ``tokens`` (B, C)
        int32."""
        image_rng, text_rng = jax.random.split(rng)
        images = pixels.normalise(batch["image"], self.mean, self.std)
        images = embed_images(self.encoder, self.text, params, images, image_rng)
        texts = embed_texts(self.text, params, batch["tokens"], text_rng)
        scale = jnp.exp(params["logit_scale"])
        x, y = (embedded.astype(self.encoder.dtype) for embedded in (images, texts))
        if self.contrast == "softmax":
            found = softmax_contrast(x, y, scale, block=self.block)
        else:
            found = sigmoid_contrast(x, y, scale, params["logit_bias"], block=self.block)
        report = self._report(images, texts) | {
            "image_accuracy": found.image_accuracy,
            "text_accuracy": found.text_accuracy,
            "logit_scale": scale,
            # nothing between the start of the text and its end, which is the largest id
            "empty_texts": (batch["tokens"][:, 1] == self.text.vocabulary - 1).mean(),
        }
        if "logit_bias" in params:
            report["logit_bias"] = params["logit_bias"]
        return LossOutput(found.loss, {"contrast": found.loss}, report, aux)

    def _report(self, images: jax.Array, texts: jax.Array) -> dict[str, jax.Array]:
        """The mean cosines of pairs and of all others, and by how much pairs are closer."""
        images, texts = jax.lax.stop_gradient((images, texts))
        b = images.shape[0]
        pairs = (images * texts).sum()
        # All products of the sums are all sums of the products.
        others = ((images.sum(axis=0) * texts.sum(axis=0)).sum() - pairs) / max(b * (b - 1), 1)
        pairs = pairs / b
        return {"pair_cosine": pairs, "other_cosine": others, "pair_margin": pairs - others}

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[Any, np.random.Generator], dict[str, np.ndarray]]:
        """Raises:
        ConfigError: if the text tower's ids are not those of our tokenizer. Imported towers may
          have others; they take ids, and no texts.
        """
        if self.text.vocabulary != VOCABULARY:
            raise ConfigError(
                f"config.method.text.vocabulary = {self.text.vocabulary}: the tokenizer has "
                f"{VOCABULARY} ids; leave it out"
            )
        return self._view()

    def _view(self) -> Callable[[Any, np.random.Generator], dict[str, np.ndarray]]:
        v = self.view
        crop = RandomResizedCropView(v.image_size, scale=(v.scale_min, v.scale_max), flip=0.0)
        return CaptionedView(crop, self.text.context, v.uncaptioned, self.padding)

    @property
    def preprocess(self) -> Preprocess:
        """The shorter side is resized to the size of the crop: CLIP's has no margin."""
        size = self.view.image_size
        return Preprocess(size, size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.view.image_size
        return {
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((batch, self.text.context), jnp.int32),
        }

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """open_clip's rule: whatever is one-dimensional in one block is not decayed, the CLS token
        too; positions, token embeddings and projections are. Of SigLIP's towers big_vision's rule:
        kernels alone are decayed. The scale is clamped."""
        decay = ((r"/(bias|scale|gamma|cls_token)$", 0.0), (r"^logit_(scale|bias)$", 0.0))
        return Tables(
            decay=((r"/kernel$", 1.0), (r".", 0.0)) if self.encoder.pooling == "map" else decay,
            bounds=((r"^logit_scale$", (0.0, math.log(self.scale_max))),),
        )

    def vitals(self, global_batch: int) -> Vitals:
        """How far pairs are told apart, and what a falling loss does not show. docs/health.md says
        where the limits come from."""
        # with all cosines at zero
        if self.contrast == "softmax":
            uniform_loss = math.log(global_batch)
        else:
            _, bias = self.start
            assert bias is not None  # the sigmoid loss has one
            own, others = (math.log1p(math.exp(side * bias)) for side in (-1, 1))
            uniform_loss = own + (global_batch - 1) * others
        chance = 1 / global_batch
        signs = (
            Sign("train/contrast", "contrastive loss", uniform_loss),
            Sign("train/pair_margin", "cosine of pairs above others", 1.0),
            Sign("train/image_accuracy", "images that find their text", 1.0, chance),
            Sign("train/text_accuracy", "texts that find their image", 1.0, chance),
            Sign("train/logit_scale", "logit scale", self.scale_max),
            Sign("train/empty_texts", "empty texts", 1.0),
        )
        alarms = (
            Alarm(
                "captions do not fit their images",
                (Limit("train/pair_margin", below=0.01), Limit("train/image_accuracy", below=0.05)),
                "an image is no closer to its own caption than to others",
                "the records (tools/inspect_records.py --sheet: are pairs mixed up?), "
                "config.optim.lr (lower), optim.warmup (longer)",
            ),
            Alarm(
                "the batch is too easy",
                tuple(Limit(f"train/{side}_accuracy", above=0.995) for side in ("image", "text")),
                "nearly every image finds its caption among all of the batch, so there is little "
                "left to learn from it, or the images are known by heart",
                "config.global_batch (larger), config.total_images (fewer passes over the data)",
            ),
            Alarm(
                "the logit scale is at its limit",
                (Limit("train/logit_scale", above=0.999),),
                "the clamp holds it, so the loss asks for sharper choices than it may make; late "
                "in a long run that is usual, early the rate is too high or texts repeat",
                "config.optim.lr (lower), method.scale_max, repeated captions in the records",
            ),
            Alarm(
                "many texts are empty",
                (Limit("train/empty_texts", above=0.1),),
                "records without captions teach nothing and are all each other's rivals",
                "method.view.uncaptioned (replace), or convert the records without these",
                waits=0.0,
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """Three times the forward matrix products of both towers; the comparison of a pair with all
        others of the batch, less than 3% of them, is left out."""
        e = self.encoder
        h, w = e.grid_of(self.view.image_size, self.view.image_size)
        vision = e.encode_flops(h * w)
        if e.pooling == "cls":
            vision += 2.0 * e.width * self.text.embedding
        else:  # keys and values of all patches; the rest is of one token
            vision += 2.0 * (2 * h * w + 2) * e.width**2 + 4.0 * e.width * e.hidden
        return 3.0 * (vision + self.text.flops())
