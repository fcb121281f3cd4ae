"""Can it read: 36 characters and 40 words in fonts of which no training image has any
(tools/reading.py), by k-NN and logistic regression.

    webssl evaluate --model PATH --evals reading:folder=reading

Arguments: folder = what tools/reading.py made. Colours say nothing there, so there are no grey
rows.
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg
from webssl_jax.corpus.texts import KINDS


def get_config(arg=None):
    """See the module's docstring."""
    return ConfigDict(rows(parse_arg(arg, folder="reading").folder))


def rows(folder):
    """{row: its keys}"""
    made = {}
    for kind in KINDS:
        data = {part: f"{folder}/{kind}/{part}-*.arrayrecord" for part in ("train", "test")}
        made[f"{kind}_knn"] = {"kind": "knn", **data}
        made[f"{kind}_probe"] = {"kind": "logistic", **data}
    return made
