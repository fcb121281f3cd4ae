"""Floating-point operations of matrix products, counted from a jaxpr: independent of the compiler
and of the reader that is to be checked."""

from __future__ import annotations

import math

import jax
from jax.extend import core


def count(fn, *args) -> float:
    """Of one call of ``fn``, over all devices, two operations a multiply-add. A scan counts as many
    times as it is long."""
    return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2.0 * out * math.prod(shape[axis] for axis in contracted)
            continue
        assert name != "conv_general_dilated", "not counted: our models have none"
        inner = sum(_jaxpr(j) for value in params.values() for j in _jaxprs(value))
        assert not (inner and name in ("while", "cond")), f"{name}: how often it runs is not said"
        total += inner * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(value) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [found for item in value for found in _jaxprs(item)]
    return []
