"""CLIP on the paper's web images: the controlled baseline (Web-SSL, ICCV 2025, appendix A and C);
MetaCLIP's own sizes too, with CLIP's softmax or SigLIP's sigmoid; and SigLIP's own towers.

    python -m webssl_jax.train --config configs/clip.py:size=1b --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Arguments, with commas between:

  size    1b 2b 3b 5b 7b (the paper's), 300m (their smallest shape), b32 b16 l14 h14 bigg14
          (MetaCLIP's), g14 (open_clip's), siglip_b16 siglip_l16 siglip_so400m (SigLIP's), or tiny
          and siglip_tiny
  loss    softmax (CLIP) or sigmoid (SigLIP); of SigLIP's towers sigmoid unless said otherwise
  images  pairs seen, instead of the recipe's length
  res     pixels a side of images: 224 when left out; SigLIP's B was trained at 256, too
  preset  v4, v5e, v5p, v6e, v5p-512 or 2xv5p-256: sharding and remat for them (common.py)

The paper's runs: 1b to 7b, and the 7b on 1, 4 and 8 billion pairs:

    clip.py:size=7b,images=8_000_000_000

Batch 32768, lr 4e-4 after a warm-up of 2,000 steps, 2 billion pairs (61,035 steps) at 224 px.
MetaCLIP's sizes see 12.8 billion pairs (390,625 steps), the B at 5e-4. Another ``global_batch``
keeps the pairs of run and warm-up and leaves the rate as it is: the originals have no rule for it.

Sources: batch, rate, warm-up, length and vision sizes are the paper's table 4 and appendix C. It
takes all else unchanged from MetaCLIP (arXiv 2309.16671, its configs/ and src/mini_clip): AdamW
(0.9, 0.98), eps 1e-6, decay 0.2 of all but one-dimensional parameters, cosine to 0, no clipping,
crops of 90% to 100% of the area and no flip, one of an image's captions at each visit, OpenAI's
mean and std, quick-GELU, scale 1 / 0.07 clamped to 100.

Assumptions, because the paper does not say: the block is MetaCLIP's with an MLP of 4 x width, the
text tower that of bigG/14 for every size from 300m to 7b. Known difference: the first step's rate
is 0 and not 1 / 2,000 of the peak. bfloat16 stands for their float16. A record without a caption
counts as one with an empty caption (``--config.method.view.uncaptioned=replace`` takes another
record). ``loss=sigmoid`` changes the loss and its start (scale 10, bias -10) and nothing else, to
compare losses: the towers stay CLIP's. ``tiny`` and ``siglip_tiny`` are no recipes of theirs: the
same methods at sizes for a laptop.

SigLIP (arXiv 2303.15343) in its own towers: attention pooling instead of a CLS token, tanh-GELU, no
projection of images; texts of 64 tokens seen both ways, filled up with the end, whose last place is
pooled. Shapes, initial values and which parameters decay are big_vision's (models/vit.py,
text_transformer.py, optax.py), which has no config of a training from scratch. Taken instead is
what the report on SigLIP 2 (arXiv 2502.14786) says of its authors' next: batch 32768, cosine, a
warm-up of 20,000 steps, 40 billion pairs. Assumptions, as no text that says so was at hand: lr
1e-3, clipping to norm 1, AdamW (0.9, 0.95), big_vision's decay of 1e-4, which there the rate does
not multiply, so 0.1 here. Known differences: CLIP's tokenizer and its 49,408 ids stand for
sentencepiece's 32,000, which is not shipped; AdamW for big_vision's Adafactor; MetaCLIP's crops for
the whole image squeezed into a square.

Hardware: no size has been run on real chips with this code. The first lines of a run say what the
compiled step needs of each device's memory. A device holds ``method.block`` (1024) rows of logits
at a time, 128 MiB at batch 32768.

Expected figures: the paper's, the goal of a full run and not results of this code. Average of 16
VQA tasks and of its four groups after 2 billion pairs at 224 px (table 12):

           average  general  knowledge  OCR & chart  vision-centric
  1b         52.30     72.3       46.2         36.5            54.2
  2b         53.03     72.2       48.8         36.1            55.0
  3b         53.22     73.6       47.1         36.8            55.4
  5b         52.52     72.7       47.6         34.9            54.8
  7b         52.97     73.0       48.1         35.3            55.4

A network that knows nothing starts near a loss of ln of the batch, 10.40 for 32768; with sigmoid
11.5.
"""

import dataclasses

from webssl_jax.colours import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD
from webssl_jax.config import ConfigError, parse_arg, suggest
from webssl_jax.models.clip_sizes import SIGLIP_SIZES
from webssl_jax.models.text import TextConfig

from .common import apply_preset, base, vit

LOSSES = ("softmax", "sigmoid")
METACLIP_SIZES = ("b32", "b16", "l14", "h14", "g14", "bigg14")


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="300m", loss="", images=0, res=0, preset="")
    siglip = arg.size in SIGLIP_SIZES
    arg.loss = arg.loss or ("sigmoid" if siglip else "softmax")
    if arg.loss not in LOSSES:
        raise ConfigError(f"config argument loss={arg.loss}: {suggest(arg.loss, LOSSES)}")
    config = base()
    config.name = "_".join(["clip", arg.size] + ["sigmoid"] * (arg.loss == "sigmoid"))
    if siglip:
        config.name = "_".join([arg.size] + ["softmax"] * (arg.loss == "softmax"))
    config.global_batch = 32_768
    config.total_images = 12_800_000_000 if arg.size in METACLIP_SIZES else 2_000_000_000
    config.model = vit(arg.size, dtype="bfloat16", remat="full")
    config.method = clip(arg.loss)
    config.optim.lr = 5e-4 if arg.size in ("b32", "b16") else 4e-4
    config.optim.lr_batch = 32_768
    config.optim.lr_scaling = "none"
    config.optim.warmup_images = 2_000 * 32_768
    config.optim.weight_decay = 0.2
    config.optim.b2 = 0.98
    config.optim.eps = 1e-6
    if siglip:
        config.total_images = 40_000_000_000
        config.optim.lr = 1e-3
        config.optim.warmup_images = 20_000 * 32_768
        config.optim.weight_decay = 0.1
        config.optim.b2 = 0.95
        config.optim.eps = 1e-8
        config.optim.clip = "global"
        config.method.mean, config.method.std = SIGLIP_MEAN, SIGLIP_STD
    if arg.size in ("tiny", "siglip_tiny"):
        config.global_batch = 128
        config.total_images = 240_000
        config.optim.lr = 1e-3
        config.optim.lr_batch = 128
        config.optim.warmup_images = 24_000
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.method.view.image_size = 48
        config.data.train = "corpus:train"
    if arg.res:
        config.method.view.image_size = arg.res
    if arg.images:
        config.total_images = arg.images
    apply_preset(config, arg.preset)
    return config


def clip(contrast: str) -> dict:
    """The method's keys; see CLIP in webssl_jax/methods/clip/method.py."""
    return {
        "name": "clip",
        "contrast": contrast,
        "scale": None,  # at the start; None: the loss's own, 1 / 0.07 or 10
        "bias": None,  # at the start; None: the loss's own, none or -10
        "scale_max": 100.0,
        "block": 1024,  # rows of logits that a device holds at a time; 0 = all of its own
        "view": {
            "image_size": 224,
            "scale_min": 0.9,
            "scale_max": 1.0,
            "uncaptioned": "empty",  # the text of a record without; or replace the record
        },
        # None stands for what belongs to the image tower's size
        "text": {"size": None} | {field.name: None for field in dataclasses.fields(TextConfig)},
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
