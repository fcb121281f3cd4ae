"""Rows of evaluations ready to use: ``webssl evaluate --model PATH --evals NAME``."""
