"""Views that predict each other, with normally distributed embeddings."""
