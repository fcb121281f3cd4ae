"""The paper's finding about data in small: does a network that was trained on the images with the
most text read better than one trained on as many others?

    webssl mini_web --output runs/mini-web
    webssl reading --output runs/reading
    webssl curate text-rich --input 'runs/mini-web/train-*' --by detector --output runs/text-rich
    webssl curate select --scores runs/text-rich/detector/scores --by 'lines * 0' \\
        --top-share 0.013 --output runs/text-rich/random/heavy
    webssl study text_rich --workdir runs/study-text-rich

Arguments: corpus, reading, chosen = those folders; way = detector, features or smolvlm; methods =
mae, dino or both (mae+dino); parts = heavy, light (with a random/light of its share) or both
(heavy+light); images = that each run sees, zoom, side: as of configs/text_rich.py; seeds.

Each filter's selection beside one of as many images drawn at random: equal images seen, equal
recipes (configs/text_rich.py), three seeds. Of equal scores those with the smaller hash of their
name are kept, so that a score that is always 0 draws at random.
"""

from ml_collections import ConfigDict
from webssl_jax.configs.text_rich import SHARED

from webssl_jax.config import parse_arg

_NAMES = {"mae": "Web-MAE", "dino": "Web-DINO"}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg,
        chosen="runs/text-rich",
        way="detector",
        methods="mae+dino",
        parts="heavy",
        seeds=3,
        **SHARED,
    )
    shared = ",".join(f"{key}={getattr(arg, key)}" for key in SHARED)
    cells, findings = {}, {}
    for method in arg.methods.split("+"):
        for part in arg.parts.split("+"):
            for kind, way in (("chosen", arg.way), ("random", "random")):
                selection = f"{arg.chosen}/{way}/{part}/selection.parquet"
                options = f"{shared},method={method},selection={selection}"
                cells[f"{method}_{part}_{kind}"] = {
                    "config": f"text_rich:{options}",
                    "labels": {"method": _NAMES.get(method, method), "data": f"{part}, {kind}"},
                }
            for row in ("characters_knn", "characters_probe", "words_knn", "words_probe"):
                findings[f"{_NAMES.get(method, method)}, {part}, {row}"] = {
                    "kind": "difference",
                    "a": f"{method}_{part}_chosen",
                    "b": f"{method}_{part}_random",
                    "metric": f"{row}/top1",
                }
    return ConfigDict(
        {
            "title": "Text-rich: do images that hold text teach to read?",
            "cells": cells,
            "overrides": {"pictures": {"kinds": "none"}, "log": {"trackers": "none"}},
            "seeds": arg.seeds,
            "findings": findings,
        }
    )
