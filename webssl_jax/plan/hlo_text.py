"""The text of an HLO module: its computations, line by line, and the arrays of a line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f4e2m1fn": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
# What a kernel says of itself stands on lines of its own within its instruction.
_METADATA = re.compile(r"kernel_metadata=\{\n(.*)\n\}")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = shape opcode(operands), attributes``. ``text``: what stands between the
    parentheses, which is a constant's value or a parameter's number."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool


Program = Mapping[str, Mapping[str, Instruction]]  # computation -> its lines, by name


def parse(text: str) -> tuple[Program, str]:
    """(the program, the name of its entry computation).

    Raises:
      ValueError: if it has none.
    """
    program: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in _METADATA.sub(r"kernel_metadata={\1}", text).splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = program.setdefault(match[1], {})
                entry = match[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[1], match[2], "ROOT %" in line[:12])
            current[match[1]] = instruction
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return program, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    text = rest[start + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", text))
    return Instruction(name, shape, rest[:start], operands, text, rest[end:], root)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def root_of(computation: Mapping[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def array_bytes(shape: str) -> float:
    """Bytes of an array or a tuple of arrays, as HLO writes it, without the padding of tiles."""
    total = 0.0
    for dtype, dims in ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        bits = _BITS.get(dtype) or int(search(r"(\d+)", dtype) or 0)
        total += math.prod(map(int, dims.split(","))) * bits / 8 if dims else bits / 8
    return total


def search(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def find(pattern: str, text: str) -> str:
    found = search(pattern, text)
    if found is None:
        raise ValueError(f"{text[:200]!r} has nothing like {pattern}")
    return found
