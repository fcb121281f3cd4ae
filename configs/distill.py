"""A small student of a frozen encoder: any run, or any weights that can be opened.

    python -m webssl_jax.train --config configs/distill.py:size=s16,teacher=runs/TEACHER \
        --workdir RUN --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: teacher = a run, or a file or folder of weights (its shapes are read from there); size =
s16, b16 or tiny; preset as in web_mae.py.

Sources: the loss, a cosine of image and patch features behind small adapters, is that of AM-RADIO
(Ranzinger et al., arXiv 2312.06709) with one teacher; its smooth L1 on patches, a tenth of that
term, is left out. Assumptions, of no paper: 100 epochs of ImageNet-1k, batch 1024, rate 1e-3,
cosine, crop scale 0.3 to 1, flips; the teacher sees 224 pixels, or what its patches make of that.
DINOv3 distils its small networks another way, with the teacher's heads, which are not published.

``tiny`` is no recipe: 48 pixels, a few minutes on two CPU cores with a small teacher.

Licence: a student of Meta's DINOv3 comes under the DINOv3 License; its card says so
(docs/methods.md). Expected figures: none of this code yet.
"""

import dataclasses

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

IMAGENET_IMAGES = 1_281_167
SIZES = {
    "s16": {"width": 384, "depth": 12, "heads": 6, "patch_size": 16},
    "b16": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "tiny": {"width": 128, "depth": 6, "heads": 4, "patch_size": 8},
}
# Of a DINOv2 ViT-S/14, where no teacher is named yet.
_STAND_IN = {"width": 384, "depth": 12, "heads": 6, "patch_size": 14, "image_size": 518}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="s16", teacher="", preset="")
    if arg.size not in SIZES:
        raise ConfigError(f"config argument size={arg.size}: {suggest(arg.size, SIZES)}")
    config = base()
    config.name = f"distill_{arg.size}"
    config.global_batch = 1024
    config.total_images = 100 * IMAGENET_IMAGES
    fields = {"position": "sincos", "init": "mae", **SIZES[arg.size]}
    config.model = vit(None, remat="full", dtype="bfloat16", **fields)
    tiny = arg.size == "tiny"
    config.method = distill(arg.teacher, image_size=48 if tiny else 224, side=98 if tiny else 224)
    config.optim.lr = 1e-3
    config.optim.lr_batch = 1024
    config.optim.warmup_images = 5 * IMAGENET_IMAGES
    config.optim.b2 = 0.999
    if tiny:
        config.global_batch = 64
        config.total_images = 64_000
        config.optim.lr_batch = 64
        config.optim.warmup_images = 6_400
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.method.teacher.dtype = "float32"
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def distill(teacher: str, image_size: int, side: int) -> dict:
    """The method's keys; ``side``: about how many pixels the teacher sees."""
    fields, mean, std = _encoder(teacher) if teacher else (_STAND_IN, IMAGENET_MEAN, IMAGENET_STD)
    patch = fields["patch_size"]
    return {
        "name": "distill",
        "weights": teacher,
        "teacher": fields | {"dtype": "bfloat16", "remat": "none"},
        "teacher_size": max(round(side / patch), 1) * patch,
        "hidden": 0,
        "cls_weight": 1.0,
        "patch_weight": 1.0,
        "view": {"image_size": image_size, "scale_min": 0.3, "scale_max": 1.0, "hflip": 0.5},
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "teacher_mean": mean,
        "teacher_std": std,
    }


def _encoder(path: str) -> tuple[dict, tuple, tuple]:
    """(fields of the encoder in a run or weights, and the colours that it expects)."""
    from webssl_jax import methods, runs, workdirs
    from webssl_jax.weights import load

    if workdirs.is_run(path):
        networks = methods.create(runs.read_config(path))
    else:
        networks = load.open_(path).networks
    if networks.encoder is None:
        raise ConfigError(f"config argument teacher={path}: has no encoder")
    colours = networks.preprocess.mean, networks.preprocess.std
    return dataclasses.asdict(networks.encoder), *colours
