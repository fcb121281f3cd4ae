"""k-NN and logistic regression on your own labelled records, ImageNet's for example.

    webssl evaluate --model PATH --evals labelled:train=TRAIN,test=TEST

Arguments: train, test = ArrayRecord shards, as config.data.train names them.
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, train="train-*.arrayrecord", test="test-*.arrayrecord")
    data = {"train": arg.train, "test": arg.test}
    return ConfigDict({"knn": {"kind": "knn", **data}, "probe": {"kind": "logistic", **data}})
