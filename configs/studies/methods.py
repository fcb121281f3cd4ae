"""Every method in small, for equal CPU time: what does some time of one core teach the same small
network?

    python tools/mini_web.py --output runs/mini-web
    webssl study methods:corpus=runs/mini-web --workdir runs/study-methods --jobs 2

Arguments: corpus = the folder that tools/mini_web.py made; minutes = CPU time of each training;
seeds; methods = some of them with + between (mae+dino), or all. Distillation is not among them: its
teacher would take nearly all of the time.

All have the same encoder of 0.5 million parameters, images of 32 pixels, and batches of 64. They
train on the drawings of the corpus, where the topics of its rows are from; the supervised control
on those that have a topic. Lengths follow from RATES, so that each takes the same CPU time: that of
steps and loader; compilation and evaluations come on top.

Recipes of mae, dino and clip, which were chosen by measurement, and of supervised are those of
configs/mini_web.py; dinov3 and simdino take dino's crops, rate and quick teacher. The others are
their tiny twins at a rate of 2e-3, and nothing of them was chosen: a difference may be one of
recipes.
"""

from ml_collections import ConfigDict
from webssl_jax.configs.evals import labelled
from webssl_jax.configs.evals import mini_web as topics
from webssl_jax.configs.studies import mini_web as mini_web_study

from webssl_jax.config import ConfigError, parse_arg, suggest
from webssl_jax.configs import mini_web

# Images a second of CPU time on one core of an AMD EPYC, as they are trained here: 24 steps with
# their loader, beside other work.
RATES = {
    "clip": 161,
    "dino": 64,
    "dinov3": 57,
    "ijepa": 159,
    "lejepa": 73,
    "mae": 313,
    "mocov3": 74,
    "simdino": 63,
    "supervised": 209,
}
NAMES = {
    "clip": "CLIP",
    "dino": "Web-DINO",
    "dinov3": "DINOv3",
    "ijepa": "I-JEPA",
    "lejepa": "LeJEPA",
    "mae": "Web-MAE",
    "mocov3": "MoCo v3",
    "simdino": "SimDINOv2",
    "supervised": "Supervised",
}
BATCH = 64
ENCODER = {"width": 96, "depth": 4, "heads": 3, "patch_size": 4}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, corpus="runs/mini-web", minutes=2.0, seeds=3, methods="all")
    chosen = list(RATES) if arg.methods == "all" else arg.methods.split("+")
    for name in chosen:
        if name not in RATES:
            raise ConfigError(f"config argument methods={name}: {suggest(name, RATES)}")
    return ConfigDict(
        {
            "title": f"Methods: above the best trivial feature in {arg.minutes:g} minutes?",
            "cells": {name: _cell(name, arg) for name in chosen},
            "overrides": {
                "global_batch": BATCH,
                "model": ENCODER,
                "optim": {"lr_batch": BATCH, "warmup_percent": 10.0},
                "data": {"threads": 4},
                "checkpoint": {"every_steps": 500},
                "log": {"every_steps": 20, "trackers": "none"},
                "pictures": {"kinds": "none"},
                "evals": labelled.rows(*topics.shards(arg.corpus, "test")),
            },
            "seeds": arg.seeds,
            "findings": mini_web_study.above({name: NAMES[name] for name in chosen}, "best"),
        }
    )


def _cell(name, arg):
    config = f"{name}:size=tiny"
    if name in ("mae", "dino", "clip", "supervised"):
        config = f"mini_web:corpus={arg.corpus},method={name}"
    train = f"{arg.corpus}/train-*.arrayrecord"
    chosen = {"train": train, "selection": f"{arg.corpus}/drawings.parquet"}
    data = {"data": {"train": ""}, "mixture": {"drawings": chosen}}
    if name == "supervised":
        data = {}  # its config names what has a label
    images = round(RATES[name] * 60 * arg.minutes / BATCH) * BATCH
    overrides = {"total_images": images, **data, **_recipes()[name]}
    return {"config": config, "overrides": overrides, "labels": {"method": NAMES[name]}}


def _recipes():
    """{cell: keys in which it differs from its config, in groups}."""
    small = {"method": {"view": {"image_size": mini_web.SIDE}}, "optim": {"lr": 2e-3}}
    positions = {"model": {"position": "sincos"}}  # so short a run hardly learns them
    dino = mini_web.get_config("method=dino")
    quick = {key: dino.method[key] for key in ("momentum", "patch_embed_rate", "view")}
    lr = {"optim": {"lr": dino.optim.lr}}
    keys = ("koleo_weight", "dino_head", "ibot_head", "teacher_temperature")
    keys += ("teacher_temperature_start", "teacher_temperature_warmup_images")
    sharp = {key: dino.method[key] for key in keys} | {"final_momentum": dino.method.momentum}
    crops = {"global_size": mini_web.SIDE, "local_size": mini_web.SIDE // 2, "local_count": 2}
    return {
        "clip": {},
        "dino": {},
        "dinov3": {"method": quick | sharp, **lr},
        "ijepa": {**small, "method": {**small["method"], "predictor": {"width": 48}}},
        "lejepa": {"method": {"view": crops}, "optim": {"lr": 2e-3}, **positions},
        "mae": {**small, **positions, "method": {**small["method"], "norm_pix_loss": False}},
        "mocov3": small,
        "simdino": {"method": quick, **lr, **positions},
        "supervised": {},
    }
