"""The speed of a run: images per second, the share of time that it waits for data, and MFU (model
FLOPs utilisation) on chips whose peak is known."""

from __future__ import annotations

import time

# Public dense bf16 peak per *device* (jax's unit; a v7x chip is two devices), in FLOP/s.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
}


class Throughput:
    """Rates since the last :meth:`report`.

    Args:
      global_batch: images a step.
      train_flops: model FLOPs of one image's share of a step (no recomputation counted).
      device_kind: ``jax.devices()[0].device_kind``; MFU is reported only for kinds in
        :data:`PEAK_FLOPS`.
      num_devices: of the whole mesh.
    """

    def __init__(self, global_batch: int, train_flops: float, device_kind: str, num_devices: int):
        self._global_batch = global_batch
        self._train_flops = train_flops
        self._peak = PEAK_FLOPS.get(device_kind, 0.0) * num_devices
        self.restart(0.0)

    def restart(self, wait_seconds: float) -> None:
        """Starts a new interval, after a pause in which the run did not train."""
        self._start = time.perf_counter()
        self._wait = wait_seconds

    def report(self, steps: int, wait_seconds: float) -> dict[str, float]:
        """Figures of the ``steps`` since the last call; ``wait_seconds`` is the loader's running
        total."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        images_per_s = steps * self._global_batch / elapsed
        figures = {
            "perf/images_per_s": images_per_s,
            "perf/step_s": elapsed / max(steps, 1),
            "data/wait_fraction": min((wait_seconds - self._wait) / elapsed, 1.0),
        }
        if self._peak:
            figures["perf/mfu"] = images_per_s * self._train_flops / self._peak
        self.restart(wait_seconds)
        return figures
