"""Pages of HTML that need nothing from elsewhere: a document, and tables in it."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1c21; --soft: #6a6a72; --line: #dcdce2 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16161a; --ink: #e8e8ec; --soft: #a0a0aa; --line: #3a3a42 }
  svg { filter: brightness(1.4) } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.soft { color: var(--soft) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: pre }
th, td:first-child { white-space: normal }
th:first-child, td:first-child { text-align: left; min-width: 9rem }
svg { max-width: 100%; height: auto; color: var(--ink) } svg text { fill: currentColor }
figure { margin: 1rem 0 } figcaption { font-size: .9rem } img { max-width: 100% }
li { margin: .4rem 0 } b { font-weight: 600 }
"""


def document(title: str, body: str) -> str:
    """A page. title: text, also its heading. body: HTML; of classes it may use ``soft`` (less
    important) and ``scroll`` (wider than a screen)."""
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def wide_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """:func:`table`, which scrolls by itself where it is wider than the screen."""
    return f'<div class="scroll">{table(heads, lines)}</div>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Texts, the first of a line at the left, others at the right; they may have several lines."""
    broken = [html.escape(text).replace("/", "/<wbr>") for text in heads]  # a line may end there
    head = "".join(f"<th>{text}</th>" for text in broken)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(source: str, caption: str) -> str:
    """source: a path beside the page, or a data address. caption: text."""
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="{html.escape(source)}">'
        f"<figcaption>{words}</figcaption></figure>"
    )
