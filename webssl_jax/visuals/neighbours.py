"""Query images and what the features take for alike: nearest neighbours by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from webssl_jax.visuals import drawing

SAME = (44, 138, 87)
OTHER = (208, 72, 44)


def nearest(
    queries: np.ndarray, bank: np.ndarray, k: int, own: Sequence[int] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` rows of ``bank`` with the largest cosine to each query, the nearest first; of equal
    ones the first.

    Args:
      queries: (q, D). bank: (n, D). A row of zeros has cosine 0 with everything.
      own: for each query its own row in the bank, which is left out.

    Returns:
      (indices (q, k), cosines (q, k) float32); k becomes the number of candidates if that is less.

    Raises:
      ValueError: if nothing is left to compare with.
    """
    k = min(k, len(bank) - (own is not None))
    if k < 1 or not len(queries):
        raise ValueError(f"{len(queries)} queries among {len(bank)} images: nothing to compare")
    cosines = _unit(queries) @ _unit(bank).T
    ranked = cosines.copy()
    if own is not None:
        ranked[np.arange(len(queries)), np.asarray(own)] = -np.inf
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


def neighbour_sheet(
    images: drawing.Images,
    queries: Sequence[int] | np.ndarray,
    indices: np.ndarray,
    cosines: np.ndarray,
    labels: Sequence[str | None] | None = None,
    captions: Sequence[str] | None = None,
    title: str = "Nearest neighbours in feature space",
    subtitle: str = "",
) -> np.ndarray:
    """One row a query: the query, then its neighbours. With labels, a neighbour that has the
    query's label has a green frame.

    Args:
      images: the bank, n images (H, W, 3) uint8.
      queries: q rows of the bank. indices, cosines: (q, k) of :func:`nearest`.
      labels: n class names; None where unknown. captions: n texts, shown where there is no label.
    """
    labels = [None] * len(images) if labels is None else list(labels)
    captions = [""] * len(images) if captions is None else list(captions)
    k = indices.shape[1]
    cells, texts, same, judged = [], [], 0, 0
    frames: list[list[tuple[int, int, int] | None]] = []
    for query, found, near in zip(queries, indices, cosines, strict=True):
        cells.append([images[query], *(images[i] for i in found)])
        texts.append([labels[query] or captions[query]])
        frames.append([None])
        for i, cosine in zip(found, near, strict=True):
            texts[-1].append(f"{cosine:.3f}  {labels[i] or captions[i]}".rstrip())
            known = labels[query] is not None and labels[i] is not None
            hit = known and labels[i] == labels[query]
            frames[-1].append(SAME if hit else None)
            same, judged = same + hit, judged + known
    counts = f"Green frames: the query's label ({same} of {judged})." if judged else ""
    return drawing.table(
        cells,
        drawing.cell_size(images),
        heads=("query", *(str(i + 1) for i in range(k))),
        captions=texts,
        title=title,
        subtitle=f"{subtitle} The number below a neighbour is its cosine. {counts}".strip(),
        gap_after=(0,),
        frames=frames,
    )


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)
