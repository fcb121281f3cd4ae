"""One process of several: computes what the modules beside this one do, one after the other, and
prints all as one JSON line.

python -m tests.multihost.worker COORDINATOR PROCESSES PROCESS FOLDER MODULE ...
"""

import importlib
import json
import pathlib
import sys

import jax


def main(coordinator, processes, process, folder, *modules):
    jax.distributed.initialize(coordinator, int(processes), int(process))
    found = {}
    for name in modules:
        module = importlib.import_module(f"tests.multihost.{name}")
        found[name] = module.compute(pathlib.Path(folder) / name)
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
