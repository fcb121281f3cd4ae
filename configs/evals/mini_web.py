"""The topics of the mini-web corpus (tools/mini_web.py), in colour and on greyscale copies.

    webssl evaluate --model PATH --evals mini_web:corpus=runs/mini-web

Arguments: corpus = the folder that tools/mini_web.py made; split = test, or dev, to choose by: the
test images are for the figures of a recipe that is settled. Grey rows say what is known besides
colours: a colour histogram falls to little more than chance there.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg, suggest

from . import labelled

SPLITS = {"test": ("probe-train", "probe-test"), "dev": ("probe-fit", "probe-dev")}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, corpus="runs/mini-web", split="test")
    return ConfigDict(labelled.rows(*shards(arg.corpus, arg.split)))


def shards(corpus: str, split: str) -> tuple[str, str]:
    """The shards that a probe learns from, and those that it is judged by.

    Raises:
      ConfigError: for a split that is none of SPLITS.
    """
    if split not in SPLITS:
        raise ConfigError(f"config argument split={split}: {suggest(split, SPLITS)}")
    train, test = (f"{corpus}/{name}-*.arrayrecord" for name in SPLITS[split])
    return train, test
