"""Says what a weight file is and whether it fits, without loading it: headers and position tables
are all that is read.

    python tools/inspect_weights.py FILE_OR_FOLDER [--family NAME] [--heads N] [--json]
    python tools/inspect_weights.py FILE:PLACE     # one of several state dicts in a file

Family, size by name, parameters, number type, heads, decoder, text tower, projection heads
(prototypes, bottleneck), resolution, and positions with the way the family's own code resizes them;
then every tensor that is missing, unexpected or of another shape, against the family that fits
best.

Families: hf-vit, hf-vit-mae, hf-dinov2, hf-dinov2-registers, hf-clip, hf-clip-vision, hf-siglip,
hf-siglip-vision (transformers), timm, timm-clip, timm-siglip, open-clip, mae-pth, dinov2-pth,
dinov2-teacher, dinov2-heads (.pth files of the originals, blocks chunked or not). A file of
open_clip or MetaCLIP is open-clip, whatever its container.

Exit codes: 0 it fits · 1 it does not · 2 it cannot be read at all.
"""

from __future__ import annotations

import collections
import json
import math
from typing import Any

from webssl_jax import cli
from webssl_jax.weights import given


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="a .pth or .safetensors file, an index, or a folder")
    parser.add_argument("--family", help="instead of the one that fits best")
    given.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


cli.help_early(_parser, __name__)

from webssl_jax.models.sizes import ViTConfig
from webssl_jax.params import count
from webssl_jax.weights import load, shapes, tables
from webssl_jax.weights.networks import Networks, template_of
from webssl_jax.weights.preprocessing import size_in_words
from webssl_jax.weights.stored import WeightsError, shown, some
from webssl_jax.weights.tokenizer_files import has_tokenizer

_SHOWN = 20  # tensors of each kind of trouble
_MLPS = {"gelu": "MLP", "quick_gelu": "quick-GELU MLP", "gelu_tanh": "tanh-GELU MLP"}
_MLPS["swiglu"] = "SwiGLU"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    facts, trouble = inspect(args.path, args.family, **given.options(args))
    if args.json:
        print(json.dumps(facts | {"does_not_fit": trouble}, indent=1))
        return 1 if trouble else 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):{width}}  {value}")
    for kind, names in trouble.items():
        print(f"\n{kind} ({len(names)})")
        for name in names[:_SHOWN]:
            print(f"  {name}")
        if len(names) > _SHOWN:
            print(f"  ... and {len(names) - _SHOWN} more")
    takers = "init_from and export" if "encoder" not in facts else "init_from, pictures and export"
    print("\nit does not fit" if trouble else f"\nit fits: {takers} take it")
    return 1 if trouble else 0


def inspect(
    path: str, family: str | None = None, **options: Any
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(facts by name, {kind of trouble: tensors or sentences}; empty if it fits).

    Raises:
      UserError: if there are no headers to read, none of their tensors is known, or an option
        (``given.Given``) can be of no such network.
    """
    files = load.open_files(path)
    best = load.best_family(files, family)
    types = collections.Counter(t.dtype.name for t in files.tensors.values())
    numbers = sum(math.prod(t.shape) for t in files.tensors.values())
    facts: dict[str, Any] = {
        "path": path,
        "family": f"{best.name} ({best.library}: {best.opens})",
        "tensors": f"{len(files.tensors):,}: " + ", ".join(f"{n} {t}" for t, n in types.items()),
        "numbers": f"{numbers:,}",
        "files": ", ".join(sorted({t.file.name for t in files.tensors.values()})),
    }
    if files.inside:
        facts["taken"] = f"what lies under {files.inside!r}"
    if files.others:
        facts["not_taken"] = ", ".join(f"{files.path}:{place}" for place in files.others)
    try:
        networks, _, assumed = load.describe(files, best, given.Given(**options))
    except WeightsError as error:
        return facts, {"what it is cannot be told": [str(error)]}
    if networks.encoder:
        said, c = given.Given(**options), networks.encoder
        _, why = shapes.position_resize(files, best, said, c.num_registers)
        facts |= _encoder(c, why)
    facts["decoder"] = "none"
    if networks.decoder:
        d = networks.decoder
        facts["decoder"] = f"{d.depth} blocks, width {d.width}, {d.heads} heads"
        facts["objective"] = f"mask ratio {networks.mask_ratio:g}" + (
            ", patches normalised" if networks.norm_pix_loss else ", raw pixels"
        )
    if networks.text:
        facts |= _text(networks)
    for name, head in networks.dino_heads.items():
        facts[name] = (
            f"{head.prototypes:,} prototypes, bottleneck {head.bottleneck}, "
            f"{head.layers} layers of {head.hidden}"
        )
    if assumed:
        facts["assumed"] = ", ".join(assumed)
    template = template_of(networks)
    table = best.table(networks)
    facts["parameters"] = ", ".join(f"{name} {count(x):,}" for name, x in template.items())
    try:
        fit = tables.compare(files.tensors, table, template)
    except WeightsError as error:
        return facts, {"contradictory": [str(error)]}
    if fit.ignored:
        facts["passed_over"] = some(fit.ignored)
    trouble = {
        "missing": fit.missing,
        "not expected": list(map(shown, fit.unexpected)),
        "of another shape": fit.misshapen,
        "of a type that is not read": fit.wrong_type,
    }
    if not any(trouble.values()):
        try:  # the position tables
            load.open_(path, family, **options)
        except WeightsError as error:
            trouble["contradictory"] = [str(error)]
    return facts, {kind: names for kind, names in trouble.items() if names}


def _text(networks: Networks) -> dict[str, str]:
    c = networks.text
    ids = "CLIP's tokenizer" if has_tokenizer(c.vocabulary) else "a tokenizer that is not here"
    return {
        "text": f"{c.depth} blocks, width {c.width}, {c.heads} heads, {_MLPS[c.mlp]} {c.hidden}, "
        f"norm eps {c.norm_eps:g}, {c.context} tokens, {c.vocabulary:,} ids of {ids}",
        "objective": f"{networks.contrast} contrast in {c.embedding} channels",
    }


def _encoder(c: ViTConfig, why: str) -> dict[str, str]:
    extras = {
        "LayerScale": c.layer_scale is not None,
        f"{c.num_registers} registers": c.num_registers,
        "a mask token": c.mask_token,
        "attention pooling instead of CLS": c.pooling == "map",
    }
    positions = "MAE's fixed sin-cos table"
    if c.position == "learned":
        how = c.interpolation.words
        positions = f"trained; for other sizes resized {how} (position_resize={c.position_resize}, "
        positions += f"{why})"
    return {
        "encoder": f"{shapes.size_name(c)}: {c.depth} blocks, width {c.width}, {c.heads} heads, "
        f"{_MLPS[c.mlp]} {c.hidden}, norm eps {c.norm_eps:g}",
        "besides": ", ".join(name for name, there in extras.items() if there) or "nothing",
        "resolution": f"{size_in_words(c.image_size)} pixels, {c.grid[0]}x{c.grid[1]} patches of "
        f"{c.patch_size}",
        "positions": positions,
    }


if __name__ == "__main__":
    cli.run(main)
