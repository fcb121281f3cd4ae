"""Data curation as MetaCLIP defines it (arXiv 2309.16671): texts are matched with a list of entries
and sampled so that no entry is in more of them than a threshold asks for.

1. *Entries* (``ngrams``, ``entries``). A list of words and phrases: any list, or one built from
   counts of words and of pairs of words.
2. *Matching* (``matching``, ``index``). Which entries each caption of each record holds. A shard of
   records becomes one file of the index; their sum is the count of each entry over the pool.
3. *Balancing* (``balancing``). A caption is sampled with the probability that one of its entries
   asks for it; a record stays with its sampled captions, or goes.

Both passes are functions of one shard alone, done by a pool of processes; whatever has its name is
complete. ``report`` makes the tables and the picture. ``tools/curate.py`` is the command.

Records are also chosen by scores (``scores``, ``scorers``, ``heads``, ``selecting``) and by
features (``feature_pool``: ``near_duplicates``, ``clusters``, ``by_cluster``, ``retrieving``). The
result is a selection, a list of records, and no shard is copied.
"""
