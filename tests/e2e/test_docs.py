"""The documents name only commands, flags, config keys and files that exist."""

import re

import pytest

from tests.e2e.runner import ROOT

PAGES = sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"]
# Flags that every entry point has from here; the rest stand in its own file.
SHARED = ("webssl_jax/cli.py", "webssl_jax/sharding/distributed.py")
COMMAND = re.compile(r"python (-m )?([\w./]+)((?:[^\n`|]|\\\n|\\\|)*)")


def _commands(page):
    """(file of the entry point, the rest of its command line) for every python command."""
    for module, name, rest in COMMAND.findall(page.read_text()):
        if module and not name.startswith(("webssl_jax", "tests")):
            continue  # pip, venv
        yield (name.replace(".", "/") + ".py" if module else name), rest


def _config_keys():
    common = (ROOT / "configs" / "common.py").read_text()
    return set(re.findall(r'"(\w+)":', common))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_exists_with_its_flags(page):
    for file, rest in _commands(page):
        assert (ROOT / file).is_file(), f"{page.name}: {file} does not exist"
        source = "".join((ROOT / name).read_text() for name in (file, *SHARED))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])", rest):
            known = f'"{flag}"' in source or flag == "--config"
            assert known, f"{page.name}: {file} has no flag {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_key_in_the_documents_exists(page):
    """By the last part of its name, which the methods' own keys are exempt from."""
    keys = _config_keys()
    for path in re.findall(r"config\.((?:\w+\.)*\w+)", page.read_text()):
        if path.split(".")[0] not in ("model", "method", "json", "py"):
            name = path.split(".")[-1]
            stem = re.sub(r"_(steps|images|percent)$", "", name)
            assert name in keys or any(key.startswith(stem + "_") for key in keys), (
                f"{page.name}: no config key {path}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_in_the_documents_exists(page):
    named = re.findall(r"`((?:webssl_jax|tools|tests|configs|docs)/[\w./]+)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page.name}: {missing}"
