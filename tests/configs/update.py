"""The golden dump of every resolved config, golden.json: python -m tests.configs.update writes it.
Say in the commit why one moved.

``common`` holds the keys of common.py; each experiment, as it is without arguments, what it changes
in them; and each of its other specs what that changes in the experiment.
"""

import importlib
import json
import pathlib

from webssl_jax import config as configs

ROOT = pathlib.Path(__file__).parent.parent.parent
FILE = pathlib.Path(__file__).parent / "golden.json"
SPECS = ["quickstart", "mini_web", "web_mae", "web_dino", "dinov2", "clip", "lit", "vqa"]
SPECS += ["supervised", "supervised:size=tiny", "easy_vqa"]
SPECS += ["mocov3", "mocov3:size=tiny", "ijepa", "ijepa:size=tiny"]
SPECS += ["distill", "distill:size=tiny", "dinov3", "dinov3:recipe=imagenet"]
SPECS += [f"dinov3:size={rest}" for rest in ("7b", "7b,stage=gram", "tiny", "tiny,stage=gram")]
SPECS += [f"dinov3:size={rest},stage=high_res" for rest in ("7b", "tiny")]
SPECS += ["simdino", "simdino:size=tiny", "lejepa", "lejepa:size=tiny"]
SPECS += [f"mini_web:method={name}" for name in ("dino", "clip", "siglip", "supervised")]
SPECS += ["text_rich"]
SPECS += [
    f"web_mae:size={size},recipe={recipe}"
    for recipe in ("paper", "stock")
    for size in ("300m", "700m", "1b", "2b", "3b", "5b", "tiny")
]
SPECS += [f"web_dino:size={size}" for size in ("300m", "1b", "2b", "3b", "5b", "7b", "tiny")]
SPECS += [
    f"web_dino:size={rest}"
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
SPECS += [f"dinov2:recipe={recipe}" for recipe in ("vitl16_short", "vitl14", "vitg14")]
SPECS += [
    f"clip:size={rest}"
    for rest in (
        *("300m", "1b", "2b", "3b", "5b", "7b", "7b,images=8_000_000_000", "tiny"),
        *("b32", "b16", "l14", "h14", "g14", "bigg14"),
        *("b16,loss=sigmoid", "l14,loss=sigmoid", "tiny,loss=sigmoid"),
        *("siglip_b16", "siglip_b16,res=256", "siglip_l16,res=256", "siglip_so400m"),
        *("siglip_tiny", "siglip_tiny,loss=softmax"),
    )
]
SPECS += ["easy_vqa:stage=2"]
SPECS += ["vqa:stage=2,encoder=clip_7b,res=224", "vqa:encoder=siglip_so400m,language=qwen3-8b"]


def flat(config) -> dict[str, str]:
    """{dotted key: its value as JSON} of the resolved config. As text, 1 is not 1.0."""
    out, rest = {}, [("", configs.resolved(config))]
    while rest:
        prefix, group = rest.pop()
        for key, value in group.items():
            if isinstance(value, dict) and value:
                rest.append((f"{prefix}{key}.", value))
            else:
                out[prefix + key] = json.dumps(value)
    return out


def golden(base, load, specs) -> dict:
    """The content of golden.json: of the config ``base`` and of ``load(spec)`` for every spec."""
    made = {"common": flat(base)} | {spec: flat(load(spec)) for spec in specs}
    out = {"common": _values(made["common"])}
    for spec in specs:
        before, now = made[parent(spec)], made[spec]
        out[spec] = {
            "set": _values({key: now[key] for key in now if now[key] != before.get(key)}),
            "without": sorted(before.keys() - now.keys()),
        }
    return out


def rebuilt(golden: dict, spec: str) -> dict[str, str]:
    """What :func:`flat` is to give for ``spec``, from the content of golden.json."""
    if spec == "common":
        return {key: json.dumps(value) for key, value in golden[spec].items()}
    out = rebuilt(golden, parent(spec))
    for key in golden[spec]["without"]:
        del out[key]
    return out | {key: json.dumps(value) for key, value in golden[spec]["set"].items()}


def parent(spec: str) -> str:
    """What the entry of ``spec`` is a difference to."""
    return spec.split(":")[0] if ":" in spec else "common"


def _values(texts: dict[str, str]) -> dict:
    return {key: json.loads(text) for key, text in texts.items()}


def main() -> None:
    """Writes the file."""
    base = importlib.import_module("webssl_jax.configs.common").base()
    text = json.dumps(golden(base, configs.load, SPECS), indent=1, sort_keys=True)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
