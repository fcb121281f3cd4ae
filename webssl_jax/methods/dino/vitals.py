"""The vital signs of DINO and what its sicknesses look like (docs/health.md has the measurements
behind every limit).

Self-distillation has two trivial solutions, one without centering and one without sharpening (Caron
et al., arXiv 2104.14294, section 5.3), and a third failure that its entropies do not show: heads
that still tell images apart by what is left of a few directions in the features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals, most_rank

_TEACHER, _STUDENT = "train/teacher_entropy", "train/student_entropy"
_PROTOTYPES = "train/prototypes_used"
_STD, _RANK = "train/feature_std", "train/effective_rank"


def dino_vitals(
    prototypes: int,
    teacher_crops: int,
    width: int,
    uniform_losses: Mapping[str, float],
    centred: bool,
) -> Vitals:
    """Signs and alarms of a run.

    Args:
      prototypes: of the DINO head. teacher_crops: in a global batch. width: of the features.
      uniform_losses: {name: weighted loss of a network that prefers no prototype}; 0 of a term
        that is turned off, which then is no sign.
      centred: whether there are running centres.

    A single prototype leaves nothing to prefer, and no signs.
    """
    if prototypes < 2:
        return Vitals()
    uniform = math.log(prototypes)
    signs = [
        Sign(f"train/{name}", f"{name} loss", most) for name, most in uniform_losses.items() if most
    ]
    signs += [
        Sign("train/koleo", "koleo loss"),
        Sign(_TEACHER, "teacher entropy", uniform),
        Sign(_STUDENT, "student entropy", uniform),
        Sign("train/teacher_student_kl", "KL(teacher || student)", uniform),
        Sign(_PROTOTYPES, "prototypes in use", min(teacher_crops, prototypes), 1),
        Sign(_STD, "feature std", 1.0),
        Sign(_RANK, "effective rank", most_rank(teacher_crops, width), 1),
    ]
    if centred:
        signs += [
            Sign(f"train/{name}_centre_norm", f"norm of the {name} centre")
            for name in ("dino", "ibot")
        ]
    return Vitals(tuple(signs), _alarms(min(teacher_crops, prototypes)))


def _alarms(usable: int) -> tuple[Alarm, ...]:
    few = (math.sqrt(usable) - 1) / (usable - 1)  # as a share of the way from 1 to all of them
    return (
        Alarm(
            "the same few prototypes for all images",
            (Limit(_PROTOTYPES, below=few), Limit(_TEACHER, below=0.2)),
            "the teacher is sure of itself and says the same of all crops, so there is nothing to "
            "learn from it",
            "config.method.centering (sinkhorn cannot do this), centre_momentum (well below 1) and "
            "teacher_temperature (higher)",
            waits=0.1,  # the time a running centre needs to find its place, generously
        ),
        Alarm(
            "no preference for any prototype",
            (Limit(_TEACHER, above=0.99), Limit(_STUDENT, above=0.99)),
            "teacher and student spread every crop evenly over all prototypes, as a network that "
            "knows nothing does, so the DINO loss stays at ln K",
            "config.method.teacher_temperature (lower, well below student_temperature), "
            "model.layer_scale (up to 1 in short runs), optim.lr and its warm-up, global_batch "
            "(larger)",
        ),
        Alarm(
            "the same features for every image",
            (Limit(_RANK, below=0.05), Limit(_STD, below=0.2)),
            "the teacher's features of all crops are nearly one and the same vector",
            "config.method.koleo_weight (0.1), optim.lr (lower), optim.warmup (longer), "
            "method.momentum (nearer to 1), optim.weight_decay (lower), group_images (larger)",
        ),
    )
