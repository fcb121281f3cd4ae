"""A head learns from another scorer's figures what features of a model hold."""

import numpy as np
import pytest

from tests.curation.test_selecting import Grey
from tests.data.image_shards import encode_image, make_record, write_shard
from tests.evaluators.small_models import small_mae
from webssl_jax.config import UserError
from webssl_jax.curation import engine, heads, scorers, scores
from webssl_jax.data import records

COUNT = 440


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Greys of which one cannot be read, their scores, and a head on features of a small MAE."""
    folder = tmp_path_factory.mktemp("head")
    greys = np.random.default_rng(0).integers(0, 256, COUNT)
    made = [
        make_record(encode_image(np.full((8, 8, 3), g, np.uint8)), i) for i, g in enumerate(greys)
    ]
    made[3] = make_record(b"no image", 3)
    write_shard(folder / "p-00000-of-00001.arrayrecord", [records.encode(one) for one in made])
    scored = folder / "scores"
    with pytest.MonkeyPatch.context() as patch:  # in this process
        patch.setattr(engine, "work", lambda _, do, tasks, progress: [do(task) for task in tasks])
        scores.score([str(folder)], Grey(), scored)
    model = small_mae().save(folder / "mae.pth", "mae-pth")
    target = heads.Target(scored, "grey", 128)
    figures = heads.fit(target, str(model), folder / "head.npz", feature="patches")
    return folder, model, made, greys, figures


def test_a_head_says_of_records_what_the_scorer_said(fitted):
    folder, model, made, greys, figures = fitted
    assert (figures["records"], figures["left_out"], figures["held_out"]) == (COUNT - 1, 1, 43)
    assert figures["auc"] > 0.95 and figures["target"] == "grey > 128"
    scorer = scorers.make(f"head:file={folder}/head.npz,model={model},batch=64")
    rows = scorer(made[10:60])
    said = np.array([row["head"] for row in rows]) > 0.5
    assert np.mean(said == (greys[10:60] > 128)) > 0.9


def test_a_head_of_another_model_or_threshold_is_refused(fitted):
    folder, model, made, _, _ = fitted
    other = small_mae(seed=1).save(folder / "other.pth", "mae-pth")
    with pytest.raises(UserError, match="was fitted on features of another model"):
        scorers.make(f"head:file={folder}/head.npz,model={other}")(made[10:12])
    with pytest.raises(UserError, match="other.pth: is no head"):
        scorers.make(f"head:file={other},model={model}")
    target = heads.Target(folder / "scores", "grey", 254.5)
    features = folder / "head.npz.features"
    with pytest.raises(UserError, match="--above 254.5: .* records are above; 100 must be"):
        heads.fit(target, str(model), folder / "none.npz", features, "patches")


def test_an_area_is_the_share_of_pairs_in_order_and_its_error_that_of_samples():
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.5
    values = np.round(rng.normal(positive, 1), 1)  # some are equal
    pairs = values[positive][:, None] - values[~positive]
    assert heads.area(values, positive).value == pytest.approx(
        np.mean((pairs > 0) + (pairs == 0) / 2)
    )
    drawn = [rng.normal(positive, 1) for _ in range(400)]
    found = [heads.area(one, positive) for one in drawn]
    spread = np.std([one.value for one in found])
    assert np.mean([one.se for one in found]) == pytest.approx(spread, rel=0.15)
