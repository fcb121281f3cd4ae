"""Runs the converter's engine in the test's own process, and reads what it wrote."""

import os

from array_record.python import array_record_module

from webssl_jax.data import records
from webssl_jax.data.converter import items, plan, runners, stats, work


def read_shards(folder, split="train"):
    """Records of a split by key, in the order of the shards; keys must be unique."""
    found = {}
    for path in sorted(folder.glob(f"{split}-*.arrayrecord")):
        reader = array_record_module.ArrayRecordReader(str(path))
        for place in range(reader.num_records()):
            record = records.decode(reader.read([place])[0])
            assert record.key not in found
            found[record.key] = record
        reader.close()
    return found


def run_engine(output, reader, units, rules=None, shards=1):
    """Converts ``units`` without a pool and returns the statistics."""
    dealt = {"train": plan.deal(units, shards)}
    plan.prepare(output, {"reader": repr(reader)}, lambda: ({}, dealt))
    rules = rules or items.Rules()
    total = len(dealt["train"])
    parts = [work.Shard(str(output), "train", i, total, reader, rules) for i in range(total)]
    for shard in parts:
        work.stage_shard(shard)
    runners.mark_duplicates(parts, rules)
    for shard in parts:
        work.finish_shard(shard)
    return stats.total_stats([runners.read_json(s.aside(".stats.json")) for s in parts])


class DyingReader:
    """Ends its process, as the kernel does when memory is short."""

    source = "x"

    def read(self, unit, advance):
        os._exit(9)


def counts(table):
    """{reason: count} of ``dropped`` or ``notes``."""
    return {reason: row["count"] for reason, row in table.items()}
