"""Web-SSL in JAX, TPU first. ``load`` opens a run or any published weights as a ``Model``;
docs/python.md shows what a model can do.

Importing the package costs nothing: what is below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from webssl_jax.model import Model, list_models, load
    from webssl_jax.models.features import Features, Want

__version__ = "0.1.0"
__all__ = ["Features", "Model", "Want", "list_models", "load"]

_HOMES = {
    "Features": "webssl_jax.models.features",
    "Model": "webssl_jax.model",
    "Want": "webssl_jax.models.features",
    "list_models": "webssl_jax.model",
    "load": "webssl_jax.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'webssl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
