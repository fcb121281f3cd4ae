"""The package ``easy-vqa`` (PyPI, MIT; 3 MB) as records: 5,000 drawn pictures of one coloured shape
and 48,248 questions about them with answers of one word.

A record of ``train`` has a conversation of two questions, one of ``test`` all its questions. A
conversation asks for the colour once and for the shape once where it can, and no question says
what a later one asks for: else its answer would be known without a look.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from webssl_jax.corpus.mini_web.packages import Package, download, read
from webssl_jax.data import annotations as annotation
from webssl_jax.data import decode, records, turns

PACKAGE = Package("pypi", "easy-vqa", "1.0")
SPLITS = ("train", "test")
TURNS = 2  # of a conversation, at most
YES_NO = ("yes", "no")
SHAPES = ("circle", "rectangle", "triangle")  # all other answers are colours
_DATA = "easy_vqa/data"

Question = tuple[str, str]  # with its answer


def make(folder: pathlib.Path, seed: int = 0) -> dict[str, int]:
    """Writes ``train-*`` and ``test-*`` shards into ``folder``, the package in ``folder/packages``.
    Returns {split: records}.

    Raises:
      UserError: if pip has no such package.
    """
    cache = folder / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    download([PACKAGE], cache, lambda count: None)
    archive = PACKAGE.archive(cache)
    assert archive is not None  # it was downloaded
    tree = read(archive, re.compile(f"^{_DATA}/"))
    return {split: _write(folder, split, tree, seed) for split in SPLITS}


def _write(folder: pathlib.Path, split: str, tree: Mapping[str, bytes], seed: int) -> int:
    by_image: dict[int, list[Question]] = collections.defaultdict(list)
    for question, answer, image in json.loads(tree[f"{_DATA}/{split}/questions.json"]):
        by_image[image].append((question, answer))
    place = folder / records.shard_name(split, 0, 1)
    writer = ArrayRecordWriter(str(place), records.WRITER_OPTIONS)
    rng = np.random.default_rng(seed)
    order = rng.permutation(sorted(by_image)) if split == "train" else sorted(by_image)
    for image in map(int, order):
        data = tree[f"{_DATA}/{split}/images/{image}.png"]
        opened = decode.open_image(data)
        found: dict[str, Any]
        if split == "train":
            found = {"conversations": _conversation(by_image[image], rng)}
        else:
            asked = [{"question": q, "answers": [a]} for q, a in by_image[image]]
            found = {"questions": asked}
        record = records.Record(
            data,
            (),
            f"{split}/{image}",
            opened.width,
            opened.height,
            PACKAGE.name,
            annotations={name: annotation.encode_json(x) for name, x in found.items()},
        )
        writer.write(records.encode(record))
    writer.close()
    return len(by_image)


def _conversation(asked: Sequence[Question], rng: np.random.Generator) -> list[dict[str, str]]:
    shuffled = [asked[i] for i in rng.permutation(len(asked))]
    once: dict[bool, Question] = {}
    for one in shuffled:
        if one[1] not in YES_NO:
            once.setdefault(one[1] in SHAPES, one)
    looks = sorted(once.values(), key=lambda one: any(_says(one, other) for other in once.values()))
    if len(looks) == 2 and _says(*looks):
        del looks[1]
    rest = [one for one in shuffled if one[1] in YES_NO]
    return turns.written([*looks, *rest][:TURNS])


def _says(one: Question, other: Question) -> bool:
    """Whether the words of one question have the answer to another: "what is the red shape?"."""
    return other[1] in re.findall(r"\w+", one[0])
