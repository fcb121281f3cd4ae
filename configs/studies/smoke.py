"""A study of two minutes, to see that everything works: two sizes of a tiny Web-MAE on the embedded
corpus, two seeds. Its runs are far too short to show anything.

    webssl study smoke --workdir DIR

Arguments: images = that each run sees; side = of an image, in pixels; seeds; train, test = labelled
shards; max_images = that are judged of each (0: all).
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg, images=640, side=32, seeds=2, train="corpus:train", test="corpus:test", max_images=0
    )
    cells = {
        name: {
            "config": "web_mae:size=tiny",
            "overrides": {"model": {"width": width, "depth": 2, "heads": 2}},
            "labels": {"method": "Web-MAE"},
        }
        for name, width in (("narrow", 32), ("wide", 64))
    }
    overrides = {
        "total_images": arg.images,
        "method": {"view": {"image_size": arg.side}, "decoder": {"width": 32, "heads": 2}},
        "optim": {"warmup_images": arg.images // 10},
        "sharding": {"max_unsharded_fraction": 0.2},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1, "trackers": "none"},
        "pictures": {"kinds": "none"},
        "data": {"train": arg.train},
        "evals": {
            "knn": {
                "kind": "knn",
                "train": arg.train,
                "test": arg.test,
                "max_images": arg.max_images,
            }
        },
    }
    findings = {
        "size": {"kind": "slope", "x": "parameters", "metric": "knn/top1", "cells": "*"},
        "last step": {"kind": "gain", "x": "parameters", "metric": "knn/top1", "cells": "*"},
        "wide or narrow": {"kind": "difference", "a": "wide", "b": "narrow", "metric": "knn/top1"},
        "colour": {
            "kind": "above",
            "cells": "*",
            "metric": "knn/top1",
            "baseline": "colour histogram",
        },
    }
    return ConfigDict(
        {
            "title": "Smoke: does a study run from nothing to its page?",
            "cells": cells,
            "overrides": overrides,
            "seeds": arg.seeds,
            "findings": findings,
        }
    )
