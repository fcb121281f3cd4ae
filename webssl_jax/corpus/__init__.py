"""The embedded corpus: a few thousand public-domain drawings with captions and class names. See
README.md here."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "test")


def pattern(split: str) -> str:
    """The glob of a split's shards, ``"train"`` or ``"test"``.

    Raises:
      ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"the embedded corpus has the splits {', '.join(SPLITS)}; not {split!r}")
    return str(Path(__file__).parent / f"{split}-*.arrayrecord")
