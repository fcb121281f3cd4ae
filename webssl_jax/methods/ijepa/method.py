"""I-JEPA (Assran et al., arXiv 2301.08243): predict, from some patches of an image, what a teacher
makes of others, in its features and not in pixels.

The student sees one block of patches, less the targets. The teacher, its running average, sees the
whole image; its patches, each normalised, are the targets. A predictor is told where the targets
lie. No augmentation but a crop, and one view an image.

Shape letters: B images, H x W pixels, h x w = N patches, D width, M target blocks of up to T
patches, K patches in a context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from webssl_jax import colours
from webssl_jax.data.decode import sides
from webssl_jax.data.views import Preprocess, RandomResizedCropView
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.ijepa.blocks import Blocks, MultiBlock
from webssl_jax.methods.mae.method import View
from webssl_jax.methods.teachers import check_shares, running_average
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, effective_rank, most_rank
from webssl_jax.models import pixels, sizes
from webssl_jax.models.layers import gather_tokens
from webssl_jax.models.predictor import Predictor
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables
from webssl_jax.visuals import crop_sheet

_NORM_EPS = 1e-5  # of the targets
_GREY = np.uint8(128)


@dataclasses.dataclass(frozen=True)
class IJEPA:
    """The method. Hashable, so it can be static under jit.

    encoder: of student and teacher; without a CLS token. predictor: its own network; its trees are
      ``params`` {"encoder", "predictor"} and ``teacher`` {"encoder"}.
    momentum, final_momentum: of the teacher, linear over the run.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    predictor: ViTConfig
    masks: MultiBlock = MultiBlock()
    view: View = View(scale_min=0.3, hflip=0.0)
    momentum: float = 0.996
    final_momentum: float = 1.0
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    evaluated = "teacher"
    picture_names = ("blocks",)
    # The size of blocks is of a step and their places of an image, so batches may be cut.
    couples_batch = False

    @classmethod
    def from_config(cls, config: Any) -> IJEPA:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class; ``view``, ``masks`` and ``predictor`` are groups; the predictor takes what it is
        not told from the encoder).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        fields = sizes.with_groups(cls, config.method, view=View, masks=MultiBlock)
        model = {"image_size": fields["view"].image_size, "init": "ijepa"}
        model |= {"pooling": "mean", "position": "sincos"} | sizes.given(config.model)
        encoder = sizes.build(model)
        own = {"width": 384, "depth": 12, "mlp_hidden": None} | dict(fields.pop("predictor", {}))
        predictor = sizes.construct(
            ViTConfig, dataclasses.asdict(encoder) | own, "method.predictor"
        )
        return sizes.construct(cls, fields | {"encoder": encoder, "predictor": predictor}, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        if self.encoder.pooling != "mean":
            raise ValueError(f"pooling = {self.encoder.pooling!r}: the predictor needs 'mean'")
        if self.encoder.drop_path or self.predictor.drop_path:
            raise ValueError("drop_path: contexts differ between images, so there can be none")
        self.masks.check(self._grid)
        check_shares(self, "momentum", "final_momentum")

    @property
    def _grid(self) -> tuple[int, int]:
        return self.encoder.grid_of(*sides(self.view.image_size))

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh student with its predictor, and the student's copy as teacher."""
        encoder_rng, predictor_rng = jax.random.split(rng)
        images = jnp.zeros((1, *batch_spec["image"].shape[1:]))
        encoder = ViT(self.encoder).init(encoder_rng, images)["params"]
        tokens, place = jnp.zeros((1, 1, self.encoder.width)), jnp.zeros((1, 1), jnp.int32)
        there = jnp.ones((1, 1), bool)
        predictor = self._predictor.init(
            predictor_rng, tokens, place, there, place[None], there[None], self._grid
        )["params"]
        return Variables({"encoder": encoder, "predictor": predictor}, {"encoder": encoder}, {})

    @property
    def _predictor(self) -> Predictor:
        return Predictor(self.predictor, self.encoder.width)

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The smooth L1 distance of predictions and targets. batch: ``image`` (B, H, W, 3)
        uint8 and ``position`` (B,) int32."""
        images = pixels.normalise(batch["image"], self.mean, self.std)
        blocks = self.masks.draw(rng, batch["position"], self._grid)
        whole = ViT(self.encoder).apply({"params": teacher["encoder"]}, images)
        assert isinstance(whole, ViTOutput)  # of images of one size
        targets = _normalise(whole.patches)
        wanted = gather_tokens(targets, blocks.targets.reshape(len(images), -1))
        wanted = wanted.reshape(*blocks.targets.shape, -1)  # (B, M, T, D)

        seen = ViT(self.encoder).apply(
            {"params": params["encoder"]},
            images,
            keep=blocks.context,
            present=blocks.context_present,
            train=True,
            rngs=train_rngs(self.encoder, rng),
        )
        assert isinstance(seen, ViTOutput)
        predicted = self._predictor.apply(
            {"params": params["predictor"]},
            seen.patches,
            blocks.context,
            blocks.context_present,
            blocks.targets,
            blocks.targets_present,
            self._grid,
        )
        assert isinstance(predicted, jax.Array)
        where = blocks.targets_present[..., None]
        gap = jnp.abs(predicted - wanted)
        loss = jnp.where(gap < 1, gap**2 / 2, gap - 0.5).mean(where=where)
        report = self._report(whole, targets, gap, blocks)
        return LossOutput(loss, {"prediction": loss}, report, aux)

    def _report(
        self, whole: ViTOutput, targets: jax.Array, gap: jax.Array, blocks: Blocks
    ) -> dict[str, jax.Array]:
        """Of the targets: how much they differ between patches, 1 at most, and what share of that
        the predictions do not explain, 1 of their mean."""
        variance = targets.var(axis=(0, 1)).mean()
        error = (gap**2).mean(where=blocks.targets_present[..., None])
        return {
            "target_variance": variance,
            "unexplained": jax.lax.stop_gradient(error) / jnp.maximum(variance, 1e-6),
            "effective_rank": effective_rank(whole.cls),
            "context_patches": blocks.context_present.sum(axis=1).mean(),
        }

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        """The running average of the student's encoder."""
        return running_average(teacher, params, schedule_values["momentum"])

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[bytes, np.random.Generator], dict[str, np.ndarray]]:
        v = self.view
        return RandomResizedCropView(v.image_size, (v.scale_min, v.scale_max), flip=v.hflip)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.image_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch, *sides(self.view.image_size), 3)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """``momentum``, linear."""
        first, last = self.momentum, self.final_momentum
        return {"momentum": lambda step: first + (last - first) * step / total_steps}

    def tables(self) -> Tables:
        """Biases and norms are not decayed; the predictor's mask token is."""
        return Tables(decay=(ONE_DIMENSIONAL,))

    def vitals(self, global_batch: int) -> Vitals:
        """What a falling loss does not show: it also falls when the targets grow alike. In a
        healthy run it falls, rises slowly while targets begin to differ, and falls again."""
        signs = (
            Sign("train/prediction", "prediction loss"),
            Sign("train/target_variance", "variance of the targets between patches", 1.0),
            Sign("train/unexplained", "share of it that is not predicted", 1.0),
            Sign(
                "train/effective_rank",
                "effective rank",
                most_rank(global_batch, self.encoder.width),
                1,
            ),
            Sign("train/context_patches", "patches in a context", self.masks.length(self._grid)),
        )
        alarms = (
            Alarm(
                "the targets are all alike",
                (Limit("train/target_variance", below=0.05),),
                "the teacher makes the same of every patch, so there is nothing to predict",
                "config.optim.lr (lower), method.momentum (higher), optim.warmup (longer)",
            ),
            Alarm(
                "the predictions are a mean",
                (Limit("train/unexplained", above=0.98),),
                "the predictor says the same of every place, so the encoder is not asked for "
                "anything",
                "config.optim.lr (lower), method.masks.target_scale (smaller), "
                "method.masks.context_patches (more)",
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        """{"blocks": a sheet of the images, each with its context and its targets}."""
        images = np.asarray(batch["image"])
        grid, p = self.encoder.grid_of(*images.shape[1:3]), self.encoder.patch_size
        blocks = jax.device_get(self.masks.draw(rng, jnp.asarray(batch["position"]), grid))

        def only(places: np.ndarray, present: np.ndarray) -> np.ndarray:
            shown = np.zeros((len(images), grid[0] * grid[1]), bool)
            rows = np.arange(len(images))[:, None]
            np.logical_or.at(shown, (rows, places), present)
            on_grid = shown.reshape(-1, *grid)
            return np.where(repeat(on_grid, "b h w -> b (h p) (w q) 1", p=p, q=p), images, _GREY)

        views = {"context": only(blocks.context, blocks.context_present)}
        for i in range(self.masks.targets):
            views[f"target {i + 1}"] = only(blocks.targets[:, i], blocks.targets_present[:, i])
        return {"blocks": crop_sheet(images, views, title="What is shown, and what is asked for")}

    def train_flops(self) -> float:
        """Three times the forward matrix products of the student's encoder on a context and of the
        predictor on every block, and once the teacher's on the whole image; blocks at their
        largest."""
        e, d, grid = self.encoder, self.predictor, self._grid
        context, most = self.masks.length(grid), self.masks.most(grid)
        predict = 2.0 * context * e.width * d.width + self.masks.targets * (
            d.block_flops(context + most) + 2.0 * most * d.width * e.width
        )
        return 3.0 * (e.encode_flops(context) + predict) + e.encode_flops(grid[0] * grid[1])


def _normalise(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters, over the last axis."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + _NORM_EPS)
