"""A random network of timm, as timm saves it, and what timm itself makes of image files: a process
of its own (see ``timm_import.py`` for why).

    python timm_own.py ORACLES OUTPUT IMAGE [IMAGE ...]

OUTPUT becomes a folder of timm, and ``features.npy`` in it has the tokens (B, 1 + N, D) of the
images after the transform that its own ``pretrained_cfg`` asks for.
"""

import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from timm_import import timm

_, output, *files = map(pathlib.Path, sys.argv[1:])

small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
view = {"input_size": (3, 32, 32), "crop_pct": 0.8, "interpolation": "bicubic"}
view |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
model = timm.create_model("vit_base_patch16_224", pretrained_cfg_overlay=view, **small).eval()
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
timm.models.save_for_hf(model, output, model_args=small)
data = timm.data.resolve_data_config({}, model=model)
transform = timm.data.create_transform(**data, is_training=False)
images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
with torch.no_grad():
    np.save(output / "features.npy", model.forward_features(images).numpy())
