"""Imports timm, in a process of its own: its siblings take it from here.

timm needs torchvision, whose compiled operators fit only one build of torch. Both lie in a folder
of their own (``tools/environment.sh``), so that nothing else, transformers least of all, finds
them; of the operators timm calls none.
"""

import sys

import torch

sys.path.append(sys.argv[1])  # ORACLES
try:
    import torchvision  # noqa: F401
except RuntimeError:  # its operators are those of another build: their names are enough
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm  # noqa: E402, F401
