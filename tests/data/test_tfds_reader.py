"""Claims about TFDS datasets as input of the converter."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from array_record.python import array_record_module

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.own_pictures import OwnPictures, image
from webssl_jax.config import UserError
from webssl_jax.data.converter.tfds_reader import Features, TfdsReader, _masked_crc32c, list_tfds

ROOT = Path(__file__).parents[2]
ASKED = Features(captions=("captions/text",), key="file")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The dataset's folder, as ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    builder = OwnPictures(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture
def as_tfrecord(prepared, tmp_path):
    """The same dataset as TFDS writes it by default; only the framing differs."""
    folder = tmp_path / "own_pictures" / "1.0.0"
    shutil.copytree(prepared, folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in folder.glob("*.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        frames = []
        for data in reader.read_all():
            length = struct.pack("<Q", len(data))
            frames.append(
                length
                + struct.pack("<I", _masked_crc32c(length))
                + data
                + struct.pack("<I", _masked_crc32c(data))
            )
        reader.close()
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
        path.unlink()
    return folder


def convert(folder, output, split="train", asked=ASKED):
    root, name, features, units = list_tfds(str(folder), None, split, asked)
    stats = run_engine(output, TfdsReader(str(root), name, features), units)
    return stats, read_shards(output)


def check(found, numbers):
    assert sorted(found) == [f"file {i}" for i in numbers]
    for i in numbers:
        record = found[f"file {i}"]
        assert record.image == image(i) and record.source == "own_pictures"
        assert record.label == ("cat", "dog")[i % 2]
        assert record.captions == (f"größe {i}", "second")


def test_a_prepared_folder_gives_the_stored_bytes_labels_by_name_and_captions(prepared, tmp_path):
    stats, found = convert(prepared, tmp_path / "out")
    check(found, range(7))
    assert stats["labels"] == {"cat": 4, "dog": 3} and stats["notes"] == {}


def test_splits_are_in_tfds_language_and_keys_default_to_the_place(prepared, tmp_path):
    _, found = convert(prepared, tmp_path / "out", "train[2:4]+test")
    assert len(found) == 5
    _, found = convert(prepared, tmp_path / "keys", "train[2:4]", Features())
    name = "own_pictures-train.array_record-00000-of-00001"
    assert list(found) == [f"{name}/00000002", f"{name}/00000003"]


def test_tfrecord_is_read_without_tensorflow(as_tfrecord, tmp_path):
    _, found = convert(as_tfrecord, tmp_path / "out")
    check(found, range(7))
    script = (
        "import sys; from webssl_jax.data.converter import tfds_reader as t;"
        f"root, name, f, units = t.list_tfds({str(as_tfrecord)!r}, None, 'train', t.Features());"
        "print(sum(1 for u in units for _ in t.TfdsReader(str(root), name, f).read(u)));"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["7", "False"], done.stderr


def test_the_masked_checksum_is_that_of_the_tfrecord_format():
    # CRC-32C of "123456789" is 0xE3069283 (RFC 3720); masked as TFRecord does.
    crc = 0xE3069283
    assert _masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("kind", ["truncated", "length", "payload", "gone"])
def test_a_damaged_tfrecord_keeps_what_came_before_and_counts_what_is_lost(
    as_tfrecord, tmp_path, kind
):
    (path,) = as_tfrecord.glob("*-train.tfrecord-*")
    data = bytearray(path.read_bytes())
    third = 0
    for _ in range(2):
        third += 16 + struct.unpack_from("<Q", data, third)[0]
    if kind == "truncated":
        del data[third + 100 :]
    elif kind == "length":
        data[third] ^= 4
    elif kind == "payload":
        data[third + 12 : third + 60] = b"\xff" * 48
    path.write_bytes(data)
    _, _, features, units = list_tfds(str(as_tfrecord), None, "train", ASKED)
    if kind == "gone":
        path.unlink()
    reader = TfdsReader(str(as_tfrecord), "x", features)
    stats = run_engine(tmp_path / "out", reader, units)
    lost = {"truncated": 5, "length": 5, "payload": 0, "gone": 7}[kind]
    assert stats["inputs"] == 7 - lost
    assert stats["kept"] == {"truncated": 2, "length": 2, "payload": 6, "gone": 0}[kind]
    if lost:
        (example,) = stats["notes"]["damaged TFDS file: examples are lost"]["examples"]
        assert f"{path.name}, {lost} examples: " in example
    else:
        assert counts(stats["dropped"]) == {"undecodable example": 1}


def test_bad_names_are_one_line(prepared, tmp_path):
    def refused(folder, split="train", **features):
        with pytest.raises(UserError) as error:
            list_tfds(str(folder), tmp_path, split, Features(**features))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "neither a prepared folder" in refused(tmp_path)
    assert "neither a prepared folder" in refused("no_such_dataset")
    assert "did you mean 'train'" in refused(prepared, "trian")
    assert "--tfds-split train[" in refused(prepared, "train[")
    assert "did you mean 'image'" in refused(prepared, image="imag")
    assert "did you mean 'captions/text'" in refused(prepared, captions=("caption/text",))
    assert "no such feature" in refused(prepared, label="breed")
