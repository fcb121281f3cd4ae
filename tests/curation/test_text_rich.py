"""Light and heavy selections by one command, three ways; a run trains on each of them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from tests.curation import tiny_smolvlm
from tests.data.image_shards import encode_image, make_record, smooth_image, write_shard
from tests.evaluators.small_models import small_mae
from tests.methods import small_runs
from webssl_jax import config as configs
from webssl_jax import runs
from webssl_jax.config import UserError
from webssl_jax.curation.scorers import smolvlm, text_boxes
from webssl_jax.data import records
from webssl_jax.tools import curate
from webssl_jax.visuals import drawing

COUNT, LIGHT, HEAVY = 280, 0.4, 0.05
WAYS = ("detector", "smolvlm", "features")


def picture(number, rng):
    """Every second has a word."""
    if number % 2:
        return smooth_image(rng, 48, 32)
    page = Image.new("RGB", (48, 32), "white")
    word = "".join(rng.choice(list("abdeghkmnopw"), 3))
    ImageDraw.Draw(page).text((5, 6), word, fill="black", font=drawing.font(19))
    return np.asarray(page)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with shards and models, flags of the three ways, their selections in ``out``)."""
    folder, rng = tmp_path_factory.mktemp("text_rich"), np.random.default_rng(0)
    encoded = []
    for i in range(COUNT):
        record = make_record(encode_image(picture(i, rng)), i)
        source = ("pages", "blurs")[i % 2]
        encoded.append(records.encode(records.Record(**{**vars(record), "source": source})))
    encoded[11], encoded[13] = b"no record", records.encode(make_record(b"no image", 13))
    (folder / "shards").mkdir()
    for i in range(2):
        part = encoded[i * COUNT // 2 : (i + 1) * COUNT // 2]
        write_shard(folder / "shards" / f"p-{i:05d}-of-00002.arrayrecord", part)
    model = small_mae().save(folder / "mae.pth", "mae-pth")
    (folder / "vlm").mkdir()
    vlm = tiny_smolvlm.write(folder / "vlm")
    by = {
        "detector": "detector",
        "smolvlm": f"smolvlm:model={vlm},dtype=float32,side=16",
        "features": f"features:model={model},feature=patches",
    }
    call(folder, "out", by["detector"], by["features"])
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


def kept(folder, way, part):
    table = pq.read_table(folder / "out" / way / part / "selection.parquet")
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


def test_heads_may_learn_from_some_shards_and_say_it_of_all(made, capsys):
    folder, by = made
    some = sorted((folder / "shards").iterdir())[:1]
    with pytest.raises(UserError, match="of 138 records are above; 100 must be, and 100 not"):
        call(folder, "some", by["features"], taught_on=some)
    assert len(pq.read_table(folder / "some/features/taught/00000.parquet")) == COUNT // 2
    assert not (folder / "some/detector").exists()
    with pytest.raises(UserError, match="--taught-on .*: is no shard of --input"):
        other = folder / "other-00000-of-00001.arrayrecord"
        other.write_bytes(some[0].read_bytes())
        call(folder, "foreign", by["features"], taught_on=[other])


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


def test_a_run_trains_on_every_selection(made):
    folder, _ = made
    rows = {f"{way}_{part}": (way, part) for way in WAYS for part in ("light", "heavy")}
    keys = ["data.train=", "model.size=micro", "global_batch=12", "total_steps=2"]
    keys += ["method.view.image_size=16", "optim.warmup_steps=0"]
    keys += ["method.decoder.width=32", "method.decoder.depth=1", "method.decoder.heads=2"]
    for name, (way, part) in rows.items():
        chosen = folder / "out" / way / part / "selection.parquet"
        keys += [f"mixture.{name}.train={folder / 'shards'}", f"mixture.{name}.selection={chosen}"]
    spec = "web_mae:size=tiny"
    source = runs.open_records(configs.load(spec, keys), folder)
    shares = {"light": LIGHT, "heavy": HEAVY}
    counts = {name: COUNT * shares[part] for name, (_, part) in rows.items()}
    assert dict(zip(source.names, source.counts, strict=True)) == counts
    (run,) = small_runs.train(spec, keys, source, [0]).values()
    assert np.isfinite(run.metrics["train/loss"]).all() and len(run.metrics["train/loss"]) == 2
