"""Evaluations: rows of a config become outcomes. ``base.py`` says what an evaluation is,
``suite.py`` runs them, ``outcome.py`` is what they leave, ``tables.py`` shows it."""
