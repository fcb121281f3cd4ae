"""Records carry annotations, old ones are read and written as before, and what an annotation holds
is checked."""

import dataclasses
import io
import re
import struct
import zlib

import msgpack
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.data.image_shards import ListSource, encode_image
from webssl_jax import corpus
from webssl_jax.data import annotations, records
from webssl_jax.data.annotations import AnnotationError
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import RandomResizedCropView

RECORD = records.Record(b"image", ("a text",), "key", 6, 4, "test", "ant")
VALUES = np.arange(24, dtype=np.uint8).reshape(4, 6)


def with_annotations(**found):
    return dataclasses.replace(RECORD, annotations=found)


def refused(read, **found):
    """What is said of a record with these annotations: one line."""
    with pytest.raises(AnnotationError) as error:
        read(with_annotations(**found))
    assert "\n" not in str(error.value)
    return str(error.value)


def png(bits, colour, rows, size=(6, 4)):
    """A PNG made by hand: ``rows`` are its packed bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    data = b"".join(b"\0" + row for row in rows)
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + pixels + chunk(b"IEND", b"")


def test_annotations_survive_in_version_2_and_their_order_changes_no_byte():
    record = with_annotations(mask=b"\x89PNG", labels=b"[1]")
    data = records.encode(record)
    assert records.decode(data) == record
    assert msgpack.unpackb(data)["version"] == 2
    assert data == records.encode(with_annotations(labels=b"[1]", mask=b"\x89PNG"))
    assert len({record, records.decode(data), RECORD}) == 2


def test_a_record_without_annotations_is_version_1_to_the_byte():
    version_1 = {
        "version": 1,
        "image": b"image",
        "captions": ["a text"],
        "key": "key",
        "width": 6,
        "height": 4,
        "source": "test",
        "label": "ant",
    }
    data = msgpack.packb(version_1, use_bin_type=True)
    assert records.encode(RECORD) == data and records.decode(data) == RECORD
    assert records.decode(data).annotations == {}
    # A writer in another language may always choose version 2.
    empty = msgpack.packb(version_1 | {"version": 2, "annotations": {}}, use_bin_type=True)
    assert records.decode(empty) == RECORD


def test_the_committed_shards_are_read_and_written_again_to_the_byte():
    for split in ("train", "test"):
        source = ArrayRecordSource(corpus.pattern(split))
        for index in range(len(source)):
            data = source[index]
            assert records.encode(records.decode(data)) == data


def test_training_sees_the_same_batches_whatever_annotations_there_are(image_records):
    batches = []
    for found in ({}, {"mask": b"no PNG", "labels": b"[1]"}):
        items = [dataclasses.replace(r, annotations=found) for r in image_records[:32]]
        items[::2] = image_records[:32:2]  # both versions in one source
        source = ListSource(tuple(map(records.encode, items)))
        with TrainLoader(source, RandomResizedCropView(16), global_batch=16, seed=1) as loader:
            batches.append(next(loader))
    assert batches[0].keys() == batches[1].keys() and not batches[0]["substituted"].any()
    for name, value in batches[0].items():
        np.testing.assert_array_equal(value, batches[1][name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "record schema version 3; this code reads 1 and 2"),
        ({"annotations": [b"x"]}, "record field 'annotations' is list, not a map"),
        ({"annotations": {"mask": "text"}}, "annotation 'mask' is str, not bytes"),
        ({"annotations": {"Mask!": b"x"}}, "annotation 'Mask!': names are up to 64 lower-case"),
        ({"annotations": {b"mask": b"x"}}, "annotation b'mask': names are"),
        ({"annotations": {"m" * 65: b"x"}}, "names are up to 64 lower-case letters"),
    ],
)
def test_a_damaged_annotation_is_damage_of_the_record_and_named(change, says):
    fields = msgpack.unpackb(records.encode(with_annotations(mask=b"x")))
    data = msgpack.packb(fields | change, use_bin_type=True)
    with pytest.raises(records.RecordError, match=re.escape(says)):
        records.decode(data)
    del fields["annotations"]
    with pytest.raises(records.RecordError, match="record without annotations"):
        records.decode(msgpack.packb(fields, use_bin_type=True))


@pytest.mark.parametrize("found", [{"Mask": b"x"}, {"mask": "text"}])
def test_what_cannot_be_read_again_is_not_written(found):
    with pytest.raises(records.RecordError, match="annotation '[Mm]ask'"):
        records.encode(with_annotations(**found))


@pytest.mark.parametrize("value", [[3, 0, 7], [], ["cat", "größe"]])
def test_labels_are_lists_of_numbers_or_of_names(value):
    record = with_annotations(labels=annotations.encode_json(value))
    assert annotations.labels(record) == tuple(value)


def test_a_lone_label_is_a_list_of_one():
    assert annotations.labels(with_annotations(labels=b"7")) == (7,)
    assert annotations.labels(with_annotations(real=b'"cat"'), "real") == ("cat",)


@pytest.mark.parametrize("data", [b'[1, "a"]', b"[1.5]", b"[true]", b"null", b'{"a": 1}'])
def test_other_labels_are_refused(data):
    says = refused(annotations.labels, labels=data)
    assert says == "annotation 'labels': labels are ints, or str, or a list of either"


def test_questions_keep_their_answers_and_what_else_is_there():
    asked = [
        {"question": "What is it?", "answers": ["a cat", "a tom"], "options": ["a", "b"]},
        {"question": "Is it red?", "answers": []},
    ]
    record = with_annotations(questions=annotations.encode_json(asked))
    assert annotations.questions(record) == asked
    for data, says in (
        (b"{}", "a list of objects, not dict"),
        (b"null", "a list of objects, not null"),
        (b'["What?"]', "[0] has no str 'question'"),
        (b'[{"question": "a", "answers": ["b"]}, {"answers": []}]', "[1] has no str 'question'"),
        (b'[{"question": "a", "answers": "b"}]', "[0] has no list of str 'answers'"),
    ):
        assert refused(annotations.questions, questions=data).endswith(says)


def test_conversations_are_turns_as_llava_writes_them():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    record = with_annotations(conversations=annotations.encode_json(turns))
    assert annotations.conversations(record) == turns
    says = refused(annotations.conversations, conversations=b'[{"from": "human", "text": "What?"}]')
    assert says == "annotation 'conversations': [0] has no str 'value'"


@pytest.mark.parametrize("data", [b"", b"[1", b"[NaN]", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(data):
    assert refused(annotations.labels, labels=data).startswith("annotation 'labels': not JSON: ")


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1, 2}, "half \ud800"])
def test_what_json_cannot_hold_is_not_encoded(value):
    with pytest.raises(AnnotationError, match="no JSON value"):
        annotations.encode_json([value])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_come_back_value_by_value(dtype):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (4, 6), dtype, endpoint=True)
    found = annotations.mask(with_annotations(mask=annotations.encode_mask(values)))
    assert found.dtype == dtype and np.array_equal(found, values)


@pytest.mark.parametrize(
    ("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)]
)
def test_a_mask_holds_the_stored_numbers_whatever_their_bits(bits, colour):
    """Pillow stretches grey of 2 and 4 bits, and shows palettes as colours."""
    values = (np.arange(24).reshape(4, 6) * 2731) % (2**bits if colour == 0 else min(2**bits, 4))
    bit_rows = (values[:, :, None] >> np.arange(bits)[::-1] & 1).reshape(4, -1).astype(np.uint8)
    data = png(bits, colour, [row.tobytes() for row in np.packbits(bit_rows, axis=1)])
    found = annotations.mask(with_annotations(mask=data))
    assert np.array_equal(found, values)
    assert found.dtype == (np.uint16 if bits == 16 else np.uint8)


def test_a_text_in_a_mask_is_no_damage_however_long():
    image = Image.fromarray(np.full((4, 6), 7, np.uint8))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("note", "x" * (2 << 20), zip=True)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=texts)
    record = records.Record(b"", (), "k", 6, 4, "s", annotations={"mask": file.getvalue()})
    assert (annotations.mask(record) == 7).all()
    texts.add_text("units_per_metre", "256")
    deep = Image.fromarray(np.full((4, 6), 512, np.uint16))
    for order in (texts, None):  # without a text of its own there is no unit
        file = io.BytesIO()
        deep.save(file, "PNG", pnginfo=order)
        record = dataclasses.replace(record, annotations={"depth": file.getvalue()})
        assert (annotations.depth(record) == (2 if order else np.float32(0.512))).all()


def test_masks_that_do_not_fit_their_image_are_refused():
    assert refused(annotations.mask, mask=annotations.encode_mask(VALUES.T)) == (
        "annotation 'mask': 4 x 6 pixels, its image has 6 x 4"
    )
    colours = np.zeros((4, 6, 3), np.uint8)
    assert refused(annotations.mask, mask=encode_image(colours)).endswith("mode RGB, not grey")
    jpeg = encode_image(VALUES, "JPEG")
    assert refused(annotations.mask, mask=jpeg) == "annotation 'mask': not a PNG"
    whole = annotations.encode_mask(VALUES)
    for kept in (12, len(whole) // 2):
        said = refused(annotations.mask, mask=whole[:kept])
        assert "damaged PNG" in said and "0x" not in said  # the same in every run
    assert refused(annotations.mask, masks=whole) == (
        "no annotation 'mask' in record 'key'; did you mean 'masks'? (known: masks)"
    )
    assert refused(annotations.mask) == "no annotation 'mask' in record 'key'; it has none"


def test_a_mask_that_promises_other_pixels_is_refused_before_it_is_decoded():
    for side, says in (
        (9_000, "9000 x 9000 pixels, its image has 6 x 4"),  # and not that pixels are missing
        (60_000, "DecompressionBombError"),
    ):
        assert says in refused(annotations.mask, mask=png(8, 0, [b""], (side, side)))


def test_random_damage_of_a_mask_is_an_array_or_one_line():
    whole = annotations.encode_mask(VALUES)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(8, len(data), 3):
            data[at] = rng.integers(256)
        try:
            found = annotations.mask(with_annotations(mask=bytes(data)))
            outcomes.add("array")
            assert found.shape == (4, 6)
        except AnnotationError as error:
            outcomes.add("refused")
            assert str(error).startswith("annotation 'mask': ")
    assert "refused" in outcomes


def test_depth_is_in_metres_and_zero_where_it_is_unknown():
    metres = np.array([[0.001, 1.2345, 9.999], [0, np.nan, np.inf]], np.float32)
    record = dataclasses.replace(
        RECORD, width=3, height=2, annotations={"depth": annotations.encode_depth(metres)}
    )
    found = annotations.depth(record)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.001, 1.234, 9.999], [0, 0, 0]], atol=5.1e-4)
    in_kitti = annotations.encode_depth(np.full((2, 3), 80.0), 256)
    record = dataclasses.replace(record, annotations={"depth": in_kitti})
    assert (annotations.depth(record) == 80).all()  # its PNG says 256
    with pytest.raises(AnnotationError, match="its PNG says 256 units a metre, not 1000"):
        annotations.depth(record, units_per_metre=1000)
    smaller = annotations.shrink_png(record, "depth", 2, 1)
    record = dataclasses.replace(record, width=2, height=1, annotations={"depth": smaller})
    assert (annotations.depth(record) == 80).all() and annotations.depth(record).shape == (1, 2)
    with pytest.raises(AnnotationError, match="80.0 m: 16 bits hold at most 65.5 m at 1000 units"):
        annotations.encode_depth(np.full((2, 3), 80.0))
    assert refused(annotations.depth, depth=annotations.encode_mask(VALUES)).endswith(
        "depth is a PNG of 16 bits, this one has 8"
    )


@pytest.mark.parametrize(
    "values",
    [np.zeros((4, 6, 1), np.uint8), np.zeros((4, 6), np.int32), np.zeros((0, 6), np.uint8)],
)
def test_what_is_no_mask_is_not_encoded(values):
    with pytest.raises(AnnotationError, match=r"a mask is \(height, width\) uint8 or uint16, not"):
        annotations.encode_mask(values)


def test_resizing_takes_the_nearest_value_as_pillow_does():
    values = np.random.default_rng(0).integers(0, 60_000, (50, 70), np.uint16)
    for width, height in ((35, 25), (20, 31), (140, 100)):
        image = Image.fromarray(values.astype(np.int32))
        theirs = image.resize((width, height), Image.Resampling.NEAREST)
        assert np.array_equal(annotations.resize_mask(values, width, height), np.asarray(theirs))


def test_all_annotations_are_checked_by_their_names_or_as_png():
    good = with_annotations(
        labels=b"[1]",
        questions=b'[{"question": "a", "answers": ["b"]}]',
        mask=annotations.encode_mask(VALUES),
        parts=annotations.encode_mask(VALUES),
        anything=b"\x00\x01",
        notes=b"{not JSON, and nobody said so",
    )
    annotations.check(good)
    small = annotations.encode_mask(VALUES[1:])
    for name, data, says in (
        ("labels", b"[1.5]", "labels are ints"),
        ("parts", small, "6 x 3 pixels, its image has 6 x 4"),
        ("depth", b"[1]", "not a PNG"),
        ("anything", b"", "empty"),
    ):
        found = dict(good.annotations) | {name: data}
        assert f"annotation {name!r}: {says}" in refused(annotations.check, **found)


def test_formats_are_told_by_content():
    png_file = io.BytesIO()
    Image.new("L", (1, 1)).save(png_file, "PNG")
    for data, name in (
        (png_file.getvalue(), "PNG"),
        (b"7", "JSON"),
        (b"{", "other"),
        (b"", "other"),
    ):
        assert annotations.format_of(data) == name
