"""From a package's files to pictures with captions, topic and group: one reader a kind of package.

A reader is a function of the package's tree. It yields a :class:`Picture` for each image worth
decoding and a ``Dropped`` for each it leaves out by its name alone: repeats of one drawing in other
skin tones, mirrored copies, and surface maps, which are no pictures.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import html
import importlib
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType

from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.corpus.mini_web import pages, topics
from webssl_jax.corpus.mini_web.packages import Tree, zipped
from webssl_jax.data.converter.items import Dropped

IMAGES = r"\.(png|jpe?g|webp|gif|tga|bmp|tiff?)$"
_IMAGE = re.compile(IMAGES, re.IGNORECASE)
_SKIN = re.compile(r"1f3f[b-f]")
_TONES = {
    "1f3fb": "light skin",
    "1f3fc": "medium-light skin",
    "1f3fd": "medium skin",
    "1f3fe": "medium-dark skin",
    "1f3ff": "dark skin",
}
# normal, gloss, specular, roughness and glow maps of a surface
_SURFACE_MAP = re.compile(r"_(nm|gm|sm|rm|norm|normal|local|gloss|spec|bump|glow)$", re.IGNORECASE)
_ANIMATION = re.compile(
    r"[-_ ]?\b(attack|defend|death|die|dying|idle|ranged|melee|magic|bow|sword|stand|standing|se|"
    r"ne|n|s|sw|nw|run|running|moving|leading|healing|recruit|victory|bob|slash|\d+)\b.*$"
)
_LINKED = re.compile(r'<image\b[^>]*?xlink:href="(?!data:)', re.DOTALL)
_REJECTED = re.compile(r"pantyhose|sexy_lady|stripper|sunwheel")  # as in the embedded corpus
_COLLECTION = 4  # pictures of one title
_PAGES_A_MANUAL = 10
_PAGE_SCALE = 0.8  # of 72 dots an inch: a page of 670 pixels, before it is shrunk to 512


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image before decoding.

    image: the encoded file, or pixels where the package holds no image file. kind: of the first
    caption. group: pictures of one group are versions of one thing and stay on one side of the
    split; unique to the picture by default. crops: number of extra random crops.
    """

    key: str
    image: bytes | Image.Image
    captions: tuple[str, ...] = ()
    kind: str = "none"
    topic: str | None = None
    group: str = ""
    crops: int = 0


Found = Iterator[Picture | Dropped]


def words(stem: str) -> str:
    """A file name as words, without counters and hashes: ``redCat_of-JonDoe-02_4f2a`` is
    ``red cat of jon doe``."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", stem)
    text = re.sub(r"[_\-.+]+", " ", text).lower()
    text = re.sub(r"\b(\d+|[a-z]*\d+[a-z]\w*)\b|(?<=[a-z])\d+$", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def digest(text: str) -> str:
    """What decides where a choice must be made: the same everywhere, and blind to content."""
    return hashlib.sha256(text.encode()).hexdigest()


def named(tree: Tree, root: str = "", crops: int = 0) -> Iterator[Picture]:
    """Pictures whose only text is their name. root: the part of the path that goes."""
    for path, data in _images(tree):
        text = words(PurePosixPath(path).stem)
        captions = (text,) if len(text) > 2 else ()
        yield Picture(
            path.removeprefix(root),
            data,
            captions,
            "file name" if captions else "none",
            crops=crops,
        )


def openclipart(tree: Tree) -> Found:
    """Clip art: title, description and keywords come from the drawing of the same name.

    A title that several pictures share names a collection, not a picture.
    """
    root = "usr/share/openclipart/"
    sheets = {
        path: data.decode("utf-8", "replace") for path, data in tree.items() if ".svg" in path
    }
    titles = collections.Counter(_element(sheet, "title") for sheet in sheets.values())
    for path, data in _images(tree):
        key = path.removeprefix(root + "png/").removesuffix(".png")
        folder, _, stem = key.rpartition("/")
        sheet = sheets.get(f"{root}svg/{key}.svg", "")
        if folder == "shapes/stars":
            yield Dropped(key, "star polygons drawn by one formula")
        elif _REJECTED.search(key):
            yield Dropped(key, "rejected by name")
        elif _LINKED.search(sheet):
            yield Dropped(key, "drawing refers to a picture that is not there")
        else:
            title = _element(sheet, "title")
            title = title if titles[title] < _COLLECTION else ""
            found = re.findall(r"<rdf:li>([^<]*)</rdf:li>", sheet)
            keywords = [html.unescape(k).strip() for k in found]
            keywords = [k for k in keywords if 1 < len(k) < 30 and k not in ("hash", "unsorted")]
            parts = (title or words(stem), _element(sheet, "description")[:240])
            text = ". ".join(part for part in parts if part)
            captions = tuple(x for x in (text, ", ".join(keywords[:8])) if x)
            kind = "title and keywords" if title or keywords else "file name"
            # one author's variants differ by a number
            series = f"openclipart/{folder}/{words(stem) or stem}"
            topic = topics.topic(topics.OPENCLIPART, folder)
            yield Picture(key, data, captions, kind, topic, series)


def _element(sheet: str, name: str) -> str:
    found = re.search(rf"<dc:{name}>([^<]*)</dc:{name}>", sheet)
    return re.sub(r"\s+", " ", html.unescape(found.group(1))).strip() if found else ""


def tuxpaint(tree: Tree) -> Found:
    """Stamps: the first line of the text beside each is an English sentence."""
    root = "usr/share/tuxpaint/stamps/"
    for path, data in _images(tree):
        key = path.removeprefix(root).removesuffix(".png")
        if re.search(r"_(mirror|flip|mirror_flip)$", key):
            yield Dropped(key, "mirrored copy")
            continue
        beside = tree.get(path.removesuffix(".png") + ".txt")
        lines = beside.decode("utf-8", "replace").splitlines() if beside else []
        sentence = lines[0].strip() if lines else ""
        captions = (sentence or words(PurePosixPath(key).name),)
        kind = "human sentence" if sentence else "file name"
        yield Picture(key, data, captions, kind, topics.topic(topics.TUXPAINT, key))


def pysiogame(tree: Tree) -> Found:
    """Drawings of things, named by the file, sorted by the folder."""
    root = "usr/share/games/pysiogame/res/images/art4apps/"
    for picture in named(tree, root):
        folder = picture.key.partition("/")[0]
        yield dataclasses.replace(picture, topic=topics.topic(topics.PYSIOGAME, folder))


def emoji(tree: Tree, vendor: str) -> Found:
    """The emoji-datasource packages: a table of names and categories beside one folder of
    images."""
    for entry in json.loads(tree["package/emoji.json"]):
        for file, name in _thinned(entry):
            path = f"package/img/{vendor}/64/{file}"
            if path not in tree:
                continue
            if name is None:
                yield Dropped(file, "skin tone variant")
                continue
            yield _emoji_picture(file.removesuffix(".png"), tree[path], name, entry)


def fluent(tree: Tree) -> Found:
    """Fluent emoji are named by code point; ``emoji.json`` of another vendor's package names
    them."""
    by_code: dict[str, tuple[str | None, Mapping]] = {}
    for entry in json.loads(tree["package/emoji.json"]):
        for file, name in _thinned(entry):
            by_code[_plain(file.removesuffix(".png"))] = (name, entry)
    for path, data in _images(tree):
        code = PurePosixPath(path).stem
        name, entry = by_code.get(_plain(code), (None, None))
        if entry is None:
            yield Dropped(code, "no such emoji in the table of names")
        elif name is None:
            yield Dropped(code, "skin tone variant")
        else:
            yield _emoji_picture(code, data, name, entry)


def _plain(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def _thinned(entry: Mapping) -> Iterator[tuple[str, str | None]]:
    """(file, name) of an emoji and its skin tones; the name is None for all tones but one, drawn by
    the emoji's digest."""
    name = (entry["name"] or entry["short_name"]).lower()
    yield entry["image"], name
    variants = entry.get("skin_variations", {})
    # of couples, the ones in which both have the same tone
    single = sorted(k for k in variants if len(set(_SKIN.findall(k.lower()))) == 1)
    kept = min(single, key=lambda tone: digest(entry["unified"] + tone), default=None)
    for tone, variant in variants.items():
        text = f"{name}, {_TONES[_SKIN.findall(tone.lower())[0]]}" if tone == kept else None
        yield variant["image"], text


def _emoji_picture(key: str, data: bytes, name: str, entry: Mapping) -> Picture:
    category = f"{entry['category']}/{entry['subcategory']}".lower()
    topic = topics.topic(topics.EMOJI, category)
    if name in topics.EMOJI_FURNITURE:
        topic = "furniture"
    return Picture(key, data, (name,), "Unicode name", topic, f"emoji/{entry['unified']}")


def sweethome(tree: Tree) -> Found:
    """Furniture catalogues: a zip archive of renders with a properties file of names and
    categories."""
    for path, data in tree.items():
        catalogue = zipped(data, re.compile(r"\.png$|^PluginFurnitureCatalog\.properties$"))
        text = catalogue["PluginFurnitureCatalog.properties"].decode("latin-1")
        rows = dict(re.findall(r"^([a-zA-Z]+#\d+)=(.*)$", text, re.MULTILINE))
        for key, value in rows.items():
            file = value.strip().lstrip("/")
            if not key.startswith("icon#") or file not in catalogue:
                continue
            number = key.partition("#")[2]
            name, category = (rows.get(f"{k}#{number}", "").strip() for k in ("name", "category"))
            captions = (f"{name}, {category.lower()}",) if name else ()
            yield Picture(
                f"{PurePosixPath(path).stem}/{file}",
                catalogue[file],
                captions,
                "catalogue name" if captions else "none",
                topics.topic(topics.SWEETHOME, category),
                f"sweethome3d/{words(name)}",
            )


def textures(tree: Tree) -> Found:
    """Game textures in zip archives, without the maps of a surface's relief and gloss."""
    for path, data in tree.items():
        for name, image in zipped(data, _IMAGE).items():
            at = PurePosixPath(name)
            if _SURFACE_MAP.search(at.stem):
                yield Dropped(f"{PurePosixPath(path).stem}/{name}", "surface map, not a picture")
            elif len(at.parts) > 2:
                text = f"{words(at.parts[1])} texture, {words(at.stem)}"
                yield Picture(f"{PurePosixPath(path).stem}/{name}", image, (text,), "file name")


def wesnoth(tree: Tree) -> Found:
    """Painted art of a game; frames of one figure's animation, or variants of a tile, share a
    group."""
    for path, data in _images(tree):
        key = path.partition("core/images/")[2]
        at = PurePosixPath(key)
        unit = _ANIMATION.sub("", words(at.stem))
        text = words(f"{at.parts[1] if len(at.parts) > 2 else at.parts[0]} {at.stem}")
        yield Picture(key, data, (text,), "file name", group=f"wesnoth/{at.parent}/{unit}")


def wallpapers(tree: Tree, crops: int) -> Found:
    """Wallpapers: of one picture in several sizes the largest, whole and in random crops."""
    best: dict[str, str] = {}
    for path, data in _images(tree):
        at = PurePosixPath(path)
        if at.stem == "screenshot":
            continue  # KDE's preview of the same picture
        # KDE's layout: NAME/contents/images/1920x1080.png
        name = at.parts[-4] if at.parent.name in ("images", "images_dark") else at.stem
        if name not in best or len(data) > len(tree[best[name]]):
            best[name] = path
    for name, path in sorted(best.items()):
        text = words(name)
        captions = (text,) if len(text) > 3 else ()
        kind = "file name" if captions else "none"
        yield Picture(name, tree[path], captions, kind, crops=crops)


def documentation(tree: Tree, root: str) -> Found:
    """Pictures of HTML pages with their alt text, or else the title of their page."""
    texts = pages.texts(tree)
    for path, data in _images(tree):
        alt, title = texts.get(path, ("", ""))
        kind = "alt text" if alt else "page title" if title else "none"
        captions = (alt,) if alt else (title,) if title else ()
        yield Picture(path.removeprefix(root), data, captions, kind)


def manuals(tree: Tree) -> Found:
    """Pages of PDF manuals, at most ten of each, drawn by the pypdfium2 in the tree."""
    library = load_pdfium(tree)
    for path, data in tree.items():
        if not path.endswith(".pdf"):
            continue
        name = PurePosixPath(path).stem
        try:
            document = library.PdfDocument(data)
        except library.PdfiumError:
            yield Dropped(name, "PDF cannot be opened")
            continue
        count = len(document)
        for number in sorted(random.Random(name).sample(range(count), min(_PAGES_A_MANUAL, count))):
            image = document[number].render(scale=_PAGE_SCALE).to_pil().convert("RGB")
            text = f"page {number + 1} of the {words(name)} manual"
            yield Picture(
                f"{name}/{number + 1}", image, (text,), "file name", group=f"manual/{name}"
            )


def load_pdfium(tree: Tree) -> ModuleType:
    """Imports pypdfium2 from its wheel's files in ``tree``.

    Raises:
      UserError: if they do not load on this machine.
    """
    files = {path: data for path, data in tree.items() if path.startswith("pypdfium2")}
    with tempfile.TemporaryDirectory(prefix="mini_web_") as folder:
        for path, data in files.items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("pypdfium2")
        except (ImportError, OSError) as error:
            raise UserError(f"the wheel of pypdfium2 does not load here: {error}") from None
        finally:
            sys.path.remove(folder)


def _images(tree: Tree) -> Iterator[tuple[str, bytes]]:
    return ((path, data) for path, data in tree.items() if _IMAGE.search(path))
