"""Flags of passes over shards, make_records' and curate's: who does the work; and the types of
values, checked as they are parsed.

argparse turns a ValueError into its own line, which names the type: "invalid positive whole number
value: '0'".
"""

from __future__ import annotations

import functools
import math
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.data.converter import runners
from webssl_jax.data.records import ANNOTATION_NAME


def add_runner(parser: cli.ArgumentParser, workers: str = "one a core") -> None:
    """workers: their number unless the user says, in words."""
    parser.add_argument("--workers", type=positive, metavar="N", help=f"default: {workers}")
    parser.add_argument(
        "--runner", choices=("pool", "beam"), default="pool", help="pool: processes of this machine"
    )
    parser.add_argument(
        "--beam-options", default="", metavar="FLAGS", help="Beam's own flags, in quotes"
    )


def runner_of(args: Any, workers: int) -> runners.Runner:
    """The runner of :func:`add_runner`'s flags.

    Raises:
      UserError: for flags of Beam without it.
    """
    if args.runner == "beam":
        return functools.partial(runners.beam, args.beam_options)
    if args.beam_options:
        raise UserError("--beam-options: only with --runner beam")
    return functools.partial(runners.pool, workers)


def positive(text: str) -> int:
    return _number(text, int, 1, None)


def natural(text: str) -> int:
    return _number(text, int, 0, None)


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def amount(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


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
numbers.__name__, amount.__name__ = "list of whole numbers", "number above 0"
share.__name__ = "share (above 0, below 1)"
aspect.__name__, fraction.__name__ = "ratio (1 or more)", "share (0 to 0.9)"
name.__name__ = "name (letters, digits, _)"
annotation.__name__ = "NAME=WHERE (NAME of lower-case letters, digits, _)"
limit.__name__ = "FIELD=NUMBER"
