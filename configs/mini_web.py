"""A small Web-MAE on the mini-web corpus (tools/mini_web.py), on two CPU cores.

    bash tools/quickstart.sh --corpus mini-web
"""

from common import base, vit
from web_mae import mae

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """Argument: corpus = the folder that tools/mini_web.py made."""
    arg = parse_arg(arg, corpus="runs/mini-web")
    config = base()
    config.name = "mini_web"
    config.global_batch = 256
    config.total_images = 400_000
    config.model = vit("tiny", remat="none")
    config.method = mae(image_size=64, decoder=(96, 1, 4))
    config.data.train = f"{arg.corpus}/train-*.arrayrecord"
    config.data.threads = 4
    config.optim.lr = 2e-3
    config.optim.lr_batch = 256
    del config.optim.warmup_images
    config.optim.warmup_percent = 10.0
    config.checkpoint.every_steps = 400
    config.log.every_steps = 10
    config.eval.train = f"{arg.corpus}/probe-train-*.arrayrecord"
    config.eval.test = f"{arg.corpus}/probe-test-*.arrayrecord"
    config.eval.every_steps = 400
    return config
