"""The families of weight files by name. A new one is a file beside this and a row below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from webssl_jax.config import suggest
from webssl_jax.weights import hf, mae
from webssl_jax.weights.tables import Table, WeightsError


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family sees a method (``methods.base.Method``) whose networks' configs are its fields.

    table: rows for the method's networks. needs: the networks, as fields of the method.
    library, opens: who opens its files, and with what.
    config: the dict of its ``config.json``; None for a family that is a single ``.pth`` file.
    fixed_eps: its code has an epsilon built in; the files do not say.
    """

    name: str
    needs: tuple[str, ...]
    table: Callable[[Any], Table]
    library: str
    opens: str
    config: Callable[[Any], dict[str, Any]] | None = None
    fixed_eps: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "hf-vit",
            ("encoder",),
            lambda method: hf.vit_table(method.encoder),
            "transformers",
            "ViTModel",
            hf.vit_config,
        ),
        Family(
            "hf-vit-mae",
            ("encoder", "decoder"),
            lambda method: hf.vit_mae_table(method.encoder, method.decoder),
            "transformers",
            "ViTMAEForPreTraining",
            hf.vit_mae_config,
        ),
        Family(
            "mae-pth",
            ("encoder", "decoder"),
            lambda method: mae.mae_table(method.encoder, method.decoder),
            "original MAE",
            "torch.load",
            fixed_eps=True,
        ),
        Family(
            "timm",
            ("encoder",),
            lambda method: mae.timm_table(method.encoder),
            "timm",
            "timm.create_model",
            mae.timm_config,
            fixed_eps=True,
        ),
    )
}


def table_of(name: str, method: Any) -> Table:
    """The table that turns the parameters of ``method`` into files of the family ``name``.

    Raises:
      WeightsError: for an unknown family, or one that cannot hold the method's networks.
    """
    if name not in FAMILIES:
        raise WeightsError(f"no weight format {name!r}; {suggest(name, FAMILIES)}")
    family = FAMILIES[name]
    missing = [part for part in family.needs if getattr(method, part, None) is None]
    if missing:
        raise WeightsError(
            f"{name}: the method {type(method).__name__} has no {' and no '.join(missing)}"
        )
    for part in family.needs if family.fixed_eps else ():
        mae.check_original(getattr(method, part), name)
    return family.table(method)
