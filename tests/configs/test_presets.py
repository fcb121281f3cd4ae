import pytest

from tests.configs.update import ROOT
from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax.configs import common
from webssl_jax.sharding import slices


def load(spec: str):
    return configs.load(str(ROOT / "configs" / spec))


@pytest.mark.parametrize("config", ["web_dino.py:size=7b", "web_mae.py:size=5b", "clip.py:size=7b"])
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_a_preset_changes_sharding_and_remat_and_nothing_else(config, chip):
    plain, suited = (configs.resolved(load(spec)) for spec in (config, f"{config},preset={chip}"))
    tight = {  # little memory for a 7B, and for 128 images of it
        ("web_dino.py:size=7b", "v4"): 32,
        ("web_dino.py:size=7b", "v6e"): 32,
        ("clip.py:size=7b", "v5e"): 64,
    }
    assert suited["sharding"]["fsdp"] == tight.get((config, chip), 16)
    assert suited["sharding"]["replica"] == -1
    for tree in (plain, suited):
        del tree["sharding"]["fsdp"], tree["sharding"]["replica"], tree["model"]["remat"]
    assert suited == plain
    assert methods.create(load(f"{config},preset={chip}")).encoder.remat in ("full", "named")


@pytest.mark.parametrize(
    "spec, chip, remat",
    [
        ("web_dino.py:size=7b", "v5p", "named"),
        ("web_dino.py:size=7b,res=518", "v5p", "named"),
        ("web_dino.py:size=1b,data=heavy", "v5e", "named"),
        ("web_dino.py:size=1b,res=378", "v5e", "full"),  # many more tokens
        ("web_dino.py:size=3b", "v5e", "full"),
        ("web_dino.py:size=7b", "v6e", "named"),
        ("dinov3.py:size=7b,stage=gram", "v5p", "named"),
        ("dinov3.py:size=7b", "v6e", "most"),
        ("dinov3.py:size=7b,stage=gram", "v6e", "full"),  # the Gram teacher's crops of 512 besides
        ("dinov3.py:size=l", "v6e", "named"),
        ("dinov3.py:size=7b,stage=high_res", "v5p-512", "full"),  # many more tokens
        ("web_dino.py:size=7b,res=518", "v4", "full"),
        ("web_mae.py:size=5b", "v5e", "named"),  # it sees a quarter of the tokens
        ("clip.py:size=l14,loss=sigmoid", "v4", "named"),
        ("clip.py:size=1b", "v5p", "full"),  # 256 images a chip
        ("clip.py:size=7b", "v5p-512", "named"),  # 128
        ("clip.py:size=5b", "2xv5p-256", "named"),
        ("clip.py:size=7b", "2xv5p-256", "full"),
    ],
)
def test_what_is_kept_for_the_backward_pass_follows_from_memory(spec, chip, remat):
    assert load(f"{spec},preset={chip}").model.remat == remat


@pytest.mark.parametrize(
    "preset, fsdp, kept", [("v5e", 64, "most"), ("v5p", 16, "named"), ("v4", 16, "full")]
)
def test_a_preset_also_says_how_a_language_model_is_trained(preset, fsdp, kept):
    config = load(f"vqa.py:stage=2,encoder=web_dino_7b,preset={preset}")
    language = methods.create(config).language
    assert (config.sharding.fsdp, language.remat, language.attention) == (fsdp, kept, "pallas")
    assert methods.create(load("vqa.py:stage=2")).language.attention == "xla"


@pytest.mark.parametrize("name", ["v5p-512", "2xv5p-256"])
def test_twice_the_chips_change_clip_alone(name):
    for config in ("web_dino.py:size=7b", "web_dino.py:size=1b,res=518", "web_mae.py:size=5b"):
        half, whole = (load(f"{config},preset={preset}") for preset in ("v5p", name))
        assert configs.resolved(half) == configs.resolved(whole)


def test_presets_are_of_chips_and_slices_that_plan_knows():
    for name in common.PRESETS:
        assert name in slices.CHIPS or slices.find(name.removeprefix("2x"))


def test_a_chip_without_preset_is_refused_with_the_nearest():
    with pytest.raises(configs.ConfigError, match="preset=v5: did you mean 'v5p'"):
        load("web_dino.py:size=7b,preset=v5")
