"""The networks that a tree of parameters belongs to, and how their images are made: all that is
static about a model. Weight files are read into it, and methods leave it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from webssl_jax.data.views import Preprocess
from webssl_jax.models import clip
from webssl_jax.models.decoder import MAEDecoder
from webssl_jax.models.heads import Head, HeadConfig
from webssl_jax.models.mae import visible_count
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.models.vit import ViT
from webssl_jax.weights.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from webssl_jax.language.dialogue import Dialogue
    from webssl_jax.language.sizes import DecoderConfig
    from webssl_jax.models.connector import ConnectorConfig

HEADS = ("dino_head", "ibot_head")


@dataclasses.dataclass(frozen=True)
class Networks:
    """Networks, None where there is none. Fields have the names of the parameter trees; a method
    that has such a network has a field of the same name. Hashable.

    preprocess: how images are made; None stands for that of DINOv2 and MAE at the encoder's size,
      or where that is no square for both sides resized to it.
    head_input: the width of what goes into the heads, where there is no encoder to say it.
    connector, language, dialogue: with them it answers questions about images (``methods.vqa``).
    contrast: of image and text towers, ``softmax`` (CLIP) or ``sigmoid`` (SigLIP).
    mask_ratio, norm_pix_loss: of encoder and decoder, as of ``methods.mae``.

    Raises:
      ValueError: when two networks do not fit each other.
    """

    encoder: ViTConfig | None = None
    decoder: ViTConfig | None = None
    dino_head: HeadConfig | None = None
    ibot_head: HeadConfig | None = None
    text: TextConfig | None = None
    preprocess: Preprocess | None = None
    head_input: int | None = None
    contrast: str = "softmax"
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    connector: ConnectorConfig | None = None
    language: DecoderConfig | None = None
    dialogue: Dialogue | None = None

    def __post_init__(self) -> None:
        if self.encoder is None:
            return
        preprocess = self.preprocess
        if preprocess is None:
            preprocess = Preprocess.of_view(self.encoder.image_size)
            object.__setattr__(self, "preprocess", preprocess)
        self.encoder.grid_of(*preprocess.shape)
        if self.decoder:
            visible_count(self.encoder.num_patches, self.mask_ratio)
        if self.text and self.encoder.pooling == "map":
            if self.encoder.width != self.text.embedding:
                raise ValueError(
                    f"text.embedding = {self.text.embedding}: pooling = 'map' has no projection, "
                    f"so it must be the width = {self.encoder.width} of images"
                )

    @classmethod
    def of(cls, method: Any) -> Networks:
        """The networks of a method."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(method, name) for name in fields if hasattr(method, name)})

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a text tower, and its ids are those of our tokenizer."""
        return self.text is not None and has_tokenizer(self.text.vocabulary)

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
        return heads_of(self)


def encoder_of(networks: Networks) -> ViTConfig:
    """The image encoder.

    Raises:
      ValueError: where there is none, as in a file of heads.
    """
    if networks.encoder is None:
        raise ValueError("these networks have no encoder")
    return networks.encoder


def heads_of(networks: Any) -> dict[str, HeadConfig]:
    """The heads of self-distillation that :class:`Networks`, or a method, has, by name."""
    heads = {name: getattr(networks, name, None) for name in HEADS}
    return {name: head for name, head in heads.items() if head}


@functools.lru_cache(maxsize=8)
def template_of(networks: Networks) -> dict[str, Any]:
    """The shapes of all parameters."""

    def init() -> dict[str, Any]:
        rng, encoder = jax.random.key(0), networks.encoder
        trees: dict[str, Any] = {}
        if encoder:
            images = jnp.zeros((1, *encoder.image_shape, 3))
            if networks.text:
                starts = clip.STARTS[networks.contrast]
                return clip.init_towers(encoder, networks.text, rng, images, *starts)
            trees["encoder"] = ViT(encoder).init(rng, images)
            if networks.decoder:
                token = jnp.zeros((1, encoder.width))
                restore = jnp.zeros((1, encoder.num_patches), jnp.int32)
                decoder = MAEDecoder(networks.decoder)
                trees["decoder"] = decoder.init(rng, token, token[:, None], restore, encoder.grid)
        token = jnp.zeros((1, encoder.width if encoder else networks.head_input))
        for name, head in networks.dino_heads.items():
            trees[name] = Head(head).init(rng, token)
        return {name: tree["params"] for name, tree in trees.items()}

    return jax.eval_shape(init)
