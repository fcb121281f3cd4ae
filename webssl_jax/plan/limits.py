"""The least time that a compiled TPU program can take on its chip, operation by operation.

A roofline (Williams et al., Roofline, 2009) of the schedule: an operation takes no less than its
matrix products at the chip's peak, the bytes that it reads from HBM and writes to it, and those
that it sends to other chips, whichever takes longest. Operations follow one another as the compiler
scheduled them. What is started and finished apart (a gather, a copy between HBM and vector memory)
has what the operations in between leave of the wire or of HBM; if that is too little, its end
waits.

Beside it stands the compiler's own estimate of the same operation (``hlo.py``). The difference is
what better tiles, layouts, fusions or kernels could win at most. docs/plan.md says what is left
out.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from webssl_jax.plan import hlo
from webssl_jax.plan.hlo_text import Instruction, Program, array_bytes, find, parse, root_of, search

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier domain send send-done recv recv-done async-update".split()
)
_FREE_TARGETS = frozenset(("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone"))
_CUTS = ("dynamic-slice", "slice", "gather")  # read as much as they put out
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # write as much as that operand has
_LAYOUT = _FREE | frozenset(
    "async copy transpose reshape slice dynamic-slice dynamic-update-slice concatenate pad reverse "
    "gather scatter broadcast fusion".split()
)
_PASSES = {"highest": 6, "high": 3}  # a product of float32 is so many of bfloat16
_SHAPE = re.compile(r"[a-z]\w*\[[\d,]*\](\{[^}]*\})?")
# What lies in the module attn of models/attention.py and in none of its layers; the products of
# jax's dot_product_attention, which the decoder calls.
_ATTENTION = re.compile(r"attention_(forward|backward)|\battn/(?!(q|k|v|out)/)|BNTS")


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one device, a second. flops: of products in bfloat16. hbm, wire: bytes. clock: cycles."""

    flops: float
    hbm: float
    wire: float
    clock: float


@dataclasses.dataclass
class Operation:
    """One operation of the schedule: all its runs in a step, on one device.

    name: in the text. place: in the model, as ``hlo.where``. modelled_s: by the compiler's cycles;
    of a collective that waits, by the wire. least_s: the limit; of what is started and finished
    apart, what its end waits.
    """

    name: str
    place: str
    category: str
    modelled_s: float
    least_s: float
    flops: float
    hbm_bytes: float
    wire_bytes: float

    @property
    def lost_s(self) -> float:
        """What could be won at most."""
        return self.modelled_s - self.least_s


def operations(
    text: str, rates: Rates, kernels: Mapping[str, float] | None = None
) -> list[Operation]:
    """Those of a program, the output of ``compiled.as_text()``; ``least_s`` of all together is the
    limit of a step. kernels: as of ``hlo.cost``.

    Raises:
      ValueError: if ``text`` has no entry computation.
    """
    program, entry = parse(text)
    reader = _Reader(program, hlo.devices_of(text))
    schedule = _Schedule(reader, rates, kernels or {}, trains="jvp(" in text)
    schedule.walk(entry, 1.0)
    return schedule.found


def by_category(found: list[Operation]) -> dict[str, list[Operation]]:
    """The operations of each category, those that lose most first, in both orders."""
    rows: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in sorted(found, key=lambda x: -x.lost_s):
        rows[operation.category].append(operation)
    return dict(sorted(rows.items(), key=lambda row: -sum(x.lost_s for x in row[1])))


# ---------------------------------------------------------------------------------- the schedule


class _Queue:
    """What was started and is not finished, in the order in which it was started."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}  # name: seconds

    def start(self, name: str, seconds: float) -> None:
        self._left[name] = seconds

    def run(self, seconds: float) -> None:
        """So long it has the wire, or HBM, for itself."""
        for name, left in self._left.items():
            used = max(min(seconds, left), 0.0)
            self._left[name] = left - used
            seconds -= used

    def finish(self, name: str) -> float:
        """The seconds until that one is done, and all that were started before it."""
        names = list(self._left)
        if name not in names:  # done with a later one
            return 0.0
        return sum(self._left.pop(each) for each in names[: names.index(name) + 1])


class _Time:
    """Of one run of a computation: seconds, and in how many of them HBM and the wire are taken."""

    def __init__(self) -> None:
        self.seconds = self.hbm = self.wire = 0.0
        self._hbm, self._wire = _Queue(), _Queue()

    def passes(self, seconds: float, hbm: float, wire: float) -> None:
        self.seconds += seconds
        self.hbm += hbm
        self.wire += wire
        self._hbm.run(seconds - hbm)
        self._wire.run(seconds - wire)

    def start(self, name: str, hbm: float, wire: float) -> None:
        self.hbm += hbm
        self.wire += wire
        self._hbm.start(name, hbm)
        self._wire.start(name, wire)

    def finish(self, name: str) -> float:
        """Returns how long its end waits."""
        hbm = self._hbm.finish(name)
        self._wire.run(hbm)
        wire = self._wire.finish(name)
        self._hbm.run(wire)
        self.seconds += hbm + wire
        return hbm + wire


class _Schedule:
    """Walks through a program and keeps what it finds."""

    def __init__(
        self, reader: _Reader, rates: Rates, kernels: Mapping[str, float], trains: bool
    ) -> None:
        self._reader, self._rates, self._kernels, self._trains = reader, rates, kernels, trains
        self.found: list[Operation] = []

    def walk(self, name: str, runs: float) -> _Time:
        """One run of a computation; ``runs``: how often a step has it."""
        reader, time = self._reader, _Time()
        starts = reader.starts(name)
        apart = reader.begun(name) | set(starts.values())
        started: dict[str, Operation] = {}
        for instruction in reader.program[name].values():
            if instruction.name in starts:  # the end of what was started apart
                before = started[starts[instruction.name]]
                before.least_s += runs * time.finish(before.name)
                if instruction.opcode != "fusion":
                    continue
            if inner := hlo.calls_of(reader.program, name, instruction):
                for body, trips in inner:
                    times = 1 if trips is None else trips  # as hlo.cost counts it
                    one = self.walk(body, runs * times)
                    time.passes(*(times * x for x in (one.seconds, one.hbm, one.wire)))
            elif not reader.is_free(instruction):
                begins = instruction.name in apart
                operation = self._operation(name, instruction, runs, time, begins)
                self.found.append(operation)
                if begins:
                    started[instruction.name] = operation
        for operation in started.values():  # what ends elsewhere: it could not end later
            operation.least_s += runs * time.finish(operation.name)
        return time

    def _operation(
        self, inside: str, instruction: Instruction, runs: float, time: _Time, apart: bool
    ) -> Operation:
        """Of one instruction. Lets the time of a run pass, or starts what is ``apart``."""
        reader, rates = self._reader, self._rates
        cycles = hlo.cycles_of(instruction) or self._kernels.get(instruction.name, 0)
        flops, at_peak = reader.flops(inside, instruction)
        wire, apart_wire = reader.wire(inside, instruction)
        hbm = 0.0 if wire or apart_wire else reader.hbm(inside, instruction)
        modelled = cycles / rates.clock + (wire / rates.wire if wire else 0.0)
        product_s, hbm_s = at_peak / rates.flops, hbm / rates.hbm
        wire_s = (wire + apart_wire) / rates.wire if wire or apart_wire else 0.0
        least = product_s if apart else max(product_s, hbm_s, wire_s)
        time.passes(least, *((0.0, 0.0) if apart else (hbm_s, wire_s)))
        if apart:
            time.start(instruction.name, hbm_s, wire_s)
        named = reader.named(instruction)
        category = self._category(named, instruction, flops, wire + apart_wire)
        amounts = (flops, hbm, wire + apart_wire)
        return Operation(
            instruction.name,
            hlo.where(named),
            category,
            runs * modelled,
            runs * least,
            *(runs * amount for amount in amounts),
        )

    def _category(
        self, named: Instruction, instruction: Instruction, flops: float, wire: float
    ) -> str:
        place = search(r'op_name="([^"]*)', named.attributes) or ""
        if wire:
            return "exposed ICI"
        if self._trains and place and "jvp(" not in place:
            return "optimiser"
        if _ATTENTION.search(place):
            return "attention"
        if flops:
            return "products"
        if self._reader.only_lays_out(instruction):
            return "copies and layout"
        return "norms" if "norm" in place else "element-wise"


# ------------------------------------------------------------------------- what an operation does


class _Reader:
    """Amounts of single operations, fusions with all that is in them."""

    def __init__(self, program: Program, devices: int) -> None:
        self.program, self._devices = program, devices

    def is_free(self, instruction: Instruction) -> bool:
        target = search(r'custom_call_target="([^"]*)"', instruction.attributes)
        return instruction.opcode in _FREE or target in _FREE_TARGETS

    def starts(self, inside: str) -> dict[str, str]:
        """{the end of what runs apart: its start}, names in one computation."""
        computation = self.program[inside]
        begun, out = self.begun(inside), {}
        for instruction in computation.values():
            if instruction.opcode.endswith("-done") and instruction.opcode not in _FREE:
                start = computation[instruction.operands[0]]
                while start.opcode == "async-update":
                    start = computation[start.operands[0]]
                out[instruction.name] = start.name
            elif self._has(instruction, "AsyncCollectiveDone"):
                if name := self._first_before(computation, instruction, begun - set(out.values())):
                    out[instruction.name] = name
        return out

    def begun(self, inside: str) -> set[str]:
        """Fusions in which a collective is started."""
        computation = self.program[inside].values()
        return {x.name for x in computation if self._has(x, "AsyncCollectiveStart")}

    def _has(self, instruction: Instruction, target: str) -> bool:
        return instruction.opcode == "fusion" and any(
            f'target="{target}"' in x.attributes for _, x in self._inside(instruction)
        )

    def _first_before(
        self, computation: Mapping[str, Instruction], end: Instruction, names: set[str]
    ) -> str | None:
        """The nearest of ``names`` that ``end`` follows from, if any."""
        seen: set[str] = set()
        queue = collections.deque(end.operands)
        while queue:
            name = queue.popleft()
            if name in names:
                return name
            if name not in seen:
                seen.add(name)
                queue.extend(computation[name].operands)
        return None

    def _inside(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all that a fusion, or what is started apart, contains."""
        called = search(r"calls=%([\w.\-]+)", instruction.attributes)
        for each in self.program[called].values() if called else ():
            yield str(called), each
            yield from self._inside(each)

    def _all(self, inside: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        yield inside, instruction
        yield from self._inside(instruction)

    def named(self, instruction: Instruction) -> Instruction:
        """Itself, or where it does not say its place in the model the first in it that does."""
        for _, each in self._all("", instruction):
            if "op_name=" in each.attributes:
                return each
        return instruction

    def only_lays_out(self, instruction: Instruction) -> bool:
        parts = (each.opcode.removesuffix("-start") for _, each in self._all("", instruction))
        return all(opcode in _LAYOUT for opcode in parts)

    def flops(self, inside: str, instruction: Instruction) -> tuple[float, float]:
        """Those of its products, and as many as take that long in bfloat16."""
        flops = at_peak = 0.0
        if hlo.is_kernel(instruction):
            flops = at_peak = float(search(r'"flops":"(\d+)"', instruction.attributes) or 0)
        for name, each in self._all(inside, instruction):
            if each.opcode in ("convolution", "dot"):
                own = hlo.flops_of(each, self.program[name])
                precision = search(r"operand_precision=\{(\w+)", each.attributes) or ""
                flops, at_peak = flops + own, at_peak + own * _PASSES.get(precision, 1)
        return flops, at_peak

    def wire(self, inside: str, instruction: Instruction) -> tuple[float, float]:
        """Bytes that it sends and waits for, and those that it only starts to send."""
        waits = starts = 0.0
        apart = instruction.opcode.endswith("-start")
        for name, each in self._all(inside, instruction):
            computation = self.program[name]
            sent = hlo.sent_by(each, computation, name, self._devices)
            if sent is None:
                continue
            begun = hlo.started_in(computation)
            if apart or each.name in begun:
                starts += sent[1]
            elif not (name != inside and hlo.is_piece(each, begun)):
                waits += sent[1]
        return waits, starts

    def hbm(self, inside: str, instruction: Instruction) -> float:
        """Bytes that it reads from HBM and writes to it, without the padding of tiles."""
        computation = self.program[inside]
        if instruction.opcode.endswith("-start"):  # a copy, or a slice: of the operands, what comes
            sources = [x for name in instruction.operands for x in _arrays(computation[name].shape)]
            place = 0 if instruction.opcode == "copy-start" else len(sources)
            size, to_hbm = _arrays(instruction.shape)[place]
            return size * (to_hbm + any(from_hbm for _, from_hbm in sources))
        read = 0.0
        for operand in dict.fromkeys(instruction.operands):
            lies = sum(size for size, in_hbm in _arrays(computation[operand].shape) if in_hbm)
            if lies:
                read += min(lies, self._read(computation, operand, instruction))
        return read + self._written(inside, instruction)

    def _read(
        self, computation: Mapping[str, Instruction], operand: str, use: Instruction
    ) -> float:
        """Bytes of ``operand`` that ``use`` needs."""
        whole = array_bytes(computation[operand].shape)
        first = use.operands[0] == operand
        if use.opcode in _CUTS and first:
            return array_bytes(use.shape)
        if use.opcode in _IN_PLACE and first and use.operands.count(operand) == 1:
            return 0.0
        if self._moves_by_itself(use):
            return 0.0
        if use.opcode in ("bitcast", "get-tuple-element"):
            return self._read_by_all(computation, use.name)
        if use.opcode == "fusion":
            inner = self.program[find(r"calls=%([\w.\-]+)", use.attributes)]
            places = [str(i) for i, name in enumerate(use.operands) if name == operand]
            given = [x for x in inner.values() if x.opcode == "parameter" and x.text in places]
            return min(whole, sum(self._read_by_all(inner, x.name) for x in given))
        return whole

    def _read_by_all(self, computation: Mapping[str, Instruction], name: str) -> float:
        uses = [x for x in computation.values() if name in x.operands and x.opcode != "tuple"]
        whole = array_bytes(computation[name].shape)
        return min(whole, sum(self._read(computation, name, use) for use in uses))

    def _moves_by_itself(self, instruction: Instruction) -> bool:
        """A collective, or a mark of one: what it moves counts on the wire."""
        collective = instruction.opcode.removesuffix("-start") in hlo.WIRE
        return collective or (instruction.opcode == "custom-call" and self.is_free(instruction))

    def _written(self, inside: str, instruction: Instruction) -> float:
        """Bytes that it writes to arrays in HBM; of those that it changes in place, the change."""
        arrays = _arrays(instruction.shape)
        parts = [self._put_out(self.program[inside], instruction)]
        if instruction.opcode == "fusion" and len(arrays) > 1:
            inner = self.program[find(r"calls=%([\w.\-]+)", instruction.attributes)]
            root = root_of(inner)
            if root.opcode == "tuple" and len(root.operands) == len(arrays):
                parts = [self._put_out(inner, inner[name]) for name in root.operands]
        if len(parts) != len(arrays):
            return sum(size for size, in_hbm in arrays if in_hbm)
        return sum(min(part, size) for part, (size, in_hbm) in zip(parts, arrays) if in_hbm)

    def _put_out(self, computation: Mapping[str, Instruction], one: Instruction) -> float:
        if one.opcode == "bitcast":
            return self._put_out(computation, computation[one.operands[0]])
        if one.opcode in _IN_PLACE:
            return array_bytes(computation[one.operands[_IN_PLACE[one.opcode]]].shape)
        if one.opcode == "parameter" or self._moves_by_itself(one):
            return 0.0
        if one.opcode == "fusion":
            inner = self.program[find(r"calls=%([\w.\-]+)", one.attributes)]
            return self._put_out(inner, root_of(inner))
        return array_bytes(one.shape)


def _arrays(shape: str) -> list[tuple[float, bool]]:
    """(bytes, whether it lies in HBM) of each array: ``S(n)`` in a layout is another memory."""
    return [
        (array_bytes(match[0]), not re.search(r"S\([1-9]", match[1] or ""))
        for match in _SHAPE.finditer(shape)
    ]
