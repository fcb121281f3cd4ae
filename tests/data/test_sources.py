"""Sources: what is refused at the start, and what is survived later."""

import contextlib
import errno
import glob
import logging
import os
import pathlib
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent import futures

import numpy as np
import pytest

from tests.data.image_shards import write_shard
from webssl_jax import corpus
from webssl_jax.config import TransientError, UserError
from webssl_jax.data import records, sources
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord


def test_records_are_read_in_the_order_of_shards_and_positions(shards, image_records):
    source = ArrayRecordSource(str(shards))
    assert len(source) == 64
    assert [records.decode(source[i]).key for i in range(64)] == [r.key for r in image_records]
    assert source.describe(33) == f"{shards}/train-00002-of-00004.arrayrecord record 1"


def test_a_glob_a_folder_and_a_list_of_files_mean_the_same_shards(shards):
    files = sorted(str(f) for f in shards.iterdir())
    for pattern in (f"{shards}/", f"{shards}/*.arrayrecord", f"{shards}/train-*-of-00004*", files):
        assert ArrayRecordSource(pattern).files == tuple(files)
    some = ArrayRecordSource(f"{files[2]}, {files[0]}")
    assert some.files == (files[2], files[0])


def test_a_folder_with_a_bracket_in_its_name_is_a_folder(shards, tmp_path):
    (tmp_path / "a[b]").symlink_to(shards)
    assert len(ArrayRecordSource(str(tmp_path / "a[b]"))) == len(ArrayRecordSource(str(shards)))


def test_the_corpus_is_named_by_its_split(shards, monkeypatch):
    monkeypatch.setattr(corpus, "pattern", lambda split: f"{shards}/{split}-*", raising=False)
    assert len(ArrayRecordSource("corpus:train")) == 64
    with pytest.raises(UserError, match="'train' and 'test'"):
        ArrayRecordSource("corpus:val")


def test_an_empty_shard_beside_others_is_passed_over_and_a_set_of_nothing_is_refused(tmp_path):
    for index, part in enumerate(([], [b"a", b"b"], [], [b"c"], [])):
        write_shard(tmp_path / records.shard_name("train", index, 5), part)
    source = ArrayRecordSource(str(tmp_path))
    assert [source[i] for i in range(len(source))] == [b"a", b"b", b"c"]
    assert source.locate(2) == (str(tmp_path / records.shard_name("train", 3, 5)), 0)
    with pytest.raises(UserError, match="no record in this shard"):
        ArrayRecordSource(str(tmp_path / records.shard_name("train", 0, 5)))


def test_a_pickled_source_reads_the_same_and_takes_no_readers_along(shards):
    source = ArrayRecordSource(str(shards))
    expected = source[40]
    copy = pickle.loads(pickle.dumps(source))
    assert copy._readers == {} and copy[40] == expected


def test_threads_share_a_source(shards):
    source = ArrayRecordSource(str(shards))
    with futures.ThreadPoolExecutor(16) as pool:
        read = list(pool.map(source.__getitem__, list(range(64)) * 20))
    assert read == [source[i] for i in range(64)] * 20


def test_an_index_outside_is_an_index_error(shards):
    source = ArrayRecordSource(str(shards))
    for index in (-1, 64):
        with pytest.raises(IndexError):
            source[index]


def test_a_pattern_that_matches_nothing_is_refused_by_name(tmp_path):
    for pattern in (f"{tmp_path}/none-*", f"{tmp_path}/none", str(tmp_path), ()):
        with pytest.raises(UserError, match="none|no \\*.arrayrecord file|no data pattern"):
            ArrayRecordSource(pattern)


def test_a_missing_shard_is_refused_by_name(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    (folder / "train-00002-of-00004.arrayrecord").unlink()
    with pytest.raises(UserError, match="train-00002-of-00004.arrayrecord: this shard is missing"):
        ArrayRecordSource(str(folder))
    # A file named on purpose stands for itself.
    assert len(ArrayRecordSource(str(folder / "train-00000-of-00004.arrayrecord"))) == 16


def test_two_sets_of_one_name_and_a_file_matched_twice_are_refused(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    with pytest.raises(UserError, match="more than one data pattern"):
        ArrayRecordSource((str(folder), f"{folder}/train-00002-of-00004.arrayrecord"))
    first = folder / "train-00000-of-00004.arrayrecord"
    shutil.copy(first, folder / "train-00000-of-00001.arrayrecord")
    with pytest.raises(UserError, match="more than one set of shards"):
        ArrayRecordSource(str(folder))


@pytest.mark.parametrize("fault", ["zero bytes", "truncated", "not an ArrayRecord"])
def test_an_unreadable_shard_is_refused_by_name(shards, tmp_path, fault):
    folder = shutil.copytree(shards, tmp_path / "set")
    victim = folder / "train-00001-of-00004.arrayrecord"
    whole = victim.read_bytes()
    contents = {"zero bytes": b"", "truncated": whole[: len(whole) // 2]}
    victim.write_bytes(contents.get(fault, b"\x89PNG" * 50_000))
    with pytest.raises(UserError, match="train-00001-of-00004.arrayrecord: ") as error:
        ArrayRecordSource(str(folder))
    assert "\n" not in str(error.value)


def test_flipped_bytes_damage_one_record_and_leave_its_neighbours(tmp_path):
    rng = np.random.default_rng(0)
    items = [rng.bytes(1000) for _ in range(20)]
    path = tmp_path / "a.arrayrecord"
    write_shard(path, items)
    source = ArrayRecordSource(str(path))
    contents = bytearray(path.read_bytes())
    contents[contents.index(items[9][500:520])] ^= 0xFF
    path.write_bytes(contents)
    damaged = []
    for index in range(20):
        try:
            assert source[index] == items[index]
        except DamagedRecord as error:
            damaged.append(index)
            assert "hash mismatch" in str(error)
    assert damaged == [9]


def cut(path):
    os.truncate(path, 20_000)


def blank(path):
    path.write_bytes(bytes(path.stat().st_size))


def shrink(path):
    write_shard(path, [b"x"])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "change, says",
    [
        (cut, "had [0-9,]+ bytes at the start and 20,000 now"),
        (shrink, "had [0-9,]+ bytes at the start and [0-9,]+ now"),
        (blank, "held 16 records at the start and 0 now"),
        (pathlib.Path.unlink, "cannot be read any more \\(No such file or directory\\)"),
    ],
)
def test_a_shard_that_changes_under_a_run_stops_it(shards, tmp_path, change, says, opened):
    folder = shutil.copytree(shards, tmp_path / "set")
    source = ArrayRecordSource(str(folder), patience=0)
    victim = folder / "train-00003-of-00004.arrayrecord"
    last = source[63] if opened else None
    change(victim)
    if opened and change is pathlib.Path.unlink:
        assert source[63] == last  # an open file outlives its name
        return
    with pytest.raises(UserError, match=f"train-00003-of-00004.arrayrecord: {says}") as error:
        source[63]
    assert "\n" not in str(error.value)
    assert records.decode(source[3]).key == "0003"


class WhenTold(logging.Handler):
    """Does something at the first warning that storage is tried again."""

    def __init__(self, act):
        super().__init__()
        self.act, self.told = act, []

    def emit(self, record):
        if "trying again" in record.getMessage() and not self.told:
            self.told.append(record.getMessage())
            self.act()


@contextlib.contextmanager
def when_told(act):
    handler, logger = WhenTold(act), logging.getLogger("webssl_jax.data.sources")
    logger.addHandler(handler)
    try:
        yield handler.told
    finally:
        logger.removeHandler(handler)


def test_a_shard_that_is_taken_away_and_brought_back_is_waited_for(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    source = ArrayRecordSource(str(folder))
    victim, away = folder / "train-00003-of-00004.arrayrecord", tmp_path / "away"
    victim.rename(away)
    with when_told(lambda: away.rename(victim)) as told:
        assert records.decode(source[63]).key == "0063"
    assert "train-00003-of-00004.arrayrecord: cannot be read any more (No such file" in told[0]


def test_at_the_start_a_name_is_waited_for_if_the_run_had_it_and_a_failing_disk_always(
    shards, tmp_path, monkeypatch
):
    folder = shutil.copytree(shards, tmp_path / "set")
    known = ArrayRecordSource(str(folder)).shards
    victim, away = folder / "train-00003-of-00004.arrayrecord", tmp_path / "away"
    victim.rename(away)
    with when_told(lambda: away.rename(victim)) as told:
        with pytest.raises(UserError, match="this shard is missing"):
            ArrayRecordSource(str(folder))
        assert not told
        assert len(ArrayRecordSource(str(folder), known=known)) == 64
    ask, failures = sources._size, iter([errno.EIO, errno.ESTALE])

    def fail(file):
        if code := next(failures, None):
            raise OSError(code, os.strerror(code))
        return ask(file)

    monkeypatch.setattr(sources, "_size", fail)
    assert len(ArrayRecordSource(str(folder))) == 64


class Flaky:
    """A reader of the module, which fails as it does where the disk fails."""

    says = "pread() failed: Input/output error; reading {file}; at byte 10670"

    def __init__(self, real, failures):
        self._real, self._failures = real, failures

    def __getattr__(self, name):
        return getattr(self._real, name)

    def read(self, *span):
        if next(self._failures, False):
            raise RuntimeError(self.says)
        return self._real.read(*span)


@pytest.mark.parametrize("patience, error", [(10, None), (0, TransientError)])
def test_a_read_that_fails_for_the_disk_is_tried_again_and_never_taken_for_damage(
    shards, monkeypatch, patience, error
):
    source, real = ArrayRecordSource(str(shards), patience=patience), sources.array_record_module
    failures = iter([True] * 4)

    class Module:
        def ArrayRecordReader(*args, **options):
            return Flaky(real.ArrayRecordReader(*args, **options), failures)

    monkeypatch.setattr(sources, "array_record_module", Module)
    if error:
        with pytest.raises(error, match="Input/output error.*start the same command again"):
            source[5]
    else:
        assert records.decode(source[5]).key == "0005"


@pytest.mark.parametrize("memory, held", [(2**30, 40), (5 * 12 * 2000, 5), (1, 1)])
def test_only_so_many_shards_are_open_as_their_indices_may_take_memory(tmp_path, memory, held):
    """40 names of one file of 2,000 records, read by four threads, in this order and another."""
    write_shard(tmp_path / "s00.arrayrecord", [b"%d" % i for i in range(2000)])
    for number in range(1, 40):
        os.link(tmp_path / "s00.arrayrecord", tmp_path / f"s{number:02d}.arrayrecord")
    source = pickle.loads(pickle.dumps(ArrayRecordSource(str(tmp_path), memory=memory)))
    order = [*range(0, 80_000, 500), *random.Random(0).sample(range(80_000), 300)]
    with futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, order)) == [b"%d" % (i % 2000) for i in order]
    opened = [os.readlink(link) for link in glob.glob("/proc/self/fd/*") if os.path.exists(link)]
    assert sum(path.startswith(str(tmp_path)) for path in opened) == held
    # The one used last is open, the one used longest ago is not.
    source[0], source[79_999]
    assert 39 in source._readers and (0 in source._readers) == (held > 1)


def test_closing_a_source_ends_its_waiting(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    source = ArrayRecordSource(str(folder), patience=3600)
    (folder / "train-00003-of-00004.arrayrecord").unlink()
    with when_told(source.close), pytest.raises(TransientError, match="cannot be read any more"):
        source[63]


def test_lost_shards_are_passed_over_as_far_as_they_may_be(shards, tmp_path, caplog):
    folder = shutil.copytree(shards, tmp_path / "set")
    known = ArrayRecordSource(str(folder)).shards
    (folder / "train-00001-of-00004.arrayrecord").write_bytes(b"\x89PNG" * 50_000)
    with pytest.raises(UserError, match="train-00001-of-00004.arrayrecord: "):
        ArrayRecordSource(str(folder))
    source = ArrayRecordSource(str(folder), max_lost=0.25)
    assert "train-00001-of-00004.arrayrecord: " in caplog.text
    assert source.lost_share == 0.25
    left = [*range(16), *range(32, 64)]
    assert [int(records.decode(source[i]).key) for i in range(len(source))] == left
    # In a run that goes on all other records keep their numbers.
    options = {"max_lost": 0.25, "known": known, "patience": 0}
    source = pickle.loads(pickle.dumps(ArrayRecordSource(str(folder), **options)))
    assert source.shards == known
    assert [int(records.decode(source[i]).key) for i in left] == left
    with pytest.raises(DamagedRecord, match="its shard is lost: .*train-00001"):
        source[20]
    # One that was lost at the beginning stays so when it is mended.
    begun = ArrayRecordSource(str(folder), max_lost=0.25).shards
    shutil.copy(shards / "train-00001-of-00004.arrayrecord", folder)
    assert ArrayRecordSource(str(folder), max_lost=0.25, known=begun).shards == begun
    for index in (0, 2):
        (folder / records.shard_name("train", index, 4)).unlink()
    with pytest.raises(UserError, match="2 of 4 shards are lost, more than the share of 0.25") as e:
        ArrayRecordSource(str(folder), max_lost=0.25)
    assert "train-00000-of" in str(e.value) and "train-00002-of" in str(e.value)


def test_a_shard_that_is_lost_under_a_run_counts_as_damaged_if_it_may(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    source = ArrayRecordSource(str(folder), patience=0, max_lost=0.25)
    for index in (1, 3):
        (folder / records.shard_name("train", index, 4)).unlink()
    for index in (20, 21):
        with pytest.raises(DamagedRecord, match="its shard is lost: .*train-00001"):
            source[index]
    with pytest.raises(TransientError, match="train-00003.*cannot be read any more"):
        source[63]


def test_a_broken_link_and_a_path_through_a_file_are_refused_by_name(shards, tmp_path):
    link = tmp_path / "a.arrayrecord"
    link.symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to("round")
    first = f"{shards}/train-00000-of-00004.arrayrecord"
    for pattern, says in [
        (str(tmp_path), "a.arrayrecord: the shard cannot be read \\(No such file"),
        (f"{tmp_path}/*.arrayrecord", "a.arrayrecord: the shard cannot be read"),
        (str(link), "a.arrayrecord: no such file or folder"),
        (f"{tmp_path}/roun*", "round.* \\(Too many levels of symbolic links"),
        (f"{tmp_path}/round/*", "round/.*: cannot be read \\(Too many levels"),
        (f"{first}/x", "x: no such file or folder"),
        (f"{first}/*", "arrayrecord/.*: cannot be read \\(Not a directory"),
        (f"{tmp_path}/nowhere/*", "nowhere/.*: cannot be read \\(No such file or directory"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            ArrayRecordSource(pattern)
        assert "\n" not in str(error.value)


def test_what_this_user_may_not_read_is_refused_by_name(shards, tmp_path):
    # Root may read everything, so a child process asks as nobody, who may not enter pytest's own.
    root = pathlib.Path(tempfile.mkdtemp(dir="/tmp", prefix="webssl-unreadable-"))
    try:
        for name in ("closed", "open"):
            shutil.copytree(shards, root / name)
        (root / "open").chmod(0o755)
        (root / "open" / "train-00002-of-00004.arrayrecord").chmod(0)
        (root / "closed").chmod(0o311)
        root.chmod(0o755)
        script = textwrap.dedent("""
            import os, sys
            from webssl_jax.config import UserError
            from webssl_jax.data.sources import ArrayRecordSource
            ArrayRecordSource(sys.argv[1])  # imports all there is, while that can be read
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            for pattern in sys.argv[2:]:
                try:
                    print(ArrayRecordSource(pattern))
                except UserError as error:
                    print(error)
        """)
        patterns = [f"{root}/closed", f"{root}/closed/train-*", f"{root}/open"]
        child = subprocess.run(
            [sys.executable, "-c", script, str(shards), *patterns],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        closed, glob, single = child.stdout.splitlines()
        assert closed == f"data pattern {root}/closed: cannot be read (Permission denied)"
        assert glob == f"data pattern {root}/closed/train-*: cannot be read (Permission denied)"
        assert "train-00002-of-00004.arrayrecord: the shard cannot be read (Permission" in single
    finally:
        (root / "closed").chmod(0o755)
        shutil.rmtree(root)


def test_a_low_limit_of_open_files_is_lifted_for_many_shards(tmp_path):
    for index in range(100):
        write_shard(tmp_path / f"s{index:03d}.arrayrecord", [bytes([index])])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        source = ArrayRecordSource(str(tmp_path))
        assert [source[i] for i in range(100)] == [bytes([i]) for i in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
