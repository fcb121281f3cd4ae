"""Pictures in documentation: paired with alt text and page titles, as a crawl of the web pairs
them."""

from __future__ import annotations

import gzip
import html
import posixpath
import re
from collections.abc import Iterator

from webssl_jax.corpus.mini_web.packages import Tree

_PAGE = re.compile(r"\.(html?|page)(\.gz)?$")
_TAG = re.compile(r"<(?:img|media)\b[^>]*>", re.IGNORECASE)
_FILE_NAME = re.compile(r"\.(png|svg|jpe?g)$|^\[?image|^logo$|^\S+$", re.IGNORECASE)
_MIN_ALT = 7  # characters: shorter alt texts are "note", "tip", "back"


def texts(tree: Tree) -> dict[str, tuple[str, str]]:
    """{path of a picture: (alt text, title of the page)}, either may be empty.

    Of a picture on several pages the longest alt text counts. Alt texts that are file names or
    single words are no texts.
    """
    found: dict[str, tuple[str, str]] = {}
    for path, data in tree.items():
        if _PAGE.search(path):
            for picture, alt, title in _pictures(path, _text(path, data)):
                before = found.get(picture, ("", ""))
                found[picture] = (max(before[0], alt, key=len), before[1] or title)
    return found


def _text(path: str, data: bytes) -> str:
    return (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8", "replace")


def _pictures(path: str, page: str) -> Iterator[tuple[str, str, str]]:
    head = re.search(r"<title[^>]*>([^<]*)</title>", page)
    title = _clean(head.group(1)) if head else ""
    for tag in _TAG.findall(page):
        link = re.search(r'src="([^"]+)"', tag)
        if link is None or "://" in link.group(1):
            continue
        picture = posixpath.normpath(
            posixpath.join(posixpath.dirname(path), html.unescape(link.group(1)))
        )
        text = re.search(r'alt="([^"]*)"', tag)
        alt = _clean(text.group(1)) if text else ""
        good = len(alt) >= _MIN_ALT and not _FILE_NAME.search(alt)
        yield picture, alt if good else "", title


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(text)).strip()
