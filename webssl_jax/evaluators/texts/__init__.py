"""Evaluations of models with a text tower: classes by their names, images and captions."""
