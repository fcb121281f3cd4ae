"""The paper's question in small, on two CPU cores: does a vision model without language get better
with size and with images, and where does CLIP stand on the same images?

    python tools/mini_web.py --output runs/mini-web
    webssl study mini:corpus=runs/mini-web --workdir runs/study-mini --jobs 2

Arguments: corpus = the folder that tools/mini_web.py made; images = that a run of one length sees;
seeds = of the smallest and the largest cell of each axis, and of DINO and CLIP (1 elsewhere).

Web-MAE at four sizes and equal images, and at one size with a quarter and four times of them;
Web-DINO and CLIP at that size and those images. Recipes are those of configs/mini_web.py, whose
rows (k-NN and a linear probe of 16 topics, in colour and grey) judge every cell at its end.
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg

# width, depth, heads: 0.2, 1.2, 3.6 and 12 million parameters
SIZES = {"xs": (64, 4, 2), "s": (128, 6, 4), "m": (192, 8, 6), "l": (288, 12, 6)}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, corpus="runs/mini-web", images=64_000, seeds=3)
    cells = {}
    for size in SIZES:
        cells[f"mae_{size}"] = _cell(arg, "mae", size, arg.images, size in ("xs", "l"))
    for name, factor in (("quarter", 0.25), ("four_times", 4)):
        cells[f"mae_s_{name}"] = _cell(arg, "mae", "s", int(arg.images * factor), True)
    for method in ("dino", "clip"):
        cells[f"{method}_s"] = _cell(arg, method, "s", arg.images, True)
    findings = {}
    for metric in ("knn/top1", "probe/top1"):
        row = metric.partition("/")[0]
        sizes, lengths = [f"mae_{size}" for size in SIZES], ["mae_s", "mae_s_*"]
        for name, x, over in (("size", "parameters", sizes), ("images", "images", lengths)):
            asked = {"x": x, "metric": metric, "cells": over}
            findings[f"MAE and {name}, {row}"] = {"kind": "slope", **asked}
            findings[f"MAE and {name}, last step, {row}"] = {"kind": "gain", **asked}
        for method in ("dino", "mae"):
            pair = {"a": f"{method}_s", "b": "clip_s", "metric": metric}
            findings[f"{method.upper()} and CLIP, {row}"] = {"kind": "difference", **pair}
        level = {"cells": "*", "metric": metric, "baseline": "colour histogram"}
        findings[f"colour, {row}"] = {"kind": "above", **level}
    return ConfigDict(
        {
            "title": "Mini: does vision without language scale, on 29,000 images?",
            "cells": cells,
            "overrides": {"pictures": {"kinds": "none"}, "log": {"trackers": "none"}},
            "seeds": 1,
            "findings": findings,
        }
    )


def _cell(arg, method, size, images, at_an_end):
    width, depth, heads = SIZES[size]
    return {
        "config": f"mini_web:corpus={arg.corpus},method={method}",
        "overrides": {
            "total_images": images,
            "optim": {"warmup_percent": 10.0},
            "model": {"width": width, "depth": depth, "heads": heads},
        },
        "seeds": arg.seeds if at_an_end else 1,
        "labels": {"method": {"mae": "Web-MAE", "dino": "Web-DINO", "clip": "CLIP"}[method]},
    }
