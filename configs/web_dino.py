"""Web-DINO: the paper's DINOv2 runs on web images (recipes of Web-SSL, ICCV 2025, appendix A and
C).

    python -m webssl_jax.train --config configs/web_dino.py:size=1b --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments, with commas between:

  size    1b 2b 3b 5b 7b (the paper's), 300m (released with them, not in its tables) or tiny
  data    web (2 billion images seen), light or heavy (of the images with readable text, or with
          charts and documents; 2 billion seen), imagenet (the control: 300 epochs of ImageNet-1k)
  res     224, or 378 or 518: high-resolution adaptation of a run at 224
  images  images seen, instead of that length
  preset  v4, v5e, v5p, v6e, v5p-512 or 2xv5p-256: sharding and remat for them (common.py)

The paper's runs besides: the 7b on 8 billion images (also 1 and 4), filtered data, the control, and
20,000 steps at high resolution, or 10,000 (its appendix C names both):

    web_dino.py:size=7b,images=8_000_000_000
    web_dino.py:size=2b,data=heavy --config.data.train=SHARDS_OF_CHARTS    (also 1b, and light)
    web_dino.py:size=1b,data=imagenet --config.data.train=IMAGENET         (also 2b 3b 5b)
    web_dino.py:size=7b,res=518 --config.init_from=RUN_OR_WEIGHT_FILE
    web_dino.py:size=7b,res=518,images=20_480_000 --config.init_from=RUN_OR_WEIGHT_FILE

Batch 3072, lr 3.5e-4 after a warm-up of 100,000 steps, 2 billion images (651,041 steps) at 224 px;
8 billion are 2,604,166 steps. ImageNet is 125,113 steps, high resolution batch 2048 and lr 1.41e-5.
Another ``global_batch`` keeps the images of run and warm-up and scales the rate by the square root,
as DINOv2 does; it must divide into groups of ``method.group_images``. At high resolution the
learned positions are resized on the way in and trained at that size.

Sources: batch, rate, warm-up, length and sizes are the paper's table 4 and appendix C. It takes all
else unchanged from DINOv2's largest model (dinov2/configs/train/vitg14.yaml over
ssl_default_config.yaml): crops (2 x 224, 8 x 98), masks, heads (131,072 prototypes, bottlenecks 384
and 256), Sinkhorn, temperatures (0.04 to 0.07 in 37,500 steps), KoLeo 0.1, momentum 0.994 to 1,
decay 0.04 to 0.2, rate down to 1e-6, prototypes frozen for 1,250 steps, patch embedding at a fifth
of the rate, clipping at 3 by module, stochastic depth 0.4, AdamW (0.9, 0.999). Groups of 12 images
are its batch on one device. Blur as it ran (probabilities 0, 0.9, 0.5); what its code meant is
``--config.method.view.blur="(1.0, 0.1, 0.5)"`` (see data/multicrop.py). The filters were answers of
SmolVLM2 and kept 50.3% (light) and 1.3% (heavy) of the images; here they are shards that you made.

Assumptions, because the paper does not say: stochastic depth, iBOT and KoLeo are DINOv2's for every
size; with other lengths of web data the cosines stretch and the warm-ups stay, while ImageNet has
them in the shares that they have of DINOv2's 625,000 steps (16% rate, 6% temperature, 0.2% frozen),
as the paper says of the rate at high resolution. There, too: local crops stay at 98 px, groups are
of 8 images (12 do not divide 2048), momentum and decay run their course again, and both sizes start
from 224 px. bfloat16 stands for the original's float16. ``tiny`` is no recipe of theirs: the same
method at sizes for a laptop; mini_web.py:method=dino is a run of it with figures.

Hardware: no size has been run on real chips with this code. Computed from the shapes: GiB of
parameters, teacher and Adam's moments (float32), whole and on each chip with ``sharding.fsdp`` of

         whole      8     16     64    256
  300m    5.99   0.75   0.37   0.10   0.03
  1b     18.40   2.30   1.15   0.29   0.07
  2b     32.62   4.08   2.04   0.51      -   (2,688 channels divide by 128 and not by 256)
  3b     45.52   5.69   2.85   0.71   0.18
  5b     75.20   9.40   4.71   1.18   0.30
  7b     97.76  12.22   6.11   1.54   0.39

Logits take 87 MiB an image on a chip (173 rows of 131,072 prototypes, teacher's and student's), a
few times over; ``--config.method.stream_prototypes=8192`` holds a sixteenth of that at a time. The
first lines of a run say what the compiled step needs of each device's memory.

Expected figures: the paper's, the goal of a full run and not results of this code. At 224 px after
2 billion images unless said otherwise: average of 16 VQA tasks and of its four groups (tables 6,
8, 10, 13, 15), top-1 of the linear probe on ImageNet-1k (tables 3, 7 and 9; - where it has none):

                    average  general  knowledge  OCR & chart  vision-centric  ImageNet
  1b                  49.01     71.1       46.1         23.3            55.6     84.70
  2b                  50.77     72.8       47.1         26.8            56.4     85.16
  3b                  51.71     72.7       47.1         28.3            58.7     85.66
  5b                  52.83     74.5       46.8         30.2            59.8     85.84
  7b                  53.87     74.4       48.3         31.4            61.5     86.00
  7b, 8 billion       55.24     74.5       48.0         39.4            59.1     86.52
  the same, 378 px    57.43     73.9       47.7         50.4            57.7      86.3
  the same, 518 px    59.91     75.5       48.2         55.1            60.8      86.4
  1b light            50.73     70.8       46.6         29.6            55.9         -
  1b heavy            49.44     66.5       45.6         34.5            51.2         -
  2b light            53.38     73.0       51.7         33.2            55.6         -
  2b heavy            53.65     70.7       47.2         40.4            56.2         -
  1b ImageNet         46.39     67.8       46.5         20.3            50.9         -
  2b ImageNet         45.99     67.6       44.4         20.6            51.3         -
  3b ImageNet         46.43     68.6       44.1         20.6            52.5         -
  5b ImageNet         46.28     67.7       43.3         21.0            53.2         -

Of 2b light one task of knowledge looks misprinted (MathVista 31.4, the number of its ChartQA); with
the 15.9 of 2b the average is about 52.4.

A network that knows nothing starts near a DINO loss (local and global) of ln 131,072 = 11.78 and an
iBOT loss of half of that.
"""

from ml_collections import ConfigDict

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

WEB_IMAGES = 2_000_000_000
# images seen, by data
LENGTHS = {"web": WEB_IMAGES, "light": WEB_IMAGES, "heavy": WEB_IMAGES, "imagenet": 300 * 1_281_167}
RESOLUTIONS = (224, 378, 518)


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="300m", data="web", res=224, images=0, preset="")
    for name, known in (("data", tuple(LENGTHS)), ("res", RESOLUTIONS)):
        if arg[name] not in known:
            known = map(str, known)
            raise ConfigError(
                f"config argument {name}={arg[name]}: {suggest(str(arg[name]), known)}"
            )
    if arg.size == "tiny" and (arg.data != "web" or arg.res != 224):
        raise ConfigError("config argument size=tiny: has no data or res of the paper's; leave it")
    config = vitg14(arg.size)
    usual = {"data": "web", "res": 224}
    special = [str(arg[name]) for name in usual if arg[name] != usual[name]]
    config.name = "_".join(["web_dino", arg.size, *special])
    config.total_images = arg.images or LENGTHS[arg.data]
    config.optim.lr = 3.5e-4
    config.optim.lr_batch = 3072
    if arg.res != 224:
        config.global_batch = 2048
        config.total_images = arg.images or 20_000 * 2048
        config.optim.lr = 1.41e-5
        config.optim.lr_batch = 2048
        config.method.group_images = 8
        config.method.view.global_size = arg.res
    if arg.data == "imagenet" or arg.res != 224:
        _compress(config)
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = arg.images or 240_000
        config.optim.lr = 1e-3
        config.optim.lr_batch = 64
        config.optim.warmup_images = 24_000
        config.model.dtype = "float32"
        config.model.remat = "none"
        # DINOv2's start, LayerScale near 0 and small values, stays on a plateau in runs this short
        # (docs/health.md).
        config.model.init = "mae"
        config.model.layer_scale = 1.0
        config.model.drop_path = 0.0
        config.method.momentum = 0.99
        config.method.group_images = 16
        config.method.view.global_size = 48
        config.method.view.local_size = 24
        config.method.view.local_count = 4
        for head in (config.method.dino_head, config.method.ibot_head):
            head.update({"prototypes": 1024, "bottleneck": 64, "hidden": 256})
        config.method.teacher_temperature_warmup_images = 24_000
        config.method.freeze_last_layer_images = 640
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def vitg14(size: str) -> ConfigDict:
    """DINOv2's largest recipe with the encoder of that name: vitg14.yaml."""
    config = base()
    config.total_images = 625_000 * 3072
    config.global_batch = 3072
    config.model = vit(size, dtype="bfloat16", remat="full", drop_path=0.4)
    config.method = dino()
    config.method.teacher_temperature_warmup_images = 37_500 * 3072
    config.method.freeze_last_layer_images = 1_250 * 3072
    config.optim.lr = 2e-4
    config.optim.lr_batch = 1024
    config.optim.lr_scaling = "sqrt"
    config.optim.final_lr = 1e-6
    config.optim.warmup_images = 100_000 * 3072
    config.optim.warmup_ends_at_peak = True
    config.optim.weight_decay = 0.04
    config.optim.final_weight_decay = 0.2
    config.optim.b2 = 0.999
    config.optim.clip = "per_module"
    config.optim.clip_norm = 3.0
    return config


def _compress(config: ConfigDict) -> None:
    """Gives the warm-ups the shares of the run that they have of DINOv2's 625,000 steps: 16% of the
    rate, 6% of the temperature, 0.2% of the frozen prototypes."""
    ratio = config.total_images / (625_000 * 3072)
    for group, key in (
        (config.optim, "warmup_images"),
        (config.method, "teacher_temperature_warmup_images"),
        (config.method, "freeze_last_layer_images"),
    ):
        group[key] = round(group[key] * ratio)


def dino() -> dict:
    """The method's keys; see DINO in webssl_jax/methods/dino/method.py."""
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
            "jitter": 0.8,
            "grayscale": 0.2,
            "blur": (0.0, 0.9, 0.5),
            "solarize": (0.0, 0.2, 0.0),
            "distort_on": "host",  # or device, where the loader is too slow (docs/debugging.md)
        },
        "masks": {"probability": 0.5, "ratio_min": 0.1, "ratio_max": 0.5},
        "dino_head": head | {"bottleneck": 384},
        # None in a config file: the DINO head serves both (dinov2.py)
        "ibot_head": head | {"bottleneck": 256},
        "centering": "sinkhorn",  # or softmax, with a running centre
        "centre_momentum": 0.9,
        "stream_prototypes": 0,  # prototypes compared at a time, to save memory; 0 = all
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
