"""LiT: a text tower trained onto a frozen image encoder (Zhai et al., arXiv 2111.07991), so that an
encoder that never saw a text has zero-shot classes and finds captions.

    python -m webssl_jax.train --config configs/lit.py:encoder=RUN_OR_WEIGHTS --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'
    webssl evaluate --model RUN --evals captioned:pairs=PAIRS,test=LABELLED

Arguments, with commas between:

  encoder  a run (of any method), or a weight file or folder of any known family; needed
  text     the text tower, by a name of clip.py: b16 (512 wide, 12 blocks; when left out), l14, h14,
           bigg14, tiny, ...
  loss     softmax (CLIP) or sigmoid (SigLIP)
  images   pairs seen, instead of the recipe's length

It is CLIP (clip.py) with two differences: ``init_from`` names the encoder, and ``optim.frozen`` its
parameters, which then are never changed and have no moments. Its architecture, image size, mean and
std are read from there when the config is made, and stand in the run's config. The projection of
images and the text tower are trained; with a projection of images this is the paper's "Lu" with a
linear head. Of a run that is evaluated by its teacher (Web-DINO), the teacher's encoder is taken.

Sources: what is trained and what not, the paper's section 3. Everything else (batch 32,768, AdamW,
lr 4e-4, decay 0.2, crops of 90% to 100%, one caption at each visit) is clip.py's, so that the two
can be compared; LiT's own runs had Adafactor at 1e-3 and batches of 16,384 to 32,768. 900 million
pairs, as the paper's shortest on public data have about that many.

``text=tiny`` is for laptops: batch 128, 240,000 pairs.

Expected figures: none, as no size has been run here; docs/language.md has what a small one reached.
"""

import dataclasses

from webssl_jax import methods, runs, workdirs
from webssl_jax.config import ConfigError, parse_arg
from webssl_jax.weights import load as weight_files
from webssl_jax.weights.networks import Networks

from . import clip


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, encoder="", text="b16", loss="softmax", images=0)
    config = clip.get_config(f"size={arg.text},loss={arg.loss}")
    config.name = f"lit_{arg.text}"
    config.optim.frozen = (r"^encoder/",)
    if arg.text != "tiny":
        config.total_images = 900_000_000
        config.optim.lr = 4e-4
    config.total_images = arg.images or config.total_images
    config.method.text.size = arg.text
    # nothing goes back through the encoder, so only the text tower may need its blocks again
    config.method.text.remat = config.model.remat
    config.init_from = arg.encoder or "lit.py:encoder=RUN_OR_WEIGHTS"  # which is no file
    if arg.encoder:
        _take(config, _networks(arg.encoder))
    return config


def _networks(path: str) -> Networks:
    if workdirs.is_run(path):
        return Networks.of(methods.create(runs.read_config(path)))
    return weight_files.open_(path).networks


def _take(config, networks: Networks) -> None:
    """The encoder's own fields, and how its images are made."""
    encoder, view = networks.encoder, networks.preprocess
    if encoder is None:
        raise ConfigError(f"config argument encoder={config.init_from}: holds no image encoder")
    sides = view.shape
    if sides[0] != sides[1]:
        raise ConfigError(
            f"config argument encoder={config.init_from}: its images have {sides[0]} x {sides[1]} "
            "pixels, and crops are squares"
        )
    # a frozen network is used as it is evaluated: nothing is masked or dropped
    fields = dataclasses.asdict(encoder) | {"mask_token": False, "drop_path": 0.0}
    fields |= {"size": None, "remat": "none", "dtype": config.model.dtype}
    config.model.update(fields)
    config.method.view.image_size = sides[0]
    config.method.mean, config.method.std = view.mean, view.std
