"""What is dear to make and the same for all of pytest's workers."""

import fcntl
import json
import os


def once(tmp_path_factory, name, make):
    """``make(folder)``, which JSON can hold, called by the first of pytest's workers that needs it,
    for all of them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = folder / f"{name}.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            made.write_text(json.dumps(make(folder / name)))
    return json.loads(made.read_text())
