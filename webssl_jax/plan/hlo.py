"""What a compiled TPU program costs, read from the text of its optimised HLO.

``compiled.cost_analysis()`` counts the body of a loop once, whatever its trip count, and charges
no interconnect; its ``optimal_seconds`` is wrong for every scanned step. The text has what is
needed: beside each scheduled operation the compiler's own estimate of its cycles
(``estimated_cycles``), and every collective in the form in which it was scheduled. Here the call
graph is walked with the trip counts of its loops.

What one device sends in a ring of g devices, for an operand of n bytes on it (Chan et al.,
Collective communication, 2007): all-gather n (g - 1), reduce-scatter and all-to-all n (g - 1) / g,
all-reduce 2 n (g - 1) / g, permute n. A collective is exposed when it is scheduled as one operation
that waits; started and finished apart, it may hide behind what lies between.

A Pallas kernel is a custom call that states its flops (``pl.CostEstimate``) and no cycles; those
are for the caller to give (``telemetry/bundles.py``).

What goes to other slices is no collective in the text: the device hands it to its host, by a
``send`` whose attributes name the collective that the hosts carry out.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from webssl_jax.plan.hlo_text import (
    ARRAY,
    Instruction,
    Program,
    array_bytes,
    find,
    parse,
    root_of,
    search,
)

_NO_ESTIMATE = 2**62  # the compiler writes int64's greatest value where it has none
# opcode -> what a device sends of each operand byte, in a group of g
WIRE = {
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
    "collective-broadcast": lambda g: 1.0,
}
_DTYPES = {"bf16": "bfloat16", "f32": "float32", "pred": "bool"}
_DTYPES |= {f"s{bits}": f"int{bits}" for bits in (8, 16, 32)}
_DTYPES |= {f"u{bits}": f"uint{bits}" for bits in (8, 16, 32)}
_KERNELS = ("tpu_custom_call", "mosaic")  # targets of custom calls


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel's custom call. operands, results: (dtype, shape) of each array. config: what
    the compiler is told of it, the kernel itself included, as JSON."""

    name: str
    operands: list[tuple[str, list[int]]]
    results: list[tuple[str, list[int]]]
    config: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the schedule. count: how often a step runs it. wire: bytes one device sends
    in one run."""

    kind: str
    count: float
    wire: float
    exposed: bool
    where: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of the program on one device.

    flops: of its matrix products and convolutions. cycles: the compiler's estimates, summed.
    between_slices: bytes that it hands to its host for other slices.
    operations: {where in the model: cycles}. unknown_loops: loops whose trip count the text does
    not tell; counted once. unpriced: kernels (custom calls) whose cycles nobody gave, counted as
    free.
    """

    flops: float
    cycles: float
    between_slices: float
    operations: Mapping[str, float]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    unpriced: tuple[str, ...]


def cost(text: str, kernels: Mapping[str, float] | None = None) -> Cost:
    """Reads a program: the output of ``compiled.as_text()``. kernels: {name of a Pallas kernel's
    instruction: cycles of one run}.

    Raises:
      ValueError: if ``text`` has no entry computation.
    """
    program, entry = parse(text)
    devices = devices_of(text)
    flops = cycles = between = 0.0
    operations: dict[str, float] = collections.defaultdict(float)
    found: list[Collective] = []
    unknown, unpriced = set(), set()
    for run in _runs(program, entry):
        count, computation = run.times, program[run.name]
        if not run.trips_known:
            unknown.add(run.name)
        for instruction in computation.values():
            if instruction.opcode in ("convolution", "dot"):
                flops += count * flops_of(instruction, computation)
            if instruction.opcode == "send" and "_xla_megascale" in instruction.attributes:
                between += count * array_bytes(computation[instruction.operands[0]].shape)
            own: float = cycles_of(instruction)
            if not own and is_kernel(instruction):
                flops += count * int(search(r'"flops":"(\d+)"', instruction.attributes) or 0)
                own = (kernels or {}).get(instruction.name, 0)
                if not own:
                    unpriced.add(where(instruction))
            if run.scheduled and own:
                cycles += count * own
                operations[where(instruction)] += count * own
        found += _collectives(computation, run, devices)
    lists = (tuple(found), tuple(sorted(unknown)), tuple(sorted(unpriced)))
    return Cost(flops, cycles, between, dict(operations), *lists)


def devices_of(text: str) -> int:
    """How many the program is cut over."""
    return int(search(r"num_partitions=(\d+)", text.partition("\n")[0]) or 1)


def kernels_of(text: str) -> list[Kernel]:
    """A program's Pallas kernels, without those that state their cycles."""
    program, _ = parse(text)
    out = []
    for computation in program.values():
        for instruction in computation.values():
            if is_kernel(instruction) and not cycles_of(instruction):
                shapes = [computation[name].shape for name in instruction.operands]
                _, _, config = instruction.attributes.partition("backend_config=")
                config, _ = json.JSONDecoder().raw_decode(config)
                given = ("custom_call_config", "scoped_memory_configs")
                config = json.dumps({key: config[key] for key in given if key in config})
                operands, results = _arrays(",".join(shapes)), _arrays(instruction.shape)
                out.append(Kernel(instruction.name, operands, results, config))
    return out


def _arrays(shapes: str) -> list[tuple[str, list[int]]]:
    found = ARRAY.findall(re.sub(r"\{[^}]*\}", "", shapes))
    return [
        (_DTYPES.get(dtype, dtype), [int(size) for size in dims.split(",") if size])
        for dtype, dims in found
    ]


def is_kernel(instruction: Instruction) -> bool:
    return search(r'custom_call_target="([^"]*)"', instruction.attributes) in _KERNELS


def where(instruction: Instruction) -> str:
    """The place in the model that an operation stems from, in words for people."""
    name = search(r'op_name="([^";]*)', instruction.attributes)
    if not name:
        return instruction.opcode
    again = "rematted_computation" in name
    phase = "backward" if "transpose(" in name else "forward" if "jvp(" in name else ""
    phase = "recomputed" if again else phase
    drop = r"^jit\([^)]*\)/|while/body/|closed_call/|checkpoint/|rematted_computation/|jit\(\w+\)/"
    name = re.sub(drop, "", name)
    name = re.sub(r"(?:transpose\()?jvp\(([^)]*)\)+", r"\1", name)
    return f"{phase} {name.strip('/')}".strip()


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """``replica_groups`` in any of its notations as (groups, size) partition ids.

    Raises:
      ValueError: for a notation that is not known.
    """
    text = search(r"replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)", attributes) or "{}"
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", match[1])
        sizes, names = [int(size) for _, size in axes], [name for name, _ in axes]
        used = [names.index(name) for name in re.findall(r"'(\w+)'", match[3])]
        ids = _order(match[2]) if match[2] else np.arange(math.prod(sizes))
        if ":(" not in match[3] and ids is not None:
            ids = np.moveaxis(ids.reshape(sizes), used, range(-len(used), 0))
            return ids.reshape(-1, math.prod(sizes[i] for i in used))
    elif match := re.match(r"\[([\d,]+)\]<=(\[\S+)", text):
        ids = _order(match[2])
        if ids is not None:
            return ids.reshape(tuple(map(int, match[1].split(","))))
    elif text.startswith("{{"):
        rows = re.findall(r"\{([\d,]+)\}", text)
        return np.array([[int(i) for i in row.split(",")] for row in rows])
    elif text.startswith("{}"):
        return np.arange(devices)[None]
    raise ValueError(f"replica_groups={text}: a notation that this reader does not know")


def _order(text: str) -> np.ndarray | None:
    """``[8,16]T(1,0)``: 0 ... 127 as (8, 16), transposed to (16, 8). None: another notation."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return None
    dims = tuple(map(int, match[1].split(",")))
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(tuple(map(int, match[2].split(",")))) if match[2] else ids


class _Run(NamedTuple):
    """A computation, called from one place. times: how often. scheduled: its operations each
    for itself, not as parts of a fusion. hidden: it is started and finished apart. trips_known:
    False for the body of a loop that runs nobody knows how often."""

    name: str
    times: float
    scheduled: bool = True
    hidden: bool = False
    trips_known: bool = True


def _runs(program: Program, entry: str) -> Iterator[_Run]:
    """Everything that the program runs."""
    stack = [_Run(entry, 1.0)]
    while stack:
        run = stack.pop()
        yield run
        for instruction in program[run.name].values():
            for name, trips in calls_of(program, run.name, instruction):
                times, known = run.times * (1 if trips is None else trips), trips is not None
                stack.append(run._replace(name=name, times=times, trips_known=known))
            if instruction.opcode in ("fusion", "async-start"):
                name = find(r"calls=%([\w.\-]+)", instruction.attributes)
                apart = run.hidden or instruction.opcode == "async-start"
                whole = run.scheduled and instruction.opcode != "fusion"
                stack.append(_Run(name, run.times, scheduled=whole, hidden=apart))


def calls_of(
    program: Program, inside: str, instruction: Instruction
) -> list[tuple[str, int | None]]:
    """(computation, how often) of a loop, a conditional or a call. Of a conditional's branches each
    is taken to run. None: nobody knows how often."""
    attributes = instruction.attributes
    if instruction.opcode == "while":
        trips = _trips(program, program[inside], instruction)
        return [(find(r"body=%([\w.\-]+)", attributes), trips)]
    if instruction.opcode == "conditional":
        names = search(r"branch_computations=\{([^}]*)\}", attributes) or attributes
        return [(name, 1) for name in re.findall(r"%([\w.\-]+)", names) if name in program]
    if instruction.opcode == "call":
        return [(find(r"to_apply=%([\w.\-]+)", attributes), 1)]
    return []


def _trips(program: Program, caller: Mapping[str, Instruction], loop: Instruction) -> int | None:
    """How often a loop runs that counts one number up to a constant, as all scans do; else None."""
    if known := search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known)
    condition = program[find(r"condition=%([\w.\-]+)", loop.attributes)]
    body = program[find(r"body=%([\w.\-]+)", loop.attributes)]
    test = root_of(condition)
    if test.opcode == "fusion":  # of the comparison alone
        inner = program[find(r"calls=%([\w.\-]+)", test.attributes)]
        test, given = root_of(inner), test.operands
        sides = [
            condition[given[int(inner[name].text)]]
            if inner[name].opcode == "parameter"
            else inner[name]
            for name in test.operands
        ]
    else:
        sides = [condition[name] for name in test.operands]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    start, limit = (_number_of(side, loop, caller) for side in sides)
    step = _step(sides[0], body)
    if start is None or limit is None or step is None:
        return None
    return max(math.ceil((limit - start) / step), 0)


def _number_of(
    side: Instruction, loop: Instruction, caller: Mapping[str, Instruction]
) -> int | None:
    """A constant, or the constant that a loop's variable begins with."""
    if side.opcode == "get-tuple-element":
        index = int(find(r"index=(\d+)", side.attributes))
        side = caller[caller[loop.operands[0]].operands[index]]
        while side.opcode in ("copy", "bitcast"):
            side = caller[side.operands[0]]
    if side.opcode == "constant" and re.fullmatch(r"-?\d+", side.text):
        return int(side.text)
    return None


def _step(counter: Instruction, body: Mapping[str, Instruction]) -> int | None:
    """What the body adds to the loop's variable that the condition looks at."""
    if counter.opcode != "get-tuple-element":
        return None
    index = int(find(r"index=(\d+)", counter.attributes))
    new = body[root_of(body).operands[index]]
    if new.opcode != "add":
        return None
    steps = [body[name] for name in new.operands if body[name].opcode == "constant"]
    return int(steps[0].text) if len(steps) == 1 else None


def cycles_of(instruction: Instruction) -> int:
    found = search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    cycles = int(found or 0)
    return cycles if cycles < _NO_ESTIMATE else 0


# ------------------------------------------------------------------------------ products and wires


def flops_of(instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Two operations a multiply-add, of those that meet no padding and no hole of a dilation: the
    TPU compiler writes a batched product as a convolution that is dilated along the batch."""
    out = _dims(instruction.shape)
    left, right = (_dims(computation[name].shape) for name in instruction.operands[:2])
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        axes = find(r"lhs_contracting_dims=\{([\d,]*)\}", attributes).split(",")
        contracted = [left[int(axis)] for axis in axes if axis]
        return 2.0 * math.prod(out) * math.prod(contracted)
    labels = re.split("_|->", find(r"dim_labels=(\w+->\w+)", attributes))
    size_of = [dict(zip(label, dims)) for label, dims in zip(labels, (left, right, out))]
    base, kernel, result = size_of
    window = search(r"window=\{([^}]*)\}", attributes) or ""
    spatial = sorted(label for label in base if label.isdigit())
    pairs = 1
    for number, label in enumerate(spatial):
        pairs *= _meetings(base[label], result[label], _window(window, number))
    batch_groups = int(search(r"batch_group_count=(\d+)", attributes) or 1)
    return 2.0 * pairs * base["b"] / batch_groups * kernel["i"] * kernel["o"]


def _window(text: str, number: int) -> dict[str, int]:
    """Size, stride, padding below and dilations of one spatial axis."""
    values = {"size": 1, "stride": 1, "low": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    for name, entries in re.findall(r"(\w+)=(\S+)", text):
        entry = entries.split("x")[number]
        if name == "pad":
            values["low"] = int(entry.split("_")[0])
        elif name in values:
            values[name] = int(entry)
    return values


def _meetings(base: int, result: int, window: Mapping[str, int]) -> int:
    """Pairs of (place in the result, place in the kernel) that meet an element of the input."""
    places = np.arange(result)[:, None] * window["stride"] - window["low"]
    places = places + np.arange(window["size"])[None] * window["rhs_dilate"]
    inside = (places >= 0) & (places <= (base - 1) * window["lhs_dilate"])
    return int(np.count_nonzero(inside & (places % window["lhs_dilate"] == 0)))


def _collectives(
    computation: Mapping[str, Instruction], run: _Run, devices: int
) -> Iterator[Collective]:
    started = started_in(computation)
    for instruction in computation.values():
        sent = sent_by(instruction, computation, run.name, devices)
        if sent is None or (is_piece(instruction, started) and not run.scheduled):
            continue
        kind, wire = sent
        hidden = run.hidden or instruction.name in started or instruction.opcode.endswith("-start")
        yield Collective(kind, run.times, wire, not hidden, where(instruction))


def started_in(computation: Mapping[str, Instruction]) -> frozenset[str]:
    """A gather that the compiler takes apart appears in every piece of it, each a fusion. These are
    the names of those that start here, where alone they are counted."""
    return frozenset(
        operand
        for instruction in computation.values()
        if 'target="AsyncCollectiveStart"' in instruction.attributes
        for operand in instruction.operands
    )


def is_piece(instruction: Instruction, started: frozenset[str]) -> bool:
    piece = "async_collective_fusion_config" in instruction.attributes
    return piece and instruction.name not in started


def sent_by(
    instruction: Instruction, computation: Mapping[str, Instruction], inside: str, devices: int
) -> tuple[str, float] | None:
    """(kind of collective, bytes that one device sends in one run); None where it is no collective,
    or one of a single device. inside: the computation's name."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in WIRE:
        return None
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion of the sum and of cutting out one's own part
    if kind == "collective-permute":
        listed = search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes) or ""
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", listed)]
        size = 2 if any(source != target for source, target in pairs) else 1
    else:
        size = groups_of(instruction.attributes, devices).shape[1]
    if size == 1:
        return None
    sent = sum(array_bytes(computation[operand].shape) for operand in instruction.operands)
    return kind, sent * WIRE[kind](size)


def _dims(shape: str) -> list[int]:
    match = ARRAY.match(shape)
    if match is None:
        raise ValueError(f"{shape}: not the shape of one array")
    return [int(size) for size in match[2].split(",") if size]
