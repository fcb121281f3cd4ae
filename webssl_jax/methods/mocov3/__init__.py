"""Contrast of two views of an image, with a running average for keys."""
