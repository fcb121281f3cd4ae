"""Web-MAE: masked autoencoding of the paper (recipes of Web-SSL, ICCV 2025, appendix A and C) and
of the MAE repository.

    python -m webssl_jax.train --config configs/web_mae.py:size=1b --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = 300m 700m 1b 2b 3b 5b (the paper's) or tiny; recipe = paper or stock;
preset = v4, v5e, v5p, v6e, v5p-512 or 2xv5p-256: sharding and remat for them (common.py).

  paper   batch 4096, lr 1.6e-3, warm-up 80,000 steps, 2 billion images (488,281 steps), one pass
  stock   the MAE repository's command: lr 1.5e-4 x 4096 / 256 = 2.4e-3, warm-up 40 of 800 epochs
          of ImageNet-1k

Another ``global_batch`` keeps the images of run and warm-up and scales the rate linearly, as MAE
does: 1024 gives 4e-4, 320,000 of 1,953,125 steps.

Sources: batch, rate, warm-up, length and sizes are the paper's table 4 and appendix C; AdamW
(0.9, 0.95), decay 0.05, mask ratio 0.75, per-patch normalised targets, crop scale 0.2 to 1, no
clipping, the decoder (512 x 8, 16 heads) are the MAE repository's. Assumptions, because the paper
does not say: the decoder is the same for every size, the rate ends at 0. ``tiny`` is no recipe of
theirs; its rate is that of quickstart.py.

Hardware: no size has been run on real chips with this code. The first lines of a run say what the
compiled step needs of each device's memory.

Expected figures: the paper's, the goal of a full run and not results of this code. Web-MAE after 2
billion images at 224 px, average of 16 VQA tasks and of its four groups (table 11):

           average  general  knowledge  OCR & chart  vision-centric
  1b         49.19     69.3       45.8         26.5            55.2
  2b         50.59     69.7       46.2         30.2            56.3
  3b         50.92     70.4       46.4         31.1            55.8
  5b         51.50     70.5       46.2         32.7            56.6

The paper has no Web-MAE rows for ImageNet, ADE20K and NYUd (tables 3, 7 and 9), and none for 300m
and 700m. For comparison it gives MAE ViT-H on ImageNet-1k: VQA 45.21; linear probe 76.6.
"""

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, base, vit

IMAGENET_IMAGES = 1_281_167
RECIPES = ("paper", "stock")


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="300m", recipe="paper", preset="")
    if arg.recipe not in RECIPES:
        raise ConfigError(f"config argument recipe={arg.recipe}: {suggest(arg.recipe, RECIPES)}")
    config = base()
    config.name = f"web_mae_{arg.size}_{arg.recipe}"
    config.global_batch = 4096
    config.model = vit(arg.size, dtype="bfloat16", remat="full")
    config.method = mae(image_size=224)
    if arg.recipe == "paper":
        config.total_images = 2_000_000_000
        config.optim.lr = 1.6e-3
        config.optim.lr_batch = 4096
        config.optim.warmup_images = 80_000 * 4096
    else:
        config.total_images = 800 * IMAGENET_IMAGES
        config.optim.lr = 1.5e-4
        config.optim.lr_batch = 256
        config.optim.warmup_images = 40 * IMAGENET_IMAGES
    if arg.size == "tiny":
        config.global_batch = 64
        config.total_images = 240_000
        config.optim.lr = 2e-3
        config.optim.lr_batch = 256
        config.optim.warmup_images = 24_000
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.method = mae(image_size=48, decoder=(96, 1, 4))
        config.data.train = "corpus:train"
    apply_preset(config, arg.preset)
    return config


def mae(image_size: int, decoder: tuple[int, int, int] = (512, 8, 16)) -> dict:
    """The method's keys; ``decoder`` is (width, depth, heads)."""
    width, depth, heads = decoder
    return {
        "name": "mae",
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
        "decoder": {"width": width, "depth": depth, "heads": heads},
        "view": {"image_size": image_size, "scale_min": 0.2, "scale_max": 1.0, "hflip": 0.5},
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
