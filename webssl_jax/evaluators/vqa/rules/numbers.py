"""Relaxed accuracy (Masry et al., 2022): numbers are right within five percent."""

from __future__ import annotations

TOLERANCE = 0.05


def number(text: str) -> float | None:
    """What ``float`` reads: "1e3", "45." and "nan" are numbers, "45%" and "1,200" are not."""
    try:
        return float(text)
    except ValueError:
        return None


def close(value: float, reference: float) -> bool:
    """Within five percent of ``reference``; infinity is not close to itself, nor is nan."""
    return abs(value - reference) <= abs(reference) * TOLERANCE


def same_or_close(answer: str, truth: str) -> bool:
    """The same text, or a number within five percent **of the answer**, as Cambrian's MathVista and
    MMMU have it: 12.6 passes for 12, and "inf" for every number."""
    if answer == truth:
        return True
    ours, theirs = number(answer), number(truth)
    return ours is not None and theirs is not None and close(theirs, ours)
