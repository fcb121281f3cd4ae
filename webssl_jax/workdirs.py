"""The folder of a run: whose it is, who uses it now, and whether anything can be written there."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from ml_collections import ConfigDict

from webssl_jax.checkpoints import directory
from webssl_jax.cli import first_line, is_storage_trouble
from webssl_jax.config import TransientError, UserError
from webssl_jax.files import try_writing

OWNER = "run_id"  # a file in the workdir and in checkpoint.folder, the same in both
DATA = "data.json"  # the records that the run is trained on
_WRITTEN = ("checkpoints", "bad_steps", "eval", "pictures", "profile", "tensorboard")


class WorkdirLock:
    """Refuses a second run in the same workdir. The kernel drops the lock when the process ends,
    for whatever reason.

    Raises:
      UserError: if another process holds it.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._workdir, path = Path(workdir), Path(workdir) / ".lock"
        self._file = open(path, "a+")
        self._device = os.fstat(self._file.fileno()).st_dev
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise UserError(
                f"{workdir}: another run (process {holder}) is using this workdir; stop it or "
                "choose another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def is_gone(self) -> bool:
        """Whether somebody has removed its file, or another run has its own there by now."""
        try:
            holder = Path(self._file.name).read_text().strip()
        except FileNotFoundError:
            return True
        except OSError:  # a storage that does not answer has not lost it
            return False
        return holder.isdigit() and int(holder) != os.getpid()

    def again(self) -> WorkdirLock:
        """Makes the workdir anew where it was removed, and locks it.

        Raises:
          UserError: if another process holds it.
          TransientError: if it would lie on another disk, because one is no more mounted there.
        """
        there = next(p for p in (self._workdir, *self._workdir.absolute().parents) if p.exists())
        if there.stat().st_dev != self._device:
            raise TransientError(f"{self._workdir}: is gone, for its disk is not mounted any more")
        self._workdir.mkdir(parents=True, exist_ok=True)
        return WorkdirLock(self._workdir)

    def release(self) -> None:
        """From now on another run may use the workdir."""
        self._file.close()


def check_writable(workdir: Path, config: ConfigDict) -> None:
    """Tries to write in every folder of this machine that the run will write to: what fails is an
    error now, and not at the first checkpoint.

    Raises:
      UserError: naming the folder.
      TransientError: the same where the storage of a run fails that was begun: it has worked.
    """
    begun = (workdir / "config.json").exists()
    inside = [workdir / name for name in _WRITTEN]
    named = {
        "config.checkpoint.folder": config.checkpoint.folder,
        "config.checkpoint.local_folder": config.checkpoint.local_folder,
    }
    if config.host.compilation_cache != "none":
        named["config.host.compilation_cache"] = os.path.expanduser(config.host.compilation_cache)
    folders = {workdir: "--workdir"} | {path: "--workdir" for path in inside if path.exists()}
    folders |= {Path(name): key for key, name in named.items() if name and "://" not in name}
    for folder, key in folders.items():
        try:
            try_writing(folder)
        except OSError as error:
            kind = TransientError if begun and is_storage_trouble(error) else UserError
            raise kind(
                f"{key}: nothing can be written in {folder} ({error.strerror}); mend that, or name "
                "another folder"
            ) from error


def identity(workdir: Path) -> list[Path]:
    """The files by which a later start knows the run."""
    return [workdir / name for name in (OWNER, DATA, "config.json", "environment.json")]


def check_places(workdir: Path) -> None:
    """Refuses a workdir in which a file stands where a run needs a folder, or the other way round.

    Raises:
      UserError: naming it.
    """
    for name in _WRITTEN:
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise UserError(f"{workdir / name}: is no folder, and a run needs one; move it away")
    for name in ("config.json", "environment.json", "metrics.jsonl", "goodput.json", OWNER):
        if (workdir / name).is_dir():
            raise UserError(f"{workdir / name}: is a folder, and a run needs a file; move it away")


def run_id(workdir: str | os.PathLike) -> str:
    """Tells this run from any other, also from one that had a workdir of the same name. The first
    call writes it, so process 0 must make that."""
    path = Path(workdir) / OWNER
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def claim_folder(workdir: str | os.PathLike, folder: str) -> None:
    """Marks ``config.checkpoint.folder`` as this run's, or checks that it is. It writes there, so
    that a folder in which nothing can be saved is an error now, not at the first checkpoint.

    Raises:
      UserError: if another run saves there, or nothing can be written.
    """
    there, ours = directory(workdir, folder) / OWNER, run_id(workdir)
    what = f"config.checkpoint.folder = {folder}"
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        owner = there.read_text() if there.exists() else ours
        if owner == ours:  # also when it is there: whether it can be written is the question
            there.write_text(ours)
            owner = there.read_text()
    except Exception as error:  # each of the packages behind gs:// has its own
        kind = TransientError if (Path(workdir) / "config.json").exists() else UserError
        raise kind(
            f"{what}: cannot be used ({type(error).__name__}: {first_line(error)}); does it exist, "
            "and may this machine read and write there?"
        ) from error
    if owner != ours:
        raise UserError(
            f"{what}: holds the checkpoints of another run; choose another folder, or go on with "
            f"that run in its own --workdir (the one whose {OWNER} says {owner})"
        )


def is_run(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a workdir. Exported weights, which have a config.json too, are not."""
    path = Path(path)
    return (path / "checkpoints").is_dir() or (path / OWNER).exists()
