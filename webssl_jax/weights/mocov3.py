"""MoCo v3's encoder (Chen et al., arXiv 2104.02057) in the names of its original: ``mocov3-pth``.

Its checkpoints hold the trained encoder (``base_encoder``), which is the one that is evaluated, its
running average and the two MLPs, all of a module that was saved in its wrapper. The names are those
that its own linear probe and its converter ask for, so the wrapper's prefix stays.
"""

from __future__ import annotations

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import mae, positions
from webssl_jax.weights.tables import Row, Table

_PREFIX = "module.base_encoder."


def table(encoder: ViTConfig) -> Table:
    """The trained encoder; the others in a file are passed over on import."""
    learned, fixed = positions.rows(encoder, f"{_PREFIX}pos_embed")
    cls = Row("encoder/cls_token", f"{_PREFIX}cls_token")
    return Table(
        "mocov3-pth",
        (cls, *learned, *mae.encoder_rows(encoder, _PREFIX)),
        fixed,
        leave_out=(r"^(?!encoder/)",),
        aliases=(mae.WRAPPERS, (r"^base_encoder\.", _PREFIX)),
        ignore=(r"^(momentum_encoder|predictor)\.", r"^module\.base_encoder\.head\."),
    )
