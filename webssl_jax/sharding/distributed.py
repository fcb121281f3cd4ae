"""Joining the processes of one run. On TPU pods jax finds its peers by itself; elsewhere three
flags name them."""

from __future__ import annotations

import argparse
import os

import jax

from webssl_jax.config import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``--coordinator HOST:PORT --num-processes N --process-id I``: only for machines that are not
    a TPU pod."""
    group = parser.add_argument_group("several processes (found automatically on TPU pods)")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)


def initialize(args: argparse.Namespace) -> None:
    """Call before anything touches a device.

    Raises:
      UserError: if the three flags are not given together.
    """
    flags = (args.coordinator, args.num_processes, args.process_id)
    if any(flag is not None for flag in flags):
        if any(flag is None for flag in flags):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three"
            )
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(
                f"--process-id {args.process_id}: must lie in 0..{args.num_processes - 1}"
            )
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()
