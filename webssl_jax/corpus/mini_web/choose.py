"""From everything prepared to what the corpus holds: duplicates out, a cap per source, and a probe
whose test images resemble nothing in train.

All choices are made by digests of keys, so the same packages give the same corpus.

*The probe.* Labelled pictures are joined into groups: by what the reader knows (one emoji of all
vendors, one author's variants) and by likeness. A group may go to test if it resembles nothing
outside itself, more loosely judged. Quotas for each class and for each source within a class keep
the topic from being guessed from the source alone; they are the same for train and test.

*The development split.* What the probe learns from is split once more, so that choices can be made
without the test images: of groups that resemble, as loosely judged, nothing else in it, a part is
``probe_dev``. What a network is trained on meanwhile, ``dev_train``, leaves out these groups and
all that resembles them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from webssl_jax.corpus import near_duplicates
from webssl_jax.corpus.mini_web.prepare import Prepared
from webssl_jax.corpus.mini_web.readers import digest

# correlation of edges, of colours, from which two pictures count as one drawing
SAME = (0.86, 0.94)
APART = (0.70, 0.84)  # from which a test picture may not resemble any other group
MAX_GROUP = 12  # pictures of a group of test or dev


@dataclasses.dataclass(frozen=True)
class Quotas:
    """Limits of the probe. test, train: images of one source in one class. of_class: share of a
    class' groups, at most, that go to test. dev: share of a class' training images, at most, that
    choices are made by. min_test: classes with fewer test images, or from one source only, are
    left out of the probe."""

    test: int = 60
    train: int = 120
    of_class: float = 0.4
    dev: float = 0.3
    min_test: int = 25


@dataclasses.dataclass
class Chosen:
    """Rows, in the order of the digests of their keys: any prefix is a fair sample.

    ``probe_train`` is part of ``train``, and all of ``probe_fit`` and ``probe_dev``; ``dev_train``
    is the part of ``train`` that resembles nothing in ``probe_dev``. A row is that of ``prepare``
    with its source added.
    """

    train: list[dict]
    probe_train: list[dict]
    probe_fit: list[dict]
    probe_dev: list[dict]
    dev_train: list[dict]
    probe_test: list[dict]
    dropped: dict[str, collections.Counter]  # source -> reason -> count


def choose(prepared: Mapping[str, Prepared], cap: int, quotas: Quotas) -> Chosen:
    """Chooses from sources in their given order; of equal pictures the first source's stays.

    Args:
      prepared: {source: what :func:`prepare.prepare` made of it}.
      cap: at most so many pictures of one source, labelled ones first, drawn by digest.
    """
    dropped = {source: collections.Counter(part.dropped) for source, part in prepared.items()}
    rows, seen = [], set()
    for source, part in prepared.items():
        for place, row in enumerate(part.rows):
            if row["digest"] in seen:
                dropped[source]["exact duplicate"] += 1
            else:
                seen.add(row["digest"])
                rows.append(row | {"source": source, "place": place})
    rows.sort(key=lambda row: digest(row["key"]))
    taken: collections.Counter[str] = collections.Counter()
    over = set()
    for row in sorted(rows, key=lambda row: row["topic"] is None):  # stable: by digest in each half
        taken[row["source"]] += 1
        if taken[row["source"]] > cap:
            dropped[row["source"]]["cap of the source"] += 1
            over.add(row["key"])
    kept = [row for row in rows if row["key"] not in over]
    at = collections.defaultdict(list)
    for i, row in enumerate(kept):
        at[row["source"]].append(i)
    bank = {}
    for kind in ("edges", "colour", "mirrored edges", "mirrored colour"):
        bank[kind] = np.concatenate(
            [prepared[s].bank[kind][[kept[i]["place"] for i in at[s]]] for s in at]
        )
    rows = [kept[i] for s in at for i in at[s]]
    split = probe(rows, bank, quotas)
    rank = {row["key"]: i for i, row in enumerate(kept)}
    train, probe_train, fit, dev, dev_train, test = (
        [rows[i] for i in sorted(part, key=lambda i: rank[rows[i]["key"]])] for part in split
    )
    return Chosen(train, probe_train, fit, dev, dev_train, test, dropped)


def probe(
    rows: Sequence[Mapping], bank: Mapping[str, np.ndarray], quotas: Quotas
) -> tuple[list[int], ...]:
    """Row numbers of the lists of :class:`Chosen`, in their order. bank: a row a picture, see
    ``near_duplicates.describe``."""
    labelled = np.array([i for i, row in enumerate(rows) if row["topic"]], int)
    i, j, scores = near_duplicates.similar_pairs(bank, labelled, *APART)
    same = near_duplicates.alike(scores, *SAME)
    group = _groups([row["group"] for row in rows], i[same], j[same])
    across = group[i] != group[j]
    i, j = i[across], j[across]  # look-alikes, as loosely judged, of different groups
    outside = np.zeros(len(rows), bool)
    outside[i] = True
    members = collections.defaultdict(list)
    for row, number in enumerate(group):
        members[number].append(row)
    candidates = [
        found
        for found in members.values()
        if len(found) <= MAX_GROUP
        and len({rows[k]["topic"] for k in found} | {None}) == 2
        and all(rows[k]["topic"] for k in found)
        and not outside[found].any()
    ]
    candidates.sort(key=lambda found: min(digest("split " + rows[k]["key"]) for k in found))
    total = collections.Counter(rows[k]["topic"] for k in labelled)
    most = {topic: quotas.of_class * n for topic, n in total.items()}
    test = _draw(candidates, rows, most, quotas.test)
    cells = collections.Counter((rows[k]["topic"], rows[k]["source"]) for k in test)
    classes = collections.Counter(rows[k]["topic"] for k in test)
    weak = {topic for topic in total if classes[topic] < quotas.min_test}
    weak |= {t for t in classes if len({s for topic, s in cells if topic == t}) < 2}
    test = [k for k in test if rows[k]["topic"] not in weak]
    held_out = set(test)
    train = [k for k in range(len(rows)) if k not in held_out]
    cells, learn = collections.Counter(), []
    for k in sorted(train, key=lambda k: digest("probe " + rows[k]["key"])):
        cell = rows[k]["topic"], rows[k]["source"]
        if cell[0] and cell[0] not in weak and cells[cell] < quotas.train:
            cells[cell] += 1
            learn.append(k)
    dev = _development(learn, rows, group, i, j, quotas)
    seen = set(np.flatnonzero(np.isin(group, group[dev]))) | set(j[np.isin(i, dev)])
    fit, dev_train = sorted(set(learn) - set(dev)), sorted(set(train) - seen)
    return train, learn, fit, dev, dev_train, test


def _development(
    learn: Sequence[int],
    rows: Sequence[Mapping],
    group: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    quotas: Quotas,
) -> list[int]:
    """Those of ``learn`` that choices are made by: groups whose pictures resemble none of another
    group in ``learn``. (i, j): look-alikes of different groups."""
    learnt = np.zeros(len(rows), bool)
    learnt[learn] = True
    resembles = np.zeros(len(rows), bool)
    resembles[i[learnt[j]]] = True
    groups = collections.defaultdict(list)
    for k in learn:
        groups[group[k]].append(k)
    free = [x for x in groups.values() if len(x) <= MAX_GROUP and not resembles[x].any()]
    total = collections.Counter(rows[k]["topic"] for k in learn)
    most = {topic: quotas.dev * n for topic, n in total.items()}
    return _draw(free, rows, most, quotas.train)


def _draw(
    groups: Sequence[Sequence[int]],
    rows: Sequence[Mapping],
    of_class: Mapping[str, float],
    of_cell: int,
) -> list[int]:
    """The rows of the first of ``groups``, as many as the limits of classes, and of cells of a
    class and a source, allow; each group whole."""
    classes: collections.Counter[str] = collections.Counter()
    cells: collections.Counter[tuple[str, str]] = collections.Counter()
    drawn: list[int] = []
    for found in groups:
        topic = rows[found[0]]["topic"]
        sources = collections.Counter(rows[k]["source"] for k in found)
        if classes[topic] + len(found) > of_class[topic]:
            continue
        if any(cells[topic, s] + n > of_cell for s, n in sources.items()):
            continue
        classes[topic] += len(found)
        cells.update({(topic, s): n for s, n in sources.items()})
        drawn += found
    return drawn


def _groups(names: Sequence[str], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Group numbers (n,): connected by equal names or by the pairs (i, j)."""
    first: dict[str, int] = {}
    same = [(k, first.setdefault(name, k)) for k, name in enumerate(names)]
    pairs = np.concatenate([np.array(same, int).reshape(-1, 2), np.stack([i, j], axis=1)])
    links = sparse.coo_matrix((np.ones(len(pairs), bool), pairs.T), shape=(len(names),) * 2)
    return connected_components(links, directed=False)[1]


def guessed_from_source(train: Sequence[Mapping], test: Sequence[Mapping]) -> np.ndarray:
    """(n,) bool: which test rows are right when each source's commonest topic in train is
    guessed."""
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in train:
        votes[row["source"]][row["topic"]] += 1
    guess = {s: max(sorted(count), key=count.__getitem__) for s, count in votes.items()}
    return np.array([guess.get(row["source"]) == row["topic"] for row in test], bool)
