"""Rooms with furniture, drawn with the depth of each pixel: exact truth where no depth set can be
had.

Size of the room, colours, light, camera and what stands where are drawn anew for every room. What
stands in test rooms is in no training room, nor is a thing of the same name.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from webssl_jax.corpus import furniture
from webssl_jax.corpus.furniture import Model
from webssl_jax.corpus.mini_web import packages, readers
from webssl_jax.corpus.mini_web.catalogue import BY_NAME
from webssl_jax.data import annotations as annotation
from webssl_jax.data import records

FURNITURE = "sweethome3d"
PARTS = ("train", "test")
_TEST = 4  # things of every fourth name are of the test rooms
_NEAR = 0.5  # metres, of the nearest thing
_VIEW = np.deg2rad(66)  # across an image
_FINER = 2  # pixels drawn along a side of one
_AT_ONCE = 2**21  # pixels looked at in one piece
_TRIES = 12
_TILES = 16


class Drawn(NamedTuple):
    """Of each pixel. triangle: (H, W) int, the nearest one, -1 for none. depth: (H, W) float32
    along the view, infinite for none. shares: (H, W, 3) float32, how much of each of its
    corners."""

    triangle: np.ndarray
    depth: np.ndarray
    shares: np.ndarray


def rasterise(corners: np.ndarray, focal: float, height: int, width: int) -> Drawn:
    """Triangles (T, 3, 3) as a camera sees them: x right, y up, z along the view, all in front
    of it. ``focal`` is in pixels. A pixel is seen through its middle."""
    drawn = Drawn(
        np.full(height * width, -1),
        np.full(height * width, np.inf, np.float32),
        np.zeros((height * width, 3), np.float32),
    )
    z = corners[..., 2]
    flat = corners[..., :2] * [focal, -focal] / z[..., None] + [width / 2, height / 2]
    low = np.floor(flat.min(axis=1)).clip(0, [width, height]).astype(int)
    size = (np.ceil(flat.max(axis=1)).clip(0, [width, height]) - low).max(axis=1)
    area = _cross(flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0])
    side = 1
    while side < 2 * max(height, width):  # those of a like size at once
        alike = np.flatnonzero((size > side // 2) & (size <= side) & (np.abs(area) > 1e-9))
        step = max(_AT_ONCE // side**2, 1)
        for start in range(0, len(alike), step):
            some = alike[start : start + step]
            _draw(drawn, some, flat[some], z[some], low[some], side, height, width)
        side *= 2
    return Drawn(*(x.reshape(height, width, *x.shape[1:]) for x in drawn))


def _draw(
    drawn: Drawn,
    numbers: np.ndarray,
    flat: np.ndarray,
    z: np.ndarray,
    low: np.ndarray,
    side: int,
    height: int,
    width: int,
) -> None:
    """Some triangles, none wider or higher than ``side`` pixels, where they are the nearest."""
    x, y = (low[:, i, None] + np.arange(side) for i in (0, 1))  # (n, side)
    shares = []  # (n, side, side) of each corner: they grow evenly along rows and columns
    for corner in (0, 1, 2):
        at, start, end = flat[:, corner], flat[:, corner - 2], flat[:, corner - 1]
        edge = (end - start) / _cross(end - start, at - start)[:, None]
        along = edge[:, :1] * (y + 0.5 - start[:, 1:])
        across = edge[:, 1:] * (x + 0.5 - start[:, :1])
        shares.append(along[:, :, None] - across[:, None, :])
    inside = (shares[0] >= 0) & (shares[1] >= 0) & (shares[2] >= 0)
    inside &= (y < height)[:, :, None] & (x < width)[:, None, :]
    which, row, column = np.nonzero(inside)
    pixel = y[which, row] * width + x[which, column]
    near = np.stack([share[inside] for share in shares], axis=-1) / z[which]
    depth = (1 / near.sum(axis=-1)).astype(np.float32)  # 1 / z is straight on the screen
    order = np.argsort(-depth, kind="stable")  # of several for one pixel the last is kept
    order = order[depth[order] < drawn.depth[pixel[order]]]
    drawn.triangle[pixel[order]] = numbers[which[order]]
    drawn.depth[pixel[order]] = depth[order]
    drawn.shares[pixel[order]] = near[order] * depth[order, None]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


class Camera(NamedTuple):
    """place: (3,), in the room. turn: (3, 3), from the room's directions to the camera's: right,
    up, along the view."""

    place: np.ndarray
    turn: np.ndarray


def room(
    rng: np.random.Generator, models: Sequence[Model], height: int, width: int
) -> tuple[Image.Image, np.ndarray]:
    """(image of ``width`` x ``height`` pixels, depth (height, width) float32 in metres, along the
    view). Rooms are 3 to 6 metres wide, 3 to 8 long and 2.4 to 3 high, with up to nine things."""
    size = rng.uniform([3, 2.4, 3], [6, 3, 8])
    camera = _camera(rng, size)
    things = _furnish(rng, models, size, camera)
    high, wide = height * _FINER, width * _FINER
    focal = wide / 2 / np.tan(_VIEW / 2)
    colours, depth, points, normals = _walls(rng, size, camera, focal, high, wide)
    if things:
        corners = np.concatenate([corners for _, corners in things])
        seen = rasterise((corners - camera.place) @ camera.turn.T, focal, high, wide)
        front = seen.depth < depth
        depth = np.where(front, seen.depth, depth)
        triangles = corners[seen.triangle[front]]
        points[front] = (triangles * seen.shares[front][..., None]).sum(axis=1)
        normals[front] = np.cross(*(triangles[:, i] - triangles[:, 0] for i in (1, 2)))
        colours[front] = _painted([model for model, _ in things], seen, front)
    image = colours * _lit(rng, size, points, normals)[..., None]
    image = image.reshape(height, _FINER, width, _FINER, 3).mean(axis=(1, 3)).clip(0, 1)
    return Image.fromarray((image * 255).astype(np.uint8)), depth[::_FINER, ::_FINER]


def _camera(rng: np.random.Generator, size: np.ndarray) -> Camera:
    """Of a person near one of the short walls, who looks along the room and a little down."""
    place = np.array([rng.uniform(0.3, 0.7) * size[0], rng.uniform(1.1, 1.8), 0.1])
    yaw, pitch = np.deg2rad([rng.uniform(-25, 25), rng.uniform(0, 25)])
    ahead = np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.array([np.cos(yaw), 0, -np.sin(yaw)])
    return Camera(place, np.stack([right, np.cross(ahead, right), ahead]))


def _furnish(
    rng: np.random.Generator, models: Sequence[Model], size: np.ndarray, camera: Camera
) -> list[tuple[Model, np.ndarray]]:
    """(thing, its triangles in the room): none in another, in a wall, or at the camera."""
    placed: list[tuple[Model, np.ndarray]] = []
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(rng.integers(4, 10)):
        model = models[int(rng.integers(len(models)))]
        for _ in range(_TRIES):
            angle = np.deg2rad(90 * rng.integers(4) + rng.uniform(-10, 10))
            turn = np.array(
                [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
            )
            corners = model.corners @ turn + rng.uniform(0, 1, 3) * size * [1, 0, 1]
            low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
            apart = all(((low > b) | (high < a))[[0, 2]].any() for a, b in taken)
            ahead = ((corners - camera.place) @ camera.turn[2]).min() > _NEAR
            if apart and ahead and (low > -1e-3).all() and (high < size).all():
                placed.append((model, corners))
                taken.append((low, high))
                break
    return placed


def _walls(
    rng: np.random.Generator,
    size: np.ndarray,
    camera: Camera,
    focal: float,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each pixel of the empty room (colour, depth, point, normal): (H, W, 3), (H, W), ... The
    floor has tiles, walls and ceiling are nearly plain."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    ahead = np.ones_like(x)  # so that lengths along a ray are depths
    rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, ahead], -1) @ camera.turn
    with np.errstate(divide="ignore"):
        until = (np.where(rays > 0, size, 0) - camera.place) / rays
    axis = until.argmin(axis=-1)
    depth = until.min(axis=-1)
    points = camera.place + rays * depth[..., None]
    normals = np.eye(3)[axis]
    face = 2 * axis + (np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0)
    colours = rng.uniform(0.35, 0.95, (6, 1)) + rng.uniform(-0.15, 0.15, (6, 3))
    colours[1] = colours[5] = colours[0]  # walls alike
    tiles = rng.uniform(-1, 1, (_TILES, _TILES)) * rng.uniform(0.05, 0.25)
    a, b = ((points // rng.uniform(0.1, 0.6, 3)).astype(int) % _TILES)[..., [0, 2]].T
    pattern = np.where(face == 2, tiles[a, b].T, 0)
    return colours[face] * (1 + pattern)[..., None], depth.astype(np.float32), points, normals


def _painted(models: Sequence[Model], seen: Drawn, front: np.ndarray) -> np.ndarray:
    """Colours (n, 3) of the pixels ``front``, out of the textures of what is there."""
    first = np.cumsum([0] + [len(model.textures) for model in models])
    material = np.concatenate([model.material + start for model, start in zip(models, first)])
    textures = np.concatenate([model.textures for model in models])
    triangle = seen.triangle[front]
    uv = np.concatenate([model.uv for model in models])[triangle]
    u, v = (uv * seen.shares[front][..., None]).sum(axis=1).T
    side = textures.shape[1]
    rows, columns = (np.floor(x * side).astype(int) % side for x in (-v, u))
    return textures[material[triangle], rows, columns]


def _lit(
    rng: np.random.Generator, size: np.ndarray, points: np.ndarray, normals: np.ndarray
) -> np.ndarray:
    """Brightness (H, W) under a lamp below the ceiling; surfaces are bright on both sides."""
    lamp = size * [rng.uniform(0.2, 0.8), 0.95, rng.uniform(0.2, 0.8)]
    to = lamp - points
    lengths = np.linalg.norm(to, axis=-1) * np.linalg.norm(normals, axis=-1)
    facing = np.abs((to * normals).sum(axis=-1)) / np.maximum(lengths, 1e-9)
    away = 1 + 0.05 * (to**2).sum(axis=-1)
    return rng.uniform(0.9, 1.2) * (0.4 + 0.6 * facing) / away**0.5


def read(cache: Path) -> dict[str, list[Model]]:
    """{"train", "test": their furniture}, out of the package in ``cache``."""
    models: dict[str, list[Model]] = {part: [] for part in PARTS}
    for package in BY_NAME[FURNITURE].packages:
        archive = package.archive(cache)
        assert archive is not None  # it was downloaded
        for _, catalogue in sorted(packages.read(archive, furniture.CATALOGUES).items()):
            for model in furniture.read(catalogue):
                models[_part(model.name)].append(model)
    return models


def _part(name: str) -> str:
    return "train" if int(readers.digest(name), 16) % _TEST else "test"


def write(
    output: Path,
    name: str,
    models: Sequence[Model],
    count: int,
    width: int,
    seed: int,
    done: Callable[[int], None],
) -> None:
    """``count`` rooms of ``width`` pixels, three quarters as high, as a shard in ``output``, a
    folder that exists. ``done(1)`` is called after each."""
    rng, height = np.random.default_rng(seed), width * 3 // 4
    shard = output / records.shard_name(name, 0, 1)
    writer = ArrayRecordWriter(str(shard), records.WRITER_OPTIONS)
    for number in range(count):
        image, depth = room(rng, models, height, width)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        annotated = {"depth": annotation.encode_depth(depth)}
        key = f"{name}/{number}"
        record = records.Record(
            file.getvalue(), (), key, width, height, "rooms", annotations=annotated
        )
        writer.write(records.encode(record))
        done(1)
    writer.close()
