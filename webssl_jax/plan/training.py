"""Compiles a config's real train step for a TPU slice that is not here: does it fit, and how fast
can it be at best? ``command.py`` is the command."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import environment, methods, train_state
from webssl_jax.config import UserError
from webssl_jax.methods.base import kinds_of
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.plan import bundles, hlo, limits
from webssl_jax.plan import compiled as compiled_steps
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules, slices
from webssl_jax.telemetry.progress import format_seconds
from webssl_jax.telemetry.throughput import PEAK_FLOPS
from webssl_jax.train_step import lower_train_step

EXIT_DOES_NOT_FIT = 3
IGNORED = (
    "waiting for data and for the host, launch gaps, stragglers",
    "latency of collectives, contention, and async collectives that do not hide after all",
    "the network between slices (its bytes are counted apart)",
    "waiting inside Pallas kernels, and time of async copies",
    "clocks below the nominal, and any overlap between operations",
)
_COSTLIEST = 5
_WORST = 10
_GIB, _GB = 2**30, 1e9
# what only a compiled program tells
_COMPILED = (
    "temporary_gib executed_flops executed_over_model_flops modelled_cycles compute_s "
    "exposed_ici_s wire_gb exposed_gb dcn_gb wire_gb_by_kind mfu_modelled mfu_with_exposed_ici "
    "images_per_s days chip_hours operations unknown_loops unpriced_kernels attainable_s "
    "mfu_attainable limits worst"
).split()
log = logging.getLogger(__name__)


class OutOfMemory(Exception):
    """The compiler's own refusal: needs and available are GiB of a device's HBM."""

    def __init__(self, message: str):
        super().__init__(message)
        sizes = _sizes(message)
        if sizes is None:
            raise ValueError(f"this refusal names no sizes of HBM: {message}")
        self.needs, self.available = sizes


def plan(
    config: ConfigDict,
    slice_: slices.Slice,
    count: int = 1,
    hlo_file: str | None = None,
    save_file: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compiles the step and returns its figures under the keys of ``--json``. Those of a program
    that does not fit are None where only a compiled one tells.

    options: of the compiler, besides or instead of those of a run on such chips.

    Raises:
      UserError: if config and slice do not go together, or libtpu is missing.
    """
    # of batches of several sizes the one that takes most
    method = max(kinds_of(methods.create(config)), key=lambda kind: kind.train_flops())
    mesh = meshes.create(config.sharding, slice_.devices(count))
    meshes.check_batch(config, mesh)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    optimizer.check(state.params)
    rules.check(state.params, mesh, config.sharding.max_unsharded_fraction)
    where = f"{count} x {slice_.name}" if count > 1 else slice_.name
    log.info("compiling the step of %s for %s; minutes of CPU", config.name, where)
    versions = environment.package_versions()
    result = {
        "slice": slice_.name,
        "slices": count,
        "chips": slice_.chips * count,
        "devices": mesh.size,
        "hosts": slice_.hosts * count,
        "mesh": dict(mesh.shape),
        "versions": {name: versions[name] for name in ("jax", "libtpu")},
        "global_batch": int(config.global_batch),
        "images_per_chip": config.global_batch / (slice_.chips * count),
        "hbm_gib": slice_.chip.hbm_gib,
        "state_gib": train_state.device_bytes(state) / _GIB,
        "model_flops": method.train_flops() * config.global_batch,
    }
    wall, cpu = time.perf_counter(), time.process_time()
    with nothing_runs():
        lowered = lower_train_step(config, method, optimizer, state, mesh)
    try:
        compiled = compile_or_refuse(lowered, options)
    except OutOfMemory as refusal:
        result |= dict.fromkeys(_COMPILED)
        result |= {
            "fits": False,
            "hbm_gib": refusal.available,
            "peak_hbm_gib": refusal.needs,
            "spare_gib": refusal.available - refusal.needs,
            "error": str(refusal),
            "try_next": advice(config, slice_, result["state_gib"], refusal),
        }
        seconds = {}
    else:
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None and memory is not None  # as where a compiler cannot tell
        if hlo_file:
            pathlib.Path(hlo_file).write_text(text)
        if save_file:
            compiled_steps.save(save_file, lowered, compiled, mesh)
        peak = memory.peak_memory_in_bytes / _GIB
        result |= {"fits": True, "error": None, "try_next": []}
        result |= {"peak_hbm_gib": peak, "spare_gib": slice_.chip.hbm_gib - peak}
        result["temporary_gib"] = peak - result["state_gib"]
        kernels = bundles.cycles(hlo.kernels_of(text), slice_)
        counted, steps = hlo.cost(text, kernels), configs.total_steps(config)
        seconds = speed(counted, slice_, mesh, result, steps)
        seconds |= limit(text, slice_, kernels, seconds)
    result["compile_s"] = time.perf_counter() - wall
    result["compile_cpu_s"] = time.process_time() - cpu
    return result | seconds | {"ignored": list(IGNORED)}


def cost(text: str, slice_: slices.Slice) -> hlo.Cost:
    """That of a program compiled for ``slice_``, its Pallas kernels included."""
    return hlo.cost(text, bundles.cycles(hlo.kernels_of(text), slice_))


def search(
    config: ConfigDict, mesh: Mesh, attempt: Callable[[ConfigDict], dict[str, Any]]
) -> dict[str, Any]:
    """What ``attempt`` says (see :func:`plan`) of the largest global batch that fits, found from
    the config's own, with ``tried``: what was compiled on the way, in order.

    Batches are multiples of what every device must have (one image; for Web-DINO a group of
    ``group_images``). Found to within an eighth of it: each try takes as long as a plan.

    Raises:
      UserError: if not even the smallest fits, or as :func:`plan`.
    """
    unit = config.method.get("group_images", 1) * config.accumulation_steps
    unit *= meshes.batch_shards(mesh)
    results: dict[int, dict[str, Any]] = {}

    def fits(units: int) -> bool:
        tried = copy.deepcopy(config)
        tried.global_batch = units * unit
        r = results[units] = attempt(tried)
        log.info(
            "%s images, %g a chip: %s, %.2f of %.2f GiB",
            f"{r['global_batch']:,}",
            r["images_per_chip"],
            "fits" if r["fits"] else "does not fit",
            r["peak_hbm_gib"],
            r["hbm_gib"],
        )
        return r["fits"]

    best = largest(fits, max(config.global_batch // unit, 1))
    if not best:
        first = next(iter(results.values()))
        tips = "; ".join(first["try_next"])
        raise UserError(f"--search: not even {unit:,} images fit on {first['slice']}: {tips}")
    keys = ("global_batch", "images_per_chip", "fits", "peak_hbm_gib", "mfu_with_exposed_ici")
    return results[best] | {"tried": [{key: r[key] for key in keys} for r in results.values()]}


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, to within an eighth of it; 0 where 1 does not. ``fits`` is
    asked once about each number, ``start`` first, and must not turn true again; of those that fit
    the largest is asked last."""
    low, high, number = 0, None, start
    while high is None or high - low > max(1, low // 8):
        if fits(number):
            low = number
        else:
            high = number
        number = 2 * low if high is None else (low + high) // 2
    return low


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Puts into words what jax says when something is computed on devices that are not here."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, AttributeError) as error:
        if "compile-only" not in str(error) and "local_devices" not in str(error):
            raise
        raise RuntimeError(
            "the step computes a value while it is traced, on the devices of the mesh; plan's are "
            "not here. Make it from shapes, or inside the step"
        ) from error


def compile_or_refuse(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles.

    Raises:
      OutOfMemory: where the compiler says that the program exceeds a device's HBM.
      UserError: for an option, or a value of it, that it does not know.
    """
    try:
        return lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "No such compile option" in message or "into flag" in message:
            raise UserError(f"--option: the compiler says {message.splitlines()[0]}") from error
        if "RESOURCE_EXHAUSTED" in message and _sizes(message):
            raise OutOfMemory(message) from error
        raise


def speed(
    cost: hlo.Cost, slice_: slices.Slice, mesh: Mesh, known: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """The modelled time of a step, and what follows from it for a run of ``steps``."""
    chip = slice_.chip
    wire = exposed = 0.0
    kinds: dict[str, float] = collections.defaultdict(float)
    for collective in cost.collectives:
        sent = collective.count * collective.wire
        wire += sent
        kinds[collective.kind] += sent / _GB
        exposed += sent * collective.exposed
    compute_s = cost.cycles / chip.clock
    exposed_s = exposed / slice_.ici if exposed else 0.0
    step_s = compute_s + exposed_s
    peak_s = known["model_flops"] / (PEAK_FLOPS[chip.device_kind] * mesh.size)
    costliest = sorted(cost.operations.items(), key=lambda row: -row[1])[:_COSTLIEST]
    return {
        "executed_flops": cost.flops * mesh.size,
        "executed_over_model_flops": cost.flops * mesh.size / known["model_flops"],
        "modelled_cycles": cost.cycles,
        "compute_s": compute_s,
        "exposed_ici_s": exposed_s,
        "wire_gb": wire / _GB,
        "exposed_gb": exposed / _GB,
        "dcn_gb": cost.between_slices / _GB,
        "wire_gb_by_kind": dict(kinds),
        "mfu_modelled": peak_s / compute_s,
        "mfu_with_exposed_ici": peak_s / step_s,
        "images_per_s": known["global_batch"] / step_s,
        "days": steps * step_s / 86400,
        "chip_hours": steps * step_s / 3600 * known["chips"],
        "operations": [
            {"name": name, "seconds": cycles / chip.clock, "share": cycles / cost.cycles}
            for name, cycles in costliest
        ],
        "unknown_loops": list(cost.unknown_loops),
        "unpriced_kernels": list(cost.unpriced),
    }


def limit(
    text: str, slice_: slices.Slice, kernels: Mapping[str, float], modelled: Mapping[str, Any]
) -> dict[str, Any]:
    """The least time of the program ``text`` on these chips, and what the modelled time has above
    it. kernels: as of ``hlo.cost``. modelled: of the same program, by :func:`speed`."""
    chip = slice_.chip
    peak = PEAK_FLOPS[chip.device_kind]
    rates = limits.Rates(peak, chip.bandwidth, slice_.ici, chip.clock)
    found = limits.operations(text, rates, kernels)
    least = sum(operation.least_s for operation in found)
    at_peak_s = modelled["mfu_modelled"] * modelled["compute_s"]
    worst = sorted(found, key=lambda operation: -operation.lost_s)[:_WORST]
    return {
        "attainable_s": least,
        "mfu_attainable": at_peak_s / least,
        "limits": [
            {"category": category} | _seconds(rows)
            for category, rows in limits.by_category(found).items()
        ],
        "worst": [
            {"name": x.name, "place": x.place, "category": x.category} | _seconds([x])
            for x in worst
        ],
    }


def _seconds(found: list[limits.Operation]) -> dict[str, float]:
    names = ("modelled_s", "least_s", "lost_s")
    return {name: sum(getattr(operation, name) for operation in found) for name in names}


def explanation(result: Mapping[str, Any]) -> str:
    """Where the modelled time goes and what of it is above the limit, for people."""

    def line(row: Mapping[str, Any], name: str) -> str:
        return "".join(f"{1e3 * row[key]:11,.2f}" for key in _seconds([])) + f"  {name}"

    rows = result["limits"]
    whole = {key: sum(row[key] for row in rows) for key in _seconds([])}
    of_operation = "{place} ({category}; {name})"
    return "\n".join(
        [
            f"{'modelled':>11}{'least':>11}{'lost':>11}  milliseconds of a step, on a device",
            *(line(row, row["category"]) for row in rows),
            line(whole, "all"),
            "the operations that lose most:",
            *(line(row, of_operation.format(**row)) for row in result["worst"]),
        ]
    )


def advice(
    config: ConfigDict, slice_: slices.Slice, state_gib: float, refusal: OutOfMemory
) -> list[str]:
    """What may make it fit, the cheapest first."""
    tips = []
    if state_gib > refusal.available / 2:
        if config.sharding.fsdp != -1 or config.sharding.replica != 1:
            tips.append("cut the state over more devices: --config.sharding.fsdp=-1, replica 1")
        else:
            tips.append(f"the state alone is {state_gib:.1f} GiB a device: take a larger slice")
    if config.model.get("remat", "full") != "full":
        tips.append("keep less for the backward pass: --config.model.remat=full")
    if config.method.get("stream_prototypes") == 0:
        tips.append("hold fewer logits at a time: --config.method.stream_prototypes=8192")
    tips.append(
        f"fewer images a chip: half of --config.global_batch={config.global_batch}, or twice the "
        f"chips of {slice_.name}"
    )
    return tips


def table(result: Mapping[str, Any]) -> str:
    """The figures for people."""
    r = result
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
    slices_ = f"{r['slices']} x {r['slice']}" if r["slices"] > 1 else r["slice"]
    name = " ".join([r["config"], *r["overrides"]])
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    head = (
        f"{name} on {slices_}: {r['chips']} chips, {r['devices']} devices, {r['hosts']} hosts, "
        f"mesh {mesh} ({versions})"
    )
    rows = []
    if r["fits"]:
        rows.append(("fits", f"yes, {r['spare_gib']:.2f} of {r['hbm_gib']:.2f} GiB to spare"))
        parts = f"state {r['state_gib']:.2f}, temporary {r['temporary_gib']:.2f}"
        rows.append(("peak HBM a device", f"{r['peak_hbm_gib']:.2f} GiB: {parts}"))
    else:
        need = f"{r['peak_hbm_gib']:.2f} GiB of {r['hbm_gib']:.2f}, state {r['state_gib']:.2f}"
        rows.append(("fits", f"NO, {-r['spare_gib']:.2f} GiB too much"))
        rows.append(("needed HBM a device", need))
        rows.append(("the compiler says", r["error"].split("\n")[0]))
    seconds = f"{format_seconds(r['compile_s'])}, {r['compile_cpu_s']:.0f} s of CPU"
    rows.append(("compiled in", seconds))
    rows.append(("batch", f"{r['global_batch']:,} images, {r['images_per_chip']:g} a chip"))
    if not r["fits"]:
        rows += [("try next" if i == 0 else "", tip) for i, tip in enumerate(r["try_next"])]
        return lines(head, rows)
    kinds = ", ".join(f"{kind} {gb:.3g}" for kind, gb in sorted(r["wire_gb_by_kind"].items()))
    rows += [
        ("model flops", f"{r['model_flops']:.4g} a step"),
        ("executed flops", f"{r['executed_over_model_flops']:.3f} times that"),
        ("modelled cycles", f"{r['modelled_cycles']:,.0f} a device: {r['compute_s']:.4f} s"),
        ("wire a device", f"{r['wire_gb']:.3g} GB a step ({kinds or 'none'})"),
        ("of it exposed", f"{r['exposed_gb']:.3g} GB: {r['exposed_ici_s']:.4f} s"),
    ]
    if r["slices"] > 1:
        rows.append(("between slices", f"{r['dcn_gb']:.3g} GB a device and step, not timed"))
    with_ici = f"{100 * r['mfu_with_exposed_ici']:.1f}% with exposed ICI"
    rows += [
        ("modelled MFU", f"{100 * r['mfu_modelled']:.1f}%, {with_ici}"),
        ("attainable MFU", f"{100 * r['mfu_attainable']:.1f}%, the limit of this program"),
        ("at best", f"{r['images_per_s']:,.0f} images/s"),
        ("the whole run", f"{r['days']:.3g} days, {r['chip_hours']:,.0f} chip-hours"),
    ]
    for i, op in enumerate(r["operations"]):
        line = f"{op['seconds']:.4f} s  {100 * op['share']:4.1f}%  {op['name']}"
        rows.append(("costliest" if i == 0 else "", line))
    for i, tried in enumerate(r.get("tried", ())):
        verdict = "fits" if tried["fits"] else "does not fit"
        size = f"{tried['global_batch']:,} images, {tried['images_per_chip']:g} a chip"
        line = f"{size}: {tried['peak_hbm_gib']:.2f} GiB, {verdict}"
        rows.append(("tried" if i == 0 else "", line))
    if r["unknown_loops"]:
        rows.append(("counted once", "loops of unknown length: " + ", ".join(r["unknown_loops"])))
    if r["unpriced_kernels"]:
        rows.append(("counted as free", "kernels: " + ", ".join(r["unpriced_kernels"])))
    rows += [("left out" if i == 0 else "", text) for i, text in enumerate(r["ignored"])]
    return lines(head, rows)


def lines(head: str, rows: list[tuple[str, str]]) -> str:
    """A head and labelled rows below it."""
    return "\n".join([head, *(f"  {label:<20}{text}" for label, text in rows)])


def _sizes(message: str) -> tuple[float, float] | None:
    """(needed, available) GiB of HBM in the compiler's error; None when it is of something else."""
    size = r"([\d.]+)([KMG]?)"
    patterns = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    for pattern in patterns:
        if match := re.search(pattern, message):
            unit = {"": 2.0**-30, "K": 2.0**-20, "M": 2.0**-10, "G": 1.0}
            return float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]
    return None
