"""The texts that a value of a data set's row, json or example becomes: one place for all readers.

=================  =========================================  ====================================
value              label                                      caption
=================  =========================================  ====================================
null, NaN, blank   none                                       none
text               as it is; "-1": none, noted                as it is
whole number, 3.0  "3"; -1: none, noted                       none, noted
other number       none, noted                                none, noted
true, false        "true", "false"                            none, noted
list               of one: that one; longer: none, noted      a caption each
object             none, noted                                none, noted
=================  =========================================  ====================================

Where the names of the classes are known, a whole number becomes its class's name, and one that is
no class is noted. What is noted is counted and named in the summary.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_TEXT_BYTES = 1 << 20  # of one caption or one json beside an image
_TOO_LARGE = "text larger than the limit, ignored"


def text_of(value: str | bytes) -> tuple[str, bool]:
    """Text that UTF-8 can hold, stripped, and whether characters had to be replaced by U+FFFD."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    text = data.decode("utf-8", "replace")
    return text.removeprefix("\ufeff").strip(), text.encode() != data


def plain(value: Any) -> Any:
    """Python's own value of NumPy's; a whole ``Decimal`` or ``float`` is an int; what is missing
    (None, NaN, pandas' NaT) is None. Of lists and objects the outermost only."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or value != value:
        return None
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def captions_of(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions without blanks and repeats, in order, and the notes about them.

    Args:
      value: a value, or a list of them, or of lists.
    """
    captions: dict[str, None] = {}
    notes: dict[str, None] = {}
    for one in _leaves(value):
        if not isinstance(one, str | bytes):
            notes[f"caption is {_kind(one)}, ignored"] = None
            continue
        if len(one) > MAX_TEXT_BYTES:
            notes[_TOO_LARGE] = None
            continue
        text, mended = text_of(one)
        if mended:
            notes["caption not UTF-8, mended"] = None
        if text:
            captions[text] = None
    return tuple(captions), tuple(notes)


def label_of(value: Any, names: Sequence[str] = ()) -> tuple[str | None, tuple[str, ...]]:
    """The label, None if there is none, and the notes about it.

    Args:
      names: of the classes, by number, where a data set has them.
    """
    value = plain(value)
    while isinstance(value, list) and len(value) == 1:
        value = plain(value[0])
    if isinstance(value, list) and not value:
        value = None
    if value is None:
        return None, ()
    notes: tuple[str, ...] = ()
    if isinstance(value, bool):
        return str(value).lower(), ()
    if isinstance(value, int) and names:
        if 0 <= value < len(names):
            return names[value], ()
        return None, (f"label {_NONE if value == -1 else 'that is no class'}, ignored",)
    if isinstance(value, str | bytes):
        if len(value) > MAX_TEXT_BYTES:
            return None, (_TOO_LARGE,)
        value, mended = text_of(value)
        notes = ("label not UTF-8, mended",) if mended else ()
    elif not isinstance(value, int):
        return None, (f"label is {_kind(value)}, ignored",)
    if str(value) == _NONE:
        return None, (f"label {_NONE}, ignored",)
    return str(value) or None, notes


def key_of_value(value: Any) -> str | None:
    """Text for a key: of text and whole numbers; None for what is missing, blank or of another
    kind."""
    value = plain(value)
    if isinstance(value, str | bytes):
        return text_of(value)[0] or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


_NONE = "-1"  # what data sets write where there is no label


def _leaves(value: Any) -> Iterable[Any]:
    """What lies in lists of lists, without what is missing."""
    value = plain(value)
    if isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif value is not None:
        yield value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int):
        return "a number"
    if isinstance(value, float | decimal.Decimal):
        return "no whole number"
    return f"a {type(value).__name__}"
