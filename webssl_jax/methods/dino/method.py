"""DINOv2's self-distillation (Oquab et al., arXiv 2304.07193), as Web-DINO trains it (Fan et al.,
arXiv 2504.01017), and DINOv3's stages (Siméoni et al., arXiv 2508.10104), which are its losses with
another encoder and plain prototypes, from the second stage on with a third network (``gram.py``),
and in the third with crops whose sizes change from batch to batch (``view.py``).

A student sees two global crops with some patches masked, and several local crops; its teacher, the
running average of the student, sees the global crops whole. The student is to predict which
prototypes the teacher assigns to the other crops of the image (DINO) and to the masked patches
(iBOT), while KoLeo keeps the images of a group apart.

What the originals do per device (stratified mask ratios, KoLeo's neighbours, stochastic depth, the
iBOT centre) is done here per group of ``group_images`` consecutive images of the global batch, so
that nothing depends on the devices. Sinkhorn, losses, gradients and norms are global.

Shape letters: B images, V global crops (2), L local crops, H x W pixels, N patches, D width,
K prototypes; G groups of M = V * B / G global crops, U rows of the buffer of masked patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from webssl_jax import colours
from webssl_jax.data.decode import Size, sides
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.views import Preprocess, Turns
from webssl_jax.methods import losses
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.dino import prototypes
from webssl_jax.methods.dino.gram import Gram, gram_loss
from webssl_jax.methods.dino.prototypes import Targets
from webssl_jax.methods.dino.view import GLOBAL_CROPS, CropSizes, View
from webssl_jax.methods.dino.vitals import dino_vitals
from webssl_jax.methods.masking import BlockMasking, masked_patches
from webssl_jax.methods.teachers import check_shares, running_average
from webssl_jax.methods.vitals import Sign, Vitals, effective_rank
from webssl_jax.models import pixels, sizes
from webssl_jax.models.blocks import subset_size
from webssl_jax.models.heads import Head, HeadConfig, Scores
from webssl_jax.models.layers import gather_tokens
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs
from webssl_jax.optim import schedules
from webssl_jax.optim.tables import ONE_DIMENSIONAL, Tables, falling_rates
from webssl_jax.visuals import crop_sheet

CENTRINGS = ("sinkhorn", "softmax")
_HIDDEN_GREY = 128  # what a masked patch looks like in a picture


@dataclasses.dataclass(frozen=True)
class DINO:
    """The method. Hashable, so it can be static under jit.

    encoder, dino_head, ibot_head: the networks of student and teacher alike; their trees are
      ``params`` and ``teacher``, each {"encoder", "dino_head", "ibot_head"}. Where ibot_head is
      None, the DINO head serves the patches too and there is no tree of that name.
    group_images: see the module's docstring.
    centering: of the teacher's assignments: ``sinkhorn`` (3 iterations over the global batch) or
      ``softmax`` (a running centre in ``aux``).
    stream_prototypes: how many prototypes are compared at a time, 0 for all. It changes memory and
      speed, not results; prototypes.py says when it is worth it.
    Lengths ``_images`` count from the start of the run; momentum rises by half a cosine over the
      whole run.
    layer_decay: the learning rate of block i of n is multiplied by this to the n - i, that of the
      tokens and the patch embedding by one power more.
    local_weight: of the terms of local crops, beside those of global ones.
    gram: DINOv3's second stage; its network is ``aux["gram"]``, and ``aux["gram_steps"]`` counts
      the steps of the stage. None for none.
    crop_sizes: in place of those of ``view`` and ``gram``, where they change from batch to batch;
      :attr:`kinds` has a method for each. None where they stay.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    dino_head: HeadConfig
    ibot_head: HeadConfig | None
    group_images: int
    view: View = View()
    masks: BlockMasking = BlockMasking()
    centering: str = "sinkhorn"
    centre_momentum: float = 0.9
    stream_prototypes: int = 0
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_images: int = 0
    momentum: float = 0.994
    final_momentum: float = 1.0
    freeze_last_layer_images: int = 0
    layer_decay: float = 1.0
    patch_embed_rate: float = 0.2
    local_weight: float = 1.0
    gram: Gram | None = None
    crop_sizes: CropSizes | None = None
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    couples_batch = True
    evaluated = "teacher"
    picture_names = ("masks",)

    @classmethod
    def from_config(cls, config: Any) -> DINO:
        """Reads ``config.model`` (``size`` and/or fields of :class:`ViTConfig`), ``config.method``
        (fields of this class; ``view``, ``masks`` and the heads are groups) and
        ``config.global_batch``.

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        heads = {"dino_head": HeadConfig, "ibot_head": HeadConfig}
        groups = {"view": View, "masks": BlockMasking, "gram": Gram, "crop_sizes": CropSizes}
        fields = sizes.with_groups(cls, config.method, **heads, **groups)
        model = {"image_size": fields["view"].global_size} | sizes.given(config.model)
        size = model.pop("size", None)
        encoder = sizes.build(model) if size is None else sizes.web_dino(size, **model)
        if encoder.drop_path_group is not None:
            raise ValueError("model.drop_path_group is method.group_images here; leave it None")
        method = sizes.construct(cls, fields | {"encoder": encoder}, "method")
        if config.global_batch % method.group_images:
            raise ValueError(
                f"global_batch = {config.global_batch} does not divide into groups of "
                f"method.group_images = {method.group_images}"
            )
        return method

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(*sides(self.view.local_size))
        if self.gram:
            self.encoder.grid_of(self.gram.size, self.gram.size)
            if self.gram.size < max(sides(self.view.global_size)):
                raise ValueError(f"gram.size = {self.gram.size}: smaller than view.global_size")
            if len(set(sides(self.view.global_size))) > 1:
                raise ValueError(f"view.global_size = {self.view.global_size}: gram takes squares")
        if self.encoder.pooling != "cls":
            raise ValueError(f"pooling = {self.encoder.pooling!r}: the heads need 'cls'")
        if not self.encoder.mask_token:
            raise ValueError("the encoder needs mask_token = True for masked patches")
        if self.group_images < (2 if self.koleo_weight else 1):
            raise ValueError(f"group_images = {self.group_images}: KoLeo needs at least 2")
        if self.masks.most(GLOBAL_CROPS * self.group_images, self._patches) < 1:
            raise ValueError("the mask ratios hide no patch at all")
        if self.centering not in CENTRINGS:
            raise ValueError(f"centering = {self.centering!r} is not one of {', '.join(CENTRINGS)}")
        counts = sorted({self.dino_head.prototypes, self._patch_head.prototypes})
        chunk = self.stream_prototypes
        if chunk < 0 or chunk and any(count % chunk for count in counts):
            raise ValueError(
                f"stream_prototypes = {chunk} must be 0 or divide the prototypes of every head: "
                f"{', '.join(map(str, counts))}"
            )
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        check_shares(self, "centre_momentum", "momentum", "final_momentum")
        _ = self.kinds  # check their own fields

    @property
    def kinds(self) -> tuple[DINO, ...]:
        """See ``methods.base.kinds_of``."""
        if self.crop_sizes is None:
            return (self,)
        return tuple(
            dataclasses.replace(
                self,
                view=dataclasses.replace(self.view, global_size=large, local_size=small),
                gram=self.gram and dataclasses.replace(self.gram, size=twin),
                crop_sizes=None,
            )
            for large, small, twin in self.crop_sizes.triples(bool(self.gram))
        )

    @property
    def _grid(self) -> tuple[int, int]:
        return self.encoder.grid_of(*sides(self.view.global_size))

    @property
    def _patches(self) -> int:
        return self._grid[0] * self._grid[1]

    @property
    def _patch_head(self) -> HeadConfig:
        return self.ibot_head or self.dino_head

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """A fresh student, its copy as teacher, and in ``aux`` the centres where they are used."""
        encoder_rng, dino_rng, ibot_rng = jax.random.split(rng, 3)
        token = jnp.zeros((1, self.encoder.width))
        image = jnp.zeros((1, *sides(self.view.global_size), 3))
        encoder = ViT(self.encoder).init(encoder_rng, image)
        params = {
            "encoder": encoder["params"],
            "dino_head": Head(self.dino_head).init(dino_rng, token)["params"],
        }
        if self.ibot_head:
            params["ibot_head"] = Head(self.ibot_head).init(ibot_rng, token)["params"]
        aux = {}
        if self.centering == "softmax":
            aux = {
                "dino_centre": jnp.zeros(self.dino_head.prototypes),
                "ibot_centre": jnp.zeros(self._patch_head.prototypes),
            }
        if self.gram:
            aux |= {"gram": params["encoder"], "gram_steps": jnp.zeros((), jnp.int32)}
        return Variables(params, params, aux)

    @property
    def later_stage(self) -> bool:
        """See ``methods.base.is_later_stage``."""
        return self.gram is not None

    @property
    def initial_weights(self) -> dict[str, str]:
        """See ``methods.base.initial_weights``."""
        return {"aux/gram": self.gram.teacher} if self.gram and self.gram.teacher else {}

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The three losses of one global batch.

        batch: ``global_crops`` (B, V, H, W, 3) and ``local_crops`` (B, L, h, w, 3), uint8; what is
        to be done to them, if that is left to the device (``methods/distortions.py``); and
        ``masks`` (B, V, N) bool instead of drawn ones, for comparison with other implementations.

        Raises:
          ValueError: if B does not divide into groups.
        """
        b = batch["global_crops"].shape[0]
        if b % self.group_images:
            raise ValueError(f"{b} images do not divide into groups of {self.group_images}")
        groups, crops = b // self.group_images, GLOBAL_CROPS * self.group_images
        mask_rng, drop_rng = jax.random.split(rng)
        masks = batch.get("masks")
        if masks is None:
            masks = self.masks.draw(mask_rng, groups, crops, self._grid)
        masks = masks.reshape(groups, crops, -1)
        hidden = masked_patches(masks, self.masks.most(crops, self._patches))
        weights = rearrange(hidden.weights, "g u -> (g u)")

        def at_masks(patches: jax.Array) -> jax.Array:
            """(B * V, N, D) -> (G * U, D): the masked patches, and padding."""
            grouped = patches.reshape(groups, -1, patches.shape[-1])
            return rearrange(gather_tokens(grouped, hidden.indices), "g u d -> (g u) d")

        sizes = self.view.crops(batch, self.mean, self.std)
        global_crops = sizes[0]

        teacher_global = ViT(self.encoder).apply({"params": teacher["encoder"]}, global_crops)
        assert isinstance(teacher_global, ViTOutput)  # flax does not say what a module returns
        teacher_cls = self._scores("dino_head", teacher, teacher_global.cls)
        teacher_patches = self._scores("ibot_head", teacher, at_masks(teacher_global.patches))
        targets, patch_targets, aux = self._assign(
            teacher_cls,
            teacher_patches,
            hidden.weights,
            aux,
            schedule_values["teacher_temperature"],
        )

        student = dataclasses.replace(self.encoder, drop_path_group=crops)
        outputs = ViT(student).apply(
            {"params": params["encoder"]},
            tuple(sizes),
            mask=(rearrange(masks, "g m n -> (g m) n"), None)[: len(sizes)],
            train=True,
            rngs=train_rngs(student, drop_rng),
        )
        views = [output for output in outputs if isinstance(output, ViTOutput)]  # all, for mypy
        student_global = views[0]
        cls = jnp.concatenate([rearrange(x.cls, "(b v) d -> b v d", b=b) for x in views], axis=1)
        student_cls = self._scores("dino_head", params, cls)  # (B, V + L, K)
        student_patches = self._scores("ibot_head", params, at_masks(student_global.patches))

        # Every pair of views but a global crop with itself, weighing the same: DINOv2's own terms
        # and denominators come to that.
        temperature, chunk = self.student_temperature, self.stream_prototypes
        pairs = prototypes.cross_entropies(targets, student_cls, temperature, chunk=chunk).mean(
            axis=0
        )
        count = pairs.size - GLOBAL_CROPS
        across = pairs[:, :GLOBAL_CROPS].sum() - jnp.trace(pairs)
        patch_losses = prototypes.cross_entropies(
            patch_targets, student_patches.reshape(-1, 1), temperature, chunk=chunk
        )
        koleo = sum(
            (
                losses.koleo(rearrange(x, "(g n) d -> g n d", g=groups))
                for x in rearrange(student_global.cls, "(b v) d -> v b d", v=GLOBAL_CROPS)
            ),
            jnp.zeros(()),
        )
        terms = {
            "dino_local": self.dino_weight
            * self.local_weight
            * pairs[:, GLOBAL_CROPS:].sum()
            / count,
            "dino_global": self.dino_weight * across / count,
            "koleo": self.koleo_weight * koleo,
            "ibot": self.ibot_weight
            * losses.masked_patch_loss(patch_losses.reshape(-1), weights, b * GLOBAL_CROPS),
        }
        if self.gram:
            aux, terms["gram"] = self._gram(
                self.gram, aux, teacher, batch, student_global.patches, schedule_values
            )
        of_globals = student_cls._replace(features=student_cls.features[:, :GLOBAL_CROPS])
        statistics = prototypes.statistics(
            targets, of_globals.reshape(-1), temperature, chunk=chunk
        )
        report = self._report(statistics, teacher_global.cls, aux)
        report["masked_share"] = masks.mean()
        return LossOutput(sum(terms.values(), jnp.zeros(())), terms, report, aux)

    def _gram(
        self,
        gram: Gram,
        aux: Params,
        teacher: Params,
        batch: Mapping[str, jax.Array],
        patches: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> tuple[Params, jax.Array]:
        """(the next ``aux``, the weighted Gram loss of the student's ``patches`` (B * V, N, D),
        masked ones included)."""
        due = schedule_values["gram_refresh"] > 0
        if not gram.teacher:
            due |= aux["gram_steps"] == 0
        known = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), teacher["encoder"], aux["gram"]
        )
        twins = pixels.normalise(batch["gram_crops"], self.mean, self.std)
        twins = rearrange(twins, "b v h w c -> (b v) h w c")
        seen = ViT(self.encoder).apply({"params": known}, twins)
        assert isinstance(seen, ViTOutput)
        grid = self.encoder.grid_of(gram.size, gram.size)
        loss = gram_loss(patches, jax.lax.stop_gradient(seen.patches), self._grid, grid)
        return aux | {"gram": known, "gram_steps": aux["gram_steps"] + 1}, gram.weight * loss

    def _scores(self, name: str, tree: Params, tokens: jax.Array) -> Scores:
        name = "dino_head" if self.ibot_head is None else name
        head = Head(getattr(self, name), self.encoder.dtype)
        scores = head.apply({"params": tree[name]}, tokens)
        assert isinstance(scores, Scores)
        return scores

    def _assign(
        self, cls: Scores, patches: Scores, weights: jax.Array, aux: Params, temperature: jax.Array
    ) -> tuple[Targets, Targets, Params]:
        """The teacher's targets for CLS tokens (B * V, K) and masked patches (G * U, K), from its
        scores, and the next ``aux``. weights: (G, U), 0 at padding."""
        valid, chunk = weights > 0, self.stream_prototypes
        if self.centering == "sinkhorn":
            flat = rearrange(valid, "g u -> (g u)")
            return (
                prototypes.sinkhorn_knopp(cls, temperature, chunk=chunk),
                prototypes.sinkhorn_knopp(patches, temperature, valid=flat, chunk=chunk),
                aux,
            )
        dino, ibot, m = aux["dino_centre"], aux["ibot_centre"], self.centre_momentum
        rows = cls.features.shape[0]
        # The mean of the groups' means, as the originals average over devices.
        shares = valid / jnp.maximum(valid.sum(axis=1, keepdims=True), 1) / len(valid)
        new = aux | {
            "dino_centre": prototypes.next_centre(dino, cls, jnp.full(rows, 1 / rows), m),
            "ibot_centre": prototypes.next_centre(
                ibot, patches, rearrange(shares, "g u -> (g u)"), m
            ),
        }
        return (
            prototypes.centred_softmax(cls, dino, temperature, chunk=chunk),
            prototypes.centred_softmax(patches, ibot, temperature, chunk=chunk),
            new,
        )

    def _report(
        self, statistics: dict[str, jax.Array], features: jax.Array, aux: Params
    ) -> dict[str, jax.Array]:
        """What tells a healthy run from a collapsed one, from the global crops: what
        ``prototypes.statistics`` says, and of the teacher's CLS (B * V, D) the effective rank and
        the standard deviation over images, L2-normalised, mean over channels times sqrt(D): near 1
        when spread, 0 when collapsed."""
        normed = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
        report = statistics | {
            "feature_std": normed.std(axis=0).mean() * features.shape[-1] ** 0.5,
            "effective_rank": effective_rank(features),
        }
        centres = {name: x for name, x in aux.items() if name.endswith("_centre")}
        return report | {f"{name}_norm": jnp.linalg.norm(x) for name, x in centres.items()}

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        """The running average of all networks."""
        return running_average(teacher, params, schedule_values["momentum"])

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> MultiCropView | Turns:
        if self.crop_sizes:
            return Turns(tuple(x._crops() for x in self.kinds), self.crop_sizes.shares)
        return self._crops()

    def _crops(self) -> MultiCropView:
        return self.view.loader(self._gram_size)

    @property
    def _gram_size(self) -> int:
        return self.gram.size if self.gram else 0

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.of_view(self.view.global_size, self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self.view.batch_spec(batch, self._gram_size)

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        """``momentum``, ``teacher_temperature``, and ``last_layer_rate``, which is 0 while the
        prototypes are frozen and 1 afterwards; with Gram ``gram_refresh``, 1 where the teacher
        takes the Gram teacher's place."""
        warmup = round(self.teacher_temperature_warmup_images / global_batch)
        frozen = round(self.freeze_last_layer_images / global_batch)
        own: dict[str, Schedule] = {}
        if gram := self.gram:
            own["gram_refresh"] = lambda step: gram.due(step, global_batch)
        return own | {
            "momentum": schedules.warmup_cosine(self.momentum, self.final_momentum, total_steps),
            "teacher_temperature": schedules.warmup_cosine(
                self.teacher_temperature,
                self.teacher_temperature,
                warmup,
                warmup,
                start=self.teacher_temperature_start,
                reach_base_in_warmup=True,
            ),
            "last_layer_rate": lambda step: jnp.where(step < frozen, 0.0, 1.0),
        }

    def tables(self) -> Tables:
        """DINOv2's groups: biases, norms and LayerScale are not decayed, all else is (tokens,
        positions and the prototypes' g too); rates fall with depth and are lowest for the patch
        embedding; prototypes stand still at first."""
        falling = falling_rates(self.encoder.depth, self.layer_decay, self.patch_embed_rate)
        still = (r"_head/last_layer/", "last_layer_rate")
        return Tables(decay=(ONE_DIMENSIONAL,), learning_rate=(still, *falling))

    def vitals(self, global_batch: int) -> Vitals:
        """See methods/dino/vitals.py."""
        dino, ibot = (math.log(head.prototypes) for head in (self.dino_head, self._patch_head))
        local = self.view.local_count / (self.view.local_count + GLOBAL_CROPS - 1)
        uniform_loss = {
            "dino_local": self.dino_weight * self.local_weight * dino * local,
            "dino_global": self.dino_weight * dino * (1 - local),
            "ibot": self.ibot_weight * ibot * self.masks.probability,
        }
        crops, centred = GLOBAL_CROPS * global_batch, self.centering == "softmax"
        width = self.encoder.width
        found = dino_vitals(self.dino_head.prototypes, crops, width, uniform_loss, centred)
        if self.gram:
            found = found._replace(signs=(*found.signs, Sign("train/gram", "Gram loss")))
        return found

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        """See :func:`mask_pictures`."""
        return mask_pictures(self.encoder, self.masks, batch, rng)

    def train_flops(self) -> float:
        """Three times the student's forward matrix products and once the teacher's: of the blocks,
        what stochastic depth leaves of all crops; of the heads, CLS tokens and the buffer of masked
        patches. Of crops of several sizes the mean over batches."""
        if self.crop_sizes:
            counts = [kind.train_flops() for kind in self.kinds]
            return float(np.average(counts, weights=self.crop_sizes.shares))
        e, group = self.encoder, self.group_images
        values = e.patch_size**2 * 3

        def trunk(size: Size, count: int, rate: float) -> float:
            h, w = e.grid_of(*sides(size))
            patches = h * w
            kept = subset_size(count * group, rate) / (count * group) if rate else 1.0
            blocks = e.block_flops(1 + patches + e.num_registers)
            return count * (2.0 * patches * values * e.width + kept * blocks)

        v = self.view
        hidden = self.masks.most(GLOBAL_CROPS * group, self._patches) / group
        dino, ibot = self.dino_head.flops(e.width), self._patch_head.flops(e.width)
        student = trunk(v.global_size, GLOBAL_CROPS, e.drop_path)
        if v.local_count:
            student += trunk(v.local_size, v.local_count, e.drop_path)
        student += (GLOBAL_CROPS + v.local_count) * dino + hidden * ibot
        teacher = trunk(v.global_size, GLOBAL_CROPS, 0.0) + GLOBAL_CROPS * dino + hidden * ibot
        if self.gram:
            teacher += trunk(self.gram.size, GLOBAL_CROPS, 0.0)
        return 3.0 * student + teacher


def mask_pictures(
    encoder: ViTConfig, masks: BlockMasking, batch: Mapping[str, np.ndarray], rng: jax.Array
) -> dict[str, np.ndarray]:
    """{"masks": a sheet of the images, each with the two masks that its global crops would have},
    all of them drawn as one group."""
    images = np.asarray(batch["image"])
    (h, w), p = encoder.grid_of(*images.shape[1:3]), encoder.patch_size
    drawn = np.asarray(masks.draw(rng, 1, GLOBAL_CROPS * len(images), (h, w)))
    hidden = repeat(drawn, "1 (b v) (h w) -> v b (h p) (w q) 1", v=GLOBAL_CROPS, h=h, p=p, q=p)
    views = {
        f"mask {i + 1}": np.where(mask, np.uint8(_HIDDEN_GREY), images)
        for i, mask in enumerate(hidden)
    }
    return {"masks": crop_sheet(images, views, title="Patches hidden from the student")}
