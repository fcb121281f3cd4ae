"""Compiles a config's real train step for a TPU slice that is not here: does it fit, and how fast
can it be at best?

    python -m webssl_jax.plan --config configs/web_dino.py:size=7b --slice v5p-512 [--slices 2]
        [--explain] [--search] [--save FILE] [--json] [--hlo FILE] [--option NAME=VALUE ...]
        [--config.key.path=value ...]
    python -m webssl_jax.plan --config configs/web_dino.py:size=7b,res=518 --slice v5e-64
        --eval ROW [--evals configs/evals/NAME.py] [--images N] [--test-images N] [--classes N]
        [--batch N] [--evals.ROW.key=value ...]
    python -m webssl_jax.plan --language llama-3.1-8b --slice v5e-64 [--reads] [--texts N]
        [--tokens N] [--explain]

Needs libtpu (pip install 'webssl_jax[plan]') and no TPU: the compiler runs on this machine's CPU,
for a minute or ten. Exit codes: 0 it fits; 3 it does not; 2 bad input. What the figures mean and
what they leave out: docs/plan.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import UserError

_SIZES = {
    "images": "of the training set",
    "test_images": "of the test set",
    "classes": "of the labels",
    "batch": "images a call, over all devices; rows that train on images may say another",
}


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m webssl_jax.plan", description=__doc__)
    parser.add_argument("--config", help="configs/NAME.py[:key=value,...]")
    parser.add_argument("--slice", required=True, help="as gcloud calls it: v5p-512, v5e-256, ...")
    parser.add_argument("--slices", type=int, default=1, help="so many of them, joined by network")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--explain", action="store_true", help="say where the time goes, and the least it could be"
    )
    parser.add_argument("--hlo", metavar="FILE", help="write the optimised HLO, for a recount")
    parser.add_argument("--save", metavar="FILE", help="write the compiled step: train --compiled")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the compiler, besides or instead of those in sharding/compiler_options.py",
    )
    group = parser.add_argument_group("a row of evaluations, instead of the train step")
    group.add_argument("--eval", metavar="ROW", help="of config.evals, or of --evals")
    group.add_argument("--evals", metavar="FILE", help="rows of evaluations, a config")
    for name, says in _SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help=says)
    group = parser.add_argument_group("a language model, instead of a config")
    group.add_argument("--language", metavar="SIZE", help="a name in webssl_jax/language/sizes.py")
    group.add_argument("--reads", action="store_true", help="captions, instead of training")
    group.add_argument("--texts", type=int, default=64, help="a step or call, over all devices")
    group.add_argument("--tokens", type=int, default=2048, help="of a text")
    return parser


cli.help_early(_parser, __name__)

import jax
from ml_collections import ConfigDict

from webssl_jax.plan import evaluation, language, training
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import slices

EXIT_DOES_NOT_FIT = 3


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of the module's docstring."""
    args, given = _parser().parse_with_overrides(argv, prefix=("--config.", "--evals."))
    overrides, of_rows = (
        [x.removeprefix(which) for x in given if x.startswith(which)]
        for which in ("config.", "evals.")
    )
    if bool(args.config) == bool(args.language):
        raise UserError("give --config, or --language for a language model, one of them")
    if args.language:
        return _language(args, given)
    options = read_options(args.option)
    if args.slices < 1:
        raise UserError(f"--slices {args.slices}: must be at least 1")
    for flag, file in (("--hlo", args.hlo), ("--save", args.save)):
        if file and not pathlib.Path(file).parent.is_dir():
            raise UserError(f"{flag} {file}: its folder does not exist")
    for flag in ("hlo", "save", "search", "option", "explain"):
        if args.eval and getattr(args, flag):
            raise UserError(f"--{flag}: goes with the train step, not with --eval")
    if (args.evals or of_rows) and not args.eval:
        evals = f"--evals {args.evals}" if args.evals else f"--evals.{of_rows[0]}"
        raise UserError(f"{evals}: say which of its rows: --eval ROW")
    slice_ = slices.find(args.slice)
    config = configs.load(args.config, overrides)
    if jax.config.values["jax_platforms"] != "cpu":
        jax.config.update("jax_platforms", "cpu")  # on a TPU VM, too, its chips are left alone
    if args.eval:
        return _evaluation(args, config, of_rows, slice_)
    attempt = functools.partial(
        training.plan,
        slice_=slice_,
        count=args.slices,
        hlo_file=args.hlo,
        save_file=args.save,
        options=options,
    )
    if args.search:
        mesh = meshes.create(config.sharding, slice_.devices(args.slices))
        result = training.search(config, mesh, attempt)
    else:
        result = attempt(config)
    asked = {"config": args.config, "overrides": overrides, "options": args.option}
    return _say(asked | result, args, training.table)


def _say(
    result: dict[str, Any], args: argparse.Namespace, table: Callable[[dict[str, Any]], str]
) -> int:
    """Prints the figures. Returns the exit code."""
    print(json.dumps(result, indent=1) if args.json else table(result), flush=True)
    if args.explain and result["fits"] and not args.json:
        print(training.explanation(result), flush=True)
    return 0 if result["fits"] else EXIT_DOES_NOT_FIT


def _language(args: argparse.Namespace, overrides: list[str]) -> int:
    for flag in ("eval", "evals", "hlo", "save", "search", "option"):
        if getattr(args, flag):
            raise UserError(f"--{flag}: goes with --config, not with --language")
    if overrides:
        raise UserError(f"--{overrides[0]}: goes with --config, not with --language")
    slice_ = slices.find(args.slice)
    if jax.config.values["jax_platforms"] != "cpu":
        jax.config.update("jax_platforms", "cpu")  # as of a config
    result = language.plan_language(
        args.language, slice_, args.slices, args.texts, args.tokens, args.reads
    )
    return _say(result, args, language.table)


def _evaluation(
    args: argparse.Namespace, config: ConfigDict, overrides: list[str], slice_: slices.Slice
) -> int:
    if args.evals:
        rows = configs.load_rows(args.evals, overrides)
    else:
        rows = configs.override_rows(config.evals, overrides)
    given = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    size = evaluation.IMAGENET._replace(**given)
    result = evaluation.plan_evaluation(config, rows, args.eval, slice_, args.slices, size)
    return _say(result, args, evaluation.table)


def read_options(given: list[str]) -> dict[str, Any]:
    """Of the command line: a number, true or false, else a word.

    Raises:
      UserError: for one that is not NAME=VALUE.
    """
    out = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"--option {text}: must be NAME=VALUE")
        words = {"true": True, "false": False}
        number = re.fullmatch(r"-?\d+", value)
        out[name] = int(value) if number else words.get(value, value)
    return out
