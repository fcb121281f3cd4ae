"""The paper's own runs, as cells: what they would take, and what was published of them.

    webssl study paper --workdir DIR --dry-run --slice v5p-512 --price 4.2

Every model that Web-SSL (ICCV 2025) trained and judged by 16 VQA benchmarks, at 224 pixels, with
the recipe of its config; the label ``published`` is its average. The text-filtered cells take their
selection as data (docs/curation.md). The runs at 378 and 518 pixels continue others and are not
here.
"""

from ml_collections import ConfigDict

from webssl_jax.evaluators.vqa.averages import published

_CONFIGS = {"Web-DINO": "web_dino", "DINO": "web_dino", "Web-MAE": "web_mae", "CLIP": "clip"}
_DATA = {"MC-2B": "", "ImageNet-1k": "imagenet"}
_DATA |= {f"MC-2B, text-filtered ({name})": name for name in ("light", "heavy")}
_USUAL = 2_000_000_000  # images


def get_config(arg=None):
    """See the module's docstring."""
    cells = {}
    for row in published():
        size = f"{(row.parameters or 0) // 10**9}b"
        if row.method not in _CONFIGS or row.data not in _DATA or row.resolution != 224:
            continue
        if size == "0b":
            continue
        name = f"{row.method.lower().replace('-', '_')}_{size}"
        options = {"size": size, "data": _DATA[row.data]}
        if row.images not in (None, _USUAL):
            options["images"] = str(row.images)
            name += f"_{row.images // 10**9}b_images"
        if options["data"]:
            name += f"_{options['data']}"
        given = ",".join(f"{key}={value}" for key, value in options.items() if value)
        labels = {"method": row.method, "data": row.data, "published": f"{row.average:.2f}"}
        cells[name] = {"config": f"{_CONFIGS[row.method]}:{given}", "labels": labels}
    return ConfigDict({"title": "The runs of Web-SSL (ICCV 2025)", "cells": cells})
