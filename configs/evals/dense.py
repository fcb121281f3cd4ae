"""Segmentation and depth as DINOv2 judges encoders: ADE20K, VOC2012, Cityscapes; NYUd, KITTI, SUN.

    webssl evaluate --model PATH --evals dense:ade20k=DIR,nyu=DIR

Arguments: a folder for each data set that there is; its rows come with it. It holds folders of
shards, ``train`` and ``val``, of depth ``train`` and ``test``, as ``make_records layout`` makes
them (docs/evaluation.md has the commands). sun: only ``test``; its heads are trained on nyu.

Published with these protocols, of ViT-S/14 and ViT-g/14 (DINOv2, arXiv 2304.07193), lin. / +ms or
lin. 1 / lin. 4: ADE20K 44.3 / 47.2 and 49.0 / 53.0; Cityscapes 66.6 / 77.1 and 71.3 / 81.0; VOC2012
81.1 / 82.6 and 83.0 / 86.2; NYUd 0.449 / 0.417 and 0.344 / 0.298 m; KITTI 3.10 / 2.86 and 2.62 /
2.35 m; SUN 0.477 / 0.431 and 0.402 / 0.362 m.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg

MASKS = ("ade20k", "voc2012", "cityscapes")
DEPTHS = ("nyu", "kitti", "sun")


def get_config(arg=None):
    """See the module's docstring."""
    folders = parse_arg(arg, **{name: "" for name in (*MASKS, *DEPTHS)})
    made = rows(**folders)
    if not made:
        raise ConfigError(f"name a folder of shards: {'=DIR, '.join((*MASKS, *DEPTHS))}=DIR")
    return ConfigDict(made)


def rows(**folders):
    """{row: its keys} of the data sets whose folder is not empty."""
    made = {}
    for name in MASKS:
        if folders.get(name):
            where = folders[name].rstrip("/")
            data = {"train": f"{where}/train", "test": f"{where}/val", "classes": name}
            made[f"{name}_lin"] = {"kind": "segmentation", **data}
            made[f"{name}_ms"] = {"kind": "segmentation", **data, "multiscale": True}
            made[f"{name}_knn"] = {"kind": "knn_segmentation", **data}
    if folders.get("sun") and not folders.get("nyu"):
        raise ConfigError("sun: its heads are trained on NYUd; give nyu=DIR too")
    for name in DEPTHS:
        if folders.get(name):
            of_train = "nyu" if name == "sun" else name
            data = {
                "train": f"{folders[of_train].rstrip('/')}/train",
                "test": f"{folders[name].rstrip('/')}/test",
                "layout": of_train,
                "test_layout": name,
            }
            for layers in (1, 4):
                made[f"{name}_lin{layers}"] = {"kind": "depth", **data, "layers": layers}
    return made
