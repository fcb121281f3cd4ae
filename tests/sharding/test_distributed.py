"""Joining the processes of a run, and what all do when one of them fails."""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest

from webssl_jax import cli, runs
from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.sharding import distributed, rendezvous

ROOT = pathlib.Path(__file__).parent.parent.parent
NO_FLAGS = argparse.Namespace(coordinator=None, num_processes=None, process_id=None)


class FakeJax:
    """What ``initialize`` sees of jax: the platforms, and a cluster that is found or not."""

    def __init__(self, monkeypatch, platforms, error=None, processes=1):
        self.calls, self.error, self.found = [], error, False
        monkeypatch.setattr(jax.distributed, "initialize", self.initialize)
        monkeypatch.setattr(rendezvous, "meet", lambda *args: self.calls.append("met"))
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: self.found)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(
            distributed, "_start_failure_monitor", lambda: self.calls.append("monitor")
        )
        monkeypatch.setattr(distributed, "jax", argparse.Namespace(**vars(jax)), raising=True)
        distributed.jax.config = argparse.Namespace(values={"jax_platforms": platforms})

    def initialize(self, *args):
        self.calls.append(args)
        if self.error:
            raise self.error
        self.found = True


@pytest.mark.parametrize("platforms", ["cpu", None, "cuda,cpu"])
def test_without_tpus_nobody_looks_for_a_pod(monkeypatch, platforms):
    fake = FakeJax(monkeypatch, platforms)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    distributed.initialize(NO_FLAGS)
    assert fake.calls == []


@pytest.mark.parametrize("platforms", ["tpu,cpu", "tpu"])
def test_on_tpus_jax_finds_the_pod_without_the_help_of_variables(monkeypatch, platforms):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    fake = FakeJax(monkeypatch, platforms, processes=4)
    distributed.initialize(NO_FLAGS)
    assert fake.calls == [(), "monitor"]


def test_a_tpu_machine_without_a_cluster_is_a_single_host(monkeypatch):
    fake = FakeJax(monkeypatch, "tpu,cpu", ValueError("coordinator_address should be defined."))
    distributed.initialize(NO_FLAGS)
    assert fake.calls == [()]


def test_any_other_failure_to_join_is_not_taken_for_a_single_host(monkeypatch):
    FakeJax(monkeypatch, "tpu,cpu", ValueError("unsupported worker-network-endpoints format"))
    with pytest.raises(ValueError, match="worker-network-endpoints"):
        distributed.initialize(NO_FLAGS)


def test_a_host_of_a_pod_that_found_no_other_is_refused(monkeypatch):
    FakeJax(
        monkeypatch, "tpu,cpu", ValueError("coordinator_address should be defined."), processes=4
    )
    with pytest.raises(UserError, match="one of 4 of a TPU pod.*--coordinator"):
        distributed.initialize(NO_FLAGS)


def test_the_flags_name_the_processes_on_any_platform(monkeypatch):
    fake = FakeJax(monkeypatch, "cpu", processes=2)
    distributed.initialize(argparse.Namespace(coordinator="host:1", num_processes=2, process_id=1))
    assert fake.calls == ["met", ("host:1", 2, 1), "monitor"]


@pytest.mark.parametrize(
    "flags, message",
    [(("host:1", None, 0), "belong together"), (("host:1", 2, 2), r"must lie in 0\.\.1")],
)
def test_flags_that_do_not_fit_are_refused(monkeypatch, flags, message):
    fake = FakeJax(monkeypatch, "cpu")
    names = ("coordinator", "num_processes", "process_id")
    with pytest.raises(UserError, match=message):
        distributed.initialize(argparse.Namespace(**dict(zip(names, flags, strict=True))))
    assert fake.calls == []


def test_the_jax_in_use_says_that_it_found_no_cluster_in_the_expected_words():
    code = (
        "import jax\n"
        "try:\n    jax.distributed.initialize()\n"
        "except ValueError as error:\n    print(error)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "KUBER"))}
    result = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60
    )
    assert "coordinator_address should be defined" in result.stdout, result.stderr


GLOO = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:2744")
CLOSED = jax.errors.JaxRuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    "error, told, code, line",
    [
        (CLOSED, "2 1 its disk is full", 2, "process 1 failed, so all end: its disk is full"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), "1 0 my own", 1, None),
        (CLOSED, None, 75, f"another process was killed, or its machine is gone ({CLOSED}); start"),
        (GLOO, None, 75, f"another process was killed, or its machine is gone ({GLOO}); start"),
        (TypeError("a bug"), "2 1 its disk is full", 1, None),
    ],
)
def test_a_collective_that_failed_with_another_process_prints_the_error_of_that_one(
    monkeypatch, capfd, error, told, code, line
):
    """Before the thread that polls once a second has found it."""

    class Client:
        def key_value_try_get(self, key):
            if told is None:
                raise jax.errors.JaxRuntimeError("NOT_FOUND")
            return told

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(distributed, "_POLL_SECONDS", 0)
    monkeypatch.setattr(distributed, "_report_failure", lambda error, code, line: end(code))
    monkeypatch.setattr(
        cli, "_before_traceback", [functools.partial(distributed._exit_if_other_failed, Client())]
    )
    with pytest.raises(SystemExit) as ended:
        try:
            raise error
        except Exception as met:
            cli._fail_with_traceback(met)  # cli.run would change this process's logging for good
    printed = capfd.readouterr().err
    assert ended.value.code == code
    if line is None:
        assert "Traceback" in printed
    else:
        assert printed.startswith(f"error: {line}") and printed.count("\n") == 1


def test_one_process_alone_raises_its_own_error_and_shares_with_itself(tmp_path):
    distributed.raise_on_all(None)
    with pytest.raises(UserError, match="mine"):
        distributed.raise_on_all(UserError("mine"))
    distributed.check_shared(tmp_path / "need not exist")


@pytest.mark.parametrize(
    "overrides, differ",
    [
        (["optim.lr=1"], ["config.optim.lr"]),
        (["seed=1", "global_batch=32"], ["config.global_batch", "config.seed"]),
        (["data.threads=3", "data.train=elsewhere", "checkpoint.local_folder=/mnt/2"], []),
    ],
)
def test_what_processes_compare_is_all_that_changes_a_step(overrides, differ):
    here, there = (
        runs.settings(configs.load("web_mae:size=tiny", some), {"replay": None})
        for some in ([], overrides)
    )
    assert here.keys() == there.keys() and len(here) > 80
    assert sorted(name for name in here if here[name] != there[name]) == differ
    assert {"the code of webssl_jax", "the version of jax", "--replay"} < here.keys()


def _meet(calls, seconds=5.0):
    """What each of ``calls`` (address, processes, process) met: "all", or its error."""

    def one(call):
        try:
            rendezvous.meet(*call, seconds)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return "all"

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_processes_that_meet_go_on_and_those_that_do_not_are_told_in_one_line():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    assert _meet([(address, 3, process) for process in (2, 0, 1)]) == ["all"] * 3
    (alone,) = _meet([(address, 4, 0)], 0.1)
    assert alone.startswith(f"TransientError: --coordinator {address}: of 4 processes these have")
    assert "not come: 1, 2, 3;" in alone
    (lost,) = _meet([(address, 2, 1)], 0.1)
    assert lost.startswith(f"TransientError: --coordinator {address}: process 0 does not answer")
    first, second = _meet([(address, 2, 0), (address, 3, 1)])
    assert "process 1 has --num-processes 3, process 0 2" in first and first[-50:] in second
    found = _meet([(address, 3, 0), (address, 3, 1), (address, 3, 1)])
    assert sum("two processes have --process-id 1" in says for says in found) == 3
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (says,) = _meet([(f"localhost:{port}", 2, 0)])
    assert says.startswith(f"UserError: --coordinator localhost:{port}: port {port} cannot be used")
    for wrong in ("localhost", "localhost:", "localhost:x", ":1", "localhost:99999"):
        assert _meet([(wrong, 2, 0)]) == [f"UserError: --coordinator {wrong}: write HOST:PORT"]


@pytest.mark.parametrize("platform", ["cuda", "banana"])
def test_a_platform_that_jax_cannot_use_is_one_line_and_2(platform):
    code = "import jax; from webssl_jax import cli; cli.run(jax.devices)"
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: JAX_PLATFORMS={platform}: jax cannot use this platform here" in result.stderr


# Two real processes of four devices each, in a mesh whose order is not theirs.
SCRIPT = """
import argparse, pathlib, sys
import jax, numpy as np
from ml_collections import ConfigDict
from webssl_jax import cli
from webssl_jax.config import TransientError, UserError
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes

port, me, root = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
distributed.initialize(
    argparse.Namespace(coordinator=f"localhost:{port}", num_processes=2, process_id=me)
)

for order in ((0, 1, 4, 5, 7, 6, 3, 2), (5, 0, 6, 3, 1, 7, 2, 4)):
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = [devices[i] for i in order]
    for fsdp, tensor in ((8, 1), (4, 2), (1, 8)):
        grid = np.array(devices).reshape(1, fsdp, tensor)
        mesh = jax.sharding.Mesh(grid, meshes.AXES)
        whole = np.arange(32.0, dtype=np.float32).reshape(16, 2)
        rows = meshes.local_rows(mesh, 16)
        array = meshes.to_global({"x": whole[rows]}, mesh)["x"]
        assert array.shape == whole.shape, array.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        if fsdp == 8:  # not an aligned block
            assert len(rows) == 8 and (rows[0] % 8 or np.any(np.diff(rows) > 1)), rows


def report(name, call, *args):
    try:
        call(*args)
        words = "ok"
    except UserError as error:
        words = ("later: " if isinstance(error, TransientError) else "") + str(error)
    sys.stdout.write(f"{name} {words}\\n")  # in one piece: Gloo prints between pieces
    sys.stdout.flush()


report("none", distributed.raise_on_all, None)
report("second", distributed.raise_on_all, UserError("shard 7 is gone") if me == 1 else None)
report("later", distributed.raise_on_all, TransientError("shard 7") if me == 1 else None)
report("same", distributed.check_same, {"config.seed": "0", "the records": "64"})
report("other", distributed.check_same, {"config.seed": "0", "the records": str(64 + 16 * me)})
report("more", distributed.check_same, {"config.seed": "0"} | ({"config.x": "1"} if me else {}))
report("both", distributed.raise_on_all, UserError(f"mine {me}"))
report("shared", distributed.check_shared, root / "shared")
report("apart", distributed.check_shared, root / f"own{me}")
report("missing", distributed.check_shared, root / "missing")
"""


def test_two_processes_assemble_batches_and_raise_on_both(tmp_path):
    for folder in ("shared", "own0", "own1"):
        (tmp_path / folder).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-c", SCRIPT, str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in (0, 1)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    first, second = (dict(x.split(" ", 1) for x in out.splitlines()) for out, _ in results)
    assert first["none"] == second["none"] == "ok"
    assert first["second"] == "process 1 stopped: see its line"
    assert second["second"] == "shard 7 is gone"
    # Both end with the exit code of the one that failed: trouble that passes stays that.
    assert first["later"] == "later: process 1 stopped: see its line"
    assert second["later"] == "later: shard 7"
    assert first["same"] == second["same"] == "ok"
    assert first["other"] == second["other"] and first["more"] == second["more"]
    assert re.fullmatch(
        r"the records is 80 on process 1 \(host \S+\) and 64 on process 0 \(host \S+\); start all "
        "processes with the same command, code and data",
        first["other"],
    )
    assert first["more"].startswith("config.x is 1 on process 1")
    assert (first["both"], second["both"]) == ("mine 0", "mine 1")
    assert first["shared"] == second["shared"] == "ok"
    for line, folder in ((first["apart"], "own0"), (second["apart"], "own1")):
        assert line == (
            f"--workdir {tmp_path / folder}: process 1 does not see the files of process 0; "
            "it must be a folder that all hosts share"
        )
    assert "cannot write there: No such file or directory" in first["missing"]
    assert second["missing"] == "process 0 stopped: see its line"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # no token stays
