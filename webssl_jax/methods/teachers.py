"""Teachers that are the running average of their student."""

from __future__ import annotations

from typing import Any

import jax

from webssl_jax.methods.base import Params


def running_average(teacher: Params, params: Params, momentum: jax.Array) -> Params:
    """``momentum`` * teacher + (1 - ``momentum``) * student, of the networks that the teacher has
    (Tarvainen and Valpola, arXiv 1703.01780)."""
    own = {name: params[name] for name in teacher}
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, own)


def check_shares(method: Any, *names: str) -> None:
    """Refuses momenta that are no share of 1.

    Raises:
      ValueError: naming the first field of ``method`` that does not lie in [0, 1].
    """
    for name in names:
        if not 0 <= getattr(method, name) <= 1:
            raise ValueError(f"{name} = {getattr(method, name)} must lie in [0, 1]")
