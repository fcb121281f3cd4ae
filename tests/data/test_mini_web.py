"""Claims about the mini-web corpus, on packages made by code: what is read, left out, kept apart.

No network: the tool is given a cache in which the packages already lie.
"""

import collections
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.corpus import near_duplicates
from webssl_jax.corpus.mini_web import choose, output, packages, prepare, readers
from webssl_jax.corpus.mini_web.catalogue import BY_NAME, SOURCES
from webssl_jax.corpus.mini_web.packages import Package
from webssl_jax.data import records
from webssl_jax.data.converter import work
from webssl_jax.data.converter.items import Dropped
from webssl_jax.data.sources import ArrayRecordSource

ROOT = Path(__file__).parents[2]


def drawing(seed, size=(96, 80), mirrored=False):
    """A random polygon on white: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        points = [tuple(p) for p in (rng.random((4, 2)) * size).astype(int).tolist()]
        pen.polygon(points, fill=tuple(rng.integers(0, 200, 3).tolist()), outline="black")
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_deb(folder, name, tree, links=()):
    root = folder / f"{name}.root"
    control = root / "DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    for path, data in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    for path, target in links:
        (root / path).symlink_to(target)
    made = folder / f"{name}_1_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


def write_tgz(path, tree):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def zip_of(tree):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return out.getvalue()


def kinds(found):
    """{key: (captions, kind)} of a reader's pictures, and its drops by reason."""
    found = list(found)
    drops = collections.Counter(x.reason for x in found if isinstance(x, Dropped))
    return {p.key: p for p in found if not isinstance(p, Dropped)}, drops


# ---------------------------------------------------------------------------------------- packages


def test_a_package_of_each_kind_gives_its_wanted_regular_files(tmp_path):
    tree = {"usr/a/one.png": b"1", "usr/a/two.txt": b"2", "usr/b/three.png": b"3"}
    wanted = re.compile(r"\.png$")
    deb = write_deb(tmp_path, "some", tree, links=[("usr/a/link.png", "one.png")])
    tgz = write_tgz(tmp_path / "some.tgz", tree)
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(zip_of(tree))
    for archive in (deb, tgz, wheel):
        assert packages.read(archive, wanted) == {"usr/a/one.png": b"1", "usr/b/three.png": b"3"}
        archive.write_bytes(archive.read_bytes()[:60])
        with pytest.raises(UserError, match="delete it and start again"):
            packages.read(archive, wanted)


def test_a_missing_client_and_an_unknown_package_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm not found: it is needed for a-b 1.0"):
        packages.download([Package("npm", "a-b", "1.0")], tmp_path, lambda n: None)
    for name, text in {"apt-get": "E: Unable to locate package nosuch", "dpkg-deb": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match="Unable to locate package nosuch; .*--without") as caught:
        packages.download([Package("deb", "nosuch")], tmp_path, lambda n: None)
    assert "\n" not in str(caught.value)


def test_what_is_in_the_cache_is_not_fetched_again(tmp_path, monkeypatch):
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho x >> ../calls\necho data > scope-a-1.0.tgz\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = []
    for _ in range(2):
        packages.download([Package("npm", "@scope/a", "1.0")], tmp_path, done.append)
    assert (tmp_path / "calls").read_text() == "x\n" and done == [1, 1]
    assert [p.name for p in tmp_path.glob("*.tgz")] == ["scope-a-1.0.tgz"]


def test_every_source_s_licence_is_documented_and_what_debian_does_not_pin_is_pinned():
    readme = (Path(packages.__file__).parent / "README.md").read_text("utf-8")
    for source in SOURCES:
        assert re.search(
            rf"\| {re.escape(source.name)} \|.*\| {re.escape(source.licence)} \|", readme
        )
        assert source.what and source.pattern
        assert all(p.version or p.kind == "deb" for p in source.packages)
    assert len(BY_NAME) == len(SOURCES)


# ----------------------------------------------------------------------------------------- readers


def emoji_tree(vendor="google"):
    face = {
        "name": "GRINNING FACE", "short_name": "grinning", "unified": "1F600", "image": "1f600.png",
        "category": "Smileys & Emotion", "subcategory": "face-smiling",
    }  # fmt: skip
    tones = {f"1F3F{x}": {"image": f"1f44b-1f3f{x.lower()}.png"} for x in "BCDEF"}
    hand = face | {
        "name": "WAVING HAND SIGN", "unified": "1F44B", "image": "1f44b.png",
        "category": "People & Body", "subcategory": "hand-fingers-open", "skin_variations": tones,
    }  # fmt: skip
    files = ["1f600.png", "1f44b.png", *(tone["image"] for tone in tones.values())]
    tree = {f"package/img/{vendor}/64/{file}": file.encode() for file in files}
    return tree | {"package/emoji.json": json.dumps([face, hand]).encode()}


def test_of_an_emoji_s_skin_tones_one_stays_the_same_for_every_vendor():
    pictures, drops = kinds(readers.emoji(emoji_tree(), "google"))
    assert len(pictures) == 3 and drops == {"skin tone variant": 4}
    (toned,) = set(pictures) - {"1f600", "1f44b"}
    assert re.fullmatch(r"waving hand sign, [a-z-]+( skin)", pictures[toned].captions[0])
    assert pictures["1f600"].captions == ("grinning face",)
    assert pictures["1f600"].kind == "Unicode name" and pictures["1f600"].topic == "faces"
    assert pictures[toned].group == pictures["1f44b"].group == "emoji/1F44B"
    other = {f"package/assets/{k}.webp": b"" for k in ("1f600", "1f44b", toned, "1f9ff")}
    fluent, drops = kinds(readers.fluent(other | emoji_tree()))
    assert {p.group for p in fluent.values()} == {"emoji/1F600", "emoji/1F44B"}
    assert toned in fluent and drops["no such emoji in the table of names"] == 1


def test_surface_maps_and_mirrored_stamps_are_left_out_by_name():
    pk3 = zip_of({f"textures/wall/brick{s}.jpg": b"" for s in ("", "_nm", "_gm", "_sm", "_rm")})
    pictures, drops = kinds(readers.textures({"base/0textures.pk3": pk3}))
    assert [p.captions for p in pictures.values()] == [("wall texture, brick",)]
    assert drops == {"surface map, not a picture": 4}
    stamps = {f"usr/share/tuxpaint/stamps/animals/cat{s}.png": b"" for s in ("", "_mirror")}
    stamps["usr/share/tuxpaint/stamps/animals/cat.txt"] = b"A sleepy cat.\nde.utf8=Eine Katze.\n"
    pictures, drops = kinds(readers.tuxpaint(stamps))
    assert pictures["animals/cat"].captions == ("A sleepy cat.",)
    assert pictures["animals/cat"].kind == "human sentence" and drops == {"mirrored copy": 1}


def test_captions_come_from_metadata_alt_text_page_title_or_name():
    svg = (
        b"<dc:title>Red &amp; round</dc:title><dc:description>an apple</dc:description>"
        b"<rdf:li>fruit</rdf:li><rdf:li>hash</rdf:li>"
    )
    root = "usr/share/openclipart/"
    tree = {f"{root}png/food/fruit/x_01.png": b"", f"{root}svg/food/fruit/x_01.svg": svg}
    tree[f"{root}png/food/fruit/green_pear_2.png"] = b""
    pictures, _ = kinds(readers.openclipart(tree))
    first, second = pictures["food/fruit/x_01"], pictures["food/fruit/green_pear_2"]
    assert first.captions == ("Red & round. an apple", "fruit") and first.topic == "food"
    assert first.kind == "title and keywords"
    assert second.captions == ("green pear",) and second.kind == "file name"
    page = (
        b'<title>Layers</title><img src="../i/a.png" alt="The layers dialog">'
        b'<img src="../i/b.png" alt="b.png"><img src="../i/a.png" alt="dialog">'
    )
    tree = {"d/en/p.html": page, "d/i/a.png": b"", "d/i/b.png": b"", "d/i/c.png": b""}
    pictures, _ = kinds(readers.documentation(tree, "d/"))
    assert (pictures["i/a.png"].captions, pictures["i/a.png"].kind) == (
        ("The layers dialog",),
        "alt text",
    )
    assert (pictures["i/b.png"].captions, pictures["i/b.png"].kind) == (("Layers",), "page title")
    assert (pictures["i/c.png"].captions, pictures["i/c.png"].kind) == ((), "none")
    rows = "name#1=Armchair\nicon#1=/icons/chair.png\ncategory#1=Living room\n"
    tree = {"icons/chair.png": b"", "PluginFurnitureCatalog.properties": rows.encode()}
    (chair,) = readers.sweethome({"usr/Scopia.sh3f": zip_of(tree)})
    assert chair.captions == ("Armchair, living room",) and chair.topic == "furniture"
    assert chair.kind == "catalogue name"


def test_of_a_wallpaper_in_several_sizes_the_largest_stays():
    folder = "usr/share/wallpapers/Flow/contents/images"
    tree = {f"{folder}/800x600.png": b"1", f"{folder}/1920x1080.png": b"22", "usr/w/hill.jpg": b"3"}
    pictures, _ = kinds(readers.wallpapers(tree, crops=2))
    assert {key: p.image for key, p in pictures.items()} == {"Flow": b"22", "hill": b"3"}


# --------------------------------------------------------------------------------------- preparing


def prepared(tmp_path, name, tree, max_side=64, **changes):
    """A source of synthetic pictures, prepared: its rows, records and drops."""
    source = dataclasses.replace(
        BY_NAME["pysiogame"], name=name, packages=(Package("deb", name),), wanted=".", **changes
    )
    write_deb(tmp_path, name, tree)
    files = prepare.Files(tmp_path, name, "test")
    count = prepare.prepare(source, tmp_path, files, max_side)
    part = files.load()
    source = ArrayRecordSource(str(files.records))
    found = [records.decode(source[i]) for i in range(len(source))]
    assert count == len(found) == len(part.rows) == len(part.bank["edges"])
    return part, {r.key: r for r in found}


def test_preparing_drops_with_reasons_shrinks_large_pictures_and_keeps_small_files(tmp_path):
    root = "usr/share/games/pysiogame/res/images/art4apps/"
    small, large = drawing(1, (60, 50)), drawing(2, (300, 200))
    files = {
        "animals/small.png": encoded(small),
        "animals/large.png": encoded(large),
        "animals/copy.png": encoded(small),
        "animals/tiny.png": encoded(drawing(3, (40, 20))),
        "animals/thin.png": encoded(drawing(4, (400, 40))),
        "animals/blank.png": encoded(Image.new("RGB", (50, 50), "white")),
        "animals/broken.png": encoded(drawing(5))[:300],
        "animals/turned.bmp": encoded(drawing(6, (60, 50)), "BMP"),
    }
    part, found = prepared(tmp_path, "some", {root + k: v for k, v in files.items()})
    assert part.dropped == {
        "exact duplicate": 1, "too small": 1, "too thin": 1, "blank": 1, "undecodable": 1
    }  # fmt: skip
    assert set(found) == {f"some/animals/{n}" for n in ("copy.png", "large.png", "turned.bmp")}
    assert found["some/animals/copy.png"].image == files["animals/small.png"]
    record = found["some/animals/large.png"]
    assert (record.width, record.height) == (64, 43) and record.image[:2] == b"\xff\xd8"
    assert record.captions == ("large",) and record.label == "animals"
    assert found["some/animals/turned.bmp"].image[:2] == b"\xff\xd8"


@pytest.mark.parametrize("side", [7_000, 9_000, 60_000])  # our limit, the decoder's, and Pillow's
def test_a_bomb_is_counted_as_too_large_by_its_header(tmp_path, side):
    png = bytearray(encoded(drawing(1)))
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    root = "usr/share/games/pysiogame/res/images/art4apps/animals/"
    part, found = prepared(
        tmp_path, "bomb", {root + "bomb.png": bytes(png), root + "cat.png": encoded(drawing(2))}
    )
    assert part.dropped == {"over 40 Mpixel": 1} and len(found) == 1


def test_crops_and_the_cap_of_a_group(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    large = Image.fromarray(noise).resize((600, 400), Image.Resampling.NEAREST)
    root = "usr/"
    tree = {root + "big.png": encoded(large)}
    part, found = prepared(
        tmp_path, "crops", tree, reader=lambda tree: readers.wallpapers(tree, crops=3)
    )
    assert set(found) == {"crops/big", "crops/big#1", "crops/big#2", "crops/big#3"}
    assert len({row["group"] for row in part.rows}) == 1
    root = "usr/core/images/units/elves/"
    tree = {f"{root}archer-attack-{i}.png": encoded(drawing(i)) for i in range(4)}
    part, found = prepared(tmp_path, "frames", tree, reader=readers.wesnoth, per_group=2)
    assert len(found) == 2 and part.dropped == {"frame of one animation": 2}


# ---------------------------------------------------------------------------------------- choosing


def test_pairs_found_in_blocks_are_those_of_the_full_comparison():
    canvases = [near_duplicates.canvas(np.asarray(drawing(i))) for i in range(12)]
    canvases += [near_duplicates.canvas(np.asarray(drawing(i, mirrored=True))) for i in range(3)]
    canvases = np.stack(canvases)
    near = near_duplicates.alike(near_duplicates.likeness(canvases), 0.7, 0.84)
    np.fill_diagonal(near, False)
    rows = np.arange(0, 15, 2)
    i, j, _ = near_duplicates.similar_pairs(
        near_duplicates.describe(canvases), rows, 0.7, 0.84, chunk=3
    )
    assert sorted(zip(i, j, strict=True)) == sorted(
        (a, b) for a, b in zip(*np.nonzero(near), strict=True) if a in rows
    )
    assert {(0, 12), (2, 14)} <= set(zip(i.tolist(), j.tolist(), strict=True))


def part_of(images, topics, name):
    """What preparing would make of ``images``."""
    canvases = np.stack([near_duplicates.canvas(np.asarray(image)) for image in images])
    rows = [
        {"key": f"{name}/{i}", "group": f"{name}/{i}", "kind": "file name", "topic": topic,
         "digest": f"{name}{i}", "width": 96, "height": 80, "bytes": 1}
        for i, topic in enumerate(topics)
    ]  # fmt: skip
    return prepare.Prepared(rows, near_duplicates.describe(canvases), collections.Counter())


@pytest.fixture(scope="module")
def chosen():
    """Two sources of two topics, a third topic of one source, 40 mirrored twins across sources, and
    a source without topics that holds twins of the first's."""
    first = [drawing(i) for i in range(160)]
    second = [drawing(1000 + i) for i in range(120)] + [
        drawing(i, mirrored=True) for i in range(40)
    ]
    third = [drawing(i, size=(92, 80)) for i in range(40, 60)] + [
        drawing(5000 + i) for i in range(9)
    ]
    topics = ["cats", "dogs"] * 80
    sources = {
        "a": part_of(first, topics, "a"),
        "b": part_of(second, topics[:120] + topics[:40], "b"),
        "c": part_of(third, [None] * 20 + ["birds"] * 9, "c"),
    }
    return choose.choose(sources, 1000, choose.Quotas(test=12, train=50, min_test=4))


def test_no_twin_lies_across_the_split(chosen):
    keys = {part: {row["key"] for row in getattr(chosen, part)} for part in ("train", "probe_test")}
    assert not keys["train"] & keys["probe_test"] and len(keys["probe_test"]) >= 30
    for i in range(40):
        sides = {part for part in keys if keys[part] & {f"a/{i}", f"b/{120 + i}"}}
        assert len(sides) == 1, f"drawing {i} is on both sides"
    parts = [{row["key"] for row in part} for part in (chosen.probe_fit, chosen.probe_dev)]
    assert {row["key"] for row in chosen.probe_train} == parts[0] | parts[1]
    assert 0.2 * len(chosen.probe_train) < len(parts[1]) <= 0.3 * len(chosen.probe_train)
    for i in range(40, 60):  # its twin has no topic, so it is for training
        assert f"a/{i}" in keys["train"]


def test_quotas_hold_and_a_topic_of_one_source_is_no_class(chosen):
    train = {row["key"] for row in chosen.train}
    assert {row["key"] for row in chosen.probe_train} <= train
    for rows, limit in ((chosen.probe_test, 12), (chosen.probe_train, 50)):
        cells = collections.Counter((row["topic"], row["source"]) for row in rows)
        assert max(cells.values()) <= limit
        assert {topic for topic, _ in cells} == {"cats", "dogs"}
    guessed = choose.guessed_from_source(chosen.probe_train, chosen.probe_test)
    assert abs(guessed.mean() - 0.5) < 0.15, "both sources draw both topics alike"


def alike_pairs(count, pairs, correlation):
    """A bank of ``count`` descriptors: ``pairs`` resemble each other so much, others not at all."""
    rng = np.random.default_rng(0)
    bank = {}
    for kind, size in (("edges", 256), ("colour", 768)):
        x = np.linalg.qr(rng.normal(size=(size, count)))[0].T
        for a, b in pairs:
            x[b] = correlation * x[a] + np.sqrt(1 - correlation**2) * x[b]
        bank |= {kind: x, f"mirrored {kind}": np.zeros_like(x)}
    return bank


def test_nothing_that_resembles_the_development_split_is_learnt_from_or_trained_on():
    """Look-alikes by the rule of the test images, too little alike to be of one group."""
    rows = [
        {"key": f"{i}", "group": f"{i // 2}", "topic": ("cats", "dogs", None)[i // 2 % 3],
         "source": "ab"[i % 2]} for i in range(240)
    ]  # fmt: skip
    fit_pairs = [(k, k + 6) for k in range(0, 120, 12)]  # a cat and a cat
    other_pairs = [(k, k + 4) for k in range(120, 240, 12)]  # a cat and what has no topic
    bank = alike_pairs(240, fit_pairs + other_pairs, 0.8)
    quotas = choose.Quotas(test=12, train=25, of_class=0.2, min_test=4)
    train, learn, fit, dev, dev_train, test = choose.probe(rows, bank, quotas)
    assert set(fit) | set(dev) == set(learn) and not set(fit) & set(dev)
    assert set(dev_train) < set(train) and not set(dev_train) & set(dev) and len(dev) > 20
    near = (bank["edges"] @ bank["edges"].T) > 0.7
    assert not near[np.ix_(dev, fit)].any() and not near[np.ix_(dev, dev_train)].any()
    assert set(dev) & {a for a, _ in other_pairs}, "none of them has a look-alike to leave out"
    partners = {k ^ 1 for k in dev}  # of the same groups
    assert not partners & (set(fit) | set(dev_train)) and partners - set(learn)


@pytest.mark.parametrize(("method", "part"), [("clip", "train"), ("dino", "drawings")])
def test_a_run_that_dev_judges_trains_on_what_does_not_resemble_it(method, part):
    config = configs.load(f"mini_web:corpus=C,method={method},split=dev")
    mixture = {"train": "C/train-*.arrayrecord", "selection": f"C/dev-{part}.parquet"}
    assert config.mixture.to_dict() == {part: mixture} and not config.data.train
    judged = {(row.get("train"), row.get("test")) for row in config.evals.values()}
    assert ("C/probe-fit-*.arrayrecord", "C/probe-dev-*.arrayrecord") in judged
    assert not any("probe-t" in str(path) for path in judged)


def test_the_network_with_labels_learns_from_the_images_that_probes_learn_from():
    for split, part in (("test", "train"), ("dev", "fit")):
        config = configs.load(f"mini_web:corpus=C,method=supervised,split={split}")
        assert config.data.train == f"C/probe-{part}-*.arrayrecord" and not config.mixture


def test_selections_name_the_records_of_drawings_and_of_what_dev_does_not_resemble(
    chosen, tmp_path, monkeypatch
):
    monkeypatch.setattr(output, "IMAGES_PER_SHARD", 60)
    output.write_selections(chosen, tmp_path)
    total = -(-len(chosen.train) // 60)
    shards = {f"train-{i:05d}-of-{total:05d}.arrayrecord": chosen.train[i::total]
              for i in range(total)}  # fmt: skip

    def picked(name):
        found = pq.read_table(tmp_path / f"{name}.parquet").to_pydict()
        return [shards[shard][record]["key"] for shard, record in zip(*found.values(), strict=True)]

    drawn = [row["key"] for row in chosen.train if row["source"] in "ab"]
    dev = [row["key"] for row in chosen.dev_train]
    assert picked("drawings") == drawn and picked("dev-train") == dev and total > 3
    assert picked("dev-drawings") == [key for key in drawn if key in set(dev)]
    assert len(dev) <= len(chosen.train) - len(chosen.probe_dev)


def test_the_cap_takes_labelled_pictures_first_and_the_choice_does_not_depend_on_luck():
    part = part_of([drawing(i) for i in range(30)], ["cats"] * 10 + [None] * 20, "a")
    found = [choose.choose({"a": part}, 15, choose.Quotas()) for _ in range(2)]
    assert found[0] == found[1] and len(found[0].train) == 15
    assert sum(row["topic"] == "cats" for row in found[0].train) == 10
    assert found[0].dropped["a"] == {"cap of the source": 15}
    twice = choose.choose({"a": part, "b": part}, 100, choose.Quotas())
    assert twice.dropped["b"] == {"exact duplicate": 30}


# ---------------------------------------------------------------------------------------- the tool


def run(*args):
    command = [sys.executable, str(ROOT / "tools/mini_web.py"), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_the_tool_continues_a_stopped_run_offline_and_knows_when_it_is_done(tmp_path):
    """From a cache of synthetic packages, of which one was prepared before the run was stopped."""
    cache, output = tmp_path / "cache", tmp_path / "out"
    work = output / ".work"
    for folder in (cache, work):
        folder.mkdir(parents=True)
    topics = ("animals", "food")
    roots = {
        "pysiogame": "usr/share/games/pysiogame/res/images/art4apps/",
        "tuxpaint-stamps-default": "usr/share/tuxpaint/stamps/",
    }
    for n, (package, root) in enumerate(roots.items()):
        names = [(i, k, f"{root}{topic}/thing{i}x.png") for k, topic in enumerate(topics)
                 for i in range(70)]  # fmt: skip
        pictures = {name: encoded(drawing(7000 * n + 500 * k + i)) for i, k, name in names}
        write_deb(cache, package, pictures)
    files = prepare.Files(work, "pysiogame", "256px")
    prepare.prepare(BY_NAME["pysiogame"], cache, files, 256)
    before = files.records.stat().st_mtime_ns
    args = ("--output", output, "--cache", cache, "--only", "pysiogame,tuxpaint", "--keep-work")
    first = run(*args, "--workers", 1)
    assert first.returncode == 0, first.stderr
    assert files.records.stat().st_mtime_ns == before, "it was prepared again"
    keys = {}
    for name in ("train", "probe-train", "probe-fit", "probe-dev", "probe-test"):
        source = ArrayRecordSource(str(output / f"{name}-*.arrayrecord"))
        keys[name] = {records.decode(source[i]).key for i in range(len(source))}
    assert keys["probe-fit"] | keys["probe-dev"] == keys["probe-train"]
    assert keys["probe-train"] <= keys["train"] and not keys["train"] & keys["probe-test"]
    assert pq.read_table(output / "drawings.parquet").num_rows == len(keys["train"])
    for name in ("dev-train", "dev-drawings"):
        rows = pq.read_table(output / f"{name}.parquet").num_rows
        assert 0 < rows <= len(keys["train"]) - len(keys["probe-dev"])
    floors = json.loads((output / "floors.json").read_text())
    assert floors["classes"] == list(topics) and floors["test"] == len(keys["probe-test"])
    assert set(floors["features"]) == {"majority class", "raw pixels", "colour histogram"}
    for figures in (*floors["features"].values(), *floors["features_greyscale"].values()):
        assert figures.keys() == {"knn", "logistic"}
        assert all(0 < x["top1"] <= 1 and x["top1_se"] >= 0 for x in figures.values())
    assert floors["chance"] == 0.5 and 0 < floors["topic_guessed_from_source"]["top1"] < 1
    text = (output / "SUMMARY.md").read_text()
    assert "| pysiogame | 140 |" in text and "CC-BY-3.0" in text
    lines = (line for line in text.splitlines() if line.startswith("raw pixels"))
    for floor, name in zip(lines, ("features", "features_greyscale"), strict=True):
        top1 = floors[name]["raw pixels"]["logistic"]["top1"]
        assert f"logistic {top1:.3f} +- " in floor and "knn 0." in floor
    assert Image.open(output / "sources.png").size[0] > 500
    second = run(*args)
    assert second.returncode == 0 and "complete" in second.stdout
    before = sorted(path.stat().st_mtime_ns for path in output.iterdir())
    other = run(*args, "--cap", 5)
    assert other.returncode == 2 and "was begun with --cap 3000, now 5" in other.stderr
    assert len(other.stderr.splitlines()) == 1 and not other.stdout
    assert before == sorted(path.stat().st_mtime_ns for path in output.iterdir())


def test_the_tool_says_what_is_wrong_in_one_line(tmp_path):
    result = run("--output", tmp_path / "x", "--only", "pysiogme")
    assert result.returncode == 2 and "did you mean" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "some.arrayrecord").write_bytes(b"")
    result = run("--output", tmp_path, "--only", "pysiogame")
    assert result.returncode == 2 and "holds some.arrayrecord from elsewhere" in result.stderr


def test_a_shard_that_lost_a_record_gets_no_final_name(tmp_path, monkeypatch):
    root = "usr/share/games/pysiogame/res/images/art4apps/animals/"
    part, found = prepared(
        tmp_path, "some", {f"{root}{i}.png": encoded(drawing(i)) for i in range(4)}
    )
    rows = [row | {"source": "some", "place": i} for i, row in enumerate(part.rows)]
    files, folder = {"some": prepare.Files(tmp_path, "some", "test")}, tmp_path / "out"
    folder.mkdir()
    stale = folder / "train-00000-of-00009.arrayrecord"
    for path in (stale, folder / f"{stale.name}.0123.tmp"):
        path.write_bytes(b"of a run that was killed")
    whole = work.array_record_module.ArrayRecordWriter

    class Losing(whole):
        def write(self, data):
            if records.decode(data).key != rows[2]["key"]:
                super().write(data)

    monkeypatch.setattr(work.array_record_module, "ArrayRecordWriter", Losing)
    with pytest.raises(OSError, match="3 records arrived of 4"):
        output.write_shards("train", rows, files, folder)
    assert not list(folder.iterdir())
    monkeypatch.setattr(work.array_record_module, "ArrayRecordWriter", whole)
    output.write_shards("train", rows, files, folder)
    (shard,) = folder.iterdir()
    source = ArrayRecordSource(str(shard))
    assert {records.decode(source[i]).key for i in range(len(source))} == set(found)
