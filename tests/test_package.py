"""The package as it is installed: a checkout on the path, an editable install, and a wheel alone.

The scratch environments see the packages of the one that runs the tests, by a .pth file that only
adds their folder: an editable install of this project in it is not found that way.
"""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.e2e.runner import ROOT
from webssl_jax import console

# The quick start, smaller. Evaluated once, by its own command.
SMALL = {
    "model.size": "micro",
    "method.view.image_size": 32,
    "method.decoder.width": 32,
    "method.decoder.heads": 2,
    "global_batch": 32,
    "sharding.max_unsharded_fraction": 0.2,
    "pictures.kinds": "none",
    **{f"evals.{row}": "none" for row in ("probe", "knn_grey", "probe_grey")},
    "evals.knn.max_images": 300,
    "eval_batch": 32,
}


class Installed:
    """A scratch environment in ``folder`` with ``what`` pip installs there.

    shared: with the packages of this environment beside it, and none from the network.
    """

    def __init__(self, folder, *what, shared=True):
        self.work, self.bin = folder / "work", folder / "venv" / "bin"
        self.work.mkdir()
        venv.create(folder / "venv", with_pip=False)
        base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        self.packages = pathlib.Path(sysconfig.get_path("purelib", "venv", base))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
        pip += [str(folder / "venv"), "install", "--quiet"]
        if shared:
            paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
            (self.packages / "shared.pth").write_text("\n".join(sorted(paths)) + "\n")
            pip += ["--no-index", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, *what], check=True, cwd=self.work, timeout=1800)

    def run(self, program, *arguments, path=""):
        """``webssl`` or ``python``, in a folder that has nothing of the repository."""
        return subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            cwd=self.work,
            env=os.environ | {"PYTHONPATH": str(path), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            text=True,
            capture_output=True,
            timeout=900,
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a wheel is built from. A copy, because building leaves files."""
    folder = tmp_path_factory.mktemp("source")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("webssl_jax", "configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=junk)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"), str(wheel))


def files(folder, pattern="*"):
    found = [path for path in folder.rglob(pattern) if path.is_file()]
    return [path for path in found if "__pycache__" not in path.parts]


def test_a_wheel_holds_every_file_of_the_package_and_takes_one_name(source, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"webssl_jax"}
    wanted = {f"webssl_jax/{path.relative_to(source)}" for path in files(source / "configs")}
    wanted |= {f"webssl_jax/{path.relative_to(source)}" for path in files(source / "tools", "*.py")}
    wanted |= {str(path.relative_to(source)) for path in files(source / "webssl_jax")}
    assert names == wanted
    for folder in ("configs", "tools"):  # the folder itself, not what stands for it in a checkout
        inside = zipfile.ZipFile(wheel).read(f"webssl_jax/{folder}/__init__.py")
        assert inside == (source / folder / "__init__.py").read_bytes()


WHERE = """
import importlib.metadata, json, sys
import webssl_jax
from webssl_jax import config
from webssl_jax.configs import web_mae
from webssl_jax.tools import bench_checkpoint
loaded = config.load("web_mae:size=tiny")
modules = {name: module.__file__ for name, module in sys.modules.items()
           if name.split(".")[0] in ("webssl_jax", "configs", "tools")}
print(json.dumps([webssl_jax.__version__, importlib.metadata.version("webssl_jax"), modules]))
"""


@pytest.mark.parametrize(
    "way", ["checkout", "wheel", pytest.param("editable", marks=pytest.mark.slow)]
)
def test_configs_and_tools_have_one_name_however_they_are_installed(
    way, source, wheel, installed, tmp_path
):
    here, path, top = installed, "", installed.packages / "webssl_jax"
    if way == "editable":
        here, top = Installed(tmp_path, "--editable", str(source)), source
    if way == "checkout":  # of the same wheel, which is not taken then
        path, top = source, source
    done = here.run("python", "-c", WHERE, path=path)
    assert done.returncode == 0, done.stderr
    version, known, modules = json.loads(done.stdout)
    assert version == known
    assert modules["webssl_jax.configs.common"] == str(top / "configs" / "common.py")
    assert modules["webssl_jax.tools.bench_checkpoint"] == str(top / "tools/bench_checkpoint.py")
    assert all(pathlib.Path(file).is_relative_to(top) for file in modules.values()), modules
    tool = top / "tools" / "bench_checkpoint.py"
    for flags in (["-m", "webssl_jax.tools.bench_checkpoint"], [tool]):
        assert "plain copy of the same bytes" in here.run("python", *flags, "-h", path=path).stdout
    done = here.run("webssl", "bench-checkpoint", "-h", path=path)
    assert done.stdout.startswith("usage: webssl bench-checkpoint ") and done.returncode == 0


def run_the_quick_start(here, **settings):
    """20 steps, an evaluation and an export; returns the workdir."""
    settings = {"total_steps": 20, "checkpoint.every_steps": 20} | settings
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    run = here.work / "run"
    done = here.run("webssl", "train", "--config", "quickstart", "--workdir", run, *overrides)
    assert done.returncode == 0, done.stderr
    assert f"({here.packages}/webssl_jax/corpus/" in done.stderr
    done = here.run("webssl", "evaluate", "--model", run, "--evals.knn.max_images=200")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^run, step 20 +0\.\d+ ± 0\.\d+", done.stdout, re.M), done.stdout
    done = here.run("webssl", "evaluate", "--model", run, "--evals", "korpus")
    assert done.returncode == 2 and "did you mean 'corpus'?" in done.stderr, done.stderr
    done = here.run(
        "webssl", "export", "--workdir", run, "--format=hf-vit", "--output", here.work / "export"
    )
    assert done.returncode == 0, done.stderr
    assert (here.work / "export" / "model.safetensors").stat().st_size > 100_000
    assert (run / "checkpoints" / "20").is_dir()
    return run


def test_a_wheel_alone_trains_evaluates_and_exports(installed):
    where = installed.run("python", "-c", "import webssl_jax; print(webssl_jax.__file__)").stdout
    assert where.strip() == str(installed.packages / "webssl_jax" / "__init__.py")
    run = run_the_quick_start(installed, **SMALL)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["git_revision"] == "unknown"
    done = installed.run("webssl", "plan", "--help")
    assert done.returncode == 0 and "--slice" in done.stdout


@pytest.mark.parametrize(
    "command, says",
    [
        ("trian", "error: trian: no such command; did you mean 'train'? (known: bench_checkpoint,"),
        ("", "error: no command; webssl --help"),
        ("train --config configs/clip.py --workdir x", "the shipped config is --config clip"),
        ("plan-table", "docs: no such folder; the table is the repository's"),
        ("calibrate-plan", "docs: no such folder; the table is the repository's"),
        ("tpu install x --zone z", "error: install: brings a checkout to the machines"),
    ],
)
def test_what_a_wheel_cannot_do_is_one_line(installed, command, says):
    done = installed.run("webssl", *command.split())
    assert done.returncode == 2 and says in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_list_of_commands_is_quick(installed):
    """It imports nothing that takes time; 0.5 s would be felt."""
    look = "import sys; from webssl_jax import console; sys.argv = ['webssl', '--help']\n"
    look += "try: console.main()\nfinally: print(sorted(sys.modules))"
    done = installed.run("python", "-c", look)
    assert done.returncode == 0, done.stderr
    listed, modules = done.stdout.rsplit("\n[", 1)
    for package in ("jax", "numpy", "ml_collections", "absl"):
        assert f"'{package}'" not in modules
    assert re.findall(r"^  (\w+)  ", listed, re.M) == list(console.COMMANDS)
    assert installed.run("python", "-m", "webssl_jax", "-h").stdout == f"{listed}\n"
    assert installed.run("webssl", "--help").stdout == f"{listed}\n"
    assert re.fullmatch(r"webssl \d+\.\d+\.\d+\n", installed.run("webssl", "--version").stdout)


def test_every_tool_is_a_command_and_takes_its_arguments_in_one_way():
    mains = {}
    for file in (ROOT / "tools").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                mains[file.stem] = ast.unparse(node.args)
    assert mains.keys() == console.TOOLS.keys()
    assert set(mains.values()) == {"argv: list[str] | None=None"}


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_trains_evaluates_plans_and_exports(wheel, tmp_path):
    """With the packages that tools/constraints.txt names, from where pip finds them."""
    constraints = str(ROOT / "tools" / "constraints.txt")
    fresh = Installed(tmp_path, "--constraint", constraints, f"{wheel}[plan]", shared=False)
    run_the_quick_start(fresh)
    done = fresh.run("webssl", "plan", "--config", "web_mae:size=tiny", "--slice", "v5e-4")
    assert done.returncode == 0 and "peak HBM a device" in done.stdout, done.stderr
