"""The quick start: a small Web-MAE on the embedded corpus, a few minutes on two CPU cores.

    bash tools/quickstart.sh

Arguments: train, test = labelled ArrayRecord shards; by default the embedded corpus. The recipe is
Web-MAE's with a network and images small enough for a laptop.

Expected figures of 140,000 images (--config.total_images=140000; that command itself takes fewer),
top-1 of 18 classes on 1,181 test images, standard error 0.014:

                      k-NN   on grey   linear probe   on grey
  majority class      0.188    0.188       0.188        0.188
  raw pixels          0.218    0.176       0.203        0.207
  colour histogram    0.401    0.333       0.408        0.302
  step 0              0.349    0.289       0.367        0.290
  step 546            0.380    0.311       0.414        0.317

On grey: training and test images without their colours. The network beats its own step 0 by 0.047
on the probe (paired standard error 0.012) and by 0.031 in k-NN (0.013), and raw pixels by 0.211 and
0.163 (0.015). From a colour histogram it does not clearly differ, on grey neither (+0.014, standard
error 0.013, on the probe): most of what tells these classes apart is colour, and a few minutes of
MAE are little. One seed; at 48 pixels and 240,000 images the margin on the probe was 0.014 (0.013).
"""

from webssl_jax.config import parse_arg

from .common import base, vit
from .web_mae import mae


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, train="corpus:train", test="corpus:test")
    config = base()
    config.name = "quickstart"
    config.global_batch = 256
    config.total_images = 85_000
    config.model = vit("tiny", remat="none")
    config.method = mae(image_size=64, decoder=(96, 1, 4))
    config.data.train = arg.train
    config.optim.lr = 2e-3
    config.optim.lr_batch = 256
    del config.optim.warmup_images
    config.optim.warmup_percent = 10.0
    config.checkpoint.every_steps = 100
    config.log.every_steps = 5
    labelled = {"train": arg.train, "test": arg.test}
    rows = {"knn": {"kind": "knn", **labelled}, "probe": {"kind": "logistic", **labelled}}
    grey = {f"{name}_grey": row | {"greyscale": True} for name, row in rows.items()}
    config.evals = rows | grey
    config.pictures.source = arg.test
    return config
