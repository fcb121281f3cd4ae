"""MoCo v3 (Chen et al., arXiv 2104.02057): contrast without language, as a control beside CLIP and
DINO.

    python -m webssl_jax.train --config configs/mocov3.py:size=b16 --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = s16, b16, l16 or tiny; preset as in web_mae.py.

Sources: batch 4096, AdamW (0.9, 0.999), rate 1.5e-4 x batch / 256, decay 0.1 of everything that is
trained, 40 of 300 epochs of ImageNet-1k warm-up, cosine to 0, temperature 0.2, momentum 0.99 rising
to 1, crop scale 0.08 to 1, projector and predictor of 4096 and 256, a patch embedding that stays as
drawn are those of the paper and of the README of its code. Heads of s16 are 12 of 32 channels, as
there. Assumptions: the rate moves by the step and not by parts of an epoch, which is the same; blur
is the one of data/photometric.py, a Gaussian of 9 taps, and not Pillow's approximation.

``tiny`` is no recipe of theirs: 48 pixels, batch 64, a few minutes on two CPU cores.

Expected figures: the paper's linear probe on ImageNet-1k after 300 epochs is 73.2 (s16) and 76.7
(b16), of the trained encoder and not of the running average; no figure of this code yet. Nothing
has run on real chips. The loss starts near 0.8 ln(batch), 6.7 at 4096.
"""

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

IMAGENET_IMAGES = 1_281_167
SIZES = {
    "s16": {"width": 384, "depth": 12, "heads": 12, "patch_size": 16},
    "b16": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "l16": {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16},
    "tiny": {"width": 128, "depth": 6, "heads": 4, "patch_size": 8},
}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="b16", preset="")
    if arg.size not in SIZES:
        raise ConfigError(f"config argument size={arg.size}: {suggest(arg.size, SIZES)}")
    config = base()
    config.name = f"mocov3_{arg.size}"
    config.global_batch = 4096
    config.total_images = 300 * IMAGENET_IMAGES
    config.model = vit(
        None, remat="full", dtype="bfloat16", position="sincos_rows", init="moco", **SIZES[arg.size]
    )
    config.method = mocov3(image_size=224, hidden=4096, output=256)
    config.optim.lr = 1.5e-4
    config.optim.lr_batch = 256
    config.optim.warmup_images = 40 * IMAGENET_IMAGES
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.999
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = 64_000
        config.optim.lr = 1e-3
        config.optim.lr_batch = 64
        config.optim.warmup_images = 6_400
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.method = mocov3(image_size=48, hidden=256, output=64)
        config.method.view.scale = (0.3, 1.0)
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def mocov3(image_size: int, hidden: int, output: int) -> dict:
    """The method's keys."""
    return {
        "name": "mocov3",
        "temperature": 0.2,
        "momentum": 0.99,
        "train_patch_embed": False,
        "projector": {"hidden": hidden, "output": output, "layers": 3},
        "predictor": {"hidden": hidden, "output": output, "layers": 2},
        "view": {
            "image_size": image_size,
            "scale": (0.08, 1.0),
            "flip": 0.5,
            "jitter": 0.8,
            "grayscale": 0.2,
            "blur": (1.0, 0.1),
            "solarize": (0.0, 0.2),
            "distort_on": "host",
        },
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
