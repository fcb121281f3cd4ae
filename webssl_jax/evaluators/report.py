"""The report a person reads: a plain-text table of figures, and what they mean in sentences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from webssl_jax.evaluators.base import Difference, Score, paired_difference
from webssl_jax.evaluators.frozen import Measurement
from webssl_jax.evaluators.results import Result
from webssl_jax.evaluators.retrieval import KS, WAYS, Retrieval
from webssl_jax.evaluators.zero_shot import ZeroShot

WIDTH = 100


def report(
    result: Result, baselines: Mapping[str, Measurement], step0: Result | None = None
) -> str:
    """A table of each part of ``result``, with what its figures mean. Arguments as of
    :func:`report_table`."""
    tables = []
    if result.frozen:
        tables.append(report_table(result.frozen, baselines, step0 and step0.frozen))
    for part, table in (("zero_shot", _zero_shot_table), ("retrieval", _retrieval_table)):
        now, first = getattr(result, part), step0 and getattr(step0, part)
        if now:
            rows = {"chance": now.chance}
            if first and first.data == now.data:  # of other images or prompts it says nothing
                rows["step 0 (untrained)"] = first.metrics()
            rows[f"step {result.step:,} (this model)"] = now.metrics()
            tables.append(table(now, rows))
    return "\n\n".join(tables)


def _zero_shot_table(now: ZeroShot, rows: Mapping[str, Mapping[str, float]]) -> str:
    heads = ("top-1", "eval/zero_shot/top1"), ("top-5", "eval/zero_shot/top5")
    cells = [("zero-shot", *(head for head, _ in heads))]
    cells += [(name, *(_figure(row, key) for _, key in heads)) for name, row in rows.items()]
    note = (
        f"Share of {now.test_images:,} test images put into the right one of {now.classes} "
        "classes, or with it among the first five, ± one standard error: the class whose name, in "
        f"{now.templates} templates, is closest to the image. Nothing is learned from labels."
    )
    return _with_note(cells, note)


def _retrieval_table(now: Retrieval, rows: Mapping[str, Mapping[str, float]]) -> str:
    cells = [("retrieval", *(f"R@{k}" for k in KS))]
    for way in WAYS:
        for name, row in rows.items():
            figures = (_figure(row, f"eval/retrieval/{way}_r{k}") for k in KS)
            cells.append((f"{way.replace('_', ' ')}, {name}", *figures))
    images, texts = now.counts
    note = (
        f"R@k: share of {images:,} images with one of their own captions "
        f"among the k closest of {texts:,} texts, and of texts with one of "
        "their own images among the k closest, ± one standard error."
    )
    return _with_note(cells, note)


def _figure(row: Mapping[str, float], key: str) -> str:
    spread = f" ± {row[f'{key}_se']:.3f}" if f"{key}_se" in row else ""
    return f"{row[key]:.3f}{spread}"


def _with_note(cells: Sequence[Sequence[str]], note: str) -> str:
    return "\n".join([*aligned(cells), "", textwrap.fill(note, WIDTH, subsequent_indent="  ")])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines; the first is the head, with a rule below it."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


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
    lines = aligned(cells)
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
