"""Converts collections of images to ArrayRecord shards: plan first, then work that can be killed.

1. *Plan* (``plan``). The inputs are listed in a fixed order and dealt to shards. The plan is
   written to ``<output>/.plan`` before any work: one file of inputs a shard, ``settings.json``
   last. From then on it is the truth: the same command again continues it, another is refused.
2. *Stage* (``work.stage_shard``). Each shard is a function of its own plan alone, so any runner
   (``runners``: a process pool, or Apache Beam) does them in any order. It reads its inputs, drops
   what breaks the rules (``items``), counts (``stats``), and leaves records and digests in
   ``.plan``.
3. *Duplicates* (``duplicates``). The digests of all shards are merged; the first image in the order
   of the plan stays.
4. *Finish* (``work.finish_shard``). A staged shard without duplicates is renamed into place, one
   with duplicates is copied without them. Steps 2 to 4 are done in waves of shards, so that the
   first are final long before the last input is read.

Every file is written under a temporary name, synced, and renamed: a name without ``.tmp`` means
"complete", and it is never written again.

A reader also brings the annotations that were asked for; ``items`` checks them with the image.

What a value of an input becomes as a label or a caption is decided in ``fields`` for all readers.

A new kind of input is a ``Reader`` (what one line of the plan holds) and a function that lists its
lines; everything else stays. ``folder_reader``, ``tar_reader`` (img2dataset, webdataset, MetaCLIP),
``parquet_reader``, ``tfds_reader`` and ``records_reader`` are the five there are.
"""
