"""SimDINOv2 (Wu et al., arXiv 2502.10385): DINOv2 without prototypes and all that they need.
Experimental.

Student and teacher see crops as in DINOv2, and each token goes through one small projector onto a
sphere. There the student's views shall be near the teacher's, masked patches too; that all images
become one point is prevented by the coding rate of the batch, which counts the directions that
features take. No prototypes, no centring, no temperatures.

Others who ran the published code got 1.5 to 7 points less than its README (issues 13 and 48 there);
configs/simdino.py says what it depends on.

Shape letters: B images, V global crops (2), L local crops, N patches, D width, E channels of the
projector; G groups of M = V * B / G global crops, U rows of the buffer of masked patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax import colours
from webssl_jax.data.decode import sides
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.views import Preprocess
from webssl_jax.methods import losses
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.dino.method import mask_pictures
from webssl_jax.methods.dino.view import GLOBAL_CROPS, View
from webssl_jax.methods.masking import BlockMasking, masked_patches
from webssl_jax.methods.simdino.losses import agreement, coding_rate, patch_cosines, rate_limits
from webssl_jax.methods.teachers import check_shares, running_average
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, effective_rank, most_rank
from webssl_jax.models import sizes
from webssl_jax.models.batch_norm_mlp import MlpConfig
from webssl_jax.models.heads import Projector
from webssl_jax.models.layers import gather_tokens, l2_normalise
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim import schedules
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables, falling_rates


@dataclasses.dataclass(frozen=True)
class SimDINO:
    """The method. Hashable, so it can be static under jit.

    encoder, projector: the networks of student and teacher alike; their trees are ``params`` and
      ``teacher``. The projector has no batch norm.
    group_images: how many consecutive images draw their masks, and stochastic depth, together.
    eps: of the coding rate; smaller weighs small directions more.
    rate_groups: into how many parts the batch is cut for it (``losses.coding_rate``).
    mean_with_teacher: take the rate of the mean of student and teacher, else of the student.
    agreement_weight: beside the rate, whose weight is 1. patch_weight: of the masked patches.
    momentum, final_momentum: of the teacher, by half a cosine over the run.
    layer_decay, patch_embed_rate: as of DINO.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    projector: MlpConfig = MlpConfig(2048, 256, 3)
    group_images: int = 16
    view: View = View()
    masks: BlockMasking = BlockMasking()
    eps: float = 0.05
    rate_groups: int = 1
    mean_with_teacher: bool = True
    agreement_weight: float = 1.0
    patch_weight: float = 1.0
    momentum: float = 0.9
    final_momentum: float = 1.0
    layer_decay: float = 0.9
    patch_embed_rate: float = 0.2
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    couples_batch = True
    evaluated = "teacher"
    picture_names = ("masks",)

    @classmethod
    def from_config(cls, config: Any) -> SimDINO:
        """Reads ``config.model`` (fields of :class:`ViTConfig`) and ``config.method`` (fields of
        this class; ``view``, ``masks`` and ``projector`` are groups).

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        groups = {"view": View, "masks": BlockMasking, "projector": MlpConfig}
        fields = sizes.with_groups(cls, config.method, **groups)
        model = {"image_size": fields["view"].global_size} | sizes.given(config.model)
        method = sizes.construct(cls, fields | {"encoder": sizes.build(model)}, "method")
        for name in ("group_images", "rate_groups"):
            if config.global_batch % getattr(method, name):
                raise ValueError(
                    f"global_batch = {config.global_batch} does not divide by method.{name} = "
                    f"{getattr(method, name)}"
                )
        return method

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(*sides(self.view.local_size))
        if self.encoder.pooling != "cls" or not self.encoder.mask_token:
            raise ValueError("the encoder needs pooling = 'cls' and mask_token = True")
        if min(self.group_images, self.rate_groups) < 1 or self.eps <= 0:
            raise ValueError("group_images, rate_groups and eps must be positive")
        if self.masks.most(GLOBAL_CROPS * self.group_images, self._patches) < 1:
            raise ValueError("the mask ratios hide no patch at all")
        check_shares(self, "momentum", "final_momentum")

    @property
    def _grid(self) -> tuple[int, int]:
        return self.encoder.grid_of(*sides(self.view.global_size))

    @property
    def _patches(self) -> int:
        return self._grid[0] * self._grid[1]

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh student, and its copy as teacher."""
        rngs = jax.random.split(rng)
        image = jnp.zeros((1, *sides(self.view.global_size), 3))
        encoder = ViT(self.encoder).init(rngs[0], image)["params"]
        token = jnp.zeros((1, self.encoder.width))
        projector = Projector(self.projector).init(rngs[1], token)["params"]
        params = {"encoder": encoder, "projector": projector}
        return Variables(params, params, {})

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The losses of one global batch: ``global_crops`` (B, V, H, W, 3) and ``local_crops``
        (B, L, h, w, 3), uint8."""
        b = batch["global_crops"].shape[0]
        groups, crops = b // self.group_images, GLOBAL_CROPS * self.group_images
        mask_rng, drop_rng = jax.random.split(rng)
        masks = self.masks.draw(mask_rng, groups, crops, self._grid)
        hidden = masked_patches(masks, self.masks.most(crops, self._patches))
        weights = rearrange(hidden.weights, "g u -> (g u)")

        def at_masks(patches: jax.Array) -> jax.Array:
            grouped = patches.reshape(groups, -1, patches.shape[-1])
            return rearrange(gather_tokens(grouped, hidden.indices), "g u d -> (g u) d")

        views = self.view.crops(batch, self.mean, self.std)
        seen = ViT(self.encoder).apply({"params": teacher["encoder"]}, views[0])
        assert isinstance(seen, ViTOutput)  # flax does not say what a module returns
        student = dataclasses.replace(self.encoder, drop_path_group=crops)
        outputs = ViT(student).apply(
            {"params": params["encoder"]},
            tuple(views),
            mask=(rearrange(masks, "g m n -> (g m) n"), None)[: len(views)],
            train=True,
            rngs=train_rngs(student, drop_rng),
        )
        made = [output for output in outputs if isinstance(output, ViTOutput)]  # all, for mypy

        whole = jax.lax.stop_gradient(self._project(teacher, _by_image(seen.cls, b)))
        cls = self._project(params, jnp.concatenate([_by_image(x.cls, b) for x in made], axis=1))
        spread = cls[:, :GLOBAL_CROPS]
        if self.mean_with_teacher:
            spread = (spread + whole) / 2
        rate, agreed = coding_rate(spread, self.eps, self.rate_groups), agreement(cls, whole)
        wanted = jax.lax.stop_gradient(self._project(teacher, at_masks(seen.patches)))
        gaps = patch_cosines(self._project(params, at_masks(made[0].patches)), wanted)
        patches = losses.masked_patch_loss(gaps, weights, b * GLOBAL_CROPS)
        terms = {
            "agreement_loss": -self.agreement_weight * agreed,
            "rate_loss": -rate,
            "patch": self.patch_weight * patches,
        }
        report = {
            "agreement": agreed,
            "coding_rate": rate,
            "feature_std": l2_normalise(seen.cls, 1e-8).std(axis=0).mean()
            * self.encoder.width**0.5,
            "effective_rank": effective_rank(seen.cls),
        }
        return LossOutput(sum(terms.values(), jnp.zeros(())), terms, report, aux)

    def _project(self, tree: Params, tokens: jax.Array) -> jax.Array:
        projector = Projector(self.projector, self.encoder.dtype)
        out = projector.apply({"params": tree["projector"]}, tokens)
        assert isinstance(out, jax.Array)
        return out

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        """The running average of both networks."""
        return running_average(teacher, params, schedule_values["momentum"])

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> MultiCropView:
        return self.view.loader()

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.global_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self.view.batch_spec(batch)

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """``momentum``."""
        momentum = schedules.warmup_cosine(self.momentum, self.final_momentum, total_steps)
        return {"momentum": momentum}

    def tables(self) -> Tables:
        """DINOv2's groups."""
        falling = falling_rates(self.encoder.depth, self.layer_decay, self.patch_embed_rate)
        return Tables(decay=(ONE_DIMENSIONAL,), learning_rate=falling)

    def vitals(self, global_batch: int) -> Vitals:
        """Agreement rises towards 1 while the rate stays well above that of one point."""
        least, most = rate_limits(global_batch, self.projector.output, self.eps, self.rate_groups)
        crops = most_rank(GLOBAL_CROPS * global_batch, self.encoder.width)
        signs = (
            Sign("train/agreement", "cosine of two views of an image", 1.0),
            Sign("train/coding_rate", "coding rate", most, least),
            Sign("train/patch", "masked patches (minus their cosine)"),
            Sign("train/feature_std", "feature std", 1.0),
            Sign("train/effective_rank", "effective rank", crops, 1),
        )
        alarms = (
            Alarm(
                "all images are one point",
                (Limit("train/agreement", above=0.99), Limit("train/coding_rate", below=0.05)),
                "student and teacher agree because they make the same of every image",
                "method.eps (smaller), method.rate_groups (1), optim.lr (lower), global_batch "
                "(larger), model.dtype (float32)",
            ),
            Alarm(
                "the same features for every image",
                (Limit("train/effective_rank", below=0.05), Limit("train/feature_std", below=0.2)),
                "the teacher's features of all crops are nearly one and the same vector",
                "optim.lr (lower), optim.warmup (longer), method.momentum (nearer to 1)",
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return mask_pictures(self.encoder, self.masks, batch, rng)

    def train_flops(self) -> float:
        """As of DINO, with the projector on all CLS tokens and masked patches, once for the
        teacher; stochastic depth is not taken off."""
        e, v = self.encoder, self.view
        local = e.grid_of(*sides(v.local_size))
        large = GLOBAL_CROPS * e.encode_flops(self._patches)
        small = v.local_count * e.encode_flops(local[0] * local[1])
        project = self.projector.flops(e.width)
        hidden = self.masks.most(GLOBAL_CROPS * self.group_images, self._patches)
        patches = hidden / self.group_images
        student = large + small + (GLOBAL_CROPS + v.local_count + patches) * project
        return 3.0 * student + large + (GLOBAL_CROPS + patches) * project


def _by_image(tokens: jax.Array, images: int) -> jax.Array:
    """(B * V, D) -> (B, V, D)."""
    return rearrange(tokens, "(b v) d -> b v d", b=images)
