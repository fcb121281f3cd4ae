"""The processes that take turns in a benchmark."""

import pytest

from webssl_jax.config import UserError
from webssl_jax.telemetry.bench_worker import BenchWorker, median_range, shown


def doubles(pipe, first):
    pipe.send(first)
    while number := pipe.recv():
        if number == 7:
            raise UserError("no sevens")
        pipe.send(2 * number)


def dies(pipe):
    raise SystemExit(3)


def test_a_side_answers_until_it_is_stopped():
    side = BenchWorker(doubles, "ready")
    assert side.receive() == "ready" and side.ask(3) == 6 and side.ask(4) == 8
    side.stop()
    side.stop()


def test_bad_input_and_death_of_a_side_are_raised_here():
    side = BenchWorker(doubles, "ready")
    side.receive()
    with pytest.raises(UserError, match="no sevens"):
        side.ask(7)
    side.stop()
    side = BenchWorker(dies)
    with pytest.raises(RuntimeError, match="a side of the benchmark died"):
        side.receive()
    side.stop()


def test_a_spread_is_the_median_between_the_lowest_and_the_highest():
    assert shown(median_range([3.0, 1.00004, 2.0])) == "2 (1 to 3)"
