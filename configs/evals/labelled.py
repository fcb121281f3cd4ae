"""k-NN and logistic regression on your own labelled records, ImageNet's for example, in colour and
on greyscale copies: what is known besides colours.

    webssl evaluate --model PATH --evals labelled:train=TRAIN,test=TEST

Arguments: train, test = ArrayRecord shards, as config.data.train names them.
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, train="train-*.arrayrecord", test="test-*.arrayrecord")
    return ConfigDict(rows(arg.train, arg.test))


def rows(train, test):
    """{row: its keys} of k-NN and a linear probe, in colour and on greyscale copies."""
    data = {"train": train, "test": test}
    made = {"knn": {"kind": "knn", **data}, "probe": {"kind": "logistic", **data}}
    return made | {f"{name}_grey": row | {"greyscale": True} for name, row in made.items()}
