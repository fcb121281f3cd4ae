"""The yardsticks of Web-SSL's third table: ImageNet classification as the papers of DINOv2, MAE and
CAPI measure it, and the segmentation and depth of dense.py (docs/evaluation.md, "The classic
yardsticks").

    webssl evaluate --model PATH --evals web_ssl_classic:train=TRAIN,test=TEST,ade20k=DIR,nyu=DIR

Arguments: train, test = labelled ArrayRecord shards of ImageNet-1k, as config.data.train names
them, the test set being its 50,000 validation images; real = real.json of ReaL's labels; v2,
sketch, a, r = labelled shards of the other test sets; c = SHARDS/{corruption}-{level}-* of
ImageNet-C. What is not given is left out. rows = all, or the names of some, with + between them:
knn, logistic, linear, attentive, mae_linear. ade20k, voc2012, cityscapes, nyu, kitti, sun = folders
of shards, whose rows come with them, as in dense.py.

The images are as the model's own resolution wants them: Web-SSL is judged at the resolution that
it was trained at. ``linear`` is the paper's "IN1k lin."; ``mae_linear`` is MAE's own, for networks
of that kind.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg, suggest

from . import dense

_ROWS = {
    "knn": {"kind": "knn"},
    "logistic": {"kind": "logistic", "protocol": "dinov2"},
    "linear": {"kind": "linear"},
    "attentive": {"kind": "attentive"},
    "mae_linear": {"kind": "mae_linear"},
}
_TRAINED = ("linear", "attentive", "mae_linear")  # those that know other test sets
_OTHERS = ("real", "v2", "sketch", "a", "r", "c")


def get_config(arg=None):
    """See the module's docstring."""
    others = dict.fromkeys((*_OTHERS, *dense.MASKS, *dense.DEPTHS), "")
    arg = parse_arg(
        arg, train="train-*.arrayrecord", test="val-*.arrayrecord", rows="all", **others
    )
    names = list(_ROWS) if arg.rows == "all" else arg.rows.split("+")
    rows = {}
    for name in names:
        if name not in _ROWS:
            raise ConfigError(f"config argument rows={arg.rows}: {suggest(name, _ROWS)}")
        rows[name] = {**_ROWS[name], "train": arg.train, "test": arg.test}
        if name in _TRAINED:
            rows[name] |= {other: arg[other] for other in _OTHERS}
    return ConfigDict(rows | dense.rows(**{x: arg[x] for x in (*dense.MASKS, *dense.DEPTHS)}))
