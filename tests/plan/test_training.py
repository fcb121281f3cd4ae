import argparse
import json

import jax
import numpy as np
import pytest

from tests.tpu import jaxpr_flops, programs
from tests.tpu.update import GATED, GOLDEN, figures
from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.plan import command, hlo, limits
from webssl_jax.plan import training as plan
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import slices
from webssl_jax.train_step import make_train_step, run_schedules

TOLERANCE = 0.02  # of the gate: less than any change that matters, more than a rounding
KEYS = (
    "fits peak_hbm_gib mfu_modelled mfu_with_exposed_ici executed_over_model_flops wire_gb "
    "exposed_gb images_per_s chip_hours"
).split()


def run(monkeypatch, capsys, *argv) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["plan", *argv])
    code = command.main()
    return code, capsys.readouterr().out


def stand_in(monkeypatch, name: str) -> None:
    """Has the plan compile a small program instead of the config's step."""

    def lower(config, method, optimizer, state, mesh):
        return programs.lower(name, mesh)[0]

    monkeypatch.setattr(plan, "lower_train_step", lower)


def test_the_figures_of_a_plan_follow_from_one_another(monkeypatch, capsys, tmp_path):
    stand_in(monkeypatch, "loop")
    hlo_file = tmp_path / "step.hlo"
    argv = ["--config", "configs/web_mae.py:size=tiny", "--slice", "v5e-4", "--json"]
    code, out = run(monkeypatch, capsys, *argv, "--hlo", str(hlo_file))
    r = json.loads(out)
    assert code == 0 and r["fits"] is True and set(KEYS) <= set(r)
    assert hlo_file.read_text().startswith("HloModule")
    config = configs.load("configs/web_mae.py:size=tiny")
    assert r["model_flops"] == methods.create(config).train_flops() * 64
    assert r["compute_s"] == pytest.approx(r["modelled_cycles"] / 1.5e9)
    # a 2 x 2 of v5e is no torus: two links of 45 GB/s a chip
    assert r["exposed_ici_s"] == pytest.approx(r["exposed_gb"] / 90)
    step = r["compute_s"] + r["exposed_ici_s"]
    assert r["mfu_with_exposed_ici"] == pytest.approx(r["model_flops"] / step / (4 * 197e12))
    assert r["images_per_s"] == pytest.approx(64 / step)
    assert r["chip_hours"] == pytest.approx(4 * step * configs.total_steps(config) / 3600)
    assert r["peak_hbm_gib"] + r["spare_gib"] == pytest.approx(15.75)
    assert sum(row["modelled_s"] for row in r["limits"]) == pytest.approx(step)
    assert sum(row["least_s"] for row in r["limits"]) == pytest.approx(r["attainable_s"])
    at_peak = r["model_flops"] / (4 * 197e12)
    assert r["mfu_attainable"] == pytest.approx(at_peak / r["attainable_s"])
    says = plan.explanation(r).splitlines()
    assert len(says) == 1 + len(r["limits"]) + 2 + 10 and len(r["worst"]) == 10
    assert says[-10].endswith(f"({r['worst'][0]['category']}; {r['worst'][0]['name']})")
    text = plan.table(r)
    head = "web_mae.py:size=tiny on v5e-4"
    for word in ("fits", "left out", "attainable MFU", "costliest", head):
        assert word in text
    assert command._say(r, argparse.Namespace(json=False, explain=True), plan.table) == 0
    assert capsys.readouterr().out == f"{text}\n{plan.explanation(r)}\n"


def test_what_does_not_fit_is_said_with_the_compilers_own_figures(monkeypatch, capsys):
    stand_in(monkeypatch, "too_large")
    argv = ["--config", "configs/web_dino.py:size=tiny", "--slice", "v5e-4", "--json"]
    code, out = run(monkeypatch, capsys, *argv)
    r = json.loads(out)
    assert code == command.EXIT_DOES_NOT_FIT and r["fits"] is False
    assert r["hbm_gib"] == 15.75 == slices.find("v5e-4").chip.hbm_gib
    assert f"({r['peak_hbm_gib']:.2f}G) exceeds available HBM (15.75G)" in r["error"]
    assert r["peak_hbm_gib"] >= 32 and r["spare_gib"] == 15.75 - r["peak_hbm_gib"]
    assert r["mfu_modelled"] is None
    assert any("stream_prototypes" in tip for tip in r["try_next"])
    assert "NO, " in plan.table(r)


def test_bytes_between_slices_are_counted_apart_and_not_timed():
    slice_ = slices.find("v5e-16")
    sharding = configs.load("configs/web_mae.py:size=tiny", ["sharding.replica=2"]).sharding
    mesh = meshes.create(sharding, slice_.devices(2))
    gather = hlo.Collective("all-gather", 3.0, 2e9, True, "")
    cost = hlo.Cost(1e12, 1.5e9, 5e9, {"all": 1.5e9}, (gather,), (), ())
    known = {"model_flops": 32 * 197e12 / 2, "global_batch": 64, "chips": 32}
    r = plan.speed(cost, slice_, mesh, known, steps=3600)
    assert (r["wire_gb"], r["exposed_gb"], r["dcn_gb"]) == (6, 6, 5)
    assert r["compute_s"] == 1 and r["mfu_modelled"] == 0.5
    assert r["exposed_ici_s"] == pytest.approx(6 / 90)  # 4 x 4 is no torus: two links of 45 GB/s
    assert r["chip_hours"] == pytest.approx(32 * (1 + 6 / 90))


def test_both_wordings_of_the_compilers_refusal_are_read():
    for message, sizes in (
        ("temporaries (608.00G) exceeds available HBM (15.75G).", (608, 15.75)),
        ("Used 24.44G of 15.75G hbm. Exceeded hbm capacity by 8.69G.", (24.44, 15.75)),
        ("total (512.00M) exceeds available HBM (1.50G)", (0.5, 1.5)),
    ):
        refusal = plan.OutOfMemory(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {message}")
        assert (refusal.needs, refusal.available) == sizes


def test_bad_input_is_refused_before_anything_compiles(monkeypatch, capsys):
    argv = ["--config", "configs/web_mae.py:size=tiny"]
    with pytest.raises(configs.UserError, match="nearest are v5e-4, v5e-8"):
        run(monkeypatch, capsys, *argv, "--slice", "v5e-5")
    with pytest.raises(configs.UserError, match="do not divide over 256"):
        run(monkeypatch, capsys, *argv, "--slice", "v5e-256")
    with pytest.raises(configs.UserError, match="replica = 1: must be a multiple of the 2 slices"):
        run(monkeypatch, capsys, *argv, "--slice", "v5e-16", "--slices", "2")
    with pytest.raises(configs.UserError, match="folder does not exist"):
        run(monkeypatch, capsys, *argv, "--slice", "v5e-4", "--hlo", "/nowhere/at/all")


def test_a_step_that_computes_on_the_missing_devices_is_told_so(monkeypatch, capsys):
    def lower(config, method, optimizer, state, mesh):
        return jax.device_put(1.0, meshes.replicated(mesh))

    monkeypatch.setattr(plan, "lower_train_step", lower)
    argv = ["--config", "configs/web_mae.py:size=tiny", "--slice", "v5e-4"]
    with pytest.raises(RuntimeError, match="Make it from shapes"):
        run(monkeypatch, capsys, *argv)


@pytest.mark.parametrize("start", [1, 7, 64])
def test_the_largest_that_fits_is_found_to_an_eighth_and_asked_last_of_those_that_fit(start):
    for limit in (0, 1, 2, 6, 7, 8, 63, 64, 65, 100, 1000):
        asked = []

        def fits(number, limit=limit, asked=asked):
            assert number not in asked
            asked.append(number)
            return number <= limit

        found = plan.largest(fits, start)
        assert found <= limit <= found + max(found // 8, 0) + (limit < 16)
        assert found == max((n for n in asked if n <= limit), default=0)
        assert found == 0 or [n for n in asked if n <= limit][-1] == found


def test_search_compiles_ever_larger_batches_and_saves_the_step_of_the_largest(
    monkeypatch, capsys, tmp_path
):
    def lower(config, method, optimizer, state, mesh):
        cut = meshes.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((config.global_batch, 2**22), np.float32, sharding=cut)
        return jax.jit(lambda x: 2 * x).lower(x)  # 16 MiB an image and as much put out

    monkeypatch.setattr(plan, "lower_train_step", lower)
    argv = ["--config", "configs/web_mae.py:size=tiny", "--slice", "v5e-4", "--json", "--search"]
    code, out = run(monkeypatch, capsys, *argv, "--save", str(tmp_path / "step"))
    r = json.loads(out)
    most = 4 * 15.75 * 1024 / 32
    assert code == 0 and r["fits"] and most * 8 / 9 - 4 <= r["global_batch"] <= most
    assert [t["global_batch"] for t in r["tried"]][:3] == [64, 128, 256]
    assert {t["fits"] for t in r["tried"]} == {True, False}
    assert (tmp_path / "step").read_bytes().startswith(b"webssl_jax compiled step")
    assert "tried" in plan.table(r)


def test_search_says_so_where_nothing_fits(monkeypatch, capsys):
    stand_in(monkeypatch, "too_large")
    argv = ["--config", "configs/web_mae.py:size=tiny", "--slice", "v5e-4", "--search"]
    with pytest.raises(configs.UserError, match="not even 4 images fit on v5e-4: "):
        run(monkeypatch, capsys, *argv)


@pytest.mark.parametrize("name", GATED)
def test_no_program_costs_more_than_it_did_and_its_operations_add_up_to_that(name):
    """A change that moves these for a reason runs python -m tests.tpu.update and says why."""
    golden = json.loads(GOLDEN.read_text())[name]
    counted = figures(name)
    assert counted == pytest.approx(golden, rel=TOLERANCE)
    text = programs.compiled(name, GATED[name])[0].as_text()
    chip = slices.find(GATED[name]).chip
    found = limits.operations(text, limits.Rates(1e12, 1e12, 1e12, chip.clock))
    modelled = counted["cycles"] / chip.clock + counted["exposed_bytes"] / 1e12
    assert sum(operation.modelled_s for operation in found) == pytest.approx(modelled)
    assert sum(operation.flops for operation in found) == counted["flops"]
    assert sum(operation.wire_bytes for operation in found) == counted["wire_bytes"]
    least = sum(operation.least_s for operation in found)
    for amount in ("flops", "hbm_bytes", "wire_bytes"):
        used = sum(getattr(operation, amount) for operation in found) / 1e12
        assert least >= used * (1 - 1e-9)


@pytest.mark.slow
# DINO's jaxpr multiplies the same logits out several times, which the compiler does once. Its loop
# of unknown length draws masks until enough patches are hidden, and multiplies nothing.
@pytest.mark.parametrize(
    "spec, share, loops", [("web_mae.py:size=tiny", 0, 0), ("web_dino.py:size=tiny", 0.01, 1)]
)
def test_a_real_steps_flops_agree_with_its_jaxpr(spec, share, loops, monkeypatch, capsys):
    argv = ["--config", f"configs/{spec}", "--slice", "v5e-4", "--json"]
    code, out = run(monkeypatch, capsys, *argv)
    r = json.loads(out)
    assert code == 0 and r["fits"] and len(r["unknown_loops"]) == loops

    config = configs.load(f"configs/{spec}")
    method = methods.create(config)
    mesh = meshes.create(config.sharding, jax.devices()[:4])
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    guard, schedules = Guard.from_config(config.guard), run_schedules(config, method)
    step = make_train_step(method, optimizer, guard, schedules, mesh)
    cause = jax.ShapeDtypeStruct((), "int32")
    batch = method.batch_spec(config.global_batch)
    counted = jaxpr_flops.count(step, state, batch, cause)
    assert r["executed_flops"] == pytest.approx(counted, rel=share, abs=0.5)
