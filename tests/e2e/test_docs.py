"""The documents name only commands, flags, configs, keys, files and places that exist. They leave
out no command, page, format or kind of evaluation."""

import dataclasses
import functools
import pathlib
import re

import pytest

from tests.e2e.runner import ROOT
from webssl_jax import config as configs
from webssl_jax import console
from webssl_jax.data.mixture import Part
from webssl_jax.evaluators import suite
from webssl_jax.weights.families import FAMILIES

TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted(ROOT.glob("docs/*.md")) + TOP
# It names what is no more.
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Flags that every entry point has from here; the rest stand in its own files.
SHARED = (
    "webssl_jax/cli.py",
    "webssl_jax/sharding/rendezvous.py",
    "webssl_jax/data/converter/flags.py",
    "webssl_jax/data/converter/kinds.py",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("webssl_jax/curation/commands/*.py")),
)
COMMAND = re.compile(r"\b(?:python (-m )?([\w./]+)|webssl ([a-z_]+))((?:[^\n`|]|\\\n|\\\|)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
present = pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)


def text_of(page):
    return page.read_text("utf-8")


def files_of(module):
    """The files of an entry point; of a package all of them."""
    path = ROOT / module.replace("webssl_jax.tools.", "tools.").replace(".", "/")
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def commands(page):
    """(files of the entry point, the rest of its command line) for every command."""
    for module, name, ours, rest in COMMAND.findall(text_of(page)):
        if "NAME" in name:
            continue
        if ours:
            assert ours in console.COMMANDS, f"{page.name}: webssl has no command {ours}"
            place, tool = console.COMMANDS[ours][0], ours in console.TOOLS
            yield files_of(place if tool else ".".join(place.split(".")[:2])), rest
        elif not module:
            yield [ROOT / name], rest
        elif name.startswith(("webssl_jax", "tests")):  # not pip, not venv
            yield files_of(name), rest


@pages
def test_every_command_exists_with_its_flags(page):
    for files, rest in commands(page):
        for file in files:
            assert file.is_file(), f"{page.name}: {file} does not exist"
        source = "".join(text_of(file) for file in (*files, *(ROOT / name for name in SHARED)))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])", rest):
            known = f'"{flag}"' in source or flag in ("--config", "--help")
            assert known, f"{page.name}: {files[0].name} has no flag {flag}"


def test_every_command_is_in_some_document():
    everything = "".join(map(text_of, PRESENT))
    for name in console.COMMANDS:
        named = f"webssl {name}" in everything or f"tools/{name}.py" in everything
        assert named or f"webssl_jax.{name}" in everything, f"no page names {name}"


@pages
def test_every_config_and_every_file_of_rows_loads_with_its_arguments(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for spec in re.findall(
        r"--config ((?:configs/)?[a-z_]+(?:\.py)?(?::[\w=,]+)?)(?![\w/])", text_of(page)
    ):
        configs.load(spec)
    for spec in re.findall(r"--evals ([a-z_]+(?::[\w=,]+)?)(?![\w./])", text_of(page)):
        assert configs.load_rows(spec)


@functools.cache
def config_keys():
    """Every path of a shipped config, with its groups, and the durations in their other units."""
    keys = set()

    def walk(node, prefix=""):
        for key, value in node.items():
            keys.add(prefix + key)
            if hasattr(value, "items"):
                walk(value, f"{prefix}{key}.")

    for spec in ("web_mae:size=tiny", "web_dino:size=tiny", "clip:size=tiny", "vqa"):
        walk(configs.load(spec).to_dict())
    for stem, units in configs.DURATIONS.items():
        keys |= {stem, *(f"{stem}_{unit}" for unit in units)}
    return keys


def row_keys():
    kinds = [suite.find(kind, kind) for kind in suite.KINDS]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind.Options)}
    return fields | set(suite.SHARED)


@present
def test_every_config_key_exists(page):
    keys = config_keys()
    of_rows = {"evals": row_keys(), "mixture": {field.name for field in dataclasses.fields(Part)}}
    for path in re.findall(r"(?<![\w/])config\.((?:\w+\.)*\w+)", text_of(page)):
        group, *rest = path.split(".")
        if group in of_rows and rest:
            known = len(rest) == 1 or rest[1] in of_rows[group] or rest[1] == "key"
            assert known, f"{page.name}: no key {path} of a row"
        elif path not in ("json", "py", "KEY"):
            assert path in keys, f"{page.name}: no config key {path}"


@present
def test_every_file_exists(page):
    """Named from the root, or as within the package; a bare name is that of any file."""
    text = text_of(page)
    rooms = ("webssl_jax", "tools", "tests", "configs")
    there = {path.name for room in rooms for path in (ROOT / room).rglob("*.py")} | {"setup.py"}
    missing = [
        name
        for name in re.findall(r"`((?:webssl_jax|tools|tests|configs|docs)/[\w./]+)`", text)
        if not (ROOT / name).exists()
    ]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        inside = (ROOT / name).exists() or (ROOT / "webssl_jax" / name).exists()
        if not (inside if "/" in name else name in there):
            missing.append(name)
    assert not missing, f"{page.name}: {missing}"


def anchors(page):
    """Those that GitHub gives the headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(text_of(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target} does not exist"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


def test_the_reading_order_has_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(text_of(index))}
    assert {page for page in PAGES if page != index} <= linked
    readmes = {
        path.resolve() for path in pathlib.Path(ROOT / "webssl_jax" / "corpus").rglob("*.md")
    }
    assert readmes <= linked


def test_evaluation_md_lists_every_kind_with_its_keys():
    table = re.findall(
        r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", text_of(ROOT / "docs/evaluation.md"), re.M
    )
    listed = {kind: set(re.findall(r"\w+", keys)) for kind, keys in table[: len(suite.KINDS)]}
    assert listed == {
        kind: {field.name for field in dataclasses.fields(suite.find(kind, kind).Options)}
        for kind in suite.KINDS
    }


def test_reference_md_lists_every_format_of_weights():
    page = text_of(ROOT / "docs" / "reference.md")
    formats = page[page.index("Formats, read and written") :].split("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", formats)) == set(FAMILIES)
