"""What the corpus leaves on disk: shards, a summary, a contact sheet, and the floors of its probe.

========================  ========================================================================
file                      what
========================  ========================================================================
train-*.arrayrecord       every training image; label = topic, or none
probe-train-*             those of them that the probe learns from
probe-fit-*, probe-dev-*  probe-train in two parts without a look-alike across: to choose by
probe-test-*              its test images, which are not in train and resemble nothing there
drawings.parquet          the training images of the probe's sources, as a selection (mixture.py)
dev-train.parquet         those that resemble nothing in probe-dev: to train what is judged by it
dev-drawings.parquet      what the two selections have in common
settings.json             what the tool was told; another run must be told the same
summary.json, SUMMARY.md  counts by source, licence, caption, size; what was left out, and why
floors.json               what trivial features reach on the probe
sources.png               a row of pictures for each source
========================  ========================================================================
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from webssl_jax.corpus.mini_web.catalogue import BY_NAME
from webssl_jax.corpus.mini_web.choose import Chosen, guessed_from_source
from webssl_jax.corpus.mini_web.prepare import Files
from webssl_jax.data import records, views
from webssl_jax.data.converter.work import temporary_shard
from webssl_jax.evaluators.outcome import scored
from webssl_jax.evaluators.probes import floors as probe_floors
from webssl_jax.files import write_json, write_text
from webssl_jax.visuals import sheets
from webssl_jax.visuals.png import save_png

IMAGES_PER_SHARD = 4000
SHEET_COLUMNS = 12
_SIDES = (48, 64, 96, 128, 192, 256, 384, 512)


def write_shards(
    name: str, rows: Sequence[Mapping], work: Mapping[str, Files], folder: Path
) -> None:
    """Copies the chosen records, in the rows' order dealt in turn, so that each shard is a
    mixture.

    Raises:
      OSError: as :func:`temporary_shard`.
    """
    readers = {s: array_record_module.ArrayRecordReader(str(f.records)) for s, f in work.items()}
    for old in folder.glob(f"{name}-*.arrayrecord*"):
        old.unlink()  # of a run that was stopped before it was complete
    total = _shards(rows)
    for index in range(total):
        path = folder / records.shard_name(name, index, total)

        def write(
            writer: array_record_module.ArrayRecordWriter,
            mine: Sequence[Mapping] = rows[index::total],
        ) -> int:
            for row in mine:
                (data,) = readers[row["source"]].read([row["place"]])
                writer.write(data)
            return len(mine)

        with temporary_shard(path, write) as temporary:
            temporary.replace(path)
    for reader in readers.values():
        reader.close()


def _shards(rows: Sequence[Mapping]) -> int:
    """How many hold the rows; row i lies in shard i % that, as its record i // that."""
    return max(1, -(-len(rows) // IMAGES_PER_SHARD))


def write_selections(chosen: Chosen, folder: Path) -> None:
    """Writes the three selections, which ``config.mixture`` takes. Drawings are the images of the
    sources that the probe is made of, labelled or not; no documents, textures and landscapes."""
    sources = {row["source"] for row in chosen.probe_train}
    drawings = {row["key"] for row in chosen.train if row["source"] in sources}
    dev = {row["key"] for row in chosen.dev_train}
    total = _shards(chosen.train)
    for name, keys in (
        ("drawings", drawings),
        ("dev-train", dev),
        ("dev-drawings", drawings & dev),
    ):
        at = [i for i, row in enumerate(chosen.train) if row["key"] in keys]
        shards = [records.shard_name("train", i % total, total) for i in at]
        table = {"shard": shards, "record": [i // total for i in at]}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")


def summarise(chosen: Chosen) -> dict[str, Any]:
    """Counts, as plain JSON."""
    everything = chosen.train + chosen.probe_test
    count = collections.Counter
    by_source = count(row["source"] for row in everything)
    sizes = count(
        next(
            (f"<= {s}" for s in _SIDES if min(row["width"], row["height"]) <= s), f"> {_SIDES[-1]}"
        )
        for row in everything
    )
    reasons: collections.Counter[str] = count()
    for part in chosen.dropped.values():
        reasons.update(part)
    guessed = guessed_from_source(chosen.probe_train, chosen.probe_test)
    return {
        "images": len(everything),
        "train": len(chosen.train),
        "probe_train": len(chosen.probe_train),
        "probe_dev": len(chosen.probe_dev),
        "dev_train": len(chosen.dev_train),
        "probe_test": len(chosen.probe_test),
        "probe_test_things": len({row["group"] for row in chosen.probe_test}),
        "megabytes": round(sum(row["bytes"] for row in everything) / 1e6, 1),
        "captions_by_kind": dict(count(row["kind"] for row in everything).most_common()),
        "text_rich": sum(n for source, n in by_source.items() if BY_NAME[source].text_rich),
        "shorter_side": {f"<= {s}": sizes[f"<= {s}"] for s in _SIDES if sizes[f"<= {s}"]},
        "dropped": dict(reasons.most_common()),
        "sources": {
            source: {
                "images": by_source[source],
                "licence": BY_NAME[source].licence,
                "packages": [str(package) for package in BY_NAME[source].packages],
                "what": BY_NAME[source].what,
                "text_rich": BY_NAME[source].text_rich,
                "dropped": dict(chosen.dropped[source].most_common()),
            }
            for source in chosen.dropped
        },
        "topics": _cells(chosen),
        "topic_guessed_from_source": {
            "top1": float(guessed.mean()) if len(guessed) else 0.0,
            "se": scored("top1", guessed)[0]["top1_se"] if len(guessed) else 0.0,
        },
    }


def _cells(chosen: Chosen) -> dict[str, dict[str, list[int]]]:
    """{topic: {source: [probe train, of them dev, probe test]}}."""
    cells: dict = collections.defaultdict(lambda: collections.defaultdict(lambda: [0, 0, 0]))
    for side, rows in enumerate((chosen.probe_train, chosen.probe_dev, chosen.probe_test)):
        for row in rows:
            cells[row["topic"]][row["source"]][side] += 1
    return {topic: dict(sorted(found.items())) for topic, found in sorted(cells.items())}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for the eye, in Markdown."""
    lines = [
        f"{summary['images']:,} images, {summary['megabytes']:,} MB: {summary['train']:,} train; "
        f"probe: {summary['probe_train']:,} of them, and {summary['probe_test']:,} test images of "
        f"{summary['probe_test_things']:,} things (emoji vendors draw the same ones). To choose "
        f"by: {summary['probe_dev']:,} of the probe's training images, which "
        f"{summary['dev_train']:,} training images do not resemble.",
        "",
        "| source | images | text-rich | licence | package | what |",
        "| --- | --: | --- | --- | --- | --- |",
    ]
    for name, row in summary["sources"].items():
        lines.append(
            f"| {name} | {row['images']:,} | {'yes' if row['text_rich'] else ''} | "
            f"{row['licence']} | {', '.join(row['packages'])} | {row['what']} |"
        )
    lines += ["", "| topic | probe train | of them dev | probe test | sources |"]
    lines.append("| --- | --: | --: | --: | --- |")
    for topic, cells in summary["topics"].items():
        sides = (f"{sum(cell[side] for cell in cells.values()):,}" for side in range(3))
        lines.append(f"| {topic} | {' | '.join(sides)} | {', '.join(cells)} |")
    for title, name in (
        ("Captions", "captions_by_kind"),
        ("Shorter side", "shorter_side"),
        ("Left out", "dropped"),
    ):
        counts = "; ".join(f"{key} {n:,}" for key, n in summary[name].items())
        lines += ["", f"{title}: {counts}."]
    share = summary["text_rich"] / max(summary["images"], 1)
    lines += ["", f"Text-rich by package: {summary['text_rich']:,} ({share:.0%})."]
    return "\n".join(lines) + "\n"


def floors(folder: Path, size: int, guessed: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
    """What trivial features reach on the probe at ``size`` x ``size`` pixels, in colour and on
    greyscale copies: a table and plain JSON."""
    train, test = (str(folder / f"probe-{part}-*.arrayrecord") for part in ("train", "test"))
    problem, figures = probe_floors.floors(train, test, size)
    _, grey = probe_floors.floors(train, test, size, greyscale=True)
    chance = 1 / problem.num_classes
    n, m = len(problem.train_labels), len(problem.test_labels)
    lines = [
        f"{n:,} train and {m:,} test images, {problem.num_classes} topics, {size} x {size} pixels",
        f"{'chance':26} {chance:.3f}",
        f"{'topic from source alone':26} {guessed['top1']:.3f} +- {guessed['se']:.3f}",
    ]
    lines += [*probe_floors.lines(figures), "on greyscale copies", *probe_floors.lines(grey)]
    return "\n".join(lines), {
        "image_size": size,
        "train": n,
        "test": m,
        "classes": list(problem.classes),
        "chance": chance,
        "topic_guessed_from_source": dict(guessed),
        "features": figures,
        "features_greyscale": grey,
    }


def draw_sheet(rows: Sequence[Mapping], work: Mapping[str, Files], path: Path) -> None:
    """``SHEET_COLUMNS`` pictures of each source with their captions, the first by digest."""
    of_source: dict[str, list[Mapping]] = collections.defaultdict(list)
    for row in rows:
        if len(of_source[row["source"]]) < SHEET_COLUMNS:
            of_source[row["source"]].append(row)
    images, captions = [], []
    for source in (s for s in work if s in of_source):
        reader = array_record_module.ArrayRecordReader(str(work[source].records))
        for row in itertools.islice(itertools.cycle(of_source[source]), SHEET_COLUMNS):
            (data,) = reader.read([row["place"]])
            record = records.decode(data)
            image = views.decode_image(record.image)
            image.thumbnail((128, 128))
            images.append(np.asarray(image))
            captions.append(record.captions[0] if record.captions else source)
        reader.close()
    save_png(path, sheets.image_grid(images, SHEET_COLUMNS, captions, "Mini-web: a row a source"))


def write_summary(folder: Path, summary: Mapping[str, Any], table: str, stored: Any) -> None:
    """summary.json, SUMMARY.md and, last, floors.json: with it the corpus is complete."""
    write_json(folder / "summary.json", summary)
    text = summary_text(summary)
    write_text(folder / "SUMMARY.md", f"{text}\nFloors of the probe:\n\n```\n{table}\n```\n")
    write_json(folder / "floors.json", stored)
