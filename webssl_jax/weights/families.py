"""The families of weight files by name. A new one is a file beside this and a row below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from webssl_jax.config import suggest
from webssl_jax.weights import hf
from webssl_jax.weights.tables import Table, WeightsError


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family sees a method (``methods.base.Method``) whose networks' configs are its fields.

    table: rows for the method's networks. needs: the networks, as fields of the method.
    model_class, config: class in ``transformers`` and the dict of its ``config.json``; None for
    families that do not live in folders of ``transformers``.
    """

    name: str
    needs: tuple[str, ...]
    table: Callable[[Any], Table]
    model_class: str | None = None
    config: Callable[[Any], dict[str, Any]] | None = None


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "hf-vit",
            ("encoder",),
            lambda method: hf.vit_table(method.encoder),
            "ViTModel",
            hf.vit_config,
        ),
        Family(
            "hf-vit-mae",
            ("encoder", "decoder"),
            lambda method: hf.vit_mae_table(method.encoder, method.decoder),
            "ViTMAEForPreTraining",
            hf.vit_mae_config,
        ),
    )
}


def table_of(name: str, method: Any) -> Table:
    """The table that turns the parameters of ``method`` into files of the family ``name`` and back.

    Raises:
      WeightsError: for an unknown family, or one that the method has not the networks for.
    """
    if name not in FAMILIES:
        raise WeightsError(f"no weight format {name!r}; {suggest(name, FAMILIES)}")
    family = FAMILIES[name]
    missing = [part for part in family.needs if getattr(method, part, None) is None]
    if missing:
        raise WeightsError(
            f"{name}: the method {type(method).__name__} has no {' and no '.join(missing)}"
        )
    return family.table(method)
