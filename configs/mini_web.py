"""A small Web-MAE on the mini-web corpus (tools/mini_web.py), about an hour on two CPU cores.

    bash tools/quickstart.sh --corpus mini-web

Argument: corpus = the folder that tools/mini_web.py made (runs/mini-web). The recipe is that of
quickstart.py for longer.

Measured so far, one seed, two fifths of this length (--config.total_images=400000: 1,562 steps, 24
minutes of CPU time on a busy machine), top-1 of 16 topics on 1,941 test images none of which has a
look-alike in the training set, standard error 0.011:

                       k-NN   linear probe
  majority class      0.114     0.114
  raw pixels          0.283     0.243
  colour histogram    0.348     0.335
  step 0              0.303     0.282
  step 400            0.334     0.325
  step 800            0.351     0.343
  step 1562           0.357     0.370

On the probe that is 0.035 (paired standard error 0.013) above colour and 0.088 (0.011) above step
0; its neighbours are not clearly better than those of colour yet (+0.009, 0.013). The full length
and three seeds have not been run.
"""

import quickstart

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, corpus="runs/mini-web")
    config = quickstart.get_config()
    config.name = "mini_web"
    config.total_images = 1_000_000
    config.data.train = f"{arg.corpus}/train-*.arrayrecord"
    config.data.threads = 4
    config.checkpoint.every_steps = 400
    config.log.every_steps = 10
    config.eval.train = f"{arg.corpus}/probe-train-*.arrayrecord"
    config.eval.test = f"{arg.corpus}/probe-test-*.arrayrecord"
    config.eval.every_steps = 400
    return config
