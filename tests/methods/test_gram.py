"""DINOv3's Gram stage: the loss, the twins of the crops, when the Gram teacher changes, and a stage
that goes on with a run's whole state."""

import io
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.weights import samples
from webssl_jax import checkpoints, methods, train_state
from webssl_jax import config as configs
from webssl_jax.checkpoints.saver import Saver
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.data.photometric import Distortion
from webssl_jax.methods.dino.gram import Gram, gram_loss
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.networks import Networks

from .test_every_method import BATCH, CASES, NETWORK

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "gram_own.npz")


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    student, teacher = GOLDEN["student"], GOLDEN["teacher_4x4"]
    loss, gradient = jax.value_and_grad(lambda x: gram_loss(x, teacher, (3, 3), (4, 4)))(student)
    np.testing.assert_allclose(loss, 0.11880456656217575, rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN["grad"], atol=1e-6)
    same = gram_loss(student, GOLDEN["teacher_3x3"], (3, 3), (3, 3))
    np.testing.assert_allclose(same, loss, rtol=1e-5)  # resized before it is normalised


def test_the_gram_teacher_changes_when_it_is_due_and_so_many_times():
    gram = Gram(refresh_images=80, refresh_every_images=24, refreshes=3)
    due = [int(gram.due(jnp.int32(step), 8)) for step in range(30)]
    assert [step for step, now in enumerate(due) if now] == [10, 13, 16]
    assert not any(int(Gram().due(jnp.int32(step), 8)) for step in range(5))


def test_gram_crops_are_the_global_crops_before_distortion_and_larger():
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    none = dict(blur=(0.0,) * 3, solarize=(0.0,) * 3, flip=1.0)
    plain = MultiCropView(16, 8, 2, distortion=Distortion(jitter=0.0, grayscale=0.0), **none)
    views = {
        size: MultiCropView(**{**vars(plain), "gram_size": size})(
            stream.getvalue(), np.random.default_rng(3)
        )
        for size in (0, 32)
    }
    assert set(views[0]) == {"global_crops", "local_crops"}
    large = views[32]["gram_crops"]
    assert large.shape == (2, 32, 32, 3)
    for twin, crop in zip(large, views[32]["global_crops"]):
        made = Image.fromarray(twin).resize((16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(made), crop)
    gap = np.abs(views[32]["global_crops"].astype(int) - views[0]["global_crops"])
    assert gap.mean() < 12  # of the same boxes and flips, resized once more


def make(stage, *overrides):
    spec, tinier = CASES["dinov3_gram" if stage == "gram" else "dinov3"]
    steps = [f"global_batch={BATCH}", "total_steps=4", "optim.warmup_steps=0"]
    config = configs.load(spec, [*NETWORK, *steps, *tinier, *overrides])
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": 2, "tensor": 1}), jax.devices()[:2])
    return config, (method, optimizer, 0, BATCH, mesh)


def restored(workdir, config, arguments):
    method, optimizer, *_, mesh = arguments
    workdir.mkdir()
    saver = Saver(config, workdir, train_state.abstract(*arguments))
    try:
        return saver.restore(method, optimizer, mesh)
    finally:
        saver.close()


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(workdir, state) of a run of stage 1 at step 3, with moments."""
    workdir = tmp_path_factory.mktemp("stage1")
    config, arguments = make("1")
    (workdir / "config.json").write_text(json.dumps(configs.resolved(config)))
    state = train_state.create(*arguments)
    state = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state)
    state = state._replace(step=jnp.full((), 3, jnp.int32))
    checkpointer = checkpoints.Checkpointer(workdir)
    checkpointer.save(state)
    checkpointer.close()
    return str(workdir), state


def test_a_stage_that_no_run_comes_before_says_so(monkeypatch, caplog):
    monkeypatch.setattr(train_state, "create", lambda *_: None)
    for stage in ("1", "gram"):
        config, (method, *_) = make(stage)
        assert not caplog.text  # nor of stage 1
        Saver._begin(types.SimpleNamespace(_config=config), method, None, None)
    assert "a later stage of dino begins from scratch" in caplog.text


def test_a_stage_goes_on_with_step_moments_and_teacher_of_another_run(stage1, tmp_path):
    workdir, before = stage1
    networks = Networks(make("1")[1][0].encoder)
    weights = samples.make_params(networks)
    file = samples.write("hf-dinov3", tmp_path, networks, weights)
    config, arguments = make("gram", f"continue_from={workdir}", f"method.gram.teacher={file}")
    state = restored(tmp_path / "own", config, arguments)
    for name in ("step", "params", "teacher", "opt_state"):
        wanted, found = getattr(before, name), getattr(state, name)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    jax.tree.map(np.testing.assert_array_equal, state.aux["gram"], weights["encoder"])
    assert int(state.aux["gram_steps"]) == 0


def test_without_weights_the_first_teacher_of_the_stage_is_the_gram_teacher(stage1, tmp_path):
    config, arguments = make("gram", f"continue_from={stage1[0]}")
    state, method = restored(tmp_path / "own", config, arguments), arguments[0]
    grid = method.encoder.grid_of(16, 16)
    patches = jnp.ones((2, grid[0] * grid[1], method.encoder.width))
    batch = {"gram_crops": np.zeros((1, 2, 32, 32, 3), np.uint8)}

    @jax.jit
    def next_aux(aux, teacher, due):
        values = {"gram_refresh": due}
        return method._gram(method.gram, aux, teacher, batch, patches, values)[0]

    aux = next_aux(state.aux, state.teacher, 0.0)
    jax.tree.map(np.testing.assert_array_equal, aux["gram"], state.teacher["encoder"])
    later = jax.tree.map(lambda x: 2 * x, state.teacher)
    kept = next_aux(aux, later, 0.0)
    jax.tree.map(np.testing.assert_array_equal, kept["gram"], aux["gram"])
    new = next_aux(kept, later, 1.0)
    jax.tree.map(np.testing.assert_array_equal, new["gram"], later["encoder"])


def test_weights_of_another_encoder_and_two_beginnings_are_refused(stage1, tmp_path):
    config, arguments = make("gram", f"method.gram.teacher={stage1[0]}", "model.depth=1")
    with pytest.raises(UserError, match="its encoder is not the one of aux/gram: .*of another"):
        restored(tmp_path / "own", config, arguments)
    with pytest.raises(ConfigError, match="the only one of resume_from"):
        make("gram", f"continue_from={stage1[0]}", f"init_from={stage1[0]}")
