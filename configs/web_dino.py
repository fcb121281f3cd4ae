"""Web-DINO: the paper's DINOv2 runs on web images (recipes of Web-SSL, ICCV 2025, appendix A and
C).

    python -m webssl_jax.train --config configs/web_dino.py:size=1b --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = 300m 1b 2b 3b 5b 7b (the paper's) or tiny; images = images seen, 2e9 by default
(the paper's 7b was also trained on 1e9, 4e9 and 8e9).

Batch 3072, lr 3.5e-4 after a warm-up of 100,000 steps, 2 billion images (651,041 steps) at 224 px.
Another ``global_batch`` keeps the images of run and warm-up and scales the rate by the square root,
as DINOv2 does; it must divide into groups of ``method.group_images``.

Sources: batch, rate, warm-up, length and sizes are the paper's table 4 and appendix C. It takes all
else unchanged from DINOv2's largest model (dinov2/configs/train/vitg14.yaml over
ssl_default_config.yaml): crops (2 x 224, 8 x 98), masks, heads (131,072 prototypes, bottlenecks 384
and 256), Sinkhorn, temperatures (0.04 to 0.07 in 37,500 steps), KoLeo 0.1, momentum 0.994 to 1,
decay 0.04 to 0.2, rate down to 1e-6, prototypes frozen for 1,250 steps, patch embedding at a fifth
of the rate, clipping at 3 by module, stochastic depth 0.4, AdamW (0.9, 0.999). Groups of 12 images
are its batch on one device. Blur as it ran (probabilities 0, 0.9, 0.5); what its code meant is
``--config.method.view.blur="(1.0, 0.1, 0.5)"`` (see data/multicrop.py).

Assumptions, because the paper does not say: stochastic depth, iBOT and KoLeo are DINOv2's for every
size; with other lengths the cosines stretch and the warm-ups stay. bfloat16 stands for the
original's float16. ``tiny`` is no recipe of theirs: the same method at sizes for a laptop.

Hardware: no size has been run on real chips with this code. The first lines of a run say what the
compiled step needs of each device's memory.

Expected figures: the paper's, the goal of a full run and not results of this code. Web-DINO after 2
billion images at 224 px, average of 16 VQA tasks and of its four groups (table 11):

        average  general  knowledge  OCR & chart  vision-centric
  1b      49.01     71.1       46.1         23.3            55.6
  2b      50.77     72.8       47.1         26.8            56.4
  3b      51.71     72.7       47.1         28.3            58.7
  5b      52.83     74.5       46.8         30.2            59.8
  7b      53.87     74.4       48.3         31.4            61.5

The 7b after 8 billion: 55.24, 74.5, 48.0, 39.4, 59.1. A network that knows nothing starts near a
DINO loss (local and global) of ln 131,072 = 11.78 and an iBOT loss of half of that.
"""

from common import base, vit

from webssl_jax.config import parse_arg
from webssl_jax.methods.pixels import IMAGENET_MEAN, IMAGENET_STD


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="300m", images=2_000_000_000)
    config = base()
    config.name = f"web_dino_{arg.size}"
    config.total_images = arg.images
    config.global_batch = 3072
    config.model = vit(arg.size, dtype="bfloat16", remat="full", drop_path=0.4)
    config.method = dino()
    config.optim.lr = 3.5e-4
    config.optim.lr_batch = 3072
    config.optim.lr_scaling = "sqrt"
    config.optim.final_lr = 1e-6
    config.optim.warmup_images = 100_000 * 3072
    config.optim.warmup_ends_at_peak = True
    config.optim.weight_decay = 0.04
    config.optim.final_weight_decay = 0.2
    config.optim.b2 = 0.999
    config.optim.clip = "per_module"
    config.optim.clip_norm = 3.0
    config.method.teacher_temperature_warmup_images = 37_500 * 3072
    config.method.freeze_last_layer_images = 1_250 * 3072
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = 240_000
        config.optim.lr = 1e-3
        config.optim.lr_batch = 64
        config.optim.warmup_images = 24_000
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.model.drop_path = 0.1
        config.model.layer_scale = 0.1
        config.method.group_images = 16
        config.method.view.global_size = 48
        config.method.view.local_size = 24
        config.method.view.local_count = 4
        for head in (config.method.dino_head, config.method.ibot_head):
            head.update({"prototypes": 1024, "bottleneck": 64, "hidden": 256})
        config.method.teacher_temperature_warmup_images = 24_000
        config.method.freeze_last_layer_images = 640
        config.data.train = "corpus:train"
    return config


def dino() -> dict:
    """The method's keys; see DINO in webssl_jax/methods/dino.py."""
    head = {"prototypes": 131_072, "hidden": 2048, "layers": 3}
    return {
        "name": "dino",
        "group_images": 12,
        "view": {
            "global_size": 224,
            "local_size": 98,
            "local_count": 8,
            "global_scale": (0.32, 1.0),
            "local_scale": (0.05, 0.32),
            "flip": 0.5,
            "blur": (0.0, 0.9, 0.5),
        },
        "masks": {"probability": 0.5, "ratio_min": 0.1, "ratio_max": 0.5},
        "dino_head": head | {"bottleneck": 384},
        "ibot_head": head | {"bottleneck": 256},
        "centering": "sinkhorn",  # or softmax, with a running centre
        "centre_momentum": 0.9,
        "dino_weight": 1.0,
        "ibot_weight": 1.0,
        "koleo_weight": 0.1,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "teacher_temperature_start": 0.04,
        "teacher_temperature_warmup_images": 0,
        "momentum": 0.994,
        "final_momentum": 1.0,
        "freeze_last_layer_images": 0,
        "layer_decay": 1.0,
        "patch_embed_rate": 0.2,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
