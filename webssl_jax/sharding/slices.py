"""TPU slices by the names under which one orders them, for compiling without having one.

The traps of the names: v4-N, v5p-N and tpu7x-N count TensorCores, two a chip, so v5p-512 is 256
chips; v5e-N and v6e-N count chips. A chip of v4 and v5p is one jax device (both cores work as one),
one of tpu7x is two. ``v5litepod-N``, gcloud's word, is v5e-N.

Sources: shapes and hosts are Google Cloud's documentation of each generation; usable HBM is what
libtpu 0.0.42 says when a program exceeds it; clocks follow from the public peak and the size of the
matrix units (v4 and v5p 8 of 128 x 128, v5e 4; v6e and each device of tpu7x 4 of 256 x 256); link
rates are the public ICI bandwidth of one link in one direction, ``bandwidth`` that of a chip's HBM.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re
from typing import TYPE_CHECKING

from webssl_jax.config import UserError
from webssl_jax.sharding import compiler_options

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    topology: its name for the compiler. named_by_cores: whether N in a name is twice the chips.
    devices: jax devices a chip. device_kind: as jax reports it. hbm_gib: usable, a device. clock:
    Hz. link: bytes a second of one link in one direction. pod: sides of the largest slice.
    bandwidth: bytes a second of a device's HBM.
    """

    topology: str
    named_by_cores: bool
    devices: int
    device_kind: str
    hbm_gib: float
    clock: float
    link: float
    pod: tuple[int, ...]
    bandwidth: float


CHIPS = {
    "v4": Chip("v4", True, 1, "TPU v4", 30.75, 1.05e9, 45e9, (16, 16, 16), 1228e9),
    "v5e": Chip("v5e", False, 1, "TPU v5 lite", 15.75, 1.5e9, 45e9, (16, 16), 819e9),
    "v5p": Chip("v5", True, 1, "TPU v5", 95.74, 1.75e9, 90e9, (16, 20, 28), 2765e9),
    "v6e": Chip("v6e", False, 1, "TPU v6 lite", 31.25, 1.75e9, 90e9, (16, 16), 1640e9),
    "tpu7x": Chip("tpu7x", True, 2, "TPU7x", 94.75, 2.2e9, 100e9, (16, 24, 24), 7380e9 / 2),
}
ALIASES = {"v5litepod": "v5e"}
_SMALL = {3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)), 2: ((1, 1), (2, 2), (2, 4))}
_FLAT = ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_HOST = 4  # chips
# libtpu looks for the machine it runs on; this is none, and several may compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # need not be the target
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """``sides``: chips along each axis. ``wrapped``: which axes are rings."""

    name: str
    chip: Chip
    sides: tuple[int, ...]

    @property
    def generation(self) -> str:
        """A key of :data:`CHIPS`."""
        return self.name.partition("-")[0]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def hosts(self) -> int:
        """Machines: four chips each, or one with all of a slice of up to eight v5e or v6e."""
        flat = len(self.sides) == 2
        return 1 if flat and self.chips <= 8 else max(1, self.chips // _HOST)

    @property
    def wrapped(self) -> tuple[bool, ...]:
        if len(self.sides) == 2:
            return tuple(side == 16 for side in self.sides)
        return (min(self.sides) >= 4,) * 3  # optical switches join cubes of 4 into a torus

    @property
    def ici(self) -> float:
        """Bytes a second that one device can send at most: all links at once, two along a ring, one
        along a line."""
        links = sum(1 + ring for side, ring in zip(self.sides, self.wrapped) if side > 1)
        return links * self.chip.link / self.chip.devices

    def devices(self, slices: int = 1) -> list[jax.Device]:
        """Devices to compile for, of ``slices`` such slices; nothing can run on them.

        Raises:
          UserError: without libtpu, which holds the compiler.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "libtpu, the compiler for TPUs, is not installed (it needs no TPU): "
                "pip install 'webssl_jax[plan]'"
            )
        from jax.experimental import topologies  # names of slices need none of it

        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        compiler_options.set_libtpu_flags()
        flat = len(self.sides) == 2
        options: dict[str, str | tuple[int, ...]] = {
            "chips_per_host_bounds": (1, 1, 1) if self.chips == 1 else (2, 2, 1)
        }
        if self.chip.named_by_cores and self.chip.devices == 1:
            options["chip_config_name"] = "megacore"
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{self.chip.topology}:{'x'.join(map(str, self.sides))}",
            wrap=(*self.wrapped, False) if flat else self.wrapped,
            num_slices=slices,
            **options,
        )
        return list(described.devices)


def find(name: str) -> Slice:
    """The slice of that name.

    Raises:
      UserError: for a name that does not exist, with the nearest that do.
    """
    match = re.fullmatch(r"([a-z]\w*)-(\d+)", name)
    generation = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in CHIPS:
        size = match[2] if match else "256"
        near = difflib.get_close_matches(generation, CHIPS, n=2) or CHIPS
        names = ", ".join(f"{known}-{size}" for known in near)
        raise UserError(f"--slice {name}: no such generation of TPU; try {names}")
    chip, number = CHIPS[generation], int(match[2])
    shapes = _shapes(chip)
    if number not in shapes:
        below = [n for n in shapes if n < number][-1:]
        above = [n for n in shapes if n > number][:1]
        names = ", ".join(f"{generation}-{n}" for n in below + above)
        counted = "TensorCores, two a chip" if chip.named_by_cores else "chips"
        raise UserError(
            f"--slice {name}: no such slice; the nearest are {names} ({generation}-N counts "
            f"{counted})"
        )
    return Slice(f"{generation}-{number}", chip, shapes[number])


def _shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """{N of the name: sides}, ascending. Above 32 chips, generations with three axes come in cubes
    of 4, and of all boxes with the same number the one nearest to a cube is what one gets."""
    sides = list(_SMALL[len(chip.pod)])
    if len(chip.pod) == 2:
        sides += _FLAT
    else:
        ranges = (range(4, side + 1, 4) for side in chip.pod)
        boxes = sorted({box for box in itertools.product(*ranges) if list(box) == sorted(box)})
        best: dict[int, tuple[int, ...]] = {}
        for box in boxes:
            best[math.prod(box)] = min(best.get(math.prod(box), box), box, key=sum)
        sides += best.values()
    scale = 2 if chip.named_by_cores else 1
    return dict(sorted((scale * math.prod(box), box) for box in sides))
