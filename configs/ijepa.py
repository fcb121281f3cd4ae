"""I-JEPA (Assran et al., arXiv 2301.08243): features of hidden blocks predicted from the rest, one
crop an image and no augmentation.

    python -m webssl_jax.train --config configs/ijepa.py:size=h14 --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = b16, l16, h14, h16_448, g16 or tiny; preset as in web_mae.py.

Sources: batch 2048, AdamW (0.9, 0.999), 40 of 300 epochs of ImageNet-1k warm-up to 1e-3, cosine to
1e-6, decay 0.04 to 0.4, momentum 0.996 rising linearly to 1, crop scale 0.3 to 1, no flip, four
targets of 0.15 to 0.2, a context of 0.85 to 1, a predictor of 12 blocks of 384 (16 blocks for g16)
are those of the paper and of the published configs; its code draws initial values without the
scaling by depth that its constructor has. Theirs of g16 saw ImageNet-22k for 44 epochs, 3 of them
warm-up; here it has the length of the others. Assumptions: the warm-up starts at 0 and not at 2e-4;
the rate and decay of step k are those of index k and not k + 1; crops are resized bicubically.
Where the original cuts the contexts of a device's batch to the shortest (81 of 110 patches, 16
images at 224/14), here each keeps what it has, up to ``masks.context_patches`` (half of all, which
one in five exceeds at 224/14 and loses its last rows).

``tiny`` is no recipe of theirs: 64 pixels, patches of 8, batch 64, some minutes on two CPU cores.

Expected figures: the paper's linear probe on ImageNet-1k after 300 epochs is 79.3 (h14) and 81.1
(h16_448), mean of the patches of the teacher; no figure of this code yet. Nothing has run on real
chips. The loss falls fast, rises slowly while the targets begin to differ, and falls again: one
that only falls to 0 is collapse (docs/health.md).
"""

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

IMAGENET_IMAGES = 1_281_167
SIZES = {
    "b16": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "l16": {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16},
    "h14": {"width": 1280, "depth": 32, "heads": 16, "patch_size": 14},
    "h16_448": {"width": 1280, "depth": 32, "heads": 16, "patch_size": 16},
    "g16": {"width": 1408, "depth": 40, "heads": 16, "patch_size": 16, "mlp_hidden": 6144},
    "tiny": {"width": 128, "depth": 6, "heads": 4, "patch_size": 8},
}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="h14", preset="")
    if arg.size not in SIZES:
        raise ConfigError(f"config argument size={arg.size}: {suggest(arg.size, SIZES)}")
    config = base()
    config.name = f"ijepa_{arg.size}"
    config.global_batch = 2048
    config.total_images = 300 * IMAGENET_IMAGES
    fields = {"position": "sincos", "pooling": "mean", "init": "ijepa", **SIZES[arg.size]}
    config.model = vit(None, remat="full", dtype="bfloat16", **fields)
    depth = 16 if arg.size == "g16" else 12
    config.method = ijepa(448 if arg.size == "h16_448" else 224, width=384, depth=depth)
    config.optim.lr = 1e-3
    config.optim.lr_batch = 2048
    config.optim.final_lr = 1e-6
    config.optim.warmup_images = 40 * IMAGENET_IMAGES
    config.optim.weight_decay = 0.04
    config.optim.final_weight_decay = 0.4
    config.optim.b2 = 0.999
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = 96_000
        config.optim.lr_batch = 64
        config.optim.warmup_images = 9_600
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.method = ijepa(64, width=64, depth=2)
        config.method.masks.min_keep = 4
        config.method.momentum = 0.98
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def ijepa(image_size: int, width: int, depth: int) -> dict:
    """The method's keys; ``width`` and ``depth`` of the predictor."""
    return {
        "name": "ijepa",
        "predictor": {"width": width, "depth": depth},
        "masks": {
            "targets": 4,
            "target_scale": (0.15, 0.2),
            "target_aspect": (0.75, 1.5),
            "context_scale": (0.85, 1.0),
            "min_keep": 10,
            "context_patches": 0,
        },
        "view": {"image_size": image_size, "scale_min": 0.3, "scale_max": 1.0, "hflip": 0.0},
        "momentum": 0.996,
        "final_momentum": 1.0,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
