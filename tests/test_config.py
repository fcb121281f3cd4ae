import json
import pathlib

import ml_collections
import pytest

from webssl_jax import config as configs
from webssl_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
MAE = str(ROOT / "configs" / "web_mae.py")


def error(spec, *overrides):
    with pytest.raises(ConfigError) as caught:
        configs.load(spec, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_key_is_refused_with_the_nearest_real_one():
    assert "did you mean --config.optim.lr?" in error(MAE, "optim.lrr=1")
    assert "did you mean --config.optim.weight_decay?" in error(MAE, "weight_decay=1")


def test_a_value_of_the_wrong_type_is_refused():
    assert "not of type int" in error(MAE, "global_batch=many")
    assert "is float, not int" in error(MAE, "global_batch=1.5")
    assert "not of type bool" in error(MAE, "log.tensorboard=perhaps")
    assert "group of keys" in error(MAE, "optim=3")


def test_values_take_the_type_of_what_they_replace():
    config = configs.load(
        MAE,
        [
            "total_images=2e6",
            "optim.lr=1",
            "log.tensorboard=false",
            "optim.frozen=('a','b')",
            "data.train=/a=b",
            "optim.warmup_steps=3",
        ],
    )
    assert config.total_images == 2_000_000 and isinstance(config.total_images, int)
    assert isinstance(config.optim.lr, float)
    assert config.log.tensorboard is False
    assert config.optim.frozen == ("a", "b")
    assert config.data.train == "/a=b"


def test_a_duration_may_be_given_in_another_unit():
    config = configs.load(MAE, ["total_steps=1000", "optim.warmup_percent=10"])
    assert configs.total_steps(config) == 1000
    assert configs.steps(config.optim, "warmup", config) == 100
    assert "warmup_steps" not in config.optim and "total_images" not in config
    config = configs.load(MAE, ["optim.warmup_images=409600"])
    assert configs.steps(config.optim, "warmup", config) == 100


@pytest.mark.parametrize(
    "override, says",
    [
        ("global_batch=0", "positive"),
        ("accumulation_steps=3", "a divisor of global_batch"),
        ("optim.lr=-1", "positive"),
        ("total_images=10", "at least one step"),
        ("optim.clip=both", "none, global or per_module"),
        ("optim.warmup_steps=999999999", "shorten it"),
        ("sharding.fsdp=0", "-1 for all"),
        ("data.threads=0", "positive"),
        ("sharding.tensor=-1", "only axis"),
    ],
)
def test_values_out_of_range_are_refused(override, says):
    message = error(MAE, override)
    assert says in message and "config." in message


def test_a_missing_config_file_names_its_neighbours(tmp_path):
    assert "did you mean" in error(str(ROOT / "configs" / "webmae.py"))
    assert "no such file" in error(str(tmp_path / "x.py"))


def test_an_unknown_argument_or_size_is_refused():
    assert "did you mean 'size'" in error(MAE + ":siez=1b")
    assert "recipe" in error(MAE + ":recipe=papper")
    assert "write size=VALUE" in error(MAE + ":size")


def test_a_resolved_config_reads_back_as_the_same_config():
    config = configs.load(MAE + ":size=1b", ["optim.warmup_percent=3"])
    text = json.dumps(configs.resolved(config))
    again = configs.from_resolved(json.loads(text))
    assert configs.resolved(again) == json.loads(text)
    assert isinstance(again, ml_collections.ConfigDict)


GOLDEN = pathlib.Path(__file__).parent / "configs"


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.json")))
def test_the_resolved_config_is_the_committed_one(name):
    """A change here is a change of a recipe: say why in the commit, then run
    tests/configs/update.py."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    config = configs.load(str(ROOT / "configs" / golden["spec"]))
    assert configs.resolved(config) == golden["config"]


def test_the_papers_web_mae_recipe():
    """recipes.md sections 0 and 3: 2B images at 4096 are 488,281 steps, 80K of them warm-up, rate
    1.6e-3."""
    config = configs.load(MAE + ":size=1b")
    assert configs.total_steps(config) == 488_281
    assert configs.steps(config.optim, "warmup", config) == 80_000
    assert config.optim.lr == 1.6e-3 and (config.optim.b1, config.optim.b2) == (0.9, 0.95)
    stock = configs.load(MAE + ":size=1b,recipe=stock")
    assert stock.optim.lr == pytest.approx(2.4e-3)
    assert configs.steps(stock.optim, "warmup", stock) / configs.total_steps(
        stock
    ) == pytest.approx(0.05, rel=1e-3)
