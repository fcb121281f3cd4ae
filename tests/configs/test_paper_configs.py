"""The configs of the Web-DINO and DINOv2 runs at full size, abstractly: what they hold, how many
bytes, that the whole train step lowers and, with two blocks, compiles, and the schedules of high
resolution. Nothing is allocated."""

import math
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax import params as paths
from webssl_jax.config import ConfigError
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.train_step import lower_train_step, run_schedules
from webssl_jax.weights.networks import Networks, template_of

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
# {config: (encoder parameters (recipes.md 1.1), width, head bottlenecks, prototypes)}
PAPER = {
    "web_dino.py:size=300m": (303_655_168, 1024, (384, 256), 131_072),
    "web_dino.py:size=1b": (1_134_771_200, 1536, (384, 256), 131_072),
    "web_dino.py:size=2b": (2_084_237_568, 2688, (384, 256), 131_072),
    "web_dino.py:size=3b": (2_948_317_184, 3072, (384, 256), 131_072),
    "web_dino.py:size=5b": (4_938_338_816, 3584, (384, 256), 131_072),
    "web_dino.py:size=7b": (6_450_170_880, 4096, (384, 256), 131_072),
    "web_dino.py:size=7b,res=378": (6_452_108_288, 4096, (384, 256), 131_072),
    "web_dino.py:size=7b,res=518": (6_454_729_728, 4096, (384, 256), 131_072),
    "dinov2.py:recipe=vitl14": (303_655_168, 1024, (384, 256), 131_072),
    "dinov2.py:recipe=vitg14": (1_134_771_200, 1536, (384, 256), 131_072),
    # ViT-L/16: 24 blocks of GELU MLPs, 197 positions, a mask token
    "dinov2.py:recipe=vitl16_short": (303_351_808, 1024, (256,), 65_536),
}


def load(spec, *overrides):
    config = configs.load(str(CONFIGS / spec), overrides)
    method = methods.create(config)
    return config, method, Optimizer.from_config(config.optim, method.tables())


def head_parameters(width, bottleneck, prototypes):
    mlp = (width + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * bottleneck
    return mlp + bottleneck * prototypes + prototypes


@pytest.mark.parametrize("spec", PAPER)
def test_a_paper_config_has_its_parameters_and_sixteen_bytes_for_each(spec):
    encoder, width, bottlenecks, prototypes = PAPER[spec]
    config, method, optimizer = load(spec)
    mesh = AbstractMesh((1, 64, 1), meshes.AXES)
    state = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    assert paths.count(state.params["encoder"]) == encoder
    heads = [head_parameters(width, bottleneck, prototypes) for bottleneck in bottlenecks]
    names = ["dino_head", "ibot_head"][: len(heads)]
    assert [paths.count(state.params[name]) for name in names] == heads
    assert set(state.params) == {"encoder", *names}
    total = encoder + sum(heads)
    # parameters, teacher, two moments; centres and counters are small
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert 16 * total <= whole < 16 * total + 2**20
    rules.check(state.params, mesh, config.sharding.max_unsharded_fraction)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    assert held == pytest.approx(whole / 64, rel=0.05)  # odd widths of biases stay whole


@pytest.mark.parametrize(
    ("size", "millions"),  # of the model cards
    [("s", 21.6), ("splus", 28.7), ("b", 85.7), ("l", 303.1), ("hplus", 840.6), ("7b", 6716)],
)
def test_an_encoder_of_dinov3_has_its_published_parameters(size, millions):
    networks = Networks.of(methods.create(configs.load(f"dinov3:size={size}", [])))
    encoder = paths.count(template_of(networks)["encoder"])
    assert encoder == pytest.approx(millions * 1e6, rel=2e-3)


def test_the_docstring_says_these_bytes():
    text = (CONFIGS / "web_dino.py").read_text()
    for size in ("300m", "1b", "2b", "3b", "5b", "7b"):
        encoder, width, bottlenecks, prototypes = PAPER[f"web_dino.py:size={size}"]
        total = encoder + sum(head_parameters(width, b, prototypes) for b in bottlenecks)
        row = next(row for row in text.splitlines() if row.startswith(f"  {size} "))
        assert float(row.split()[1]) == pytest.approx(16 * total / 2**30, abs=0.006)


def lowered(spec, *overrides):
    """(the abstract state, the train step lowered for it), on eight devices."""
    config, method, optimizer = load(spec, *overrides)
    mesh = meshes.create(config.sharding)
    state = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    return state, lower_train_step(config, method, optimizer, state, mesh)


# One of every graph; the others differ in widths alone.
FAST = ("size=1b", "size=7b,res=518", "short")


@pytest.mark.parametrize(
    "spec",
    [spec if spec.endswith(FAST) else pytest.param(spec, marks=pytest.mark.slow) for spec in PAPER],
)
def test_the_whole_train_step_of_a_paper_config_lowers_at_full_size(spec):
    state, step = lowered(spec, "method.stream_prototypes=8192")
    after, metrics, _ = step.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["train/loss"].shape == () and "train/prototypes_used" in metrics


@pytest.mark.slow
@pytest.mark.parametrize("spec", PAPER)
def test_two_blocks_of_a_paper_config_compile_with_all_parameters_cut(spec):
    """At full width and resolution; what a device is handed is an eighth of the state and of the
    batch."""
    heads = ("dino_head", "ibot_head")[: len(PAPER[spec][2])]
    few = [f"method.{head}.prototypes=1024" for head in heads]
    state, step = lowered(spec, "model.depth=2", "global_batch=16", "method.group_images=8", *few)
    # the code itself is never run: what is compiled is how it is spread over devices
    compiled = step.compile(compiler_options={"xla_backend_optimization_level": 0})
    leaves = jax.tree.leaves(state)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    assert held == pytest.approx(whole / 8, rel=0.01)
    held += sum(math.prod(x.shape) // 8 for x in jax.tree.leaves(step.args_info[0][1]))  # uint8
    assert held <= compiled.memory_analysis().argument_size_in_bytes < held + 2**20
    cut = jax.tree.map(
        lambda found, x: found.is_equivalent_to(x.sharding, len(x.shape)),
        compiled.output_shardings[0],
        state,
    )
    assert jax.tree.all(cut)


def test_the_8_billion_image_run_is_four_times_as_long():
    config = configs.load(str(CONFIGS / "web_dino.py:size=7b,images=8e9"))
    assert configs.total_steps(config) == 2_604_166
    assert configs.steps(config.optim, "warmup", config) == 100_000


def test_the_control_is_300_epochs_of_imagenet_with_warm_ups_in_proportion():
    config = configs.load(str(CONFIGS / "web_dino.py:size=1b,data=imagenet"))
    assert config.total_images == 300 * 1_281_167
    assert configs.total_steps(config) == 125_113
    assert configs.steps(config.optim, "warmup", config) == round(0.16 * 125_113)
    assert configs.learning_rate(config) == 3.5e-4


# {step: (rate, weight decay, momentum, teacher temperature)} of facebookresearch/dinov2's own
# CosineScheduler with rate 1.41e-5 to 1e-6 and 16% warm-up, and 6% of the temperature.
LONG = {
    0: (0.0, 0.04, 0.994, 0.04),
    1: (4.407627384e-09, 0.04000000099, 0.994, 0.04002502085),
    1199: (5.284745233e-06, 0.04141466621, 0.99405305, 0.07),
    1200: (5.28915286e-06, 0.04141701994, 0.9940531382, 0.07),
    3199: (1.41e-05, 0.04988941257, 0.994370853, 0.07),
    3200: (1.41e-05, 0.0498954656, 0.99437108, 0.07),
    10000: (9.480646392e-06, 0.12, 0.997, 0.07),
    19999: (1.000000115e-06, 0.199999999, 1.0, 0.07),
    20000: (1e-06, 0.2, 1.0, 0.07),
}
SHORT = {
    1: (8.818011257e-09, 0.04000000395, 0.9940000001, 0.04005008347),
    600: (5.290806754e-06, 0.04141701994, 0.9940531382, 0.07),
    1599: (1.41e-05, 0.04988336127, 0.994370626, 0.07),
    5000: (9.480646392e-06, 0.12, 0.997, 0.07),
    10000: (1e-06, 0.2, 1.0, 0.07),
}


@pytest.mark.parametrize(
    "arguments, rows, frozen",
    [("res=378", LONG, 40), ("res=518", LONG, 40), ("res=518,images=20_480_000", SHORT, 20)],
)
def test_high_resolution_runs_the_original_s_schedules_compressed(arguments, rows, frozen):
    config, method, _ = load(f"web_dino.py:size=7b,{arguments}")
    assert configs.total_steps(config) == max(rows) and config.global_batch == 2048
    made = run_schedules(config, method)
    names = ("learning_rate", "weight_decay", "momentum", "teacher_temperature")
    for step, wanted in rows.items():
        ours = [float(made[name](step)) for name in names]
        np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-12)
    edges = [float(made["last_layer_rate"](step)) for step in (0, frozen - 1, frozen)]
    assert edges == [0, 0, 1]


def test_the_short_recipe_is_that_of_its_file():
    """dinov2/configs/train/vitl16_short.yaml over ssl_default_config.yaml, 32 GPUs x 64 images."""
    config, method, _ = load("dinov2.py:recipe=vitl16_short")
    assert configs.total_steps(config) == 125_000
    assert configs.learning_rate(config) == pytest.approx(4e-3 * 2**0.5)
    assert configs.weight_decays(config) == (0.04, 0.4)
    assert (method.encoder.patch_size, method.encoder.mlp, method.encoder.hidden) == (
        16,
        "gelu",
        4096,
    )
    assert (method.centering, method.layer_decay, method.momentum) == ("softmax", 0.9, 0.992)
    assert method.ibot_head is None and method.view.local_size == 96


@pytest.mark.parametrize(
    "spec, says",
    [
        ("web_dino.py:res=384", "config argument res=384: did you mean"),
        ("web_dino.py:data=imagnet", "did you mean 'imagenet'"),
        ("web_dino.py:size=tiny,res=518", "has no data or res"),
        ("dinov2.py:recipe=vitl16", "did you mean"),
    ],
)
def test_an_argument_that_is_no_run_of_the_paper_is_refused(spec, says):
    with pytest.raises(ConfigError, match=says):
        configs.load(str(CONFIGS / spec))
