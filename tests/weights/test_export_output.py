"""Where an export may go, and that neither a failure nor an order by mistake loses weights."""

import importlib.util
import os
import pathlib

import pytest

from tests.weights import samples
from webssl_jax import runs
from webssl_jax.config import UserError
from webssl_jax.weights import load
from webssl_jax.weights.stored import WeightsError

_spec = importlib.util.spec_from_file_location(
    "export_weights_tool", pathlib.Path(__file__).parents[2] / "tools" / "export.py"
)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def convert(source, output, *flags):
    return tool.main(
        ["--weights", str(source), "--format", "timm", "--output", str(output), *flags]
    )


@pytest.mark.parametrize("named", ["", "model.safetensors"])
def test_weights_are_not_replaced_by_their_own_export(tmp_path, named):
    folder = samples.write("hf-vit", tmp_path)
    before = content(folder)
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, tmp_path / "link"):
        with pytest.raises(WeightsError, match="the weights are read from there") as caught:
            convert(folder / named, output)
        assert "\n" not in str(caught.value)
    assert content(folder) == before


def test_a_pth_file_is_not_replaced_by_its_own_export(tmp_path):
    path = samples.write("mae-pth", tmp_path)
    before = path.read_bytes()
    with pytest.raises(WeightsError, match="the weights are read from there"):
        tool.main(["--weights", str(path), "--format", "mae-pth", "--output", str(path)])
    assert path.read_bytes() == before


def test_the_folder_one_stands_in_can_be_the_output(tmp_path, monkeypatch):
    folder = samples.write("hf-vit", tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert convert(folder, ".") == 0
    assert load.load(here).family == "timm"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "hf-vit"]


def test_an_output_that_is_a_link_stays_one(tmp_path):
    folder, real = samples.write("hf-vit", tmp_path), tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    for _ in range(2):
        assert convert(folder, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and load.load(real).family == "timm"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_at_every_moment_of_a_replacement_a_whole_export_is_there(tmp_path, monkeypatch, error):
    samples.write("hf-vit", tmp_path)
    output = samples.write("timm", tmp_path)
    before, replace, seen = content(output), os.replace, []

    def fail(source, target):
        if pathlib.Path(target) == output and pathlib.Path(source).suffix == ".partial":
            seen.extend(load.load(p).family for p in tmp_path.iterdir() if p.name[0] == ".")
            raise error("pulled the plug")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((WeightsError, KeyboardInterrupt)):
        samples.write("timm", tmp_path, dtype="bfloat16")
    assert seen == ["timm", "timm"]  # the old one and the new one
    assert content(output) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf-vit", "timm"]


def test_heads_of_a_run_are_not_taken_from_a_flag(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--workdir", "W", "--heads", "-3", "--format", "timm", "--output", "o"])
    assert caught.value.code == 2 and "--heads belongs to --weights" in capsys.readouterr().err


def test_heads_that_are_no_number_of_heads_are_refused_where_the_file_states_them(tmp_path):
    folder = samples.write("hf-vit", tmp_path)
    with pytest.raises(UserError, match="heads=-3: must be at least 1"):
        convert(folder, tmp_path / "out", "--heads", "-3")
    assert not (tmp_path / "out").exists()


def test_what_was_assumed_is_printed(tmp_path, capsys):
    folder = samples.write("hf-vit", tmp_path)
    assert convert(folder, tmp_path / "a") == 0 and "assumed: " not in capsys.readouterr().out
    (folder / "config.json").unlink()
    assert convert(folder / "model.safetensors", tmp_path / "b") == 0
    assert "assumed: heads = 2 (of the published size), norm_eps" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", "7", '{"model": 1}'])
def test_an_export_or_a_broken_config_is_no_run_and_said_in_one_line(tmp_path, text):
    folder = samples.write("hf-vit", tmp_path)
    if text is not None:
        (folder / "config.json").write_text(text)
    named = "its JSON cannot be read" if text == "{" else "is not a run: its config.json is"
    with pytest.raises(UserError, match=named) as caught:
        runs.read_config(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
