"""Runs timm on exported folders and makes weights with it: a process of its own.

    python timm_oracle.py ORACLES PIXELS.npz OUTPUT FOLDER [FOLDER ...]

PIXELS holds normalised images {name: (B, 3, H, W)}. OUTPUT becomes a folder: ``features.npz`` with
{"FOLDER's name/name": tokens (B, 1 + registers + N, D)}, a model of random weights as
``random.pth`` and ``random.safetensors``, and its features under "random/name"; so, too, small ones
of timm's DINOv2 with SwiGLU, ``dinov2.safetensors`` and ``dinov2_reg4.safetensors``, its image
towers ``clip.safetensors`` and ``siglip.safetensors``, and ``dinov3.safetensors``,
``dinov3_gated.safetensors`` and ``ijepa.safetensors``.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from timm_import import timm

_, pixels, output, *folders = map(pathlib.Path, sys.argv[1:])


def tokens(model, x):
    """At another size timm resizes the positions itself; rotated ones it computes."""
    if model.pos_embed is None:
        return seen(model, x)
    side = model.patch_embed.grid_size[0] * model.patch_embed.patch_size[0]
    table = model.pos_embed.data
    try:
        model.set_input_size(img_size=x.shape[2:])
        with torch.no_grad():
            return model.forward_features(x).numpy()
    finally:
        model.set_input_size(img_size=(side, side))
        model.pos_embed.data = table


def seen(model, x):
    """Tokens at the native size, SigLIP's pooled first."""
    with torch.no_grad():
        made = model.forward_features(x)
        if model.attn_pool is not None:
            made = torch.cat([model.forward_head(made, pre_logits=True)[:, None], made], 1)
        return made.numpy()


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(0.15 * torch.randn_like(p) + one)
    return model


output.mkdir()
found = {}
images = {name: torch.from_numpy(x) for name, x in np.load(pixels).items()}
for folder in folders:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    if model.attn_pool is not None or folder.name == "tower-clip":
        found[f"{folder.name}/32x32"] = seen(model, images["32x32"])
        continue
    for name, x in images.items():
        found[f"{folder.name}/{name}"] = tokens(model, x)
fields = json.loads((folders[0] / "config.json").read_text())["model_args"]
model = randomise(timm.create_model("vit_base_patch16_224", num_classes=7, **fields)).eval()
torch.save(model.state_dict(), output / "random.pth")
save_file(model.state_dict(), output / "random.safetensors")
for name, x in images.items():
    found[f"random/{name}"] = tokens(model, x)
towers = {"clip": "vit_base_patch16_clip_quickgelu_224", "siglip": "vit_base_patch16_siglip_224"}
for name, kind in towers.items():
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    small |= {"act_layer": "gelu_tanh", "num_classes": 0} if name == "siglip" else {}
    model = randomise(timm.create_model(kind, **small)).eval()
    save_file(model.state_dict(), output / f"{name}.safetensors")
    found[f"{name}/32x32"] = seen(model, images["32x32"])
for name in ("dinov2", "dinov2_reg4"):
    kind = {"dinov2": "vit_giant_patch14_dinov2", "dinov2_reg4": "vit_giant_patch14_reg4_dinov2"}
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=5.5)
    model = randomise(timm.create_model(kind[name], **small)).eval()
    save_file(model.state_dict(), output / f"{name}.safetensors")
    for image, x in images.items():
        found[f"{name}/{image}"] = tokens(model, x)
others = {
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_gated": ("vit_7b_patch16_dinov3", {"mlp_ratio": 1.5}),
    "ijepa": ("vit_huge_patch14_gap_224", {}),
}
for name, (kind, more) in others.items():
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    model = randomise(timm.create_model(kind, **small | more)).eval()
    save_file(model.state_dict(), output / f"{name}.safetensors")
    for image, x in images.items():
        found[f"{name}/{image}"] = tokens(model, x)
np.savez(output / "features.npz", **found)
