"""Compiles programs for TPU slices that are not here: does it fit, what does it cost.

``command.py`` is ``python -m webssl_jax.plan``; ``training.py`` compiles the train step,
``extraction.py`` the features for an evaluation; ``hlo.py`` and ``bundles.py`` read what the
compiler reports; ``compiled.py`` keeps the compiled step in a file.
"""
