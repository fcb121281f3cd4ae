"""Masked autoencoding, as Web-MAE trains it."""
