"""Effective rank is what its formula says, on any number of devices; every method's vital signs fit
the figures that it logs; and real micro runs, healthy and collapsed, are told apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax.methods.base import Variables
from webssl_jax.methods.dino.method import DINO, View
from webssl_jax.methods.vitals import effective_rank, most_rank
from webssl_jax.models import sizes
from webssl_jax.models.heads import HeadConfig
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.alarms import AlarmMonitor


def by_singular_values(features):
    """RankMe in float64."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    p = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p /= p.sum()
    return np.exp(-(p * np.log(p)).sum())


def spread(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, width)) * rng.random(width) ** 3).astype(np.float32) + 0.1


@pytest.mark.parametrize("rows, width, taken", [(24, 64, 24), (64, 24, 64), (600, 16, 200)])
def test_effective_rank_is_that_of_numpy(rows, width, taken):
    """Of 600 rows every third is looked at."""
    features = spread(rows, width)
    expected = by_singular_values(features[:: rows // taken])
    assert float(jax.jit(effective_rank)(features)) == pytest.approx(expected, rel=1e-3)
    assert most_rank(rows, width) == min(taken, width)


def test_effective_rank_counts_directions():
    assert float(effective_rank(jnp.eye(8))) == pytest.approx(8, rel=1e-5)
    assert float(effective_rank(jnp.eye(8)[jnp.arange(64) % 2])) == pytest.approx(2, rel=1e-5)
    noise = 1 + 2**-9 * np.random.default_rng(0).uniform(-1, 1, (256, 512))  # bfloat16's rounding
    assert 1 <= float(effective_rank(np.linspace(-1, 1, 512) * noise)) < 1.3


def test_effective_rank_does_not_depend_on_the_devices():
    """float32; only the order of sums differs."""
    features = spread(512, 48)
    alone = float(jax.jit(effective_rank)(features))
    for shape in ((1, 8, 1), (2, 2, 2)):
        mesh = meshes.create(ConfigDict(dict(zip(meshes.AXES, shape))))
        shared = meshes.to_global({"x": features}, mesh)["x"]
        assert float(jax.jit(effective_rank)(shared)) == pytest.approx(alone, rel=1e-4)


# Real runs of one block and one compiled step. Crops of an image share a colour, so that images are
# easily told apart.

BATCH, STEPS, WARMUP = 16, 60, 20
MICRO = DINO(
    encoder=sizes.web_dino("micro", depth=1, layer_scale=1.0),
    dino_head=HeadConfig(prototypes=32, bottleneck=16, hidden=32),
    ibot_head=HeadConfig(prototypes=32, bottleneck=16, hidden=32),
    group_images=16,
    view=View(global_size=16, local_size=8, local_count=2),
    centering="softmax",
    koleo_weight=0.0,
)


def crops(seed):
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (BATCH, 1, 1, 1, 3))
    return {
        name: np.clip(colours + rng.integers(-20, 20, spec.shape), 0, 255).astype(np.uint8)
        for name, spec in MICRO.batch_spec(BATCH).items()
    }


@pytest.fixture(scope="module")
def train():
    """train(temperature, centred) -> the rows that such a run would log."""
    optimizer = optax.adam(optax.linear_schedule(0.0, 2e-3, WARMUP))

    @jax.jit
    def step(variables, moments, batch, rng, values):
        def loss(params):
            out = MICRO.loss(params, variables.teacher, variables.aux, batch, rng, values)
            return out.loss, out

        grads, out = jax.grad(loss, has_aux=True)(variables.params)
        updates, moments = optimizer.update(grads, moments)
        params = optax.apply_updates(variables.params, updates)
        teacher = MICRO.update_teacher(variables.teacher, params, values)
        return Variables(params, teacher, out.aux), moments, out.terms | out.report

    def train(temperature, centred):
        variables = jax.jit(lambda: MICRO.init(jax.random.key(0), {}))()
        fresh, moments, rows = variables.aux, optimizer.init(variables.params), []
        values = {"teacher_temperature": temperature, "momentum": 0.9}
        for k in range(1, STEPS + 1):
            rng = jax.random.key(k)
            variables, moments, report = step(variables, moments, crops(k), rng, values)
            if not centred:
                variables = variables._replace(aux=fresh)
            rows.append({"step": k} | {f"train/{name}": float(x) for name, x in report.items()})
        return rows

    return train


def watched(rows):
    alarms = AlarmMonitor(MICRO.vitals(BATCH), WARMUP)
    alarms.update_all(rows)
    return alarms.episodes


def test_a_healthy_run_raises_no_alarm(train):
    rows = train(temperature=0.1, centred=True)
    assert watched(rows) == []
    assert rows[-1]["train/effective_rank"] > 2 and rows[-1]["train/prototypes_used"] > 3


@pytest.mark.parametrize(
    "temperature, centred, name, limit",
    [
        (0.04, False, "the same few prototypes", "teacher_entropy"),
        (0.3, True, "no preference", "student_entropy"),
    ],
    ids=["without centering", "without sharpening"],
)
def test_both_collapses_raise_their_alarm_once(train, temperature, centred, name, limit):
    """The two of Caron et al., arXiv 2104.14294, figure 7."""
    (episode,) = watched(train(temperature, centred))
    assert episode.alarm.name.startswith(name) and episode.end is None
    assert episode.message.startswith(f"step {episode.start}: ALARM") and limit in episode.message
    assert "teacher_temperature" in episode.message and "docs/health.md" in episode.message


@pytest.mark.parametrize("spec", ["configs/web_dino.py:size=tiny", "configs/web_mae.py:size=tiny"])
@pytest.mark.parametrize("override", ["seed=0", "method.centering=softmax"])
def test_signs_are_figures_that_the_method_logs(spec, override):
    """By their names; and every limit stands on a sign with a scale."""
    if "mae" in spec and "centering" in override:
        override = "method.norm_pix_loss=false"
    config = configs.load(spec, [override, "global_batch=16"])
    method = methods.create(config)
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in method.batch_spec(16).items()} | {
        "position": jnp.arange(16)
    }
    values = {"teacher_temperature": 0.05}
    out = jax.eval_shape(
        lambda: method.loss(
            *method.init(jax.random.key(0), batch), batch, jax.random.key(0), values
        )
    )
    logged = {f"train/{name}" for name in out.terms | out.report}
    vitals = method.vitals(16)
    scales = {sign.metric: sign.most for sign in vitals.signs}
    assert set(scales) <= logged
    for alarm in vitals.alarms:
        assert all(scales[limit.metric] for limit in alarm.limits)


def test_a_loss_that_is_turned_off_is_no_sign():
    signs = dataclasses.replace(MICRO, ibot_weight=0.0).vitals(BATCH).signs
    assert not any("ibot" in sign.metric and "centre" not in sign.metric for sign in signs)
