"""The paper's question in small, on two CPU cores: does a vision model without language get better
with size and with images, do images that hold text teach it to read, does it come to agree with a
language model, and where does CLIP stand?

    webssl mini_web --output runs/mini-web
    webssl reading --train 20 --output runs/reading
    webssl scenes --output runs/scenes
    webssl curate text-rich --input 'runs/mini-web/train-*' --by detector --output runs/text-rich
    webssl curate select --scores runs/text-rich/detector/scores --by 'lines * 0' \\
        --top-share 0.013 --output runs/text-rich/random/heavy
    webssl curate select --scores runs/text-rich/detector/scores --by 'lines * 0' \\
        --top-share 0.503 --output runs/text-rich/random/light
    webssl reference --output runs/dinov2-s
    webssl study mini:dinov2=runs/dinov2-s --workdir runs/study-mini --jobs 2

Arguments: corpus, reading, scenes, chosen = the folders of the commands above; way = of the filter
(detector, features, smolvlm); dinov2 = the real DINOv2-S, a level in every figure ("": without);
images = that a run of one length sees; seeds = of the cells that ends and comparisons are made of.

Web-MAE at four sizes and equal images, and at one size with a quarter and four times of them;
Web-DINO and CLIP at that size and those images; Web-MAE on the images with the most text (heavy,
light) and on as many drawn at random, for four times the images, as shorter runs do not learn to
read. All see 64 pixels in patches of 8, in the recipes of configs/mini_web.py, whose Web-DINO sees
the drawings of the corpus alone; those of Web-DINO and CLIP were chosen at 32 pixels.

Every cell is judged by the same rows: topics of the corpus, on grey too; characters and words in
unseen fonts; masks of composed scenes, by k-NN; agreement of mean patches, as masked autoencoding
trains no CLS token, with SmolLM2-135M. CLIP besides by retrieval. Answers to questions about images
are no part: a row of that kind judges a language model that was trained to see through the encoder,
two more trainings for each cell (`webssl easy_vqa`; stage 1 alone takes six CPU minutes).

It takes about nine CPU hours of one core of an AMD EPYC: 5.8 of training (--dry-run, by the RATES
below), the others of evaluations, two minutes (mae_l: seven) before and after each training, and of
compilation. The first seed of all cells is done after some three and a half. DINOv2-S comes last,
a quarter of an hour by its size. Rates and schedules are those of the recipes at every size; none
was chosen for these.
"""

from ml_collections import ConfigDict
from webssl_jax.configs.evals import labelled, mini_web, reading
from webssl_jax.configs.studies import mini_web as mini_web_study
from webssl_jax.configs.studies import text_rich

from webssl_jax.config import parse_arg

SIDE, PATCH = 64, 8  # pixels
# width, depth, heads: 0.3, 1.2, 3.6 and 12 million parameters
SIZES = {"xs": (64, 6, 2), "s": (128, 6, 4), "m": (192, 8, 6), "l": (288, 12, 6)}
NAMES = {"mae": "Web-MAE", "dino": "Web-DINO", "clip": "CLIP"}
# Images a second of CPU time on one core of an AMD EPYC; of xs and m by their size.
RATES = {"mae_xs": 400, "mae_s": 228, "mae_m": 110, "mae_l": 52, "dino_s": 33, "clip_s": 88}
CATEGORIES = {
    "topics": ["knn/top1", "probe/top1"],
    "topics on grey": ["knn_grey/top1", "probe_grey/top1"],
    "reading": ["characters_probe/top1", "words_probe/top1"],
    "segmentation": ["segmentation/miou"],
    "alignment": ["alignment/mutual_knn"],
    "retrieval": ["retrieval/image_to_text_r10", "retrieval/text_to_image_r10"],
}
# What findings are asked of: rows that all cells share.
METRICS = [metric for name, own in CATEGORIES.items() if name != "retrieval" for metric in own]
PUBLISHED = (
    "Web-SSL, average of 16 VQA benchmarks from 1 to 7 billion parameters: Web-DINO rises by 5.63 "
    "points of 100 with ten times as many, CLIP by 0.45"
)
# The soonest answers first: size, images, methods, data.
ORDER = ["mae_xs", "mae_s", "mae_s_quarter", "clip_s", "mae_m", "mae_l", "mae_s_four_times"]
ORDER += ["dino_s", "mae_heavy_*", "mae_light_*"]


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg,
        corpus="runs/mini-web",
        reading="runs/reading",
        scenes="runs/scenes",
        chosen="runs/text-rich",
        way="detector",
        dinov2="",
        images=51_200,
        seeds=3,
    )
    cells = {f"mae_{size}": _cell(arg, "mae", size, arg.images) for size in SIZES}
    cells["mae_s_quarter"] = _cell(arg, "mae", "s", arg.images // 4)
    cells["mae_s_four_times"] = _cell(arg, "mae", "s", 4 * arg.images)
    cells |= {f"{method}_s": _cell(arg, method, "s", arg.images) for method in ("dino", "clip")}
    cells["mae_m"]["seeds"] = 1
    filtered = text_rich.get_config(
        f"corpus={arg.corpus},reading={arg.reading},chosen={arg.chosen},way={arg.way},"
        f"methods=mae,parts=heavy+light,images={4 * arg.images},side={SIDE}"
    )
    for name, cell in filtered.cells.to_dict().items():
        seeds = 1 if "light" in name else arg.seeds
        cells[name] = cell | {"seeds": seeds, "images_per_s": RATES["mae_s"]}
    evals = _rows(arg)
    study = {
        "title": "Mini: does vision without language scale, on 29,000 images?",
        "cells": cells,
        "overrides": {"pictures": {"kinds": "pca"}, "log": {"trackers": "none"}, "evals": evals},
        "seeds": arg.seeds,
        "order": ORDER,
        "categories": CATEGORIES,
        "findings": _findings(),
    }
    study["references"] = mini_web_study.references(arg.dinov2)
    return ConfigDict(study)


def _cell(arg, method, size, images):
    width, depth, heads = SIZES[size]
    view = {"image_size": SIDE}
    if method == "dino":
        view = {"global_size": SIDE, "local_size": SIDE // 2}
    cell = {
        "config": f"mini_web:corpus={arg.corpus},method={method}",
        "overrides": {
            "total_images": images,
            "optim": {"warmup_percent": 10.0},
            "model": {"width": width, "depth": depth, "heads": heads, "patch_size": PATCH},
            "method": {"view": view},
        },
        "labels": {"method": NAMES[method]},
        "images_per_s": RATES[f"{method}_{size}"],
    }
    if method == "clip":
        test = mini_web.shards(arg.corpus, "test")[1]
        cell["overrides"]["evals"] = {"retrieval": {"kind": "retrieval", "pairs": test}}
    return cell


def _rows(arg):
    """{row: its keys} of all cells."""
    train, test = mini_web.shards(arg.corpus, "test")
    rows = labelled.rows(train, test) | reading.rows(arg.reading)
    rows["segmentation"] = {
        "kind": "knn_segmentation",
        "train": f"{arg.scenes}/many/train-*",
        "test": f"{arg.scenes}/many/test-*",
        "classes": f"{arg.scenes}/many.txt",
        "size": 84,
    }
    rows["alignment"] = {
        "kind": "alignment",
        "pairs": test,
        "language": "smollm2",
        "feature": "patches",
        "permutations": 199,
    }
    return rows


def _findings():
    """{name: finding}, in the order of the page."""
    sizes, lengths = [f"mae_{size}" for size in SIZES], ["mae_s", "mae_s_*"]
    found = {}
    for x, cells in (("parameters", sizes), ("images", lengths)):
        for metric in METRICS:
            asked = {"x": x, "metric": metric, "cells": cells}
            if x == "parameters":
                asked["published"] = PUBLISHED
            found[f"Web-MAE, ten times the {x}, {metric}"] = {"kind": "slope", **asked}
        for metric in METRICS:
            asked = {"x": x, "metric": metric, "cells": cells}
            found[f"Web-MAE, last step of {x}, {metric}"] = {"kind": "gain", **asked}
    for method in ("mae", "dino"):
        for metric in METRICS:
            pair = {"a": f"{method}_s", "b": "clip_s", "metric": metric}
            found[f"{NAMES[method]} above CLIP, {metric}"] = {"kind": "difference", **pair}
    for part in ("heavy", "light"):
        for metric in METRICS:
            pair = {"a": f"mae_{part}_chosen", "b": f"mae_{part}_random", "metric": metric}
            name = f"Web-MAE, {part} text above random, {metric}"
            found[name] = {"kind": "difference", **pair}
    for metric in METRICS:
        found[f"best cell above trivial features, {metric}"] = {
            "kind": "above",
            "cells": "*",
            "metric": metric,
            "baseline": "best",
        }
    return found
