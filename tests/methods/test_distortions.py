"""Distortions on the device: the pixels of those on the host, wherever a batch is looked at."""

import jax
import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import ListSource, encode_image, smooth_image
from tests.methods import test_every_method as every
from webssl_jax import methods
from webssl_jax.bad_steps import saving
from webssl_jax.data import photometric
from webssl_jax.data.photometric import JITTER, Distortion, Drawn
from webssl_jax.data.records import Record, encode
from webssl_jax.evaluators import fed
from webssl_jax.methods import distortions
from webssl_jax.methods.dino.view import View


def cases(rng):
    """{what is done: drawn for each of 8 crops}."""
    amounts = {name: rng.uniform(0.6, 1.4, 8) for name in JITTER}
    amounts["hue"] = rng.uniform(-0.1, 0.1, 8)
    made = {
        name: [Drawn(jitter=((JITTER.index(name), x),)) for x in amounts[name]] for name in JITTER
    }
    made |= {"nothing": [Drawn()] * 8, "grey": [Drawn(gray=True)] * 8}
    made |= {"solarize": [Drawn(solarize=True)] * 8}
    made |= {"blur": [Drawn(sigma=sigma) for sigma in np.linspace(0.1, 2.0, 8)]}
    mixed = Distortion(jitter=1.0, grayscale=0.3, blur=0.7, solarize=0.3)
    return made | {"all": [mixed.draw(rng) for _ in range(8)]}


def test_the_device_makes_the_pixels_of_the_host():
    rng = np.random.default_rng(0)
    drawn = cases(rng)
    crops = rng.integers(0, 256, (len(drawn), 8, 18, 30, 3), dtype=np.uint8)
    crops[:, ::2] = [[smooth_image(rng, 30, 18) for _ in range(4)] for _ in drawn]
    numbers = np.array([[x.numbers() for x in row] for row in drawn.values()])
    made = np.asarray(distortions.distort(crops, numbers)).astype(int)
    for name, ours, given in zip(drawn, made, crops):
        host = np.stack([do(Image.fromarray(x)) for do, x in zip(drawn[name], given)])
        error = np.abs(ours - host)
        # A compiler may round a product and a sum once where the host rounds twice; it takes a
        # value on the edge of a grey level for that to show. Measured: no pixel differs.
        assert error.max() <= (2 if name == "all" else 1), name
        assert (error > 0).mean() < 1e-3, name
        if name == "nothing":
            assert not numbers[list(drawn).index(name)].any() and (ours == given).all()
        else:
            assert (host != given).any(axis=(1, 2, 3)).mean() > 0.8, name


def test_what_the_host_leaves_undone_is_done_and_shown_as_it_would_have_been(monkeypatch):
    """Views draw the same for both; pictures of a batch show what the network sees."""
    config, batches, sheets = every.load("dinov3_gram"), {}, {}
    images = [smooth_image(np.random.default_rng(i), 40, 40) for i in range(2)]
    records = [
        Record(encode_image(x, "PNG"), (), str(i), 40, 40, "s") for i, x in enumerate(images)
    ]
    source = ListSource(tuple(map(encode, records)))
    monkeypatch.setattr(fed, "crop_sheet", lambda originals, views: list(views.values()))
    monkeypatch.setattr(saving, "image_grid", lambda images, *unused: images)
    for place in photometric.PLACES:
        config.method.view.distort_on = place
        method = methods.create(config)
        rows = [method.train_view()(x.image, np.random.default_rng(7)) for x in records]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batches[place] = batch | {"record": np.arange(2), "substituted": np.zeros(2, bool)}
        sheets[place] = fed.picture(source, batches[place], method)
        sheets[place] += [saving._sheet(batch, "global_crops", [0, 1])]
    host, device = (batches[place] for place in photometric.PLACES)
    assert (host["global_crops"] != device["global_crops"]).any()
    np.testing.assert_array_equal(device["gram_crops"], host["gram_crops"])
    for ours, wanted in zip(sheets["device"], sheets["host"], strict=True):
        gap = np.abs(ours.astype(int) - wanted)
        assert gap.max() <= 2 and (gap > 0).mean() < 1e-3
    shown = np.stack(sheets["host"][:2], axis=1)
    np.testing.assert_array_equal(shown, host["global_crops"])
    with pytest.raises(ValueError, match="distort_on = 'tpu' is not one of host, device"):
        View(distort_on="tpu")


@pytest.mark.parametrize("name", ["lejepa", "mocov3", "simdino"])
def test_every_method_with_such_crops_distorts_them_in_its_step(name):
    """DINO's loss is in test_dino.py."""
    config = every.load(name)
    config.method.view.distort_on = "device"
    method = methods.create(config)
    spec = method.batch_spec(every.BATCH)
    data = encode_image(smooth_image(np.random.default_rng(0), 40, 40), "PNG")
    row = method.train_view()(data, np.random.default_rng(0))
    assert {key: (x.shape, x.dtype) for key, x in row.items()} == {
        key: (x.shape[1:], x.dtype) for key, x in spec.items()
    }
    values = {key: np.float32(0.04) for key in method.schedules(4, every.BATCH)}

    def loss(batch):
        return method.loss(*every.drawn(method), batch, jax.random.key(0), values).loss

    jaxpr = jax.make_jaxpr(loss)(spec).jaxpr
    names = dict(zip(jaxpr.invars, sorted(spec), strict=True))
    done = [x.invars for x in jaxpr.eqns if x.params.get("name") == "distort"]
    crops = {"views"} if name == "mocov3" else {"global_crops", "local_crops"}
    wanted = crops | {photometric.numbers_of(x) for x in crops}
    assert {names[x] for inputs in done for x in inputs} == wanted
