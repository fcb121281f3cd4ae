"""The corpus' sources: which package, how it is read, under which licence, how much of it is
taken."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

from webssl_jax.corpus.mini_web import readers
from webssl_jax.corpus.mini_web.packages import Package, Tree

_HTML = r"\.(html?|page)(\.gz)?$"
_IMAGES = f"(?i){readers.IMAGES}"


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of the corpus.

    wanted: of the packages' files, those that the reader needs. licence: a note, not a legal
    statement; each package's copyright file has the word. text_rich: pictures of documents, which
    are kept larger. per_group: at most so many pictures of one group (frames of an animation).
    """

    name: str
    packages: tuple[Package, ...]
    wanted: str
    reader: Callable[[Tree], readers.Found]
    licence: str
    what: str
    text_rich: bool = False
    per_group: int | None = None

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.wanted)


def _deb(*names: str) -> tuple[Package, ...]:
    return tuple(Package("deb", name) for name in names)


def _documentation(
    name: str,
    package: str,
    root: str,
    licence: str,
    what: str,
    text_rich: bool = True,
    pictures: str = readers.IMAGES,
) -> Source:
    """Pages, and the pictures that match ``pictures``, below ``usr/share/<root>``."""
    root = f"usr/share/{root}/"
    reader = functools.partial(readers.documentation, root=root)
    wanted = f"(?i)^{re.escape(root)}.*({pictures}|{_HTML})"
    return Source(name, _deb(package), wanted, reader, licence, what, text_rich)


def _wallpapers(name: str, package: str, licence: str) -> Source:
    reader = functools.partial(readers.wallpapers, crops=8)
    return Source(name, _deb(package), _IMAGES, reader, licence, "wallpapers: whole and in crops")


_GOOGLE = Package("npm", "emoji-datasource-google", "16.0.0")
_TWITTER = Package("npm", "emoji-datasource-twitter", "16.0.0")
_FLUENT = Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0")
_EMOJI = r"^package/(emoji\.json|img/{}/64/.*\.png)$"

SOURCES: tuple[Source, ...] = (
    Source(
        "openclipart",
        _deb("openclipart-png", "openclipart-svg"),
        r"^usr/share/openclipart/(png/.*\.png|svg/.*\.svg)$",
        readers.openclipart,
        "public domain",
        "clip art",
    ),
    Source(
        "tuxpaint",
        _deb("tuxpaint-stamps-default"),
        r"^usr/share/tuxpaint/stamps/.*\.(png|txt)$",
        readers.tuxpaint,
        "GPL-2",
        "stamps: cut-out photographs and drawings",
    ),
    Source(
        "pysiogame",
        _deb("pysiogame"),
        f"(?i)res/images/art4apps/.*{readers.IMAGES}",
        readers.pysiogame,
        "CC-BY-3.0 (art4apps)",
        "drawings of everyday things",
    ),
    Source(
        "emoji-google",
        (_GOOGLE,),
        _EMOJI.format("google"),
        functools.partial(readers.emoji, vendor="google"),
        "Apache-2.0 (Noto)",
        "emoji",
    ),
    Source(
        "emoji-twitter",
        (_TWITTER,),
        _EMOJI.format("twitter"),
        functools.partial(readers.emoji, vendor="twitter"),
        "CC-BY-4.0 (Twemoji)",
        "emoji",
    ),
    Source(
        "emoji-fluent3d",
        (_FLUENT, _GOOGLE),
        r"^package/(emoji\.json|assets/.*\.webp)$",
        readers.fluent,
        "MIT (Fluent Emoji)",
        "emoji, rendered in 3D",
    ),
    Source(
        "sweethome3d",
        _deb("sweethome3d-furniture"),
        r"\.sh3f$",
        readers.sweethome,
        "CC-BY / CC0 / Free Art",
        "furniture, rendered",
    ),
    Source(
        "ufoai-textures",
        _deb("ufoai-textures"),
        r"\.pk3$",
        readers.textures,
        "GPL-2 / GPL-3 / CC / public domain",
        "textures of walls, streets, ground",
    ),
    Source(
        "openarena-textures",
        _deb("openarena-081-textures"),
        r"\.pk3$",
        readers.textures,
        "GPL-2",
        "game textures and skies",
    ),
    Source(
        "endless-sky",
        _deb("endless-sky-data"),
        f"(?i)/images/(land|scene)/.*{readers.IMAGES}",
        functools.partial(readers.named, root="usr/share/games/endless-sky/images/", crops=2),
        "CC-BY-SA / public domain",
        "photographs of landscapes and cities: whole and in crops",
    ),
    Source(
        "wesnoth",
        _deb("wesnoth-1.16-data"),
        r"core/images/(portraits|units|terrain|scenery|items|attacks)/.*\.png$",
        readers.wesnoth,
        "GPL-2+ / CC-BY-SA-4.0",
        "painted game art: portraits, figures, terrain",
        per_group=2,
    ),
    _wallpapers("wallpapers-plasma", "plasma-workspace-wallpapers", "GPL-2+"),
    _wallpapers("wallpapers-mate", "mate-backgrounds", "GPL-2+ / CC-BY-SA"),
    _wallpapers("wallpapers-gnome", "gnome-backgrounds", "CC-BY-SA-3.0"),
    _wallpapers("wallpapers-ukui", "ukui-wallpapers", "GPL / CC-BY-SA"),
    _wallpapers("wallpapers-lomiri-16.04", "lomiri-wallpapers-16.04", "CC-BY-SA"),
    _wallpapers("wallpapers-lomiri-20.04", "lomiri-wallpapers-20.04", "CC-BY-SA"),
    Source(
        "skimage",
        (Package("pypi", "scikit-image", "0.26.0"),),
        f"(?i)^skimage/data/.*{readers.IMAGES}",
        functools.partial(readers.named, root="skimage/data/", crops=2),
        "CC0 / public domain / BSD",
        "sample photographs",
    ),
    _documentation(
        "gimp-help", "gimp-help-en", "gimp", "GFDL-1.2", "screenshots and filter examples"
    ),
    _documentation(
        "debian-handbook",
        "debian-handbook",
        "doc/debian-handbook/html",
        "GPL-2+ / CC-BY-SA-3.0",
        "screenshots in a dozen languages",
    ),
    _documentation("kicad-doc", "kicad-doc-en", "doc/kicad", "GPL-3+ / CC-BY-3.0", "screenshots"),
    _documentation("gnome-user-docs", "gnome-user-docs", "help", "CC-BY-SA-3.0", "screenshots"),
    _documentation("sklearn-doc", "python-sklearn-doc", "doc", "BSD-3", "charts"),
    _documentation("scipy-doc", "python-scipy-doc", "doc", "BSD-3", "charts"),
    _documentation(
        "skimage-doc", "python-skimage-doc", "doc", "BSD-3", "charts of image processing"
    ),
    _documentation(
        "opencv-doc",
        "opencv-doc",
        "doc/opencv-doc",
        "Apache-2.0",
        "photographs and figures of tutorials",
        text_rich=False,
        pictures=r"\.jpe?g$|(examples/|tutorial).*\.png$",  # the others are class diagrams
    ),
    Source(
        "lilypond-doc",
        _deb("lilypond-doc"),
        _IMAGES,
        functools.partial(readers.named, root="usr/share/"),
        "GFDL-1.3 / GPL-3",
        "engraved music",
        text_rich=True,
    ),
    Source(
        "latex-manuals",
        (*_deb("texlive-latex-base-doc"), Package("pypi", "pypdfium2", "5.15.2")),
        r"\.pdf$|^pypdfium2\w*/",
        readers.manuals,
        "LPPL and others, per manual",
        "pages of manuals",
        text_rich=True,
    ),
)
BY_NAME = {source.name: source for source in SOURCES}
