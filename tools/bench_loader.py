#!/usr/bin/env python3
"""Measures the loader against a torch ``DataLoader`` with torchvision's transforms.

    python tools/bench_loader.py
    python tools/bench_loader.py --input 'shards/train-*.arrayrecord' --views dino --json

Three workers make the same views of the same JPEG bytes out of the same ArrayRecord shards:

    ours    ``TrainLoader``: uint8 batches; normalisation is left to the device
    torch   ``DataLoader``: the originals' transforms on Pillow images, collated and normalised
            (DINOv2: its augmentation with the blur as executed, collated crop by crop in half
            precision; MAE and CLIP: float32)
    floor   decoding and an antialiased resize for each crop, by our resampler, in one thread: no
            reading, no distortion, no batches

Views: ``dino`` 2 x 224 + 8 x 98, ``dino_device`` the same with the distortions left to the device
(``method.view.distort_on``; torch does them all the same), ``mae`` and ``clip`` 1 x 224. The
workers run in turns, round after round, and each waits until it is idle before and after, with the
same batches read ahead. So the CPU time of a round (of the process and all its workers, from /proc)
is that of exactly its images. Printed are medians over the rounds with the lowest and the highest.

torchvision is needed here alone, and no wheel of it goes with a CPU build of torch. Put it aside:

    pip install --no-deps --target /tmp/torchvision torchvision==0.28.0
    PYTHONPATH=/tmp/torchvision python tools/bench_loader.py
"""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError

_BATCHES = {"dino": 4, "dino_device": 4, "mae": 16, "clip": 16}  # a round


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        metavar="PATTERN",
        help="ArrayRecord shards with images; by default photo-like JPEGs are made",
    )
    parser.add_argument("--views", nargs="+", choices=_BATCHES, default=list(_BATCHES))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all workers (default: 5)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="worker processes of ours and of torch (default: 2); 0: our threads, torch's main one",
    )
    parser.add_argument("--threads", type=int, default=1, help="our threads a worker (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    return parser


cli.help_early(_parser, __name__)

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from webssl_jax.data import records
from webssl_jax.data.decode import open_image
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import RandomResizedCropView, sample_crop
from webssl_jax.telemetry.bench_worker import BenchWorker, format_range, median_range

VIEWS = {
    "dino": MultiCropView(),
    "dino_device": MultiCropView(distort_on="device"),
    "mae": RandomResizedCropView(224, scale=(0.2, 1.0)),
    "clip": RandomResizedCropView(224, scale=(0.9, 1.0), flip=0.0),
}
SIDES = ("ours", "torch", "floor")
_BATCH = 64
_READ_AHEAD = 2  # batches: a process of ours, a worker of torch
_PHOTOS, _PHOTO_BYTES = 64, 37_000
# Grain's shuffle walks a cycle of at least 2^16 indices: a draw from 64 records takes 0.5 ms, from
# as many as real sets have next to nothing. So each photo is written many times.
_COPIES = 32


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if args.rounds < 1 or args.workers < 0 or args.threads < 1:
        raise UserError("need --rounds and --threads of at least 1 and --workers of at least 0")
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the torch side needs {package}; `python tools/bench_loader.py --help` says how "
                "to install it aside"
            )
    with tempfile.TemporaryDirectory(prefix="bench_loader.") as folder:
        pattern = args.input or _make_photos(Path(folder))
        source = ArrayRecordSource(pattern)
        sizes = [len(records.decode(source[i]).image) for i in range(min(len(source), 256))]
        described = (
            str(source)
            if args.input
            else f"{_PHOTOS} photo-like JPEGs made by this tool, 500 x 375 pixels, quality 85"
        )
        result: dict[str, Any] = {
            "input": described,
            "mean_kilobytes": round(statistics.mean(sizes) / 1000, 1),
            "workers": args.workers,
            "threads": args.threads,
            "rounds": args.rounds,
            "views": {name: _compare(name, pattern, args) for name in args.views},
        }
    print(json.dumps(result) if args.json else _table(result))
    return 0


def _compare(name: str, pattern: str, args) -> dict[str, Any]:
    """Runs the workers in turns. Rates are images per CPU second."""
    workers = {
        side: _LoaderWorker(_serve, side, name, pattern, args.workers, args.threads)
        for side in SIDES
    }
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for side in workers.values():
            side.receive()
        for number in range(args.rounds):
            for key, side in workers.items():
                rates[key].append(_BATCHES[name] * _BATCH / side.run(_BATCHES[name]))
            latest = ", ".join(f"{key} {found[-1]:.4g}" for key, found in rates.items())
            print(f"{name}: round {number + 1} of {args.rounds}: {latest}", file=sys.stderr)
    finally:
        for side in workers.values():
            side.stop()
    ratios = [o / t for o, t in zip(rates["ours"], rates["torch"], strict=True)]
    floors = [o / f for o, f in zip(rates["ours"], rates["floor"], strict=True)]
    return {
        "images_per_cpu_second": {key: median_range(found) for key, found in rates.items()},
        "ratio": median_range(ratios),
        "share_of_floor": median_range(floors),
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['input']}, {result['mean_kilobytes']} kB each; {result['workers']} worker "
        f"processes, {result['threads']} thread(s) each; {result['rounds']} rounds in turns",
        "",
        "view        side   images per CPU second",
    ]
    for name, view in result["views"].items():
        for side in SIDES:
            found = format_range(view["images_per_cpu_second"][side])
            lines.append(f"{name:11s} {side:6s} {found}")
        lines.append(f"{name:11s} ratio ours / torch  {format_range(view['ratio'])}")
        lines.append(f"{name:11s} ratio ours / floor  {format_range(view['share_of_floor'])}")
    return "\n".join(lines)


class _LoaderWorker(BenchWorker):
    """One side in a process of its own, whose CPU time is counted with that of its children."""

    def run(self, batches: int) -> float:
        """CPU seconds of so many batches."""
        before = self._idle_cpu_seconds()
        self.ask(batches)
        return self._idle_cpu_seconds() - before

    def _idle_cpu_seconds(self) -> float:
        """CPU time so far, once everything that is read ahead is ready: no CPU time passes, and no
        thread waits for a processor. (Some wake now and then just to look round.)"""
        before, quiet, running = -1, 0, True
        while quiet < 3 or running:
            time.sleep(0.05)
            ticks, running = _activity(self.pid)
            before, quiet = ticks, quiet + 1 if ticks == before else 0
        return ticks / os.sysconf("SC_CLK_TCK")


def _activity(root: int) -> tuple[int, bool]:
    """CPU time of a process and all below it, in clock ticks, and whether any thread of them is
    running or waiting for a processor or a disk."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        if (fields := _stat(file)) is not None:
            stats[int(file.parent.name)] = fields
    family = {root}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in family} - family:
        family |= more
    ticks, running = 0, False
    for pid in family & stats.keys():
        ticks += int(stats[pid][11]) + int(stats[pid][12])
        threads = [_stat(file) for file in Path(f"/proc/{pid}/task").glob("*/stat")]
        running |= any(fields is not None and fields[0] in "RD" for fields in threads)
    return ticks, running


def _stat(file: Path) -> list[str] | None:
    """The fields of a /proc stat file from the state on; None if it ended meanwhile."""
    try:
        return file.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _serve(pipe, side: str, name: str, pattern: str, workers: int, threads: int) -> None:
    """The process of one side: so many batches for every number received, until 0."""
    make = {"ours": _ours, "torch": _torch, "floor": _floor}[side]
    batches = make(name, ArrayRecordSource(pattern), workers, threads)
    next(batches)
    pipe.send(None)
    while wanted := pipe.recv():
        for _ in range(wanted):
            next(batches)
        pipe.send(None)
    batches.close()


def _ours(name: str, source: ArrayRecordSource, workers: int, threads: int) -> Iterator[Any]:
    with TrainLoader(
        source,
        VIEWS[name],
        global_batch=_BATCH,
        seed=0,
        workers=workers,
        threads=threads,
        read_ahead=_READ_AHEAD * max(workers, 1),
    ) as loader:
        yield from loader


def _floor(name: str, source: ArrayRecordSource, workers: int, threads: int) -> Iterator[None]:
    del workers, threads
    view, rng = VIEWS[name], np.random.default_rng(0)
    if isinstance(view, MultiCropView):
        crops = [(view.global_size, view.global_scale)] * 2
        crops += [(view.local_size, view.local_scale)] * view.local_count
    else:
        crops = [(view.size, view.scale)]
    images = [records.decode(source[i]).image for i in range(min(len(source), 1024))]
    for number, data in enumerate(itertools.cycle(images), 1):
        opened = open_image(data)
        boxes = [
            (sample_crop(opened.width, opened.height, scale, view.ratio, rng), size)
            for size, scale in crops
        ]
        decoded = opened.decode(max(size / min(box[2:]) for box, size in boxes))
        for box, size in boxes:
            decoded.crop(box, size)
        if number % _BATCH == 0:
            yield


def _torch(name: str, source: ArrayRecordSource, workers: int, threads: int) -> Iterator[Any]:
    """The originals' way: torch and torchvision do everything but read the record."""
    del threads
    import torch

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        _TorchSet(name, source),
        batch_size=_BATCH,
        sampler=_endless(len(source)),
        num_workers=workers,
        prefetch_factor=_READ_AHEAD if workers else None,
        # Not torch's default of forking: ArrayRecord's threads do not survive it.
        multiprocessing_context="spawn" if workers else None,
        collate_fn=_collate_crops if isinstance(VIEWS[name], MultiCropView) else None,
    )
    yield from loader


@functools.cache
def _torchvision_transforms():
    import torch

    # The wheel's compiled part goes with a CUDA build of torch. All that the Python part needs of
    # it at import are the names of two operators, which no transform calls.
    global _operators  # they vanish with the object
    _operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _operators.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    from torchvision import transforms

    return transforms


def _original_views(name: str) -> list:
    """One torchvision transform a view, from a Pillow image to a normalised tensor."""
    t, view = _torchvision_transforms(), VIEWS[name]

    def composed(size, scale, distortions=()):
        crop = t.RandomResizedCrop(size, scale=scale, interpolation=t.InterpolationMode.BICUBIC)
        flip = [t.RandomHorizontalFlip(view.flip)] if view.flip else []
        normalize = t.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return t.Compose([crop, *flip, *distortions, t.ToTensor(), normalize])

    if not isinstance(view, MultiCropView):
        return [composed(view.size, view.scale)]
    views, d = [], view.distortion
    for size, scale, blur, solarize, count in (
        (view.global_size, view.global_scale, view.blur[0], view.solarize[0], 1),
        (view.global_size, view.global_scale, view.blur[1], view.solarize[1], 1),
        (view.local_size, view.local_scale, view.blur[2], view.solarize[2], view.local_count),
    ):
        jitter = t.ColorJitter(d.brightness, d.contrast, d.saturation, d.hue)
        distortions = [t.RandomApply([jitter], p=d.jitter), t.RandomGrayscale(d.grayscale)]
        distortions += [t.RandomApply([t.GaussianBlur(9, sigma=(0.1, 2.0))], p=blur)]
        distortions += [t.RandomSolarize(128, p=solarize)] if solarize else []
        views += [composed(size, scale, distortions)] * count
    return views


class _TorchSet:
    """A map-style data set, as torch wants it."""

    def __init__(self, name: str, source: ArrayRecordSource):
        self._name, self._source = name, source

    def __len__(self) -> int:
        return len(self._source)

    @functools.cached_property
    def _views(self) -> list:
        return _original_views(self._name)

    def __getitem__(self, index: int):
        data = records.decode(self._source[index]).image
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [view(image) for view in self._views]


def _collate_crops(samples: list):
    import torch

    stacks = (range(2), range(2, len(samples[0])))
    return [torch.stack([s[i] for i in crops for s in samples]).half() for crops in stacks]


def _endless(size: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(size).tolist()


def _make_photos(folder: Path) -> str:
    """Writes a shard of JPEGs that cost what photographs cost, and returns its name."""
    file = folder / records.shard_name("photos", 0, 1)
    writer = array_record_module.ArrayRecordWriter(str(file), records.WRITER_OPTIONS)
    photos = [_photo(np.random.default_rng(number)) for number in range(_PHOTOS)]
    for number, data in enumerate(photos * _COPIES):
        record = records.Record(data, (), f"{number:05d}", 500, 375, "bench_loader")
        writer.write(records.encode(record))
    writer.close()
    return str(file)


def _photo(rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375 pixels: noise whose amplitude falls with frequency, as in photographs,
    by the power that gives about ``_PHOTO_BYTES`` at quality 85. A decoder's work grows with the
    bytes."""
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shape = (*frequency.shape, 4)
    noise = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    # Colours of photographs go together: most of every channel is the first, common plane.
    planes = 0.8 * noise[..., :1] + 0.6 * noise[..., 1:]

    @functools.cache
    def encoded(power: float) -> bytes:
        pixels = np.fft.irfft2(
            planes / frequency[..., None] ** power, s=(height, width), axes=(0, 1)
        )
        pixels = 120 + 55 * (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    low, high = 1.0, 2.5
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if len(encoded(middle)) > _PHOTO_BYTES else (low, middle)
    return encoded(middle)


if __name__ == "__main__":
    cli.run(main)
