"""Several state dicts in one file: all are named, each can be taken, and the first choice is that
of those who write such files."""

import collections

import numpy as np
import pytest
import torch

from tests.weights import samples
from webssl_jax import publish
from webssl_jax.weights import load
from webssl_jax.weights.stored import WeightsError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Plain ViT's tensors in timm's names."""
    path = samples.write("mae-pth", tmp_path_factory.mktemp("state_dicts"))
    model = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in model.items() if not k.startswith(("decoder", "mask_token"))}


def plus(tensors, number, prefix=""):
    return {f"{prefix}{k}": x if k == "pos_embed" else x + number for k, x in tensors.items()}


def which(path, encoder, **options):
    """(place, the number that was added to the weights taken)."""
    loaded = load.load(path, **options)
    bias = loaded.params["encoder"]["norm"]["bias"]
    return loaded.inside, round(float((bias - encoder["norm.bias"].numpy()).mean()), 3)


def test_timms_averaged_weights_are_taken_as_its_own_loader_does_and_the_plain_can_be_named(
    tmp_path, encoder
):
    path = tmp_path / "averaged.pth.tar"
    torch.save(
        {
            "epoch": 1,
            "state_dict": encoder,
            "state_dict_ema": plus(encoder, 1),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            "best": np.float64(3),
        },
        path,
    )
    assert which(path, encoder) == ("state_dict_ema", 1)
    assert which(f"{path}:state_dict", encoder) == ("state_dict", 0)
    said = "the weights under 'state_dict_ema' (there are also averaged.pth.tar:state_dict)"
    assert load.open_(path).assumed[0] == said
    with pytest.raises(WeightsError, match="no 'model'; there are state_dict, state_dict_ema"):
        load.open_(f"{path}:model")
    with pytest.raises(WeightsError, match="the weights are read from there"):
        publish.export_loaded(load.open_(f"{path}:state_dict"), "dinov2-pth", path)


def test_a_student_beside_its_teacher_is_choosable(tmp_path, encoder):
    torch.save({"student": encoder, "teacher": plus(encoder, 1)}, tmp_path / "x.pth")
    assert which(tmp_path / "x.pth", encoder) == ("teacher", 1)
    assert which(f"{tmp_path / 'x.pth'}:student", encoder) == ("student", 0)


def test_weights_in_a_lightning_module_are_found_under_any_prefix(tmp_path, encoder):
    path = tmp_path / "epoch=3.ckpt"
    inner = plus(encoder, 0, "model.backbone.")
    torch.save({"state_dict": inner, "hyper_parameters": {"lr": 1.0}, "epoch": 3}, path)
    assert which(path, encoder) == ("state_dict/model.backbone", 0)
    inner |= plus(encoder, 1, "ema_model.backbone.")
    torch.save({"state_dict": inner, "epoch": 3}, path)
    names = "epoch=3.ckpt:state_dict/ema_model, epoch=3.ckpt:state_dict/model$"
    with pytest.raises(WeightsError, match=f"several networks; name one: {names}"):
        load.open_(path)
    assert which(f"{path}:state_dict/ema_model", encoder)[1] == 1


def test_two_encoders_in_one_dict_are_two_choices(tmp_path, encoder):
    """As programs save them that train two; those of MoCo v3 are a family of their own."""
    both = plus(encoder, 0, "module.query_encoder.") | plus(encoder, 1, "module.key_encoder.")
    torch.save({"state_dict": both}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="module.key_encoder, .*module.query_encoder$"):
        load.open_(tmp_path / "x.pth")
    chosen = f"{tmp_path / 'x.pth'}:state_dict/module.key_encoder"
    assert which(chosen, encoder)[1] == 1


def test_numbers_among_the_tensors_are_read_past(tmp_path, encoder):
    mixed = collections.OrderedDict(encoder, best=np.float32(3), size=torch.Size([2]), epoch=4)
    torch.save(mixed, tmp_path / "x.pth")
    assert which(tmp_path / "x.pth", encoder) == ("", 0)


def test_a_classifier_on_the_mean_of_patches_gives_its_norm_and_says_so(tmp_path, encoder):
    tuned = {
        k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: x
        for k, x in encoder.items()
    }
    tuned |= {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    torch.save({"model": tuned}, tmp_path / "x.pth")
    loaded = load.load(tmp_path / "x.pth")
    assert (
        loaded.family == "timm" and "fc_norm, which was trained on the mean" in loaded.assumed[-1]
    )
    np.testing.assert_array_equal(loaded.params["encoder"]["norm"]["bias"], encoder["norm.bias"])


def test_float64_is_read_and_what_is_too_large_for_float32_is_named(tmp_path, encoder):
    wide = {k: x.double() for k, x in encoder.items()}
    torch.save(wide, tmp_path / "x.pth")
    assert load.open_(tmp_path / "x.pth").dtype == "float64"
    assert which(tmp_path / "x.pth", encoder) == ("", 0)
    wide["blocks.1.norm1.bias"][3] = 1e300
    torch.save(wide, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="infinity in blocks.1.norm1.bias"):
        load.load(tmp_path / "x.pth")
