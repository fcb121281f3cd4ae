"""ImageNet-1k's classes in the order that everybody numbers them in: WordNet numbers, sorted."""

import functools
import pathlib


@functools.cache
def wordnet_numbers() -> tuple[str, ...]:
    """``n01440764`` (class 0), ``n01443537``, ...: 1,000."""
    return tuple(pathlib.Path(__file__).with_name("imagenet_wnids.txt").read_text().split())
