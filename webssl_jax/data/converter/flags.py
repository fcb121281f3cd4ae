"""Values of make_records' flags, checked as they are parsed.

argparse turns a ValueError into its own line, which names the type: "invalid positive whole number
value: '0'".
"""

from __future__ import annotations

import math
from typing import Any

from webssl_jax.data.records import ANNOTATION_NAME


def positive(text: str) -> int:
    return _number(text, int, 1, None)


def natural(text: str) -> int:
    return _number(text, int, 0, None)


def aspect(text: str) -> float:
    return _number(text, float, 1.0, None)


def fraction(text: str) -> float:
    return _number(text, float, 0.0, 0.9)


def name(text: str) -> str:
    if not text.replace("_", "").isalnum():
        raise ValueError
    return text


def annotation(text: str) -> str:
    its_name, _, where = text.partition("=")
    if not ANNOTATION_NAME.fullmatch(its_name) or not where:
        raise ValueError
    return text


def limit(text: str) -> tuple[str, float]:
    field, equals, number = text.rpartition("=")
    if not equals or not field or not math.isfinite(float(number)):
        raise ValueError
    return field, float(number)


def _number(text: str, kind: type, low: float, high: float | None) -> Any:
    value = kind(text)
    if not value >= low or (high is not None and value > high):
        raise ValueError
    return value


positive.__name__, natural.__name__ = "positive whole number", "whole number"
aspect.__name__, fraction.__name__ = "ratio (1 or more)", "share (0 to 0.9)"
name.__name__ = "name (letters, digits, _)"
annotation.__name__ = "NAME=WHERE (NAME of lower-case letters, digits, _)"
limit.__name__ = "FIELD=NUMBER"
