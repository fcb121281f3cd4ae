"""The PyTorch side of bench_step.py, whose docstring says what is in a step.

Each class is made from the file that ``bench_step.Ours`` writes. ``step()`` takes a step; ``facts``
are its number of trained parameters, its loss terms at the start and its threads.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import Any

import numpy as np
import torch


class Dino:
    """The original's modules and losses, put together as ``SSLMetaArch`` does."""

    def __init__(self, start: str, checkout: str, fused: bool):
        sys.path.insert(0, checkout)
        warnings.filterwarnings("ignore")  # xFormers is not there, autocast is for CUDA
        given, shape, weights = _read(start)
        # The patch loss sums its counts over processes, so there must be a group: of one.
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
        from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

        self._student, self._teacher = _networks(shape), _networks(shape)
        for networks in (self._student, self._teacher):
            networks.load_state_dict(weights)
        self._teacher.eval().requires_grad_(False)
        groups = [
            dict(group, foreach=not fused, fused=fused)
            for module in self._student.values()
            for group in fuse_params_groups(
                get_params_groups_with_decay(module, lr_decay_rate=1.0, patch_embed_lr_mult=0.2)
            )
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        self._given, self._shape = given, shape
        self._dino_loss = DINOLoss(shape["dino_head"]["prototypes"])
        self._ibot_loss = iBOTPatchLoss(shape["ibot_head"]["prototypes"])
        self._koleo_loss = KoLeoLoss()
        masks = given["masks"]
        self._where = masks.flatten().nonzero().flatten()
        weight = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        self._weight = weight.expand_as(masks)[masks]
        self._student.eval()  # no stochastic depth
        with torch.no_grad():
            self.facts = _facts(self._student, self._losses())
        self._student.train()

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            group["weight_decay"] = 0.04 * group["wd_multiplier"]
            group["lr"] = 1e-5 * group["lr_multiplier"]
        self._optimizer.zero_grad(set_to_none=True)
        terms = self._losses()
        sum(terms.values()).backward()
        for module in self._student.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        self._optimizer.step()
        students, teachers = list(self._student.parameters()), list(self._teacher.parameters())
        with torch.no_grad():
            torch._foreach_mul_(teachers, 0.994)
            torch._foreach_add_(teachers, students, alpha=1 - 0.994)
        for value in terms.values():
            value.item()

    def _losses(self) -> dict[str, torch.Tensor]:
        global_crops, masks = self._given["global_crops"], self._given["masks"]
        count, local_count = len(self._where), self._shape["local_crops"]
        targets, patch_targets = self._targets()
        whole = self._student.backbone(global_crops, masks=masks, is_training=True)
        parts = self._student.backbone(self._given["local_crops"], is_training=True)
        patches = self._student.ibot_head(self._hidden(whole["x_norm_patchtokens"]))[:count]
        cls = [parts["x_norm_clstoken"], whole["x_norm_clstoken"]]
        of_parts, of_whole = self._student.dino_head(torch.cat(cls)).split([len(x) for x in cls])
        pairs = 2 + 2 * local_count
        return {
            "dino_local": self._dino_loss(of_parts.chunk(local_count), targets) / pairs,
            "dino_global": self._dino_loss([of_whole], [targets.flatten(0, 1)]) * 2 / pairs,
            "koleo": self._shape["koleo_weight"]
            * sum(self._koleo_loss(x) for x in whole["x_norm_clstoken"].chunk(2)),
            "ibot": self._ibot_loss.forward_masked(
                patches,
                patch_targets,
                student_masks_flat=masks,
                n_masked_patches=count,
                masks_weight=self._weight,
            ),
        }

    @torch.no_grad()
    def _targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        count, temperature = len(self._where), self._shape["teacher_temperature"]
        seen = self._teacher.backbone(self._given["global_crops"], is_training=True)
        first, second = seen["x_norm_clstoken"].chunk(2)
        cls = self._teacher.dino_head(torch.cat((second, first)))
        patches = self._teacher.ibot_head(self._hidden(seen["x_norm_patchtokens"]))[:count]
        targets = self._dino_loss.sinkhorn_knopp_teacher(cls, teacher_temp=temperature)
        patch_targets = self._ibot_loss.sinkhorn_knopp_teacher(
            patches, teacher_temp=temperature, n_masked_patches_tensor=torch.tensor([count])
        )
        return targets.view(2, -1, targets.shape[-1]), patch_targets

    def _hidden(self, patches: torch.Tensor) -> torch.Tensor:
        """The masked patches, and zeros up to the most there can be."""
        rows = patches.new_zeros(self._shape["hidden_rows"], patches.shape[-1])
        rows[: len(self._where)].copy_(patches.flatten(0, 1).index_select(0, self._where))
        return rows


def _networks(shape: dict[str, Any]) -> torch.nn.ModuleDict:
    from dinov2.layers import DINOHead
    from dinov2.models.vision_transformer import DinoVisionTransformer

    e = shape["encoder"]
    backbone = DinoVisionTransformer(
        img_size=e["image_size"],
        patch_size=e["patch_size"],
        embed_dim=e["width"],
        depth=e["depth"],
        num_heads=e["heads"],
        qkv_bias=e["qkv_bias"],
        drop_path_rate=e["drop_path"],
        drop_path_uniform=True,
        init_values=e["layer_scale"],
        ffn_layer="swiglufused",
        block_chunks=0,
    )
    heads = {
        name: DINOHead(
            e["width"],
            shape[name]["prototypes"],
            nlayers=shape[name]["layers"],
            hidden_dim=shape[name]["hidden"],
            bottleneck_dim=shape[name]["bottleneck"],
        )
        for name in ("dino_head", "ibot_head")
    }
    return torch.nn.ModuleDict({"backbone": backbone} | heads)


class Mae:
    """``ViTMAEForPreTraining`` of ``transformers``."""

    def __init__(self, start: str, checkout: None, fused: bool):
        del checkout
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        given, shape, weights = _read(start)
        self._images = given["images"]
        # not load_state_dict: the names in files are not those of the modules
        self._model, loading = ViTMAEForPreTraining.from_pretrained(
            None, config=ViTMAEConfig(**shape), state_dict=weights, output_loading_info=True
        )
        if loading["missing_keys"] or loading["unexpected_keys"]:
            raise RuntimeError(f"transformers names its weights otherwise: {loading}")
        self._model.train()
        for name, parameter in self._model.named_parameters():
            if "pos_embed" in name or "position_embeddings" in name:
                parameter.requires_grad_(False)  # fixed, as in the original
        trained = [p for p in self._model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=1e-5, betas=(0.9, 0.95), foreach=not fused, fused=fused
        )
        with torch.no_grad():
            loss = self._model(pixel_values=self._images, noise=given["noise"]).loss
        self.facts = _facts(self._model, {"reconstruction": loss})

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(pixel_values=self._images).loss  # draws its masks
        loss.backward()
        self._optimizer.step()
        loss.item()


class Clip:
    """``CLIPModel`` of ``transformers``."""

    def __init__(self, start: str, checkout: None, fused: bool):
        del checkout
        from transformers import CLIPConfig, CLIPModel

        given, shape, weights = _read(start)
        self._given = {"pixel_values": given["images"], "input_ids": given["tokens"]}
        self._model = CLIPModel(CLIPConfig(**shape))
        self._model.load_state_dict(weights)
        self._model.train()
        trained = list(self._model.parameters())
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.2},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, foreach=not fused, fused=fused
        )
        with torch.no_grad():
            self.facts = _facts(self._model, {"contrast": self._loss()})

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, math.log(100))
        loss.item()

    def _loss(self) -> torch.Tensor:
        return self._model(**self._given, return_loss=True).loss


def _read(start: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """The batch, the shape and the weights of ``start``. Sets torch's threads to all cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = dict(np.load(start))
    shape = json.loads(str(arrays.pop("shape")))
    given = {key: torch.from_numpy(value) for key, value in arrays.items()}
    names = [key for key in given if key.startswith("weight.")]
    return given, shape, {name.removeprefix("weight."): given.pop(name) for name in names}


def _facts(model: torch.nn.Module, terms: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "terms": {key: float(value) for key, value in terms.items()},
        "threads": torch.get_num_threads(),
    }
