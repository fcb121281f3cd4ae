"""The table of docs/plan_table.md: every paper config on every slice, one row at a time.

    python tools/plan_table.py                      write the page again from the figures
    python tools/plan_table.py --row ROW [ROW ...]  compile these first; a ROW is CONFIG@SLICE
    python tools/plan_table.py --next N             compile the first N that are missing
    python tools/plan_table.py --list               name all rows, and which are missing

A ROW as in ``web_dino.py:size=7b@v5p-512`` or ``web_dino.py:size=7b@2xv5p-256``; it takes minutes
of CPU and stands in the figures (docs/plan_table.json) as soon as it is compiled, with the command
and the revision of the code, so that the rest can wait. Rows are compiled with the preset of their
chip or slice (configs/common.py). The figures are those of ``python -m webssl_jax.plan --json``.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from scipy import special

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.sharding import slices

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "plan_table.json"
PAGE = ROOT / "docs" / "plan_table.md"
CALIBRATION = ROOT / "docs" / "plan_calibration.json"  # of tools/calibrate_plan.py
PLAN = ["-m", "webssl_jax.plan"]
# with the presets that suit them
SLICES = {
    "v5p-512": "v5p-512",
    "v5p-256": "v5p",
    "v5e-256": "v5e",
    "v4-512": "v4",
    "v6e-256": "v6e",
    "2xv5p-256": "2xv5p-256",
}
# the most asked for first
CONFIGS = (
    *(f"web_dino.py:size={size}" for size in ("7b", "1b", "300m", "5b", "3b", "2b")),
    *(f"web_mae.py:size={size}" for size in ("5b", "1b", "300m", "3b", "2b", "700m")),
    *(f"clip.py:size={size}" for size in ("7b", "1b", "l14", "300m", "5b", "3b", "2b")),
)
# of some slices alone
MORE = {
    "v5p-512": ("dinov3.py:size=7b", "dinov3.py:size=7b,stage=gram"),
    "v6e-256": ("dinov3.py:size=7b", "dinov3.py:size=7b,stage=gram"),
}
KEPT = (
    "fits spare_gib peak_hbm_gib state_gib mesh global_batch executed_over_model_flops compute_s "
    "exposed_ici_s wire_gb exposed_gb dcn_gb mfu_modelled mfu_with_exposed_ici attainable_s "
    "mfu_attainable limits images_per_s days chip_hours compile_cpu_s versions error"
).split()


def check_checkout() -> None:
    """Raises UserError where there are no docs beside the tools: in an installed wheel."""
    if not PAGE.parent.is_dir():
        raise UserError(
            f"{PAGE.parent}: no such folder; the table is the repository's: run this there"
        )


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns 0, or 1 when a row could not be compiled."""
    parser = cli.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", nargs="+", default=[], metavar="CONFIG@SLICE")
    what.add_argument("--next", type=int, default=0, metavar="N")
    what.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    check_checkout()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    missing = [row for row in rows() if row not in figures]
    if args.list:
        print("\n".join(f"{'missing' if row in missing else 'there  '} {row}" for row in rows()))
        return 0
    wanted = args.row or missing[: args.next]
    commands = [command(row) for row in wanted]  # bad ones are refused before any is compiled
    failed = 0
    for number, (row, argv) in enumerate(zip(wanted, commands), 1):
        print(f"{number} of {len(wanted)}: {row}", file=sys.stderr, flush=True)
        found = compile_row(argv)
        failed += found is None
        if found:
            figures[row] = found
            FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(figures, json.loads(CALIBRATION.read_text())))
    print(f"{PAGE}: {len(figures)} of {len(rows())} rows")
    return 1 if failed else 0


def rows() -> list[str]:
    """The names of all rows, the most important first."""
    return [f"{config}@{place}" for place in SLICES for config in configs_of(place)]


def configs_of(place: str) -> tuple[str, ...]:
    """The configs that the table has of a slice."""
    return CONFIGS + MORE.get(place, ())


def command(row: str) -> list[str]:
    """The arguments of plan for that row.

    Raises:
      UserError: for a name that is not CONFIG@SLICE.
    """
    config, at, place = row.partition("@")
    count, _, name = place.rpartition("x")
    if not at or not re.fullmatch(r"\d*", count):
        raise UserError(f"--row {row}: must be CONFIG@SLICE, as web_dino.py:size=7b@v5p-512")
    preset = SLICES.get(place, slices.find(name).generation)
    comma = "," if ":" in config else ":"
    argv = ["--config", f"configs/{config}{comma}preset={preset}", "--slice", name]
    return argv + (["--slices", count] if count else [])


def compile_row(argv: list[str]) -> dict | None:
    """The figures of one row, None (and its words on stderr) where plan fails."""
    argv = [*PLAN, *argv]
    made = subprocess.run(
        [sys.executable, *argv, "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if made.returncode not in (0, 3):
        print(f"python {' '.join(argv)}: exit code {made.returncode}", file=sys.stderr)
        return None
    result = json.loads(made.stdout)
    out = {"command": f"python {' '.join(argv)}", "revision": revision()}
    out["date"] = time.strftime("%Y-%m-%d")
    return out | {key: result[key] for key in KEPT}


def revision() -> str:
    """Of the code: the commit, with + where files besides the figures were changed since."""

    def git(*arguments: str) -> str:
        made = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return made.stdout.strip()

    own = (":!docs/plan_table.*", ":!docs/plan_calibration.json")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *own)
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


class Factor(NamedTuple):
    """By which a modelled MFU is to be multiplied: the likeliest value and the ends of the interval
    in which 9 of 10 programs should lie; from ``count`` measurements."""

    low: float
    middle: float
    high: float
    count: int

    def of(self, mfu: float, attainable: float = 1.0) -> str:
        """What to expect of a modelled MFU, with its interval, in percent; at most what is
        attainable."""
        low, middle, high = (100 * min(mfu * x, attainable) for x in self[:3])
        return f"{middle:.0f}% ({low:.0f} to {high:.0f})"


def factor(calibration: dict, place: str = "") -> Factor:
    """Of the rows of docs/plan_calibration.json that fit and whose slice begins with ``place``: the
    geometric mean of measured / modelled, and the 90% prediction interval of one more (Student's t
    on logarithms: wider than the scatter, as there are few)."""
    rows = [(name.partition("@")[2], r) for name, r in calibration.items()]
    logs = [math.log(r["factor"]) for at, r in rows if r["fits"] and at.startswith(place)]
    middle, count = statistics.fmean(logs), len(logs)
    half = float(special.stdtrit(count - 1, 0.95)) * statistics.stdev(logs) * (1 + 1 / count) ** 0.5
    return Factor(*(math.exp(x) for x in (middle - half, middle, middle + half)), count)


def factor_at(calibration: dict, place: str) -> Factor:
    """The factor to expect on a slice: :func:`factor` of all rows, or of those of its chips if
    these lie farther apart. Where no row is of its chips they may be like any, so of those that lie
    farthest apart."""
    chips = {name.partition("@")[2].partition("-")[0] for name, r in calibration.items()}
    own = place.rpartition("x")[2].partition("-")[0]
    found = [factor(calibration, f"{chip}-") for chip in ({own} & chips or chips)]
    wide = [one for one in found if one.count > 2]  # two say little of how far they lie apart
    return max([factor(calibration), *wide], key=lambda one: one.high / one.low)


def page(figures: dict, calibration: dict) -> str:
    """The page, from the figures and those of docs/plan_calibration.json."""
    usual = factor(calibration)
    lines = [
        "# Every paper config on every slice",
        "",
        "Written by `python tools/plan_table.py` from `plan_table.json`; the columns and what",
        "they leave out are in [plan.md](plan.md). Each row is compiled with the preset that",
        "suits its slice. MFU is modelled, with exposed ICI; attainable is the limit of that",
        "program, and lost most the category with most time above it, in shares of the step, of",
        "rows compiled since `plan` knows them; `x` is executed over model flops; GB are sent by a",
        "device in a step, and in brackets exposed.",
        "",
        "Expected is the modelled MFU times the factor that stands above each table: the mean of",
        f"measured / modelled of up to {usual.count} runs of others, and the interval of 9 in 10",
        "further programs, at most what is attainable. Those were decoders of 16 to 128 billion",
        "parameters on v5p and on v5e, where they lie far apart; chips that no run was of get the",
        "wider interval, and smaller encoders may lie outside of either",
        "([Modelled and measured](plan.md#modelled-and-measured)).",
    ]
    for place in SLICES:
        expected = factor_at(calibration, place)
        said = f"Expected: times {expected.middle:.2f} ({expected.low:.2f} to {expected.high:.2f})."
        lines += ["", f"## {place}", "", said, ""]
        lines.append("| Config | batch | peak GiB (spare) | x | GB | MFU | expected | attainable |")
        lines[-1] += " lost most | images/s | chip-hours |"
        lines.append("| --- |" + " ---: |" * 10)
        for config in configs_of(place):
            lines.append(_line(config, figures.get(f"{config}@{place}"), expected))
    return "\n".join(lines) + "\n"


def _line(config: str, r: dict | None, expected: Factor) -> str:
    name = config.replace(".py:size=", " ")
    if r is None:
        return f"| {name} | | not compiled yet | | | | | | | | |"
    memory = f"{r['peak_hbm_gib']:.1f} ({r['spare_gib']:.1f})"
    if not r["fits"]:
        return f"| {name} | {r['global_batch']:,} | does not fit: {memory} | | | | | | | | |"
    cells = (
        f"{r['global_batch']:,}",
        memory,
        f"{r['executed_over_model_flops']:.2f}",
        f"{r['wire_gb']:.0f} ({r['exposed_gb']:.0f})",
        f"{100 * r['mfu_with_exposed_ici']:.1f}%",
        expected.of(r["mfu_with_exposed_ici"], r.get("mfu_attainable", 1.0)),
        f"{100 * r['mfu_attainable']:.1f}%" if "mfu_attainable" in r else "",
        _lost_most(r.get("limits") or []),
        f"{r['images_per_s']:,.0f}",
        f"{r['chip_hours']:,.0f}",
    )
    return " | ".join([f"| {name}", *cells]) + " |"


def _lost_most(limits: list[dict]) -> str:
    if not limits:
        return ""
    worst = max(limits, key=lambda row: row["lost_s"])
    share = worst["lost_s"] / sum(row["modelled_s"] for row in limits)
    return f"{worst['category']} {100 * share:.0f}%"


if __name__ == "__main__":
    cli.run(main)
