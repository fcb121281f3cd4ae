"""Masked autoencoding (He et al., arXiv 2111.06377), as Web-MAE trains it (Fan et al., arXiv
2504.01017).

Hide three quarters of the patches, encode the rest, decode pixels everywhere, and ask for the
hidden ones. Without stochastic depth, the loss of an image does not depend on the others in its
batch, so batches can be cut for gradient accumulation.

Shape letters: B images, H x W pixels, h x w = N patches, K visible patches, p patch side,
P = p * p * 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.data.decode import Size, sides
from webssl_jax.data.views import Preprocess, RandomResizedCropView
from webssl_jax.methods import losses, masking
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals
from webssl_jax.models import pixels, sizes
from webssl_jax.models.decoder import MAEDecoder
from webssl_jax.models.mae import reconstruct, visible_count
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables


@dataclasses.dataclass(frozen=True)
class View:
    """The augmentation: a random resized crop of ``image_size`` pixels (the side of a square, or
    (height, width)) over an area share between ``scale_min`` and ``scale_max``, then a horizontal
    flip with probability ``hflip``. Nothing else (MAE's own recipe).

    Raises:
      ValueError: when a field is out of range.
    """

    image_size: Size = 224
    scale_min: float = 0.2
    scale_max: float = 1.0
    hflip: float = 0.5

    def __post_init__(self) -> None:
        pixels.check_crop(self.image_size, self.scale_min, self.scale_max)
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip = {self.hflip} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MAE:
    """The method. ``encoder`` and ``decoder`` describe the two networks; hashable, so it can be
    static under jit."""

    encoder: ViTConfig
    decoder: ViTConfig
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    view: View = View()
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    evaluated = "params"
    picture_names = ()

    @property
    def couples_batch(self) -> bool:
        """Stochastic depth draws which images of a batch go through a block, so that another cut of
        the batch draws others."""
        return self.encoder.drop_path > 0

    @classmethod
    def from_config(cls, config: Any) -> MAE:
        """Reads ``config.model`` (``size`` and/or fields of :class:`ViTConfig`) and
        ``config.method`` (``mask_ratio``, ``norm_pix_loss``, ``decoder``, ``view``, ``mean``,
        ``std``; all optional).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        method = sizes.with_groups(cls, config.method, view=View)
        model = {"image_size": method["view"].image_size} | sizes.given(config.model)
        size = model.pop("size", None)
        if size is None:
            encoder = sizes.build({"position": "sincos", "init": "mae", **model})
        else:
            encoder = sizes.web_mae(size, **model)
        # The decoder speaks the encoder's dialect (patches, norm, dtype, remat) at its own width,
        # without its extras.
        stock = dict(
            width=512,
            depth=8,
            heads=16,
            mlp="gelu",
            mlp_hidden=None,
            position="sincos",
            layer_scale=None,
            drop_path=0.0,
            num_registers=0,
            mask_token=False,
        )
        shape = dict(method.pop("decoder", None) or {})
        fields = dataclasses.asdict(encoder) | stock | shape
        decoder = sizes.construct(ViTConfig, fields, "method.decoder")
        return sizes.construct(cls, dict(method, encoder=encoder, decoder=decoder), "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        if self.encoder.pooling != "cls":
            raise ValueError(f"pooling = {self.encoder.pooling!r}: the decoder needs 'cls'")
        grid = self.encoder.grid_of(*sides(self.view.image_size))
        visible_count(grid[0] * grid[1], self.mask_ratio)
        if self.decoder.patch_size != self.encoder.patch_size:
            raise ValueError(
                f"the decoder's patch_size = {self.decoder.patch_size} must be the encoder's, "
                f"{self.encoder.patch_size}"
            )

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Fresh parameters {"encoder", "decoder"}; no teacher, no auxiliary state."""
        encoder_rng, decoder_rng = jax.random.split(rng)
        _, height, width, _ = batch_spec["image"].shape
        h, w = self.encoder.grid_of(height, width)
        encoder = ViT(self.encoder).init(encoder_rng, jnp.zeros((1, height, width, 3)))
        token = jnp.zeros((1, self.encoder.width))
        restore = jnp.zeros((1, h * w), jnp.int32)
        decoder = MAEDecoder(self.decoder).init(decoder_rng, token, token[:, None], restore, (h, w))
        return Variables({"encoder": encoder["params"], "decoder": decoder["params"]}, {}, {})

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The masked reconstruction loss.

        batch: ``image`` (B, H, W, 3) uint8 and ``position`` (B,) int32, or instead of it ``noise``
        (B, N) float32 in [0, 1), whose smallest entries mark the visible patches (for comparison
        with other implementations).
        """
        images = pixels.normalise(batch["image"], self.mean, self.std)
        mask_rng, drop_rng = jax.random.split(rng)
        noise = batch.get("noise")
        if noise is None:
            h, w = self.encoder.grid_of(*images.shape[1:3])
            noise = masking.per_example_noise(mask_rng, batch["position"], h * w)
        made = reconstruct(
            self.encoder, self.decoder, params, images, noise, self.mask_ratio, drop_rng
        )
        loss = losses.masked_pixel_loss(
            made.prediction, made.patches, made.mask, self.norm_pix_loss
        )
        report = {"mask_ratio": made.mask.mean(), "prediction_std": made.prediction.std()}
        return LossOutput(loss, {"reconstruction": loss}, report, aux)

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]:
        return RandomResizedCropView(
            self.view.image_size,
            scale=(self.view.scale_min, self.view.scale_max),
            flip=self.view.hflip,
        )

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.image_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch, *sides(self.view.image_size), 3)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """Everything is trained at one rate; biases and the factors of norms and LayerScale are not
        decayed (timm's rule, which MAE uses: whatever is one-dimensional in one block). CLS, mask
        and register tokens are decayed."""
        return Tables(decay=(ONE_DIMENSIONAL,))

    def vitals(self, global_batch: int) -> Vitals:
        """The prediction's contrast beside that of its target, about 1, and the loss beside that of
        a prediction of the mean: with ``norm_pix_loss`` 1, and less by the share of flat patches.
        """
        uniform_loss = 1.0 if self.norm_pix_loss else None
        signs = (
            Sign("train/reconstruction", "reconstruction loss", uniform_loss),
            Sign("train/prediction_std", "prediction std", 1.0),
        )
        alarm = Alarm(
            "the prediction is grey",
            (Limit("train/prediction_std", below=0.05),),
            "the decoder predicts the mean for every patch, so the encoder learns nothing",
            "config.optim.lr (lower; the scaled one is in config.json), optim.warmup (longer), "
            "method.mask_ratio (lower), model.dtype (float32, to rule it out)",
        )
        return Vitals(signs, (alarm,))

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """Three times the forward matrix products: what is visible through the encoder, all through
        the decoder."""
        e, d = self.encoder, self.decoder
        h, w = e.grid_of(*sides(self.view.image_size))
        patches, values = h * w, e.patch_size**2 * 3
        visible = visible_count(patches, self.mask_ratio)
        forward = e.encode_flops(visible)
        forward += 2.0 * (1 + visible) * e.width * d.width + d.block_flops(1 + patches)
        forward += 2.0 * patches * d.width * values
        return 3.0 * forward
