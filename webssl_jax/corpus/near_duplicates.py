"""Which pictures are versions of one drawing: small descriptors, correlations, connected
components.

Both descriptors are computed on trimmed pictures padded to a 64 x 64 square and averaged to
16 x 16, so that size, margin, compression and small shifts do not matter; each picture is also
compared with the other's mirror image. All pairs are compared, at once or in blocks: made for some
ten thousand pictures, not for a crawl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

CANVAS = 64
_CELLS = 16


def canvas(pixels: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8: a picture (H, W, 3) uint8, as large as fits, in the middle of a white
    square."""
    image = Image.fromarray(pixels)
    scale = CANVAS / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (CANVAS, CANVAS), "white")
    square.paste(
        image.resize((width, height), Image.Resampling.BILINEAR),
        ((CANVAS - width) // 2, (CANVAS - height) // 2),
    )
    return np.asarray(square)


def likeness(canvases: np.ndarray, others: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Correlations (N, M) of canvases (N, 64, 64, 3) and ``others`` (M, 64, 64, 3), by "edges" and
    by "colour".

    Edges join a drawing with its line-art or recoloured version; colour joins photographs and soft
    shapes. Without ``others`` the canvases are compared among themselves.
    """
    others = canvases if others is None else others
    plain, mirrored, bank = _describe(canvases), _describe(canvases[:, :, ::-1]), _describe(others)
    return {k: np.maximum(plain[k] @ bank[k].T, mirrored[k] @ bank[k].T) for k in bank}


def alike(scores: dict[str, np.ndarray], edges: float, colour: float) -> np.ndarray:
    """(N, N) bool: pairs whose edges correlate above ``edges``, or whose colours do above
    ``colour``.

    The floor under the edges of the latter drops pairs that share a silhouette and a colour, an
    orange and a smiley.
    """
    return (scores["edges"] > edges) | ((scores["colour"] > colour) & (scores["edges"] > 0.5))


def describe(canvases: np.ndarray) -> dict[str, np.ndarray]:
    """Descriptors of canvases (N, 64, 64, 3) for :func:`similar_pairs`: rows of length 1, by
    "edges" (N, 256), "colour" (N, 768), and both of the mirror image."""
    mirrored = _describe(canvases[:, :, ::-1])
    return _describe(canvases) | {f"mirrored {name}": x for name, x in mirrored.items()}


def similar_pairs(
    bank: Mapping[str, np.ndarray], rows: np.ndarray, edges: float, colour: float, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The pairs of ``rows`` (n,) of a bank of :func:`describe` with all its rows that are alike.

    The same judgement as :func:`likeness` and :func:`alike`, in blocks: for a hundred thousand
    pictures rather than ten. A pair within ``rows`` is found twice; a row is no pair with itself.

    Returns:
      Row numbers (i, j) of the pairs, and their correlations by "edges" and by "colour".
    """
    every = {name: x.astype(np.float32) for name, x in bank.items()}
    found = []
    for start in range(0, len(rows), chunk):
        mine = np.asarray(rows[start : start + chunk])
        scores = {
            kind: np.maximum(
                every[kind][mine] @ every[kind].T, every[f"mirrored {kind}"][mine] @ every[kind].T
            )
            for kind in ("edges", "colour")
        }
        near = alike(scores, edges, colour)
        near[np.arange(len(mine)), mine] = False
        i, j = np.nonzero(near)
        found.append((mine[i], j, scores["edges"][i, j], scores["colour"][i, j]))
    if not found:
        none = np.zeros(0)
        return none.astype(int), none.astype(int), {"edges": none, "colour": none}
    i, j, by_edges, by_colour = (np.concatenate(part) for part in zip(*found, strict=True))
    return i, j, {"edges": by_edges, "colour": by_colour}


def components(near: np.ndarray, series: Sequence[str]) -> list[int]:
    """Group of each of N pictures, named by its first member: connected by ``near`` (N, N) or by
    equal ``series``."""
    parent = list(range(len(series)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    pairs = [(i, first.setdefault(name, i)) for i, name in enumerate(series)]
    pairs += zip(*np.nonzero(np.triu(near, 1)), strict=True)
    for i, j in pairs:
        a, b = root(int(i)), root(int(j))
        parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(series))]


def _describe(canvases: np.ndarray) -> dict[str, np.ndarray]:
    ink = (255.0 - canvases.astype(np.float32)) / 255.0
    across, down = np.zeros_like(ink[..., :1]), np.zeros_like(ink[..., :1])
    across[:, :, 1:] = np.abs(np.diff(ink, axis=2)).max(axis=-1, keepdims=True)
    down[:, 1:] = np.abs(np.diff(ink, axis=1)).max(axis=-1, keepdims=True)
    # so that a faint line counts as much as a bold one
    edges = np.sqrt(np.minimum(np.maximum(across, down), 0.3))
    return {"edges": _unit(_pooled(edges)), "colour": _unit(_pooled(ink))}


def _pooled(images: np.ndarray) -> np.ndarray:
    """(N, 64, 64, C) averaged to (N, 16 * 16 * C)."""
    n, side, _, channels = images.shape
    cell = side // _CELLS
    return images.reshape(n, _CELLS, cell, _CELLS, cell, channels).mean(axis=(2, 4)).reshape(n, -1)


def _unit(features: np.ndarray) -> np.ndarray:
    """(N, F) rows centred and scaled to length 1, so that a dot product is a correlation."""
    centred = features - features.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
