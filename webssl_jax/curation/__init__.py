"""Data curation as MetaCLIP defines it (arXiv 2309.16671): texts are matched with a list of entries
and sampled so that no entry is in more of them than a threshold asks for.

1. *Entries* (``ngrams``, ``entries``). A list of words and phrases: any list, or one built from
   counts of words and of pairs of words.
2. *Matching* (``matching``, ``scorers.matches``). Which entries each caption of each record holds:
   scores, whose sum is the count of each entry over the pool (``passes``).
3. *Balancing* (``balancing``). A caption is sampled with the probability that one of its entries
   asks for it; a record stays with its sampled captions, or goes.

Scores (``scores``, ``scorers``, ``heads``) are columns beside the shards, a row a record, and a
selection (``selecting``) is a mask of them: a list of records, and no shard is copied. What is
found by features (``feature_pool``: ``near_duplicates``, ``clusters``, ``by_cluster``,
``retrieving``) is scores and a selection, too.

All passes are functions of one shard alone (``engine``), done by any runner; whatever has its name
is complete. ``report`` makes the tables and the picture. ``tools/curate.py`` is the command, with
its parts in ``commands``; ``planning`` says what a crawl takes.
"""
