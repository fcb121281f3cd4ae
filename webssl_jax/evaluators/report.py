"""The report a person reads: a plain-text table of figures, and what they mean in sentences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

from webssl_jax.evaluators.base import Difference, Score, paired_difference
from webssl_jax.evaluators.frozen import Measurement

WIDTH = 100


def report_table(
    result: Measurement, baselines: Mapping[str, Measurement], step0: Measurement | None = None
) -> str:
    """Aligned rows (trivial features, step 0, this model) by columns (k-NN, linear probe), then
    plain sentences.

    Args:
      result: the model at hand.
      baselines: ``FrozenFeatureEvaluation.baselines()``.
      step0: the same network before training; None when it is not known, or when ``result`` is it.
    """
    rivals = dict(baselines)
    if step0 is not None:
        rivals["step 0 (untrained)"] = step0
    rows = rivals | {f"step {result.step:,} (this model)": result}
    cells = [("features", "k-NN top-1", "linear top-1")]
    cells += [(name, _cell(row.knn), _cell(row.linear)) for name, row in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 4))
    guess = baselines["majority class"].knn.chosen if "majority class" in baselines else None
    paired = all(row.data == result.data for row in rivals.values())
    notes = [
        f"Share of {len(result.linear.correct):,} test images put into the right one of "
        f"{result.classes} classes, ± one standard error; {result.train_images:,} labelled "
        "training images" + (f". Majority class: {guess}." if guess else "."),
        f"k-NN: the class that the most similar training images vote for ({result.knn.chosen}; "
        "weighted, as in DINOv2). Nothing is learned on top of the features.",
        f"Linear: one linear layer trained on the frozen features ({result.linear.chosen}; chosen "
        "on held-out training images, never on the test images).",
        "Below, clearly = by more than two standard errors of the difference"
        + (", paired image by image:" if paired else "; the images differ, so nothing is paired:"),
    ]
    for column in ("linear", "knn"):
        notes += [
            _verdict(column, name, result, rival)
            for name, rival in rivals.items()
            if name != "majority class"
        ]
    wrapped = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join(lines + [""] + wrapped)


def compare(a: Measurement, b: Measurement, column: str) -> tuple[Difference, bool]:
    """Accuracy of ``a`` minus that of ``b`` in ``column`` ("knn" or "linear"), and whether it is
    paired.

    Measurements of other images cannot be paired; their standard errors then add in quadrature.
    """
    one: Score = getattr(a, column)
    two: Score = getattr(b, column)
    if a.data == b.data:
        return paired_difference(one.correct, two.correct), True
    return Difference(one.top1 - two.top1, math.hypot(one.se, two.se)), False


def _cell(score: Score) -> str:
    return f"{score.top1:.3f} ± {score.se:.3f}"


def _verdict(column: str, name: str, result: Measurement, rival: Measurement) -> str:
    (value, se), _ = compare(result, rival, column)
    where = {"linear": "Linear", "knn": "k-NN"}[column]
    if Difference(value, se).clear:
        words = "clearly above"
    elif Difference(-value, se).clear:
        words = "clearly below"
    else:
        words = "not clearly different from"
    return f"  {where}: {words} {name}: {value:+.3f} ± {se:.3f}"
