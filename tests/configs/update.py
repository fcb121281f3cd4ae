"""Writes the golden dump of every resolved config: python -m tests.configs.update. Say in the
commit why one moved."""

import json
import pathlib

from webssl_jax import config as configs

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SPECS = (
    ["quickstart.py", "mini_web.py"]
    + [f"mini_web.py:method={name}" for name in ("dino", "clip", "siglip")]
    + [
        f"web_mae.py:size={size},recipe={recipe}"
        for recipe in ("paper", "stock")
        for size in ("300m", "700m", "1b", "2b", "3b", "5b", "tiny")
    ]
)
SPECS += [f"web_dino.py:size={size}" for size in ("300m", "1b", "2b", "3b", "5b", "7b", "tiny")]
SPECS += [
    f"web_dino.py:size={rest}"
    for rest in (
        "7b,images=8_000_000_000",
        "1b,data=imagenet",
        "2b,data=light",
        "2b,data=heavy",
        "7b,res=378",
        "7b,res=518",
        "7b,res=518,images=20_480_000",
    )
]
SPECS += [f"dinov2.py:recipe={recipe}" for recipe in ("vitl16_short", "vitl14", "vitg14")]
SPECS += [
    f"clip.py:size={rest}"
    for rest in (
        *("300m", "1b", "2b", "3b", "5b", "7b", "7b,images=8_000_000_000", "tiny"),
        *("b32", "b16", "l14", "h14", "g14", "bigg14"),
        *("b16,loss=sigmoid", "l14,loss=sigmoid", "tiny,loss=sigmoid"),
        *("siglip_b16", "siglip_b16,res=256", "siglip_l16,res=256", "siglip_so400m"),
        *("siglip_tiny", "siglip_tiny,loss=softmax"),
    )
]


def golden_file(spec: str) -> pathlib.Path:
    """Where the dump of ``spec`` lies."""
    name = spec.replace(".py", "").replace(":", "-").replace(",", "-").replace("=", "_")
    return HERE / f"{name}.json"


def dump(spec: str) -> str:
    """The text of that file."""
    config = configs.resolved(configs.load(str(ROOT / "configs" / spec)))
    return json.dumps({"spec": spec, "config": config}, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Rewrites them all and removes those of no spec."""
    for stale in set(HERE.glob("*.json")) - set(map(golden_file, SPECS)):
        stale.unlink()
    for spec in SPECS:
        golden_file(spec).write_text(dump(spec))


if __name__ == "__main__":
    main()
