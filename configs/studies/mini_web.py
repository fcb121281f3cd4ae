"""The runs of docs/mini_web.md, anew: three methods of learning without labels, short and long, and
a network with labels, all beside trivial features.

    webssl mini_web --output runs/mini-web
    webssl reference --output runs/dinov2-s
    webssl study mini_web:dinov2=runs/dinov2-s --workdir runs/study-mini-web

Arguments: corpus = the folder of the first command (runs/mini-web); dinov2 = that of the second,
the ceiling, and the teacher of a distilled network ("": without both); seeds = 3; parts = short (an
hour of one core), long (some five) or both (short+long).

Recipes are those of configs/mini_web.py; the short runs differ in their length, Web-MAE's in its
images besides. The distilled network is configs/distill.py:size=tiny on 48 pixels and all images of
the corpus; nothing of it was tuned.
"""

from ml_collections import ConfigDict
from webssl_jax.configs.evals import labelled
from webssl_jax.configs.evals import mini_web as topics

from webssl_jax.config import ConfigError, parse_arg, suggest

# (label, method, what differs from configs/mini_web.py)
CELLS = {
    "short": {
        "dino_short": (
            "Web-DINO",
            "dino",
            {"total_images": 48_000, "optim": {"warmup_images": 4_800}},
        ),
        "clip_short": ("CLIP", "clip", {"total_images": 64_000, "optim": {"warmup_images": 6_400}}),
        "mae_short": (
            "Web-MAE",
            "mae",
            {
                "total_images": 64_000,
                "model": {"patch_size": 4},
                "method": {"norm_pix_loss": False, "view": {"image_size": 32}},
                "optim": {"lr": 2e-3},
            },
        ),
        "supervised": ("supervised", "supervised", {}),
    },
    "long": {
        "dino": ("Web-DINO", "dino", {}),
        "clip": ("CLIP", "clip", {}),
        "mae": ("Web-MAE", "mae", {}),
    },
}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, corpus="runs/mini-web", dinov2="", seeds=3, parts="short+long")
    cells = {}
    for part in arg.parts.split("+"):
        if part not in CELLS:
            raise ConfigError(f"config argument parts={part}: {suggest(part, CELLS)}")
        for name, (label, method, overrides) in CELLS[part].items():
            cells[name] = {
                "config": f"mini_web:corpus={arg.corpus},method={method}",
                "overrides": overrides,
                "labels": {"method": label},
            }
        if part == "long" and arg.dinov2:
            cells["distill"] = _distilled(arg)
    study = {
        "title": "Mini-web: what small networks learn in minutes",
        "cells": cells,
        "overrides": {"log": {"trackers": "none"}},
        "seeds": arg.seeds,
        "findings": above({x: f"{x} above colour" for x in cells}, "colour histogram"),
    }
    study["references"] = references(arg.dinov2)
    return ConfigDict(study)


def _distilled(arg):
    return {
        "config": f"distill:size=tiny,teacher={arg.dinov2}",
        "overrides": {
            "total_images": 32_000,
            "optim": {"warmup_images": 3_200},
            "data": {"train": f"{arg.corpus}/train-*.arrayrecord"},
            "evals": labelled.rows(*topics.shards(arg.corpus, "test")),
        },
        "labels": {"method": "distilled from DINOv2-S"},
    }


def above(questions, baseline):
    """{name: finding}: how far above a trivial feature is each cell, {its name: words of the
    question}, in each row of the topics?"""
    return {
        f"{words}, {row}": {
            "kind": "above",
            "cells": cell,
            "metric": f"{row}/top1",
            "baseline": baseline,
        }
        for row in labelled.rows("", "")
        for cell, words in questions.items()
    }


def references(dinov2):
    """{name: reference}: the real DINOv2-S in the folder ``dinov2``, on seven patches a side; none
    for ""."""
    found = {"name": "DINOv2-S/14", "model": dinov2, "eval_size": 98}
    return {"dinov2_s": found} if dinov2 else {}
