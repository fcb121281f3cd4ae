"""Says what a weight file is and whether it fits, without loading it: headers and position tables
are all that is read.

    python tools/inspect_weights.py FILE_OR_FOLDER [--family NAME] [--heads N] [--json]

Family, size by name, parameters, number type, heads, decoder, positions and resolution; then every
tensor that is missing, unexpected or of another shape, against the family that fits best.

Exit codes: 0 it fits · 1 it does not · 2 it cannot be read at all.
"""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import jax

from webssl_jax import cli
from webssl_jax.weights import load, tables
from webssl_jax.weights.stored import WeightsError, shown

_SHOWN = 20  # tensors of each kind of trouble


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="a .pth or .safetensors file, an index, or a folder")
    parser.add_argument("--family", help="instead of the one that fits best")
    parser.add_argument("--heads", type=int, help="attention heads, where nothing says them")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    facts, trouble = inspect(args.path, args.family, args.heads)
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
    print("\nit does not fit" if trouble else "\nit fits: init_from, pictures and export take it")
    return 1 if trouble else 0


def inspect(
    path: str, family: str | None = None, heads: int | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(facts by name, {kind of trouble: tensors or sentences}; empty if it fits).

    Raises:
      UserError: if there are no headers to read, none of their tensors is known, or ``heads`` is
        no number of heads.
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
    try:
        method, _, assumed = load.describe(files, best, heads)
    except WeightsError as error:
        return facts, {"what it is cannot be told": [str(error)]}
    c = method.encoder
    facts |= {
        "encoder": f"{load.size_name(c)}: {c.depth} blocks, width {c.width}, {c.heads} heads, "
        f"MLP {c.hidden}, norm eps {c.norm_eps:g}",
        "resolution": f"{c.image_size} pixels, {c.grid[0]}x{c.grid[1]} patches of {c.patch_size}",
        "positions": "MAE's fixed sin-cos table" if c.position == "sincos" else "trained",
        "decoder": "none",
    }
    if assumed:
        facts["assumed"] = ", ".join(assumed)
    template = load.template_of(method)
    table = best.table(method)
    parts = {leaf.split("/")[0]: 0 for row in table.rows for leaf in row.paths}
    for part in parts:
        parts[part] = sum(math.prod(x.shape) for x in jax.tree.leaves(template[part]))
    facts["parameters"] = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    if "decoder" in parts:
        d = method.decoder
        facts["decoder"] = f"{d.depth} blocks, width {d.width}, {d.heads} heads"
        facts["objective"] = f"mask ratio {method.mask_ratio:g}" + (
            ", patches normalised" if method.norm_pix_loss else ", raw pixels"
        )
    fit = tables.compare(files.tensors, table, template)
    if fit.ignored:
        facts["passed_over"] = ", ".join(map(shown, fit.ignored))
    trouble = {
        "missing": fit.missing,
        "not expected": list(map(shown, fit.unexpected)),
        "of another shape": fit.misshapen,
        "of a type that is not read": fit.wrong_type,
    }
    if not any(trouble.values()):
        try:  # the position tables
            load.open_(path, family, heads)
        except WeightsError as error:
            trouble["contradictory"] = [str(error)]
    return facts, {kind: names for kind, names in trouble.items() if names}


if __name__ == "__main__":
    cli.run(main)
