#!/usr/bin/env python3
"""Builds the embedded corpus: a few thousand public-domain drawings, captioned and labelled, as
ArrayRecord shards.

    # downloads two Debian packages (156 MB), writes webssl_jax/corpus
    python tools/build_corpus.py
    # trivial floors of the topic probe on what is written
    python tools/build_corpus.py --report

The pictures are those of the Debian package ``openclipart-png``; titles, descriptions, keywords and
the licence of every single picture come from its sibling ``openclipart-svg``. Only pictures whose
own metadata names the public domain are taken. Needs a Debian or Ubuntu machine (``apt-get``,
``dpkg-deb``) to build; reading needs nothing.

What happens to a picture: composited on white, trimmed to its ink, shrunk (never enlarged) with an
antialiasing filter so that the shorter side is at most 64 and the longer at most 128 pixels, stored
as WebP. Then exact duplicates go, near-duplicates are joined into groups, and whole groups are
dealt to train and test. The same packages give the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import html
import io
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from webssl_jax import cli, corpus
from webssl_jax.config import UserError
from webssl_jax.corpus import near_duplicates
from webssl_jax.corpus.near_duplicates import alike
from webssl_jax.data import records

PACKAGES = ("openclipart-png", "openclipart-svg")
# the package holds 16 larger pictures, up to 623 Mpixel: two thirds of all its pixels
MAX_PIXELS = 40_000_000
SHORT_SIDE, LONG_SIDE, MIN_SIDE, MAX_ASPECT = 64, 128, 32, 3.0
QUALITY = (
    85  # WebP: 1.3 kB and 34.1 dB at 0.13 ms a decode; JPEG 85 takes 1.9 kB for 31.9 dB at 0.07 ms
)
SHARDS = {"train": 4, "test": 2}
REPORT_SIZE = 48  # pixels: what the quick start trains on
TEST_SHARE = 0.37  # of the labelled pictures; a big test set makes the probe's standard error small
MIN_CLASS = 40
MAX_TEST_GROUP = 12
# correlation of edges, of colours, from which two pictures count as one drawing
GROUP_THRESHOLDS = (0.86, 0.94)
SET_THRESHOLDS = (0.76, 0.87)  # the same for two pictures of one author in one folder
APART_THRESHOLDS = (0.70, 0.84)  # the least that a test picture may keep from every other group

# The first prefix that fits the folder gives the class. None: kept for pretraining, without a
# label: junk drawers and machine-made series whose class a colour histogram would guess.
CLASSES: tuple[tuple[str, str | None], ...] = (
    ("animals", "animals"),
    ("buildings/furniture", None),
    ("buildings", "buildings"),
    ("computer/buttons", None),
    ("computer/icons", "icons"),
    ("computer", "electronics"),
    ("containers", "office"),
    ("decorations", "shapes"),
    ("education", "office"),
    ("electronics", "electronics"),
    ("food", "food"),
    ("geography/astronomy", None),
    ("geography", "maps"),
    ("office/telephone", "electronics"),
    ("office", "office"),
    ("people/clothing", "clothing"),
    ("people/stickmen", None),
    ("people", "people"),
    ("plants", "plants"),
    ("recreation/games/cards", None),
    ("recreation/holiday", None),
    ("recreation/music", "music"),
    ("recreation/religion", None),
    ("recreation", "sports and toys"),
    ("shapes/stars", None),
    ("shapes", "shapes"),
    ("signs_and_symbols/clocks", None),
    ("signs_and_symbols/flags/semaphore", None),
    ("signs_and_symbols/flags", "flags"),
    ("signs_and_symbols/led", None),
    ("signs_and_symbols/weather", None),
    ("signs_and_symbols", "signs"),
    ("special/patterns", "patterns"),
    ("tools", "tools"),
    ("transportation/roadsigns", "signs"),
    ("transportation", "vehicles"),
)
SIGN_KEYWORDS = {"roadsign", "hotel"}  # make a sign of what lies among vehicles and icons
ICON_LABELS = (
    600  # icons are 1,350 pictures; more labels of one class would only raise the majority floor
)
SERIES_CAP = {"shapes/stars": 150}  # 1,378 star polygons drawn by one formula
# Not for a corpus that ships inside a package, whatever its licence.
REJECTED = re.compile(r"pantyhose|sexy_lady|stripper|sunwheel")
JUNK_KEYWORDS = {
    "",
    "hash",
    "unsorted",
    "theme",
    "svg",
    "mimetypes",
    "special",
    "signs_and_symbols",
}
# Words of a file name that tell variants of one drawing apart, not drawings.
VARIANT = re.compile(
    r"(?<![a-z])(bw|b|w|bn|col|color|colou?red|gray|grey|black|white|red|green|blue|yellow|orange|purple|pink|brown|"
    r"violet|cyan|magenta|gold|silver|dark|light|outline|contour|silhouette|filled|big|small|left|right|up|down|upper|"
    r"lower|upright|icon|simple)(?![a-z])"
)


@dataclasses.dataclass
class Picture:
    """One candidate on its way. ``canvas`` (64, 64, 3) uint8 is what near-duplicates are judged
    by."""

    key: str
    path: Path
    captions: tuple[str, ...]
    label: str | None
    series: str
    author: str
    image: bytes = b""
    size: tuple[int, int] = (0, 0)
    canvas: np.ndarray | None = None


# ------------------------------------------------------------------------------------- the packages
def fetch(scratch: Path) -> Path:
    """Downloads and unpacks the packages below ``scratch`` unless they are there; returns
    ``.../openclipart``."""
    for name in PACKAGES:
        if not list(scratch.glob(f"{name}_*.deb")):
            print(f"downloading {name}", flush=True)
            command = ["apt-get", "download", "-q", name]
            if subprocess.run(command, cwd=scratch, capture_output=True).returncode:
                subprocess.run(["apt-get", "update", "-q"], check=True, capture_output=True)
                subprocess.run(command, cwd=scratch, check=True, capture_output=True)
        (package,) = scratch.glob(f"{name}_*.deb")
        if not (scratch / f"{name}.unpacked").exists():
            subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], check=True)
            (scratch / f"{name}.unpacked").touch()
    return scratch / "unpacked/usr/share/openclipart"


def inventory(root: Path, dropped: collections.Counter) -> list[Picture]:
    """Every picture of the package that is public domain by its own metadata, with captions and
    class, by key."""
    sheets = {}
    for path in sorted((root / "png").rglob("*.png")):
        if path.is_symlink():
            continue  # the same drawing filed under a second folder
        key = str(path.relative_to(root / "png").with_suffix(""))
        drawing = root / "svg" / f"{key}.svg"
        sheet = metadata(drawing.read_text("utf-8", "replace")) if drawing.exists() else None
        if sheet is None or not sheet["public_domain"]:
            dropped["no public-domain mark in its own metadata"] += 1
        elif sheet["linked"]:
            dropped["drawing refers to a picture that is not there"] += 1
        elif REJECTED.search(key):
            dropped["rejected by name"] += 1
        else:
            sheets[key] = (path, sheet)
    # A title that many pictures share names a collection, not a picture.
    titles = collections.Counter(sheet["title"] for _, sheet in sheets.values())
    return [
        Picture(
            key=f"openclipart/{key}",
            path=path,
            captions=captions(key, sheet, collection=titles[sheet["title"]] >= 4),
            label=class_of(key, sheet["keywords"]),
            series=series_of(key, sheet["author"]),
            author=f"{key.rpartition('/')[0]} by {sheet['author']}",
        )
        for key, (path, sheet) in sorted(sheets.items())
    ]


def metadata(svg: str) -> dict:
    """Title, description, keywords, author, licence of one SVG, by pattern: some are not
    well-formed XML."""
    block = re.search(r"<metadata.*?</metadata>", svg, re.DOTALL)
    block = block.group(0) if block else ""

    def text(pattern: str) -> str:
        found = re.search(pattern, block)
        return (
            re.sub(r"\s+", " ", html.unescape(html.unescape(found.group(1)))).strip()
            if found
            else ""
        )

    licences = {
        url.rstrip("/").lower() for url in re.findall(r'<cc:license rdf:resource="([^"]*)"', block)
    }
    keywords = [
        html.unescape(k).strip().lower() for k in re.findall(r"<rdf:li>([^<]*)</rdf:li>", block)
    ]
    links = re.findall(r'<image\b[^>]*?xlink:href="([^"]{0,5})', svg, re.DOTALL)
    return {
        "title": text(r"<dc:title>([^<]*)</dc:title>"),
        "description": text(r"<dc:description>([^<]*)</dc:description>"),
        "author": text(r"<dc:creator>\s*<cc:Agent[^>]*>\s*<dc:title>([^<]*)<"),
        "keywords": [k for k in dict.fromkeys(keywords) if k not in JUNK_KEYWORDS],
        "public_domain": bool(licences) and all(url.endswith("publicdomain") for url in licences),
        "linked": any(link != "data:" for link in links),
    }


def words(stem: str, author: str = "") -> str:
    """A file name as words: ``brain_jon_phillips_02`` by Jon Phillips is ``brain``."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", stem).lower()
    names = re.findall(r"\w+", author.lower())
    # File names cut the author's name short: ``franc`` for Francesco.
    kept = [
        w
        for w in re.findall(r"[^\W\d_]+|\d+", text)
        if not any(len(w) > 1 and n.startswith(w) for n in names)
    ]
    # a counter; "queen of hearts 10" stays
    while kept and kept[-1].isdigit() and kept[-1].startswith("0"):
        kept.pop()
    return " ".join(kept)


def captions(key: str, sheet: dict, collection: bool) -> tuple[str, ...]:
    """Up to two texts: title (or file name) with description, and the keywords."""
    folder, _, stem = key.rpartition("/")
    name = words(stem, sheet["author"])
    title = (
        re.sub(r"^clipart by nicu buculei - ", "", sheet["title"], flags=re.IGNORECASE)
        .replace("_", " ")
        .strip()
    )
    if collection or len(title) < 3:
        drawer = folder.rpartition("/")[2].replace("_", " ")
        title = name if drawer == "unsorted" else f"{name}, {drawer}"
        title = title if len(name) > 2 else ""
    parts = [title]
    description = sheet["description"]
    if len(description) > 3 and "@" not in description and description.lower() != title.lower():
        parts.append(description[:240])
    keywords = [k.replace("_", " ") for k in sheet["keywords"] if k != sheet["author"].lower()][:8]
    return tuple(text for text in (". ".join(p for p in parts if p), ", ".join(keywords)) if text)


def class_of(key: str, keywords: list[str]) -> str | None:
    if SIGN_KEYWORDS & set(keywords):
        return "signs"
    return next((name for prefix, name in CLASSES if key.startswith(prefix + "/")), None)


def series_of(key: str, author: str) -> str:
    """Pictures of one folder and author whose names differ by number, colour or outline only share
    a series."""
    folder, _, stem = key.rpartition("/")
    name = words(VARIANT.sub(" ", re.sub(r"[_\d-]+", " ", stem.lower())), author)
    return f"{folder}/{author}/{name}" if len(name) > 2 else key


# ------------------------------------------------------------------------------------- the pictures
def normalise(path: Path) -> tuple[bytes, tuple[int, int], np.ndarray] | str:
    """One picture on white, trimmed, shrunk and encoded, with its canvas; or the reason why not."""
    Image.MAX_IMAGE_PIXELS = None  # the header's size is judged here, in the next line but one
    with Image.open(path) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            return f"over {MAX_PIXELS // 1_000_000} Mpixel"
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    image = white.convert("RGB")
    if max(image.size) > 4 * LONG_SIDE:  # in two steps: an exact box first, it is fast
        image = image.reduce(max(1, max(image.size) // (4 * LONG_SIDE)))
    ink = np.asarray(image).min(axis=-1) < 240
    if not ink.any():
        return "blank"
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    short, long = min(image.size), max(image.size)
    if short < MIN_SIDE:
        return f"shorter side under {MIN_SIDE} pixels"
    if long > MAX_ASPECT * short:
        return f"aspect over {MAX_ASPECT:g}"
    if np.asarray(image.convert("L")).std() < 4:
        return "blank"
    scale = min(1.0, SHORT_SIDE / short, LONG_SIDE / long)
    small = image.resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=QUALITY, method=6)
    # Judged by what is stored, so that a test can repeat the judgement.
    stored = np.asarray(Image.open(encoded).convert("RGB"))
    return encoded.getvalue(), small.size, near_duplicates.canvas(stored)


def load(pictures: list[Picture], dropped: collections.Counter, workers: int) -> list[Picture]:
    """Fills in image, size and canvas; leaves out what cannot be used and what is there already."""
    kept, seen = [], set()
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for picture, result in zip(
            pictures, pool.map(normalise, [p.path for p in pictures], chunksize=16), strict=True
        ):
            if isinstance(result, str):
                dropped[result] += 1
                continue
            picture.image, picture.size, picture.canvas = result
            with Image.open(io.BytesIO(picture.image)) as decoded:
                pixels = hashlib.sha256(
                    repr(decoded.size).encode() + decoded.convert("RGB").tobytes()
                ).digest()
            if pixels in seen:
                dropped["exact duplicate"] += 1
                continue
            seen.add(pixels)
            kept.append(picture)
    return kept


# --------------------------------------------------------------------------------------- the splits
def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def choose(pictures: list[Picture]) -> list[Picture]:
    """Thins the machine-made series and the labels of the icon themes; a digest of the key decides,
    not luck."""
    ranked = sorted(pictures, key=lambda p: digest(p.key))
    seen: collections.Counter = collections.Counter()
    icons, kept = 0, []
    for picture in ranked:
        folder = picture.key.removeprefix("openclipart/").rpartition("/")[0]
        seen[folder] += 1
        if seen[folder] > SERIES_CAP.get(folder, seen[folder]):
            continue
        if picture.label == "icons":
            icons += 1
            picture.label = "icons" if icons <= ICON_LABELS else None
        kept.append(picture)
    classes = collections.Counter(p.label for p in kept)
    for picture in kept:
        if classes[picture.label] < MIN_CLASS:
            picture.label = None
    return sorted(kept, key=lambda p: p.key)


def split(pictures: list[Picture]) -> tuple[dict[str, list[Picture]], np.ndarray]:
    """Deals whole groups to train and test.

    A group is a test candidate if it is labelled throughout, not large (a class is then many
    independent drawings, not one big series) and resembles nothing outside itself. Resemblance is
    judged more loosely than membership of a group: joining at that threshold would chain half the
    corpus together.

    Returns:
      The splits, and the likeness of every test picture to every train picture (the larger of the
      two kinds).
    """
    scores = near_duplicates.likeness(np.stack([p.canvas for p in pictures]))
    authors = np.unique([p.author for p in pictures], return_inverse=True)[1]
    one_set = authors[:, None] == authors[None]
    near = alike(scores, *GROUP_THRESHOLDS) | (one_set & alike(scores, *SET_THRESHOLDS))
    group_of = np.array(near_duplicates.components(near, [p.series for p in pictures]))
    outside = alike(scores, *APART_THRESHOLDS) & (group_of[:, None] != group_of[None])
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, group in enumerate(group_of):
        groups[int(group)].append(i)
    classes = collections.Counter(p.label for p in pictures)
    filled: collections.Counter = collections.Counter()
    test = np.zeros(len(pictures), bool)
    for members in sorted(groups.values(), key=lambda m: digest("split " + pictures[m[0]].key)):
        labels = collections.Counter(pictures[i].label for i in members)
        if None in labels or len(members) > MAX_TEST_GROUP or outside[members].any():
            continue
        if all(filled[k] + n <= TEST_SHARE * classes[k] for k, n in labels.items()):
            test[members] = True
            filled.update(labels)
    rows, columns = np.flatnonzero(test), np.flatnonzero(~test)
    cross = np.maximum(scores["edges"], np.where(scores["edges"] > 0.5, scores["colour"], 0))
    splits = {"train": [pictures[i] for i in columns], "test": [pictures[i] for i in rows]}
    return splits, cross[np.ix_(rows, columns)]


# ------------------------------------------------------------------------------------------- output
def write(splits: dict[str, list[Picture]], folder: Path) -> None:
    """Writes the shards, each a mixture: the order is that of the keys' digests, so any prefix is a
    fair sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.arrayrecord"):
        old.unlink()
    for name, pictures in splits.items():
        total = SHARDS[name]
        ordered = sorted(pictures, key=lambda p: digest(p.key))
        for index in range(total):
            path = folder / records.shard_name(name, index, total)
            writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
            for p in ordered[index::total]:
                record = records.Record(p.image, p.captions, p.key, *p.size, "openclipart", p.label)
                writer.write(records.encode(record))
            writer.close()


def counts_table(splits: dict[str, list[Picture]]) -> str:
    """Markdown: pictures per class and split."""
    counts = {
        name: collections.Counter(p.label for p in pictures) for name, pictures in splits.items()
    }
    labels = sorted(k for k in set(counts["train"]) | set(counts["test"]) if k)
    rows = [("class", "train", "test"), ("---", "--:", "--:")]
    rows += [(label, counts["train"][label], counts["test"][label]) for label in labels]
    labelled = [sum(n for k, n in counts[name].items() if k) for name in ("train", "test")]
    rows += [
        ("all labelled", *labelled),
        ("without a label", counts["train"][None], counts["test"][None]),
    ]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def write_readme(folder: Path, table: str, dropped: collections.Counter) -> None:
    """Replaces what stands between the two marks of the README that lies beside the shards."""
    path = folder / "README.md"
    reasons = "; ".join(
        f"{reason} {n}" for reason, n in sorted(dropped.items(), key=lambda x: (-x[1], x[0]))
    )
    begin, end = "<!-- counts: begin -->", "<!-- counts: end -->"
    text = path.read_text("utf-8") if path.exists() else f"{begin}\n{end}\n"
    head, tail = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{head}{begin}\n{table}\n\nLeft out: {reasons}.\n{end}{tail}", "utf-8")


def draw_sheets(splits: dict[str, list[Picture]], cross: np.ndarray, folder: Path) -> None:
    """``closest.png``: the pairs most alike across the split; ``classes.png``: a row of pictures
    for each class."""
    folder.mkdir(parents=True, exist_ok=True)
    nearest = cross.argmax(axis=1)
    order = np.argsort(-cross.max(axis=1), kind="stable")[:240]
    tiles = [
        np.hstack([splits["test"][i].canvas, splits["train"][nearest[i]].canvas]) for i in order
    ]
    tiles = [np.pad(tile, ((2, 2), (2, 10), (0, 0)), constant_values=255) for tile in tiles]
    Image.fromarray(
        np.vstack([np.hstack(tiles[k : k + 12]) for k in range(0, len(tiles) // 12 * 12, 12)])
    ).save(folder / "closest.png")
    rows = []
    for label in sorted({p.label for p in splits["test"]}):
        row = [
            p.canvas
            for p in sorted(splits["test"], key=lambda p: digest(p.key))
            if p.label == label
        ][:20]
        rows.append(np.hstack(row + [np.full_like(row[0], 255)] * (20 - len(row))))
    Image.fromarray(np.vstack(rows)).save(folder / "classes.png")


def report(folder: Path) -> None:
    """Prints what trivial features reach on the class probe: the floor under every figure of a
    model."""
    from webssl_jax.evaluators.probes import floors  # and with it jax

    problem, figures = floors.floors(
        str(folder / "train-*.arrayrecord"), str(folder / "test-*.arrayrecord"), REPORT_SIZE
    )
    print(
        f"{len(problem.train_labels)} labelled train and {len(problem.test_labels)} test pictures, "
        f"{problem.num_classes} classes, {REPORT_SIZE} x {REPORT_SIZE}"
    )
    print("\n".join(floors.lines(figures)))


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(corpus.__file__).parent, help="folder of the shards"
    )
    parser.add_argument(
        "--scratch", type=Path, help="keep downloads here (default: a folder that is removed)"
    )
    parser.add_argument(
        "--sheets", type=Path, help="also draw contact sheets for the eye into this folder"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--report", action="store_true", help="only measure the trivial floors of --output"
    )
    args = parser.parse_args(argv)
    if args.report:
        report(args.output)
        return 0
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"{tool} not found: the corpus is built from Debian packages, on Debian or Ubuntu"
            )
    with tempfile.TemporaryDirectory(prefix="build_corpus_") as temporary:
        scratch = args.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        dropped: collections.Counter = collections.Counter()
        pictures = load(inventory(fetch(scratch.resolve()), dropped), dropped, args.workers)
    chosen = choose(pictures)
    dropped["thinned series"] = len(pictures) - len(chosen)
    splits, cross = split(chosen)
    write(splits, args.output)
    table = counts_table(splits)
    write_readme(args.output, table, dropped)
    if args.sheets:
        draw_sheets(splits, cross, args.sheets)
    size = sum(path.stat().st_size for path in args.output.iterdir() if path.is_file())
    print(table)
    print(f"left out: {dict(dropped)}")
    print(f"{sum(map(len, splits.values()))} pictures, {size / 1e6:.2f} MB in {args.output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
