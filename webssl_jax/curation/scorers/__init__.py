"""What a record is scored by: ``score(records) -> columns``, one file a scorer.

A scorer is a frozen dataclass whose fields are its options; it is pickled, called in several
processes, and loads what is heavy at its first call. To add one, write a file here and name it in
:data:`SCORERS`, or give ``module:Class`` on the command line.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from webssl_jax import config as configs
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data.records import Record
from webssl_jax.errors import suggest

SCORERS = {
    "head": "webssl_jax.curation.scorers.head:HeadScorer",
    "matches": "webssl_jax.curation.scorers.matches:Matches",
    "smolvlm": "webssl_jax.curation.scorers.smolvlm:SmolVLM",
    "statistics": "webssl_jax.curation.scorers.statistics:Statistics",
    "text_boxes": "webssl_jax.curation.scorers.text_boxes:TextBoxes",
}


class Scorer(Protocol):
    """columns: {name: type} of what a record gets. version: changed whenever other figures come
    out of the same record, so that old and new ones are never mixed. It may also have ``workers``,
    the processes that call it unless the user says, else one a core; and ``batch``, the most
    records of a call, else 32."""

    @property
    def columns(self) -> Mapping[str, pa.DataType]: ...

    @property
    def version(self) -> int: ...

    def __call__(self, records: Sequence[Record]) -> Sequence[Mapping[str, Any]]:
        """A row of the columns for each record.

        Raises:
          DecodeError: of a single record (then it alone is given) whose image cannot be read.
        """


def make(spec: str) -> Scorer:
    """The scorer of ``NAME[:option=value,...]`` or ``module:Class[:option=value,...]``.

    Raises:
      UserError: for a name or an option that there is not.
    """
    name, _, rest = spec.partition(":")
    where = SCORERS.get(name)
    if where is None:
        attribute, _, rest = rest.partition(":")
        if not attribute or "=" in attribute:
            raise UserError(f"--scorer {spec}: {suggest(name, SCORERS)}")
        where = f"{name}:{attribute}"
    module, _, attribute = where.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--scorer {spec}: {error}") from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"--scorer {spec}: {where} is no scorer, which is a frozen dataclass")
    return filled(kind, rest, f"--scorer {spec}")


def filled(kind: type[Any], options: str, where: str) -> Any:
    """A dataclass from ``option=value,...``; each value takes its default's type.

    Raises:
      UserError: beginning with ``where``, for an option that it has not.
    """
    known = {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    try:
        return kind(**configs.parse_arg(options, **known))
    except ConfigError as error:
        words = str(error).removeprefix("config argument ")
        raise UserError(f"{where}: {words}") from None


def describe(scorer: Scorer) -> str:
    """What its figures depend on."""
    return f"{scorer!r} version {scorer.version}"
