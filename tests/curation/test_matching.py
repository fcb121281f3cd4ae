"""Claims about webssl_jax.curation.matching."""

import itertools
import json
import random

import pytest

from tests.curation.pools import random_text, slow_match, spaced
from webssl_jax.config import UserError
from webssl_jax.curation.matching import Matcher, can_match, read_entries


def test_matches_are_those_of_the_plain_rule_on_random_texts():
    rng = random.Random(0)
    matched = 0
    for _ in range(60):
        entries = list({random_text(rng, 5) for _ in range(80)} | {"dog", " dog", "New York", "."})
        entries = [entry for entry in entries if entry]
        matcher = Matcher(entries)
        for _ in range(60):
            text = random_text(rng)
            found = matcher.match(text)
            assert found == slow_match(entries, text), (text, entries)
            matched += len(found)
    assert matched > 10_000


@pytest.mark.parametrize(
    "text, entry, holds",
    [
        ("A dog.", "dog", True),
        ("A dog.", "dog .", True),
        ("A Dog.", "dog", False),  # case counts
        ("dogs", "dog", False),
        ("hot-dog", "dog", False),  # only seven marks part words
        ("(dog)", "dog", False),
        ("New\tYork", "New York", True),
        ("New  York", "New York", False),  # two spaces
        ("New, York", "New York", False),
        ("St. John", "St. John", False),  # the entry's mark has no spaces
        ("dog", "dog", True),
        ("", "dog", False),
    ],
)
def test_word_boundaries_are_metaclips(text, entry, holds):
    assert (Matcher([entry]).match(text) == [0]) is holds
    assert (f" {entry} " in spaced(text)) is holds


def test_an_entry_that_is_said_to_match_no_text_matches_none_and_others_match_one():
    letters = ["a", "b", ".", "!", " ", "\t"]
    texts = ["".join(t) for n in range(6) for t in itertools.product(letters, repeat=n)]
    found = set()
    for text in texts:
        words = spaced(text)[1:-1].split(" ")
        for start, end in itertools.combinations(range(len(words) + 1), 2):
            found.add(" ".join(words[start:end]))
    for n in range(1, 4):  # a text of five characters shows all entries of three
        for entry in map("".join, itertools.product(letters, repeat=n)):
            assert can_match(entry) == (entry in found), entry


def test_a_match_takes_no_longer_with_more_entries_or_ambiguous_beginnings():
    """Beginnings of entries are followed as far as they go, and no further."""
    entries = [" ".join(["a"] * n) for n in range(1, 30)] + [f"word{i}" for i in range(1000)]
    assert Matcher(entries).match(" ".join(["a"] * 200)) == list(range(29))


def test_entries_are_read_from_lines_and_from_json(tmp_path):
    entries = ["dog", "New York", "a\u2028b", " two", "猫"]
    lines, listed = tmp_path / "entries.txt", tmp_path / "entries.json"
    lines.write_bytes("\r\n".join(entries).encode("utf-8-sig") + b"\n")
    listed.write_text(json.dumps(entries))
    assert read_entries(lines) == read_entries(listed) == entries


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("e.txt", b"", "holds no entry"),
        ("e.json", b"[]", "holds no entry"),
        ("e.txt", b"dog\n\ncat\n", "line 2 is empty"),
        ("e.txt", b"dog\ncat\ndog\n", "line 3 repeats line 1: 'dog'"),
        ("e.json", b'["dog", "dog"]', "item 2 repeats item 1"),
        ("e.txt", b"dog\n\xff\n", "not UTF-8 at byte 4"),
        ("e.json", b"{", "not JSON"),
        ("e.json", b'{"dog": 1}', "not a JSON list of strings"),
        ("e.txt", None, "cannot be read"),
    ],
)
def test_bad_entry_files_are_refused_by_name(tmp_path, name, data, says):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_entries(path)
    assert says in str(error.value) and str(path) in str(error.value)
