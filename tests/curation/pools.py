"""Pools of captioned records for the tests, MetaCLIP's rules in their slow and plain form, and the
tool's command."""

import os
import random
import subprocess
import sys
from pathlib import Path

from array_record.python import array_record_module

from webssl_jax.data import records

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/curate.py"


def write_pool(folder, captions, shards):
    """Records with those captions (a list of strs each), in as many shards, dealt in order."""
    folder.mkdir()
    for index in range(shards):
        path = folder / records.shard_name("train", index, shards)
        writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
        for number in range(index * len(captions) // shards, (index + 1) * len(captions) // shards):
            texts = tuple(captions[number])
            image = b"image %d" % number
            writer.write(records.encode(records.Record(image, texts, f"key{number}", 1, 1, "pool")))
        writer.close()
    return str(folder)


def spaced(text):
    """The text as MetaCLIP's rule prepares it."""
    text = " " + text + " "
    for mark in (",", ".", ";", ":", "?", "!", "`"):
        text = text.replace(mark, " " + mark + " ")
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def slow_match(entries, text):
    """Ids of the entries in a text: each entry looked for by itself."""
    text = spaced(text)
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


WORDS = [
    "dog",
    "Dog",
    "a",
    "New",
    "York",
    "flag",
    "naïve",
    "猫",
    "🐈",
    "e\u0301",
    "x\u00a0y",
    "\u2028",
    "",
]


def random_text(rng, longest=12):
    """Words, marks and blanks in any order."""
    parts = [*WORDS, *WORDS, ".", ",", "`", "!", "\t", "\n", "\r", "  ", "dog."]
    return rng.choice(["", " "]).join(
        rng.choice(parts) + rng.choice(["", " ", " "]) for _ in range(rng.randrange(longest))
    )


def random_captions(seed, count):
    """None to three captions each for so many records."""
    rng = random.Random(seed)
    return [[random_text(rng) for _ in range(rng.randrange(4))] for _ in range(count)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def command(*args):
    return [sys.executable, str(TOOL), *map(str, args)]


def run(*args):
    return subprocess.run(
        command(*args), capture_output=True, text=True, env=environment(), timeout=120
    )
