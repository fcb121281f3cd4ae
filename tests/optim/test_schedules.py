import pathlib

import jax
import numpy as np
import pytest

from webssl_jax.optim import schedules

GOLDEN = pathlib.Path(__file__).parent / "golden"
STEPS = np.arange(105)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("lr", dict(base=1e-3, final=1e-6, total_steps=100, warmup_steps=10)),
        ("wd", dict(base=0.04, final=0.4, total_steps=100)),
        ("momentum", dict(base=0.992, final=1.0, total_steps=100)),
        ("teacher_temp", dict(base=0.07, final=0.07, total_steps=30, warmup_steps=30, start=0.04)),
        ("warmup1", dict(base=1e-3, final=0.0, total_steps=20, warmup_steps=1, start=5e-4)),
    ],
)
def test_warmup_cosine_equals_dinov2s_scheduler(name, arguments):
    """Golden arrays are float64, ours float32: 1e-6 relative to the peak."""
    golden = np.load(GOLDEN / "g_schedules.npz")[name]
    schedule = schedules.warmup_cosine(**arguments, reach_base_in_warmup=True)
    ours = jax.vmap(schedule)(np.arange(len(golden)))
    np.testing.assert_allclose(ours, golden, atol=1e-6 * golden.max())


def test_warmup_cosine_equals_maes_schedule():
    """MAE counts fractional epochs: 20 epochs of 4 steps, 5 of them warm-up."""
    golden = np.load(GOLDEN / "g_mae_schedule.npz")
    schedule = schedules.warmup_cosine(1e-3, 1e-5, total_steps=80, warmup_steps=20)
    np.testing.assert_allclose(jax.vmap(schedule)(golden["epoch"] * 4), golden["lr"], atol=1e-9)


def test_a_schedule_keeps_its_final_value():
    schedule = schedules.warmup_cosine(1.0, 0.25, total_steps=10)
    assert float(schedule(10)) == float(schedule(1000)) == 0.25


def test_a_constant_rate_knows_no_end_until_its_cooldown():
    """Counted by hand: warm-up 0, 1/2, then 1, and over the last 4 of 10 steps linear to 0.2."""
    short = schedules.warmup_constant(1.0, 0.2, total_steps=10, warmup_steps=2, cooldown_steps=4)
    values = [float(short(step)) for step in range(12)]
    wanted = [0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    endless = schedules.warmup_constant(1.0, 0.2, total_steps=10, warmup_steps=2)
    longer = schedules.warmup_constant(1.0, 0.2, total_steps=99, warmup_steps=2, cooldown_steps=9)
    for schedule in (endless, longer):
        assert [float(schedule(step)) for step in range(7)] == values[:7]
        assert float(schedule(50)) == 1.0
