"""What trivial features reach on two labelled sets: the floor under every model's figures."""

from __future__ import annotations

import pathlib
import tempfile

from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.probes import knn, logistic
from webssl_jax.evaluators.probes.labelled import LabelledOptions, LabelledPair, Problem

_KINDS = {"knn": knn.evaluate, "logistic": logistic.evaluate}


def floors(
    train: str, test: str, size: int, greyscale: bool = False
) -> tuple[Problem, dict[str, dict[str, dict[str, float]]]]:
    """(the problem, {trivial features: {"knn", "logistic": metrics}}) of labelled shards, at
    ``size`` x ``size`` pixels. greyscale: of greyscale copies of the images."""
    pair = LabelledPair(LabelledOptions(train, test, greyscale=greyscale))
    with tempfile.TemporaryDirectory() as place:
        cache = Cache(pathlib.Path(place))
        problem = pair.pixel_problem(Preprocess(size, size), cache)
        found = {
            kind: pair.trivial_outcomes(problem, cache, kind, evaluate)
            for kind, evaluate in _KINDS.items()
        }
    names = next(iter(found.values()))
    return problem, {name: {kind: found[kind][name].metrics for kind in found} for name in names}


def lines(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each of :func:`floors`."""
    return [
        f"{name:26} "
        + "   ".join(f"{kind} {x['top1']:.3f} +- {x['top1_se']:.3f}" for kind, x in kinds.items())
        for name, kinds in figures.items()
    ]
