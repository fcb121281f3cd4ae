"""The processes that take turns in a benchmark."""

import pytest

from webssl_jax.config import UserError
from webssl_jax.telemetry.bench_worker import BenchWorker, format_range, median_range


def doubles(pipe, first):
    pipe.send(first)
    while number := pipe.recv():
        if number == 7:
            raise UserError("no sevens")
        pipe.send(2 * number)


def dies(pipe):
    raise SystemExit(3)


def test_a_worker_answers_until_it_is_stopped():
    worker = BenchWorker(doubles, "ready")
    assert worker.receive() == "ready" and worker.ask(3) == 6 and worker.ask(4) == 8
    worker.stop()
    worker.stop()


def test_bad_input_and_death_of_a_worker_are_raised_here():
    worker = BenchWorker(doubles, "ready")
    worker.receive()
    with pytest.raises(UserError, match="no sevens"):
        worker.ask(7)
    worker.stop()
    worker = BenchWorker(dies)
    with pytest.raises(RuntimeError, match="a worker of the benchmark died"):
        worker.receive()
    worker.stop()


def test_a_range_is_the_median_between_the_lowest_and_the_highest():
    assert format_range(median_range([3.0, 1.00004, 2.0])) == "2 (1 to 3)"
