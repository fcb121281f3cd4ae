"""The networks of a weight file: what a method owns of networks, and no more. Enough to evaluate,
draw and export them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.methods import clip, pixels
from webssl_jax.methods.base import Features, Variables
from webssl_jax.methods.encoder import encode, eval_view
from webssl_jax.methods.mae.method import MAE, View
from webssl_jax.models.heads import Head, HeadConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.models.vit import ViT
from webssl_jax.weights import dino


@dataclasses.dataclass(frozen=True)
class Networks:
    """Networks, None where there is none, and the colours of their images. Fields are called as
    those of the methods, whose variables' ``params`` they have. Hashable.

    head_input: the width of what goes into the heads, where there is no encoder to say it.
    contrast: of image and text towers, as of ``methods.clip.CLIP``.
    margin: whether images are resized a little larger than they are cropped.

    Raises:
      ValueError: when the colours make no sense.
    """

    encoder: ViTConfig | None = None
    decoder: ViTConfig | None = None
    dino_head: HeadConfig | None = None
    ibot_head: HeadConfig | None = None
    text: TextConfig | None = None
    head_input: int | None = None
    contrast: str = "softmax"
    margin: bool = True
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    mean: tuple[float, ...] = pixels.IMAGENET_MEAN
    std: tuple[float, ...] = pixels.IMAGENET_STD

    picture_names = ()

    def __post_init__(self):
        pixels.check(self.mean, self.std)
        if self.decoder or self.text:
            self.method()

    @classmethod
    def of(cls, method: Any) -> Networks:
        """The networks of a method."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(method, name) for name in fields if hasattr(method, name)})

    @property
    def kind(self) -> str:
        """``mae`` (encoder and decoder), ``clip`` (encoder and text), ``dino`` (encoder and heads),
        ``encoder`` or ``heads``."""
        if self.encoder is None:
            return "heads"
        if self.decoder or self.text:
            return "mae" if self.decoder else "clip"
        return "dino" if self.dino_heads else "encoder"

    @property
    def dino_heads(self) -> dict[str, HeadConfig]:
        """The heads of self-distillation by name."""
        return dino.heads_of(self)

    def method(self) -> Any:
        """What computes with them: the whole method where it needs nothing else, for ``mae`` and
        ``clip``; else these networks, which give features."""
        if self.kind == "clip":
            view = clip.View(image_size=self.encoder.image_size)
            more = dict(contrast=self.contrast, view=view, mean=self.mean, std=self.std)
            return clip.CLIP(self.encoder, self.text, **more)
        if self.kind != "mae":
            return self
        view = View(image_size=self.encoder.image_size)
        kept = (self.mask_ratio, self.norm_pix_loss, view, self.mean, self.std)
        return MAE(self.encoder, self.decoder, *kept)

    def features(
        self,
        variables: Variables,
        images: jax.Array,
        layers: Sequence[int] = (),
        inside: bool = False,
    ) -> Features:
        """See ``methods.base.Method.features``; of ``variables.params``."""
        images = pixels.normalise(images, self.mean, self.std)
        return encode(self.encoder, variables.params["encoder"], images, layers, inside)

    def eval_view(self, size: int | None = None) -> Callable[[bytes], np.ndarray]:
        """See ``methods.base.Method.eval_view``."""
        if self.kind == "clip":
            return self.method().eval_view(size)
        return eval_view(size or self.encoder.image_size, self.margin)


@functools.lru_cache(maxsize=8)
def template_of(networks: Networks) -> dict[str, Any]:
    """The shapes of all parameters."""

    def init() -> dict[str, Any]:
        rng, encoder = jax.random.key(0), networks.encoder
        if networks.kind in ("mae", "clip"):
            method = networks.method()
            return method.init(rng, method.batch_spec(1)).params
        trees = {}
        if encoder:
            side = encoder.image_size
            trees["encoder"] = ViT(encoder).init(rng, jnp.zeros((1, side, side, 3)))
        token = jnp.zeros((1, encoder.width if encoder else networks.head_input))
        for name, head in networks.dino_heads.items():
            trees[name] = Head(head).init(rng, token)
        return {name: tree["params"] for name, tree in trees.items()}

    return jax.eval_shape(init)
