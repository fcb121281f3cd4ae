"""The quick start: a small Web-MAE on the embedded corpus, a few minutes on two CPU cores.

    bash tools/quickstart.sh

Arguments: train, test = labelled ArrayRecord shards; by default the embedded corpus. The recipe is
Web-MAE's with a network and images small enough for a laptop.

Expected figures, from that command, top-1 of 18 classes on 1,181 test images, standard error 0.014:

                      k-NN   on grey   linear probe   on grey
  majority class      0.188    0.188       0.188        0.188
  raw pixels          0.218    0.176       0.203        0.207
  colour histogram    0.401    0.333       0.408        0.302
  step 0              0.349    0.289       0.367        0.290
  step 332            0.366    0.298       0.405        0.318

On grey: training and test images without their colours. The network beats its own step 0 by 0.037
on the probe (paired standard error 0.012) and by 0.029 on grey (0.011), not clearly in k-NN, and
raw pixels by 0.202 and 0.112 (0.015). From a colour histogram it does not clearly differ on the
probe, on grey neither (+0.016, 0.013), and is below it in k-NN: most of what tells these classes
apart is colour, and a few minutes of MAE are little. Another order of the same sums gives 0.368,
0.296, 0.401 and 0.308. With 140,000 images (--config.total_images=140000) it had 0.380, 0.311,
0.414 and 0.317. One seed each.
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
