"""``tools/inspect_weights.py`` says what a file is, and what of it does not fit."""

import importlib.util
import json
import pathlib

import pytest
import torch

from tests.weights import big_files, samples
from webssl_jax.config import UserError
from webssl_jax.models import sizes

_spec = importlib.util.spec_from_file_location(
    "inspect_weights", pathlib.Path(__file__).parents[2] / "tools" / "inspect_weights.py"
)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


@pytest.mark.parametrize("family", samples.FAMILIES)
def test_a_whole_file_is_described_and_fits(tmp_path, capsys, family):
    path = samples.write(family, tmp_path)
    assert tool.main([str(path)]) == 0
    printed = capsys.readouterr().out
    for fact in (f"{family} (", "web-mae-micro: 2 blocks, width 32, 2 heads", "32 pixels, 4x4"):
        assert fact in printed
    assert "MAE's fixed sin-cos table" in printed and "float32" in printed and "it fits" in printed
    assert ("1 blocks, width 16, 4 heads" in printed) == (family in samples.BOTH)


def test_what_had_to_be_assumed_is_told(tmp_path, capsys):
    path = samples.write("hf-vit", tmp_path)
    assert tool.main([str(path)]) == 0 and "no config.json" not in capsys.readouterr().out
    (path / "config.json").unlink()
    assert tool.main([str(path / "model.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert (
        "assumed     heads = 2 (of the published size), norm_eps = 1e-06 (no config.json" in printed
    )


def test_the_flag_goes_before_the_published_size_and_must_be_a_number_of_heads(tmp_path, capsys):
    path = samples.write("hf-vit", tmp_path)
    with pytest.raises(UserError, match="heads=-2: must be at least 1"):
        tool.main([str(path), "--heads", "-2"])
    (path / "config.json").unlink()
    assert tool.main([str(path / "model.safetensors"), "--heads", "4"]) == 0
    assert "width 32, 4 heads" in capsys.readouterr().out


def test_the_5b_model_is_known_from_its_headers(tmp_path, capsys):
    big_files.write(tmp_path / "in", sizes.web_mae("5b"))
    assert tool.main([str(tmp_path / "in")]) == 0
    printed = capsys.readouterr().out
    assert "web-mae-5b" in printed and "encoder 4,936,114,176" in printed


def test_what_does_not_fit_is_listed_by_kind(tmp_path, capsys):
    path = samples.write("mae-pth", tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    model = checkpoint["model"]
    del model["blocks.1.norm2.bias"]
    model["blocks.0.ls1.gamma"] = torch.zeros(32)
    model["norm.weight"] = torch.zeros(31)
    model["norm.bias"] = torch.zeros(32, dtype=torch.int64)
    torch.save(checkpoint, path)
    assert tool.main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["does_not_fit"] == {
        "missing": ["blocks.1.norm2.bias"],
        "not expected": ["blocks.0.ls1.gamma"],
        "of another shape": ["norm.weight is (31,), not (32,)"],
        "of a type that is not read": ["norm.bias is int64"],
    }
    assert tool.main([str(path)]) == 1
    assert "not expected (1)\n  blocks.0.ls1.gamma\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "family, names",
    [
        ("hf-dinov2", ["encoder.layer.0.layer_scale1.lambda1"]),
        (
            "hf-dinov2",
            [f"encoder.layer.{i}.layer_scale{j}.lambda1" for j in (1, 2) for i in (0, 1, 2)],
        ),
        ("dinov2-pth", ["blocks.0.ls1.gamma"]),
        ("dinov2-pth", [f"blocks.{i}.ls1.gamma" for i in (0, 1, 2)]),
        ("dinov2-pth", ["blocks.0.attn.qkv.bias"]),
        ("dinov2-teacher", ["backbone.blocks.0.mlp.w12.bias"]),
    ],
)
def test_what_of_the_first_block_is_missing_is_named(tmp_path, capsys, family, names):
    """It is in the first block that one looks for what a network has."""
    whole = samples.write(family, tmp_path, samples.make_dino())

    def change(tensors):
        for name in names:
            del tensors[name]

    folder = tmp_path / "damaged"
    folder.mkdir()
    path = samples.damaged(whole, family, folder, change)
    assert tool.main([str(path), "--heads", "2", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["does_not_fit"] == {"missing": names}


def test_what_contradicts_the_config_is_told_with_what_is_known(tmp_path, capsys):
    path = samples.write("hf-vit", tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"hidden_size": 64}
    (path / "config.json").write_text(json.dumps(config))
    assert tool.main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "hidden_size = 64, not 32" in printed and "hf-vit (" in printed


DINO = {
    "dinov2-pth": [
        "trained; for other sizes resized with DINOv2's offset of 0.1 (position_resize=offset, as "
        "the code of original DINOv2 and Web-SSL does it)\n"
    ],
    "dinov2-teacher": [
        "what lies under 'teacher'",
        "24 prototypes, bottleneck 8, 3 layers of 20",
        "16 prototypes, bottleneck 12, 3 layers of 20",
    ],
    "dinov2-heads": ["24 prototypes, bottleneck 8", "init_from and export take it"],
    "hf-dinov2": ["resized plainly (position_resize=plain, as the code of transformers does it)\n"],
    "timm": ["resized with antialiasing (position_resize=antialias, as the code of timm does it)"],
}


@pytest.mark.parametrize("family", samples.DINO)
def test_of_dino_the_heads_the_extras_and_the_way_positions_are_resized_are_told(
    tmp_path, capsys, family
):
    path = samples.write(family, tmp_path, samples.make_dino())
    flags = [] if family == "dinov2-heads" else ["--heads", "2"]
    assert tool.main([str(path), *flags]) == 0
    printed = capsys.readouterr().out
    facts = [f"{family} (", "it fits", *DINO[family]]
    if family != "dinov2-heads":
        token = "" if family == "timm" else ", a mask token"
        facts += ["3 blocks, width 32, 2 heads, SwiGLU 88", f"LayerScale{token}\n"]
    for fact in facts:
        assert fact in printed


def test_with_registers_the_way_of_dinov2s_releases_is_told_and_another_can_be_chosen(
    tmp_path, capsys
):
    path = samples.write("dinov2-pth", tmp_path, samples.make_dino(num_registers=4))
    flags = [str(path), "--heads", "2"]
    assert tool.main(flags) == 0
    assert (
        "(position_resize=antialias, as the code of original DINOv2 and Web-SSL does it with "
        in (capsys.readouterr().out)
    )
    assert tool.main([*flags, "--position-resize", "offset"]) == 0
    assert "offset of 0.1 (position_resize=offset, as given)" in capsys.readouterr().out
    heads = samples.write("dinov2-heads", tmp_path, samples.make_dino())
    with pytest.raises(UserError, match="position_resize=offset: .* has no encoder; leave it out"):
        tool.main([str(heads), "--position-resize", "offset"])
