"""``--help`` of every command, without what takes seconds to import."""

import subprocess
import sys

from webssl_jax.evaluators import feature_files
from webssl_jax.language import llava
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.tools import export, features
from webssl_jax.weights import clip, given, safetensors_io
from webssl_jax.weights.families import FAMILIES

# As console.py starts them, one after another.
ALL = """
import contextlib, importlib, io, sys
from webssl_jax import cli, console
for name, (module, _) in console.COMMANDS.items():
    sys.argv, cli.started = [name, "--help"], module
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            assert end.code == 0, name
    assert said.getvalue().startswith("usage: "), name
    assert not {"jax", "flax", "matplotlib"} & set(sys.modules), name
print(len(console.COMMANDS))
"""


def test_no_command_imports_jax_for_its_help():
    made = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert int(made.stdout) > 20


def choices(parser, flag):
    (action,) = (x for x in parser._actions if flag in x.option_strings)
    return sorted(action.choices)


def test_flags_offer_what_there_is():
    parser = export._parser()
    assert choices(parser, "--format") == sorted([*FAMILIES, llava.FORMAT])
    assert choices(parser, "--dtype") == sorted(safetensors_io.DTYPES)
    assert sorted(given.MLPS) == sorted(clip.MLPS)
    assert sorted(given.RESIZES) == sorted(INTERPOLATIONS)
    parser = features._parser()
    assert choices(parser, "--dtype") == sorted(feature_files.DTYPES)
    args = parser.parse_args(["--model", "a", "--images", "b", "--output", "c"])
    columns = tuple(args.columns.split(","))
    assert feature_files.Asked(columns, args.dtype, args.batch, args.threads) == (
        feature_files.Asked()
    )
