"""The page of a selection: its figures and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from webssl_jax.files import write_text
from webssl_jax.visuals import pages


def write(
    output: Path, title: str, figures: Mapping[str, Any], pictures: Mapping[str, str]
) -> None:
    """Writes ``index.html`` of a selection.

    Args:
      figures: as in the JSON beside it; a list of tables, all with the same keys, is one table.
      pictures: {file in ``output``: what it shows}; those that were not drawn are left out.
    """
    plain = {key: value for key, value in figures.items() if not _is_table(value)}
    lines = [[key.replace("_", " "), _shown(value)] for key, value in plain.items()]
    body = [pages.wide_table(["", ""], lines)]
    for key, rows in figures.items():
        if _is_table(rows):
            heads = ["", *(head.replace("_", " ") for head in rows[0])]
            lines = [[str(i), *map(_shown, row.values())] for i, row in enumerate(rows, 1)]
            body.append(f"<h2>{key.replace('_', ' ')}</h2>")
            body.append(pages.wide_table(heads, lines))
    found = [pages.picture(*one) for one in pictures.items() if (output / one[0]).exists()]
    write_text(output / "index.html", pages.document(title, "\n".join([*body, *found])))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
