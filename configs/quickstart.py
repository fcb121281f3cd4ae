"""The quick start: a small Web-MAE on the embedded corpus, a few minutes on two CPU cores.

    bash tools/quickstart.sh

Arguments: train, test = labelled ArrayRecord shards; by default the embedded corpus. The recipe is
Web-MAE's with a network and images small enough for a laptop.
"""

from common import base, vit
from web_mae import mae

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, train="corpus:train", test="corpus:test")
    config = base()
    config.name = "quickstart"
    config.global_batch = 256
    config.total_images = 240_000
    config.model = vit("tiny", remat="none")
    config.method = mae(image_size=48, decoder=(96, 1, 4))
    config.data.train = arg.train
    config.optim.lr = 2e-3
    config.optim.lr_batch = 256
    del config.optim.warmup_images
    config.optim.warmup_percent = 10.0
    config.checkpoint.every_steps = 100
    config.log.every_steps = 5
    config.eval.train = arg.train
    config.eval.test = arg.test
    return config
