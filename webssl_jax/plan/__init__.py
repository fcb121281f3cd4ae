"""Compiles a training step for TPU slices that are not here: does it fit, what does it cost.

``python -m webssl_jax.plan`` is ``training.py``; ``hlo.py`` and ``bundles.py`` read what the
compiler reports; ``compiled.py`` keeps the compiled step in a file.
"""
