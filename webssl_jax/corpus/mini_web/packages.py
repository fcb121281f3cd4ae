"""Packages as sources of images: fetched by their ordinary clients into a cache, read without
unpacking to disk.

Where packages come from is the clients' configuration, never ours. Versions of npm and PyPI
packages are pinned; a Debian release fixes its own.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from webssl_jax.config import UserError
from webssl_jax.telemetry.progress import Progress

Tree = Mapping[str, bytes]  # path in the package -> content
_PROGRAMS = {"deb": ("apt-get", "dpkg-deb"), "npm": ("npm",), "pypi": ()}


@dataclasses.dataclass(frozen=True)
class Package:
    """``kind`` is "deb", "npm" or "pypi"; ``version`` is empty for Debian's."""

    kind: str
    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()

    def archive(self, cache: Path) -> Path | None:
        """The package's file in ``cache``, if it is there."""
        if self.kind == "deb":
            pattern = f"{self.name}_*.deb"
        elif self.kind == "npm":
            pattern = f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        else:
            pattern = f"{self.name.replace('-', '_')}-{self.version}-*.whl"
        return next(iter(sorted(cache.glob(pattern))), None)


def download(packages: Iterable[Package], cache: Path, done: Callable[[int], None]) -> None:
    """Fetches what ``cache`` lacks, one client beside the other.

    Args:
      cache: an existing folder. Files arrive in a folder inside it and are renamed when complete,
        so that what is in ``cache`` can be trusted.
      done: called with the number of packages that became complete since the last call.

    Raises:
      UserError: if a client is not installed or does not have a package.
    """
    missing: dict[str, list[Package]] = {"deb": [], "npm": [], "pypi": []}
    for package in packages:
        if package.archive(cache) is None:
            missing[package.kind].append(package)
        else:
            done(1)
    for kind, wanted in missing.items():
        for program in _PROGRAMS[kind] if wanted else ():
            if shutil.which(program) is None:
                raise UserError(f"{program} not found: it is needed for {_names(wanted)}")
    errors: list[Exception] = []

    def fetch(kind: str) -> None:
        try:
            _fetch(kind, missing[kind], cache)
            done(len(missing[kind]))
        except Exception as error:  # handed to the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=fetch, args=(kind,)) for kind in missing if missing[kind]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def download_shown(packages: Iterable[Package], cache: Path) -> None:
    """:func:`download`, each package once, with its progress shown."""
    wanted = dict.fromkeys(packages)
    progress = Progress(len(wanted), "downloading", "packages")
    download(wanted, cache, progress.update)
    progress.close()


def _names(packages: Iterable[Package]) -> str:
    return ", ".join(str(package) for package in packages)


def _fetch(kind: str, packages: list[Package], cache: Path) -> None:
    """All of one kind by one command: each start of a client costs about a second."""
    folder = cache / f"{kind}.part"
    folder.mkdir(exist_ok=True)  # what an interrupted run left there, the clients check and use
    if kind == "deb":
        command = ["apt-get", "download", "-q", *(p.name for p in packages)]
    elif kind == "npm":
        command = ["npm", "pack", "--silent", *(f"{p.name}@{p.version}" for p in packages)]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:"]
        command += [f"{p.name}=={p.version}" for p in packages]
    result = _run(command, folder)
    if result.returncode and kind == "deb":  # the package lists may be missing or old
        _run(["apt-get", "update", "-q"], folder)
        result = _run(command, folder)
    arrived = [file for package in packages if (file := package.archive(folder))]
    if result.returncode or len(arrived) < len(packages):
        lines = (result.stderr or result.stdout).strip().splitlines()
        errors = [line for line in lines if re.match(r"E: |npm err|error", line, re.I)] or lines
        reason = errors[0] if errors else "not everything arrived"
        raise UserError(
            f"{' '.join(command[:2])} failed: {reason}; mend that, or leave the sources of its "
            "packages out with --without"
        )
    for file in arrived:
        os.replace(file, cache / file.name)
    shutil.rmtree(folder)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def read(archive: Path, wanted: re.Pattern[str]) -> Tree:
    """The regular files of a .deb, .tgz or .whl whose path matches ``wanted`` (by ``search``).

    Links are left out: what they point to is there under its own name. Zip archives inside (.pk3,
    .sh3f), if wanted, are opened in turn by :func:`zipped`.

    Raises:
      UserError: if the archive is damaged.
    """
    try:
        return dict(_members(archive, wanted))
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{archive}: damaged ({error}); delete it and start again") from None


def read_all(packages: Iterable[Package], cache: Path, wanted: re.Pattern[str]) -> Tree:
    """:func:`read` of each package in ``cache``, together.

    Raises:
      UserError: if one is not there, or is damaged.
    """
    tree: dict[str, bytes] = {}
    for package in packages:
        archive = package.archive(cache)
        if archive is None:
            raise UserError(f"{package} is not in {cache}; download it first")
        tree |= read(archive, wanted)
    return tree


def _members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None  # it is a pipe
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                    yield from _files(tar, wanted)
                process.stdout.read()  # the padding, so that the writer can finish
            finally:
                process.stdout.close()
        if process.returncode:
            raise OSError("dpkg-deb cannot read it")
    elif archive.suffix == ".tgz":
        with tarfile.open(archive, "r|gz") as tar:
            yield from _files(tar, wanted)
    else:
        yield from zipped(archive.read_bytes(), wanted).items()


def _files(tar: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isreg() and wanted.search(name) and (file := tar.extractfile(member)):
            yield name, file.read()


def zipped(data: bytes, wanted: re.Pattern[str]) -> Tree:
    """The files of a zip archive in memory whose path matches ``wanted``."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and wanted.search(n)]
        return {name: archive.read(name) for name in names}
