"""What a program runs with: versions, the machine, the code."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any


def package_versions() -> dict[str, str]:
    """{package: its version, or "not installed"} of those that a run's figures depend on."""
    packages = (
        "jax",
        "jaxlib",
        "libtpu",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "pillow",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe() -> dict[str, Any]:
    """Versions, machine and git revision: what one needs to repeat the run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "packages": package_versions(),
        "git_revision": git_revision(),
        "command": sys.argv,
    }


def _cpu() -> str:
    """Its maker's name for it; Linux only."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.processor())


def code_digest() -> str:
    """12 hexadecimal digits of the package's Python files, wherever they lie."""
    root, digest = pathlib.Path(__file__).resolve().parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def git_revision() -> str:
    """The checkout's commit, with ``+changes`` when the work tree differs; outside a checkout what
    ``WEBSSL_REVISION`` says (an image's), else ``unknown``."""
    root = pathlib.Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("WEBSSL_REVISION", "unknown")

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")
