"""Answers in the formats of the servers that keep the truth to themselves."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Answer


@dataclasses.dataclass(frozen=True)
class Submission:
    """A file to hand in: its name, its bytes, and the address where."""

    name: str
    content: bytes
    address: str


@runtime_checkable
class Submits(Protocol):
    """A task with a server."""

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """All its answers, as the server takes them."""


def workbook(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """An .xlsx file of one sheet. Text stays text: "=1+1" is no formula.

    Raises:
      UserError: if XlsxWriter is not installed.
    """
    try:
        import xlsxwriter
    except ImportError as error:
        raise UserError(
            "a workbook needs XlsxWriter: pip install 'webssl_jax[vqa]', or XlsxWriter itself"
        ) from error
    stream = io.BytesIO()
    plain = {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with xlsxwriter.Workbook(stream, plain) as book:
        sheet = book.add_worksheet()
        for number, row in enumerate((header, *rows)):
            sheet.write_row(number, 0, row)
    return stream.getvalue()
