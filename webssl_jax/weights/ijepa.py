"""I-JEPA's encoder (Assran et al., arXiv 2301.08243) in the names of its original and of timm:
``ijepa-pth`` and ``timm-ijepa``. (Those of transformers: ``hf.py``.)

Both call its tensors alike: timm's ViT without a class token. A checkpoint of the original holds
the trained encoder, its predictor and the running average, ``target_encoder``, which is the one
that is evaluated.
"""

from __future__ import annotations

from typing import Any

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import mae, positions, preprocessing
from webssl_jax.weights.tables import Table


def table(family: str, encoder: ViTConfig) -> Table:
    """The encoder."""
    learned, fixed = positions.rows(encoder, "pos_embed")
    return Table(
        family,
        (*learned, *mae.encoder_rows(encoder)),
        fixed,
        leave_out=(r"^(?!encoder/)",),
        aliases=(mae.WRAPPERS,),
        ignore=(r"^head\.",),
    )


def extra(method: Any) -> dict[str, int | str]:
    """What the tensors do not say; see ``mae.mae_extra``."""
    c = method.encoder
    return {"heads": c.heads, "image_size": preprocessing.size_in_words(c.image_size)}


def timm_config(method: Any) -> dict[str, Any]:
    """``config.json`` of a folder for ``timm.create_model("local-dir:FOLDER")``. ``method`` has an
    ``encoder``."""
    config = mae.timm_config(method)
    config["model_args"] |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return config | {"architecture": "vit_huge_patch14_gap_224", "global_pool": "avg"}
