"""LeJEPA (Balestriero and LeCun, arXiv 2511.08544): one network, no teacher, one weight.
Experimental.

    python -m webssl_jax.train --config configs/lejepa.py:size=l16 --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = s16, b16, l16 or tiny; preset as in web_mae.py.

Sources: its README: two views of 224 pixels (0.3 to 1) and six of 98 (0.05 to 0.3), all with the
same colours, blur of half and solarize of a fifth of them, AdamW at 5e-4 with decay 0.05, warm-up
of one of 100 epochs of ImageNet-1k, cosine to a thousandth. Its launch scripts: batch 512, lambda
0.05, a projector of 2,048, 2,048 and 512 channels. 17 knots to 3 and directions drawn anew in each
step are of its code.

Assumptions: 1,024 directions (its code has 256 to 4,096). Local views are of 96 pixels, which
patches of 16 need. Batch norm of the projector is over all views of the batch, as in its minimal
code; positions are learned; the rate does not follow the batch. Everything is decayed. The scripts
also have flags of a teacher and of masks, which its README denies; neither is here.

``tiny`` is no recipe of theirs: 48 pixels, batch 64, some minutes on two CPU cores.

Expected figures: the paper has 79 (ViT-H/14, linear, ImageNet-1k) without a recipe; others had 64.0
and k-NN 47.1 (s16, 100 epochs). None of this code yet; nothing has run on real chips. SIGReg falls
to about 1, what it is of normal embeddings; probe the encoder's output, not the projector's.
"""

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

IMAGENET_IMAGES = 1_281_167
SIZES = {
    "s16": {"width": 384, "depth": 12, "heads": 6, "patch_size": 16},
    "b16": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "l16": {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16},
    "tiny": {"width": 128, "depth": 6, "heads": 4, "patch_size": 8},
}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="l16", preset="")
    if arg.size not in SIZES:
        raise ConfigError(f"config argument size={arg.size}: {suggest(arg.size, SIZES)}")
    config = base()
    config.name = f"lejepa_{arg.size}"
    config.global_batch = 512
    config.total_images = 100 * IMAGENET_IMAGES
    config.model = vit(
        None, remat="full", dtype="bfloat16", position="learned", init="mae", **SIZES[arg.size]
    )
    config.method = lejepa()
    optim = config.optim
    optim.lr = 5e-4
    optim.lr_scaling = "none"
    optim.final_lr = 5e-7
    optim.warmup_images = IMAGENET_IMAGES
    optim.weight_decay = 0.05
    optim.b2 = 0.999
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = 64_000
        config.model.update({"dtype": "float32", "remat": "none"})
        config.method.view.update({"global_size": 48, "local_size": 24, "local_count": 2})
        config.method.projector.update({"hidden": 256, "output": 32})
        config.method.directions = 256
        optim.warmup_images = 6_400
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def lejepa() -> dict:
    """The method's keys."""
    return {
        "name": "lejepa",
        "sigreg_weight": 0.05,
        "directions": 1024,
        "projector": {"hidden": 2048, "output": 512, "layers": 3, "last_norm": False},
        "view": {
            "global_size": 224,
            "local_size": 96,
            "local_count": 6,
            "global_scale": (0.3, 1.0),
            "local_scale": (0.05, 0.3),
            "flip": 0.5,
            "jitter": 0.8,
            "grayscale": 0.2,
            "blur": (0.5, 0.5, 0.5),
            "solarize": (0.2, 0.2, 0.2),
            "distort_on": "host",
        },
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
