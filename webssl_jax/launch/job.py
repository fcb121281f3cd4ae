"""The training on the machines of a slice: source tree and environment, start, state, stop.

Everything goes through ``host.sh`` on each machine. It runs the training without a terminal, so a
connection that breaks stops nothing, and answers with one line a machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import shlex
import tarfile
import tempfile
from collections.abc import Mapping, Sequence

from webssl_jax.config import UserError
from webssl_jax.launch.gcloud import Gcloud, GcloudError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
_SHIPPED = ("webssl_jax", "configs", "tools", "setup.py", "pyproject.toml")
_HOST = "bash webssl_jax/webssl_jax/launch/host.sh"
_LINE = re.compile(r"WEBSSL (\S+) (\w+) (\S+) (\S+)")


@dataclasses.dataclass(frozen=True)
class Report:
    """How the training is on one machine. state: absent, running, exited or lost. digest: of its
    command."""

    host: str
    state: str
    code: int | None
    digest: str


def train_command(
    config: str, workdir: str, overrides: Sequence[str] = (), env: Sequence[str] = ()
) -> str:
    """The command that every machine runs, for a shell.

    Raises:
      UserError: for an ``env`` that is not NAME=VALUE.
    """
    for item in env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", item):
            raise UserError(f"--env {item}: write NAME=VALUE")
    arguments = [f"--config={config}", f"--workdir={workdir}"]
    arguments += [f"--config.{override}" for override in overrides]
    return shlex.join(["env", *env, "python", "-m", "webssl_jax.train", *arguments])


class Job:
    """One training command on all machines of ``name``.

    Args:
      mounts: (bucket, folder) pairs that every machine mounts when it is installed.
      sent: {place in the source tree on the machines: file that is sent with it}.
    """

    def __init__(
        self,
        gcloud: Gcloud,
        name: str,
        command: str,
        mounts: Sequence[tuple[str, str]] = (),
        sent: Mapping[str, pathlib.Path] | None = None,
    ):
        self.gcloud, self.name, self.command = gcloud, name, command
        self._mounts, self._sent = list(mounts), dict(sent or {})
        self._packed: tempfile.TemporaryDirectory | None = None
        self.digest = hashlib.md5(command.encode()).hexdigest()[:12]

    def install(self, hosts: int | None = None) -> None:
        """Brings the source tree and its environment to every machine; quick where they are. The
        tree is that of the first call, whatever is edited meanwhile.

        Raises:
          GcloudError: if fewer than ``hosts`` machines have it then.
        """
        if self._packed is None:
            self._packed = tempfile.TemporaryDirectory(prefix="webssl_jax-")
            self._archive, self._tree = pack(pathlib.Path(self._packed.name), self._sent)
        archive, digest = self._archive, self._tree
        self.gcloud.copy(self.name, str(archive))
        unpack = (
            f"rm -rf webssl_jax.new && mkdir webssl_jax.new && tar -xzf {archive.name} -C "
            "webssl_jax.new && rm -rf webssl_jax && mv webssl_jax.new webssl_jax"
        )
        # A running training keeps its tree.
        guard = f"if {_HOST} status 2>/dev/null | grep -q ' running '; then true; else {unpack}; fi"
        self._answers(f"{guard}; {_HOST} install {digest}", hosts, "installed|busy", seconds=1800)
        for bucket, folder in self._mounts:
            words = f"{shlex.quote(bucket)} {shlex.quote(folder)}"
            self._answers(f"{_HOST} mount {words}", hosts, "mounted", seconds=300)

    def start(self, token: str) -> list[Report]:
        """Starts it where it does not run. The same ``token`` again starts nothing twice."""
        return self._ask(f"start {token} {shlex.quote(self.command)}", quiet=False)

    def status(self) -> list[Report]:
        """One report for each machine that answered."""
        return self._ask("status")

    def stop(self, signal: str = "TERM") -> list[Report]:
        """TERM: it saves and ends with 75. KILL: at once, loaders too."""
        return self._ask(f"stop {signal}", quiet=False)

    def logs(self, lines: int) -> str:
        """The end of every machine's log; each line begins with the machine."""
        return self.gcloud.ssh(self.name, f"{_HOST} logs {lines}", quiet=True)

    def _ask(self, what: str, quiet: bool = True) -> list[Report]:
        text = self.gcloud.ssh(self.name, f"{_HOST} {what}", quiet=quiet)
        reports = {}
        for host, state, code, digest in _LINE.findall(text):
            reports[host] = Report(host, state, int(code) if code.isdigit() else None, digest)
        return [reports[host] for host in sorted(reports)]

    def _answers(self, command: str, hosts: int | None, wanted: str, seconds: float) -> None:
        text = self.gcloud.ssh(self.name, command, seconds=seconds)
        done = {host for host, state, *_ in _LINE.findall(text) if re.fullmatch(wanted, state)}
        if hosts is not None and len(done) < hosts:
            raise GcloudError(f"{len(done)} of {hosts} machines answered {wanted.split('|')[0]!r}")


def pack(folder: pathlib.Path, sent: Mapping[str, pathlib.Path]) -> tuple[pathlib.Path, str]:
    """The source tree, with ``sent`` in it, as ``folder/webssl_jax-DIGEST.tar.gz``, and its
    digest."""
    files = dict(sent)
    for top in _SHIPPED:
        path = ROOT / top
        found = [path] if path.is_file() else path.rglob("*")
        files |= {
            str(f.relative_to(ROOT)): f
            for f in found
            if f.is_file() and "__pycache__" not in f.parts
        }
    digest = hashlib.sha256()
    for place, file in sorted(files.items()):
        digest.update(place.encode() + file.read_bytes())
    archive = folder / f"webssl_jax-{digest.hexdigest()[:12]}.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for place, file in sorted(files.items()):
            tar.add(file, place)
    return archive, digest.hexdigest()[:12]
