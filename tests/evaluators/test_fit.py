"""The trainer of heads: its optimisers beside torch's, its state after a kill, and that a head
depends on nothing but its own learning rate, decay and batches."""

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.evaluators.small_models import coloured, items_of, mesh_of, shard, small_mae
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.mixture import shuffled
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators.batches import Cached, Images
from webssl_jax.evaluators.fit import Grid, Recipe, fit, program
from webssl_jax.evaluators.probes import heads
from webssl_jax.models.features import Want
from webssl_jax.optim.schedules import warmup_cosine
from webssl_jax.sharding import mesh as meshes

BATCH, WIDTH, CLASSES, STEPS = 16, 6, 3, 7
RATES, DECAYS = (0.5, 0.05), (0.0, 0.1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """It counts its steps among the statistics."""

    def init(self, rng, features):
        kernel = jax.random.normal(rng, (features.shape[-1], CLASSES))
        return {"kernel": kernel, "bias": jnp.full(CLASSES, 0.3)}, {"seen": jnp.zeros(())}

    def apply(self, params, stats, features, train):
        return features @ params["kernel"] + params["bias"], {"seen": stats["seen"] + train}


def loss(logits, batch):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, batch["label"][:, None], axis=1).mean()


def grid_of(rates=RATES, decays=DECAYS, **more):
    return Grid(Linear(), lambda features: features["x"], loss, rates, decays, **more)


def cached(devices=1, rows=40):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    labels = rng.integers(0, CLASSES, rows).astype(np.int32)
    return Cached({"x": features}, {"label": labels}, mesh_of(devices), BATCH, seed=3)


def test_batch_k_of_kept_features_is_a_function_of_k_and_an_epoch_has_each_row_once():
    """40 rows in batches of 16: five batches are two epochs."""

    def rows_of(data, start, count):
        of = {row.tobytes(): i for i, row in enumerate(data.features["x"])}
        with contextlib.closing(data.start(start)) as batches:
            made = [next(batches)[0] for _ in range(count)]
        for features, batch in made:
            labels = [data.targets["label"][of[x.tobytes()]] for x in np.asarray(features["x"])]
            assert labels == np.asarray(batch["label"]).tolist()
        return [of[x.tobytes()] for features, _ in made for x in np.asarray(features["x"])]

    rows = rows_of(cached(), 0, 10)
    epochs = [tuple(rows[i : i + 40]) for i in range(0, 160, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and len(set(epochs)) == 4
    assert rows_of(cached(8), 7, 3) == rows[7 * BATCH :]
    assert rows_of(dataclasses.replace(cached(), seed=4), 0, 1) != rows[:BATCH]


def recipe_of(**more):
    return Recipe(**{"steps": STEPS, "schedule": warmup_cosine(1.0, 0.0, STEPS, 2)} | more)


def lars(module, rate, decay):
    """MoCo v3's, without decay: matrices by their trust ratio, vectors as they are."""

    @torch.no_grad()
    def step(moments, lr):
        for name, p in module.named_parameters():
            g = p.grad
            if p.ndim > 1:
                g = g + decay * p
                g = g * (0.001 * p.norm() / g.norm())
            moments[name] = 0.9 * moments.get(name, 0) + g
            p -= lr * moments[name]

    moments = {}
    return lambda lr: step(moments, lr)


def by_torch(optimizer, start, rate, decay, data, decay_biases=True):
    """(kernel, bias) of one head after all steps."""
    module = torch.nn.Linear(len(start["kernel"]), CLASSES)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(start["kernel"]).T)
        module.bias.copy_(torch.tensor(start["bias"]))
    bias_decay = decay if decay_biases else 0
    groups = [{"params": module.weight}, {"params": module.bias, "weight_decay": bias_decay}]
    made = {
        "sgd": lambda: torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(groups, rate, (0.9, 0.95), weight_decay=decay),
        "lars": lambda: lars(module, rate, decay),
    }[optimizer]()
    schedule = warmup_cosine(1.0, 0.0, STEPS, 2)
    with contextlib.closing(data.start(0)) as batches:
        for step in range(STEPS):
            ((features, batch),) = next(batches)
            module.zero_grad()
            logits = module(torch.tensor(np.asarray(features["x"])))
            labels = torch.tensor(np.asarray(batch["label"])).long()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            lr = rate * float(schedule(step))
            if optimizer == "lars":
                made(lr)
                continue
            for group in made.param_groups:
                group["lr"] = lr
            made.step()
    return module.weight.detach().numpy().T, module.bias.detach().numpy()


def start_of(width):
    """What a grid's heads start from."""
    start, _ = Linear().init(jax.random.fold_in(jax.random.key(0), 0), np.zeros((1, width)))
    return jax.tree.map(np.asarray, start)


def assert_by_torch(fitted, optimizer, data, width, **more):
    for number, (rate, decay) in enumerate(grid_of().pairs):
        params, stats = fitted.head("it", number)
        wanted = by_torch(optimizer, start_of(width), rate, decay, data, **more)
        np.testing.assert_allclose(params["kernel"], wanted[0], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(params["bias"], wanted[1], atol=1e-5, rtol=1e-5)
        assert stats["seen"] == STEPS


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Four heads by SGD."""
    return fit({"it": grid_of()}, cached(), recipe_of(), tmp_path_factory.mktemp("plain"))


def test_every_head_of_a_grid_is_what_torch_s_sgd_gives_alone(plain):
    assert len(grid_of().pairs) == 4
    assert_by_torch(plain, "sgd", cached(), WIDTH)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_adamw_and_lars_are_torch_s_and_mae_s(optimizer, tmp_path):
    free = optimizer == "adamw"  # biases without decay, as CAPI's probe has them
    recipe = recipe_of(optimizer=optimizer, b2=0.95, decay_biases=not free)
    fitted = fit({"it": grid_of()}, cached(), recipe, tmp_path)
    assert_by_torch(fitted, optimizer, cached(), WIDTH, decay_biases=not free)


class Killed(Exception):
    """Stands for a kill."""


@dataclasses.dataclass(frozen=True)
class Watched:
    """Other batches, with their numbers written down; ``kill`` ends them."""

    data: Cached
    seen: list
    kill: int | None = None

    mesh = property(lambda self: self.data.mesh)

    def start(self, step):
        with contextlib.closing(self.data.start(step)) as batches:
            while step != self.kill:
                yield next(batches)
                self.seen.append(step)
                step += 1
        raise Killed


def test_what_was_killed_goes_on_from_its_save_and_ends_where_it_would_have(plain, tmp_path):
    wanted = plain
    recipe = recipe_of(save_every=3)
    with pytest.raises(Killed):
        fit({"it": grid_of()}, Watched(cached(), [], kill=5), recipe, tmp_path / "killed")
    seen = []
    found = fit({"it": grid_of()}, Watched(cached(), seen), recipe, tmp_path / "killed")
    assert [step for step in seen if step][0] == 3
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), found.params, wanted.params)
    assert all(jax.tree.leaves(same))
    seen.clear()
    again = fit({"it": grid_of()}, Watched(cached(), seen), recipe, tmp_path / "killed")
    assert not any(seen)  # it was done
    np.testing.assert_array_equal(again.params["it"]["kernel"], wanted.params["it"]["kernel"])


def test_heads_in_turns_other_grids_and_eight_devices_change_no_head(plain, tmp_path):
    wanted = plain.params["it"]
    both = {"it": grid_of(at_once=3), "more": grid_of((0.1,))}
    found = fit(both, cached(8), recipe_of(), tmp_path)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, found.params["it"], wanted)
    outputs = jax.jit(lambda fitted, x: fitted.measure(x, lambda logits: logits.sum(axis=1)))(
        found, {"x": jnp.ones((2, WIDTH))}
    )
    assert outputs["it"].shape == (4, 2) and outputs["more"].shape == (2, 2)
    by_hand = (wanted["kernel"].sum(axis=1) + wanted["bias"]).sum(axis=1)
    np.testing.assert_allclose(outputs["it"][:, 0], by_hand, atol=1e-5)


def test_kernels_stay_where_they_are_when_a_batch_is_smaller_than_they_are_wide():
    """Vectors are cut as kernels are, and the logits are what goes between devices."""
    classes, width, mesh = 64, 256, mesh_of(8)
    place = meshes.batch_sharding(mesh)
    array = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind, sharding=place)  # noqa: E731
    features = {"x": array(jnp.float32, BATCH, width)}
    grid = dataclasses.replace(grid_of(), head=heads.Linear(classes))
    made = program((("it", grid),), recipe_of(), features, mesh, 0)
    kernel = made.state.params["it"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, width // 8, classes)
    parts = [(features, {"label": array(jnp.int32, BATCH)})]
    text = made.update.lower(made.state, parts).compile().as_text()
    moved = [line for line in text.splitlines() if re.search("all-(gather|reduce|to-all)", line)]
    assert moved and not any(f"[4,{width},{classes}]" in line for line in moved)


def test_a_head_that_diverges_is_found_and_harms_no_other(plain, tmp_path):
    fitted = fit({"it": grid_of((0.5, np.inf))}, cached(), recipe_of(), tmp_path)
    assert fitted.diverged()["it"].tolist() == [False, False, True, True]
    kernels = (x.params["it"]["kernel"][:2] for x in (fitted, plain))
    np.testing.assert_allclose(*kernels, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Still:
    """The image as evaluations see it: nothing random."""

    preprocess: Preprocess

    def __call__(self, data, rng):
        return {"image": self.preprocess(data)}


def test_features_made_in_passing_train_as_those_of_the_cache_do(tmp_path):
    """In calls of 8 images of a batch of 16; the labels go by the records' numbers."""
    model, (images, names) = small_mae(), coloured(40)
    source = ArrayRecordSource(shard(tmp_path, "own", items_of(images, names)))
    labels = np.array([ord(name[0]) - ord("a") for name in names], np.int32)
    want = Want(patches="none")
    view = Still(model.preprocess)
    passing = Images(model, source, view, want, BATCH, 3, 15, {"label": labels}, threads=2)
    made = np.stack([view.preprocess(records.decode(source[i]).image) for i in range(40)])
    features = np.asarray(model.features(made, want).cls)
    order = shuffled(40, 3)
    rows = [[order[step * BATCH + i] for i in range(BATCH)] for step in range(STEPS)]
    parts = [[({"x": features[now]}, {"label": labels[now]})] for now in rows]
    there = SimpleNamespace(start=lambda step: (each for each in parts))
    seen = dataclasses.replace(grid_of(), see=lambda features: features.cls)
    found = fit({"it": seen}, passing, recipe_of(), tmp_path)
    assert_by_torch(found, "sgd", there, features.shape[1])


def test_batches_and_recipes_that_cannot_be_are_one_line():
    with pytest.raises(UserError, match="batch = 12: does not divide over 8 devices"):
        dataclasses.replace(cached(8), batch=12)
    with pytest.raises(UserError, match="batch = 20: does not divide over 8 devices"):
        Images(small_mae(), [b""], None, Want(), 20, 0)
    with pytest.raises(ValueError, match="optimizer = 'adam' is not sgd, adamw, lars"):
        recipe_of(optimizer="adam")
