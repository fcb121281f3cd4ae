"""Retrieval on captioned records, and classes by their names: for models with a text tower.

    webssl evaluate --model PATH --evals captioned:pairs=PAIRS,test=LABELLED

Arguments: pairs = captioned shards; test = labelled shards; templates = short, imagenet or a file.
"""

from ml_collections import ConfigDict

from webssl_jax.config import parse_arg


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, pairs="test-*.arrayrecord", test="test-*.arrayrecord", templates="short")
    rows = {"zero_shot": {"kind": "zero_shot", "test": arg.test, "templates": arg.templates}}
    rows["retrieval"] = {"kind": "retrieval", "pairs": arg.pairs}
    return ConfigDict(rows)
