"""What a plan of curation says, against shards that are dealt out one by one."""

import numpy as np
import pytest

from webssl_jax.curation import planning
from webssl_jax.data.records import shard_name
from webssl_jax.tools import curate

FLEET = planning.Fleet(
    machines=4, cores=16, gigabits=40.0, machine_price=0.5, accelerators=8, accelerator_price=2.0
)


def test_hours_are_those_of_shards_that_are_dealt_to_free_cores():
    """1,000,000 keys in 10,000 shards, their sizes as unequal as those of a crawl's tars."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 0.5, 10_000)
    shard_of = rng.choice(10_000, 1_000_000, p=sizes / sizes.sum())
    counts = np.bincount(shard_of, minlength=10_000)
    assert len({shard_name("train", i, 10_000) for i in range(10_000)}) == 10_000
    rates = planning.Rates(alive=1.0)
    stages = {stage.name: stage for stage in planning.plan(counts.sum(), FLEET, rates)}
    for name, seconds in (("convert", rates.convert), ("score", rates.statistics)):
        dealt = planning.makespan(counts, seconds, FLEET.machines * FLEET.cores)
        assert stages[name].hours == pytest.approx(dealt, rel=0.02) and dealt > stages[name].hours
    # A fleet with a core for each shard waits for the largest: the plan does not know of it.
    alone = planning.makespan(counts, rates.convert, 10_000)
    assert alone == pytest.approx(counts.max() * rates.convert / 3600)


def test_what_grows_faster_than_the_records_is_said(capsys):
    small, large = (planning.plan(n, FLEET) for n in (1e9, 4e9))
    grown = {a.name: b.dollars / a.dollars for a, b in zip(small, large, strict=True)}
    assert 7.5 < grown.pop("dedup") < 8  # comparisons by 8, the fit of the index by 4
    assert list(grown.values()) == pytest.approx([4] * len(grown))
    given = (
        "plan --addresses 4e9 --machines 4 --cores 16 --gigabits 40 --price 0.5 --accelerators 8"
    )
    assert curate.main([*given.split(), "--accelerator-price", "2"]) == 0
    assert capsys.readouterr().out == planning.table(large) + "\n"
