"""k-NN and logistic regression on the embedded corpus: a first look at any model, in a minute.

webssl evaluate --model PATH --evals corpus
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """See the module's docstring."""
    data = {"train": "corpus:train", "test": "corpus:test"}
    return ConfigDict({"knn": {"kind": "knn", **data}, "probe": {"kind": "logistic", **data}})
