"""Light and heavy selections by one command, three ways; a run trains on each of them."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from tests.curation import tiny_smolvlm
from tests.data.image_shards import encode_image, make_record, smooth_image, write_shard
from tests.methods import small_runs
from webssl_jax import config as configs
from webssl_jax import runs
from webssl_jax.config import UserError
from webssl_jax.curation import heads, text_rich
from webssl_jax.curation.feature_pool import FeaturePool
from webssl_jax.curation.scorers import smolvlm, text_boxes
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import feature_files
from webssl_jax.tools import curate
from webssl_jax.visuals import drawing

COUNT, LIGHT, HEAVY = 100, 0.4, 0.05
FEWEST = 20  # of either kind teach a head
WAYS = ("detector", "smolvlm", "features")


def picture(number, rng):
    """Every second has a word."""
    if number % 2:
        return smooth_image(rng, 48, 32)
    page = Image.new("RGB", (48, 32), "white")
    word = "".join(rng.choice(list("abdeghkmnopw"), 3))
    ImageDraw.Draw(page).text((5, 6), word, fill="black", font=drawing.font(19))
    return np.asarray(page)


def write_features(folder, shards):
    """As a model would make them that sees a word. What makes real ones is test_head's."""
    folder.mkdir()
    source, rng = ArrayRecordSource(str(shards)), np.random.default_rng(1)
    facts = {"weights": "made", "images": COUNT, "columns": ["cls"], "dtype": "float32"}
    facts["input"] = feature_files.input_digest(source)
    (folder / feature_files.FACTS).write_text(json.dumps(facts))
    gaps = [i in (11, 13) for i in range(COUNT)]
    images = [
        feature_files._Image(i, str(i), None, None, "gone" if gaps[i] else None)
        for i in range(COUNT)
    ]
    rows = rng.normal(size=(COUNT, 4)) + 6 * (np.arange(COUNT)[:, None] % 2 == 0)
    table = feature_files._table(images, {"cls": rows[~np.array(gaps)]}, "float32")
    feature_files._save(table, folder / "part-00000-of-00001.parquet")


@pytest.fixture(scope="module", autouse=True)
def little_teaches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "FEWEST", FEWEST)
        patch.setattr(
            heads, "pool_of", lambda model, *rest: FeaturePool.open(Path(model), rest[0], rest[2])
        )
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, little_teaches):
    """(folder with shards and selections in ``out``, flags of the three ways)."""
    folder, rng = tmp_path_factory.mktemp("text_rich"), np.random.default_rng(0)
    encoded = []
    for i in range(COUNT):
        record = make_record(encode_image(picture(i, rng)), i)
        source = ("pages", "blurs")[i % 2]
        encoded.append(records.encode(dataclasses.replace(record, source=source)))
    encoded[11], encoded[13] = b"no record", records.encode(make_record(b"no image", 13))
    (folder / "shards").mkdir()
    for i in range(2):
        part = encoded[i * COUNT // 2 : (i + 1) * COUNT // 2]
        write_shard(folder / "shards" / f"p-{i:05d}-of-00002.arrayrecord", part)
    write_features(folder / "features", folder / "shards")
    (folder / "vlm").mkdir()
    vlm = tiny_smolvlm.write(folder / "vlm")
    by = {
        "detector": "detector",
        "smolvlm": f"smolvlm:model={vlm},dtype=float32,side=16",
        "features": f"features:model={folder / 'features'}",
    }
    call(folder, "out", by["features"])  # taught by the detector
    with pytest.MonkeyPatch.context() as patch:  # what is scored is not scored again
        patch.setattr(text_boxes.TextBoxes, "__call__", None)
        call(folder, "out", by["smolvlm"], by["features"])
    return folder, by


def call(folder, output, *by, taught_on=()):
    flags = ["--input", folder / "shards", "--output", folder / output, "--by", *by]
    flags += ["--light", LIGHT, "--heavy", HEAVY, "--workers", 1]
    if taught_on:
        flags += ["--taught-on", *taught_on]
    assert curate.main(["text-rich", *map(str, flags)]) == 0


def kept(folder, way, part, output="out"):
    table = pq.read_table(folder / output / way / part / "selection.parquet")
    return [int(key) for key in table["key"].to_pylist()]


def test_each_way_keeps_the_shares_and_those_who_can_see_text_keep_text(made):
    for way in WAYS:
        light, heavy = (kept(made[0], way, part) for part in ("light", "heavy"))
        assert (len(light), len(heavy)) == (COUNT * LIGHT, COUNT * HEAVY)
        assert not {11, 13} & {*light}
        if way != "smolvlm":  # whose weights are random
            assert np.mean([i % 2 == 0 for i in light]) > 0.95, way
            assert np.mean([i % 2 == 0 for i in heavy]) == 1, way


def test_the_report_shows_all_ways_their_agreement_and_their_sources(made):
    folder = made[0] / "out"
    figures = json.loads((folder / "text_rich.json").read_text())
    assert set(figures["ways"]) == set(WAYS)
    both = {*kept(made[0], "detector", "light")} & {*kept(made[0], "features", "light")}
    assert figures["agreement"]["light"]["detector, features"] == len(both)
    assert len(figures["agreement"]["heavy"]) == 3
    pages = figures["sources"]["pages"]
    assert pages["records"] == COUNT // 2 and figures["sources"]["(damaged)"]["records"] == 1
    assert pages["detector, light"] == sum(i % 2 == 0 for i in kept(made[0], "detector", "light"))
    for answers in figures["answers"].values():
        assert sum(answers.values()) == COUNT and answers["not asked"] == 2
    page = (folder / "index.html").read_text()
    for way in WAYS:
        for part in ("light", "heavy"):
            for name in ("selection", "kept", "dropped"):
                assert f'src="{way}/{part}/{name}.png"' in page
                assert (folder / way / part / f"{name}.png").exists()
    assert smolvlm.QUESTIONS["chart_like"] in page


def test_heads_may_learn_from_some_shards_and_say_it_of_all(made):
    folder, by = made
    some = sorted((folder / "shards").iterdir())[:1]
    call(folder, "some", by["features"], taught_on=[folder / "shards/*00000-of-*"])
    assert len(pq.read_table(folder / "some/features/taught/00000.parquet")) == COUNT // 2
    assert not (folder / "some/detector").exists()
    light = kept(folder, "features", "light", "some")
    assert len(light) == COUNT * LIGHT and all(i % 2 == 0 for i in light)
    other = folder / "other-00000-of-00001.arrayrecord"
    other.write_bytes(some[0].read_bytes())
    with pytest.raises(UserError, match="--taught-on .*other.*: is no shard of --input"):
        call(folder, "foreign", by["features"], taught_on=[other])


def test_a_head_is_taught_by_the_share_or_by_as_many_as_it_needs():
    values = np.array([np.nan, *range(10), 9, 9, 9])
    assert text_rich._above(values, 0.45, 3) == 6  # of 13 scored 6 are above: 7, 8 and four 9
    assert text_rich._above(values, 0.1, 3) == 8  # the four that are alike
    assert text_rich._above(values, 0.1, 5) == 7
    assert text_rich._above(values, 0.95, 3) == 2  # three are not


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (["detectors"], "--by detectors: did you mean 'detector'"),
        (["detector", "detector:side=64"], "detector is given twice"),
        (["features"], "--by features: name the model"),
        (["features:model=x,teacher=features"], "--by features:teacher: known"),
        (["features:models=x"], "--by features: 'models': did you mean 'model'"),
    ],
)
def test_a_way_that_cannot_be_is_refused(made, by, says):
    with pytest.raises(UserError, match=says):
        call(made[0], "none", *by)


def selections(folder):
    """Keys of a config whose sources are all selections."""
    keys = ["data.train=", "global_batch=12", "total_steps=2", "optim.warmup_steps=0"]
    keys.append("model.size=micro")
    for way in WAYS:
        for part in ("light", "heavy"):
            row = f"mixture.{way}_{part}"
            keys.append(f"{row}.train={folder / 'shards'}")
            keys.append(f"{row}.selection={folder / 'out' / way / part / 'selection.parquet'}")
    return keys


def test_training_sees_the_records_of_every_selection(made):
    source = runs.open_records(configs.load("web_mae:size=tiny", selections(made[0])), made[0])
    sizes = {"light": COUNT * LIGHT, "heavy": COUNT * HEAVY}
    wanted = {f"{way}_{part}": sizes[part] for way in WAYS for part in sizes}
    assert dict(zip(source.names, source.counts, strict=True)) == wanted
    seen = collections.defaultdict(set)
    for i in range(len(source)):
        name = source.names[source.part_of(i)]
        seen[name].add(int(records.decode(source[i]).key))
    assert seen == {name: {*kept(made[0], *name.split("_"))} for name in wanted}


@pytest.mark.slow
def test_a_run_trains_on_all_selections(made):
    keys = [*selections(made[0]), "method.view.image_size=16"]
    spec = "web_mae:size=tiny"
    source = runs.open_records(configs.load(spec, keys), made[0])
    (run,) = small_runs.train(spec, keys, source, [0]).values()
    assert np.isfinite(run.metrics["train/loss"]).all() and len(run.metrics["train/loss"]) == 2
