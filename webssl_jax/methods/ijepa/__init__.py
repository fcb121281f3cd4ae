"""Joint-embedding prediction of hidden blocks."""
