"""A world in which gcloud is tests/launch/stand_in.py, and time passes only in sleeps."""

import json
import os
import pathlib
import runpy
import stat
import subprocess
import sys

import pytest

from webssl_jax.launch import gcloud, job
from webssl_jax.launch.babysitter import Babysitter
from webssl_jax.launch.cost import Cost
from webssl_jax.launch.gcloud import Gcloud, Request
from webssl_jax.launch.job import Job
from webssl_jax.sharding import slices

SCRIPT = pathlib.Path(__file__).with_name("stand_in.py")
STAND_IN = runpy.run_path(str(SCRIPT))
BLANK = STAND_IN["WORLD"]


COMMAND = "env python -m webssl_jax.train --config=c --workdir=/w"


class World:
    """The stand-in's world, and a clock whose sleeps move it."""

    def __init__(self, path):
        self.path, self.said = path, []
        self.limit = 60 * 24 * 3600  # a loop without an end is an error, not a hang
        self.interrupt_at = None
        path.write_text(json.dumps(BLANK))

    def read(self):
        return json.loads(self.path.read_text())

    def change(self, **values):
        assert set(values) <= set(BLANK), values
        self.path.write_text(json.dumps(self.read() | values))

    def calls(self, *words):
        """Every call with all of these words, in order."""
        lines = pathlib.Path(f"{self.path}.calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if all(word in call for word in words)]

    def now(self):
        return self.read()["now"]

    def sleep(self, seconds):
        assert seconds > 0
        now = self.now() + seconds
        assert now < self.limit, "this never ends:\n" + "\n".join(self.said[-20:])
        self.change(now=now)
        if self.interrupt_at is not None and now >= self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt

    def say(self, words):
        self.said.append(words)

    @property
    def text(self):
        return "\n".join(self.said)

    def babysitter(
        self,
        *,
        name="run",
        slice="v5e-16",
        count=1,
        price=2.0,
        mounts=(),
        command=COMMAND,
        **settings,
    ):
        cloud = Gcloud("z", "p", say=self.say)
        request = Request(name, slices.find(slice), count)
        training = Job(cloud, name, command, mounts)
        settings = {"max_hours": 10_000, "poll_seconds": 600, "clock": self} | settings
        return Babysitter(cloud, request, training, Cost(request, price), say=self.say, **settings)


@pytest.fixture
def world_on_path(tmp_path, monkeypatch):
    """The stand-in is a program, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "gcloud"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {SCRIPT} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path / "world.json"))
    monkeypatch.setattr(job, "_SHIPPED", ("webssl_jax/launch", "pyproject.toml", "setup.py"))
    return World(tmp_path / "world.json")


def bring_machines(world, folder, python, count=2):
    """Commands sent to machines really run, in a folder each, which this returns the folder of.
    Their python3 brings an environment whose python is the script ``python``."""
    machines = folder / "machines"
    training, python3 = folder / "training", folder / "bin" / "python3"
    training.write_text(python)
    python3.write_text(
        "#!/bin/bash\n"
        'case "$*" in "-m uv venv"*)\n'
        f'    mkdir -p "${{@: -1}}/bin"; cp {training} "${{@: -1}}/bin/python" ;;\n'
        "esac\n"
    )
    for file in (training, python3):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    world.change(local=str(machines), queue=[0.0], hosts=count)
    for number in range(count):
        (machines / f"run-w-{number}").mkdir(parents=True)
    return machines


@pytest.fixture
def world(world_on_path, monkeypatch):
    """The stand-in is called where a process would be started."""

    def execute(command, seconds):
        assert command[0] == "gcloud"
        code, out, err = STAND_IN["main"](command[1:])
        if code is None:
            world_on_path.sleep(seconds)
            raise subprocess.TimeoutExpired(command, seconds, out.encode())
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(gcloud, "execute", execute)
    return world_on_path
