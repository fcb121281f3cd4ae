"""tools/tpu.py as a person calls it, and host.sh on machines that are folders here."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.e2e.runner import ROOT
from tests.launch.conftest import bring_machines
from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.launch import gcloud, job
from webssl_jax.sharding import slices

HOST = ROOT / "webssl_jax" / "launch" / "host.sh"
GCLOUD = shutil.which("gcloud")  # before a test puts its stand-in on PATH
COMMON = ["run", "--zone=z", "--project=p"]
TINY = "configs/web_mae.py:size=tiny"
TRAINING = [f"--config={TINY}", "--workdir=/w", "--workdir-is-shared"]
LOCAL = [f"--config={TINY}", "--workdir=/mnt/bb/run", "--mount=b=/mnt/b"]
WANTED = ["--slice=v5e-16", "--price=2"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("tpu_tool", ROOT / "tools" / "tpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


TRAIN = """#!/bin/bash
echo "$PWD: $*"
trap 'echo saved; exit 75' TERM
code=$(head -n 1 "$HOME/codes"); sed -i 1d "$HOME/codes"
while [ "$code" = wait ]; do sleep 0.05; done
exit "$code"
"""


@pytest.fixture
def machines(world_on_path, tmp_path):
    """Two, whose training writes what it is given, and ends as the file ``codes`` says, one code an
    attempt; "wait" waits for SIGTERM, and ends with 75."""
    return bring_machines(world_on_path, tmp_path, TRAIN)


def _codes(machines, *codes):
    for home in machines.iterdir():
        (home / "codes").write_text("".join(f"{code}\n" for code in codes))


def _log(machines, name="run-w-0"):
    return (machines / name / "webssl_job" / "log").read_text()


def test_a_training_that_asks_to_be_started_again_is_and_everything_is_deleted(
    tool, machines, world_on_path, capsys
):
    _codes(machines, 75, 0)
    arguments = ["babysit", *COMMON, *WANTED, *TRAINING, "--max-hours=1", "--poll-seconds=0.1"]
    assert tool([*arguments, "--config.optim.lr=1e-3", "--env=A=b c"]) == 0
    assert world_on_path.read()["resources"] == {}
    for name in ("run-w-0", "run-w-1"):
        log = _log(machines, name)
        assert log.count("--- ") == 2
        wanted = "-m webssl_jax.train --config=web_mae:size=tiny --workdir=/w"
        assert log.count(f"{name}/webssl_jax: {wanted} --config.optim.lr=1e-3\n") == 2
    said = capsys.readouterr().out
    assert said.index("cost: v5e-16 spot = 16 chips x $2") < said.index("queued-resources create")
    assert "1 restarts asked for by the training" in said


def test_step_by_step_each_command_can_be_repeated(tool, machines, world_on_path, capsys):
    _codes(machines, "wait")
    for _ in range(2):
        assert tool(["create", *COMMON, *WANTED]) == 0
    assert len(world_on_path.calls("create")) == 1
    world_on_path.change(now=1.0)
    for _ in range(2):
        assert tool(["install", *COMMON]) == 0
    for _ in range(2):
        assert tool(["run", *COMMON, *TRAINING]) == 0
    assert _log(machines).count("--- ") == 1
    capsys.readouterr()
    tool(["status", *COMMON])
    assert "run-w-1: running" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs another command"):
        tool(["run", *COMMON, *TRAINING, "--config.optim.lr=1e-3"])
    tool(["stop", *COMMON])
    _until(lambda: "saved" in _log(machines) and "saved" in _log(machines, "run-w-1"))
    _until(lambda: (machines / "run-w-1" / "webssl_job" / "exit").exists())
    capsys.readouterr()
    tool(["status", *COMMON])
    assert "run-w-1: exited with 75" in capsys.readouterr().out
    tool(["logs", *COMMON, "--lines=1"])
    assert capsys.readouterr().out.splitlines() == ["run-w-0: saved", "run-w-1: saved"]
    tool(["exec", *COMMON, "--command=echo $WEBSSL_HOST"])
    assert "run-w-0\nrun-w-1" in capsys.readouterr().out
    for _ in range(2):
        assert tool(["delete", *COMMON]) == 0
    assert world_on_path.read()["resources"] == {}


def test_a_dry_run_prints_every_command_and_runs_none(tool, world_on_path, capsys):
    arguments = ["babysit", *COMMON, "--slice=v5p-256", "--price=1", "--max-dollars=1000"]
    training = ["--config=configs/web_dino.py:size=7b", "--workdir=/mnt/b/run", "--dry-run"]
    several = ["--slices=2", "--config.sharding.replica=2", "--mount=gs://b=/mnt/b"]
    assert tool([*arguments, *training, *several, "--create-flag=--network=n"]) == 0
    assert not pathlib.Path(f"{world_on_path.path}.calls").exists()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ gcloud")]
    verbs = [line.split()[4:6] for line in printed]
    assert [verb for _, verb in verbs] == [
        "describe",
        "create",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ]
    assert printed[1] == (
        "$ gcloud compute tpus queued-resources create run --accelerator-type=v5p-256 "
        "--runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=run --spot --network=n "
        "--async --zone=z --project=p --quiet"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["create", "--slice=v5e-16"], "give either --price DOLLARS"),
        (["create", "--slice=tpu7x-64", "--price=1"], "only in GKE"),
        (["create", "--slice=v5e-17", "--price=1"], "the nearest are v5e-16, v5e-32"),
        (["create", "--tier=spott", *WANTED], "did you mean 'spot'"),
        (["babysit", *WANTED, *TRAINING], "give its budget"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=9", "--spent-hours=-1"], "not less than 0"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=9", "--spent-hours=1", "--meter=a"], "leave"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=9", "--config.optim.lrr=1"], "optim.lr"),
        (["babysit", *WANTED, "--max-hours=9", f"--config={TINY}"], "give --config and --workdir"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=9", "--slices=2"], "multiple of the 2 slic"),
        (["resume", *WANTED, *TRAINING, "--config.global_batch=24"], "do not divide over 16 batch"),
        (["run", f"--config={TINY}", "--workdir=runs/a"], "give an absolute path"),
        (["run", *TRAINING, "--env=A"], "write NAME=VALUE"),
        (["install", "--mount=bucket"], "write BUCKET=/FOLDER"),
        (["run", *TRAINING], "not there; it must be ACTIVE"),
        (["babysit", *WANTED, *LOCAL, "--max-hours=9"], "/mnt/bb/run: is in no folder of --mount"),
        (["resume", *WANTED, *LOCAL], "would be deleted with the machines"),
        (["resume", *WANTED, *LOCAL, "--workdir=/mnt/b/../x"], "is in no folder of --mount"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=nan"], "--max-hours nan: give a finite"),
        (["babysit", *WANTED, *TRAINING, "--max-hours=inf"], "--max-hours inf: give a finite"),
        (["babysit", *WANTED, *TRAINING, "--max-dollars=nan"], "--max-dollars nan: give a fin"),
        (["babysit", *WANTED, *TRAINING, "--max-dollars=-1"], "--max-dollars -1.0: give a fin"),
        (["resume", *WANTED, *TRAINING, "--poll-seconds=nan"], "--poll-seconds nan: give a fin"),
        (["watch", "--poll-seconds=0"], "--poll-seconds 0.0: give a finite"),
        (["create", "--slice=v5e-16", "--price=nan"], "--price nan: give dollars"),
        (["create", "--slice=v5e-16", "--price=0"], "--price 0.0: give dollars"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_created(tool, world, arguments, words):
    with pytest.raises(UserError, match=words):
        tool([arguments[0], *COMMON, *arguments[1:]])
    assert world.read()["asked"] == 0


def test_a_config_file_of_the_user_is_sent_with_what_it_imports(
    tool, machines, world_on_path, tmp_path
):
    _codes(machines, 0)
    mine = tmp_path / "my configs"
    (mine / "parts").mkdir(parents=True)
    (mine / "a.py").write_text(
        "from webssl_jax.configs import web_mae\n"
        "from .parts.seed import SEED\n"
        "def get_config(arg):\n"
        "    config = web_mae.get_config(arg)\n"
        "    config.seed = SEED\n"
        "    return config\n"
    )
    (mine / "parts" / "seed.py").write_text("SEED = 7\n")
    (mine / "other.py").write_text("")
    training = [f"--config={mine}/a.py:size=tiny", "--workdir=/w", "--workdir-is-shared"]
    arguments = ["babysit", *COMMON, *WANTED, *training, "--max-hours=1", "--poll-seconds=0.1"]
    assert tool(arguments) == 0
    tree = machines / "run-w-1" / "webssl_jax"
    assert "--config=own_config/a.py:size=tiny --workdir=/w\n" in _log(machines, "run-w-1")
    assert configs.load(f"{tree}/own_config/a.py:size=tiny").seed == 7
    assert sorted(file.name for file in (tree / "own_config").rglob("*.py")) == ["a.py", "seed.py"]


MAE = "from webssl_jax.configs.web_mae import get_config as mae\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (f"{MAE}import beside\ndef get_config(a): return mae(a)\n", "a.py:2: import of beside"),
        (
            f"{MAE}import pathlib\ndef get_config(a):\n"
            "  pathlib.Path(__file__).with_name('a.txt').read_text()\n  return mae(a)\n",
            "what it imports are sent .*fails there .own_config/a.py:4: FileNotFoundError",
        ),
        (
            f"{MAE}def get_config(a):\n  c = mae(a)\n  c.name = __file__\n  return c\n",
            "gives another config in another folder",
        ),
        (
            f"{MAE}def get_config(a):\n  c = mae(a)\n"
            "  c.evals = {'x': {'kind': 'beside:Kind'}}\n  return c\n",
            "config.evals.x.kind = beside:Kind: the machines will not have",
        ),
        (
            f"{MAE}def get_config(a):\n  c = mae(a)\n  c.data.train = 'my/*'\n  return c\n",
            "config.data.train = my/.*: give an absolute path, seen by all machines",
        ),
    ],
)
def test_a_config_that_machines_will_not_have_is_refused_before_anything_costs(
    tool, world, tmp_path, monkeypatch, text, words
):
    (tmp_path / "on path").mkdir()
    (tmp_path / "on path" / "beside.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "on path"))
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.py").write_text(text)
    training = [f"--config={tmp_path}/a.py:size=tiny", "--workdir=/w", "--workdir-is-shared"]
    with pytest.raises(UserError, match=words):
        tool(["babysit", *COMMON, *WANTED, *training, "--max-hours=1"])
    assert world.read()["asked"] == 0


def test_prices_come_from_a_file_by_generation_and_tier(tool, world, tmp_path, capsys):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"v5e": {"reserved": 0.5}}))
    wanted = ["--slice=v5e-16", f"--prices={file}"]
    assert tool(["create", *COMMON, *wanted, "--tier=reserved"]) == 0
    assert "16 chips x $0.5 an hour = $8.00 an hour" in capsys.readouterr().out
    assert "--reserved" in world.calls("create")[0]
    with pytest.raises(UserError, match="has no 'spot'"):
        tool(["create", *COMMON, *wanted])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0", "-1", "true", '"1"', "[]"])
def test_a_price_in_a_file_is_a_number_above_zero(tool, world, tmp_path, value):
    file = tmp_path / "prices.json"
    file.write_text(f'{{"v5e": {{"spot": {value}}}}}')
    with pytest.raises(UserError, match="v5e spot = .* is not a price"):
        tool(["create", *COMMON, "--slice=v5e-16", f"--prices={file}"])
    assert world.read()["asked"] == 0


# Under nohup SIGHUP is ignored, and a process inherits that.
_HEARS = (
    "import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_closed_terminal_is_told_as_ctrl_c_is(world_on_path):
    world_on_path.change(queue=[1e6])
    arguments = ["babysit", *COMMON, *WANTED, *TRAINING, "--max-hours=1"]
    command = [sys.executable, "-c", _HEARS, "tools/tpu.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        limit = threading.Timer(120, process.kill)  # one that does not hear would wait for ever
        limit.start()
        said = ""
        for line in process.stdout:  # to its end: who stops reading breaks the pipe it writes to
            said += line
            if "queued-resources create" in line:
                _until(lambda: world_on_path.read()["asked"])
                process.send_signal(signal.SIGHUP)
    limit.cancel()
    assert "STILL THERE: run is WAITING_FOR_RESOURCES" in said
    assert process.returncode == 130


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _host(home, *words):
    env = dict(os.environ, HOME=str(home), WEBSSL_HOST="h")
    done = subprocess.run(["bash", str(HOST), *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[2:4]


def test_a_machine_tells_running_exited_and_lost_apart_and_starts_an_attempt_once(tmp_path):
    assert _host(tmp_path, "status") == ["absent", "-"]
    assert _host(tmp_path, "start", "1", "sleep 60") == ["running", "-"]
    assert _host(tmp_path, "start", "2", "sleep 61") == ["running", "-"]  # not beside it
    assert _host(tmp_path, "stop", "KILL") == ["exited", "137"]
    assert _host(tmp_path, "start", "3", "bash -c 'exit 7'")[0] in ("running", "exited")
    _until(lambda: _host(tmp_path, "status") == ["exited", "7"])
    assert _host(tmp_path, "start", "3", "bash -c 'exit 7'") == ["exited", "7"]
    assert _host(tmp_path, "start", "4", "sleep 60") == ["running", "-"]
    (tmp_path / "webssl_job" / "boot").write_text("another")  # the machine was started anew
    assert _host(tmp_path, "status") == ["lost", "-"]
    pid = (tmp_path / "webssl_job" / "pid").read_text().strip()
    subprocess.run(["pkill", "-KILL", "--session", pid], check=True)


def test_the_command_keeps_its_words_whatever_is_in_them():
    command = job.train_command("c.py:size=7b", "/a b", ["data.train=/x/*.arrayrecord"], ["X=1 2"])
    words = subprocess.run(
        ["bash", "-c", f"set -f; printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:2] == ["env", "X=1 2"]
    assert words[-2:] == ["--workdir=/a b", "--config.data.train=/x/*.arrayrecord"]


@pytest.mark.skipif(GCLOUD is None, reason="gcloud is not installed here")
def test_the_real_gcloud_knows_every_command_and_flag_that_is_run(tmp_path, monkeypatch):
    """Each command as it is run, and one flag that does not exist: gcloud then names the flags that
    it does not know, and does nothing."""
    commands = []

    def execute(command, seconds):
        commands.append(command)
        answer = '{"name": "run", "networkEndpoints": []}'
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(gcloud, "execute", execute)
    cloud = gcloud.Gcloud("z", "p", ssh_flags=["--tunnel-through-iap"], say=lambda words: None)
    cloud.describe("run")
    cloud.hosts(gcloud.Resource("run", "ACTIVE", "v5p-8", ("run",), ""))
    cloud.ssh("run", "ls")
    cloud.copy("run", "file")
    cloud.delete("run")
    v5p = slices.find("v5p-8")
    cloud.create(gcloud.Request("run", v5p, flags=("--network=n", "--internal-ips")))
    cloud.create(gcloud.Request("run", v5p, 2, "reserved"))
    quiet = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
    environment = os.environ | quiet
    for command in commands:
        says = subprocess.run(
            [GCLOUD, *command[1:], "--qqqq"], env=environment, capture_output=True, text=True
        ).stderr
        (line,) = [line for line in says.splitlines() if line.startswith("ERROR:")]
        assert line.rstrip().endswith("unrecognized arguments: --qqqq"), (command, says)
