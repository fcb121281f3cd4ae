"""Furniture as triangles in metres, out of the catalogues of Sweet Home 3D (OBJ files in .sh3f
archives, which are zip files with a list of names and sizes)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.readers import words

CATALOGUES = re.compile(r"\.sh3f$")
_LIST = "PluginFurnitureCatalog.properties"
_WANTED = re.compile(rf"^{_LIST}$|(?i:\.(obj|mtl|png|jpe?g)$)")
_KINDS = ("Bathroom", "Bedroom", "Characters", "Kitchen", "Living room", "Miscellaneous", "Office")
_LOW, _HIGH = 0.3, 2.3  # metres: the longest side of a thing that stands in a room
_LARGEST = 300_000  # bytes of an OBJ file
_TEXTURE = 32  # pixels of a side
_SEEN_THROUGH = 0.5  # opacity below which a surface is left out
_GREY = (0.7, 0.7, 0.7)


class Model(NamedTuple):
    """A thing that stands on y = 0, its middle at x = z = 0, seen from +z.

    name: of the catalogue. corners: (T, 3, 3) float32, metres, of T triangles. uv: (T, 3, 2), of a
    texture's width and height, from its lower left. material: (T,), a number of ``textures``
    (M, side, side, 3) float32, 0 to 1.
    """

    name: str
    corners: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    textures: np.ndarray


def read(catalogue: bytes) -> Iterator[Model]:
    """Everything movable in an .sh3f archive that is as large as furniture and stands on the
    floor."""
    files = packages.zipped(catalogue, _WANTED)
    rows: dict[str, dict[str, str]] = {}
    listed = files[_LIST].decode("latin-1")
    for key, number, value in re.findall(r"^([a-zA-Z]+)#(\d+)=(.*)$", listed, re.MULTILINE):
        rows.setdefault(number, {})[key] = value.strip()
    for row in rows.values():
        path = row.get("model", "").lstrip("/")
        stands = row.get("movable") == "true" and "elevation" not in row
        if not stands or row.get("category") not in _KINDS or path not in files:
            continue
        size = np.array([float(row[side]) for side in ("width", "height", "depth")]) / 100
        if _LOW <= size.max() <= _HIGH and len(files[path]) <= _LARGEST:
            yield _model(row, size, files, path)


def _model(row: Mapping[str, str], size: np.ndarray, files: packages.Tree, path: str) -> Model:
    corners, uv, material, names, library = _obj(files[path].decode("latin-1"))
    folder = PurePosixPath(path).parent
    made = _materials(files, folder, library)
    textures = np.stack([made[n][0] if n in made else _plain(_GREY) for n in names])
    solid = np.array([n not in made or made[n][1] >= _SEEN_THROUGH for n in names])[material]
    if "modelRotation" in row:
        turn = np.array(row["modelRotation"].split(), np.float32).reshape(3, 3)
        corners = corners @ turn.T
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    middle = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    corners = ((corners - middle) * (size / np.maximum(high - low, 1e-6))).astype(np.float32)
    return Model(words(row["name"]), corners[solid], uv[solid], material[solid], textures)


def _obj(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], str]:
    """(corners, uv, material, names of materials, the MTL file) of an OBJ file; polygons become
    fans."""
    points: list[list[float]] = []
    places: list[list[float]] = [[0.0, 0.0]]  # the first is of corners without one
    of_points, of_places, material = [], [], []
    names, current, library = [""], 0, ""
    for line in text.splitlines():
        what, *values = line.split() or [""]
        if what == "v":
            points.append([float(x) for x in values[:3]])
        elif what == "vt":
            places.append([float(x) for x in values[:2]])
        elif what == "f":
            found = [_corner(x, len(points), len(places)) for x in values]
            for second, third in zip(found[1:], found[2:]):
                fan = (found[0], second, third)
                of_points.append([point for point, _ in fan])
                of_places.append([place for _, place in fan])
                material.append(current)
        elif what == "usemtl":
            name = " ".join(values)
            if name not in names:
                names.append(name)
            current = names.index(name)
        elif what == "mtllib":
            library = " ".join(values)
    corners = np.array(points, np.float32)[np.array(of_points)]
    uv = np.array(places, np.float32)[np.array(of_places)]
    return corners, uv, np.array(material), names, library


def _corner(text: str, points: int, places: int) -> tuple[int, int]:
    """Numbers, from 0, of a point and of a place in the texture; negative ones count from the
    end."""
    point, place = [int(x or 0) for x in (*text.split("/"), "")[:2]]
    return (point - 1 if point > 0 else points + point), (place if place >= 0 else places + place)


def _materials(
    files: packages.Tree, folder: PurePosixPath, library: str
) -> dict[str, tuple[np.ndarray, float]]:
    """{name: (texture, opacity)} of an MTL file. A colour is a texture of one colour."""
    made: dict[str, tuple[np.ndarray, float]] = {}
    name = ""
    for line in files.get(str(folder / library), b"").decode("latin-1").splitlines():
        what, *values = line.split() or [""]
        if what == "newmtl":
            name = " ".join(values)
            made[name] = (_plain(_GREY), 1.0)
        elif what == "Kd":
            made[name] = (_plain([float(x) for x in values[:3]]), made[name][1])
        elif what == "d":
            made[name] = (made[name][0], float(values[-1]))
        elif what == "map_Kd" and (picture := files.get(str(folder / " ".join(values)))):
            image = Image.open(io.BytesIO(picture)).convert("RGB").resize((_TEXTURE, _TEXTURE))
            made[name] = (np.asarray(image, np.float32) / 255, made[name][1])
    return made


def _plain(colour: Sequence[float]) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.float32), (_TEXTURE, _TEXTURE, 3))
