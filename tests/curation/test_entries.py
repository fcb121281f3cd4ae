"""Claims about webssl_jax.curation.ngrams and entries: the builder of a list of entries."""

import collections
import gzip
import math
import random

import pytest

from tests.curation.pools import random_text, write_pool
from webssl_jax.config import UserError
from webssl_jax.curation import entries, ngrams
from webssl_jax.curation.entries import Limits, build
from webssl_jax.curation.matching import Matcher, words_of


def slow_counts(texts):
    """Of words and of pairs, in the plainest way."""
    words, pairs = collections.Counter(), collections.Counter()
    for text in texts:
        found = words_of(text)
        words.update(word for word in found if not ngrams.is_punctuation(word))
        pairs.update(
            f"{a}\t{b}"
            for a, b in zip(found, found[1:])
            if not ngrams.is_punctuation(a) and not ngrams.is_punctuation(b)
        )
    return words, pairs


def read_counts(path):
    rows = [line.split("\t", 1) for line in path.read_text().split("\n")[:-1]]
    assert [key for _, key in rows] == sorted({key for _, key in rows})
    return collections.Counter({key: int(n) for n, key in rows})


@pytest.mark.parametrize("limit", [3, 10**6])
def test_counts_are_exact_however_little_fits_in_memory_or_was_done_before_a_kill(
    tmp_path, limit, monkeypatch
):
    monkeypatch.setattr(ngrams, "_RUNS", 10)  # a limit of 3 makes hundreds of files
    rng = random.Random(1)
    captions = [random_text(rng) for _ in range(600)]
    pool = write_pool(tmp_path / "pool", [[text] for text in captions], 11)
    lines = [" ".join(random_text(rng).split("\n")).rstrip("\r") for _ in range(200)]
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines), newline="\n")
    output = tmp_path / "counts"

    def stop(done, total=None):
        if total is None and len(list(output.glob(".plan/*.counts"))) == 5:
            raise KeyboardInterrupt

    given = [tmp_path / "text.txt"], [pool], output
    with pytest.raises(KeyboardInterrupt):
        ngrams.count(*given, progress=stop, limit=limit)
    done = {path: path.stat().st_mtime_ns for path in output.glob(".plan/*.counts")}
    *sizes, damaged = ngrams.count(*given, limit=limit)
    assert len(done) == 5 and {path: path.stat().st_mtime_ns for path in done} == done
    words, pairs = slow_counts([*captions, *lines])
    assert read_counts(output / "unigrams.tsv") == words
    assert read_counts(output / "bigrams.tsv") == pairs
    assert sizes == [len(words), len(pairs)] and sizes[0] > 10 and not damaged
    assert len(list(output.iterdir())) == 3 and not list(output.glob(".plan/counting*"))
    with pytest.raises(UserError, match="was begun with --text"):
        ngrams.count([], [pool], output)


def test_a_pair_does_not_reach_over_a_mark_and_is_one_that_matches():
    words, pairs = slow_counts(["New York, a city - big  dog"])
    assert set(pairs) == {"New\tYork", "a\tcity"}
    assert set(words) == {"New", "York", "a", "city", "big", "dog"}
    for pair in pairs:
        assert Matcher([pair.replace("\t", " ")]).match("New York, a city - big  dog")


@pytest.fixture
def counted(tmp_path):
    """Files of counts: 1,024 words in all."""
    unigrams = {"the": 700, "New": 16, "York": 16, "dog": 100, "rare": 2, "pair": 2, ",": 188}
    bigrams = {"New\tYork": 16, "the\tdog": 64, "rare\tpair": 2, "gone\tdog": 9}
    (tmp_path / "1.tsv").write_text("".join(f"{n}\t{w}\n" for w, n in unigrams.items()))
    with gzip.open(tmp_path / "2.tsv.gz", "wt") as file:
        file.writelines(f"{n}\t{p}\n" for p, n in bigrams.items())
    return tmp_path / "1.tsv", tmp_path / "2.tsv.gz"


def test_words_and_pairs_over_their_limits_are_taken_in_metaclips_order(counted, tmp_path):
    (tmp_path / "words.txt").write_text("abacus\n42\nnew wave\n")
    # log2(16 * 1024 / 16 / 16) = 6, log2(2 * 1024 / 2 / 2) = 9, log2(64 * 1024 / 700 / 100) < 0
    found, report = build([tmp_path / "words.txt"], *counted, [], Limits(min_pmi=5.9))
    assert found[:100] == [str(n) for n in range(100)]
    # the comma is frequent, but punctuation alone is no entry; "gone" has no count
    assert found[100:] == ["abacus", "new wave", "the", "dog", "rare pair", "New York"]
    assert [(s.name, s.read, s.enough, s.taken) for s in report] == [
        ("numbers", 100, 100, 100),
        ("words", 3, 3, 2),
        ("unigrams", 7, 3, 2),
        ("bigrams", 4, 2, 2),
    ]
    assert build([], *counted, [], Limits(min_pmi=6.1))[0][100:] == ["the", "dog", "rare pair"]
    more = Limits(min_pmi=5.9, min_bigram=3, min_unigram=10**6)
    assert build([], *counted, [], more)[0][100:] == ["New York"]
    few = Limits(min_pmi=5.9, max_entries=102)
    assert build([], *counted, [], few)[0][100:] == ["the", "dog"]


def test_information_is_the_textbooks(counted):
    counts = {"New": 16, "York": 16, "rest": 992}
    found = entries._informative(counted[1], counts, Limits(min_pmi=0), entries.Source(""))
    chance = (16 / 1024) * (16 / 1024)
    assert found == {"New York": pytest.approx(math.log2(16 / 1024 / chance))}


def test_titles_are_articles_with_enough_views_in_hours_that_count(tmp_path):
    hours = [
        "en New_York 60 0\nen Dog 49 0\nde Hund 900 0\nen Talk:Dog 500 0\n"
        "en 猫 70 0\nen.m X 90 0\n",
        "en New_York 50 0\nen Dog 55 0\n",
    ]
    paths = [tmp_path / "0.gz", tmp_path / "1"]
    with gzip.open(paths[0], "wt") as file:
        file.write(hours[0])
    paths[1].write_text(hours[1])
    assert build([], None, None, paths, Limits())[0][100:] == ["New York", "猫"]
    assert build([], None, None, paths, Limits(), "de")[0][100:] == ["Hund"]


@pytest.mark.parametrize(
    "unigrams, bigrams, limits, says",
    [
        ("5 dog\n", None, Limits(), "line 1 is not count<TAB>word: '5 dog'"),
        ("5\tdog\n-1\tcat\n", None, Limits(), "line 2 is not"),
        ("5\tdog\n", "2\tdog\n", Limits(min_pmi=1), "line 1 is not count<TAB>word<TAB>word"),
        ("1024\tdog\n", "1\tdog\tdog\n", Limits(), "information over 10.0"),
        ("0\tdog\n", "1\tdog\tdog\n", Limits(), "--unigrams has no word"),
        (None, None, Limits(), "no source of entries"),
        (None, "1\ta\tb\n", Limits(), "needs --unigrams"),
    ],
)
def test_what_cannot_become_a_list_is_refused(tmp_path, unigrams, bigrams, limits, says):
    paths = []
    for name, data in (("1.tsv", unigrams), ("2.tsv", bigrams)):
        paths.append(data and tmp_path / name)
        if data:
            paths[-1].write_text(data)
    with pytest.raises(UserError, match=says):
        build([], *paths, [], limits)


def test_a_file_cut_short_damaged_or_missing_is_named(tmp_path):
    whole = gzip.compress(b"5\tdog\n" * 1000)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.gz").write_bytes(whole[:20] + b"\xff" * 9 + whole[29:])
    for name in ("cut.gz", "broken.gz", "missing"):
        with pytest.raises(UserError, match=f"{name}.*cannot be read"):
            build([], tmp_path / name, None, [], Limits())
    with pytest.raises(UserError, match="no word"):
        (tmp_path / "marks.txt").write_text("...\n\n")
        ngrams.count([tmp_path / "marks.txt"], [], tmp_path / "counts")
