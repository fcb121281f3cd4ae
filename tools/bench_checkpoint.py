#!/usr/bin/env python3
"""How long a checkpoint takes here: what the loop waits for, what the disk takes, and reading it.

    python tools/bench_checkpoint.py [--config configs/web_mae.py:size=300m] [--workdir DIR]
        [--rounds 3] [--devices 8]

Saves the real train state of a config (parameters, teacher, moments) by the run's own Checkpointer,
beside a plain copy of the same bytes (``np.save`` of every array, and fsync), which is the disk's
own floor. In turns, and the medians of the rounds, so that a disk that slows down slows both; a
first round, which also compiles, does not count:

  blocking   until ``save`` returns: what the loop waits for
  finished   until it is on disk: what it would wait for without the thread in the background
  restore    reading it into a fresh state, checksums included
  local ...  the same three of ``config.checkpoint.local_folder``, on the same disk

Files are read right after they were written, so out of the machine's memory where that is large
enough: the restore is then not the disk's.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

from webssl_jax import cli


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/web_mae.py:size=300m")
    parser.add_argument("--workdir", help="where the files go; deleted afterwards (a new folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=8, help="CPU devices that it is cut over")
    args, overrides = parser.parse_with_overrides(argv)
    if args.rounds < 1 or args.devices < 1:
        parser.error("--rounds and --devices: give 1 or more")
    flag = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"  # read by jax, below

    if args.workdir:
        pathlib.Path(args.workdir).mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=args.workdir))
    try:
        print(_bench(args, overrides, folder))
    finally:
        shutil.rmtree(folder)
    return 0


def _bench(args, overrides: list[str], folder: pathlib.Path) -> str:
    import jax

    from webssl_jax import checkpoints, config, methods, params, train_state
    from webssl_jax.checkpoints.local import LocalCheckpoints
    from webssl_jax.optim.optimizer import Optimizer
    from webssl_jax.sharding import mesh as meshes

    settings = config.load(args.config, overrides)
    method = methods.create(settings)
    optimizer = Optimizer.from_config(settings.optim, method.tables())
    mesh = meshes.create(settings.sharding)
    made = (method, optimizer, settings.seed, settings.global_batch, mesh)
    template = train_state.abstract(*made)
    state = jax.block_until_ready(train_state.create(*made))
    size = params.num_bytes(state)
    print(
        f"{settings.name}: {len(jax.tree.leaves(state))} arrays, {size / 1e9:.2f} GB, over "
        f"{mesh.size} device(s), in {folder}",
        file=sys.stderr,
    )
    checkpointer = checkpoints.Checkpointer(folder, keep_last=1)
    own = template._asdict()
    local = LocalCheckpoints(folder / "local", "bench", own)
    ways = {
        "": (checkpointer.save, checkpointer.wait, lambda step: checkpointer.restore(step, own)),
        "local ": (
            lambda state: local.save(state, after=-1),
            local.wait,
            lambda step: local.restore_newest(newer_than=-1),
        ),
    }
    kinds = [f"{way}{kind}" for way in ways for kind in ("blocking", "finished", "restore")]
    seconds = {name: [] for name in ("plain copy", *kinds)}
    for step in range(args.rounds + 1):
        print(f"round {step} of {args.rounds}", file=sys.stderr)
        seconds["plain copy"].append(_plain_copy(state, folder / "plain"))
        state = state._replace(step=jax.numpy.full_like(state.step, step))
        for way, (save, wait, restore) in ways.items():
            os.sync()
            began = time.perf_counter()
            save(state)
            seconds[f"{way}blocking"].append(time.perf_counter() - began)
            wait()
            os.sync()
            seconds[f"{way}finished"].append(time.perf_counter() - began)
            began = time.perf_counter()
            found = jax.block_until_ready(restore(step))
            assert int(found["step"]) == step
            seconds[f"{way}restore"].append(time.perf_counter() - began)
            del found
    checkpointer.close()
    return table({name: statistics.median(times[1:]) for name, times in seconds.items()}, size)


def table(seconds: dict[str, float], size: int) -> str:
    """Medians of ``plain copy`` and of each way's ``blocking``, ``finished`` and ``restore``, with
    rates of ``size`` bytes and the ratios that matter."""
    lines = [f"{'':14}{'seconds':>9}{'MB/s':>9}"]
    for name, value in seconds.items():
        rate = "" if name.endswith("blocking") else f"{size / value / 1e6:9,.0f}"
        lines.append(f"{name:14}{value:9.2f}{rate}")
    lines += [
        "",
        f"blocking / finished: {seconds['blocking'] / seconds['finished']:.2f} "
        "(what the loop waits for of a whole save)",
        f"finished / plain copy: {seconds['finished'] / seconds['plain copy']:.2f} "
        "(against the disk's own floor)",
        f"restore / finished: {seconds['restore'] / seconds['finished']:.2f}",
        f"local blocking / blocking: {seconds['local blocking'] / seconds['blocking']:.2f}",
    ]
    return "\n".join(lines)


def _plain_copy(state, folder: pathlib.Path) -> float:
    """Seconds to write every array as a file of its own, on disk at the end."""
    import jax
    import numpy as np

    os.sync()
    folder.mkdir()
    began = time.perf_counter()
    for i, leaf in enumerate(jax.tree.leaves(state)):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        with open(folder / f"{i}.npy", "wb") as file:
            np.save(file, np.asarray(leaf))
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


if __name__ == "__main__":
    cli.run(main)
