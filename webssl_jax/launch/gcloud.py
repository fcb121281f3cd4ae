"""gcloud's queued resources: asked about, created, entered, deleted.

One queued resource is one or several slices that come and go together. Whatever is to be known
about it is asked from gcloud each time; nothing is kept in a file here, which could be wrong.

The commands, their flags and the states are those of Google's reference (``gcloud compute tpus
queued-resources {create,describe,delete,ssh,scp}`` and ``tpu-vm describe``; REST v2
``QueuedResource``). A test has gcloud itself say that it knows commands and flags; what they do was
read, not run: nobody here has a project.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

from webssl_jax.config import UserError, suggest
from webssl_jax.sharding.slices import Slice

# docs.cloud.google.com/tpu/docs/runtimes; tpu7x is not to be had as a queued resource.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
TIERS = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}

# States of a queued resource.
ACTIVE = "ACTIVE"
GONE = ("SUSPENDING", "SUSPENDED", "FAILED")  # preempted, deleted by the service, or never filled
COSTS = ("PROVISIONING", "ACTIVE", "SUSPENDING", "DELETING")  # machines may exist
# Words of a create command that failed only because there are no chips now.
_STOCK_OUT = ("no more capacity", "not enough resources", "stockout", "currently unavailable")
# Words of a command that may work later although nobody changes anything: the service, the line, or
# a quota that others use now. In lower case.
_TRANSIENT = re.compile(
    r"(error|status|code)\W{0,3}5\d\d\b|\bunavailable:|service is unavailable|internal error"
    r"|\binternal:|deadline.?exceeded|timed out|timeout|connection|quota|resource.?exhausted"
)


class GcloudError(Exception):
    """A gcloud command that failed or took too long; another try may work. The message is its last
    line."""

    def __init__(self, message: str, text: str = "", timed_out: bool = False):
        super().__init__(message)
        self.text, self.timed_out = text, timed_out

    @property
    def not_found(self) -> bool:
        return "NOT_FOUND" in self.text

    @property
    def stock_out(self) -> bool:
        return any(words in self.text.lower() for words in _STOCK_OUT)

    @property
    def transient(self) -> bool:
        """Whether the same command may work later: HTTP 5xx, no answer in time, a full quota."""
        return self.timed_out or bool(_TRANSIENT.search(self.text.lower()))


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted: ``slices`` slices of one shape. ``tier``: a key of :data:`TIERS`. ``flags``
    are passed on to gcloud's create."""

    name: str
    slice: Slice
    slices: int = 1
    tier: str = "spot"
    runtime: str = ""
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UserError(f"--tier {self.tier}: {suggest(self.tier, TIERS)}")
        if self.slices < 1:
            raise UserError(f"--slices {self.slices}: give 1 or more")
        if self.slice.generation not in RUNTIMES:
            raise UserError(
                f"--slice {self.slice.name}: gcloud has {self.slice.generation} only in GKE; see "
                "XPK in docs/tpu.md"
            )

    @property
    def accelerator(self) -> str:
        """gcloud's name of the slice."""
        return self.slice.name.replace("v5e-", "v5litepod-")

    @property
    def chips(self) -> int:
        return self.slices * self.slice.chips

    def create_arguments(self) -> list[str]:
        """Of ``queued-resources create``."""
        if self.slices == 1:
            nodes = [f"--node-id={self.name}"]
        else:  # they are called NAME-0, NAME-1, ...
            nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        return [
            self.name,
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={self.runtime or RUNTIMES[self.slice.generation]}",
            *nodes,
            *TIERS[self.tier],
            *self.flags,
        ]

    def check(self, found: Resource) -> None:
        """Raises UserError if what exists under this name is something else."""
        if (found.accelerator, len(found.nodes)) != (self.accelerator, self.slices):
            raise UserError(
                f"{self.name} exists and is {len(found.nodes)} x {found.accelerator}, not "
                f"{self.slices} x {self.accelerator}; delete it, or take another name"
            )


@dataclasses.dataclass(frozen=True)
class Resource:
    """A queued resource as gcloud describes it. ``created`` tells one from its successor of the
    same name."""

    name: str
    state: str
    accelerator: str
    nodes: tuple[str, ...]
    created: str

    @property
    def costs(self) -> bool:
        return self.state in COSTS

    @classmethod
    def from_json(cls, value: dict) -> Resource:
        nodes, accelerator = [], ""
        for spec in value.get("tpu", {}).get("nodeSpec", []):
            accelerator = spec.get("node", {}).get("acceleratorType", "")
            several = spec.get("multisliceParams") or spec.get("multiNodeParams")
            if several:
                prefix = several.get("nodeIdPrefix") or value["name"].split("/")[-1]
                nodes += [f"{prefix}-{i}" for i in range(int(several["nodeCount"]))]
            else:
                nodes.append(spec["nodeId"])
        return cls(
            value["name"].split("/")[-1],
            value.get("state", {}).get("state", "STATE_UNSPECIFIED"),
            accelerator,
            tuple(nodes),
            value.get("createTime", ""),
        )


class Gcloud:
    """Runs gcloud for one project and zone.

    Args:
      dry_run: print commands and run none; everything then looks as if nothing existed.
      ssh_flags: passed on to ssh and scp, such as ``--tunnel-through-iap``.
      say: gets a line for each command that changes something, and for all in a dry run.
    """

    def __init__(
        self,
        zone: str,
        project: str | None = None,
        *,
        dry_run: bool = False,
        ssh_flags: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ):
        self._where = [f"--zone={zone}"] + ([f"--project={project}"] if project else [])
        self.dry_run = dry_run
        self._ssh_flags, self._say = list(ssh_flags), say
        self.trouble = ""  # the last line of the last ssh that failed on a machine

    def describe(self, name: str) -> Resource | None:
        """The queued resource, None when there is none."""
        try:
            text = self._run(["queued-resources", "describe", name, "--format=json"], quiet=True)
        except GcloudError as error:
            if error.not_found:
                return None
            raise
        if self.dry_run:
            return None
        try:
            return Resource.from_json(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise GcloudError(f"describe {name}: its answer cannot be read ({error})") from None

    def hosts(self, resource: Resource) -> int:
        """Machines of all its slices."""
        total = 0
        for node in resource.nodes:
            text = self._run(["tpu-vm", "describe", node, "--format=json"], quiet=True)
            try:
                total += len(json.loads(text)["networkEndpoints"])
            except (ValueError, KeyError, TypeError) as error:
                raise GcloudError(f"describe {node}: its answer cannot be read ({error})") from None
        return total

    def create(self, request: Request) -> None:
        """Puts the request into the queue; returns before there are machines."""
        self._run(["queued-resources", "create", *request.create_arguments(), "--async"])

    def delete(self, name: str) -> None:
        """Deletes the queued resource and its machines; waits for it. Nothing there is fine."""
        try:
            self._run(self.delete_arguments(name), seconds=1800)
        except GcloudError as error:
            if not error.not_found:
                raise

    @staticmethod
    def delete_arguments(name: str) -> list[str]:
        return ["queued-resources", "delete", name, "--force"]

    def ssh(self, name: str, command: str, *, seconds: float = 300, quiet: bool = False) -> str:
        """What ``command`` prints on every machine. A machine where it fails, or has not answered
        in so many ``seconds``, does not raise: its answer is missing, and :attr:`trouble` has a
        line."""
        self.trouble = ""
        return self._run(
            [
                "queued-resources",
                "ssh",
                name,
                "--node=all",
                "--worker=all",
                *self._ssh_flags,
                f"--command={command}",
            ],
            seconds=seconds,
            quiet=quiet,
            may_fail=True,
        )

    def copy(self, name: str, file: str) -> None:
        """Copies a file into the home folder of every machine."""
        self._run(
            [
                "queued-resources",
                "scp",
                file,
                f"{name}:",
                "--node=all",
                "--worker=all",
                *self._ssh_flags,
            ],
            seconds=1800,
        )

    def line(self, arguments: Sequence[str]) -> str:
        """The whole command, to be pasted into a shell."""
        return shlex.join(self._command(arguments))

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return ["gcloud", "compute", "tpus", *arguments, *self._where, "--quiet"]

    def _run(
        self,
        arguments: Sequence[str],
        *,
        seconds: float = 600,
        quiet: bool = False,
        may_fail: bool = False,
    ) -> str:
        if self.dry_run or not quiet:
            self._say(f"$ {self.line(arguments)}")
        if self.dry_run:
            return ""
        try:
            done = execute(self._command(arguments), seconds)
        except FileNotFoundError:
            raise UserError(
                "gcloud is not installed here; see https://cloud.google.com/sdk/docs/install"
            ) from None
        except subprocess.TimeoutExpired as error:
            words = f"{' '.join(arguments[:3])}: no answer in {seconds:.0f} seconds"
            if not may_fail:
                raise GcloudError(words, timed_out=True) from None
            self.trouble = words
            printed = error.stdout or b""  # bytes, even of a process that was run as text
            return printed if isinstance(printed, str) else printed.decode(errors="replace")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            if not may_fail:
                raise GcloudError(f"{' '.join(arguments[:3])}: {lines[-1][:300]}", done.stderr)
            self.trouble = lines[-1][:300]
        return done.stdout


def execute(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess:
    """Runs a command, which may take so long. Tests put a stand-in here."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )
