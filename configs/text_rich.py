"""A small Web-MAE or Web-DINO on some images of the mini-web corpus, judged by reading: does it
help to train on images that hold text?

    python -m webssl_jax.train --config configs/text_rich.py:selection=FILE --workdir RUN

Arguments: corpus = the folder that tools/mini_web.py made; selection = of its training images, as
curate writes them (text-rich/detector/heavy/selection.parquet); reading = the folder that
tools/reading.py made; method = mae or dino; images = that the run sees, however many are selected.

Recipes are those of configs/mini_web.py, Web-MAE's the short one of docs/mini_web.md: images of 32
pixels, patches of 4. configs/studies/text_rich.py is the comparison. No figures yet:
docs/curation.md says what is missing.
"""

from webssl_jax.config import parse_arg

from . import mini_web
from .evals import reading


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg,
        corpus="runs/mini-web",
        selection="runs/text-rich/detector/heavy/selection.parquet",
        reading="runs/reading",
        method="mae",
        images=48_000,
    )
    config = mini_web.get_config(f"corpus={arg.corpus},method={arg.method}")
    config.name = f"text_rich_{arg.method}"
    config.total_images = arg.images
    if arg.method == "mae":
        config.model.patch_size = 4
        config.method.view.image_size = mini_web.SIDE
        config.method.norm_pix_loss = False
        config.optim.lr = 2e-3
    elif arg.method == "dino":
        config.optim.warmup_images = arg.images // 10  # Web-MAE's is 10 % of whatever it sees
    config.data.train = ""
    config.mixture = {
        "chosen": {"train": f"{arg.corpus}/train-*.arrayrecord", "selection": arg.selection}
    }
    config.evals = reading.rows(arg.reading)
    return config
