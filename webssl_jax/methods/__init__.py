"""The training methods by name. A new one is a file here, a row below and a config."""

from __future__ import annotations

import importlib

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, suggest
from webssl_jax.methods.base import Method

# name -> "module:class". Imported when used, so that a method's dependencies are its own.
METHODS = {
    "clip": "webssl_jax.methods.clip.method:CLIP",
    "dino": "webssl_jax.methods.dino.method:DINO",
    "distill": "webssl_jax.methods.distill.method:Distill",
    "ijepa": "webssl_jax.methods.ijepa.method:IJEPA",
    "lejepa": "webssl_jax.methods.lejepa.method:LeJEPA",
    "mae": "webssl_jax.methods.mae.method:MAE",
    "mocov3": "webssl_jax.methods.mocov3.method:MoCoV3",
    "simdino": "webssl_jax.methods.simdino.method:SimDINO",
    "supervised": "webssl_jax.methods.supervised.method:Supervised",
    "vqa": "webssl_jax.methods.vqa.method:VQA",
}


def create(config: ConfigDict) -> Method:
    """The method that ``config.method.name`` asks for.

    Raises:
      ConfigError: for an unknown name, or whatever the method finds wrong with its config.
    """
    name = config.method.name
    if name not in METHODS:
        raise ConfigError(f"config.method.name: no method {name!r}; {suggest(name, METHODS)}")
    module, cls = METHODS[name].split(":")
    try:
        return getattr(importlib.import_module(module), cls).from_config(config)
    except ValueError as error:
        raise ConfigError(f"config.model or config.method: {error}") from error
