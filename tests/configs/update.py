"""Writes the golden dump of every resolved config: python tests/configs/update.py. Say in the
commit why one moved."""

import json
import pathlib

from webssl_jax import config as configs

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SPECS = ["quickstart.py"] + [
    f"web_mae.py:size={size},recipe={recipe}"
    for recipe in ("paper", "stock")
    for size in ("300m", "700m", "1b", "2b", "3b", "5b", "tiny")
]

for spec in SPECS:
    config = configs.resolved(configs.load(str(ROOT / "configs" / spec)))
    name = spec.replace(".py", "").replace(":", "-").replace(",", "-").replace("=", "_")
    (HERE / f"{name}.json").write_text(
        json.dumps({"spec": spec, "config": config}, indent=1, sort_keys=True) + "\n"
    )
