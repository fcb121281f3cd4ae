"""The figures of the regression gate: python -m tests.tpu.update writes golden/programs.json.
Say in the commit why one moved."""

import json
import pathlib

from tests.tpu import programs
from webssl_jax.plan import hlo

GOLDEN = pathlib.Path(__file__).parent / "golden" / "programs.json"
# name -> the slice that it is compiled for
GATED = {"loop": "v5e-4", "trunk": "v5p-8", "head": "v5e-4"}


def figures(name: str) -> dict[str, float]:
    """What the gate looks at, of one device."""
    compiled, _ = programs.compiled(name, GATED[name])
    cost = hlo.cost(compiled.as_text())
    return {
        "flops": cost.flops,
        "cycles": cost.cycles,
        "wire_bytes": sum(c.count * c.wire for c in cost.collectives),
        "exposed_bytes": sum(c.count * c.wire for c in cost.collectives if c.exposed),
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
    }


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({name: figures(name) for name in GATED}, indent=1) + "\n")
