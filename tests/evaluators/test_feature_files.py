"""Features as parquet: row i is image i, whatever is damaged and wherever the work was cut off."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.image_shards import encode_image
from tests.evaluators.small_models import (
    BATCH,
    broken,
    changed,
    coloured,
    items_of,
    shard,
    small_clip,
    small_mae,
)
from webssl_jax.config import UserError
from webssl_jax.data.image_folder import open_images
from webssl_jax.evaluators import feature_files
from webssl_jax.evaluators.feature_files import Asked, write
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.tools import features as tool

ASKED = Asked(batch=BATCH, threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images in two folders, of which the third cannot be decoded and the last is empty."""
    root = tmp_path_factory.mktemp("images")
    for i, image in enumerate(coloured(20)[0]):
        (root / "ab"[i // 10]).mkdir(exist_ok=True)
        (root / "ab"[i // 10] / f"{i:02d}.png").write_bytes(encode_image(image))
    (root / "a" / "02.png").write_bytes(b"no image")
    (root / "b" / "19.png").write_bytes(b"")
    return root


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_files, "_MOST_ROWS", 9)


def read(output):
    return pq.read_table(output).to_pydict()


def test_row_i_is_image_i_and_one_that_cannot_be_read_is_a_gap_with_its_reason(
    folder, tmp_path, small_parts
):
    output = tmp_path / "deep" / "out"
    made = write(small_mae(), open_images(str(folder), "--images"), output, ASKED)
    assert made == (3, 20, 2) and len(list(output.glob("part-*-of-00003.parquet"))) == 3
    rows = read(output)
    names = [f"{'ab'[i // 10]}/{i:02d}.png" for i in range(20)]
    assert rows["index"] == list(range(20)) and rows["name"] == names
    assert rows["label"] == ["a"] * 2 + ["a"] * 8 + ["b"] * 9 + [None]  # an empty file has none
    gaps = [i for i, problem in enumerate(rows["problem"]) if problem]
    assert gaps == [2, 19] and rows["problem"][19] == "empty file"
    whole = [i for i in range(20) if i not in gaps]
    seen = small_mae()([folder / names[i] for i in whole], Want(patches="mean"), BATCH)
    for name, wanted in (("cls", seen.cls), ("patches", seen.patches)):
        assert [rows[name][i] for i in gaps] == [None, None]
        found = np.array([rows[name][i] for i in whole])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_kill_costs_the_part_it_fell_into_and_changes_nothing(
    folder, tmp_path, small_parts, monkeypatch
):
    source = open_images(str(folder), "--images")
    write(small_mae(), source, tmp_path / "once", ASKED)
    save, calls, plain = feature_files._save, [], Model.features

    def killed(table, path):
        if "00001-of" in path.name:
            (path.parent / f"_{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        save(table, path)

    monkeypatch.setattr(feature_files, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        write(small_mae(), source, tmp_path / "twice", ASKED)
    monkeypatch.setattr(feature_files, "_save", save)
    monkeypatch.setattr(Model, "features", lambda *a: (calls.append(1), plain(*a))[1])
    write(small_mae(), source, tmp_path / "twice", ASKED)
    assert len(calls) == 3  # of 9 and 2 images; the first 9 are there
    assert read(tmp_path / "twice") == read(tmp_path / "once")
    assert write(small_mae(), source, tmp_path / "twice", ASKED).rows == 20 and len(calls) == 3


def test_a_folder_of_other_features_is_refused_with_both_values(folder, tmp_path, monkeypatch):
    source, output = open_images(str(folder), "--images"), tmp_path / "out"
    write(small_mae(), source, output, ASKED)
    monkeypatch.setattr(Model, "features", None)  # before any work
    other = changed(small_mae(), "encoder/norm/scale")
    with pytest.raises(UserError, match=r"another command \(weights: \w+ -> \w+\)"):
        write(other, source, output, ASKED)
    with pytest.raises(UserError, match=r"\(columns: \['cls', 'patches'\] -> \['cls'\]\)"):
        write(small_mae(), source, output, ASKED._replace(columns=("cls",)))
    fewer = shard(tmp_path, "s", items_of(coloured(5)[0]))
    with pytest.raises(UserError, match=r"\(images: 20 -> 5\)"):
        write(small_mae(), open_images(fewer, "--images"), output, ASKED)
    with pytest.raises(UserError, match="holds s-00000-of-00001.arrayrecord; give an empty folder"):
        write(small_mae(), source, tmp_path, ASKED)


def test_networks_that_diverged_and_inputs_without_an_image_are_refused(tmp_path):
    images = shard(tmp_path, "s", items_of(coloured(5)[0]))
    with pytest.raises(UserError, match=r"0: NaN or infinity in its features \(cls\)"):
        write(broken(small_mae()), open_images(images, "--images"), tmp_path / "nan", ASKED)
    nothing = shard(tmp_path, "n", items_of([b"none", b"of", b"them"]))
    with pytest.raises(UserError, match="none of 3 images can be read"):
        write(small_mae(), open_images(nothing, "--images"), tmp_path / "none", ASKED)


def test_the_command_writes_embeddings_of_records_in_half_precision(tmp_path, capsys):
    images, labels = coloured(5)
    files = [encode_image(image) for image in images[:4]] + [b"damaged"]
    pattern = shard(tmp_path, "s", items_of(files, labels))
    small_clip().save(tmp_path / "clip", "hf-clip")
    flags = ["--model", str(tmp_path / "clip"), "--images", pattern, "--batch", str(BATCH)]
    flags += ["--output", str(tmp_path / "out")]
    assert tool.main([*flags, "--columns", "embedding", "--dtype", "float16"]) == 0
    assert f"{tmp_path / 'out'}  5 rows in 1 parts, 1 gaps" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "out")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"
    rows = table.to_pydict()
    assert (
        rows["name"] == list("01234") and rows["label"] == labels and rows["embedding"][4] is None
    )
    lengths = np.linalg.norm(np.array(rows["embedding"][:4], np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-3)
    kept = json.loads((tmp_path / "out" / "_features.json").read_text())
    assert kept["columns"] == ["embedding"] and kept["model"] == "clip"
    with pytest.raises(UserError, match="clip gives no 'grid'; .*cls, embedding, patches"):
        tool.main([*flags, "--columns", "grid"])
