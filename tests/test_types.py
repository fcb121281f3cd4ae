"""The type checker, with its settings in pyproject.toml."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "webssl_jax").rglob("*.py"))
_EXPLAINED = re.compile(r"# type: ignore\[[\w, -]+\]  # \w")


def test_the_type_checker_finds_nothing_in_any_file_of_the_package():
    # 13 s of CPU where .mypy_cache/ is not there yet, 1 s where it is
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" in {len(FILES)} source files" in done.stdout


def test_each_line_that_the_type_checker_is_to_ignore_says_why():
    for file in FILES:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if re.search(r"#\s*type:\s*ignore", line):
                where = f"{file.relative_to(ROOT)}:{number}"
                assert _EXPLAINED.search(line), f"{where}: write '# type: ignore[CODE]  # why'"
