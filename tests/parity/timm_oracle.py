"""Runs timm on exported folders and makes weights with it: a process of its own.

    python timm_oracle.py ORACLES PIXELS.npz OUTPUT FOLDER [FOLDER ...]

timm needs torchvision, whose compiled operators fit only one build of torch. They lie in a folder
of their own (``tools/environment.sh``), so that nothing else, transformers least of all, finds
them; of the operators timm calls none.

PIXELS holds normalised images {name: (B, 3, H, W)}. OUTPUT becomes a folder: ``features.npz`` with
{"FOLDER's name/name": tokens (B, 1 + N, D)}, a model of random weights as ``random.pth`` and
``random.safetensors``, and its features under "random/name".
"""

import json
import pathlib
import sys

import numpy as np
import torch

oracles, pixels, output, *folders = map(pathlib.Path, sys.argv[1:])
sys.path.append(str(oracles))
try:
    import torchvision  # noqa: F401
except RuntimeError:  # its operators are those of another build: their names are enough
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def tokens(model, x):
    """At another size the positions are resized by PyTorch's plain bicubic, as transformers does.
    timm's own rule antialiases and has another cubic; that is its choice of positions, not part of
    the weights' meaning."""
    grid = model.patch_embed.grid_size
    new = (
        x.shape[2] // model.patch_embed.patch_size[0],
        x.shape[3] // model.patch_embed.patch_size[1],
    )
    table = model.pos_embed.data
    square = table[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, size=new, mode="bicubic")
    patches = square.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)
    try:
        model.set_input_size(img_size=x.shape[2:])
        if new != tuple(grid):
            model.pos_embed.data = torch.cat([table[:, :1], patches], dim=1)
        with torch.no_grad():
            return model.forward_features(x).numpy()
    finally:
        model.set_input_size(img_size=(grid[0] * model.patch_embed.patch_size[0],) * 2)
        model.pos_embed.data = table


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
    for name, x in images.items():
        found[f"{folder.name}/{name}"] = tokens(model, x)
fields = json.loads((folders[0] / "config.json").read_text())["model_args"]
model = randomise(timm.create_model("vit_base_patch16_224", num_classes=7, **fields)).eval()
torch.save(model.state_dict(), output / "random.pth")
save_file(model.state_dict(), output / "random.safetensors")
for name, x in images.items():
    found[f"random/{name}"] = tokens(model, x)
np.savez(output / "features.npz", **found)
