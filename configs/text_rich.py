"""A small Web-MAE or Web-DINO on some images of the mini-web corpus, judged by reading: does it
help to train on images that hold text?

    python -m webssl_jax.train --config configs/text_rich.py:selection=FILE --workdir RUN

Arguments: corpus = the folder that tools/mini_web.py made; selection = of its training images, as
curate writes them (text-rich/detector/heavy/selection.parquet); reading = the folder that
tools/reading.py made; method = mae or dino; images = that the run sees, however many are selected;
zoom = how much closer than the recipe's its crops are: of sides so many times smaller, so that
small letters are seen; side = of Web-MAE's images in pixels, 32 or 64.

Recipes are those of configs/mini_web.py; Web-MAE's of 32 pixels is the short one of
docs/mini_web.md, with patches of 4. configs/studies/text_rich.py is the comparison: at 64 pixels
the light filter teaches to read no better than a random draw, at 32 nothing reads
(docs/curation.md has the tables).
"""

from webssl_jax.config import ConfigError, parse_arg

from . import mini_web
from .evals import reading

# What the study of these runs passes on.
SHARED = {
    "corpus": "runs/mini-web",
    "reading": "runs/reading",
    "images": 48_000,
    "zoom": 1.0,
    "side": mini_web.SIDE,
}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg, selection="runs/text-rich/detector/heavy/selection.parquet", method="mae", **SHARED
    )
    sides = (mini_web.SIDE, 64) if arg.method == "mae" else (mini_web.SIDE,)
    if arg.side not in sides:
        raise ConfigError(f"config argument side={arg.side}: {arg.method} has {sides}")
    config = mini_web.get_config(f"corpus={arg.corpus},method={arg.method}")
    config.name = f"text_rich_{arg.method}"
    config.total_images = arg.images
    view = config.method.view
    if arg.method == "mae":
        if arg.side == mini_web.SIDE:
            config.model.patch_size = 4
            view.image_size = arg.side
            config.method.norm_pix_loss = False
            config.optim.lr = 2e-3
        for key in ("scale_min", "scale_max"):
            view[key] /= arg.zoom**2  # a share of the area
    elif arg.method == "dino":
        config.optim.warmup_images = arg.images // 10  # Web-MAE's is 10 % of whatever it sees
        for key in ("global_scale", "local_scale"):
            view[key] = tuple(share / arg.zoom**2 for share in view[key])
    config.data.train = ""
    config.mixture = {
        "chosen": {"train": f"{arg.corpus}/train-*.arrayrecord", "selection": arg.selection}
    }
    config.evals = reading.rows(arg.reading)
    return config
