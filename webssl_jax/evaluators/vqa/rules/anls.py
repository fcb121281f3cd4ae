"""Average normalised Levenshtein similarity (Biten et al., 2019), the measure of DocVQA."""

from __future__ import annotations

from collections.abc import Iterable

THRESHOLD = 0.5  # an answer less similar than this says something else


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, remove or replace until ``a`` is ``b`` (Levenshtein)."""
    above = list(range(len(b) + 1))
    for row, ours in enumerate(a, 1):
        line = [row]
        for column, theirs in enumerate(b, 1):
            replaced = above[column - 1] + (ours != theirs)
            line.append(min(above[column] + 1, line[-1] + 1, replaced))
        above = line
    return above[-1]


def similarity(answer: str, truths: Iterable[str]) -> float:
    """0 to 1: the best over ``truths`` of 1 - distance / length of the longer, in lower case and
    without blanks around; 0 below a half."""
    answer = answer.lower().strip()
    best = 0.0
    for truth in truths:
        truth = truth.lower().strip()
        longer = max(len(answer), len(truth))
        best = max(best, 1 - edit_distance(answer, truth) / longer if longer else 1.0)
    return best if best >= THRESHOLD else 0.0
