"""CLIP configs at full size, abstractly: parameters, sharding, lengths; nothing allocated."""

import pathlib

import pytest
from jax.sharding import AbstractMesh

from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax import params as paths
from webssl_jax.config import ConfigError
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.train_step import run_schedules

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
# {size: parameters with the scale}, open_clip's models (recipes.md 1.3) and the paper's shapes with
# the text tower of bigG/14
PARAMETERS = {
    "b32": 151_277_313,
    "b16": 149_620_737,
    "l14": 427_616_513,
    "h14": 986_109_441,
    "g14": 1_366_678_273,
    "bigg14": 2_539_567_105,
    "1b": 1_136_532_480 + 694_659_840 + 1,
    "2b": 2_087_463_168 + 694_659_840 + 1,
    "3b": 2_951_983_104 + 694_659_840 + 1,
    "5b": 4_941_626_368 + 694_659_840 + 1,
    "7b": 6_452_879_360 + 694_659_840 + 1,
}


SIGLIP = {  # recipes' sizes with CLIP's 49,408 ids instead of 32,000; parity/test_siglip.py
    "siglip_b16": 203_155_970 + 17_408 * 768,
    "siglip_l16": 652_089_346 + 17_408 * 1024,
    "siglip_so400m": 877_415_602 + 17_408 * 1152,
}


def load(spec):
    config = configs.load(str(CONFIGS / spec))
    method = methods.create(config)
    return config, method, Optimizer.from_config(config.optim, method.tables())


@pytest.mark.parametrize("size", PARAMETERS | SIGLIP)
def test_a_size_has_its_parameters_and_they_are_cut_over_chips(size):
    config, method, optimizer = load(f"clip.py:size={size}")
    mesh = AbstractMesh((1, 64, 1), meshes.AXES)
    state = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    assert paths.count(state.params) == (PARAMETERS | SIGLIP)[size]
    optimizer.check(state.params)
    rules.check(state.params, mesh, config.sharding.max_unsharded_fraction)


def test_siglips_towers_have_its_loss_its_colours_and_its_decay_and_any_resolution():
    config, method, optimizer = load("clip.py:size=siglip_b16,res=256")
    assert (method.contrast, method.start, method.mean) == ("sigmoid", (10.0, -10.0), (0.5,) * 3)
    assert (method.encoder.grid, method.text.context, method.padding) == ((16, 16), 64, 49_407)
    assert configs.total_steps(config) == 1_220_703 and config.name == "siglip_b16"
    rates = run_schedules(config, method)["learning_rate"]
    assert [float(rates(step)) for step in (0, 20_000)] == pytest.approx([0, 1e-3])
    decay = method.tables().decay
    assert [paths.lookup(decay, p) for p in ("a/q/kernel", "text/token_embed", "logit_bias")] == [
        1.0,
        0.0,
        0.0,
    ]
    assert load("clip.py:size=siglip_so400m,loss=softmax")[0].name == "siglip_so400m_softmax"


def test_the_sigmoid_adds_a_bias_and_its_own_start_and_nothing_else():
    softmax, method, _ = load("clip.py:size=b16")
    sigmoid, other, _ = load("clip.py:size=b16,loss=sigmoid")
    assert (method.start, other.start) == ((1 / 0.07, None), (10.0, -10.0))
    sigmoid.method.contrast, sigmoid.name = "softmax", softmax.name
    assert sigmoid == softmax


@pytest.mark.parametrize(
    "spec, steps, peak",
    [
        ("clip.py:size=1b", 61_035, 4e-4),
        ("clip.py:size=7b,images=8_000_000_000", 244_140, 4e-4),
        ("clip.py:size=l14", 390_625, 4e-4),
        ("clip.py:size=b32", 390_625, 5e-4),
    ],
)
def test_length_and_rate_are_those_of_the_recipe(spec, steps, peak):
    config, method, _ = load(spec)
    assert configs.total_steps(config) == steps and config.global_batch == 32_768
    made = run_schedules(config, method)
    rates = [float(made["learning_rate"](step)) for step in (0, 1000, 2000, steps)]
    assert rates == pytest.approx([0, peak / 2, peak, 0])
    assert float(made["weight_decay"](steps)) == pytest.approx(0.2)
    assert (config.optim.b2, config.optim.eps, config.optim.clip) == (0.98, 1e-6, "none")


@pytest.mark.parametrize(
    "spec, says", [("clip.py:loss=sigmod", "did you mean 'sigmoid'"), ("clip.py:size=8b", "8b")]
)
def test_an_argument_that_is_no_run_is_refused(spec, says):
    with pytest.raises(ConfigError, match=says):
        load(spec)
