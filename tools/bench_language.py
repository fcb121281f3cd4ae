#!/usr/bin/env python3
"""How fast a language model reads and writes, beside transformers: the same weights, prompts and
threads, in turn, in one process.

    python tools/bench_language.py [--model smollm2] [--texts 4] [--tokens 128] [--new 32]
        [--rounds 3]

Prefill: tokens a second of a batch of prompts, with the logits of the last one. Decode: tokens a
second of the answers that follow, greedy. Each round measures both programs, one after the other;
the table has the best round of each, by CPU time (which other programs on the machine disturb less)
and by the clock. The ratio is ours over theirs: above 1, we are faster. Needs torch and
transformers, on a CPU.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from webssl_jax import cli
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as language.model.load opens it")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


cli.help_early(_parser, __name__)

import jax
import numpy as np

from webssl_jax.language import generate, model
from webssl_jax.language.model import LanguageModel


class Timing(NamedTuple):
    """Tokens a second by CPU time and by the clock."""

    cpu: float
    clock: float


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if min(args.texts, args.tokens, args.rounds) < 1 or args.new < 2:
        raise UserError("--texts, --tokens and --rounds must be at least 1, --new at least 2")
    ours = model.load(args.model)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ours.config.vocabulary, (args.texts, args.tokens), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(pathlib.Path(folder) / "model")
        programs = {"webssl_jax": _ours(ours, ids), "transformers": _theirs(folder, ids)}
    found: dict[str, list[tuple[Timing, Timing]]] = {name: [] for name in programs}
    for program in programs.values():
        program(1), program(args.new)  # compiled, and warm
    for _ in range(args.rounds):
        for name, program in programs.items():
            found[name].append(_measure(program, args.texts, args.tokens, args.new))
    _print(found)
    return 0


def _ours(opened: LanguageModel, ids: np.ndarray) -> Callable[[int], Any]:
    mask, nothing = np.ones(ids.shape, bool), np.zeros(0, np.int32)  # no token ends an answer

    def run(new: int) -> Any:
        made = generate.generate(
            opened.config, opened.params, ids, mask, jax.random.key(0), nothing, new_tokens=new
        )
        return jax.block_until_ready(made)

    return run


def _theirs(folder: str, ids: np.ndarray) -> Callable[[int], Any]:
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype="float32")
    inputs = torch.tensor(ids, dtype=torch.long)

    def run(new: int) -> Any:
        with torch.inference_mode():
            return theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )

    return run


def _measure(
    program: Callable[[int], Any], texts: int, tokens: int, new: int
) -> tuple[Timing, Timing]:
    """(prefill, decode). The first token comes with the prefill, so decode is what more of them
    take."""
    first, all_ = _seconds(lambda: program(1)), _seconds(lambda: program(new))
    read = Timing(*(texts * tokens / x for x in first))
    written = (texts * (new - 1) / max(x - y, 1e-9) for x, y in zip(all_, first))
    return read, Timing(*written)


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    cpu, clock = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - clock


def _print(found: dict[str, list[tuple[Timing, Timing]]]) -> None:
    """By CPU time; the clock's in brackets."""
    best = {
        name: [Timing(*(max(x) for x in zip(*column))) for column in zip(*rounds)]
        for name, rounds in found.items()
    }
    print(f"{'tokens/s of CPU (clock)':26}{'prefill':>20}{'decode':>20}")
    for name, timings in best.items():
        cells = [f"{t.cpu:,.1f} ({t.clock:,.1f})" for t in timings]
        print(f"{name:26}" + "".join(f"{cell:>20}" for cell in cells))
    ratios = [f"{a.cpu / b.cpu:.2f} ({a.clock / b.clock:.2f})" for a, b in zip(*best.values())]
    print(f"{'ratio':26}" + "".join(f"{ratio:>20}" for ratio in ratios))


if __name__ == "__main__":
    cli.run(main)
