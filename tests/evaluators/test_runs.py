"""What an evaluation leaves in a workdir, and what it says when it cannot."""

import types

import jax
import numpy as np
import pytest

from webssl_jax.config import UserError
from webssl_jax.evaluators.runs import RunEvaluation
from webssl_jax.sharding import distributed


def make(folder, writes=True):
    made = RunEvaluation.__new__(RunEvaluation)
    result = types.SimpleNamespace(to_json=lambda: {"data": "x"})
    made._evaluation = types.SimpleNamespace(
        baselines=lambda stored: {"raw pixels": result}, measure=lambda features, step: result
    )
    made._bind, made._folder, made._writes = (lambda variables: None), folder, writes
    return made


def test_a_result_is_kept_and_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    make(tmp_path / "eval").run(None, 3)
    assert (tmp_path / "eval" / "00000003.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        make(tmp_path / "file").run(None, 3)


def test_what_the_first_process_cannot_write_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_gather", lambda flag: np.array([True, flag]))
    with pytest.raises(UserError, match="process 0 stopped"):
        make(tmp_path / "eval", writes=False).run(None, 3)
    assert not (tmp_path / "eval").exists()
