"""Crops whose sizes change from batch to batch: DINOv3's stage of high resolution."""

import dataclasses
import shutil

import numpy as np
import pytest

from tests.e2e import runner
from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax.bad_steps import replay
from webssl_jax.data import records
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.views import Turns
from webssl_jax.methods.base import kinds_of
from webssl_jax.train_step import by_shapes

from .small_runs import Records
from .test_every_method import CASES, NETWORK, load

SHARES = (0.3, 0.3, 0.3, 0.05, 0.05)


@dataclasses.dataclass(frozen=True)
class Sized:
    """So many random numbers."""

    size: int

    def __call__(self, data, rng):
        return {"x": np.append(rng.random(), np.zeros(self.size))}


def loader(view, **options):
    source = Records(
        records.encode(records.Record(b"x", (), str(i), 1, 1, "s", "")) for i in range(20)
    )
    return TrainLoader(source, view, global_batch=3, seed=5, threads=1, **options)


def test_a_batch_is_of_one_size_which_depends_on_seed_and_number_alone():
    turns = Turns((Sized(1), Sized(2)), (2.0, 1.0))
    with loader(turns) as whole, loader(Sized(1)) as plain:
        batches, of_one_size = ([next(x) for _ in range(12)] for x in (whole, plain))
        numbers = [turns.number(5, step) for step in range(12)]
        assert set(numbers) == {0, 1}
        assert [batch["x"].shape[1] - 2 for batch in batches] == numbers
        for batch, other in zip(batches, of_one_size):  # the same records and random numbers
            np.testing.assert_array_equal(batch["record"], other["record"])
            np.testing.assert_array_equal(batch["x"][:, 0], other["x"][:, 0])
        np.testing.assert_array_equal(whole.batch_at(9)["x"], batches[9]["x"])
    with loader(turns, start_step=7, rows=np.array([0, 2])) as later:  # another host, restarted
        for batch in batches[7:]:
            np.testing.assert_array_equal(next(later)["x"], batch["x"][[0, 2]])


def test_sizes_come_as_often_as_their_shares_say():
    turns = Turns((Sized(1),) * 5, SHARES)
    counts = np.bincount([turns.number(0, step) for step in range(2000)], minlength=5)
    # five standard errors of the largest
    np.testing.assert_allclose(counts / 2000, SHARES, atol=5 * (0.21 / 2000) ** 0.5)


def test_the_stage_is_the_published_one():
    config = configs.load("dinov3:size=7b,stage=high_res")
    method = methods.create(config)
    kinds = kinds_of(method)
    assert [(x.view.global_size, x.view.local_size, x.gram.size) for x in kinds] == [
        *((512, 112, 768), (768, 112, 1152), (768, 160, 1152)),
        *((768, 224, 1152), (768, 336, 1152)),
    ]
    assert method.train_view().shares == SHARES
    flops = [kind.train_flops() for kind in kinds]
    assert method.train_flops() == pytest.approx(np.dot(flops, SHARES))
    assert max(flops) == flops[-1] == dataclasses.replace(method, crop_sizes=None).train_flops()
    assert configs.total_steps(config) == 1_230_000 and config.global_batch == 2048
    assert configs.learning_rate(config) == pytest.approx(4 * 1.25e-5 * 2**0.5)
    due = [int(method.gram.due(step, 2048)) for step in (1_199_999, 1_200_000, 1_200_001)]
    assert due == [0, 1, 0]
    assert all(x.crop_sizes is None and x.encoder == method.encoder for x in kinds)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("crop_sizes.shares=(0.5,)", "must be equally many"),
        ("crop_sizes.shares=(0.5, 0.0)", "must be positive"),
        ("crop_sizes.global_size=(16, 20)", "does not divide into patches"),
        ("crop_sizes.gram_size=()", "crop_sizes.gram_size: of a run with method.gram"),
        ("crop_sizes.gram_size=(8, 48)", "smaller than view.global_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    spec, overrides = CASES["dinov3_high_res"]
    with pytest.raises(configs.ConfigError, match=said):
        methods.create(configs.load(spec, [*NETWORK, *overrides, f"method.{wrong}"]))


def test_a_step_is_found_by_the_shapes_of_its_batch_and_replayed_with_its_sizes(tmp_path):
    method = methods.create(load("dinov3_high_res"))
    specs = [kind.batch_spec(8) for kind in method.kinds]
    step = by_shapes([(spec, lambda *_, i=i: i) for i, spec in enumerate(specs)])
    assert [step(None, spec, None) for spec in specs] == [0, 1]
    arrays = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in specs[1].items()}
    np.savez(tmp_path / "batch-00000.npz", rows=np.arange(1), **arrays)
    assert replay._kind_of(method, tmp_path) == method.kinds[1]


@pytest.mark.slow
def test_the_stage_goes_on_from_the_gram_stage_and_resumes_bit_by_bit(tmp_path):
    gram, whole, again = (tmp_path / name for name in ("gram", "whole", "again"))
    none = ("model.size", "method.view.image_size", "method.decoder.width", "method.decoder.heads")

    def train(workdir, stage, *overrides):
        name = {"gram": "dinov3_gram", "high_res": "dinov3_high_res"}[stage]
        given = [x.split("=", 1) for x in (*NETWORK, *CASES[name][1], *overrides)]
        given = dict.fromkeys(none) | dict(given) | {"global_batch": 8, "optim.lr_scaling": "sqrt"}
        return runner.train(workdir, given, spec=f"configs/dinov3.py:size=tiny,stage={stage}")

    ended = train(gram, "gram", "total_steps=2")
    assert ended.code == 0, ended.output
    more = (f"continue_from={gram}", "total_steps=8", "method.gram.refresh_images=16")
    more += ("checkpoint.every_steps=4", "checkpoint.keep_last=9")
    ended = train(whole, "high_res", *more)
    assert ended.code == 0, ended.output
    assert "compiling the step for 2 sizes of crops" in ended.output
    turns = methods.create(load("dinov3_high_res")).train_view()
    assert {turns.number(0, step) for step in range(2, 8)} == {0, 1}  # both were trained on
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "8")
    ended = train(again, "high_res", *more)
    assert "resuming at step 4 of 8" in ended.output, ended.output
    assert runner.losses(whole) == runner.losses(again)
    assert set(runner.losses(whole)) == set(range(3, 9))
    assert np.isfinite(list(runner.losses(whole).values())).all()
