import importlib.util
import pathlib

import pytest

from tests.tpu import programs
from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax.config import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
_spec = importlib.util.spec_from_file_location("plan_blocks", ROOT / "tools" / "plan_blocks.py")
plan_blocks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plan_blocks)


def run(monkeypatch, *argv):
    argv = ["plan_blocks.py", "--config", "configs/web_dino.py:size=tiny", *argv]
    monkeypatch.setattr("sys.argv", argv)
    return plan_blocks.main()


def test_two_blocks_run_nothing_but_the_models_products_where_everything_is_kept(
    monkeypatch, capsys
):
    argv = ("--slice", "v5e-4", "--tokens", "2x37,4x10", "--images", "4")
    assert run(monkeypatch, *argv) == 0
    out = capsys.readouterr().out
    assert "modelled MFU 0.0" in out and "executed flops 1.000 times the model's" in out


def test_crops_that_are_no_crops_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--tokens 257: must be as"):
        run(monkeypatch, "--slice", "v5e-4", "--tokens", "257")


def test_tokens_without_a_square_of_patches_are_refused_where_positions_are_rotated(monkeypatch):
    argv = ["--config", "configs/dinov3.py:size=tiny", "--slice", "v5e-4", "--tokens", "2x41,4x13"]
    with pytest.raises(UserError, match="--tokens 13: .* 5 and a square of patches, as 54"):
        run(monkeypatch, *argv)


def test_a_program_for_tpus_cuts_no_head_in_half_to_rotate_it():
    def has_half_heads(dtype):
        spec = ["configs/dinov3.py:size=tiny", [f"model.dtype={dtype}"]]
        encoder = methods.create(configs.load(*spec)).encoder
        lowered = plan_blocks.lower(encoder, programs.mesh_of("v5e-4"), [(1, 41)], images=1)
        return "x4x16xf32>" in lowered.as_text()  # 4 heads of 32

    assert has_half_heads("float32") and not has_half_heads("bfloat16")
